//! Writes random modules into a directory: `sandbar-smith DIRECTORY COUNT SEED`. The same arguments give the same
//! bytes. Half of them, `runs-*.wasm`, are commands that this host should take and run; the others, `any-*.wasm`, are
//! valid WebAssembly of whatever kind.

use std::path::Path;

use arbitrary::Unstructured;
use wasm_smith::{Config, Module};

/// Bytes of chance for one module: enough for some thousand instructions.
const CHANCE: usize = 16 << 10;

/// What a random command may import: calls that take numbers and pointers, which will be nonsense.
const IMPORTS: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open" (func (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_readdir" (func (param i32 i32 i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func (param i32))))"#;

/// What it exports.
const EXPORTS: &str = r#"(module (memory (export "memory") 1) (func (export "_start")))"#;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(directory), Some(count), Some(seed)) =
        (arguments.next(), number(arguments.next()), number(arguments.next()))
    else {
        eprintln!("usage: sandbar-smith DIRECTORY COUNT SEED");
        std::process::exit(2);
    };
    if let Err(error) = write(Path::new(&directory), count, seed) {
        eprintln!("sandbar-smith: {error}");
        std::process::exit(1);
    }
}

fn number(text: Option<String>) -> Option<u64> {
    text?.parse().ok()
}

fn write(directory: &Path, count: u64, seed: u64) -> Result<(), Box<dyn std::error::Error>> {
    let (imports, exports) = (wat::parse_str(IMPORTS)?, wat::parse_str(EXPORTS)?);
    std::fs::create_dir_all(directory)?;
    for index in 0..count {
        let runs = index % 2 == 0;
        let bytes = chance(seed, index);
        let mut chance = Unstructured::new(&bytes);
        let config = if runs { command(imports.clone(), exports.clone()) } else { any(&mut chance)? };
        let module = Module::new(config, &mut chance)?.to_bytes();
        let name = if runs { "runs" } else { "any" };
        std::fs::write(directory.join(format!("{name}-{index:04}.wasm")), module)?;
    }
    Ok(())
}

/// What this host takes.
fn command(imports: Vec<u8>, exports: Vec<u8>) -> Config {
    Config {
        available_imports: Some(imports),
        exports: Some(exports),
        gc_enabled: false,
        exceptions_enabled: false,
        threads_enabled: false,
        memory64_enabled: false,
        relaxed_simd_enabled: false,
        // `externref` needs a collector of garbage, which is off.
        reference_types_enabled: false,
        max_memories: 4,
        max_memory32_bytes: 16 << 20,
        max_table_elements: 10_000,
        max_instructions: 1_000,
        min_funcs: 3,
        ..Config::default()
    }
}

/// Anything; which features, is chance too.
fn any(chance: &mut Unstructured<'_>) -> arbitrary::Result<Config> {
    Ok(Config {
        gc_enabled: chance.arbitrary()?,
        exceptions_enabled: chance.arbitrary()?,
        threads_enabled: chance.arbitrary()?,
        memory64_enabled: chance.arbitrary()?,
        relaxed_simd_enabled: chance.arbitrary()?,
        custom_page_sizes_enabled: chance.arbitrary()?,
        generate_custom_sections: true,
        max_memories: 12,
        max_tables: 12,
        allow_invalid_funcs: chance.ratio(1, 4)?,
        ..Config::default()
    })
}

/// Bytes that follow from a seed and an index: splitmix64.
fn chance(seed: u64, index: u64) -> Vec<u8> {
    let mut state = seed ^ index.wrapping_mul(0xd1b5_4a32_d192_ed03);
    let mut bytes = Vec::with_capacity(CHANCE);
    while bytes.len() < CHANCE {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    bytes
}
