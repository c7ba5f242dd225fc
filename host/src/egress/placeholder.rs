//! Secrets in the headers of requests: a guest writes `{{secret:NAME}}` in the value of a header, and the parent puts the
//! secret there after it has checked who may send it where. Owns the grammar. Pure; knows no secret but those it is
//! handed, and says none of them in its words.

use super::call::{Code, MAX_HEADER_BYTES, Refusal, Request};

/// What a placeholder begins with.
const OPEN: &[u8] = b"{{secret:";
/// And ends with.
const CLOSE: &[u8] = b"}}";
/// Characters of a secret's name.
const MAX_NAME: usize = 64;
/// Placeholders in the headers of one request.
const MAX_PLACEHOLDERS: usize = 8;

/// A secret that a request is to carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// In which header, in lower case.
    pub header: String,
    /// Which one.
    pub secret: String,
}

/// The next placeholder of a value: where it begins, the name in it, and where it ends. `Err`: one that is never closed or
/// names nothing that could be a secret.
fn next(value: &[u8]) -> Result<Option<(usize, &str, usize)>, Refusal> {
    let Some(begin) = value.windows(OPEN.len()).position(|window| window == OPEN) else { return Ok(None) };
    let rest = value.get(begin + OPEN.len()..).unwrap_or_default();
    let malformed = || {
        let words = "a header holds a malformed {{secret:NAME}}: a name has 1 to 64 letters, digits and _, no digit first";
        Refusal::new(Code::HttpRequestDenied, words)
    };
    let end = rest.windows(CLOSE.len()).position(|window| window == CLOSE).ok_or_else(malformed)?;
    let name = rest.get(..end).and_then(|name| std::str::from_utf8(name).ok()).ok_or_else(malformed)?;
    let fits = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if !fits {
        return Err(malformed());
    }
    Ok(Some((begin, name, begin + OPEN.len() + end + CLOSE.len())))
}

/// Which secrets the headers of a request ask for.
///
/// # Errors
/// A placeholder is malformed, or there are too many.
pub fn wanted(request: &Request) -> Result<Vec<Wanted>, Refusal> {
    let mut found = Vec::new();
    for (header, value) in &request.headers {
        let mut rest = value.as_slice();
        while let Some((_, name, end)) = next(rest)? {
            if found.len() == MAX_PLACEHOLDERS {
                return Err(Refusal::new(
                    Code::HttpRequestDenied,
                    format!("the headers of one request may ask for at most {MAX_PLACEHOLDERS} secrets"),
                ));
            }
            found.push(Wanted { header: header.to_ascii_lowercase(), secret: name.to_owned() });
            rest = rest.get(end..).unwrap_or_default();
        }
    }
    Ok(found)
}

/// Puts secrets where their placeholders stand. What a secret contains is not looked at again: it can ask for no other.
///
/// # Errors
/// There is no value for one, it cannot stand in a header, or the headers get too long.
pub fn fill<'v>(request: &mut Request, value_of: impl Fn(&str) -> Option<&'v [u8]>) -> Result<(), Refusal> {
    let mut bytes = 0usize;
    for (header, value) in &mut request.headers {
        let (mut filled, mut changed) = (Vec::new(), false);
        let mut rest = value.as_slice();
        while let Some((begin, name, end)) = next(rest)? {
            let secret = value_of(name).ok_or_else(|| {
                Refusal::new(Code::HttpRequestDenied, format!("there is no secret `{name}`"))
            })?;
            // A line break would end the header, and what follows it would be another.
            if !secret.iter().all(|b| matches!(b, b'\t' | b' '..=b'~' | 0x80..)) {
                return Err(Refusal::new(
                    Code::HttpRequestDenied,
                    format!("the secret `{name}` has a character that cannot stand in a header"),
                ));
            }
            filled.extend_from_slice(rest.get(..begin).unwrap_or_default());
            filled.extend_from_slice(secret);
            changed = true;
            rest = rest.get(end..).unwrap_or_default();
        }
        if changed {
            filled.extend_from_slice(rest);
            *value = filled;
        }
        bytes = bytes.saturating_add(header.len()).saturating_add(value.len());
    }
    if bytes > MAX_HEADER_BYTES {
        return Err(Refusal::new(
            Code::HttpRequestHeaderSectionSize,
            format!("with its secrets the request has more than {MAX_HEADER_BYTES} bytes of headers"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::egress::grant::Scheme;

    fn request(values: &[&[u8]]) -> Request {
        Request {
            method: "GET".to_owned(),
            scheme: Scheme::Https,
            authority: "a.example".to_owned(),
            path: "/{{secret:A}}".to_owned(),
            headers: values.iter().map(|value| ("X-Key".to_owned(), value.to_vec())).collect(),
            body: false,
            connect_ms: None,
            first_byte_ms: None,
            between_bytes_ms: None,
        }
    }

    fn value_of(name: &str) -> Option<&'static [u8]> {
        match name {
            "A" => Some(b"{{secret:B}}"),
            "B" => Some(b"bee"),
            "EMPTY" => Some(b""),
            "BROKEN" => Some(b"a\r\nx: y"),
            "LONG" => Some(&[b'x'; MAX_HEADER_BYTES]),
            _ => None,
        }
    }

    #[test]
    fn placeholders_are_found_and_filled_once_and_everything_else_stays() {
        let mut one = request(&[
            b"Bearer {{secret:B}}",
            b"{{secret:A}}-{{secret:B}}.",
            b"plain {{",
            b"{{secret:EMPTY}}!",
        ]);
        let found = wanted(&one).unwrap();
        let names: Vec<_> = found.iter().map(|w| (w.header.as_str(), w.secret.as_str())).collect();
        assert_eq!(names, [("x-key", "B"), ("x-key", "A"), ("x-key", "B"), ("x-key", "EMPTY")]);
        fill(&mut one, value_of).unwrap();
        let values: Vec<_> = one.headers.iter().map(|(_, value)| value.as_slice()).collect();
        let expected: [&[u8]; 4] = [b"Bearer bee", b"{{secret:B}}-bee.", b"plain {{", b"!"];
        assert_eq!(values, expected, "a secret that looks like a placeholder is none");
        assert_eq!(one.path, "/{{secret:A}}", "only headers carry secrets");
    }

    #[test]
    fn what_is_malformed_missing_or_would_split_the_header_is_refused_without_saying_the_secret() {
        for bad in ["{{secret:", "{{secret:}}", "{{secret:1A}}", "{{secret:a b}}", "{{secret:\u{e9}}}"] {
            assert_eq!(
                wanted(&request(&[bad.as_bytes()])).unwrap_err().code,
                Code::HttpRequestDenied,
                "{bad}"
            );
        }
        assert!(wanted(&request(&[&b"{{secret:B}}"[..]; MAX_PLACEHOLDERS])).is_ok());
        assert!(wanted(&request(&[&b"{{secret:B}}"[..]; MAX_PLACEHOLDERS + 1])).is_err());
        for name in ["NOBODY", "BROKEN", "LONG"] {
            let error =
                fill(&mut request(&[format!("{{{{secret:{name}}}}}").as_bytes()]), value_of).unwrap_err();
            assert!(!error.message.contains("x: y") && !error.message.contains("xxx"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_value_makes_the_reader_panic(value in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80)) {
            let mut one = request(&[&value]);
            let _ = wanted(&one);
            let _ = fill(&mut one, value_of);
        }
    }
}
