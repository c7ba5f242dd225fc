//! `#[task]`: checks the function, leaves it as it is, and puts the glue beside it.

use proc_macro2::TokenStream;
use quote::{ToTokens, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{Error, FnArg, GenericArgument, ItemFn, PathArguments, Result, ReturnType, Safety, Type};

use crate::args::{Args, check_name};
use crate::attrs::description;
use crate::manifest::hidden_type;

/// The function, and either the glue or the complaint: with the function there, an error in the
/// attribute does not make every call of it another error.
pub(crate) fn expand(args: TokenStream, function: &ItemFn) -> TokenStream {
    let glue =
        Args::parse(args).and_then(|args| glue(&args, function)).unwrap_or_else(Error::into_compile_error);
    // Both signatures are what the macro asks for.
    quote! {
        #[allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps)]
        #function
        #glue
    }
}

/// What the function takes.
struct Parameters<'a> {
    context: bool,
    input: Option<&'a Type>,
}

fn glue(args: &Args, function: &ItemFn) -> Result<TokenStream> {
    check_signature(function)?;
    let Parameters { context, input } = parameters(function)?;
    let ident = &function.sig.ident;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => {
            let name = ident.unraw().to_string().replace('_', "-");
            check_name(&name).map_err(|why| Error::new_spanned(ident, why))?;
            name
        }
    };
    let description = description(&function.attrs);
    let more = args.json();
    let level = proc_macro2::Ident::new(args.level.unwrap_or("Info"), ident.span());
    let vis = &function.vis;
    let hidden = hidden_type(ident);

    let (input_node, read) = match input {
        Some(ty) => (
            quote_spanned!(ty.span()=> <#ty as ::sandbar_guest::TaskInput>::NODE),
            quote_spanned!(ty.span()=> <#ty as ::sandbar_guest::TaskInput>::from_bytes(input)?),
        ),
        None => (quote!(::core::option::Option::None), TokenStream::new()),
    };
    let call = match (context, input.is_some()) {
        (true, true) => quote!(#ident(context, #read)),
        (true, false) => quote!(#ident(context)),
        (false, true) => quote!(#ident(#read)),
        (false, false) => quote!(#ident()),
    };
    let (output_node, finish) = match &function.sig.output {
        ReturnType::Default => (
            quote!(<() as ::sandbar_guest::TaskReturn>::NODE),
            quote!(<() as ::sandbar_guest::TaskReturn>::into_result),
        ),
        ReturnType::Type(_, ty) => (
            quote_spanned!(ty.span()=> <#ty as ::sandbar_guest::TaskReturn>::NODE),
            quote_spanned!(ty.span()=> <_ as ::sandbar_guest::TaskReturn>::into_result),
        ),
    };

    Ok(quote! {
        #[doc(hidden)]
        #[allow(non_camel_case_types, dead_code)]
        #vis struct #hidden;

        #[doc(hidden)]
        #[allow(dead_code, missing_docs, clippy::all, clippy::pedantic)]
        const _: () = {
            // Long names: the author's types stand in the same scope.
            const __SANDBAR_TASK: ::sandbar_guest::__private::Manifest = ::sandbar_guest::__private::Manifest {
                name: #name,
                description: #description,
                input: #input_node,
                output: #output_node,
                more: #more,
            };
            // Large schemas take more steps than rustc expects of a constant.
            #[allow(long_running_const_eval)]
            const __SANDBAR_LEN: usize = __SANDBAR_TASK.len();
            #[allow(long_running_const_eval)]
            const __SANDBAR_JSON: [u8; __SANDBAR_LEN] = __SANDBAR_TASK.render();

            impl #hidden {
                pub const MANIFEST: &'static str = match ::core::str::from_utf8(&__SANDBAR_JSON) {
                    ::core::result::Result::Ok(json) => json,
                    ::core::result::Result::Err(_) => panic!("a manifest is UTF-8"),
                };

                pub fn call(
                    #[allow(unused_variables)] context: &::sandbar_guest::Context,
                    #[allow(unused_variables)] input: ::std::vec::Vec<u8>,
                ) -> ::core::result::Result<::sandbar_guest::Output, ::sandbar_guest::TaskError> {
                    #[allow(clippy::unit_arg, unused_braces)]
                    #finish(#call)
                }
            }

            #[cfg(target_family = "wasm")]
            #[allow(unsafe_code)]
            const _: () = {
                #[used]
                #[unsafe(link_section = "sandbar:task")]
                static MANIFEST: [u8; __SANDBAR_LEN] = __SANDBAR_JSON;

                struct Task;

                impl ::sandbar_guest::__private::bindings::Guest for Task {
                    fn run(
                        input: ::std::vec::Vec<u8>,
                    ) -> ::core::result::Result<
                        ::sandbar_guest::__private::bindings::Output,
                        ::sandbar_guest::__private::bindings::Failure,
                    > {
                        ::sandbar_guest::__private::run(
                            input,
                            ::sandbar_guest::log::LevelFilter::#level,
                            #hidden::call,
                        )
                    }
                }

                ::sandbar_guest::__private::bindings::export!(Task);
            };
        };
    })
}

fn check_signature(function: &ItemFn) -> Result<()> {
    let sig = &function.sig;
    let refuse = |tokens: &dyn ToTokens, why: &str| Err(Error::new_spanned(tokens.to_token_stream(), why));
    if let Some(token) = &sig.asyncness {
        return refuse(
            token,
            "a task is an ordinary function, not `async`: the host runs each attempt in an instance of its own, so blocking holds up nobody",
        );
    }
    if let Safety::Unsafe(token) = &sig.safety {
        return refuse(token, "a task must be safe to call");
    }
    if let Some(token) = &sig.abi {
        return refuse(token, "a task is an ordinary Rust function; the macro makes the export");
    }
    if !sig.generics.params.is_empty() {
        return refuse(&sig.generics, "a task has one input type, so it cannot be generic");
    }
    if let Some(token) = &sig.generics.where_clause {
        return refuse(token, "a task cannot be generic");
    }
    if let Some(token) = &sig.variadic {
        return refuse(token, "a task takes at most a context and one input");
    }
    if let ReturnType::Type(_, ty) = &sig.output {
        if let Type::ImplTrait(_) = &**ty {
            return refuse(ty, "name the type, so that its schema can be known");
        }
        let output = generics(ty, "Result").and_then(|generics| generics.into_iter().next()).unwrap_or(ty);
        if is_byte_vector(output) {
            return refuse(
                output,
                "as JSON this is a list of numbers; return `Output::new(\"image/png\", bytes)` or `Bytes` for raw bytes",
            );
        }
    }
    Ok(())
}

fn parameters(function: &ItemFn) -> Result<Parameters<'_>> {
    let mut types = Vec::new();
    for argument in &function.sig.inputs {
        match argument {
            FnArg::Typed(argument) => types.push(&*argument.ty),
            FnArg::Receiver(receiver) => {
                return Err(Error::new_spanned(receiver, "a task is a free function, without `self`"));
            }
        }
    }
    match types[..] {
        [] => Ok(Parameters { context: false, input: None }),
        [only] if is_context(only) => Ok(Parameters { context: true, input: None }),
        [only] => Ok(Parameters { context: false, input: Some(input(only)?) }),
        [first, second] => {
            if !is_context(first) {
                return Err(Error::new_spanned(first, "before the input comes `&Context`"));
            }
            Ok(Parameters { context: true, input: Some(input(second)?) })
        }
        [_, _, third, ..] => Err(Error::new_spanned(
            third,
            "a task takes at most a context and one input; put the rest into a struct",
        )),
    }
}

/// `&Context` by any path. The compiler checks that it is ours.
fn is_context(ty: &Type) -> bool {
    match ty {
        Type::Reference(reference) if reference.mutability.is_none() => match &*reference.elem {
            Type::Path(path) => path.path.segments.last().is_some_and(|segment| segment.ident == "Context"),
            _ => false,
        },
        _ => false,
    }
}

fn input(ty: &Type) -> Result<&Type> {
    match ty {
        Type::Reference(_) => {
            Err(Error::new_spanned(ty, "a task owns its input: take it by value, for example `String`"))
        }
        Type::ImplTrait(_) => Err(Error::new_spanned(ty, "name the type, so that its schema can be known")),
        _ if is_byte_vector(ty) => Err(Error::new_spanned(
            ty,
            "as JSON this is a list of numbers; take `Bytes` for raw bytes, or a struct with a list",
        )),
        _ => Ok(ty),
    }
}

/// `Vec<u8>` by any path. Nobody who writes it means a JSON list of numbers.
fn is_byte_vector(ty: &Type) -> bool {
    let item = generics(ty, "Vec").and_then(|generics| generics.into_iter().next());
    matches!(item, Some(Type::Path(path)) if path.path.is_ident("u8"))
}

/// The type arguments of a path that ends with `name<…>`.
fn generics<'a>(ty: &'a Type, name: &str) -> Option<Vec<&'a Type>> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last().filter(|segment| segment.ident == name)?;
    let PathArguments::AngleBracketed(arguments) = &last.arguments else { return None };
    let types = arguments.args.iter().filter_map(|argument| match argument {
        GenericArgument::Type(ty) => Some(ty),
        _ => None,
    });
    Some(types.collect())
}
