//! Any bytes as a frame, in both directions.
#![no_main]

use sandbar_host::cell::protocol::{FromCell, ToCell, unpack};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = unpack::<FromCell>(bytes, drop);
    let _ = unpack::<ToCell>(bytes, drop);
});
