//! Procedural macros of `sandbar-guest`; use them through that crate, where they are documented.
//! Owns the reading of the author's tokens and every complaint about them, always at the token.

mod args;
mod attrs;
mod call;
mod case;
mod grants;
mod manifest;
mod schema;
mod task;

use proc_macro::TokenStream;
use syn::parse_macro_input;

/// Makes a function the task of its component.
///
/// See the documentation of `sandbar_guest` for what the function may look like and what the
/// attribute accepts: `name`, `limits(…)`, `retry(…)`, `grants(…)`, `log`.
#[proc_macro_attribute]
pub fn task(args: TokenStream, item: TokenStream) -> TokenStream {
    let function = parse_macro_input!(item as syn::ItemFn);
    task::expand(args.into(), &function).into()
}

/// Derives `sandbar_guest::Schema` from the type and its `#[serde(…)]` attributes.
///
/// See the documentation of the trait.
#[proc_macro_derive(Schema, attributes(serde, schema))]
pub fn derive_schema(item: TokenStream) -> TokenStream {
    let input = parse_macro_input!(item as syn::DeriveInput);
    schema::expand(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// The self-description of a task function as JSON text, a `&'static str`: what the component will
/// carry. For tests.
#[proc_macro]
pub fn manifest(function: TokenStream) -> TokenStream {
    let path = parse_macro_input!(function as syn::Path);
    manifest::expand(path).into()
}

/// Calls a task function as the host does, with bytes: `call!(task, &context, input)`. For tests of
/// what is between the bytes and the function: which inputs are refused, what comes out and with which
/// content type.
///
/// `input` is whatever becomes a `Vec<u8>`. The value is a `Result<Output, TaskError>`.
#[proc_macro]
pub fn call(arguments: TokenStream) -> TokenStream {
    call::expand(parse_macro_input!(arguments as call::Call)).into()
}
