//! The arguments of `#[task(…)]`: read, checked, and turned into the members of the manifest. Owns the
//! grammar and what can make no sense anywhere; the ranges of an installation are checked at upload.

use proc_macro2::TokenStream;
use syn::parse::Parser;
use syn::punctuated::Punctuated;
use syn::{Error, Expr, ExprLit, Lit, LitStr, Meta, Result, Token};

use crate::grants;

/// Names of tasks are at most this long; the control plane refuses longer ones.
const MAX_NAME: usize = 63;

/// What the attribute says.
#[derive(Debug, Default)]
pub(crate) struct Args {
    pub(crate) name: Option<String>,
    /// `log::LevelFilter` by its variant; `Info` where nothing is said.
    pub(crate) level: Option<&'static str>,
    limits: Vec<(&'static str, u64)>,
    retry: Vec<(&'static str, String)>,
    grants: Vec<(&'static str, String)>,
}

impl Args {
    pub(crate) fn parse(tokens: TokenStream) -> Result<Self> {
        let mut args = Self::default();
        let mut seen = Vec::new();
        for meta in Punctuated::<Meta, Token![,]>::parse_terminated.parse2(tokens)? {
            let key = key(&meta)?;
            once(&mut seen, &key, &meta)?;
            match key.as_str() {
                "name" => {
                    let literal = text(value(&meta)?)?;
                    check_name(&literal.value()).map_err(|why| Error::new_spanned(literal, why))?;
                    args.name = Some(literal.value());
                }
                "limits" => args.limits = limits(&list(&meta)?)?,
                "retry" => args.retry = retry(&list(&meta)?)?,
                "grants" => args.grants = grants::parse(&list(&meta)?)?,
                "log" => args.level = Some(level(text(value(&meta)?)?)?),
                _ => {
                    return Err(Error::new_spanned(
                        meta.path(),
                        "unknown argument; a task has `name`, `limits(…)`, `retry(…)`, `grants(…)` and `log`",
                    ));
                }
            }
        }
        Ok(args)
    }

    /// `,"limits":{…},"retry":{…},"grants":{…}`, without what the author has not named.
    pub(crate) fn json(&self) -> String {
        let limits: Vec<_> = self.limits.iter().map(|(key, value)| (*key, value.to_string())).collect();
        let mut json = String::new();
        for (name, members) in [("limits", &limits), ("retry", &self.retry), ("grants", &self.grants)] {
            if !members.is_empty() {
                let members: Vec<_> = members.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
                json.push_str(&format!(",\"{name}\":{{{}}}", members.join(",")));
            }
        }
        json
    }
}

/// What is wrong with a task's name, if anything.
pub(crate) fn check_name(name: &str) -> std::result::Result<(), String> {
    let fits = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        && !name.starts_with(['-', '_']);
    if fits {
        return Ok(());
    }
    Err(format!(
        "`{name}` is no name for a task: 1 to {MAX_NAME} of a-z, 0-9, - and _, a letter or a digit first; \
         choose one with #[task(name = \"…\")]"
    ))
}

fn limits(metas: &Punctuated<Meta, Token![,]>) -> Result<Vec<(&'static str, u64)>> {
    let mut limits = Vec::new();
    let mut seen = Vec::new();
    for meta in metas {
        let (name, amount) = match key(meta)?.as_str() {
            "fuel" => ("fuel", count(value(meta)?)?),
            "memory" | "memory_bytes" => ("memory_bytes", bytes(value(meta)?)?),
            "timeout" => ("timeout_ms", duration(value(meta)?)?),
            "timeout_ms" => ("timeout_ms", integer(value(meta)?)?),
            "output" | "output_bytes" => ("output_bytes", bytes(value(meta)?)?),
            "log" | "log_bytes" => ("log_bytes", bytes(value(meta)?)?),
            _ => {
                return Err(Error::new_spanned(
                    meta.path(),
                    "unknown limit; there are `fuel`, `memory`, `timeout`, `output` and `log`",
                ));
            }
        };
        once(&mut seen, name, meta)?;
        if amount == 0 && matches!(name, "fuel" | "memory_bytes" | "timeout_ms") {
            return Err(Error::new_spanned(value(meta)?, "no task can run with a limit of 0"));
        }
        limits.push((name, amount));
    }
    Ok(limits)
}

fn retry(metas: &Punctuated<Meta, Token![,]>) -> Result<Vec<(&'static str, String)>> {
    let mut retry = Vec::new();
    let mut seen = Vec::new();
    for meta in metas {
        let (name, json) = match key(meta)?.as_str() {
            "max_attempts" => {
                let attempts = integer(value(meta)?)?;
                if attempts == 0 {
                    return Err(Error::new_spanned(value(meta)?, "the first attempt counts, so at least 1"));
                }
                ("max_attempts", attempts.to_string())
            }
            "backoff" => {
                let literal = text(value(meta)?)?;
                let backoff = literal.value();
                if !matches!(backoff.as_str(), "fixed" | "exponential") {
                    return Err(Error::new_spanned(literal, "either \"fixed\" or \"exponential\""));
                }
                ("backoff", quoted(&backoff))
            }
            "initial" => ("initial_ms", duration(value(meta)?)?.to_string()),
            "initial_ms" => ("initial_ms", integer(value(meta)?)?.to_string()),
            "max" => ("max_ms", duration(value(meta)?)?.to_string()),
            "max_ms" => ("max_ms", integer(value(meta)?)?.to_string()),
            "factor" => ("factor", number(value(meta)?, 1.0, f64::MAX)?),
            "jitter" => ("jitter", number(value(meta)?, 0.0, 1.0)?),
            _ => {
                return Err(Error::new_spanned(
                    meta.path(),
                    "unknown; a retry policy has `max_attempts`, `backoff`, `initial`, `factor`, `max` and `jitter`",
                ));
            }
        };
        once(&mut seen, name, meta)?;
        retry.push((name, json));
    }
    Ok(retry)
}

fn level(literal: &LitStr) -> Result<&'static str> {
    Ok(match literal.value().as_str() {
        "off" => "Off",
        "error" => "Error",
        "warn" => "Warn",
        "info" => "Info",
        "debug" => "Debug",
        "trace" => "Trace",
        _ => {
            return Err(Error::new_spanned(literal, "one of off, error, warn, info, debug, trace"));
        }
    })
}

pub(crate) fn key(meta: &Meta) -> Result<String> {
    match meta.path().get_ident() {
        Some(ident) => Ok(ident.to_string()),
        None => Err(Error::new_spanned(meta.path(), "expected one word")),
    }
}

pub(crate) fn once(seen: &mut Vec<String>, name: &str, meta: &Meta) -> Result<()> {
    if seen.iter().any(|earlier| earlier == name) {
        return Err(Error::new_spanned(meta.path(), format!("`{name}` is given twice")));
    }
    seen.push(name.to_owned());
    Ok(())
}

pub(crate) fn value(meta: &Meta) -> Result<&Expr> {
    Ok(&meta.require_name_value()?.value)
}

fn list(meta: &Meta) -> Result<Punctuated<Meta, Token![,]>> {
    meta.require_list()?.parse_args_with(Punctuated::parse_terminated)
}

pub(crate) fn literal(expr: &Expr) -> Option<&Lit> {
    match expr {
        Expr::Lit(ExprLit { lit, .. }) => Some(lit),
        _ => None,
    }
}

pub(crate) fn text(expr: &Expr) -> Result<&LitStr> {
    match literal(expr) {
        Some(Lit::Str(literal)) => Ok(literal),
        _ => Err(Error::new_spanned(expr, "expected a string")),
    }
}

fn integer(expr: &Expr) -> Result<u64> {
    match literal(expr) {
        Some(Lit::Int(literal)) => literal.base10_parse(),
        _ => Err(Error::new_spanned(expr, "expected a whole number")),
    }
}

/// A JSON number from `min` to `max`.
fn number(expr: &Expr, min: f64, max: f64) -> Result<String> {
    let number: f64 = match literal(expr) {
        Some(Lit::Int(literal)) => literal.base10_parse()?,
        Some(Lit::Float(literal)) => literal.base10_parse()?,
        _ => return Err(Error::new_spanned(expr, "expected a number")),
    };
    if number < min || number > max {
        let range = if max == f64::MAX { format!("{min} up") } else { format!("{min} to {max}") };
        return Err(Error::new_spanned(expr, format!("expected a number from {range}")));
    }
    Ok(number.to_string())
}

fn count(expr: &Expr) -> Result<u64> {
    const UNITS: &[(&str, u64)] =
        &[("", 1), ("K", 1_000), ("M", 1_000_000), ("G", 1_000_000_000), ("T", 1_000_000_000_000)];
    with_unit(expr, UNITS, "a number, or a string such as \"20G\" with K, M, G or T")
}

pub(crate) fn bytes(expr: &Expr) -> Result<u64> {
    const UNITS: &[(&str, u64)] = &[
        ("", 1),
        ("B", 1),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
    ];
    with_unit(
        expr,
        UNITS,
        "a number of bytes, or a string such as \"128MiB\" with KiB, MiB, GiB, KB, MB or GB",
    )
}

/// Milliseconds. A bare number would leave the unit open.
fn duration(expr: &Expr) -> Result<u64> {
    const UNITS: &[(&str, u64)] = &[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
    let what = "a string such as \"30s\" with ms, s, m or h";
    match literal(expr) {
        Some(Lit::Str(_)) => with_unit(expr, UNITS, what),
        _ => Err(Error::new_spanned(expr, format!("expected {what}"))),
    }
}

fn with_unit(expr: &Expr, units: &[(&str, u64)], what: &str) -> Result<u64> {
    let Some(Lit::Str(literal)) = literal(expr) else {
        return integer(expr).map_err(|_| Error::new_spanned(expr, format!("expected {what}")));
    };
    let value = literal.value();
    let digits = value.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(value.len());
    let (amount, unit) = value.split_at(digits);
    let factor = units.iter().find(|(name, _)| *name == unit.trim_start()).map(|(_, factor)| *factor);
    amount
        .replace('_', "")
        .parse::<u64>()
        .ok()
        .zip(factor)
        .and_then(|(amount, factor)| amount.checked_mul(factor))
        .ok_or_else(|| Error::new_spanned(literal, format!("expected {what}")))
}

/// A JSON string.
pub(crate) fn quoted(value: &str) -> String {
    let mut json = String::from("\"");
    for c in value.chars() {
        match c {
            '"' | '\\' => json.extend(['\\', c]),
            c if c.is_control() && c.is_ascii() => json.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => json.push(c),
        }
    }
    json.push('"');
    json
}
