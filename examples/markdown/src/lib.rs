//! Markdown of strangers into HTML that may stand on one's own page: `pulldown-cmark` renders,
//! `ammonia` lets through what is harmless.

use ammonia::{Builder, UrlRelative};
use pulldown_cmark::{Options, Parser, html};
use sandbar_guest::{Context, Output, Schema, TaskError, log, task};
use serde::Deserialize;

/// What to render, and where it belongs.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Input {
    /// The text: CommonMark with tables, footnotes, task lists and strikethrough.
    markdown: String,
    /// Whether links and images may point into the site that shows the page; if not, they lose their
    /// target. False if absent.
    relative_links: Option<bool>,
}

/// Renders Markdown as sanitised HTML.
///
/// The result is a fragment for the body of a page. Scripts, styles, event handlers, frames and forms
/// do not get through, nor do links other than http, https and mailto.
#[task(limits(memory = "64MiB", timeout = "10s", output = "8MiB"), retry(max_attempts = 1))]
fn markdown(_ctx: &Context, input: Input) -> Result<Output, TaskError> {
    let options = Options::ENABLE_TABLES
        | Options::ENABLE_FOOTNOTES
        | Options::ENABLE_TASKLISTS
        | Options::ENABLE_STRIKETHROUGH;
    let mut rendered = String::with_capacity(input.markdown.len() * 3 / 2);
    html::push_html(&mut rendered, Parser::new_ext(&input.markdown, options));

    let relative =
        if input.relative_links == Some(true) { UrlRelative::PassThrough } else { UrlRelative::Deny };
    let clean = Builder::default()
        .url_schemes(["http", "https", "mailto"].into())
        .url_relative(relative)
        .link_rel(Some("noopener noreferrer nofollow"))
        .clean(&rendered)
        .to_string();
    log::info!(from = input.markdown.len(), to = clean.len(); "rendered");
    Ok(Output::new("text/html; charset=utf-8", clean))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(markdown: &str, relative_links: Option<bool>) -> String {
        let input = Input { markdown: markdown.to_owned(), relative_links };
        String::from_utf8(super::markdown(&Context::test().build(), input).unwrap().bytes).unwrap()
    }

    #[test]
    fn structure_becomes_html() {
        let html = render("# A *b*\n\n| x | y |\n|---|---|\n| 1 | ~~2~~ |\n", None);
        assert!(html.contains("<h1>A <em>b</em></h1>") && html.contains("<td><del>2</del></td>"), "{html}");
    }

    #[test]
    fn what_could_run_does_not_get_through() {
        let html =
            render("<script>alert(1)</script>\n\n[x](javascript:alert(1)) <b onclick=\"f()\">y</b>", None);
        assert_eq!(html, "\n<p><a rel=\"noopener noreferrer nofollow\">x</a> <b>y</b></p>\n");
    }

    #[test]
    fn links_into_the_site_are_a_choice() {
        assert!(!render("[x](/admin/delete)", None).contains("href"));
        assert!(render("[x](/a)", Some(true)).contains("href=\"/a\""));
    }
}
