//! Doc comments, `#[serde(…)]` and `#[schema(…)]` as the derive needs them. Every serde attribute is
//! either understood, known not to matter, or refused where it stands.

use syn::meta::ParseNestedMeta;
use syn::{Attribute, Error, Expr, ExprLit, Lit, LitStr, Meta, Path, Result, Type};

use crate::case::Case;

/// The doc comment: lines joined, without the space after `///` and without blank ends.
pub(crate) fn description(attrs: &[Attribute]) -> String {
    let mut lines = Vec::new();
    for attr in attrs {
        let Meta::NameValue(meta) = &attr.meta else {
            continue;
        };
        if !meta.path.is_ident("doc") {
            continue;
        }
        if let Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) = &meta.value {
            let text = text.value();
            lines.push(text.strip_prefix(' ').unwrap_or(&text).trim_end().to_owned());
        }
    }
    lines.join("\n").trim().to_owned()
}

/// What stands on a struct or an enum.
#[derive(Default)]
pub(crate) struct Container {
    pub(crate) rename_all: Option<Case>,
    pub(crate) rename_all_fields: Option<Case>,
    pub(crate) tag: Option<LitStr>,
    pub(crate) content: Option<LitStr>,
    pub(crate) untagged: bool,
    pub(crate) closed: bool,
    pub(crate) transparent: bool,
    pub(crate) default: bool,
    pub(crate) stand_in: Option<Type>,
}

/// What stands on a variant.
#[derive(Default)]
pub(crate) struct Variant {
    pub(crate) rename: Option<String>,
    pub(crate) rename_all: Option<Case>,
    pub(crate) aliases: Vec<String>,
    pub(crate) skip: bool,
    pub(crate) other: bool,
    pub(crate) untagged: bool,
}

/// What stands on a field.
#[derive(Default)]
pub(crate) struct Field {
    pub(crate) rename: Option<String>,
    pub(crate) aliases: Vec<String>,
    pub(crate) skip: bool,
    /// Left out in one direction, or on a condition.
    pub(crate) may_be_missing: Option<Path>,
    pub(crate) default: bool,
    /// Serde reads or writes it through functions, so that its type says nothing about its JSON.
    pub(crate) with: bool,
    pub(crate) stand_in: Option<Type>,
}

impl Container {
    pub(crate) fn parse(attrs: &[Attribute]) -> Result<Self> {
        let mut found = Self { stand_in: stand_in(attrs)?, ..Self::default() };
        serde(attrs, |meta| {
            match name(&meta).as_str() {
                // The name of a type is in its JSON only where nothing reads it.
                "rename" => ignore(&meta)?,
                "rename_all" => found.rename_all = case(&meta)?,
                "rename_all_fields" => found.rename_all_fields = case(&meta)?,
                "tag" => found.tag = Some(meta.value()?.parse()?),
                "content" => found.content = Some(meta.value()?.parse()?),
                "untagged" => found.untagged = true,
                "deny_unknown_fields" => found.closed = true,
                "transparent" => found.transparent = true,
                "default" => {
                    found.default = true;
                    ignore(&meta)?;
                }
                "bound" | "crate" | "expecting" => ignore(&meta)?,
                "from" | "try_from" | "into" if found.stand_in.is_some() => ignore(&meta)?,
                "from" | "try_from" | "into" => {
                    return Err(inexpressible(
                        &meta,
                        "name the type that is read and written: #[schema(as = Type)]",
                    ));
                }
                _ => return Err(inexpressible(&meta, "it may change the JSON")),
            }
            Ok(())
        })?;
        Ok(found)
    }
}

impl Variant {
    pub(crate) fn parse(attrs: &[Attribute]) -> Result<Self> {
        let mut found = Self::default();
        if let Some(attr) = attrs.iter().find(|attr| attr.path().is_ident("schema")) {
            return Err(Error::new_spanned(attr, "#[schema(as = Type)] stands on a type or a field"));
        }
        serde(attrs, |meta| {
            match name(&meta).as_str() {
                "rename" => found.rename = rename(&meta)?,
                "rename_all" => found.rename_all = case(&meta)?,
                "alias" => found.aliases.push(meta.value()?.parse::<LitStr>()?.value()),
                "skip" => found.skip = true,
                "skip_serializing" | "skip_deserializing" => {}
                "other" => found.other = true,
                "untagged" => found.untagged = true,
                "bound" | "borrow" => ignore(&meta)?,
                _ => return Err(inexpressible(&meta, "it may change the JSON")),
            }
            Ok(())
        })?;
        Ok(found)
    }
}

impl Field {
    pub(crate) fn parse(attrs: &[Attribute]) -> Result<Self> {
        let mut found = Self { stand_in: stand_in(attrs)?, ..Self::default() };
        serde(attrs, |meta| {
            match name(&meta).as_str() {
                "rename" => found.rename = rename(&meta)?,
                "alias" => found.aliases.push(meta.value()?.parse::<LitStr>()?.value()),
                "skip" => found.skip = true,
                "skip_serializing_if" => {
                    ignore(&meta)?;
                    found.may_be_missing = Some(meta.path.clone());
                }
                "skip_serializing" | "skip_deserializing" => found.may_be_missing = Some(meta.path.clone()),
                "default" => {
                    found.default = true;
                    ignore(&meta)?;
                }
                "bound" | "borrow" => ignore(&meta)?,
                "with" | "serialize_with" | "deserialize_with" if found.stand_in.is_some() => {
                    found.with = true;
                    ignore(&meta)?;
                }
                "with" | "serialize_with" | "deserialize_with" => {
                    return Err(inexpressible(
                        &meta,
                        "name a type that has the JSON of this field: #[schema(as = Type)]",
                    ));
                }
                "flatten" => {
                    return Err(inexpressible(
                        &meta,
                        "put the fields here, or the struct into a field of its own",
                    ));
                }
                _ => return Err(inexpressible(&meta, "it may change the JSON")),
            }
            Ok(())
        })?;
        Ok(found)
    }
}

/// Calls `read` for every member of every `#[serde(…)]`.
fn serde(attrs: &[Attribute], mut read: impl FnMut(ParseNestedMeta<'_>) -> Result<()>) -> Result<()> {
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("serde")) {
        attr.parse_nested_meta(&mut read)?;
    }
    Ok(())
}

/// The type of `#[schema(as = Type)]`.
fn stand_in(attrs: &[Attribute]) -> Result<Option<Type>> {
    let mut found = None;
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("schema")) {
        attr.parse_nested_meta(|meta| {
            if !meta.path.is_ident("as") {
                return Err(Error::new_spanned(&meta.path, "unknown; there is #[schema(as = Type)]"));
            }
            found = Some(meta.value()?.parse()?);
            Ok(())
        })?;
    }
    Ok(found)
}

fn name(meta: &ParseNestedMeta<'_>) -> String {
    meta.path.get_ident().map(ToString::to_string).unwrap_or_default()
}

fn inexpressible(meta: &ParseNestedMeta<'_>, hint: &str) -> Error {
    Error::new_spanned(&meta.path, format!("Schema cannot express this serde attribute: {hint}"))
}

/// `rename = "x"`, or both directions with the same name.
fn rename(meta: &ParseNestedMeta<'_>) -> Result<Option<String>> {
    Ok(both_ways(meta)?.map(|literal| literal.value()))
}

fn case(meta: &ParseNestedMeta<'_>) -> Result<Option<Case>> {
    match both_ways(meta)? {
        None => Ok(None),
        Some(literal) => match Case::parse(&literal.value()) {
            Some(case) => Ok(Some(case)),
            None => Err(Error::new_spanned(literal, "not a rule of serde's rename_all")),
        },
    }
}

fn both_ways(meta: &ParseNestedMeta<'_>) -> Result<Option<LitStr>> {
    if meta.input.peek(syn::Token![=]) {
        return Ok(Some(meta.value()?.parse()?));
    }
    let (mut read, mut written) = (None::<LitStr>, None::<LitStr>);
    meta.parse_nested_meta(|inner| {
        let literal = inner.value()?.parse()?;
        if inner.path.is_ident("serialize") {
            written = Some(literal);
        } else if inner.path.is_ident("deserialize") {
            read = Some(literal);
        } else {
            return Err(Error::new_spanned(&inner.path, "either `serialize` or `deserialize`"));
        }
        Ok(())
    })?;
    match (read, written) {
        (Some(read), Some(written)) if read.value() == written.value() => Ok(Some(read)),
        _ => Err(Error::new_spanned(
            &meta.path,
            "Schema describes both directions, so both must use the same name",
        )),
    }
}

/// Skips `= value` or `(…)`.
fn ignore(meta: &ParseNestedMeta<'_>) -> Result<()> {
    if meta.input.peek(syn::Token![=]) {
        meta.value()?.parse::<Expr>()?;
    } else if meta.input.peek(syn::token::Paren) {
        let content;
        syn::parenthesized!(content in meta.input);
        content.parse::<proc_macro2::TokenStream>()?;
    }
    Ok(())
}
