//! `grants(…)`: the capabilities that a task asks for. Owns their grammar; whether one is given is
//! decided by an admin of the tenant.

use syn::punctuated::Punctuated;
use syn::{Error, Expr, LitStr, Meta, Result, Token};

use crate::args::{bytes, key, literal, once, quoted, text, value};

/// Hosts and secrets of one task: what the host's reader takes.
const MAX_NAMED: usize = 32;
/// Bytes of a host's name, as DNS has it.
const MAX_HOST: usize = 253;
/// Bytes of a task's name.
const MAX_TASK: usize = 63;
/// Bytes of a secret's name.
const MAX_SECRET: usize = 64;

/// The members of `grants` as JSON, in the order of the source.
pub(crate) fn parse(metas: &Punctuated<Meta, Token![,]>) -> Result<Vec<(&'static str, String)>> {
    let mut grants = Vec::new();
    let mut seen = Vec::new();
    for meta in metas {
        let grant = match key(meta)?.as_str() {
            "http" => ("http", names(value(meta)?, check_host)?),
            "kv" => {
                meta.require_path_only()?;
                ("kv", "true".to_owned())
            }
            "secrets" => ("secrets", names(value(meta)?, check_secret)?),
            "invoke" => ("invoke", names(value(meta)?, check_task)?),
            "scratch" | "scratch_bytes" => {
                let amount = bytes(value(meta)?)?;
                if amount == 0 {
                    return Err(Error::new_spanned(
                        value(meta)?,
                        "a scratch directory of 0 bytes holds nothing",
                    ));
                }
                ("scratch_bytes", amount.to_string())
            }
            _ => {
                return Err(Error::new_spanned(
                    meta.path(),
                    "unknown grant; there are `http = [\"host\"]`, `kv`, `secrets = [\"NAME\"]`, `invoke = [\"task\"]` and `scratch = \"16MiB\"`",
                ));
            }
        };
        once(&mut seen, grant.0, meta)?;
        grants.push(grant);
    }
    Ok(grants)
}

/// A JSON array of strings that each pass `check`.
fn names(expr: &Expr, check: fn(&str) -> std::result::Result<(), &'static str>) -> Result<String> {
    let Expr::Array(array) = expr else {
        return Err(Error::new_spanned(expr, "expected a list of strings in brackets"));
    };
    let mut names: Vec<String> = Vec::new();
    for element in &array.elems {
        let name: &LitStr = match literal(element) {
            Some(_) => text(element)?,
            None => return Err(Error::new_spanned(element, "expected a string")),
        };
        check(&name.value()).map_err(|why| Error::new_spanned(name, why))?;
        let json = quoted(&name.value());
        if names.contains(&json) {
            return Err(Error::new_spanned(name, "named twice"));
        }
        if names.len() == MAX_NAMED {
            return Err(Error::new_spanned(name, format!("at most {MAX_NAMED} can be named")));
        }
        names.push(json);
    }
    if names.is_empty() {
        return Err(Error::new_spanned(array, "an empty list asks for nothing; leave it out"));
    }
    Ok(format!("[{}]", names.join(",")))
}

/// `[http://|https://][*.]name[:port]`.
fn check_host(grant: &str) -> std::result::Result<(), &'static str> {
    const WANTED: &str = "expected a host such as \"api.example.com\", \"*.example.com\" or \"http://example.com:8080\", without a path";
    let rest = grant.strip_prefix("https://").or_else(|| grant.strip_prefix("http://")).unwrap_or(grant);
    let (host, port) = match rest.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (rest, None),
    };
    if port.is_some_and(|port| !matches!(port.parse::<u16>(), Ok(1..)) || port.starts_with(['+', '0'])) {
        return Err(WANTED);
    }
    let name = host.strip_prefix("*.").unwrap_or(host);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let fits = host.len() <= MAX_HOST && name.split('.').all(label);
    if fits { Ok(()) } else { Err(WANTED) }
}

fn check_task(name: &str) -> std::result::Result<(), &'static str> {
    let fits = (1..=MAX_TASK).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        && !name.starts_with(['-', '_']);
    if fits {
        Ok(())
    } else {
        Err("a task's name is 1 to 63 of a-z, 0-9, - and _, and begins with a letter or a digit")
    }
}

fn check_secret(name: &str) -> std::result::Result<(), &'static str> {
    let fits = (1..=MAX_SECRET).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if fits { Ok(()) } else { Err("a secret's name is 1 to 64 letters, digits and _, no digit first") }
}
