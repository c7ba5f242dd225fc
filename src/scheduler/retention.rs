//! The duty `retention`: what ended longer ago than is kept is written to files, if there is a directory for them, and
//! then deleted, a page at a time. Owns the files; which rows and when is in `store::retention`.
//!
//! A file is complete and on disk before its rows are deleted. It is named by its tenant and its first and last
//! invocation, so a page that is exported again after a crash replaces its own file.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::app::sealed::export;
use crate::store::WorkerStore;
use crate::store::retention::{Step, Walk};

/// Longest run: it must end well before its lease does.
const TURN: Duration = Duration::from_millis(800);

/// One run. Returns how many invocations were deleted, and whether there is more to do at once.
///
/// # Errors
/// Postgres does not answer, the duty is somebody else's by now, or a file cannot be written; what was not exported is
/// not deleted.
pub async fn turn(store: &WorkerStore, days: i32, export: Option<&Path>) -> anyhow::Result<(u64, bool)> {
    let began = Instant::now();
    let mut deleted = 0;
    while let Some(walk) = store.retention_next(days).await? {
        let step = store.retention_step(&walk).await?;
        if let Some(dir) = export
            && !step.ids.is_empty()
        {
            write(store, &walk, &step, dir).await.context("cannot export history")?;
        }
        deleted += store.retention_delete(&walk, &step).await?;
        if began.elapsed() > TURN {
            return Ok((deleted, true));
        }
    }
    Ok((deleted, false))
}

/// Write a page to its file. One invocation is in memory at a time.
async fn write(store: &WorkerStore, walk: &Walk, step: &Step, dir: &Path) -> anyhow::Result<()> {
    let (Some(first), Some(last)) = (step.ids.first(), step.ids.last()) else { return Ok(()) };
    let dir = dir.join(walk.tenant.to_string());
    tokio::fs::create_dir_all(&dir).await.with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join(format!("{first}-{last}.jsonl.gz"));
    let part = dir.join(format!("{first}-{last}.{:08x}.part", rand::random::<u32>()));
    let result = async {
        let file =
            std::fs::File::create(&part).with_context(|| format!("cannot create {}", part.display()))?;
        let mut file = GzEncoder::new(std::io::BufWriter::new(file), Compression::default());
        for id in &step.ids {
            if let Some(history) = store.retention_read(walk.tenant, *id).await? {
                let mut line = serde_json::to_vec(&export::line(&history))?;
                line.push(b'\n');
                file.write_all(&line)?;
            }
        }
        let file = file.finish()?.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        // The rows go next: the file must outlive a crash of the machine.
        file.sync_all()?;
        std::fs::rename(&part, &path).with_context(|| format!("cannot name {}", path.display()))?;
        std::fs::File::open(&dir)?.sync_all()?;
        anyhow::Ok(())
    }
    .await;
    if result.is_err() {
        remove(&part);
    }
    result
}

fn remove(part: &Path) {
    if let Err(error) = std::fs::remove_file(part)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, part = %part.display(), "an unfinished export is left behind");
    }
}
