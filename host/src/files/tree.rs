//! A filesystem in memory: what an attempt sees as `/`. Owns names, links, sizes and the quota; knows nothing of
//! WASI. Nothing in it exists outside this process, so there is no way out of it and nothing to clean up: it goes as
//! one piece, however deep or odd what the guest left.
//!
//! Everything is charged when it is made, at what it takes here: blocks that were written, names, nodes. A hole in a
//! file costs its place in the file's index.

mod contents;

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use contents::file_bytes;

/// Number of a node; the number on the outside too.
pub(crate) type Id = usize;
/// The root directory.
pub(crate) const ROOT: Id = 0;

/// Bytes of a block.
const BLOCK: usize = 4_096;
/// What a node is charged besides what it holds.
const NODE_BYTES: u64 = 256;
/// What a name is charged besides twice its length (it stands in two indexes).
const NAME_BYTES: u64 = 128;
/// What a block's place in a file's index is charged, the index's spare room included.
const SLOT_BYTES: u64 = 32;
/// Bytes of one name.
pub(crate) const MAX_NAME: usize = 255;
/// Bytes of a path.
pub(crate) const MAX_PATH: usize = 4_096;
/// Symbolic links followed on one path.
const MAX_LINKS: usize = 40;
/// Names looked at on one path, those of links included: a call must not take longer than a slice.
const MAX_STEPS: usize = 8_192;
/// Serial of a directory's first entry: those below stand for `.` and `..`.
const FIRST_SERIAL: u64 = 2;

/// What cannot be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// There is no such name.
    NotFound,
    /// There is such a name.
    Exists,
    /// A directory was expected.
    NotDirectory,
    /// Anything but a directory was expected.
    IsDirectory,
    /// The directory is not empty.
    NotEmpty,
    /// The bytes are used up.
    NoSpace,
    /// The nodes are used up.
    NoNodes,
    /// A name or path is too long.
    NameTooLong,
    /// A name that cannot be.
    BadName,
    /// Too many symbolic links.
    Loop,
    /// It makes no sense.
    Invalid,
    /// The path leads out of the directory it started from.
    Outside,
    /// Larger than the quota could ever hold.
    TooBig,
}

type Result<T> = std::result::Result<T, Fault>;

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Link,
}

/// A block of a file; none: a hole.
type Block = Option<Box<[u8]>>;

/// What is known about a node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stat {
    pub(crate) kind: Kind,
    pub(crate) links: u64,
    pub(crate) size: u64,
    pub(crate) accessed_ns: u64,
    pub(crate) modified_ns: u64,
    pub(crate) changed_ns: u64,
}

/// How to open.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Open {
    pub(crate) follow: bool,
    pub(crate) create: bool,
    pub(crate) exclusive: bool,
    pub(crate) truncate: bool,
    pub(crate) directory: bool,
}

#[derive(Debug)]
enum Body {
    File { size: u64, blocks: Vec<Block> },
    Directory { parent: Id, names: BTreeMap<String, (Id, u64)>, order: BTreeMap<u64, String>, next: u64 },
    Link(String),
}

#[derive(Debug)]
struct Node {
    body: Body,
    /// Names that lead here.
    links: u32,
    /// Descriptors that hold it.
    opens: u32,
    accessed_ns: u64,
    modified_ns: u64,
    changed_ns: u64,
}

/// The whole filesystem.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Option<Node>>,
    free: Vec<Id>,
    used: u64,
    max_bytes: u64,
    left: u64,
    /// A clock that stands still, in nanoseconds since 1970.
    fixed_ns: Option<u64>,
}

/// Where a path leads.
struct Place {
    parent: Id,
    /// Empty: the path is the directory itself.
    name: String,
    node: Option<Id>,
    /// It ended with a slash.
    directory: bool,
}

impl Tree {
    /// An empty root, with room for `max_bytes` and `max_nodes`.
    pub(crate) fn new(max_bytes: u64, max_nodes: u64, fixed_ns: Option<u64>) -> Self {
        let mut tree =
            Self { nodes: Vec::new(), free: Vec::new(), used: 0, max_bytes, left: max_nodes, fixed_ns };
        let root = tree.node(directory(ROOT));
        tree.nodes.push(Some(Node { links: 1, ..root }));
        tree
    }

    /// Bytes charged.
    #[cfg(test)]
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.fixed_ns.unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        })
    }

    fn node(&self, body: Body) -> Node {
        let now = self.now_ns();
        Node { body, links: 0, opens: 0, accessed_ns: now, modified_ns: now, changed_ns: now }
    }

    fn get(&self, id: Id) -> Result<&Node> {
        self.nodes.get(id).and_then(Option::as_ref).ok_or(Fault::NotFound)
    }

    fn get_mut(&mut self, id: Id) -> Result<&mut Node> {
        self.nodes.get_mut(id).and_then(Option::as_mut).ok_or(Fault::NotFound)
    }

    fn charge(&mut self, bytes: u64) -> Result<()> {
        if self.max_bytes.saturating_sub(self.used) < bytes {
            return Err(Fault::NoSpace);
        }
        self.used += bytes;
        Ok(())
    }

    fn add(&mut self, body: Body) -> Result<Id> {
        if self.left == 0 {
            return Err(Fault::NoNodes);
        }
        let held = if let Body::Link(target) = &body { target.len() as u64 } else { 0 };
        self.charge(NODE_BYTES + held)?;
        self.left -= 1;
        let node = Some(self.node(body));
        Ok(if let Some(id) = self.free.pop() {
            self.nodes[id] = node;
            id
        } else {
            self.nodes.push(node);
            self.nodes.len() - 1
        })
    }

    /// Let go of a node that nothing leads to any more.
    fn sweep(&mut self, id: Id) {
        let Some(slot) = self.nodes.get_mut(id) else { return };
        if slot.as_ref().is_none_or(|node| node.links > 0 || node.opens > 0) {
            return;
        }
        let held = match slot.take().map(|node| node.body) {
            Some(Body::File { blocks, .. }) => file_bytes(&blocks),
            Some(Body::Link(target)) => target.len() as u64,
            _ => 0,
        };
        self.used = self.used.saturating_sub(NODE_BYTES + held);
        self.left += 1;
        self.free.push(id);
    }

    fn touch(&mut self, id: Id) {
        let now = self.now_ns();
        if let Ok(node) = self.get_mut(id) {
            node.modified_ns = now;
            node.changed_ns = now;
        }
    }

    fn child(&self, directory: Id, name: &str) -> Result<Option<Id>> {
        match &self.get(directory)?.body {
            Body::Directory { names, .. } => Ok(names.get(name).map(|(id, _)| *id)),
            _ => Err(Fault::NotDirectory),
        }
    }

    /// Enter a name; the caller has seen that it is free.
    fn enter(&mut self, parent: Id, name: &str, id: Id) -> Result<()> {
        // A directory that has been removed while somebody holds it takes nothing in any more.
        if self.get(parent)?.links == 0 {
            return Err(Fault::NotFound);
        }
        self.charge(name_bytes(name))?;
        if let Body::Directory { names, order, next, .. } = &mut self.get_mut(parent)?.body {
            names.insert(name.to_owned(), (id, *next));
            order.insert(*next, name.to_owned());
            *next += 1;
        }
        self.get_mut(id)?.links += 1;
        self.touch(parent);
        Ok(())
    }

    fn leave(&mut self, parent: Id, name: &str) -> Result<()> {
        let Body::Directory { names, order, .. } = &mut self.get_mut(parent)?.body else {
            return Err(Fault::NotDirectory);
        };
        let (id, serial) = names.remove(name).ok_or(Fault::NotFound)?;
        order.remove(&serial);
        self.used = self.used.saturating_sub(name_bytes(name));
        let node = self.get_mut(id)?;
        node.links = node.links.saturating_sub(1);
        self.touch(parent);
        self.sweep(id);
        Ok(())
    }

    /// Follow a path from a directory. It may not lead out of that directory, whatever links lie on it.
    fn walk(&self, base: Id, path: &str, follow: bool) -> Result<Place> {
        if path.len() > MAX_PATH {
            return Err(Fault::NameTooLong);
        }
        if path.is_empty() {
            return Err(Fault::NotFound);
        }
        if path.starts_with('/') {
            return Err(Fault::Outside);
        }
        let mut stack = vec![base];
        // What is still to be walked, the next part last.
        let mut rest: Vec<String> = parts(path);
        let mut followed = 0;
        let mut steps = 0;
        let slash = path.ends_with('/');
        let mut place = Place { parent: base, name: String::new(), node: Some(base), directory: true };
        while let Some(part) = rest.pop() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(Fault::Loop);
            }
            let here = *stack.last().ok_or(Fault::Outside)?;
            if part == "." {
                self.expect_directory(here)?;
                place = Place { parent: here, name: String::new(), node: Some(here), directory: true };
                continue;
            }
            if part == ".." {
                self.expect_directory(here)?;
                if stack.len() < 2 {
                    return Err(Fault::Outside);
                }
                stack.pop();
                let here = stack.last().copied().unwrap_or(base);
                place = Place { parent: here, name: String::new(), node: Some(here), directory: true };
                continue;
            }
            check_name(&part)?;
            let found = self.child(here, &part)?;
            let last = rest.is_empty();
            let target = match found.map(|id| &self.nodes[id]) {
                Some(Some(Node { body: Body::Link(target), .. })) if !last || follow || slash => {
                    Some(target.as_str())
                }
                _ => None,
            };
            if let Some(target) = target {
                followed += 1;
                if followed > MAX_LINKS {
                    return Err(Fault::Loop);
                }
                if target.starts_with('/') {
                    if base != ROOT {
                        return Err(Fault::Outside);
                    }
                    stack.truncate(1);
                }
                rest.extend(parts(target));
                let here = stack.last().copied().unwrap_or(base);
                place = Place { parent: here, name: String::new(), node: Some(here), directory: true };
                continue;
            }
            match (found, last) {
                (Some(id), false) => {
                    self.expect_directory(id)?;
                    stack.push(id);
                }
                (None, false) => return Err(Fault::NotFound),
                (found, true) => place = Place { parent: here, name: part, node: found, directory: slash },
            }
        }
        if place.directory
            && let Some(id) = place.node
        {
            self.expect_directory(id)?;
        }
        Ok(place)
    }

    fn expect_directory(&self, id: Id) -> Result<()> {
        match self.get(id)?.body {
            Body::Directory { .. } => Ok(()),
            _ => Err(Fault::NotDirectory),
        }
    }

    /// The node at a path.
    pub(crate) fn find(&self, base: Id, path: &str, follow: bool) -> Result<Id> {
        self.walk(base, path, follow)?.node.ok_or(Fault::NotFound)
    }

    /// Open; the node stays until [`Self::close`].
    pub(crate) fn open(&mut self, base: Id, path: &str, how: Open) -> Result<Id> {
        let place = self.walk(base, path, how.follow && !(how.create && how.exclusive))?;
        let id = match place.node {
            Some(_) if how.create && how.exclusive => return Err(Fault::Exists),
            Some(id) => id,
            None if how.create => {
                if place.directory || how.directory {
                    return Err(Fault::IsDirectory);
                }
                self.insert(&place, Body::File { size: 0, blocks: Vec::new() })?
            }
            None => return Err(Fault::NotFound),
        };
        let kind = self.stat(id)?.kind;
        match kind {
            Kind::Link => return Err(Fault::Loop),
            Kind::File if how.directory => return Err(Fault::NotDirectory),
            Kind::Directory if how.truncate => return Err(Fault::IsDirectory),
            Kind::File if how.truncate => self.set_size(id, 0)?,
            Kind::File | Kind::Directory => {}
        }
        self.get_mut(id)?.opens += 1;
        Ok(id)
    }

    /// One descriptor less holds it.
    pub(crate) fn close(&mut self, id: Id) {
        if let Ok(node) = self.get_mut(id) {
            node.opens = node.opens.saturating_sub(1);
        }
        self.sweep(id);
    }

    fn insert(&mut self, place: &Place, body: Body) -> Result<Id> {
        if place.name.is_empty() {
            return Err(Fault::Exists);
        }
        let id = self.add(body)?;
        if let Err(fault) = self.enter(place.parent, &place.name, id) {
            self.sweep(id);
            return Err(fault);
        }
        Ok(id)
    }

    pub(crate) fn make_directory(&mut self, base: Id, path: &str) -> Result<()> {
        let place = self.walk(base, path, false)?;
        if place.node.is_some() {
            return Err(Fault::Exists);
        }
        self.insert(&place, directory(place.parent)).map(drop)
    }

    pub(crate) fn make_link(&mut self, base: Id, path: &str, target: &str) -> Result<()> {
        if target.is_empty() || target.contains('\0') {
            return Err(Fault::BadName);
        }
        if target.len() > MAX_PATH {
            return Err(Fault::NameTooLong);
        }
        let place = self.walk(base, path, false)?;
        if place.node.is_some() {
            return Err(Fault::Exists);
        }
        if place.directory {
            return Err(Fault::NotFound);
        }
        self.insert(&place, Body::Link(target.to_owned())).map(drop)
    }

    pub(crate) fn read_link(&self, base: Id, path: &str) -> Result<&str> {
        match &self.get(self.find(base, path, false)?)?.body {
            Body::Link(target) => Ok(target),
            _ => Err(Fault::Invalid),
        }
    }

    /// One more name for a file.
    pub(crate) fn hard_link(&mut self, from: (Id, &str), to: (Id, &str), follow: bool) -> Result<()> {
        let id = self.find(from.0, from.1, follow)?;
        if self.stat(id)?.kind == Kind::Directory {
            return Err(Fault::IsDirectory);
        }
        let place = self.walk(to.0, to.1, false)?;
        if place.node.is_some() {
            return Err(Fault::Exists);
        }
        if place.directory {
            return Err(Fault::NotFound);
        }
        self.enter(place.parent, &place.name, id)
    }

    pub(crate) fn remove_file(&mut self, base: Id, path: &str) -> Result<()> {
        let place = self.walk(base, path, false)?;
        let id = place.node.ok_or(Fault::NotFound)?;
        if self.stat(id)?.kind == Kind::Directory {
            return Err(Fault::IsDirectory);
        }
        self.leave(place.parent, &place.name)
    }

    pub(crate) fn remove_directory(&mut self, base: Id, path: &str) -> Result<()> {
        let place = self.walk(base, path, false)?;
        let id = place.node.ok_or(Fault::NotFound)?;
        self.expect_directory(id)?;
        if place.name.is_empty() {
            return Err(Fault::Invalid);
        }
        self.expect_empty(id)?;
        self.leave(place.parent, &place.name)
    }

    fn expect_empty(&self, id: Id) -> Result<()> {
        match &self.get(id)?.body {
            Body::Directory { names, .. } if !names.is_empty() => Err(Fault::NotEmpty),
            _ => Ok(()),
        }
    }

    pub(crate) fn rename(&mut self, from: (Id, &str), to: (Id, &str)) -> Result<()> {
        let source = self.walk(from.0, from.1, false)?;
        let target = self.walk(to.0, to.1, false)?;
        let id = source.node.ok_or(Fault::NotFound)?;
        if source.name.is_empty() || target.name.is_empty() {
            return Err(Fault::Invalid);
        }
        let is_directory = self.stat(id)?.kind == Kind::Directory;
        if target.directory && !is_directory {
            return Err(Fault::NotDirectory);
        }
        if let Some(old) = target.node {
            if old == id {
                return Ok(());
            }
            match (is_directory, self.stat(old)?.kind == Kind::Directory) {
                (true, false) => return Err(Fault::NotDirectory),
                (false, true) => return Err(Fault::IsDirectory),
                (true, true) => self.expect_empty(old)?,
                (false, false) => {}
            }
        }
        if self.get(target.parent)?.links == 0 {
            return Err(Fault::NotFound);
        }
        if is_directory && self.is_within(target.parent, id)? {
            return Err(Fault::Invalid);
        }
        if target.node.is_none() {
            // Charged before anything moves: a rename that fails has changed nothing.
            let (old, new) = (name_bytes(&source.name), name_bytes(&target.name));
            if new > old && self.max_bytes.saturating_sub(self.used) < new {
                return Err(Fault::NoSpace);
            }
        }
        // Held, so that the moment without a name is not its end.
        self.get_mut(id)?.opens += 1;
        self.leave(source.parent, &source.name)?;
        if target.node.is_some() {
            self.leave(target.parent, &target.name)?;
        }
        let entered = self.enter(target.parent, &target.name, id);
        if entered.is_ok()
            && let Body::Directory { parent, .. } = &mut self.get_mut(id)?.body
        {
            *parent = target.parent;
        }
        self.close(id);
        entered
    }

    /// Whether `id` is `ancestor` or below it.
    fn is_within(&self, mut id: Id, ancestor: Id) -> Result<bool> {
        loop {
            if id == ancestor {
                return Ok(true);
            }
            match self.get(id)?.body {
                Body::Directory { parent, .. } if parent != id => id = parent,
                _ => return Ok(false),
            }
        }
    }

    pub(crate) fn stat(&self, id: Id) -> Result<Stat> {
        let node = self.get(id)?;
        let (kind, size) = match &node.body {
            Body::File { size, .. } => (Kind::File, *size),
            Body::Directory { names, .. } => (Kind::Directory, names.len() as u64),
            Body::Link(target) => (Kind::Link, target.len() as u64),
        };
        Ok(Stat {
            kind,
            links: u64::from(node.links),
            size,
            accessed_ns: node.accessed_ns,
            modified_ns: node.modified_ns,
            changed_ns: node.changed_ns,
        })
    }

    pub(crate) fn set_times(&mut self, id: Id, accessed: Option<u64>, modified: Option<u64>) -> Result<()> {
        let now = self.now_ns();
        let node = self.get_mut(id)?;
        node.accessed_ns = accessed.unwrap_or(node.accessed_ns);
        node.modified_ns = modified.unwrap_or(node.modified_ns);
        node.changed_ns = now;
        Ok(())
    }

    /// Entries of a directory from a serial on: serial, name, node, kind. An entry keeps its serial while others come
    /// and go, so that a reader that removes what it reads misses nothing.
    pub(crate) fn entries(&self, id: Id, from: u64) -> Result<impl Iterator<Item = (u64, &str, Id, Kind)>> {
        let Body::Directory { names, order, .. } = &self.get(id)?.body else {
            return Err(Fault::NotDirectory);
        };
        Ok(order.range(from..).filter_map(|(serial, name)| {
            let (child, _) = names.get(name)?;
            let kind = self.stat(*child).ok()?.kind;
            Some((*serial, name.as_str(), *child, kind))
        }))
    }
}

fn directory(parent: Id) -> Body {
    Body::Directory { parent, names: BTreeMap::new(), order: BTreeMap::new(), next: FIRST_SERIAL }
}

fn name_bytes(name: &str) -> u64 {
    NAME_BYTES + 2 * name.len() as u64
}

fn parts(path: &str) -> Vec<String> {
    path.split('/').rev().filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

pub(crate) fn check_name(name: &str) -> Result<()> {
    if name.len() > MAX_NAME {
        return Err(Fault::NameTooLong);
    }
    if name.is_empty() || name.contains(['\0', '/']) {
        return Err(Fault::BadName);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
