//! Opening what retention exported sealed. Owns reading the files; what a line is, is `app::sealed::export`.

use std::io::{BufRead as _, BufReader, Read as _, Write};
use std::path::Path;

use anyhow::{Context as _, ensure};
use flate2::read::MultiGzDecoder;

use crate::app::sealed::{export, keys::Keys};
use crate::config::Config;
use crate::store::WorkerStore;

/// Longest line: the largest payloads that can be configured, in base64.
const MAX_LINE: u64 = 4 << 30;

/// Write the lines of an export (`*.jsonl.gz`) with their payloads opened. Returns how many.
///
/// # Errors
/// The file cannot be read, a line does not open, or Postgres, which has the data keys, does not answer.
pub async fn open(config: &Config, path: &Path, out: &mut (impl Write + Send)) -> anyhow::Result<u64> {
    let vault = super::vault::load(config).await?;
    let database = &config.database;
    let url = database.worker_url.as_ref().or(database.url.as_ref());
    let url = url.context("no database: set database.url or database.worker_url")?;
    let store =
        WorkerStore::connect(&super::connect(config, url)).await.context("cannot connect to Postgres")?;
    let keys = Keys::new(store.clone(), vault);
    let file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut lines = BufReader::new(MultiGzDecoder::new(file));
    let (mut text, mut done) = (String::new(), 0_u64);
    let result = loop {
        text.clear();
        let read = lines.by_ref().take(MAX_LINE).read_line(&mut text);
        match read.with_context(|| format!("cannot read {}", path.display())) {
            Ok(0) => break Ok(done),
            Ok(_) => {}
            Err(error) => break Err(error),
        }
        let opened = async {
            ensure!(text.ends_with('\n'), "it breaks off");
            writeln!(out, "{}", export::open(&keys, &text).await?)?;
            anyhow::Ok(())
        };
        if let Err(error) = opened.await {
            break Err(error.context(format!("line {} of {}", done + 1, path.display())));
        }
        done += 1;
    };
    store.close().await;
    result
}
