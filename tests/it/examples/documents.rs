//! Examples that make documents: HTML out of Markdown, and a PDF.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::{deployed, oracle, program, succeed};

/// Ways to smuggle a script into a page, by Markdown and by HTML inside it.
const HOSTILE: &str = r##"
# Harmless <script>alert(1)</script>

[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html;base64,PHNjcmlwdD4=) [d](vbscript:x)
[e](java&#115;cript:alert(1)) [f](<javascript:alert(1)>) ![g](javascript:alert(1)) <javascript:alert(1)>

<img src=x onerror=alert(1)> <svg onload=alert(1)> <a href="&#106;avascript:alert(1)">h</a>
<a href=" javascript:alert(1)" onclick="alert(1)" style="position:fixed">i</a>

<script>
alert("# not a heading")
</script>

<iframe src="https://example.com"></iframe> <form action="https://example.com"><input name=x></form>
<style>body { display: none }</style> <base href="https://example.com"> <meta http-equiv=refresh content=0>

<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">

<!-- <script>alert(1)</script> -->
<?php alert(1) ?>

| t |
|---|
| <u onmouseover=alert(1)>x</u> |

"##;

/// All elements that the sanitiser lets through in these tests; none of them can run anything.
const HARMLESS: [&str; 26] = [
    "a",
    "b",
    "blockquote",
    "br",
    "code",
    "del",
    "em",
    "h1",
    "h2",
    "h3",
    "hr",
    "img",
    "li",
    "math",
    "ol",
    "p",
    "pre",
    "strong",
    "sup",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "u",
];

fn check_harmless(elements: &Value) {
    for element in elements.as_array().unwrap() {
        let tag = element["tag"].as_str().unwrap();
        assert!(tag == "ul" || HARMLESS.contains(&tag), "{element}");
        for (name, value) in element["attributes"].as_object().unwrap() {
            let allowed = ["href", "rel", "src", "alt", "title", "align", "start", "id", "class"];
            assert!(allowed.contains(&name.as_str()), "{element}");
            if ["href", "src"].contains(&name.as_str()) {
                let url = value.as_str().unwrap();
                assert!(
                    ["https://", "http://", "mailto:"].iter().any(|scheme| url.starts_with(scheme)),
                    "{element}"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn markdown_becomes_the_html_it_means_and_nothing_that_runs() {
    let (_deployment, client) = deployed("markdown").await;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = BTreeSet::new();
    for path in ["README.md", "docs/ARCHITECTURE.md", "docs/operations.md", "CONTRIBUTING.md"] {
        let text = std::fs::read_to_string(root.join(path)).unwrap();
        let body = json!({"input": {"markdown": text}});
        let (_, media_type, html) = succeed(&client, "markdown", &body).await;
        assert_eq!(media_type, "text/html; charset=utf-8");
        let elements = oracle("html", &html);
        check_harmless(&elements);
        let elements = elements.as_array().unwrap();
        let count = |tag: &str| elements.iter().filter(|element| element["tag"] == tag).count();
        // By the lines of the text, outside of code.
        let (mut fences, mut headings, mut rules) = (0, 0, 0);
        for line in text.lines() {
            fences += usize::from(line.starts_with("```"));
            if fences % 2 == 0 {
                headings += usize::from(
                    line.starts_with("# ") || line.starts_with("## ") || line.starts_with("### "),
                );
                rules += usize::from(line.starts_with("|---"));
            }
        }
        assert_eq!(count("h1") + count("h2") + count("h3"), headings, "{path}");
        assert_eq!((count("pre"), count("table")), (fences / 2, rules), "{path}");
        seen.extend(elements.iter().map(|element| element["tag"].as_str().unwrap().to_owned()));
    }
    assert!(
        ["h1", "table", "td", "pre", "code", "a", "strong", "li"].iter().all(|tag| seen.contains(*tag)),
        "{seen:?}"
    );

    let (_, _, html) = succeed(&client, "markdown", &json!({"input": {"markdown": HOSTILE}})).await;
    let elements = oracle("html", &html);
    check_harmless(&elements);
    let heading = elements.as_array().unwrap().iter().find(|element| element["tag"] == "h1").unwrap();
    assert_eq!(heading["text"].as_str().unwrap().trim(), "Harmless");
}

/// The directory with the Python packages that the judgement needs, installed once per checkout.
fn packages() -> &'static Path {
    static PACKAGES: OnceLock<std::path::PathBuf> = OnceLock::new();
    PACKAGES.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let requirements = root.join("tests/it/examples/requirements.txt");
        let directory = root.join("target/python/examples");
        let stamp = directory.join("requirements.txt");
        let wanted = std::fs::read(&requirements).unwrap();
        if std::fs::read(&stamp).ok().as_ref() != Some(&wanted) {
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--upgrade"])
                .args(["--disable-pip-version-check", "--root-user-action=ignore", "--target"])
                .arg(&directory)
                .arg("--requirement")
                .arg(&requirements);
            program(&mut pip, b"");
            std::fs::write(&stamp, wanted).unwrap();
        }
        directory
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invoice_is_a_pdf_that_another_program_reads_with_the_right_total() {
    let (_deployment, client) = deployed("invoice").await;
    let lines: Vec<Value> = (1..=150)
        .map(|n| json!({"text": format!("Position {n}: Süßholz & (Lakritz) \\ 100 %"), "quantity": n, "cents": 1_999 - n * 7}))
        .collect();
    let net: i64 = (1..=150).map(|n| n * (1_999 - n * 7)).sum();
    let tax = (net * 19 + 50) / 100;
    let body = json!({"input": {
        "number": "2026-0042", "date": "21 November 2026",
        "from": ["Sandbar Ltd", "1 Beach Road"], "to": ["Zoë Müller", "Hafenstraße 7", "20457 Hamburg"],
        "lines": lines, "currency": "EUR", "tax": 1_900, "note": "Payable within 14 days – thank you!"
    }});
    let (_, media_type, pdf) = succeed(&client, "invoice", &body).await;
    assert_eq!(media_type, "application/pdf");

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/examples/oracle.py");
    let mut reader = Command::new("python3");
    reader.arg(script).arg("pdf").env("PYTHONPATH", packages());
    let pages: Vec<Vec<String>> = serde_json::from_slice(&program(&mut reader, &pdf)).unwrap();
    assert_eq!(pages.len(), 4, "{pages:#?}");
    for (number, page) in (1..).zip(&pages) {
        assert!(page.contains(&format!("{number} / 4")), "{page:#?}");
    }
    let text = pages.concat();
    let has = |line: &str| assert!(text.iter().any(|found| found.trim() == line), "no {line:?} in {text:#?}");
    has("Invoice 2026-0042");
    has("Zoë Müller Sandbar Ltd");
    has("Payable within 14 days – thank you!");
    // Two decimals, and commas between thousands.
    let money = |cents: i64| {
        let (sign, whole, part) = (if cents < 0 { "-" } else { "" }, cents.abs() / 100, cents.abs() % 100);
        let whole =
            if whole < 1000 { whole.to_string() } else { format!("{},{:03}", whole / 1000, whole % 1000) };
        format!("{sign}{whole}.{part:02}")
    };
    for n in 1..=150 {
        let cents = 1_999 - n * 7;
        let text = format!("Position {n}: Süßholz & (Lakritz) \\ 100 %");
        has(&format!("{text} {n} {} {}", money(cents), money(n * cents)));
    }
    has(&format!("Net {}", money(net)));
    has(&format!("Tax 19.00 % {}", money(tax)));
    has(&format!("Total {}", money(net + tax)));
}
