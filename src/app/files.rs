//! Files that an invocation brings and collects: whether they may be, and how they travel. Owns the form in which they
//! stand behind the input in the invocation's row; the host lays and collects them.

use std::collections::{BTreeMap, HashSet};

use sandbar_host::ModuleKind;
use sandbar_host::files::{
    self, DEFAULT_SCRATCH_BYTES, MAX_FILES, MAX_PATTERNS, MAX_SCRATCH_BYTES, check_path, check_pattern,
};

use crate::app::{Error, FieldError, Result};
use crate::store::invocation::ScratchSpec;
use crate::store::task::Kind;

/// Files as a request names them.
#[derive(Debug, Default)]
pub struct Files {
    /// What is laid there before the start, by path.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Patterns of what comes back.
    pub collect: Vec<String>,
    /// Bytes of the scratch directory.
    pub bytes: Option<u64>,
}

impl Files {
    /// Whether a scratch directory is asked for.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.bytes.is_some() || !self.files.is_empty() || !self.collect.is_empty()
    }

    /// Bytes that count as input.
    #[must_use]
    pub fn input_bytes(&self) -> usize {
        self.files.iter().map(|(path, bytes)| path.len() + bytes.len()).sum()
    }

    /// Check them, and put their contents behind `input`.
    ///
    /// # Errors
    /// The first thing that is wrong, with its field.
    pub fn stow(self, kind: Kind, input: &mut Vec<u8>) -> Result<Option<ScratchSpec>> {
        if !self.is_wanted() {
            return Ok(None);
        }
        let invalid =
            |pointer: String, detail: String| Error::InvalidFields(vec![FieldError::new(pointer, detail)]);
        if kind != Kind::Module(ModuleKind::CommandP1) {
            let detail = "only commands of WASI preview 1 have a scratch directory";
            return Err(invalid(self.pointer().to_owned(), detail.to_owned()));
        }
        let bytes = self.bytes.unwrap_or(DEFAULT_SCRATCH_BYTES);
        if bytes > MAX_SCRATCH_BYTES {
            return Err(invalid(
                "/scratch_bytes".to_owned(),
                format!("must be from 0 to {MAX_SCRATCH_BYTES}"),
            ));
        }
        if self.files.len() > MAX_FILES {
            return Err(invalid("/files".to_owned(), format!("may be at most {MAX_FILES}")));
        }
        if self.collect.len() > MAX_PATTERNS {
            return Err(invalid("/collect".to_owned(), format!("may be at most {MAX_PATTERNS} patterns")));
        }
        for (index, pattern) in self.collect.iter().enumerate() {
            check_pattern(pattern).map_err(|why| invalid(format!("/collect/{index}"), why.to_owned()))?;
        }
        let directories: HashSet<&str> = self
            .files
            .keys()
            .flat_map(|path| path.match_indices('/').map(|(slash, _)| &path[..slash]))
            .collect();
        for path in self.files.keys() {
            let why = match check_path(path) {
                Err(why) => why,
                Ok(()) if directories.contains(path.as_str()) => files::CONFLICT,
                Ok(()) => continue,
            };
            return Err(invalid(
                format!("/files/{}", path.replace('~', "~0").replace('/', "~1")),
                why.to_owned(),
            ));
        }
        let mut sizes = Vec::with_capacity(self.files.len());
        for (path, content) in self.files {
            sizes.push((path, content.len() as u64));
            input.extend_from_slice(&content);
        }
        Ok(Some(ScratchSpec { bytes, files: sizes, collect: self.collect }))
    }

    fn pointer(&self) -> &'static str {
        match (self.files.is_empty(), self.collect.is_empty()) {
            (false, _) => "/files",
            (true, false) => "/collect",
            (true, true) => "/scratch_bytes",
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn files(paths: &[&str]) -> Files {
        Files {
            files: paths.iter().map(|path| ((*path).to_owned(), path.as_bytes().to_vec())).collect(),
            ..Files::default()
        }
    }

    fn refused(files: Files, kind: Kind) -> String {
        match files.stow(kind, &mut Vec::new()) {
            Err(Error::InvalidFields(errors)) => errors[0].pointer.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_stowed_comes_out_again() {
        let mut input = b"stdin".to_vec();
        let spec =
            files(&["a/b.txt", "c"]).stow(Kind::Module(ModuleKind::CommandP1), &mut input).unwrap().unwrap();
        let (stdin, scratch) = spec.unstow(&input).unwrap();
        assert_eq!(stdin, b"stdin");
        let found: Vec<_> = scratch.files.iter().map(|f| (f.path.as_str(), f.bytes.as_slice())).collect();
        assert_eq!(found, [("a/b.txt", &b"a/b.txt"[..]), ("c", &b"c"[..])]);
        assert!(spec.unstow(b"x").is_none(), "a row that was cut off");
    }

    #[test]
    fn paths_that_lead_elsewhere_or_over_each_other_are_refused_by_name() {
        for bad in ["/etc/passwd", "../x", "a/../b", "a//b", "a/", "", ".", "a/./b", "a\0b"] {
            let pointer = refused(files(&[bad]), Kind::Module(ModuleKind::CommandP1));
            assert!(pointer.starts_with("/files/"), "{bad}: {pointer}");
        }
        assert_eq!(refused(files(&["a", "a/b"]), Kind::Module(ModuleKind::CommandP1)), "/files/a");
        let long = "x".repeat(300);
        assert_eq!(refused(files(&[&long]), Kind::Module(ModuleKind::CommandP1)), format!("/files/{long}"));
    }

    #[test]
    fn only_preview_1_commands_have_files_and_every_number_has_a_bound() {
        assert_eq!(refused(files(&["a"]), Kind::Module(ModuleKind::Task)), "/files");
        let collect = |patterns: Vec<String>| Files { collect: patterns, ..Files::default() };
        assert_eq!(refused(collect(vec!["*".to_owned()]), Kind::Module(ModuleKind::CommandP2)), "/collect");
        assert_eq!(
            refused(collect(vec!["../*".to_owned()]), Kind::Module(ModuleKind::CommandP1)),
            "/collect/0"
        );
        assert_eq!(
            refused(collect(vec!["*".to_owned(); 17]), Kind::Module(ModuleKind::CommandP1)),
            "/collect"
        );
        let large = Files { bytes: Some(MAX_SCRATCH_BYTES + 1), ..Files::default() };
        assert_eq!(refused(large, Kind::Module(ModuleKind::CommandP1)), "/scratch_bytes");
        assert!(Files::default().stow(Kind::Module(ModuleKind::Task), &mut Vec::new()).unwrap().is_none());
    }
}
