//! Values on the command line: durations, sizes, moments, tags, texts from files. Owns their spelling; what is in range
//! is for the server to say.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::failure::{Exit, Failure};
use crate::domain::names::TaskName;

/// Largest input from a file or a pipe, in bytes: the most that a server can be configured to take.
pub const MAX_INPUT: u64 = 32 << 20;
/// Largest module, in bytes: the most that a server can be configured to take.
pub const MAX_MODULE: u64 = 256 << 20;
/// Longest duration: ten years. More is a slip.
const MAX_DURATION_S: u64 = 10 * 366 * 86_400;

/// `1500ms`, `10s`, `5m`, `2h`, `1d`; a bare number is seconds.
///
/// # Errors
/// Says how it is written.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "write it like 500ms, 10s, 5m, 2h or 1d".to_owned();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let millis = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    let duration = Duration::from_millis(number.checked_mul(millis).ok_or_else(wrong)?);
    if duration.as_secs() > MAX_DURATION_S {
        return Err("that is more than ten years".to_owned());
    }
    Ok(duration)
}

/// `65536`, `64KiB`, `16MiB`, `1GiB`.
///
/// # Errors
/// Says how it is written.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || "write it like 65536, 64KiB, 16MiB or 1GiB".to_owned();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

/// `5000000`, `500M`, `20G`, `1T`.
///
/// # Errors
/// Says how it is written.
pub fn fuel(text: &str) -> Result<u64, String> {
    let wrong = || "write it like 5000000, 500M, 20G or 1T".to_owned();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = match unit {
        "" => 1,
        "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

/// A moment, `2026-12-01T09:00:00Z`.
///
/// # Errors
/// Says how it is written.
pub fn moment(text: &str) -> Result<DateTime<Utc>, String> {
    DateTime::parse_from_rfc3339(text)
        .map(|time| time.to_utc())
        .map_err(|_| "write it like 2026-12-01T09:00:00Z or 2026-12-01T10:00:00+01:00".to_owned())
}

/// A moment, or how long ago it was.
///
/// # Errors
/// Says how it is written.
pub fn past(text: &str) -> Result<DateTime<Utc>, String> {
    relative(text, |now, delta| now.checked_sub_signed(delta))
}

/// A moment, or how far ahead it is.
///
/// # Errors
/// Says how it is written.
pub fn future(text: &str) -> Result<DateTime<Utc>, String> {
    relative(text, |now, delta| now.checked_add_signed(delta))
}

fn relative(
    text: &str,
    step: impl Fn(DateTime<Utc>, TimeDelta) -> Option<DateTime<Utc>>,
) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = moment(text) {
        return Ok(time);
    }
    duration(text)
        .ok()
        .and_then(|distance| step(Utc::now(), TimeDelta::from_std(distance).ok()?))
        .ok_or_else(|| "write a duration like 10m, or a moment like 2026-12-01T09:00:00Z".to_owned())
}

/// `KEY=VALUE`.
///
/// # Errors
/// There is no `=`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it like NAME=VALUE".to_owned()),
    }
}

/// `KEY=VALUE` or, as the API writes it, `KEY:VALUE`.
///
/// # Errors
/// There is neither.
pub fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once(['=', ':']) {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it like KEY=VALUE".to_owned()),
    }
}

/// Name of a task.
///
/// # Errors
/// Says what is allowed.
pub fn task_name(text: &str) -> Result<TaskName, String> {
    TaskName::try_from(text.to_owned()).map_err(|error| error.to_string())
}

/// What `TEXT`, `@FILE` or `-` (standard input) stands for.
///
/// # Errors
/// The file cannot be read, or is larger than `max` bytes.
pub fn text_or_file(value: &str, max: u64) -> Result<Vec<u8>, Failure> {
    match (value, value.strip_prefix('@')) {
        ("-", _) => bounded(std::io::stdin().lock(), max, "standard input"),
        (_, Some(path)) => file(Path::new(path), max),
        _ => Ok(value.as_bytes().to_vec()),
    }
}

/// The bytes of a file.
///
/// # Errors
/// It cannot be read, or is larger than `max` bytes.
pub fn file(path: &Path, max: u64) -> Result<Vec<u8>, Failure> {
    let shown = path.display().to_string();
    let opened = std::fs::File::open(path).map_err(|error| {
        let exit = if error.kind() == std::io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failed };
        Failure::new(exit, format!("cannot open {shown}: {error}"))
    })?;
    bounded(opened, max, &shown)
}

fn bounded(source: impl std::io::Read, max: u64, name: &str) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    source
        .take(max + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot read {name}: {error}")))?;
    if bytes.len() as u64 > max {
        return Err(Failure::new(Exit::Refused, format!("{name} is larger than {max} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations_and_sizes_read_as_they_are_written() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7_200)));
        for bad in ["", "s", "-1s", "1.5s", "1w", "99999999999999999999", "9999999999d", "4000000000s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(size("64KiB"), Ok(65_536));
        assert!(size("64KB").is_err() && size("").is_err() && size("99999999999999999999GiB").is_err());
        assert_eq!(fuel("20G"), Ok(20_000_000_000));
        assert!(fuel("20g").is_err());
    }

    #[test]
    fn moments_are_absolute_or_relative() {
        assert_eq!(moment("2026-12-01T10:00:00+01:00").unwrap(), moment("2026-12-01T09:00:00Z").unwrap());
        assert!(past("10m").unwrap() < Utc::now());
        assert!(future("10m").unwrap() > Utc::now());
        assert!(past("yesterday").is_err() && moment("10m").is_err());
    }

    #[test]
    fn pairs_and_tags_split_at_the_first_sign() {
        assert_eq!(pair("A=b=c").unwrap(), ("A".to_owned(), "b=c".to_owned()));
        assert_eq!(pair("A=").unwrap(), ("A".to_owned(), String::new()));
        assert!(pair("A").is_err() && pair("=b").is_err());
        assert_eq!(tag("team:a").unwrap(), tag("team=a").unwrap());
    }
}
