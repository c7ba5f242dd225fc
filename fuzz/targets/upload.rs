//! Any bytes as an upload: the look at them ends in a verdict.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = sandbar_host::inspect::inspect(bytes);
});
