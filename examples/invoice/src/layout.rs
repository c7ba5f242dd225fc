//! Where things stand on the pages of an invoice. Owns fonts, positions and page breaks; computes no
//! money.

use pdf_writer::{Content, Finish as _, Name, Pdf, Rect, Ref, Str};
use sandbar_guest::TaskError;

use crate::{Invoice, Totals};

/// A4, in points.
const PAGE: (f32, f32) = (595.0, 842.0);
const LEFT: f32 = 56.0;
const RIGHT: f32 = 539.0;
const TOP: f32 = 780.0;
/// Lines stand above this; the page number stands below.
const BOTTOM: f32 = 90.0;
const FOOT: f32 = 50.0;
/// Right edges of the columns of figures.
const QUANTITY: f32 = 355.0;
const PRICE: f32 = 450.0;
/// Size of plain text, and from one line to the next.
const SIZE: f32 = 10.0;
const LEADING: f32 = 14.0;
/// Characters of a line's text before it is broken.
const TEXT_WIDTH: usize = 48;
/// Width of every character of Courier, in parts of its size.
const COURIER: f32 = 0.6;

const TEXT: Name<'_> = Name(b"T");
const BOLD: Name<'_> = Name(b"B");
const FIGURES: Name<'_> = Name(b"F");

/// The document, and how many pages it has.
pub(crate) fn document(invoice: &Invoice, totals: &Totals) -> Result<(Vec<u8>, usize), TaskError> {
    let pages = pages(invoice, totals);
    let mut refs = (1..).map(Ref::new);
    let mut next = || refs.next().ok_or_else(|| TaskError::fatal("too many objects"));
    let (catalog, tree) = (next()?, next()?);
    let fonts = [(TEXT, "Helvetica"), (BOLD, "Helvetica-Bold"), (FIGURES, "Courier")];

    let mut pdf = Pdf::new();
    pdf.catalog(catalog).pages(tree);
    let mut font_refs = Vec::new();
    for (name, base) in fonts {
        let font = next()?;
        pdf.type1_font(font).base_font(Name(base.as_bytes())).encoding_predefined(Name(b"WinAnsiEncoding"));
        font_refs.push((name, font));
    }
    let count = pages.len();
    let mut kids = Vec::with_capacity(count);
    for (number, mut content) in (1..).zip(pages) {
        let (page_ref, content_ref) = (next()?, next()?);
        kids.push(page_ref);
        right(&mut content, FIGURES, 8.0, RIGHT, FOOT, &format!("{number} / {count}"));
        pdf.stream(content_ref, &content.finish());
        let mut page = pdf.page(page_ref);
        page.media_box(Rect::new(0.0, 0.0, PAGE.0, PAGE.1)).parent(tree).contents(content_ref);
        page.resources().fonts().pairs(font_refs.iter().copied());
        page.finish();
    }
    pdf.pages(tree).count(i32::try_from(count)?).kids(kids);
    Ok((pdf.finish(), count))
}

/// The contents of the pages.
fn pages(invoice: &Invoice, totals: &Totals) -> Vec<Content> {
    let mut pages = vec![Content::new()];
    let mut y = head(&mut pages[0], invoice);
    for (line, amount) in invoice.lines.iter().zip(&totals.lines) {
        let text = broken(&line.text);
        if y - LEADING * (text.len() as f32 - 1.0) < BOTTOM {
            pages.push(Content::new());
            y = TOP;
        }
        let page = pages.len() - 1;
        let page = &mut pages[page];
        // In the order of reading, for whoever reads the text out of the document.
        for (n, part) in text.iter().enumerate() {
            left(page, TEXT, SIZE, LEFT, y, part);
            if n == 0 {
                right(page, FIGURES, SIZE, QUANTITY, y, &line.quantity.to_string());
                right(page, FIGURES, SIZE, PRICE, y, &money(line.cents));
                right(page, FIGURES, SIZE, RIGHT, y, &money(*amount));
            }
            y -= LEADING;
        }
    }
    // Net, tax, total and note stay together.
    if y - 6.0 * LEADING < BOTTOM {
        pages.push(Content::new());
        y = TOP;
    }
    let page = pages.len() - 1;
    foot(&mut pages[page], invoice, totals, y);
    pages
}

/// The first page down to the first line; returns where that stands.
fn head(page: &mut Content, invoice: &Invoice) -> f32 {
    left(page, BOLD, 20.0, LEFT, TOP, &format!("Invoice {}", invoice.number));
    left(page, TEXT, SIZE, LEFT, TOP - 18.0, &invoice.date);
    let mut y = TOP - 60.0;
    for (from, to) in zip_longest(&invoice.from, &invoice.to) {
        left(page, TEXT, SIZE, LEFT, y, to);
        left(page, TEXT, SIZE, QUANTITY, y, from);
        y -= LEADING;
    }
    y -= 2.0 * LEADING;
    left(page, BOLD, SIZE, LEFT, y, "Item");
    right(page, FIGURES, SIZE, QUANTITY, y, "Quantity");
    right(page, FIGURES, SIZE, PRICE, y, "Price");
    right(page, FIGURES, SIZE, RIGHT, y, &invoice.currency);
    rule(page, y - 4.0);
    y - 1.5 * LEADING
}

fn foot(page: &mut Content, invoice: &Invoice, totals: &Totals, y: f32) {
    rule(page, y + LEADING - 4.0);
    let tax = format!("Tax {}.{:02} %", invoice.tax / 100, invoice.tax % 100);
    let mut y = y - 4.0;
    for (font, name, amount) in
        [(TEXT, "Net", totals.net), (TEXT, &tax, totals.tax), (BOLD, "Total", totals.gross)]
    {
        left(page, font, SIZE, QUANTITY, y, name);
        right(page, FIGURES, SIZE, RIGHT, y, &money(amount));
        y -= LEADING;
    }
    if let Some(note) = &invoice.note {
        left(page, TEXT, SIZE, LEFT, y - LEADING, note);
    }
}

fn rule(page: &mut Content, y: f32) {
    page.set_line_width(0.5).move_to(LEFT, y).line_to(RIGHT, y).stroke();
}

fn left(page: &mut Content, font: Name<'_>, size: f32, x: f32, y: f32, text: &str) {
    page.begin_text().set_font(font, size).next_line(x, y).show(Str(&western(text))).end_text();
}

/// Text that ends at `x`. Only in Courier, whose characters are all as wide.
fn right(page: &mut Content, font: Name<'_>, size: f32, x: f32, y: f32, text: &str) {
    let width = text.chars().count() as f32 * COURIER * size;
    left(page, font, size, x - width, y, text);
}

/// Cents with two decimals, and thousands apart.
fn money(cents: i64) -> String {
    let (sign, cents) = (if cents < 0 { "-" } else { "" }, cents.unsigned_abs());
    let whole = (cents / 100).to_string();
    let mut grouped = String::new();
    for (place, digit) in whole.chars().enumerate() {
        if place > 0 && (whole.len() - place) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}.{:02}", cents % 100)
}

/// The text in lines of at most [`TEXT_WIDTH`] characters, broken between words where there are any.
fn broken(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut rest: Vec<char> = word.chars().collect();
        while !rest.is_empty() {
            let last = lines.len() - 1;
            let used = lines[last].chars().count();
            let space = usize::from(used > 0);
            if used + space + rest.len() <= TEXT_WIDTH || (used == 0 && rest.len() > TEXT_WIDTH) {
                let cut = rest.split_off(rest.len().min(TEXT_WIDTH));
                if space > 0 {
                    lines[last].push(' ');
                }
                lines[last].extend(rest);
                rest = cut;
            } else {
                lines.push(String::new());
            }
        }
    }
    lines
}

/// The text as the encoding of the fonts (Windows-1252) has it.
fn western(text: &str) -> Vec<u8> {
    let byte = |c: char| match c {
        ' '..='~' | '\u{a0}'..='\u{ff}' => u8::try_from(u32::from(c)).unwrap_or(b'?'),
        '€' => 0x80,
        '…' => 0x85,
        '‘' => 0x91,
        '’' => 0x92,
        '“' => 0x93,
        '”' => 0x94,
        '–' => 0x96,
        '—' => 0x97,
        _ => b'?',
    };
    text.chars().map(byte).collect()
}

fn zip_longest<'a>(a: &'a [String], b: &'a [String]) -> impl Iterator<Item = (&'a str, &'a str)> {
    let at = |lines: &'a [String], n: usize| lines.get(n).map_or("", String::as_str);
    (0..a.len().max(b.len())).map(move |n| (at(a, n), at(b, n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_has_two_decimals_and_thousands_apart() {
        for (cents, text) in [
            (0, "0.00"),
            (-5, "-0.05"),
            (123_456_789, "1,234,567.89"),
            (i64::MIN, "-92,233,720,368,547,758.08"),
        ] {
            assert_eq!(money(cents), text);
        }
    }

    #[test]
    fn long_texts_are_broken_and_nothing_is_lost() {
        let text = format!("short words and {} in between {}", "x".repeat(120), "ä ".repeat(60));
        let lines = broken(&text);
        assert!(lines.iter().all(|line| line.chars().count() <= TEXT_WIDTH), "{lines:?}");
        let letters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
        assert_eq!(letters(&lines.concat()), letters(&text));
        assert_eq!(broken(""), [""]);
    }

    #[test]
    fn what_the_fonts_do_not_have_becomes_a_question_mark() {
        assert_eq!(western("Zoë – 5 € 中"), b"Zo\xeb \x96 5 \x80 ?");
    }
}
