//! `#[derive(Schema)]`: from a type and its serde attributes to a tree of `sandbar_guest::Node`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{
    Data, DataEnum, DeriveInput, Error, Fields, GenericArgument, GenericParam, Ident, PathArguments, Result,
    Token, Type, parse_quote,
};

use crate::attrs::{Container, Field, Variant, description};
use crate::case::Case;

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream> {
    let container = Container::parse(&input.attrs)?;
    let Shape { node, optional } = match (&container.stand_in, &input.data) {
        (Some(ty), _) => Shape::of(ty),
        (None, Data::Struct(data)) => struct_shape(&container, input, &data.fields)?,
        (None, Data::Enum(data)) => {
            Shape { node: enum_node(&container, input, data)?, optional: quote!(false) }
        }
        (None, Data::Union(data)) => {
            return Err(Error::new_spanned(data.union_token, "serde has no unions, so they have no schema"));
        }
    };
    if container.stand_in.is_none() {
        refuse_recursion(input)?;
    }
    let node = described(&description(&input.attrs), node);

    let mut generics = input.generics.clone();
    for parameter in &mut generics.params {
        if let GenericParam::Type(parameter) = parameter {
            parameter.bounds.push(parse_quote!(::sandbar_guest::Schema));
        }
    }
    let (impl_generics, _, where_clause) = generics.split_for_impl();
    let (_, type_generics, _) = input.generics.split_for_impl();
    let ident = &input.ident;
    Ok(quote! {
        #[automatically_derived]
        impl #impl_generics ::sandbar_guest::Schema for #ident #type_generics #where_clause {
            const NODE: &'static ::sandbar_guest::Node = #node;
            const OPTIONAL: bool = #optional;
        }
    })
}

/// A type that contains itself would need a schema without end. Found here it is an error at the field;
/// found through another type it is a cycle that the compiler reports.
fn refuse_recursion(input: &DeriveInput) -> Result<()> {
    let all: Vec<&Fields> = match &input.data {
        Data::Struct(data) => vec![&data.fields],
        Data::Enum(data) => data.variants.iter().map(|variant| &variant.fields).collect(),
        Data::Union(_) => Vec::new(),
    };
    for field in all.into_iter().flatten() {
        let attrs = Field::parse(&field.attrs)?;
        if !attrs.skip && attrs.stand_in.is_none() {
            if let Some(found) = mention(&field.ty, &input.ident) {
                return Err(Error::new_spanned(
                    found,
                    "a type that contains itself has no finite schema; end it here with #[schema(as = Type)], \
                     for example `serde_json::Value`",
                ));
            }
        }
    }
    Ok(())
}

/// Where a type names `ident` or `Self`, itself or in its arguments.
fn mention<'a>(ty: &'a Type, ident: &Ident) -> Option<&'a Ident> {
    match ty {
        Type::Path(ty) => ty.path.segments.iter().find_map(|segment| {
            if ty.path.segments.len() == 1 && (segment.ident == *ident || segment.ident == "Self") {
                return Some(&segment.ident);
            }
            let PathArguments::AngleBracketed(arguments) = &segment.arguments else { return None };
            arguments.args.iter().find_map(|argument| match argument {
                GenericArgument::Type(ty) => mention(ty, ident),
                _ => None,
            })
        }),
        Type::Reference(ty) => mention(&ty.elem, ident),
        Type::Array(ty) => mention(&ty.elem, ident),
        Type::Slice(ty) => mention(&ty.elem, ident),
        Type::Tuple(ty) => ty.elems.iter().find_map(|ty| mention(ty, ident)),
        _ => None,
    }
}

/// Expressions for the two constants of the trait.
struct Shape {
    node: TokenStream,
    optional: TokenStream,
}

impl Shape {
    fn of(ty: &Type) -> Self {
        Self {
            node: quote_spanned!(ty.span()=> <#ty as ::sandbar_guest::Schema>::NODE),
            optional: quote_spanned!(ty.span()=> <#ty as ::sandbar_guest::Schema>::OPTIONAL),
        }
    }
}

fn struct_shape(container: &Container, input: &DeriveInput, fields: &Fields) -> Result<Shape> {
    if container.transparent {
        return transparent(input, fields);
    }
    let node = match fields {
        Fields::Named(_) => {
            let mut properties = Vec::new();
            if let Some(tag) = &container.tag {
                // Serde writes the name of a struct here, and reads anything or nothing.
                let any = quote!(&::sandbar_guest::Node::Any);
                properties.push(field(&tag.value(), &[], "", &any, &quote!(false)));
            }
            properties.extend(properties_of(fields, container.rename_all, container.default)?);
            object(&properties, container.closed)
        }
        _ => unnamed(fields, container.default)?,
    };
    Ok(Shape { node, optional: quote!(false) })
}

/// A struct that is what its only field is.
fn transparent(input: &DeriveInput, fields: &Fields) -> Result<Shape> {
    let mut kept = Vec::new();
    for field in fields {
        let attrs = Field::parse(&field.attrs)?;
        if !attrs.skip {
            kept.push(Shape::of(attrs.stand_in.as_ref().unwrap_or(&field.ty)));
        }
    }
    match (kept.pop(), kept.is_empty()) {
        (Some(shape), true) => Ok(shape),
        _ => Err(Error::new_spanned(
            &input.ident,
            "a transparent struct has exactly one field that is not skipped",
        )),
    }
}

fn enum_node(container: &Container, input: &DeriveInput, data: &DataEnum) -> Result<TokenStream> {
    if let (None, Some(content)) = (&container.tag, &container.content) {
        return Err(Error::new_spanned(content, "`content` needs a `tag`"));
    }
    let mut variants = Vec::new();
    for variant in &data.variants {
        let attrs = Variant::parse(&variant.attrs)?;
        if attrs.skip {
            continue;
        }
        let ident = variant.ident.unraw().to_string();
        let name = match (&attrs.rename, container.rename_all) {
            (Some(name), _) => name.clone(),
            (None, Some(case)) => case.variant(&ident),
            (None, None) => ident,
        };
        let mut names = vec![name];
        names.extend(attrs.aliases.iter().cloned());
        variants.push(Alternative {
            names,
            untagged: container.untagged || attrs.untagged,
            description: description(&variant.attrs),
            rename_fields: attrs.rename_all.or(container.rename_all_fields),
            fields: &variant.fields,
            attrs,
        });
    }
    if variants.is_empty() {
        return Err(Error::new_spanned(
            &input.ident,
            "an enum without variants has no values, so it has no schema",
        ));
    }

    let external = container.tag.is_none() && !container.untagged;
    let plain = |variant: &Alternative<'_>| {
        matches!(variant.fields, Fields::Unit) && !variant.untagged && !variant.attrs.other
    };
    // `A | B` in a list of strings, as long as nothing is said about single ones.
    if external && variants.iter().all(|variant| plain(variant) && variant.description.is_empty()) {
        let names = variants.iter().flat_map(|variant| &variant.names);
        return Ok(quote!(&::sandbar_guest::Node::Strings { values: &[#(#names),*] }));
    }

    // Tags keep alternatives apart, unless one takes every tag or none.
    let exclusive = variants.iter().all(|variant| !variant.untagged && !variant.attrs.other);
    let mut nodes = Vec::new();
    for variant in &variants {
        let alternatives = match (&container.tag, &container.content) {
            _ if variant.untagged => vec![variant.content(container)?],
            (None, _) => variant.external(container)?,
            (Some(tag), None) => vec![variant.internal(container, &tag.value())?],
            (Some(tag), Some(content)) => {
                vec![variant.adjacent(container, &tag.value(), &content.value())?]
            }
        };
        nodes.extend(alternatives.into_iter().map(|node| described(&variant.description, node)));
    }
    Ok(quote!(&::sandbar_guest::Node::Choice { nodes: &[#(#nodes),*], exclusive: #exclusive }))
}

/// A variant that can occur in JSON.
struct Alternative<'a> {
    /// Its name and its aliases.
    names: Vec<String>,
    untagged: bool,
    description: String,
    rename_fields: Option<Case>,
    fields: &'a Fields,
    attrs: Variant,
}

impl Alternative<'_> {
    /// The variant without its tag.
    fn content(&self, container: &Container) -> Result<TokenStream> {
        match self.fields {
            Fields::Named(_) => Ok(object(&self.properties()?, container.closed)),
            fields => unnamed(fields, false),
        }
    }

    fn properties(&self) -> Result<Vec<TokenStream>> {
        properties_of(self.fields, self.rename_fields, false)
    }

    /// `"A"`, or `{"A": content}`: one node per name.
    fn external(&self, container: &Container) -> Result<Vec<TokenStream>> {
        if matches!(self.fields, Fields::Unit) {
            let names = &self.names;
            return Ok(vec![quote!(&::sandbar_guest::Node::Strings { values: &[#(#names),*] })]);
        }
        let content = self.content(container)?;
        Ok(self
            .names
            .iter()
            .map(|name| object(&[field(name, &[], "", &content, &quote!(true))], true))
            .collect())
    }

    /// `{"tag": "A", …content}`.
    fn internal(&self, container: &Container, tag: &str) -> Result<TokenStream> {
        let tag = self.tag(tag);
        match self.fields {
            Fields::Unit => Ok(object(&[tag], container.closed)),
            Fields::Named(_) => {
                let mut properties = vec![tag];
                properties.extend(self.properties()?);
                Ok(object(&properties, container.closed))
            }
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                let inner = unnamed(self.fields, false)?;
                Ok(quote!(&::sandbar_guest::Node::Tagged { tag: &#tag, inner: #inner }))
            }
            Fields::Unnamed(fields) => {
                Err(Error::new_spanned(fields, "serde has no internally tagged tuple variants"))
            }
        }
    }

    /// `{"tag": "A", "content": content}`.
    fn adjacent(&self, container: &Container, tag: &str, content: &str) -> Result<TokenStream> {
        let mut properties = vec![self.tag(tag)];
        if !matches!(self.fields, Fields::Unit) {
            let node = self.content(container)?;
            // Serde lets the content be missing where it is a newtype of an optional.
            let required = match self.fields {
                Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                    let only = &fields.unnamed[0];
                    let stand_in = Field::parse(&only.attrs)?.stand_in;
                    let optional = Shape::of(stand_in.as_ref().unwrap_or(&only.ty)).optional;
                    quote!(!#optional)
                }
                _ => quote!(true),
            };
            properties.push(field(content, &[], "", &node, &required));
        }
        Ok(object(&properties, container.closed))
    }

    fn tag(&self, tag: &str) -> TokenStream {
        let names: &[String] = if self.attrs.other { &[] } else { &self.names };
        tag_field(tag, names)
    }
}

/// The property that holds the tag; without names it may be any string.
fn tag_field(tag: &str, names: &[String]) -> TokenStream {
    let node = if names.is_empty() {
        quote!(&::sandbar_guest::Node::Primitive { kind: "string", keywords: "" })
    } else {
        quote!(&::sandbar_guest::Node::Strings { values: &[#(#names),*] })
    };
    field(tag, &[], "", &node, &quote!(true))
}

/// Fields without names: a unit is null, one field is itself, more are an array.
fn unnamed(fields: &Fields, all_default: bool) -> Result<TokenStream> {
    let Fields::Unnamed(fields) = fields else {
        return Ok(quote!(<() as ::sandbar_guest::Schema>::NODE));
    };
    let mut nodes = Vec::new();
    let mut required = 0usize;
    let mut open_end = all_default;
    for field in &fields.unnamed {
        let attrs = Field::parse(&field.attrs)?;
        if let Some(path) = &attrs.may_be_missing {
            return Err(Error::new_spanned(path, "Schema cannot express this on a field without a name"));
        }
        if attrs.skip {
            if fields.unnamed.len() == 1 {
                return Err(Error::new_spanned(field, "the only field cannot be skipped"));
            }
            continue;
        }
        nodes.push(Shape::of(attrs.stand_in.as_ref().unwrap_or(&field.ty)).node);
        open_end |= attrs.default;
        if !open_end {
            required += 1;
        }
    }
    match &nodes[..] {
        [only] if fields.unnamed.len() == 1 => Ok(only.clone()),
        _ => Ok(quote!(&::sandbar_guest::Node::Tuple { items: &[#(#nodes),*], required: #required })),
    }
}

/// The properties of named fields.
fn properties_of(fields: &Fields, rename: Option<Case>, all_default: bool) -> Result<Vec<TokenStream>> {
    let mut properties = Vec::new();
    for member in fields {
        let attrs = Field::parse(&member.attrs)?;
        if attrs.skip {
            continue;
        }
        let ident = member.ident.as_ref().map(|ident| ident.unraw().to_string()).unwrap_or_default();
        let name = match (&attrs.rename, rename) {
            (Some(name), _) => name.clone(),
            (None, Some(case)) => case.field(&ident),
            (None, None) => ident,
        };
        let Shape { node, optional } = Shape::of(attrs.stand_in.as_ref().unwrap_or(&member.ty));
        let required = if attrs.default || all_default || attrs.may_be_missing.is_some() {
            quote!(false)
        } else if attrs.with {
            // With a function of its own, serde wants even an `Option` to be there.
            quote!(true)
        } else {
            quote!(!#optional)
        };
        properties.push(field(&name, &attrs.aliases, &description(&member.attrs), &node, &required));
    }
    Ok(properties)
}

fn field(
    name: &str,
    aliases: &[String],
    description: &str,
    node: &TokenStream,
    required: &TokenStream,
) -> TokenStream {
    quote! {
        ::sandbar_guest::Field {
            name: #name,
            aliases: &[#(#aliases),*],
            description: #description,
            node: #node,
            required: #required,
        }
    }
}

fn object(fields: &[TokenStream], closed: bool) -> TokenStream {
    let fields: Punctuated<_, Token![,]> = fields.iter().collect();
    quote!(&::sandbar_guest::Node::Object { fields: &[#fields], closed: #closed })
}

fn described(description: &str, node: TokenStream) -> TokenStream {
    if description.is_empty() {
        return node;
    }
    quote!(&::sandbar_guest::Node::Described { description: #description, inner: #node })
}
