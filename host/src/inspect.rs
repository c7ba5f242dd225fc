//! A first look at uploaded bytes: is this a module this host can run, through which door, and what
//! does it say about itself. Pure and bounded; uses `wasmparser` only and never runs or compiles
//! anything. Every refusal says what was expected and what was found.

mod names;
mod signature;

use std::fmt;

use serde::{Deserialize, Serialize};
use wasmparser::component_types::ComponentEntityType;
use wasmparser::types::{EntityType, Types};
use wasmparser::{
    BinaryReaderError, ComponentExternalKind, ComponentTypeRef, Encoding, Parser, Payload, TypeBounds,
    TypeRef, ValidPayload, Validator, WasmFeatures,
};

use crate::engine::{MEMORIES_PER_ATTEMPT, TABLE_ELEMENTS, TABLES_PER_ATTEMPT};
use crate::manifest::{self, Manifest};
use crate::module::{ModuleHash, ModuleKind};

/// Largest module that is looked at, in bytes.
pub const MAX_MODULE_BYTES: usize = 128 << 20;
/// What a module may declare in all, the modules within it included. Twice and more of what the largest programs have
/// that anybody ran here (a C++ compiler: 54,000 functions; a CPython snapshot: thousands of segments), and far below
/// what makes a compilation explode.
const MAX_FUNCTIONS: u32 = 200_000;
/// See [`MAX_FUNCTIONS`].
const MAX_TYPES: u32 = 50_000;
/// See [`MAX_FUNCTIONS`]. Globals with computed initialisers become one function, which the compiler cannot take from
/// some ten thousands on.
const MAX_GLOBALS: u32 = 10_000;
/// See [`MAX_FUNCTIONS`].
const MAX_SEGMENTS: u32 = 100_000;
/// Blocks within blocks of a function: a `switch` makes one for each of its cases.
const MAX_NESTING: u32 = 10_000;
/// Characters of a name from the module that a message repeats.
const MAX_NAME_CHARS: usize = 120;
/// Exports that a message lists.
const MAX_LISTED: usize = 8;

/// What a module is.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// SHA-256 of the bytes.
    pub hash: ModuleHash,
    /// The door it comes through.
    pub kind: ModuleKind,
    /// Its self-description, if it has one.
    pub manifest: Option<Manifest>,
    /// Bytes of the module.
    pub size: u64,
}

/// Why a module is refused, for the uploader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {detail}")]
pub struct Rejection {
    /// Which rule.
    pub code: RejectionCode,
    /// What was expected and what was found.
    pub detail: String,
}

impl Rejection {
    pub(crate) fn new(code: RejectionCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }
}

/// The reasons for refusing a module at upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RejectionCode {
    /// The bytes do not begin like WebAssembly.
    NotWasm,
    /// WebAssembly text, not binary.
    TextFormat,
    /// The bytes end too early.
    Truncated,
    /// It does not validate with the features this host enables.
    Invalid,
    /// It imports something this host does not offer.
    UnknownImport,
    /// It exports nothing this host can start.
    NoUsableExport,
    /// An import or the entry point has another type than expected.
    WrongSignature,
    /// It is larger or declares more than this host allows.
    OverLimit,
    /// Its self-description cannot be read.
    BadManifest,
    /// The compiler failed on it.
    DoesNotCompile,
    /// Compiling took too long.
    CompileTimeout,
    /// Compiling needed too much memory.
    CompileMemory,
}

impl RejectionCode {
    /// The word used in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotWasm => "not-wasm",
            Self::TextFormat => "text-format",
            Self::Truncated => "truncated",
            Self::Invalid => "invalid",
            Self::UnknownImport => "unknown-import",
            Self::NoUsableExport => "no-usable-export",
            Self::WrongSignature => "wrong-signature",
            Self::OverLimit => "over-limit",
            Self::BadManifest => "bad-manifest",
            Self::DoesNotCompile => "does-not-compile",
            Self::CompileTimeout => "compile-timeout",
            Self::CompileMemory => "compile-memory",
        }
    }
}

impl fmt::Display for RejectionCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Looks at `bytes`. CPU-bound (some 100 MB/s): call it off the threads that serve requests.
///
/// # Errors
/// The first rule the module breaks.
pub fn inspect(bytes: &[u8]) -> Result<Inspection, Rejection> {
    let encoding = preamble(bytes)?;
    whole(bytes)?;
    let mut walk = Walk::new();
    let types = walk.run(bytes)?;
    let kind = match encoding {
        Encoding::Module => core_door(&types)?,
        Encoding::Component => walk.component_door(&types)?,
    };
    Ok(Inspection { hash: ModuleHash::of(bytes), kind, manifest: walk.manifest()?, size: bytes.len() as u64 })
}

/// What the validator accepts: the engine's features, without those that have no engine support
/// here (garbage collection, exceptions, threads) or are not wanted (64-bit memories, relaxed SIMD).
fn features() -> WasmFeatures {
    let mut features = WasmFeatures::WASM3 | WasmFeatures::COMPONENT_MODEL;
    features.remove(
        WasmFeatures::GC
            | WasmFeatures::EXCEPTIONS
            | WasmFeatures::THREADS
            | WasmFeatures::RELAXED_SIMD
            | WasmFeatures::MEMORY64,
    );
    features.remove(WasmFeatures::GC_TYPES);
    features
}

/// The first bytes: is this WebAssembly at all, and of which kind.
fn preamble(bytes: &[u8]) -> Result<Encoding, Rejection> {
    const MAGIC: &[u8; 4] = b"\0asm";
    if bytes.len() > MAX_MODULE_BYTES {
        return Err(Rejection::new(
            RejectionCode::OverLimit,
            format!("the module has {} bytes; at most {MAX_MODULE_BYTES} are allowed", bytes.len()),
        ));
    }
    let start = bytes.trim_ascii_start();
    if start.starts_with(b"(") || start.starts_with(b";;") {
        return Err(Rejection::new(
            RejectionCode::TextFormat,
            "this is WebAssembly text; upload the binary format (a .wasm file)",
        ));
    }
    if bytes.is_empty() {
        return Err(Rejection::new(RejectionCode::NotWasm, "the file is empty"));
    }
    let head = &bytes[..bytes.len().min(MAGIC.len())];
    if !MAGIC.starts_with(head) {
        return Err(Rejection::new(
            RejectionCode::NotWasm,
            format!("a WebAssembly binary begins with 00 61 73 6d; this file begins with {}", hex(head)),
        ));
    }
    match bytes.get(4..8) {
        None => Err(Rejection::new(
            RejectionCode::Truncated,
            format!("the file ends after {} bytes, in its header", bytes.len()),
        )),
        Some([1, 0, 0, 0]) => Ok(Encoding::Module),
        Some([0x0d, 0, 1, 0]) => Ok(Encoding::Component),
        Some(version) => Err(Rejection::new(
            RejectionCode::Invalid,
            format!("unknown WebAssembly version {}", hex(version)),
        )),
    }
}

/// Whether every section ends within the file. Anything else that is odd is the validator's.
fn whole(bytes: &[u8]) -> Result<(), Rejection> {
    let mut at = 8;
    while at < bytes.len() {
        let begin = at;
        let mut size = 0u64;
        let mut shift = 0;
        at += 1;
        loop {
            let Some(byte) = bytes.get(at) else {
                return Err(cut_off(begin, bytes.len()));
            };
            at += 1;
            size |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
            if shift >= 35 {
                return Ok(());
            }
        }
        if size > (bytes.len() - at) as u64 {
            return Err(cut_off(begin, bytes.len()));
        }
        at += usize::try_from(size).unwrap_or(usize::MAX);
    }
    Ok(())
}

fn cut_off(section: usize, len: usize) -> Rejection {
    Rejection::new(
        RejectionCode::Truncated,
        format!("the file ends after {len} bytes, within the section at offset {section:#x}"),
    )
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// A name of the module as a message may repeat it.
fn quoted(name: &str) -> String {
    let mut text: String =
        name.chars().take(MAX_NAME_CHARS).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if name.chars().nth(MAX_NAME_CHARS).is_some() {
        text.push('…');
    }
    format!("`{text}`")
}

/// One pass over all sections, validating as it goes.
struct Walk<'a> {
    /// How many modules and components enclose the current section.
    depth: usize,
    /// Memories and tables of the core module being read.
    memories: u32,
    tables: u32,
    /// Of all core modules together.
    declared: Declared,
    /// Sections `sandbar:task`: at the top, and further in.
    top_manifests: Vec<&'a [u8]>,
    inner_manifests: Vec<&'a [u8]>,
    /// Exports of the outermost component.
    exports: Vec<(&'a str, ComponentExternalKind)>,
}

impl<'a> Walk<'a> {
    const fn new() -> Self {
        Self {
            depth: 0,
            memories: 0,
            tables: 0,
            declared: Declared::NONE,
            top_manifests: Vec::new(),
            inner_manifests: Vec::new(),
            exports: Vec::new(),
        }
    }

    fn run(&mut self, bytes: &'a [u8]) -> Result<Types, Rejection> {
        let invalid = |err: BinaryReaderError| invalid(&err);
        let features = features();
        let mut validator = Validator::new_with_features(features);
        let mut parser = Parser::new(0);
        parser.set_features(features);
        let mut bodies = Vec::new();
        let mut types = None;
        for payload in parser.parse_all(bytes) {
            let payload = payload.map_err(invalid)?;
            match validator.payload(&payload).map_err(invalid)? {
                ValidPayload::Func(func, body) => bodies.push((func, body)),
                ValidPayload::End(found) => types = Some(found),
                ValidPayload::Ok | ValidPayload::Parser(_) => {}
            }
            self.look(&payload).map_err(|found| match found {
                Found::Bad(err) => invalid(err),
                Found::Refused(rejection) => rejection,
            })?;
        }
        let mut allocations = wasmparser::FuncValidatorAllocations::default();
        for (func, body) in bodies {
            let mut validator = func.into_validator(allocations);
            let mut reader = body.get_binary_reader();
            validator.read_locals(&mut reader).map_err(invalid)?;
            reader.set_features(features);
            while !reader.eof() {
                let at = reader.original_position();
                reader.visit_operator(&mut validator.visitor(at)).map_err(invalid)?.map_err(invalid)?;
                if validator.control_stack_height() > MAX_NESTING {
                    return Err(Rejection::new(
                        RejectionCode::OverLimit,
                        format!("a function has more than {MAX_NESTING} blocks within each other"),
                    ));
                }
            }
            let end = reader.original_position();
            reader.finish_expression(&validator.visitor(end)).map_err(invalid)?;
            allocations = validator.into_allocations();
        }
        types.ok_or_else(|| Rejection::new(RejectionCode::Truncated, "the file ends before its end"))
    }

    fn look(&mut self, payload: &Payload<'a>) -> Result<(), Found> {
        match payload {
            Payload::Version { .. } => {
                self.memories = 0;
                self.tables = 0;
            }
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => self.depth += 1,
            Payload::End(_) => self.depth = self.depth.saturating_sub(1),
            Payload::CustomSection(section) if section.name() == manifest::SECTION => {
                if self.depth == 0 {
                    self.top_manifests.push(section.data());
                } else {
                    self.inner_manifests.push(section.data());
                }
            }
            Payload::ImportSection(imports) if self.depth == 0 => {
                for import in imports.clone().into_imports() {
                    let import = import?;
                    core_import(import.module, import.name, import.ty)?;
                }
            }
            Payload::TypeSection(types) => self.declared.types.add(types.count())?,
            Payload::FunctionSection(functions) => self.declared.functions.add(functions.count())?,
            Payload::GlobalSection(globals) => self.declared.globals.add(globals.count())?,
            Payload::DataSection(data) => self.declared.segments.add(data.count())?,
            Payload::ElementSection(elements) => self.declared.segments.add(elements.count())?,
            Payload::MemorySection(memories) => {
                self.memories = self.memories.saturating_add(memories.count());
                if self.memories > MEMORIES_PER_ATTEMPT {
                    return Err(over("memories", self.memories, MEMORIES_PER_ATTEMPT));
                }
            }
            Payload::TableSection(tables) => {
                self.tables = self.tables.saturating_add(tables.count());
                if self.tables > TABLES_PER_ATTEMPT {
                    return Err(over("tables", self.tables, TABLES_PER_ATTEMPT));
                }
                for table in tables.clone() {
                    let initial = table?.ty.initial;
                    if initial > TABLE_ELEMENTS {
                        return Err(over("table elements", initial, TABLE_ELEMENTS));
                    }
                }
            }
            Payload::ComponentImportSection(imports) if self.depth == 0 => {
                for import in imports.clone() {
                    let import = import?;
                    component_import(import.name.name, &import.ty)?;
                }
            }
            Payload::ComponentExportSection(exports) if self.depth == 0 => {
                for export in exports.clone() {
                    let export = export?;
                    self.exports.push((export.name.name, export.kind));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn component_door(&self, types: &Types) -> Result<ModuleKind, Rejection> {
        if let Some(item) = types.component_item_for_export("run")
            && let ComponentEntityType::Func(id) = item.ty
        {
            if signature::is_task_run(types, id) {
                return Ok(ModuleKind::Task);
            }
            return Err(Rejection::new(
                RejectionCode::WrongSignature,
                format!(
                    "the exported function `run` has another type than the world sandbar:task/task \
                     gives it; expected `{}`",
                    signature::TASK_RUN
                ),
            ));
        }
        for (name, _) in &self.exports {
            if !names::cli_run(name) {
                continue;
            }
            let fits = types
                .component_item_for_export(name)
                .is_some_and(|item| signature::is_cli_run(types, &item.ty));
            if fits {
                return Ok(ModuleKind::CommandP2);
            }
            return Err(Rejection::new(
                RejectionCode::WrongSignature,
                format!("the export {} is not an instance with `{}`", quoted(name), signature::CLI_RUN),
            ));
        }
        let names = self.exports.iter().map(|(name, _)| *name);
        Err(Rejection::new(
            RejectionCode::NoUsableExport,
            format!(
                "expected a component that exports the function `run` of the world \
                 sandbar:task/task, or `wasi:cli/run` of WASI 0.2; this one exports {}",
                list(names)
            ),
        ))
    }

    /// The outermost section wins; the SDK writes it into the core module, which tools then wrap.
    fn manifest(&self) -> Result<Option<Manifest>, Rejection> {
        let sections =
            if self.top_manifests.is_empty() { &self.inner_manifests } else { &self.top_manifests };
        match sections.as_slice() {
            [] => Ok(None),
            [section] => Manifest::parse(section)
                .map(Some)
                .map_err(|detail| Rejection::new(RejectionCode::BadManifest, detail)),
            more => Err(Rejection::new(
                RejectionCode::BadManifest,
                format!("expected one section `{}`; found {}", manifest::SECTION, more.len()),
            )),
        }
    }
}

/// How many of each there are so far.
struct Declared {
    types: Count,
    functions: Count,
    globals: Count,
    segments: Count,
}

/// A number that has a cap.
struct Count {
    what: &'static str,
    found: u32,
    allowed: u32,
}

impl Declared {
    const NONE: Self = Self {
        types: Count { what: "types", found: 0, allowed: MAX_TYPES },
        functions: Count { what: "functions", found: 0, allowed: MAX_FUNCTIONS },
        globals: Count { what: "globals", found: 0, allowed: MAX_GLOBALS },
        segments: Count { what: "data and element segments", found: 0, allowed: MAX_SEGMENTS },
    };
}

impl Count {
    fn add(&mut self, more: u32) -> Result<(), Found> {
        self.found = self.found.saturating_add(more);
        if self.found > self.allowed {
            let Self { what, found, allowed } = self;
            return Err(Found::Refused(Rejection::new(
                RejectionCode::OverLimit,
                format!("the module declares at least {found} {what}; at most {allowed} are allowed"),
            )));
        }
        Ok(())
    }
}

/// Why one section was not accepted.
enum Found {
    Bad(BinaryReaderError),
    Refused(Rejection),
}

impl From<BinaryReaderError> for Found {
    fn from(err: BinaryReaderError) -> Self {
        Self::Bad(err)
    }
}

impl From<Rejection> for Found {
    fn from(rejection: Rejection) -> Self {
        Self::Refused(rejection)
    }
}

fn invalid(err: &BinaryReaderError) -> Rejection {
    let mut detail: String = err.message().chars().take(4 * MAX_NAME_CHARS).collect();
    detail.push_str(&format!(" (at offset {:#x})", err.offset()));
    Rejection::new(RejectionCode::Invalid, detail)
}

fn over(what: &str, found: impl fmt::Display, allowed: impl fmt::Display) -> Found {
    Found::Refused(Rejection::new(
        RejectionCode::OverLimit,
        format!("a core module declares {found} {what}; at most {allowed} are allowed"),
    ))
}

fn core_import(module: &str, name: &str, ty: TypeRef) -> Result<(), Rejection> {
    if module == names::P1_MODULE
        && names::p1_function(name)
        && matches!(ty, TypeRef::Func(_) | TypeRef::FuncExact(_))
    {
        return Ok(());
    }
    Err(Rejection::new(
        RejectionCode::UnknownImport,
        format!(
            "the module imports {} from {}; this host offers the functions of {} only",
            quoted(name),
            quoted(module),
            names::P1_MODULE
        ),
    ))
}

fn component_import(name: &str, ty: &ComponentTypeRef) -> Result<(), Rejection> {
    if matches!(ty, ComponentTypeRef::Instance(_)) && names::interface(name) {
        return Ok(());
    }
    // A name for a type of an interface (`use types.{failure}` in the world): nothing to provide.
    if matches!(ty, ComponentTypeRef::Type(TypeBounds::Eq(_))) {
        return Ok(());
    }
    Err(Rejection::new(
        RejectionCode::UnknownImport,
        format!(
            "the component imports {}; this host offers sandbar:task 0.1 and the cli, clocks, \
             filesystem, io, random, sockets and http interfaces of WASI 0.2",
            quoted(name)
        ),
    ))
}

fn core_door(types: &Types) -> Result<ModuleKind, Rejection> {
    let types = types.as_ref();
    let mut exports = Vec::new();
    for (name, ty) in types.core_exports().into_iter().flatten() {
        if name != "_start" {
            exports.push(name);
            continue;
        }
        if let EntityType::Func(id) = ty
            && types
                .get(id)
                .and_then(|ty| match &ty.composite_type.inner {
                    wasmparser::CompositeInnerType::Func(func) => Some(func),
                    _ => None,
                })
                .is_some_and(|func| func.params().is_empty() && func.results().is_empty())
        {
            return Ok(ModuleKind::CommandP1);
        }
        return Err(Rejection::new(
            RejectionCode::WrongSignature,
            "the export `_start` is not a function without parameters and results",
        ));
    }
    Err(Rejection::new(
        RejectionCode::NoUsableExport,
        format!(
            "expected a WASI command that exports `_start`; this module exports {}",
            list(exports.iter().copied())
        ),
    ))
}

fn list<'n>(names: impl Iterator<Item = &'n str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        return "nothing".to_owned();
    }
    let mut text = names.iter().take(MAX_LISTED).map(|name| quoted(name)).collect::<Vec<_>>().join(", ");
    if names.len() > MAX_LISTED {
        text.push_str(&format!(" and {} more", names.len() - MAX_LISTED));
    }
    text
}

#[cfg(test)]
mod tests;
