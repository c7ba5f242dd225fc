//! Any bytes as what a guest writes to stderr, in pieces: the log is clean, bounded and counted.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: (u16, Vec<Vec<u8>>)| {
    let (limit, pieces) = input;
    sandbar_host::fuzzing::log(u64::from(limit), &pieces);
});
