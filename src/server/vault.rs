//! Where master keys come from: the configuration, a file, a program, or the data directory. Owns reading them; what
//! they do is `app::vault`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use tracing::info;

use crate::app::vault::{KEY_BYTES, Vault};
use crate::config::Config;
use crate::store::WorkerStore;

/// File in the data directory with the master key of `sandbar dev`.
const FILE: &str = "master.key";
/// Longest run of the program that prints the key.
const COMMAND: Duration = Duration::from_secs(10);
/// Largest text with a key in it.
const MAX_BYTES: u64 = 4_096;

/// The master keys of this process.
///
/// # Errors
/// A key is named and cannot be read, or is none.
pub(super) async fn load(config: &Config) -> anyhow::Result<Arc<Vault>> {
    let command = &config.secrets.master_key_command;
    let (mut current, previous) = written(config)?;
    if current.is_none() && !command.is_empty() {
        current = Some(run(command).await.context("secrets.master_key_command")?);
    }
    needed(config, current.is_some())?;
    Ok(Arc::new(Vault::new(current, previous)))
}

/// Whether the keys that are written somewhere can be read. The program that prints one is not run.
///
/// # Errors
/// One cannot be read, or is none.
pub(super) fn check(config: &Config) -> anyhow::Result<()> {
    let (current, _) = written(config)?;
    needed(config, current.is_some() || !config.secrets.master_key_command.is_empty())
}

fn needed(config: &Config, found: bool) -> anyhow::Result<()> {
    ensure!(
        found || !config.secrets.seal_payloads,
        "secrets.seal_payloads needs a master key: set secrets.master_key_file"
    );
    Ok(())
}

type Key = [u8; KEY_BYTES];

/// The current key, unless a program prints it, and those before it.
fn written(config: &Config) -> anyhow::Result<(Option<Key>, Vec<Key>)> {
    let secrets = &config.secrets;
    let kept = config.data_dir.join(FILE);
    let current = if let Some(key) = &secrets.master_key {
        Some(key_of(key.expose().as_bytes()).context("secrets.master_key")?)
    } else if let Some(path) = &secrets.master_key_file {
        Some(read(path)?)
    } else if secrets.master_key_command.is_empty() && kept.exists() {
        Some(read(&kept)?)
    } else {
        None
    };
    let previous = secrets.previous_master_key_files.iter().map(|path| read(path));
    Ok((current, previous.collect::<Result<_, _>>()?))
}

/// Make the master key of a data directory, unless it is there or another is configured.
///
/// # Errors
/// The file cannot be written.
pub fn make(config: &Config) -> anyhow::Result<()> {
    let secrets = &config.secrets;
    let named = secrets.master_key.is_some()
        || secrets.master_key_file.is_some()
        || !secrets.master_key_command.is_empty();
    let path: PathBuf = config.data_dir.join(FILE);
    if !named && !path.exists() {
        let key: [u8; KEY_BYTES] = rand::random();
        super::write_secret(&path, &BASE64_STANDARD.encode(key))?;
        info!("master key made: {}", path.display());
    }
    Ok(())
}

/// Wrap all data keys by the configured master key. Returns how many were wrapped by another.
///
/// # Errors
/// There is no master key, one that is needed is missing, or Postgres does not answer.
pub async fn rewrap(config: &Config) -> anyhow::Result<u64> {
    let vault = load(config).await?;
    ensure!(vault.current().is_some(), "no master key is configured: set secrets.master_key_file");
    let database = &config.database;
    let url = database.worker_url.as_ref().or(database.url.as_ref());
    let url = url.context("no database: set database.url or database.worker_url")?;
    let store =
        WorkerStore::connect(&super::connect(config, url)).await.context("cannot connect to Postgres")?;
    let done = crate::app::secret::rewrap(&store, &vault).await;
    store.close().await;
    Ok(done?)
}

fn read(path: &Path) -> anyhow::Result<Key> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read the master key in {}", path.display()))?;
    key_of(&bytes).with_context(|| format!("the master key in {}", path.display()))
}

async fn run(command: &[String]) -> anyhow::Result<Key> {
    let Some((program, arguments)) = command.split_first() else { bail!("names no program") };
    let child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(COMMAND, child)
        .await
        .with_context(|| format!("did not end within {} s", COMMAND.as_secs()))?
        .with_context(|| format!("cannot start {program}"))?;
    ensure!(output.status.success(), "ended with {}", output.status);
    key_of(&output.stdout)
}

/// A key as base64. The text itself stays out of every message.
fn key_of(text: &[u8]) -> anyhow::Result<Key> {
    let bytes = BASE64_STANDARD.decode(text.trim_ascii()).ok();
    let key = bytes.and_then(|bytes| <[u8; KEY_BYTES]>::try_from(bytes).ok());
    key.with_context(|| format!("is not {KEY_BYTES} bytes as base64"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn a_key_comes_from_the_configuration_a_file_a_program_or_the_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let text = BASE64_STANDARD.encode([7; KEY_BYTES]);
        let file = dir.path().join("key");
        std::fs::write(&file, format!("{text}\n")).unwrap();
        let empty = Config { data_dir: dir.path().join("data"), ..Config::default() };
        let with = |change: &dyn Fn(&mut Config)| {
            let mut config = empty.clone();
            change(&mut config);
            config
        };
        let expected = Vault::new(Some([7; KEY_BYTES]), Vec::new()).current().unwrap().to_owned();
        for config in [
            with(&|config| config.secrets.master_key = Some(text.as_str().into())),
            with(&|config| config.secrets.master_key_file = Some(file.clone())),
            with(&|config| {
                config.secrets.master_key_command = vec!["cat".to_owned(), file.display().to_string()];
            }),
        ] {
            assert_eq!(load(&config).await.unwrap().current(), Some(expected.as_str()));
        }
        assert_eq!(load(&empty).await.unwrap().current(), None);
        make(&empty).unwrap();
        let made = load(&empty).await.unwrap();
        assert!(made.current().is_some_and(|key| key != expected));
        make(&empty).unwrap();
        assert_eq!(load(&empty).await.unwrap().current(), made.current(), "kept from one start to the next");
        for bad in ["short", "", "AAAA"] {
            let config = with(&|config| config.secrets.master_key = Some(bad.into()));
            let error = format!("{:#}", load(&config).await.unwrap_err());
            assert!(bad.is_empty() || !error.contains(bad), "{error}");
        }
        let failing = with(&|config| config.secrets.master_key_command = vec!["false".to_owned()]);
        assert!(load(&failing).await.is_err());
    }
}
