//! Files of an attempt: what is laid there before it starts, the filesystem it sees, and what is collected when it
//! has ended. All of it in this process's memory and charged to the attempt ([`tree`]); the host's own filesystem
//! plays no part. Owns the rules for paths and patterns; [`p1`] gives the tree to WASI preview 1 programs.

mod glob;
pub(crate) mod p1;
pub(crate) mod tree;

use serde::{Deserialize, Serialize};

use crate::blob;
use tree::{Fault, Id, Kind, Open, ROOT, Tree};

/// Bytes of a scratch directory when nothing else is asked for.
pub const DEFAULT_SCRATCH_BYTES: u64 = 64 << 20;
/// Most bytes of a scratch directory.
pub const MAX_SCRATCH_BYTES: u64 = 1 << 30;
/// Files, directories and links of one scratch directory.
pub const MAX_NODES: u64 = 8_192;
/// Files an invocation may bring.
pub const MAX_FILES: usize = 1_024;
/// Bytes of the path of a file that is brought or collected.
pub const MAX_FILE_PATH: usize = 1_024;
/// Patterns of files to collect.
pub const MAX_PATTERNS: usize = 16;
/// Files that are collected.
pub const MAX_ARTIFACTS: usize = 256;

/// A scratch directory for one attempt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scratch {
    /// Bytes that files, names and nodes may take together, 0 to [`MAX_SCRATCH_BYTES`].
    pub bytes: u64,
    /// What is there at the start; paths as [`check_path`] allows them.
    pub files: Vec<File>,
    /// Patterns of the regular files that come back; as [`check_pattern`] allows them.
    pub collect: Vec<String>,
}

/// Bytes that a cell may hold at the most for a scratch directory of so many: the tree, and what of its bookkeeping
/// the quota does not see. The files on their way into it are part of the input.
#[must_use]
pub fn scratch_bytes(quota: u64) -> u64 {
    const BOOKS: u64 = 8 << 20;
    quota.saturating_add(BOOKS)
}

impl Scratch {
    /// Bytes of the files that are brought.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.files.iter().map(|file| (file.path.len() + file.bytes.len()) as u64).sum()
    }

    /// Whether no file is brought.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

/// A file: one that is brought, or one that was collected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// From the root, without a slash at its beginning.
    pub path: String,
    /// What is in it.
    #[serde(with = "blob")]
    pub bytes: Vec<u8>,
}

/// Whether a file may be brought under this path.
///
/// # Errors
/// What is wrong with it, in words for users.
pub fn check_path(path: &str) -> Result<(), &'static str> {
    if path.len() > MAX_FILE_PATH {
        return Err("may have at most 1,024 bytes");
    }
    for part in path.split('/') {
        if part.is_empty() {
            return Err("must be relative, with a name between any two slashes and at the end");
        }
        if part == "." || part == ".." {
            return Err("may not contain `.` or `..` as a name");
        }
        if part.len() > tree::MAX_NAME {
            return Err("may have at most 255 bytes between two slashes");
        }
        if part.contains('\0') {
            return Err("may not contain a NUL character");
        }
    }
    Ok(())
}

/// Whether files may be collected by this pattern: a path in which `*` and `?` stand for characters of one name, and
/// a name that is `**` for any number of directories.
///
/// # Errors
/// What is wrong with it, in words for users.
pub fn check_pattern(pattern: &str) -> Result<(), &'static str> {
    check_path(pattern)
}

/// A file or directory stands where the path needs the other. In words for users.
pub const CONFLICT: &str = "another file stands where this path has a directory, or is the same path";

/// A tree with these files in it.
///
/// # Errors
/// They do not fit.
pub(crate) fn lay(scratch: &Scratch, fixed_ns: Option<u64>) -> Result<Tree, String> {
    let mut tree = Tree::new(scratch.bytes, MAX_NODES, fixed_ns);
    for file in &scratch.files {
        put(&mut tree, file).map_err(|fault| {
            let why = match fault {
                Fault::NoSpace | Fault::TooBig => "the scratch directory is too small",
                Fault::NoNodes => "the scratch directory has too few nodes",
                Fault::NotDirectory | Fault::IsDirectory | Fault::Exists => CONFLICT,
                _ => "this cannot be a path",
            };
            format!("file {:?} cannot be laid: {why}", file.path)
        })?;
    }
    Ok(tree)
}

fn put(tree: &mut Tree, file: &File) -> Result<(), Fault> {
    for (slash, _) in file.path.match_indices('/') {
        match tree.make_directory(ROOT, &file.path[..slash]) {
            Ok(()) | Err(Fault::Exists) => {}
            Err(fault) => return Err(fault),
        }
    }
    let how = Open { create: true, exclusive: true, ..Open::default() };
    let id = tree.open(ROOT, &file.path, how)?;
    let written = tree.write(id, 0, &file.bytes);
    tree.close(id);
    written
}

/// What was collected.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) files: Vec<File>,
    /// Bytes of matching files that did not fit any more.
    pub(crate) dropped: u64,
}

/// The regular files that match, in the order of their paths as directories list them; as many as fit into `room`.
pub(crate) fn collect(tree: &Tree, patterns: &[String], mut room: u64) -> Collected {
    let mut collected = Collected::default();
    if patterns.is_empty() {
        return collected;
    }
    let mut stack: Vec<(Id, String)> = vec![(ROOT, String::new())];
    while let Some((directory, prefix)) = stack.pop() {
        let Ok(entries) = tree.entries(directory, 0) else { continue };
        for (_, name, id, kind) in entries {
            let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
            // Paths that no pattern could name are not looked into, which bounds this walk.
            if path.len() > MAX_FILE_PATH {
                continue;
            }
            match kind {
                Kind::Directory => stack.push((id, path)),
                Kind::Link => {}
                Kind::File if patterns.iter().any(|pattern| glob::matches(pattern, &path)) => {
                    let size = tree.stat(id).map_or(0, |stat| stat.size);
                    let cost = size.saturating_add(path.len() as u64);
                    if cost > room || collected.files.len() >= MAX_ARTIFACTS {
                        collected.dropped = collected.dropped.saturating_add(size);
                        continue;
                    }
                    room -= cost;
                    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
                    if tree.read(id, 0, &mut bytes).is_ok() {
                        collected.files.push(File { path, bytes });
                    }
                }
                Kind::File => {}
            }
        }
    }
    collected.files.sort_unstable_by(|one, other| one.path.cmp(&other.path));
    collected
}
