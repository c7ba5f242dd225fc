//! Whether an exported component function has the type this host calls.
//! Structural: the names of the types do not matter, their shape does.

use wasmparser::PrimitiveValType;
use wasmparser::component_types::{
    ComponentDefinedType, ComponentEntityType, ComponentFuncTypeId, ComponentValType,
};
use wasmparser::types::Types;

/// `run` of the world `task`, in the words of the WIT.
pub(super) const TASK_RUN: &str = "run: func(input: list<u8>) -> result<output, failure>";
/// `run` of `wasi:cli/run`.
pub(super) const CLI_RUN: &str = "run: func() -> result";

/// `func(list<u8>) -> result<output, failure>`.
pub(super) fn is_task_run(types: &Types, id: ComponentFuncTypeId) -> bool {
    let func = &types[id];
    let [(_, input)] = &*func.params else {
        return false;
    };
    if func.async_ || !is_bytes(types, input) {
        return false;
    }
    let Some((ok, err)) = func.result.as_ref().and_then(|ty| result(types, ty)) else {
        return false;
    };
    ok.is_some_and(|ty| is_output(types, &ty)) && err.is_some_and(|ty| is_failure(types, &ty))
}

/// An instance whose `run` is `func() -> result`.
pub(super) fn is_cli_run(types: &Types, entity: &ComponentEntityType) -> bool {
    let ComponentEntityType::Instance(id) = entity else {
        return false;
    };
    let Some(item) = types[*id].exports.get("run") else {
        return false;
    };
    let ComponentEntityType::Func(id) = item.ty else {
        return false;
    };
    let func = &types[id];
    !func.async_
        && func.params.is_empty()
        && func
            .result
            .as_ref()
            .and_then(|ty| result(types, ty))
            .is_some_and(|(ok, err)| ok.is_none() && err.is_none())
}

fn defined<'a>(types: &'a Types, ty: &ComponentValType) -> Option<&'a ComponentDefinedType> {
    match ty {
        ComponentValType::Primitive(_) => None,
        ComponentValType::Type(id) => Some(&types[*id]),
    }
}

fn is_primitive(types: &Types, ty: &ComponentValType, wanted: PrimitiveValType) -> bool {
    match ty {
        ComponentValType::Primitive(found) => *found == wanted,
        ComponentValType::Type(id) => {
            matches!(&types[*id], ComponentDefinedType::Primitive(found) if *found == wanted)
        }
    }
}

fn is_bytes(types: &Types, ty: &ComponentValType) -> bool {
    matches!(
        defined(types, ty),
        Some(ComponentDefinedType::List { element, .. })
            if is_primitive(types, element, PrimitiveValType::U8)
    )
}

type Pair = (Option<ComponentValType>, Option<ComponentValType>);

fn result(types: &Types, ty: &ComponentValType) -> Option<Pair> {
    match defined(types, ty) {
        Some(ComponentDefinedType::Result { ok, err, .. }) => Some((*ok, *err)),
        _ => None,
    }
}

fn is_output(types: &Types, ty: &ComponentValType) -> bool {
    let Some(ComponentDefinedType::Record(record)) = defined(types, ty) else {
        return false;
    };
    let mut fields = record.fields.iter();
    matches!(fields.next(), Some((name, ty))
        if name.as_str() == "content-type" && is_primitive(types, ty, PrimitiveValType::String))
        && matches!(fields.next(), Some((name, ty))
            if name.as_str() == "bytes" && is_bytes(types, ty))
        && fields.next().is_none()
}

fn is_failure(types: &Types, ty: &ComponentValType) -> bool {
    let Some(ComponentDefinedType::Record(record)) = defined(types, ty) else {
        return false;
    };
    let mut fields = record.fields.iter();
    matches!(fields.next(), Some((name, ty)) if name.as_str() == "kind" && is_kind(types, ty))
        && matches!(fields.next(), Some((name, ty))
            if name.as_str() == "message" && is_primitive(types, ty, PrimitiveValType::String))
        && matches!(fields.next(), Some((name, ty))
            if name.as_str() == "retry-after-ms" && is_optional_u64(types, ty))
        && fields.next().is_none()
}

fn is_kind(types: &Types, ty: &ComponentValType) -> bool {
    matches!(
        defined(types, ty),
        Some(ComponentDefinedType::Enum(cases))
            if cases.iter().map(|case| case.as_str()).eq(["retryable", "fatal"])
    )
}

fn is_optional_u64(types: &Types, ty: &ComponentValType) -> bool {
    matches!(
        defined(types, ty),
        Some(ComponentDefinedType::Option { ty, .. })
            if is_primitive(types, ty, PrimitiveValType::U64)
    )
}
