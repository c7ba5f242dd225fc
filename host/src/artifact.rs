//! Compiled code on disk: a bounded, authenticated cache.
//! Owns the file format and the key. Code whose authentication fails is deleted, never loaded;
//! whoever can write the directory but does not know the key can only make the cache forget.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use hmac::{Hmac, Mac};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::Sha256;

use crate::engine;
use crate::module::ModuleHash;

/// First bytes of a file, with the version of this format.
const MAGIC: &[u8; 8] = b"sbxcode\x01";
/// Bytes of the authentication code.
const MAC_BYTES: usize = 32;
/// Bytes before the payload.
const HEADER_BYTES: usize = MAGIC.len() + MAC_BYTES;
/// Largest artifact that is read back.
const MAX_ARTIFACT_BYTES: u64 = 512 << 20;
/// Suffix of complete files.
const SUFFIX: &str = ".code";
/// Prefix of files that are being written.
const TEMPORARY: &str = ".writing-";

/// Verified compiled code. Only this crate makes one.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Of which module.
    pub hash: ModuleHash,
    /// What the engine loads.
    pub bytes: Bytes,
}

impl Artifact {
    /// For bytes that this crate compiled or authenticated itself, and for a cell, which believes
    /// the parent that started it.
    pub(crate) const fn trusted(hash: ModuleHash, bytes: Bytes) -> Self {
        Self { hash, bytes }
    }
}

/// The secret that authenticates compiled code. Never leaves the process that holds it.
pub struct ArtifactKey([u8; 32]);

impl ArtifactKey {
    /// A key for this process only.
    ///
    /// # Errors
    /// The kernel gives no randomness.
    pub fn random() -> io::Result<Self> {
        let mut key = [0u8; 32];
        let mut filled = 0;
        while filled < key.len() {
            filled += getrandom(&mut key[filled..], GetRandomFlags::empty())?;
        }
        Ok(Self(key))
    }

    /// Reads the key, or creates the file (mode 0600) with a random one. Two processes that create
    /// it at the same time end up with the same key.
    ///
    /// # Errors
    /// The file cannot be read or written, or is not a key.
    pub fn load_or_create(path: &Path) -> io::Result<Self> {
        match Self::load(path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let key = Self::random()?;
        let temporary = path.with_extension(format!("new-{}", std::process::id()));
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&key.0)?;
            file.sync_all()?;
            // A link, not a rename: the first one wins.
            fs::hard_link(&temporary, path)
        })();
        let _ = fs::remove_file(&temporary);
        match written {
            Ok(()) => Ok(key),
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Self::load(path),
            Err(err) => Err(err),
        }
    }

    fn load(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::with_capacity(33);
        File::open(path)?.take(33).read_to_end(&mut bytes)?;
        let key = <[u8; 32]>::try_from(bytes).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{} is not a key of 32 bytes", path.display()))
        })?;
        Ok(Self(key))
    }
}

/// The cache. Methods block on the file system: call them off async threads.
pub struct ArtifactCache {
    dir: PathBuf,
    key: ArtifactKey,
    max_bytes: u64,
    fingerprint: [u8; 32],
    serial: AtomicU64,
    /// Serialises evictions.
    evicting: Mutex<()>,
}

impl ArtifactCache {
    /// Opens `dir` (created with mode 0700), removes what a crash left half-written, and evicts
    /// down to `max_bytes`.
    ///
    /// # Errors
    /// The directory cannot be made or read, or no engine can be built.
    pub fn open(dir: impl Into<PathBuf>, key: ArtifactKey, max_bytes: u64) -> io::Result<Self> {
        let dir = dir.into();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let fingerprint = engine::fingerprint().map_err(|err| io::Error::other(err.to_string()))?;
        let cache =
            Self { dir, key, max_bytes, fingerprint, serial: AtomicU64::new(0), evicting: Mutex::new(()) };
        cache.sweep()?;
        cache.evict(None)?;
        Ok(cache)
    }

    /// The artifact of a module, if it is here, whole and of this engine.
    #[must_use]
    pub fn get(&self, hash: &ModuleHash) -> Option<Artifact> {
        let path = self.path(hash);
        match self.read(&path, hash) {
            Ok(bytes) => {
                // The file's own time is the order of use; failing to set it only ages it.
                if let Ok(file) = File::options().write(true).open(&path) {
                    let _ = file.set_modified(SystemTime::now());
                }
                Some(Artifact::trusted(*hash, bytes))
            }
            Err(err) if err.kind() == io::ErrorKind::NotFound => None,
            Err(err) => {
                tracing::warn!(%hash, error = %err, "cached code is not usable and is removed");
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Stores an artifact, then evicts the least recently used until the cache fits. Durable when
    /// it returns.
    ///
    /// # Errors
    /// The file cannot be written. Nothing is left behind.
    pub fn put(&self, hash: &ModuleHash, artifact: &[u8]) -> io::Result<()> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let temporary = self.dir.join(format!("{TEMPORARY}{}-{serial}", std::process::id()));
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(MAGIC)?;
            file.write_all(&self.mac(hash, artifact)?.finalize().into_bytes())?;
            file.write_all(artifact)?;
            file.sync_all()?;
            fs::rename(&temporary, self.path(hash))?;
            File::open(&self.dir)?.sync_all()
        })();
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written?;
        self.evict(Some(hash))
    }

    /// Bytes of all complete files.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn size(&self) -> io::Result<u64> {
        Ok(self.entries()?.iter().map(|entry| entry.bytes).sum())
    }

    fn path(&self, hash: &ModuleHash) -> PathBuf {
        self.dir.join(format!("{hash}{SUFFIX}"))
    }

    fn mac(&self, hash: &ModuleHash, payload: &[u8]) -> io::Result<Hmac<Sha256>> {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.key.0).map_err(|err| io::Error::other(err.to_string()))?;
        mac.update(MAGIC);
        mac.update(hash.as_bytes());
        mac.update(&self.fingerprint);
        mac.update(&(payload.len() as u64).to_le_bytes());
        mac.update(payload);
        Ok(mac)
    }

    fn read(&self, path: &Path, hash: &ModuleHash) -> io::Result<Bytes> {
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        if len > MAX_ARTIFACT_BYTES || len < HEADER_BYTES as u64 {
            return Err(bad("its size is impossible"));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        file.take(MAX_ARTIFACT_BYTES).read_to_end(&mut bytes)?;
        let bytes = Bytes::from(bytes);
        if bytes.len() < HEADER_BYTES || &bytes[..MAGIC.len()] != MAGIC {
            return Err(bad("it is of another format"));
        }
        let payload = bytes.slice(HEADER_BYTES..);
        self.mac(hash, &payload)?
            .verify_slice(&bytes[MAGIC.len()..HEADER_BYTES])
            .map_err(|_| bad("it is of another engine, or was tampered with"))?;
        Ok(payload)
    }

    /// Removes half-written files of processes that are gone.
    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(TEMPORARY)) else {
                continue;
            };
            let owner = rest.split('-').next().unwrap_or_default();
            let alive = owner != std::process::id().to_string() && Path::new("/proc").join(owner).exists();
            if !alive {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let complete = entry.file_name().to_str().is_some_and(|name| name.ends_with(SUFFIX));
            // Another process may remove a file between the listing and this look.
            if complete && let Ok(meta) = entry.metadata() {
                entries.push(Entry {
                    path: entry.path(),
                    bytes: meta.len(),
                    used: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                });
            }
        }
        Ok(entries)
    }

    fn evict(&self, keep: Option<&ModuleHash>) -> io::Result<()> {
        let _one = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        let keep = keep.map(|hash| self.path(hash));
        let mut entries = self.entries()?;
        entries.sort_by_key(|entry| entry.used);
        let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        for entry in entries {
            if total <= self.max_bytes {
                break;
            }
            if keep.as_ref() == Some(&entry.path) && entry.bytes <= self.max_bytes {
                continue;
            }
            match fs::remove_file(&entry.path) {
                Ok(()) => {}
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                Err(err) => return Err(err),
            }
            total = total.saturating_sub(entry.bytes);
        }
        Ok(())
    }
}

struct Entry {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn cache(dir: &Path, max: u64) -> ArtifactCache {
        ArtifactCache::open(dir.join("code"), ArtifactKey([7; 32]), max).unwrap()
    }

    #[test]
    fn what_was_put_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let hash = ModuleHash::of(b"m");
        cache(dir.path(), 1 << 20).put(&hash, b"code").unwrap();
        let again = cache(dir.path(), 1 << 20).get(&hash).unwrap();
        assert_eq!(&again.bytes[..], b"code");
    }

    #[test]
    fn a_tampered_file_is_not_loaded_and_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 1 << 20);
        let hash = ModuleHash::of(b"m");
        for offset in [0, MAGIC.len(), HEADER_BYTES + 1] {
            cache.put(&hash, b"code").unwrap();
            let path = cache.path(&hash);
            let mut bytes = fs::read(&path).unwrap();
            bytes[offset] ^= 1;
            fs::write(&path, bytes).unwrap();
            assert!(cache.get(&hash).is_none(), "offset {offset}");
            assert!(!path.exists());
        }
    }

    #[test]
    fn code_of_one_module_does_not_pass_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 1 << 20);
        let (one, two) = (ModuleHash::of(b"1"), ModuleHash::of(b"2"));
        cache.put(&one, b"code").unwrap();
        fs::rename(cache.path(&one), cache.path(&two)).unwrap();
        assert!(cache.get(&two).is_none());
    }

    #[test]
    fn code_under_another_key_is_not_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let hash = ModuleHash::of(b"m");
        cache(dir.path(), 1 << 20).put(&hash, b"code").unwrap();
        let other = ArtifactCache::open(dir.path().join("code"), ArtifactKey([8; 32]), 1 << 20).unwrap();
        assert!(other.get(&hash).is_none());
    }

    #[test]
    fn a_file_that_a_crash_left_half_written_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("code")).unwrap();
        let left = dir.path().join("code").join(format!("{TEMPORARY}999999999-0"));
        fs::write(&left, b"half").unwrap();
        cache(dir.path(), 1 << 20);
        assert!(!left.exists());
    }

    #[test]
    fn eviction_keeps_the_cache_under_its_limit_and_the_recently_used_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let entry = HEADER_BYTES as u64 + 100;
        let cache = cache(dir.path(), 3 * entry);
        let hashes: Vec<_> = (0u8..4).map(|i| ModuleHash::of(&[i])).collect();
        for (age, hash) in hashes[..3].iter().enumerate() {
            cache.put(hash, &[0; 100]).unwrap();
            let file = File::options().write(true).open(cache.path(hash)).unwrap();
            let then = SystemTime::now() - std::time::Duration::from_secs(100 - age as u64);
            file.set_modified(then).unwrap();
        }
        assert!(cache.get(&hashes[0]).is_some());
        cache.put(&hashes[3], &[0; 100]).unwrap();
        assert!(cache.size().unwrap() <= 3 * entry);
        assert!(cache.get(&hashes[1]).is_none());
        assert!(cache.get(&hashes[0]).is_some());
        assert!(cache.get(&hashes[3]).is_some());
    }

    #[test]
    fn a_key_is_created_once_and_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let one = ArtifactKey::load_or_create(&path).unwrap();
        let two = ArtifactKey::load_or_create(&path).unwrap();
        assert_eq!(one.0, two.0);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
