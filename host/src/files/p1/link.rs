//! The functions as programs import them: arguments out, error numbers in. Owns what a call counts as.

use wasmtime::{Caller, Extern, Linker};

use super::{APPEND, Done, Errno, Fd, Files, Memory, STREAM_TYPE, filestat};
use crate::state::HostP1;

/// Bytes moved for which one more host call is counted.
const BYTES_PER_CALL: usize = 16 << 10;
const MODULE: &str = "wasi_snapshot_preview1";

/// Runs a call on the descriptors and the memory of the calling program.
fn call(
    mut caller: Caller<'_, HostP1>,
    body: impl FnOnce(&mut Files, &mut Memory<'_>) -> Done,
) -> wasmtime::Result<i32> {
    let Some(Extern::Memory(memory)) = caller.get_export("memory") else {
        return Err(wasmtime::Error::msg("missing required memory export"));
    };
    let (memory, host) = memory.data_and_store_mut(&mut caller);
    host.common.calls += 1;
    let Some(files) = host.files.as_mut() else {
        return Err(wasmtime::Error::msg("this attempt has no files"));
    };
    let done = body(files, &mut Memory(memory));
    host.common.calls += (std::mem::take(&mut files.moved) / BYTES_PER_CALL) as u64;
    Ok(match done {
        Ok(()) => 0,
        Err(errno) => errno as i32,
    })
}

/// Puts these functions in the place of the engine's. Shadowing must be allowed.
pub(crate) fn link(linker: &mut Linker<HostP1>) -> wasmtime::Result<()> {
    descriptors(linker)?;
    contents(linker)?;
    paths(linker)
}

type Cx<'a> = Caller<'a, HostP1>;

fn descriptors(linker: &mut Linker<HostP1>) -> wasmtime::Result<()> {
    linker
        .func_wrap(MODULE, "fd_close", |cx: Cx<'_>, fd: i32| call(cx, |files, _| files.close(fd)))?
        .func_wrap(MODULE, "fd_renumber", |cx: Cx<'_>, from: i32, to: i32| {
            call(cx, |files, _| {
                let moved = files.fd(from)?;
                files.fd(to)?;
                if from != to {
                    files.close(to)?;
                    files.open.remove(&from.cast_unsigned());
                    files.open.insert(to.cast_unsigned(), moved);
                }
                Ok(())
            })
        })?
        .func_wrap(MODULE, "fd_fdstat_get", |cx: Cx<'_>, fd: i32, to: i32| {
            call(cx, |files, memory| memory.put(to, &files.fdstat(fd)?))
        })?
        .func_wrap(MODULE, "fd_fdstat_set_flags", |cx: Cx<'_>, fd: i32, flags: i32| {
            call(cx, |files, _| match files.open.get_mut(&fd.cast_unsigned()) {
                Some(Fd::File { append, .. }) => {
                    *append = flags & APPEND != 0;
                    Ok(())
                }
                Some(_) => Ok(()),
                None => Err(Errno::Badf),
            })
        })?
        .func_wrap(MODULE, "fd_fdstat_set_rights", |cx: Cx<'_>, fd: i32, _: i64, _: i64| {
            call(cx, |files, _| files.fd(fd).and(Err(Errno::NotSup)))
        })?
        .func_wrap(MODULE, "fd_filestat_get", |cx: Cx<'_>, fd: i32, to: i32| {
            call(cx, |files, memory| match files.fd(fd)? {
                Fd::Directory { id, .. } | Fd::File { id, .. } => {
                    memory.put(to, &filestat(id, &files.tree.stat(id)?))
                }
                _ => {
                    let mut stream = [0; 64];
                    stream[16] = STREAM_TYPE;
                    memory.put(to, &stream)
                }
            })
        })?
        .func_wrap(MODULE, "fd_filestat_set_size", |cx: Cx<'_>, fd: i32, size: i64| {
            call(cx, |files, _| match files.fd(fd)? {
                Fd::File { id, write: true, .. } => Ok(files.tree.set_size(id, size.cast_unsigned())?),
                Fd::File { .. } => Err(Errno::Inval),
                _ => Err(Errno::Badf),
            })
        })?
        .func_wrap(
            MODULE,
            "fd_filestat_set_times",
            |cx: Cx<'_>, fd: i32, accessed: i64, modified: i64, flags: i32| {
                call(cx, |files, _| {
                    let id = files.node(fd)?;
                    let (accessed, modified) = files.times(accessed, modified, flags)?;
                    Ok(files.tree.set_times(id, accessed, modified)?)
                })
            },
        )?
        .func_wrap(MODULE, "fd_prestat_get", |cx: Cx<'_>, fd: i32, to: i32| {
            call(cx, |files, memory| match files.fd(fd)? {
                Fd::Directory { preopened: true, .. } => memory.put(to, &[0, 0, 0, 0, 1, 0, 0, 0]),
                _ => Err(Errno::Badf),
            })
        })?
        .func_wrap(MODULE, "fd_prestat_dir_name", |cx: Cx<'_>, fd: i32, to: i32, len: i32| {
            call(cx, |files, memory| match files.fd(fd)? {
                Fd::Directory { preopened: true, .. } if len >= 1 => memory.put(to, b"/"),
                Fd::Directory { preopened: true, .. } => Err(Errno::NameTooLong),
                _ => Err(Errno::Badf),
            })
        })?;
    Ok(())
}

fn contents(linker: &mut Linker<HostP1>) -> wasmtime::Result<()> {
    fn moved(files: &mut Files, memory: &mut Memory<'_>, to: i32, count: Result<usize, Errno>) -> Done {
        let count = count?;
        files.moved += count;
        memory.put_u32(to, count)
    }
    linker
        .func_wrap(MODULE, "fd_read", |cx: Cx<'_>, fd: i32, iovs: i32, count: i32, to: i32| {
            call(cx, |files, memory| {
                let read = files.read(memory, fd, (iovs, count), None);
                moved(files, memory, to, read)
            })
        })?
        .func_wrap(MODULE, "fd_pread", |cx: Cx<'_>, fd: i32, iovs: i32, count: i32, at: i64, to: i32| {
            call(cx, |files, memory| {
                let read = files.read(memory, fd, (iovs, count), Some(at));
                moved(files, memory, to, read)
            })
        })?
        .func_wrap(MODULE, "fd_write", |cx: Cx<'_>, fd: i32, iovs: i32, count: i32, to: i32| {
            call(cx, |files, memory| {
                let written = files.write(memory, fd, (iovs, count), None);
                moved(files, memory, to, written)
            })
        })?
        .func_wrap(MODULE, "fd_pwrite", |cx: Cx<'_>, fd: i32, iovs: i32, count: i32, at: i64, to: i32| {
            call(cx, |files, memory| {
                let written = files.write(memory, fd, (iovs, count), Some(at));
                moved(files, memory, to, written)
            })
        })?
        .func_wrap(MODULE, "fd_readdir", |cx: Cx<'_>, fd: i32, buf: i32, len: i32, cookie: i64, to: i32| {
            call(cx, |files, memory| {
                let listed = files.readdir(memory, fd, buf, len, cookie);
                moved(files, memory, to, listed)
            })
        })?
        .func_wrap(MODULE, "fd_seek", |cx: Cx<'_>, fd: i32, offset: i64, whence: i32, to: i32| {
            call(cx, |files, memory| memory.put(to, &files.seek(fd, offset, whence)?.to_le_bytes()))
        })?
        .func_wrap(MODULE, "fd_tell", |cx: Cx<'_>, fd: i32, to: i32| {
            call(cx, |files, memory| memory.put(to, &files.seek(fd, 0, 1)?.to_le_bytes()))
        })?
        .func_wrap(MODULE, "fd_sync", |cx: Cx<'_>, fd: i32| call(cx, |files, _| files.node(fd).map(drop)))?
        .func_wrap(MODULE, "fd_datasync", |cx: Cx<'_>, fd: i32| {
            call(cx, |files, _| files.node(fd).map(drop))
        })?
        .func_wrap(MODULE, "fd_advise", |cx: Cx<'_>, fd: i32, _: i64, _: i64, _: i32| {
            call(cx, |files, _| files.file(fd).map(drop))
        })?
        .func_wrap(MODULE, "fd_allocate", |cx: Cx<'_>, fd: i32, _: i64, _: i64| {
            call(cx, |files, _| files.file(fd).and(Err(Errno::NotSup)))
        })?;
    Ok(())
}

fn paths(linker: &mut Linker<HostP1>) -> wasmtime::Result<()> {
    linker
        .func_wrap(
            MODULE,
            "path_open",
            |cx: Cx<'_>,
             fd: i32,
             dirflags: i32,
             path: i32,
             len: i32,
             oflags: i32,
             rights: i64,
             _: i64,
             fdflags: i32,
             to: i32| {
                call(cx, |files, memory| {
                    let path = memory.path(path, len)?;
                    // A descriptor that cannot be told would be lost.
                    memory.slice(to, 4)?;
                    let fd = files.path_open(fd, dirflags, &path, oflags, rights, fdflags)?;
                    memory.put_u32(to, fd as usize)
                })
            },
        )?
        .func_wrap(MODULE, "path_create_directory", |cx: Cx<'_>, fd: i32, path: i32, len: i32| {
            call(cx, |files, memory| {
                let base = files.directory(fd)?;
                Ok(files.tree.make_directory(base, &memory.path(path, len)?)?)
            })
        })?
        .func_wrap(MODULE, "path_remove_directory", |cx: Cx<'_>, fd: i32, path: i32, len: i32| {
            call(cx, |files, memory| {
                let base = files.directory(fd)?;
                Ok(files.tree.remove_directory(base, &memory.path(path, len)?)?)
            })
        })?
        .func_wrap(MODULE, "path_unlink_file", |cx: Cx<'_>, fd: i32, path: i32, len: i32| {
            call(cx, |files, memory| {
                let base = files.directory(fd)?;
                Ok(files.tree.remove_file(base, &memory.path(path, len)?)?)
            })
        })?
        .func_wrap(
            MODULE,
            "path_filestat_get",
            |cx: Cx<'_>, fd: i32, flags: i32, path: i32, len: i32, to: i32| {
                call(cx, |files, memory| {
                    let base = files.directory(fd)?;
                    let id = files.tree.find(base, &memory.path(path, len)?, flags & 1 != 0)?;
                    memory.put(to, &filestat(id, &files.tree.stat(id)?))
                })
            },
        )?
        .func_wrap(
            MODULE,
            "path_filestat_set_times",
            |cx: Cx<'_>,
             fd: i32,
             follow: i32,
             path: i32,
             len: i32,
             accessed: i64,
             modified: i64,
             flags: i32| {
                call(cx, |files, memory| {
                    let base = files.directory(fd)?;
                    let id = files.tree.find(base, &memory.path(path, len)?, follow & 1 != 0)?;
                    let (accessed, modified) = files.times(accessed, modified, flags)?;
                    Ok(files.tree.set_times(id, accessed, modified)?)
                })
            },
        )?
        .func_wrap(
            MODULE,
            "path_link",
            |cx: Cx<'_>, from: i32, flags: i32, old: i32, old_len: i32, to: i32, new: i32, new_len: i32| {
                call(cx, |files, memory| {
                    let (from, to) = (files.directory(from)?, files.directory(to)?);
                    let (old, new) = (memory.path(old, old_len)?, memory.path(new, new_len)?);
                    Ok(files.tree.hard_link((from, &old), (to, &new), flags & 1 != 0)?)
                })
            },
        )?
        .func_wrap(
            MODULE,
            "path_rename",
            |cx: Cx<'_>, from: i32, old: i32, old_len: i32, to: i32, new: i32, new_len: i32| {
                call(cx, |files, memory| {
                    let (from, to) = (files.directory(from)?, files.directory(to)?);
                    let (old, new) = (memory.path(old, old_len)?, memory.path(new, new_len)?);
                    Ok(files.tree.rename((from, &old), (to, &new))?)
                })
            },
        )?
        .func_wrap(
            MODULE,
            "path_symlink",
            |cx: Cx<'_>, old: i32, old_len: i32, fd: i32, new: i32, new_len: i32| {
                call(cx, |files, memory| {
                    let base = files.directory(fd)?;
                    let (old, new) = (memory.path(old, old_len)?, memory.path(new, new_len)?);
                    Ok(files.tree.make_link(base, &new, &old)?)
                })
            },
        )?
        .func_wrap(
            MODULE,
            "path_readlink",
            |cx: Cx<'_>, fd: i32, path: i32, len: i32, buf: i32, room: i32, to: i32| {
                call(cx, |files, memory| {
                    let base = files.directory(fd)?;
                    let path = memory.path(path, len)?;
                    let target = files.tree.read_link(base, &path)?.as_bytes();
                    let fits = target.len().min(room.cast_unsigned() as usize);
                    memory.put(buf, &target[..fits])?;
                    memory.put_u32(to, fits)
                })
            },
        )?;
    Ok(())
}
