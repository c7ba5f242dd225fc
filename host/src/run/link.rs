//! What guests can import. One linker per door; both offer exactly what `inspect` lets through.

use wasmtime::component;
use wasmtime::{Caller, Engine, Linker};
use wasmtime_wasi::I32Exit;

use crate::capability;
use crate::egress::guest;
use crate::files;
use crate::state::{Host, HostP1};
use crate::task_world::Task;

/// The imports of components: WASI 0.2, HTTP and capabilities by grant, and the task world.
pub(crate) fn components(engine: &Engine) -> wasmtime::Result<component::Linker<Host>> {
    let mut linker = component::Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    guest::link(&mut linker)?;
    capability::link(&mut linker)?;
    Task::add_to_linker::<Host, component::HasSelf<Host>>(&mut linker, |host| host)?;
    Ok(linker)
}

/// The imports of core modules that have a scratch directory: WASI preview 1 with files in memory.
pub(crate) fn modules_with_files(engine: &Engine) -> wasmtime::Result<Linker<HostP1>> {
    let mut linker = modules(engine)?;
    linker.allow_shadowing(true);
    files::p1::link(&mut linker)?;
    linker.allow_shadowing(false);
    Ok(linker)
}

/// The imports of core modules: WASI preview 1.
pub(crate) fn modules(engine: &Engine) -> wasmtime::Result<Linker<HostP1>> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p1::add_to_linker_async(&mut linker, HostP1::enter)?;
    // The engine's own turns codes of 126 and more into an error without the code.
    linker.allow_shadowing(true);
    linker.func_wrap(
        "wasi_snapshot_preview1",
        "proc_exit",
        |mut caller: Caller<'_, HostP1>, code: i32| -> wasmtime::Result<()> {
            caller.data_mut().common.calls += 1;
            Err(wasmtime::Error::new(I32Exit(code)))
        },
    )?;
    linker.allow_shadowing(false);
    Ok(linker)
}
