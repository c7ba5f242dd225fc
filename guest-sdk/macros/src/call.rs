//! `call!`: a task through the same way from bytes to bytes that the host takes.

use proc_macro2::TokenStream;
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::{Expr, Path, Result, Token};

use crate::manifest::hidden_type;

/// `path::to::task, context, input`.
pub(crate) struct Call {
    task: Path,
    context: Expr,
    input: Expr,
}

impl Parse for Call {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let task = input.parse()?;
        input.parse::<Token![,]>()?;
        let context = input.parse()?;
        input.parse::<Token![,]>()?;
        let bytes = input.parse()?;
        input.parse::<Option<Token![,]>>()?;
        Ok(Self { task, context, input: bytes })
    }
}

/// `a::b::f` becomes `a::b::__sandbar_task_f::call(…)`.
pub(crate) fn expand(call: Call) -> TokenStream {
    let Call { mut task, context, input } = call;
    if let Some(last) = task.segments.last_mut() {
        last.ident = hidden_type(&last.ident);
    }
    quote!(#task::call(#context, ::std::convert::Into::<::std::vec::Vec<u8>>::into(#input)))
}
