//! Loading of compiled code: the one place with `unsafe` in this crate.
//! Takes [`Artifact`]s only, which nobody outside this crate can make from unverified bytes.

#![allow(unsafe_code)]

use wasmtime::component::Component;
use wasmtime::{Engine, Module, Precompiled};

use crate::artifact::Artifact;

/// Compiled code in memory, not yet linked.
pub(super) enum Code {
    Module(Module),
    Component(Component),
}

pub(super) fn load(engine: &Engine, artifact: &Artifact) -> wasmtime::Result<Code> {
    match Engine::detect_precompiled(&artifact.bytes) {
        // SAFETY: an `Artifact` comes out of this crate's compile child or out of the cache, which
        // authenticates it with a key that guests and tenants never see. Wasmtime checks version
        // and settings itself and refuses code of another build.
        Some(Precompiled::Module) => {
            unsafe { Module::deserialize(engine, &artifact.bytes) }.map(Code::Module)
        }
        // SAFETY: as above.
        Some(Precompiled::Component) => {
            unsafe { Component::deserialize(engine, &artifact.bytes) }.map(Code::Component)
        }
        None => Err(wasmtime::Error::msg("not compiled code of this engine")),
    }
}
