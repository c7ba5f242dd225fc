//! Lists that come whole, as tables or as JSON lines. Lists in pages are in `list`.

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::client::{Client, Request};
use super::failure::Failure;
use super::list::parse;
use super::output::{self, Cell, Output};
use crate::wire::Page;

/// Fetches a list and shows it. `none` is what to say when there is nothing in it.
///
/// # Errors
/// The server fails.
pub async fn show<T: DeserializeOwned>(
    client: &Client,
    output: Output,
    path: &str,
    head: &[&str],
    none: &str,
    row: impl Fn(&T) -> Vec<Cell>,
) -> Result<(), Failure> {
    let page: Page<Box<RawValue>> = client.fetch(Request::get(path)).await?;
    if output.json {
        for item in &page.items {
            output.line(item.get())?;
        }
        return Ok(());
    }
    if page.items.is_empty() {
        output.note(none);
        return Ok(());
    }
    let items: Vec<T> = parse(&page.items)?;
    let mut rows = vec![output::head(head)];
    rows.extend(items.iter().map(row));
    for line in output::table(output, &rows) {
        output.line(line)?;
    }
    Ok(())
}
