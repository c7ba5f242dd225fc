//! What guests may use beyond WASI: interfaces that end in the database, which cells cannot reach. A call becomes a
//! question of the cell to its worker. [`call`] is what they say and its bounds, `guest` the way of a question,
//! each interface has a file of its own. Decides nothing about grants; the worker does, with every call.

pub mod call;
mod config;
pub mod guest;
mod invoke;
pub mod keyvalue;
mod logging;
mod secrets;

use wasmtime::component::{HasSelf, Linker};

use crate::state::Host;

mod generated {
    #![allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
    wasmtime::component::bindgen!({
        path: "../guest-sdk/wit",
        world: "capabilities",
        imports: { default: async },
        with: {
            "wasi:keyvalue/store.bucket": super::keyvalue::Bucket,
            "wasi:keyvalue/atomics.cas": super::keyvalue::Cas,
        },
    });
}

/// Links every interface here. Only what a component imports takes part.
pub(crate) fn link(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    generated::Capabilities::add_to_linker::<Host, HasSelf<Host>>(linker, |host| host)
}
