//! How results look: data to stdout, everything else to stderr, colour only on a terminal, nothing that a guest or a
//! server wrote may steer the terminal. Owns writing and formatting; decides nothing.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};

use anstyle::{AnsiColor, Style};
use chrono::{DateTime, Local, Utc};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::wire::invocation::State;

/// How often a progress bar moves by itself.
const TICK: std::time::Duration = std::time::Duration::from_millis(120);

/// Where a command writes.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// One JSON document, or one per line.
    pub json: bool,
    /// Standard output takes colours.
    colour: bool,
    /// Standard error takes colours.
    colour_err: bool,
}

impl Output {
    /// Looks at the terminal and at `NO_COLOR`, `CLICOLOR` and `CLICOLOR_FORCE`.
    pub fn new(json: bool) -> Self {
        let takes = |choice| !matches!(choice, anstream::ColorChoice::Never);
        Self {
            json,
            colour: takes(anstream::AutoStream::choice(&io::stdout())),
            colour_err: takes(anstream::AutoStream::choice(&io::stderr())),
        }
    }

    /// Whether standard error takes colours.
    pub fn colour_err(self) -> bool {
        self.colour_err
    }

    /// One line of data.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn line(self, text: impl AsRef<str>) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref().as_bytes())?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// One JSON document in one line.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn document(self, value: &impl serde::Serialize) -> io::Result<()> {
        self.line(serde_json::to_string(value)?)
    }

    /// Data as they are. A line break is added only for the eyes.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn bytes(self, bytes: &[u8]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        if !bytes.is_empty() && !bytes.ends_with(b"\n") && out.is_terminal() {
            out.write_all(b"\n")?;
        }
        out.flush()
    }

    /// A word to the person, on standard error; not part of the data.
    pub fn note(self, text: impl AsRef<str>) {
        // When nobody listens there, nothing is lost.
        let _ = writeln!(io::stderr().lock(), "{}", text.as_ref());
    }

    /// A text in a style, on standard output.
    pub fn paint(self, style: Style, text: impl std::fmt::Display) -> String {
        if self.colour { format!("{style}{text}{style:#}") } else { text.to_string() }
    }

    /// A text in a style, on standard error.
    pub fn paint_err(self, style: Style, text: impl std::fmt::Display) -> String {
        if self.colour_err { format!("{style}{text}{style:#}") } else { text.to_string() }
    }

    /// A bar for `total` bytes, on standard error when that is a terminal; otherwise nothing is drawn.
    pub fn byte_bar(self, total: u64, message: &str) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(total), self.bar_target());
        if let Ok(style) =
            ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
        {
            bar.set_style(style);
        }
        bar.set_message(message.to_owned());
        bar
    }

    /// A spinner, later perhaps a bar, on standard error when that is a terminal.
    pub fn spinner(self, message: impl Into<String>) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(None, self.bar_target());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar.set_message(message.into());
        bar.enable_steady_tick(TICK);
        bar
    }

    fn bar_target(self) -> ProgressDrawTarget {
        if self.json { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() }
    }
}

/// Emphasis.
pub const BOLD: Style = Style::new().bold();
/// What matters less.
pub const DIM: Style = Style::new().dimmed();
const GREEN: Style = AnsiColor::Green.on_default();
const RED: Style = AnsiColor::Red.on_default();
const YELLOW: Style = AnsiColor::Yellow.on_default();
const CYAN: Style = AnsiColor::Cyan.on_default();

/// The colour of a state.
pub fn state_style(state: State) -> Style {
    match state {
        State::Scheduled | State::Queued => CYAN,
        State::Running => YELLOW,
        State::Succeeded => GREEN,
        State::Dead => RED,
        State::Cancelled | State::Expired => DIM,
    }
}

/// The colour of a level of a log.
pub fn level_style(level: &str) -> Style {
    match level {
        "error" => RED,
        "warn" => YELLOW,
        "info" => GREEN,
        _ => DIM,
    }
}

/// The word of a state.
pub fn state_word(state: State) -> &'static str {
    match state {
        State::Scheduled => "scheduled",
        State::Queued => "queued",
        State::Running => "running",
        State::Succeeded => "succeeded",
        State::Dead => "dead",
        State::Cancelled => "cancelled",
        State::Expired => "expired",
    }
}

/// True when nothing will change any more.
pub fn is_final(state: State) -> bool {
    matches!(state, State::Succeeded | State::Dead | State::Cancelled | State::Expired)
}

/// Text from elsewhere, fit for a terminal: control characters (but line break and tab) and the characters that turn
/// the direction of writing are shown, not obeyed.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let bidi = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (c.is_control() && c != '\n' && c != '\t') || bidi {
            let _ = write!(shown, "{}", c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// The first sentence or line of a text, in one line of at most `max` characters.
pub fn headline(text: &str, max: usize) -> String {
    let line = printable(text.trim().lines().next().unwrap_or_default());
    if line.chars().count() <= max {
        return line;
    }
    let mut cut: String = line.chars().take(max.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

/// Rows in columns, the first row being the head. The last column is not padded.
pub fn table(output: Output, rows: &[Vec<Cell>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.text.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    rows.iter()
        .map(|row| {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let last = column + 1 == row.len();
                let pad = if last { 0 } else { widths[column].saturating_sub(cell.text.chars().count()) };
                line.push_str(&output.paint(cell.style, &cell.text));
                if !last {
                    line.push_str(&" ".repeat(pad + 2));
                }
            }
            line.trim_end().to_owned()
        })
        .collect()
}

/// A text in a table.
#[derive(Debug, Clone)]
pub struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// A text in a style.
    pub fn styled(text: impl Into<String>, style: Style) -> Self {
        Self { text: text.into(), style }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: text.into(), style: Style::new() }
    }
}

/// The head of a table.
pub fn head(names: &[&str]) -> Vec<Cell> {
    names.iter().map(|name| Cell::styled(*name, DIM)).collect()
}

/// A moment, in local time.
pub fn moment(time: DateTime<Utc>) -> String {
    time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S").to_string()
}

/// How long ago, or how far ahead.
pub fn age(time: DateTime<Utc>, now: DateTime<Utc>) -> String {
    let distance = now.signed_duration_since(time);
    let text = |seconds: i64| match seconds {
        ..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    };
    if distance.num_seconds() < 0 {
        format!("in {}", text(-distance.num_seconds()))
    } else {
        format!("{} ago", text(distance.num_seconds()))
    }
}

/// Bytes for people.
#[allow(clippy::cast_precision_loss)] // for people
pub fn bytes(count: u64) -> String {
    match count {
        ..1_024 => format!("{count} B"),
        1_024..1_048_576 => format!("{:.1} KiB", count as f64 / 1_024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", count as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", count as f64 / 1_073_741_824.0),
    }
}

/// Nanoseconds for people.
#[allow(clippy::cast_precision_loss)] // for people
pub fn nanoseconds(count: u64) -> String {
    match count {
        ..1_000_000 => format!("{} µs", count / 1_000),
        1_000_000..1_000_000_000 => format!("{:.1} ms", count as f64 / 1e6),
        _ => format!("{:.2} s", count as f64 / 1e9),
    }
}

/// A count with its thousands apart.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn counts_bytes_and_times_read_well() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(bytes(1_023), "1023 B");
        assert_eq!(bytes(1_536), "1.5 KiB");
        assert_eq!(bytes(5 << 20), "5.0 MiB");
        assert_eq!(nanoseconds(1_500), "1 µs");
        assert_eq!(nanoseconds(2_500_000), "2.5 ms");
        assert_eq!(nanoseconds(61_000_000_000), "61.00 s");
    }

    #[test]
    fn ages_look_back_and_ahead() {
        let now = DateTime::from_timestamp(1_000_000, 0).unwrap();
        let at = |seconds: i64| now + chrono::TimeDelta::seconds(seconds);
        assert_eq!(age(at(-5), now), "5s ago");
        assert_eq!(age(at(-7_200), now), "2h ago");
        assert_eq!(age(at(-86_400 * 3), now), "3d ago");
        assert_eq!(age(at(90), now), "in 1m");
    }

    #[test]
    fn what_guests_wrote_cannot_steer_the_terminal() {
        let shown = printable("a\x1b]0;title\x07b\u{9b}31m\rc\u{202e}d\tok\n");
        assert_eq!(shown, "a\\u{1b}]0;title\\u{7}b\\u{9b}31m\\u{d}c\\u{202e}d\tok\n");
    }

    #[test]
    fn a_headline_is_one_short_line() {
        assert_eq!(headline("One.\nTwo.", 20), "One.");
        assert_eq!(headline("123456", 4), "123…");
    }

    #[test]
    fn columns_are_aligned_and_without_colour_nothing_but_text_is_in_them() {
        let output = Output { json: false, colour: false, colour_err: false };
        let rows = vec![head(&["A", "LONG"]), vec!["abc".into(), "x".into()]];
        assert_eq!(table(output, &rows), ["A    LONG", "abc  x"]);
    }
}
