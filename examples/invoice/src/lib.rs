//! An invoice as a PDF document. This file owns the figures: lines, tax and total, in whole cents. How
//! they look is in `layout.rs`.

mod layout;

use sandbar_guest::{Context, Output, Schema, TaskError, log, task};
use serde::Deserialize;

/// Lines of an invoice at most.
const MAX_LINES: usize = 10_000;
/// Hundredths of a percent in the whole.
const WHOLE: i64 = 10_000;

/// What the invoice says.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Invoice {
    /// Its number.
    number: String,
    /// Its date, as it shall be printed.
    date: String,
    /// Who asks for money: a name and the lines of an address.
    from: Vec<String>,
    /// Who is to pay: a name and the lines of an address.
    to: Vec<String>,
    /// What for.
    lines: Vec<Line>,
    /// The currency, such as EUR.
    currency: String,
    /// Tax on top of everything, in hundredths of a percent: 1900 is 19 %.
    tax: u16,
    /// A sentence below the total.
    note: Option<String>,
}

/// One thing to pay for.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Line {
    /// What it is.
    text: String,
    /// How many.
    quantity: u32,
    /// The price of one, in cents; negative for a credit.
    cents: i64,
}

/// What it comes to, in cents.
#[derive(Debug, PartialEq, Eq)]
struct Totals {
    /// Each line.
    lines: Vec<i64>,
    /// All lines.
    net: i64,
    /// The tax, rounded half away from zero.
    tax: i64,
    /// What is to be paid.
    gross: i64,
}

/// Makes an invoice as a PDF document.
///
/// Computes lines, tax and total in whole cents, and breaks pages. The fonts are those that every
/// reader of PDF has; characters outside of Western European print as a question mark.
#[task(limits(memory = "64MiB", timeout = "10s", output = "8MiB"), retry(max_attempts = 1))]
fn invoice(ctx: &Context, invoice: Invoice) -> Result<Output, TaskError> {
    if invoice.lines.is_empty() || invoice.lines.len() > MAX_LINES {
        return Err(TaskError::fatal(format!("an invoice has 1 to {MAX_LINES} lines")));
    }
    let totals = totals(&invoice).ok_or_else(|| TaskError::fatal("the total is beyond counting"))?;
    let (pdf, pages) = layout::document(&invoice, &totals)?;
    ctx.progress(pages as u64, pages as u64, "pages");
    log::info!(pages, gross = totals.gross, bytes = pdf.len(); "invoice {}", invoice.number);
    Ok(Output::new("application/pdf", pdf))
}

/// The figures; `None` where they leave 64 bits.
fn totals(invoice: &Invoice) -> Option<Totals> {
    let lines = invoice.lines.iter().map(|line| i64::from(line.quantity).checked_mul(line.cents));
    let lines: Vec<i64> = lines.collect::<Option<_>>()?;
    let net = lines.iter().try_fold(0_i64, |sum, line| sum.checked_add(*line))?;
    let parts = net.checked_mul(i64::from(invoice.tax))?;
    let tax = parts.checked_add(WHOLE / 2 * parts.signum())? / WHOLE;
    Some(Totals { lines, net, tax, gross: net.checked_add(tax)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invoice_of(lines: &[(u32, i64)], tax: u16) -> Invoice {
        let line = |&(quantity, cents): &(u32, i64)| Line { text: "Thing (ä)".to_owned(), quantity, cents };
        Invoice {
            number: "7".to_owned(),
            date: "2026-11-21".to_owned(),
            from: vec!["A".to_owned()],
            to: vec!["B".to_owned()],
            lines: lines.iter().map(line).collect(),
            currency: "EUR".to_owned(),
            tax,
            note: None,
        }
    }

    #[test]
    fn tax_is_rounded_half_away_from_zero() {
        for (net, tax, expected) in [(50, 100, 1), (49, 100, 0), (-50, 100, -1), (1_999, 1_900, 380)] {
            assert_eq!(totals(&invoice_of(&[(1, net)], tax)).unwrap().tax, expected, "{net} at {tax}");
        }
    }

    #[test]
    fn what_cannot_be_counted_is_a_fatal_error() {
        for lines in [&[(u32::MAX, i64::MAX)][..], &[(1, i64::MAX), (1, 1)], &[]] {
            let error = super::invoice(&Context::test().build(), invoice_of(lines, 0)).unwrap_err();
            assert!(!error.is_retryable());
        }
    }

    #[test]
    fn a_long_invoice_has_several_pages() {
        let pages = |lines| {
            let invoice = invoice_of(&vec![(1, 100); lines], 0);
            let (pdf, pages) = layout::document(&invoice, &totals(&invoice).unwrap()).unwrap();
            assert!(pdf.starts_with(b"%PDF-"));
            pages
        };
        assert_eq!(pages(1), 1);
        assert!(pages(200) > 3);
    }
}
