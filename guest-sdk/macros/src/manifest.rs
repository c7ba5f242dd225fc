//! The hidden type beside a task function that carries its manifest, and the way to it.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::ext::IdentExt;
use syn::{Ident, Path};

/// The name of the hidden type for a function.
pub(crate) fn hidden_type(function: &Ident) -> Ident {
    format_ident!("__sandbar_task_{}", function.unraw(), span = function.span())
}

/// `a::b::f` becomes `a::b::__sandbar_task_f::MANIFEST`.
pub(crate) fn expand(mut path: Path) -> TokenStream {
    if let Some(last) = path.segments.last_mut() {
        last.ident = hidden_type(&last.ident);
    }
    quote!(#path::MANIFEST)
}
