//! Any bytes as a module's description of itself.
#![no_main]

use sandbar_host::manifest::SECTION;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // The smallest command, and the section behind it.
    let mut module =
        b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x07\x0a\x01\x06_start\0\0\x0a\x04\x01\x02\0\x0b"
            .to_vec();
    let Ok(name_len) = u8::try_from(SECTION.len()) else { return };
    module.push(0);
    let mut len = 1 + SECTION.len() + bytes.len();
    while len > 0x7f {
        module.push((len & 0x7f) as u8 | 0x80);
        len >>= 7;
    }
    module.push(len as u8);
    module.push(name_len);
    module.extend_from_slice(SECTION.as_bytes());
    module.extend_from_slice(bytes);
    if let Ok(found) = sandbar_host::inspect::inspect(&module) {
        let wanted = found.manifest.unwrap_or_default();
        assert!(sandbar_host::limits::Limits::default().with(&wanted.limits).check().is_ok());
    }
});
