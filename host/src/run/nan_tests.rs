//! Arithmetic that every host does alike: what a guest can see of a NaN that arithmetic made is always the canonical one.
//! (Instructions whose results differ between machines are refused: `tests/guests/hostile/upload-relaxed-simd.wat`.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::tests::{attempt, command};
use super::*;

/// Canonical NaNs of both widths, with the sign that makes them one: none.
const F32: u32 = 0x7fc0_0000;
const F64: u64 = 0x7ff8_0000_0000_0000;

/// Where NaNs with odd payloads lie, signalling and negative ones among them, and what makes a NaN of numbers.
const OPERANDS_F32: [u32; 6] = [0x7fa1_2345, 0xffc5_4321, 0x7fff_ffff, 0xff80_0001, 0x7f80_0000, 0xff80_0000];
const OPERANDS_F64: [u64; 6] = [
    0x7ff4_1234_5678_9abc,
    0xfff8_dead_beef_0001,
    0x7fff_ffff_ffff_ffff,
    0xfff0_0000_0000_0001,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
];

/// Of the operands of a width, how many are NaNs: all but the last two.
const NANS: usize = OPERANDS_F32.len() - 2;
/// Results of conversions from the other width, the last of each width: of each NaN one scalar and two lanes of a vector.
const CONVERTED: usize = 3 * NANS;

/// A command that does every operation of both widths, scalar and in vectors, on operands from memory, where no
/// compiler can look, and writes all results to stdout: first those of 32 bits, then those of 64.
fn program() -> (String, usize, usize) {
    let (mut body, mut at) = (String::new(), 4_096);
    let mut ends = Vec::new();
    for (width, lanes, base, count) in
        [("f32", "f32x4", 64, OPERANDS_F32.len()), ("f64", "f64x2", 1_024, OPERANDS_F64.len())]
    {
        let size = if width == "f32" { 4 } else { 8 };
        let load = |kind: &str, n: usize| match kind {
            "v128" => format!("({lanes}.splat ({width}.load (i32.const {})))", base + n * size),
            _ => format!("({width}.load (i32.const {}))", base + n * size),
        };
        let mut emit = |kind: &str, value: String| {
            let bytes = if kind == "v128" { 16 } else { size };
            body.push_str(&format!("({kind}.store (i32.const {at}) {value})\n"));
            at += bytes;
        };
        for kind in [width, "v128"] {
            let prefix = if kind == "v128" { lanes } else { width };
            // Of one NaN. The last two operands are infinities, of which these make none.
            for op in ["sqrt", "ceil", "floor", "trunc", "nearest"] {
                for n in 0..count - 2 {
                    emit(kind, format!("({prefix}.{op} {})", load(kind, n)));
                }
            }
            // The square root of a negative number.
            emit(kind, format!("({prefix}.sqrt {})", load(kind, count - 1)));
            for op in ["add", "sub", "mul", "div", "min", "max"] {
                for (a, b) in [(0, 1), (1, 0), (2, 4), (5, 3), (0, 0), (4, 1)] {
                    emit(kind, format!("({prefix}.{op} {} {})", load(kind, a), load(kind, b)));
                }
            }
            // NaNs out of numbers: infinity less infinity, infinity over infinity.
            emit(kind, format!("({prefix}.sub {0} {0})", load(kind, count - 2)));
            emit(kind, format!("({prefix}.div {} {})", load(kind, count - 2), load(kind, count - 1)));
        }
        // From the other width. Of a vector's results only those that come from NaNs are looked at.
        for n in 0..NANS {
            let (narrow, wide) = (64 + n * 4, 1_024 + n * 8);
            let values = if width == "f32" {
                let pair = format!("(f32x4.demote_f64x2_zero (f64x2.splat (f64.load (i32.const {wide}))))");
                vec![
                    format!("(f32.demote_f64 (f64.load (i32.const {wide})))"),
                    format!("(f32x4.extract_lane 0 {pair})"),
                    format!("(f32x4.extract_lane 1 {pair})"),
                ]
            } else {
                let pair = format!("(f64x2.promote_low_f32x4 (f32x4.splat (f32.load (i32.const {narrow}))))");
                vec![
                    format!("(f64.promote_f32 (f32.load (i32.const {narrow})))"),
                    format!("(f64x2.extract_lane 0 {pair})"),
                    format!("(f64x2.extract_lane 1 {pair})"),
                ]
            };
            for value in values {
                emit(width, value);
            }
        }
        ends.push(at);
    }
    let data = |at: usize, bytes: Vec<u8>| {
        let text: String = bytes.iter().map(|byte| format!("\\{byte:02x}")).collect();
        format!("(data (i32.const {at}) \"{text}\")")
    };
    let f32s = data(64, OPERANDS_F32.iter().flat_map(|n| n.to_le_bytes()).collect());
    let f64s = data(1_024, OPERANDS_F64.iter().flat_map(|n| n.to_le_bytes()).collect());
    let (of_32, of_64) = (ends[0] - 4_096, ends[1] - ends[0]);
    let program = format!(
        r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2) {f32s} {f64s}
  (func (export "_start")
    {body}
    (i32.store (i32.const 0) (i32.const 4096)) (i32.store (i32.const 4) (i32.const {}))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#,
        of_32 + of_64
    );
    (program, of_32, of_64)
}

/// What the program writes where this engine compiles and runs it: results of 32 bits, and of 64.
async fn results(engine: Engine) -> (Vec<u32>, Vec<u64>) {
    let (program, of_32, of_64) = program();
    let wasm = wat::parse_str(&program).unwrap();
    let code = engine.precompile_module(&wasm).unwrap();
    let runtime = Runtime::with(engine).unwrap();
    let module = runtime.load(&Artifact::trusted(ModuleHash::of(&wasm), code.into())).unwrap();
    let one = attempt(&module, command(b""), Limits::default());
    let outcome = runtime.attempt(module, one, Arc::new(Control::new(0, 0))).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
    assert_eq!(outcome.output.len(), of_32 + of_64);
    let (narrow, wide) = outcome.output.split_at(of_32);
    let narrow: Vec<_> = narrow.chunks_exact(4).map(|n| u32::from_le_bytes(n.try_into().unwrap())).collect();
    let wide: Vec<_> = wide.chunks_exact(8).map(|n| u64::from_le_bytes(n.try_into().unwrap())).collect();
    assert!(narrow.len() > 200 && wide.len() > 150, "{} and {}", narrow.len(), wide.len());
    (narrow, wide)
}

#[tokio::test]
async fn every_nan_that_arithmetic_makes_is_the_canonical_one() {
    let (narrow, wide) = results(engine::running(1, 1).unwrap().0).await;
    let odd: Vec<_> = narrow.iter().enumerate().filter(|(_, n)| **n != F32).collect();
    assert!(odd.is_empty(), "{odd:x?}");
    let odd: Vec<_> = wide.iter().enumerate().filter(|(_, n)| **n != F64).collect();
    assert!(odd.is_empty(), "{odd:x?}");
}

#[tokio::test]
async fn without_the_setting_the_same_arithmetic_shows_other_nans() {
    let mut config = engine::config();
    config.cranelift_nan_canonicalization(false);
    let (narrow, wide) = results(Engine::new(&config).unwrap()).await;
    assert!(narrow.iter().any(|n| *n != F32) && wide.iter().any(|n| *n != F64), "nobody would see it");
    let demoted = &narrow[narrow.len() - CONVERTED..];
    let promoted = &wide[wide.len() - CONVERTED..];
    assert!(
        demoted.iter().any(|n| *n != F32) && promoted.iter().any(|n| *n != F64),
        "nobody would see it of conversions"
    );
    // Whatever they are, NaNs they are: the program makes nothing else.
    assert!(
        narrow.iter().all(|n| f32::from_bits(*n).is_nan())
            && wide.iter().all(|n| f64::from_bits(*n).is_nan())
    );
}
