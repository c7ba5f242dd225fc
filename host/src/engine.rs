//! The one place where Wasmtime is configured. The compile child, the cells and the fingerprint of
//! compiled code all start from [`config`], so code compiled by one loads in the other.
//! Never decides about limits of single attempts.

use std::hash::{Hash, Hasher};
use std::num::NonZeroUsize;

use sha2::{Digest, Sha256};
use wasmtime::{
    Config, Enabled, Engine, InstanceAllocationStrategy, OperatorCost, PoolingAllocationConfig,
    WasmBacktraceDetails,
};

/// The exact Wasmtime this crate is built against; part of the fingerprint of compiled code.
/// A test compares it with the lock file.
pub const WASMTIME_VERSION: &str = "48.0.8";

/// Core instances of one attempt: a component brings its own, its shims' and its dependencies'.
pub(crate) const INSTANCES_PER_ATTEMPT: u32 = 64;
/// Linear memories of one attempt.
pub(crate) const MEMORIES_PER_ATTEMPT: u32 = 8;
/// Tables of one attempt (main table plus those of shims).
pub(crate) const TABLES_PER_ATTEMPT: u32 = 8;
/// Elements of one table. The pool maps 8 or 16 bytes for each of them and slot.
pub(crate) const TABLE_ELEMENTS: u64 = 65_536;
/// Bytes of engine metadata of one core instance (functions, globals, types it declares).
const CORE_INSTANCE_BYTES: usize = 4 << 20;
/// Address space reserved per memory: with 4 GiB bounds checks are elided.
const MEMORY_RESERVATION: u64 = 4 << 30;
/// Bytes of a memory kept resident between instances where PAGEMAP_SCAN exists.
const KEEP_RESIDENT: usize = 10 << 20;
/// The same without PAGEMAP_SCAN, where every kept byte is cleared each time.
const KEEP_RESIDENT_NO_SCAN: usize = 64 << 10;
/// Bytes of a table kept resident between instances.
const TABLE_KEEP_RESIDENT: usize = 64 << 10;
/// Slots that stay warm while unused; bounds what an idle cell keeps resident.
pub(crate) const WARM_SLOTS: u32 = 100;
/// Stack of the guest.
const WASM_STACK: usize = 512 << 10;
/// Stack of a fiber: the guest's and that of the host calls it makes.
const FIBER_STACK: usize = 2 << 20;
/// Frames of a backtrace.
pub(crate) const BACKTRACE_FRAMES: usize = 64;

/// Fuel prices. `memory.grow` costs microseconds per page, so it is priced as high as the type
/// allows, flat and per page; everything else keeps the engine's prices (one per operator, one per
/// byte or element of bulk operations).
fn prices() -> OperatorCost {
    let mut cost = OperatorCost::new();
    cost.MemoryGrow = u8::MAX;
    cost.TableGrow = u8::MAX;
    cost.variable.memory_grow_per_page = u8::MAX;
    cost
}

/// The configuration that determines compiled code. On-demand allocation: nothing is reserved.
pub(crate) fn config() -> Config {
    let mut config = Config::new();
    config
        .consume_fuel(true)
        .operator_cost(prices())
        .epoch_interruption(true)
        .concurrency_support(false)
        .shared_memory(false)
        .wasm_memory64(false)
        .wasm_relaxed_simd(false)
        .cranelift_nan_canonicalization(true)
        .memory_reservation(MEMORY_RESERVATION)
        .max_wasm_stack(WASM_STACK)
        .async_stack_size(FIBER_STACK)
        .generate_address_map(true)
        .wasm_backtrace_details(WasmBacktraceDetails::Enable)
        .wasm_backtrace_max_frames(NonZeroUsize::new(BACKTRACE_FRAMES))
        // Backtraces walk frame pointers; registering unwind tables would only slow down loading.
        .native_unwind_info(false);
    config
}

/// An engine that compiles and describes but reserves no address space.
pub(crate) fn compiling() -> wasmtime::Result<Engine> {
    Engine::new(&config())
}

/// Bytes that so many unused slots of a pool may keep resident.
pub(crate) fn warm_bytes(warm: u32) -> u64 {
    u64::from(warm.min(WARM_SLOTS)).saturating_mul((KEEP_RESIDENT + TABLE_KEEP_RESIDENT) as u64)
}

/// An engine that runs up to `slots` attempts at the same time and keeps up to `warm` of them warm between attempts, and
/// whether it asks the kernel which pages a guest touched.
pub(crate) fn running(slots: u32, warm: u32) -> wasmtime::Result<(Engine, bool)> {
    match pooled(slots, warm, Enabled::Yes, KEEP_RESIDENT) {
        Ok(engine) => Ok((engine, true)),
        // Kernels before 6.7 lack PAGEMAP_SCAN, or a sandbox withholds it.
        Err(_) => without_scan(slots, warm).map(|engine| (engine, false)),
    }
}

/// The same where nobody tells which pages a guest touched.
pub(crate) fn without_scan(slots: u32, warm: u32) -> wasmtime::Result<Engine> {
    pooled(slots, warm, Enabled::No, KEEP_RESIDENT_NO_SCAN)
}

fn pooled(slots: u32, warm: u32, scan: Enabled, keep_resident: usize) -> wasmtime::Result<Engine> {
    let slots = slots.max(1);
    let mut pool = PoolingAllocationConfig::new();
    pool.total_stacks(slots)
        .total_component_instances(slots)
        .total_core_instances(slots.saturating_mul(INSTANCES_PER_ATTEMPT))
        .total_memories(slots.saturating_mul(MEMORIES_PER_ATTEMPT))
        .total_tables(slots.saturating_mul(TABLES_PER_ATTEMPT))
        .max_memories_per_module(MEMORIES_PER_ATTEMPT)
        .max_tables_per_module(TABLES_PER_ATTEMPT)
        .table_elements(usize::try_from(TABLE_ELEMENTS)?)
        .max_core_instance_size(CORE_INSTANCE_BYTES)
        .max_component_instance_size(CORE_INSTANCE_BYTES)
        .max_memory_size(usize::try_from(MEMORY_RESERVATION)?)
        .max_unused_warm_slots(slots.min(warm).min(WARM_SLOTS))
        .linear_memory_keep_resident(keep_resident)
        .table_keep_resident(TABLE_KEEP_RESIDENT.min(keep_resident))
        .pagemap_scan(scan);
    let mut config = config();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    Engine::new(&config)
}

/// What compiled code depends on: exact Wasmtime, settings, CPU features. Code may be loaded only
/// under the fingerprint it was compiled under.
pub(crate) fn fingerprint() -> wasmtime::Result<[u8; 32]> {
    let engine = compiling()?;
    let mut hasher = ShaHasher(Sha256::new());
    hasher.write(WASMTIME_VERSION.as_bytes());
    engine.precompile_compatibility_hash().hash(&mut hasher);
    Ok(hasher.0.finalize().into())
}

/// Feeds what `Hash` yields into SHA-256; the 64-bit `finish` is not used.
struct ShaHasher(Sha256);

impl Hasher for ShaHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_named_wasmtime_version_is_the_locked_one() {
        let lock = include_str!("../../Cargo.lock");
        let wanted = format!("name = \"wasmtime\"\nversion = \"{WASMTIME_VERSION}\"");
        assert!(lock.contains(&wanted), "{wanted} is not in Cargo.lock");
    }

    #[test]
    fn the_fingerprint_is_stable_within_a_build() {
        assert_eq!(fingerprint().unwrap(), fingerprint().unwrap());
    }
}
