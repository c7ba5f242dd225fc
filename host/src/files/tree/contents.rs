//! What is in files: blocks that were written, and holes. Owns their part of the quota.

use super::{BLOCK, Block, Body, Fault, Id, Result, SLOT_BYTES, Tree};

impl Tree {
    /// Reads into `out` from `offset`; returns how much there was.
    pub(crate) fn read(&self, id: Id, offset: u64, out: &mut [u8]) -> Result<usize> {
        let (size, blocks) = self.file(id)?;
        let there = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        let mut done = 0;
        while done < there {
            let at = offset + done as u64;
            let (block, within) = split(at);
            let len = (BLOCK - within).min(there - done);
            match blocks.get(block).and_then(Option::as_ref) {
                Some(bytes) => out[done..done + len].copy_from_slice(&bytes[within..within + len]),
                None => out[done..done + len].fill(0),
            }
            done += len;
        }
        Ok(there)
    }

    fn file(&self, id: Id) -> Result<(u64, &[Block])> {
        match &self.get(id)?.body {
            Body::File { size, blocks } => Ok((*size, blocks)),
            Body::Directory { .. } => Err(Fault::IsDirectory),
            Body::Link(_) => Err(Fault::Invalid),
        }
    }

    /// Writes all of `bytes` at `offset`, or nothing.
    pub(crate) fn write(&mut self, id: Id, offset: u64, bytes: &[u8]) -> Result<()> {
        let (size, blocks) = self.file(id)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(bytes.len() as u64).ok_or(Fault::TooBig)?;
        if end > self.max_bytes {
            // One byte too many is no space; where no quota could ever hold it, it is too big.
            return Err(if offset > self.max_bytes { Fault::TooBig } else { Fault::NoSpace });
        }
        let (first, last) = (split(offset).0, split(end - 1).0);
        let slots = (last + 1).saturating_sub(blocks.len()) as u64;
        let fresh = (first..=last).filter(|n| blocks.get(*n).is_none_or(Option::is_none)).count() as u64;
        self.charge(slots * SLOT_BYTES + fresh * BLOCK as u64)?;
        let now = self.now_ns();
        let node = self.get_mut(id)?;
        node.modified_ns = now;
        node.changed_ns = now;
        if let Body::File { size: to, blocks } = &mut node.body {
            if blocks.len() <= last {
                blocks.resize_with(last + 1, || None);
            }
            *to = size.max(end);
            let mut done = 0;
            while done < bytes.len() {
                let (block, within) = split(offset + done as u64);
                let len = (BLOCK - within).min(bytes.len() - done);
                let target = blocks[block].get_or_insert_with(|| vec![0; BLOCK].into_boxed_slice());
                target[within..within + len].copy_from_slice(&bytes[done..done + len]);
                done += len;
            }
        }
        Ok(())
    }

    /// Cut or extend (with a hole).
    pub(crate) fn set_size(&mut self, id: Id, wanted: u64) -> Result<()> {
        if wanted > self.max_bytes {
            return Err(Fault::TooBig);
        }
        let (_, blocks) = self.file(id)?;
        let before = file_bytes(blocks);
        let slots = usize::try_from(wanted.div_ceil(BLOCK as u64)).map_err(|_| Fault::TooBig)?;
        let more = slots.saturating_sub(blocks.len()) as u64;
        self.charge(more * SLOT_BYTES)?;
        let now = self.now_ns();
        let node = self.get_mut(id)?;
        node.modified_ns = now;
        node.changed_ns = now;
        let mut after = before;
        if let Body::File { size, blocks } = &mut node.body {
            let shrinks = slots < blocks.len();
            blocks.resize_with(slots, || None);
            blocks.shrink_to(slots.saturating_mul(2));
            let (_, within) = split(wanted);
            if wanted < *size
                && within > 0
                && let Some(Some(block)) = blocks.last_mut()
            {
                // What is cut off must not come back when the file grows again.
                block[within..].fill(0);
            }
            *size = wanted;
            if shrinks {
                after = file_bytes(blocks);
            }
        }
        self.used = self.used.saturating_sub(before.saturating_sub(after));
        Ok(())
    }
}

pub(super) fn file_bytes(blocks: &[Block]) -> u64 {
    blocks.len() as u64 * SLOT_BYTES + blocks.iter().flatten().count() as u64 * BLOCK as u64
}

fn split(at: u64) -> (usize, usize) {
    let block = usize::try_from(at / BLOCK as u64).unwrap_or(usize::MAX);
    (block, usize::try_from(at % BLOCK as u64).unwrap_or(0))
}
