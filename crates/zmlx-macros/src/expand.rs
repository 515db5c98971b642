//! The Rust code that stands for a kernel.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote};
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::{ExprClosure, Ident, ItemFn, LitStr, Path, Result, Token};
use zmlx_lang::Role;

use crate::compile::{self, Compiled, Options};
use crate::signature::Parameter;
use crate::value::error;

impl Options {
    /// Reads one option; `false` when the next tokens are none.
    fn option(&mut self, input: ParseStream) -> Result<bool> {
        if !input.peek(Ident::peek_any) {
            return Ok(false);
        }
        let key = input.call(Ident::parse_any)?;
        match key.to_string().as_str() {
            "strict" => self.strict = true,
            "keep_dims" => self.keep_dims = true,
            "name" => {
                input.parse::<Token![=]>()?;
                let name: LitStr = input.parse()?;
                if !zmlx_lang::kernel::is_identifier(&name.value()) {
                    return Err(error(&name, "a name is ASCII letters, digits and _, 128 at most"));
                }
                self.name = Some(name.value());
            }
            "crate" => {
                input.parse::<Token![=]>()?;
                let path = input.call(Path::parse_mod_style)?;
                if path.segments.first().is_some_and(|s| s.ident == "self" || s.ident == "super") {
                    return Err(error(
                        &path,
                        "give an absolute path, starting with `::`, `crate` or a crate's name",
                    ));
                }
                self.runtime = Some(path);
            }
            _ => {
                let what = "unknown option; accepted are name = \"...\", strict, keep_dims and crate = path";
                return Err(error(&key, what));
            }
        }
        Ok(true)
    }

    fn runtime(&self) -> TokenStream {
        match &self.runtime {
            Some(path) => quote!(#path),
            None => quote!(::zmlx::kernels),
        }
    }
}

impl Parse for Options {
    fn parse(input: ParseStream) -> Result<Self> {
        let mut options = Self::default();
        while !input.is_empty() {
            if !options.option(input)? {
                return Err(input.error("expected name = \"...\", strict, keep_dims or crate = path"));
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        Ok(options)
    }
}

/// The arguments of `elementwise!`: options, then a closure.
pub struct Elementwise {
    options: Options,
    closure: ExprClosure,
}

impl Parse for Elementwise {
    fn parse(input: ParseStream) -> Result<Self> {
        let mut options = Options::default();
        while !input.peek(Token![move]) && options.option(input)? {
            input.parse::<Token![,]>()?;
        }
        let closure = input.parse()?;
        input.parse::<Option<Token![,]>>()?;
        Ok(Self { options, closure })
    }
}

/// `#[kernel] fn f(...)`: a function `f` that runs the kernel, and a module `f` with the kernel itself.
pub fn kernel(options: &Options, f: &ItemFn) -> Result<TokenStream> {
    let compiled = compile::function(f, options)?;
    let runtime = options.runtime();
    let (vis, ident, attrs) = (&f.vis, &f.sig.ident, &f.attrs);
    let conditions = attrs.iter().filter(|a| a.path().is_ident("cfg"));
    let names = compiled.parameters.iter().map(|p| &p.ident);
    let types = compiled.parameters.iter().map(|p| match p.decl.role {
        Role::Scalar(default) => {
            let number = format_ident!("{}", p.dtype.name());
            if default.is_some() { quote!(::core::option::Option<#number>) } else { quote!(#number) }
        }
        _ => quote!(&#runtime::Array),
    });
    let (result, call) = call(&compiled, &runtime, ident);
    let lazy = lazy(&compiled, &runtime);
    let doc = format!("The kernel of [`{0}`](fn@{0}).", ident.unraw());
    Ok(quote! {
        #(#attrs)*
        #vis fn #ident(#(#names: #types),*) -> #runtime::Result<#result> { #call }

        #(#conditions)*
        #[doc = #doc]
        #vis mod #ident {
            /// The kernel, read from its IR at the first use.
            pub fn kernel() -> &'static #runtime::Kernel { #lazy }
        }
    })
}

/// The type of the result without `Result`, and the call.
fn call(compiled: &Compiled, runtime: &TokenStream, ident: &Ident) -> (TokenStream, TokenStream) {
    let is_scalar = |p: &&Parameter| matches!(p.decl.role, Role::Scalar(_));
    let arrays = compiled.parameters.iter().filter(|p| !is_scalar(p)).map(|p| &p.ident);
    let scalars: Vec<&Parameter> = compiled.parameters.iter().filter(is_scalar).collect();
    if scalars.is_empty() && !compiled.tuple {
        return (quote!(#runtime::Array), quote!(#ident::kernel().call1(&[#(#arrays),*])));
    }
    // Names that no parameter can have.
    let (call, value) = (Ident::new("call", Span::mixed_site()), Ident::new("value", Span::mixed_site()));
    let set = scalars.iter().map(|p| {
        let (given, name) = (&p.ident, &p.decl.name);
        // Narrow types widen: a call takes scalars of 32 and 64 bits.
        let wide = |v: &Ident| match p.dtype.size() {
            4 | 8 => quote!(#v),
            _ => quote!(::core::convert::Into::<i64>::into(#v)),
        };
        if p.has_default() {
            let wide = wide(&value);
            quote! {
                let #call = match #given {
                    ::core::option::Option::Some(#value) => #call.scalar(#name, #wide),
                    ::core::option::Option::None => #call,
                };
            }
        } else {
            let wide = wide(given);
            quote!(let #call = #call.scalar(#name, #wide);)
        }
    });
    let set = quote!(let #call = #ident::kernel().bind(&[#(#arrays),*]); #(#set)*);
    if !compiled.tuple {
        return (quote!(#runtime::Array), quote!(#set #call.run1()));
    }
    let (n, name) = (compiled.kernel.outputs.len(), &compiled.kernel.name);
    let values: Vec<Ident> = (0..n).map(|i| Ident::new(&format!("out{i}"), Span::mixed_site())).collect();
    let types = (0..n).map(|_| quote!(#runtime::Array));
    let run = quote! {
        #set
        let #call: [#runtime::Array; #n] = #call.run()?.try_into().map_err(|#value: ::std::vec::Vec<_>| {
            #runtime::Error::Argument {
                kernel: ::std::string::String::from(#name),
                what: ::std::format!("it gave {} outputs, not {}", #value.len(), #n),
            }
        })?;
        let [#(#values),*] = #call;
        ::core::result::Result::Ok((#(#values,)*))
    };
    (quote!((#(#types,)*)), run)
}

/// A static kernel, read from its IR at the first use.
fn lazy(compiled: &Compiled, runtime: &TokenStream) -> TokenStream {
    let (json, name) = (compiled.kernel.to_json(), &compiled.kernel.name);
    quote! {
        static KERNEL: ::std::sync::LazyLock<#runtime::Kernel> =
            ::std::sync::LazyLock::new(|| match #runtime::Kernel::from_ir_json(#json) {
                ::core::result::Result::Ok(kernel) => kernel,
                // The IR was checked when it was compiled: only another version of the runtime refuses it.
                ::core::result::Result::Err(e) => ::core::panic!("kernel {}: {}", #name, e),
            });
        &KERNEL
    }
}

/// `elementwise!(|x| ...)`: a block that gives the kernel.
pub fn elementwise(e: &Elementwise) -> Result<TokenStream> {
    let compiled = compile::closure(&e.closure, &e.options)?;
    let lazy = lazy(&compiled, &e.options.runtime());
    let runtime = e.options.runtime();
    Ok(quote!({
        let kernel: &'static #runtime::Kernel = { #lazy };
        kernel
    }))
}
