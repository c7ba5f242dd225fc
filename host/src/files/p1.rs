//! WASI preview 1 over a [`Tree`]: descriptors and the functions that take them, for programs with a scratch
//! directory. Replaces those functions of the engine's WASI in a linker of its own; clocks, random numbers, arguments
//! and polling stay the engine's. Every call is bounded: at most [`MAX_IO`] bytes are moved by one.

mod link;

use std::collections::BTreeMap;

use super::tree::{Fault, Id, Kind, MAX_PATH, Open, ROOT, Stat, Tree};
use crate::output::{Reader, Stream, Writer};

pub(crate) use link::link;

/// Bytes one call moves; programs take short reads and writes and go on.
const MAX_IO: usize = 1 << 20;
/// Buffers one call looks at.
const MAX_VECTORS: u32 = 1_024;
/// Open descriptors, the standard ones included.
const MAX_DESCRIPTORS: usize = 256;
/// The descriptor of the root directory.
const PREOPEN: u32 = 3;

/// Error numbers of preview 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
enum Errno {
    Badf = 8,
    Dquot = 19,
    Exist = 20,
    Fault = 21,
    Fbig = 22,
    Ilseq = 25,
    Inval = 28,
    Isdir = 31,
    Loop = 32,
    Mfile = 33,
    NameTooLong = 37,
    Noent = 44,
    Nospc = 51,
    Notdir = 54,
    NotEmpty = 55,
    NotSup = 58,
    Overflow = 61,
    Perm = 63,
    Spipe = 70,
}

impl From<Fault> for Errno {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NotFound => Self::Noent,
            Fault::Exists => Self::Exist,
            Fault::NotDirectory => Self::Notdir,
            Fault::IsDirectory => Self::Isdir,
            Fault::NotEmpty => Self::NotEmpty,
            Fault::NoSpace => Self::Nospc,
            Fault::NoNodes => Self::Dquot,
            Fault::NameTooLong => Self::NameTooLong,
            Fault::BadName => Self::Ilseq,
            Fault::Loop => Self::Loop,
            Fault::Invalid => Self::Inval,
            Fault::Outside => Self::Perm,
            Fault::TooBig => Self::Fbig,
        }
    }
}

type Done = Result<(), Errno>;

/// An open descriptor.
#[derive(Debug, Clone, Copy)]
enum Fd {
    Stdin,
    Stdout,
    Stderr,
    Directory { id: Id, preopened: bool },
    File { id: Id, at: u64, append: bool, read: bool, write: bool },
}

/// Descriptors, and the tree behind them.
pub(crate) struct Files {
    tree: Tree,
    open: BTreeMap<u32, Fd>,
    stdin: Reader,
    stdout: Writer,
    stderr: Writer,
    /// Bytes moved since the last count of host calls.
    moved: usize,
}

impl Files {
    pub(crate) fn new(tree: Tree, stdin: Reader, stdout: Writer) -> Self {
        let stderr = Writer { stream: Stream::StderrLines, ..stdout.clone() };
        let open = [
            (0, Fd::Stdin),
            (1, Fd::Stdout),
            (2, Fd::Stderr),
            (PREOPEN, Fd::Directory { id: ROOT, preopened: true }),
        ];
        Self { tree, open: open.into_iter().collect(), stdin, stdout, stderr, moved: 0 }
    }

    pub(crate) const fn tree(&self) -> &Tree {
        &self.tree
    }

    fn fd(&self, fd: i32) -> Result<Fd, Errno> {
        self.open.get(&fd.cast_unsigned()).copied().ok_or(Errno::Badf)
    }

    fn directory(&self, fd: i32) -> Result<Id, Errno> {
        match self.fd(fd)? {
            Fd::Directory { id, .. } => Ok(id),
            _ => Err(Errno::Notdir),
        }
    }

    /// The node behind a file or directory; none of the standard streams.
    fn node(&self, fd: i32) -> Result<Id, Errno> {
        match self.fd(fd)? {
            Fd::Directory { id, .. } | Fd::File { id, .. } => Ok(id),
            _ => Err(Errno::Badf),
        }
    }

    fn file(&self, fd: i32) -> Result<Id, Errno> {
        match self.fd(fd)? {
            Fd::File { id, .. } => Ok(id),
            Fd::Directory { .. } => Err(Errno::Isdir),
            _ => Err(Errno::Spipe),
        }
    }

    fn take(&mut self, fd: Fd) -> Result<u32, Errno> {
        if self.open.len() >= MAX_DESCRIPTORS {
            return Err(Errno::Mfile);
        }
        let free = (0..).find(|n| !self.open.contains_key(n)).ok_or(Errno::Mfile)?;
        self.open.insert(free, fd);
        Ok(free)
    }

    fn close(&mut self, fd: i32) -> Done {
        match self.open.remove(&fd.cast_unsigned()).ok_or(Errno::Badf)? {
            // The root is held by its own name.
            Fd::Directory { preopened: true, .. } | Fd::Stdin | Fd::Stdout | Fd::Stderr => {}
            Fd::Directory { id, .. } | Fd::File { id, .. } => self.tree.close(id),
        }
        Ok(())
    }
}

/// The guest's memory.
struct Memory<'a>(&'a mut [u8]);

impl Memory<'_> {
    fn slice(&mut self, at: i32, len: usize) -> Result<&mut [u8], Errno> {
        let at = at.cast_unsigned() as usize;
        at.checked_add(len).and_then(|end| self.0.get_mut(at..end)).ok_or(Errno::Fault)
    }

    fn put(&mut self, at: i32, bytes: &[u8]) -> Done {
        self.slice(at, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn put_u32(&mut self, at: i32, value: usize) -> Done {
        let value = u32::try_from(value).map_err(|_| Errno::Overflow)?;
        self.put(at, &value.to_le_bytes())
    }

    fn path(&mut self, at: i32, len: i32) -> Result<String, Errno> {
        let len = len.cast_unsigned() as usize;
        if len > MAX_PATH {
            return Err(Errno::NameTooLong);
        }
        std::str::from_utf8(self.slice(at, len)?).map(str::to_owned).map_err(|_| Errno::Ilseq)
    }

    /// Where the buffers of a scattered read or write are, up to [`MAX_IO`] bytes in all.
    fn vectors(&mut self, at: i32, count: i32) -> Result<Vec<(i32, usize)>, Errno> {
        let count = count.cast_unsigned();
        if count > MAX_VECTORS {
            return Err(Errno::Inval);
        }
        let table = self.slice(at, count as usize * 8)?;
        let mut vectors = Vec::new();
        let mut room = MAX_IO;
        for entry in table.chunks_exact(8) {
            let [a, b, c, d, e, f, g, h] = *entry else { break };
            let len = (u32::from_le_bytes([e, f, g, h]) as usize).min(room);
            if len > 0 {
                vectors.push((i32::from_le_bytes([a, b, c, d]), len));
                room -= len;
            }
        }
        Ok(vectors)
    }
}

fn filetype(kind: Kind) -> u8 {
    match kind {
        Kind::Directory => 3,
        Kind::File => 4,
        Kind::Link => 7,
    }
}

fn filestat(id: Id, stat: &Stat) -> [u8; 64] {
    let mut out = [0; 64];
    let mut put = |at: usize, value: u64| out[at..at + 8].copy_from_slice(&value.to_le_bytes());
    put(0, 1);
    put(8, id as u64 + 1);
    put(16, u64::from(filetype(stat.kind)));
    put(24, stat.links);
    put(32, stat.size);
    put(40, stat.accessed_ns);
    put(48, stat.modified_ns);
    put(56, stat.changed_ns);
    out
}

const STREAM_TYPE: u8 = 2;
const APPEND: i32 = 1;
const ALL_RIGHTS: u64 = (1 << 30) - 1;
const RIGHT_READ: i64 = 1 << 1;
const RIGHT_WRITE: i64 = 1 << 6;

impl Files {
    fn read(
        &mut self,
        memory: &mut Memory<'_>,
        fd: i32,
        iovs: (i32, i32),
        at: Option<i64>,
    ) -> Result<usize, Errno> {
        let vectors = memory.vectors(iovs.0, iovs.1)?;
        match self.fd(fd)? {
            Fd::Stdin if at.is_some() => Err(Errno::Spipe),
            Fd::Stdin => {
                let Some((to, len)) = vectors.first() else { return Ok(0) };
                let bytes = self.stdin.take(*len).unwrap_or_default();
                memory.put(*to, &bytes)?;
                Ok(bytes.len())
            }
            Fd::File { id, at: own, append, read: true, write } => {
                let from = at.map_or(own, i64::cast_unsigned);
                let mut done = 0;
                for (to, len) in vectors {
                    let offset = from.checked_add(done as u64).ok_or(Errno::Overflow)?;
                    let got = self.tree.read(id, offset, memory.slice(to, len)?)?;
                    done += got;
                    if got < len {
                        break;
                    }
                }
                if at.is_none() {
                    let moved = Fd::File { id, at: from + done as u64, append, read: true, write };
                    self.open.insert(fd.cast_unsigned(), moved);
                }
                Ok(done)
            }
            Fd::Directory { .. } => Err(Errno::Isdir),
            _ => Err(Errno::Badf),
        }
    }

    fn write(
        &mut self,
        memory: &mut Memory<'_>,
        fd: i32,
        iovs: (i32, i32),
        at: Option<i64>,
    ) -> Result<usize, Errno> {
        let vectors = memory.vectors(iovs.0, iovs.1)?;
        match self.fd(fd)? {
            Fd::Stdout | Fd::Stderr if at.is_some() => Err(Errno::Spipe),
            stream @ (Fd::Stdout | Fd::Stderr) => {
                let writer =
                    if matches!(stream, Fd::Stdout) { self.stdout.clone() } else { self.stderr.clone() };
                let mut done = 0;
                for (from, len) in vectors {
                    writer.put(memory.slice(from, len)?);
                    done += len;
                }
                Ok(done)
            }
            Fd::File { id, at: own, append, read, write: true } => {
                let size = self.tree.stat(id)?.size;
                let start = if append { size } else { at.map_or(own, i64::cast_unsigned) };
                let mut done = 0;
                for (from, len) in vectors {
                    let offset = start.checked_add(done as u64).ok_or(Errno::Fbig)?;
                    match self.tree.write(id, offset, memory.slice(from, len)?) {
                        Ok(()) => done += len,
                        // What was written counts; the next call hears that there is no room.
                        Err(_) if done > 0 => break,
                        Err(fault) => return Err(fault.into()),
                    }
                }
                if at.is_none() {
                    let moved = Fd::File { id, at: start + done as u64, append, read, write: true };
                    self.open.insert(fd.cast_unsigned(), moved);
                }
                Ok(done)
            }
            Fd::Directory { .. } => Err(Errno::Isdir),
            _ => Err(Errno::Badf),
        }
    }

    fn seek(&mut self, fd: i32, offset: i64, whence: i32) -> Result<u64, Errno> {
        let id = self.file(fd)?;
        let size = self.tree.stat(id)?.size;
        match self.open.get_mut(&fd.cast_unsigned()) {
            Some(Fd::File { at, .. }) => {
                let base = match whence {
                    0 => 0,
                    1 => *at,
                    2 => size,
                    _ => return Err(Errno::Inval),
                };
                *at = base.checked_add_signed(offset).ok_or(Errno::Inval)?;
                Ok(*at)
            }
            _ => Err(Errno::Badf),
        }
    }

    fn fdstat(&self, fd: i32) -> Result<[u8; 24], Errno> {
        let (kind, flags) = match self.fd(fd)? {
            Fd::Stdin | Fd::Stdout | Fd::Stderr => (STREAM_TYPE, 0),
            Fd::Directory { .. } => (filetype(Kind::Directory), 0),
            Fd::File { append, .. } => (filetype(Kind::File), u8::from(append)),
        };
        // A stream that could seek or tell would pass for a terminal.
        let rights =
            if kind == STREAM_TYPE { (RIGHT_READ | RIGHT_WRITE).cast_unsigned() } else { ALL_RIGHTS };
        let mut out = [0; 24];
        out[0] = kind;
        out[2] = flags;
        out[8..16].copy_from_slice(&rights.to_le_bytes());
        out[16..24].copy_from_slice(&rights.to_le_bytes());
        Ok(out)
    }

    fn readdir(
        &mut self,
        memory: &mut Memory<'_>,
        fd: i32,
        buf: i32,
        len: i32,
        cookie: i64,
    ) -> Result<usize, Errno> {
        let id = self.directory(fd)?;
        let room = (len.cast_unsigned() as usize).min(MAX_IO);
        let out = memory.slice(buf, room)?;
        let cookie = cookie.cast_unsigned();
        let dots = [(0, ".", id, Kind::Directory), (1, "..", id, Kind::Directory)];
        let dots = dots.into_iter().filter(|(serial, ..)| *serial >= cookie);
        let mut done = 0;
        for (serial, name, child, kind) in dots.chain(self.tree.entries(id, cookie)?) {
            let mut entry = [0; 24];
            entry[..8].copy_from_slice(&(serial + 1).to_le_bytes());
            entry[8..16].copy_from_slice(&(child as u64 + 1).to_le_bytes());
            entry[16..20].copy_from_slice(&(u32::try_from(name.len()).unwrap_or(0)).to_le_bytes());
            entry[20] = filetype(kind);
            // The last entry is cut where the buffer ends: that tells the program to ask again.
            for part in [&entry[..], name.as_bytes()] {
                let fits = part.len().min(room - done);
                out[done..done + fits].copy_from_slice(&part[..fits]);
                done += fits;
            }
            if done == room {
                break;
            }
        }
        Ok(done)
    }

    fn path_open(
        &mut self,
        fd: i32,
        dirflags: i32,
        path: &str,
        oflags: i32,
        rights: i64,
        fdflags: i32,
    ) -> Result<u32, Errno> {
        let base = self.directory(fd)?;
        if self.open.len() >= MAX_DESCRIPTORS {
            return Err(Errno::Mfile);
        }
        let how = Open {
            follow: dirflags & 1 != 0,
            create: oflags & 1 != 0,
            directory: oflags & 2 != 0,
            exclusive: oflags & 4 != 0,
            truncate: oflags & 8 != 0,
        };
        let write = rights & RIGHT_WRITE != 0;
        let id = self.tree.open(base, path, how)?;
        let opened = match self.tree.stat(id)?.kind {
            Kind::Directory if write && !how.directory => Err(Errno::Isdir),
            Kind::Directory => Ok(Fd::Directory { id, preopened: false }),
            _ => Ok(Fd::File {
                id,
                at: 0,
                append: fdflags & APPEND != 0,
                read: rights & RIGHT_READ != 0,
                write,
            }),
        };
        match opened.and_then(|fd| self.take(fd)) {
            Ok(number) => Ok(number),
            Err(errno) => {
                self.tree.close(id);
                Err(errno)
            }
        }
    }

    /// The times that a call sets: given, now, or left alone.
    fn times(&self, accessed: i64, modified: i64, flags: i32) -> Result<(Option<u64>, Option<u64>), Errno> {
        let one = |given: i64, set: i32, now: i32| match (flags & set != 0, flags & now != 0) {
            (true, true) => Err(Errno::Inval),
            (true, false) => Ok(Some(given.cast_unsigned())),
            (false, true) => Ok(Some(self.tree.now_ns())),
            (false, false) => Ok(None),
        };
        Ok((one(accessed, 1, 2)?, one(modified, 4, 8)?))
    }
}
