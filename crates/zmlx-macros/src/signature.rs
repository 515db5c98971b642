//! Parameters and results of a kernel.

use quote::ToTokens;
use syn::ext::IdentExt;
use syn::{Attribute, ExprClosure, FnArg, Ident, Meta, Pat, Result, ReturnType, Signature, Type as SynType};
use zmlx_lang::kernel::is_identifier;
use zmlx_lang::{Const, Dtype, InputDecl, Node, Role};

use crate::body::Body;
use crate::types::storage_type;
use crate::value::{Known, Scalar, Table, Value, error};

/// One input of a kernel.
pub struct Parameter {
    pub decl: InputDecl,
    /// The type it is computed in.
    pub dtype: Dtype,
    pub ident: Ident,
    pub mutable: bool,
}

impl Parameter {
    /// Whether a call may leave it out.
    pub fn has_default(&self) -> bool {
        matches!(self.decl.role, Role::Scalar(Some(_)))
    }

    /// The value that the body sees. An `f32` parameter takes arrays of any dtype and converts them: on `f32` and
    /// narrower floats that costs nothing, and integers must not be computed as integers.
    pub fn value(&self, number: u32, body: &mut Body) -> Value {
        if let Role::Indexed(rank) = self.decl.role {
            return Value::Table(Table { input: number, rank, dtype: self.dtype });
        }
        let id = body.emit.graph.add(Node::Input(number));
        let any = self.decl.dtype.is_none() && !matches!(self.decl.role, Role::Scalar(_));
        let id = if any { body.emit.graph.cast(Dtype::F32, id) } else { id };
        Scalar::node(self.dtype, id).into()
    }
}

/// A name without the `r#` of a raw identifier.
pub fn name(ident: &Ident) -> String {
    ident.unraw().to_string()
}

/// The parameters of a kernel's function.
pub fn parameters(sig: &Signature) -> Result<Vec<Parameter>> {
    plain_function(sig)?;
    let one = |input: &FnArg| match input {
        FnArg::Typed(t) => parameter(&t.pat, Some(&t.ty), &t.attrs),
        FnArg::Receiver(r) => Err(error(r, "a kernel is a free function, without self")),
    };
    let parameters = sig.inputs.iter().map(one).collect::<Result<Vec<_>>>()?;
    distinct(&parameters)?;
    Ok(parameters)
}

/// The parameters of a closure: `f32` where no type is written.
pub fn closure_parameters(closure: &ExprClosure) -> Result<Vec<Parameter>> {
    plain_closure(closure)?;
    let one = |pat: &Pat| match pat {
        Pat::Type(t) => parameter(&t.pat, Some(&t.ty), &t.attrs),
        pat => parameter(pat, None, &[]),
    };
    let parameters = closure.inputs.iter().map(one).collect::<Result<Vec<_>>>()?;
    distinct(&parameters)?;
    Ok(parameters)
}

fn distinct(parameters: &[Parameter]) -> Result<()> {
    for (i, p) in parameters.iter().enumerate() {
        if parameters[..i].iter().any(|q| q.decl.name == p.decl.name) {
            return Err(error(&p.ident, format!("two parameters are named {}", p.decl.name)));
        }
    }
    Ok(())
}

fn parameter(pat: &Pat, ty: Option<&SynType>, attrs: &[Attribute]) -> Result<Parameter> {
    let Pat::Ident(p) = pat else { return Err(error(pat, "a parameter of a kernel is one name")) };
    if p.by_ref.is_some() || p.subpat.is_some() {
        return Err(error(pat, "a parameter of a kernel is one name"));
    }
    let name = name(&p.ident);
    if !is_identifier(&name) {
        return Err(error(&p.ident, "names of parameters are ASCII letters, digits and _, 128 at most"));
    }
    let stored = ty.map_or(Ok(Dtype::F32), storage_type)?;
    // f32 stands for any float: its arrays are converted as they are read.
    let dtype = Some(stored).filter(|d| *d != Dtype::F32);
    let computed = if stored.is_float() { Dtype::F32 } else { stored };
    let attrs: Vec<&Attribute> = attrs.iter().chain(&p.attrs).collect();
    let role = match attrs[..] {
        [] => Role::Element,
        [one] => role(one, computed)?,
        [_, second, ..] => return Err(error(second, "a parameter takes one attribute")),
    };
    let decl = InputDecl { name, role, dtype };
    Ok(Parameter { decl, dtype: computed, ident: p.ident.clone(), mutable: p.mutability.is_some() })
}

fn role(attr: &Attribute, dtype: Dtype) -> Result<Role> {
    const ACCEPTED: &str = "a parameter takes #[row], #[scalar], #[scalar = default] or #[array(axes)]";
    match &attr.meta {
        Meta::Path(p) if p.is_ident("row") => Ok(Role::Row),
        Meta::Path(p) if p.is_ident("scalar") => Ok(Role::Scalar(None)),
        Meta::NameValue(m) if m.path.is_ident("scalar") => {
            let mut body = Body::new(false);
            let value = body.scalar(&m.value)?;
            let value = body.emit.coerce(value, dtype, &m.value)?;
            let known = match value.known_value() {
                Some(Known::Float(v)) => Some(Const::float(v)),
                Some(Known::Bool(v)) => Some(Const::Bool(v)),
                Some(Known::Int(v)) => i64::try_from(v).ok().map(Const::Int),
                None => None,
            };
            match known {
                Some(c) => Ok(Role::Scalar(Some(c))),
                None => Err(error(&m.value, "a default is a constant of at most i64::MAX")),
            }
        }
        Meta::List(l) if l.path.is_ident("array") => {
            let axes: syn::LitInt = l.parse_args()?;
            match axes.base10_parse::<u32>()? {
                n @ 1..=31 => Ok(Role::Indexed(n)),
                _ => Err(error(&axes, "an array has from 1 to 31 axes")),
            }
        }
        meta => Err(error(meta, ACCEPTED)),
    }
}

/// A result: the storage type, or none for what the body gives (closures only).
pub enum Results {
    Inferred,
    One(Dtype),
    Tuple(Vec<Dtype>),
}

/// The results of a kernel's function or closure.
pub fn results(output: &ReturnType) -> Result<Results> {
    let ReturnType::Type(_, ty) = output else { return Ok(Results::Inferred) };
    match &**ty {
        SynType::Tuple(t) if t.elems.is_empty() => Err(error(t, "a kernel gives at least one value")),
        SynType::Tuple(t) => Ok(Results::Tuple(t.elems.iter().map(storage_type).collect::<Result<_>>()?)),
        ty => Ok(Results::One(storage_type(ty)?)),
    }
}

/// Rejects what a kernel's function or an inner one can't have.
pub fn plain_function(sig: &Signature) -> Result<()> {
    let generics: &dyn ToTokens = &sig.generics;
    if !sig.generics.params.is_empty() || sig.generics.where_clause.is_some() {
        return Err(error(
            generics,
            "generics are not accepted in a kernel: types are f32, integers and bool",
        ));
    }
    if let Some(a) = &sig.asyncness {
        return Err(error(a, "a kernel is not async"));
    }
    if !matches!(sig.safety, syn::Safety::Default) {
        return Err(error(&sig.ident, "`unsafe` functions are not accepted in a kernel"));
    }
    if let Some(abi) = &sig.abi {
        return Err(error(abi, "a kernel has no ABI"));
    }
    if let Some(c) = &sig.constness {
        return Err(error(c, "a kernel is not a const function"));
    }
    if let Some(v) = &sig.variadic {
        return Err(error(v, "variadic functions are not accepted"));
    }
    Ok(())
}

/// Rejects attributes in a body that would change what it means; those for lints and formatting may stay.
pub fn plain_attributes(attrs: &[Attribute]) -> Result<()> {
    const HARMLESS: [&str; 7] = ["allow", "expect", "warn", "deny", "doc", "inline", "rustfmt"];
    let changes = |a: &&Attribute| {
        let first = a.path().segments.first();
        !first.is_some_and(|s| HARMLESS.iter().any(|h| s.ident == h))
    };
    match attrs.iter().find(changes) {
        Some(a) => Err(error(a, "this attribute is not accepted inside a kernel")),
        None => Ok(()),
    }
}

/// [`plain_function`] for closures.
pub fn plain_closure(closure: &ExprClosure) -> Result<()> {
    plain_attributes(&closure.attrs)?;
    if let Some(a) = &closure.asyncness {
        return Err(error(a, "a kernel is not async"));
    }
    if let Some(l) = &closure.lifetimes {
        return Err(error(l, "lifetimes are not accepted in a kernel"));
    }
    Ok(())
}
