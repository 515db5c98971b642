//! Types as written, and values checked against them.

use quote::ToTokens;
use syn::{Expr, Lit, Result, Type as SynType};
use zmlx_lang::Dtype;

use crate::emit::Emitter;
use crate::value::{Value, error};

/// The declared type of a value.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    Unit,
    Scalar(Dtype),
    /// `usize`, for integers known while compiling only.
    Size,
    /// `_`.
    Inferred,
    Tuple(Vec<Shape>),
    Array(Box<Shape>, Option<usize>),
}

const ACCEPTED: &str = "f32, i8, i16, i32, i64, u8, u16, u32, u64 and bool";

/// The dtype a name stands for, `f16` and `bf16` included.
fn named(ty: &SynType) -> Option<Dtype> {
    let SynType::Path(p) = ty else { return None };
    let last = p.path.segments.last()?;
    if p.qself.is_some() || !last.arguments.is_empty() {
        return None;
    }
    Dtype::from_name(&last.ident.to_string())
}

fn is_named(ty: &SynType, name: &str) -> bool {
    matches!(ty, SynType::Path(p) if p.path.is_ident(name))
}

/// The type of an array's elements: any dtype.
pub fn storage_type(ty: &SynType) -> Result<Dtype> {
    let ty = ungroup(ty);
    if let Some(d) = named(ty) {
        return Ok(d);
    }
    Err(match ty {
        _ if is_named(ty, "f64") => {
            error(ty, "f64 is not in the language: write f32, in which floats are computed")
        }
        SynType::Reference(_) => error(ty, "parameters are elements, not references: write f32, not &f32"),
        _ => error(ty, format!("accepted types are {ACCEPTED}, and f16 and bf16 for storage")),
    })
}

/// The type of a value in a body.
pub fn value_type(ty: &SynType) -> Result<Shape> {
    let ty = ungroup(ty);
    match ty {
        SynType::Infer(_) => Ok(Shape::Inferred),
        SynType::Tuple(t) if t.elems.is_empty() => Ok(Shape::Unit),
        SynType::Tuple(t) => Ok(Shape::Tuple(t.elems.iter().map(value_type).collect::<Result<_>>()?)),
        SynType::Array(a) => {
            let len = match &a.len {
                Expr::Lit(l) => match &l.lit {
                    Lit::Int(n) => Some(n.base10_parse()?),
                    other => return Err(error(other, "expected a length")),
                },
                Expr::Infer(_) => None,
                // A constant: the value says how long it is.
                Expr::Path(_) => None,
                other => return Err(error(other, "the length of an array is a literal or a constant")),
            };
            Ok(Shape::Array(Box::new(value_type(&a.elem)?), len))
        }
        _ if is_named(ty, "usize") => Ok(Shape::Size),
        _ => match storage_type(ty)? {
            Dtype::F16 | Dtype::Bf16 => {
                Err(error(ty, "f16 and bf16 only store: values are f32; `x as f16` rounds to that precision"))
            }
            d => Ok(Shape::Scalar(d)),
        },
    }
}

/// The dtype that `as` converts to; `None` for `usize`.
pub fn cast_type(ty: &SynType) -> Result<Option<Dtype>> {
    if is_named(ungroup(ty), "usize") { Ok(None) } else { storage_type(ty).map(Some) }
}

fn ungroup(ty: &SynType) -> &SynType {
    match ty {
        SynType::Group(g) => ungroup(&g.elem),
        SynType::Paren(p) => ungroup(&p.elem),
        other => other,
    }
}

impl Shape {
    /// The value in this type; literals adapt to it, anything else must have it.
    pub fn check(&self, emit: &mut Emitter, value: Value, at: &dyn ToTokens) -> Result<Value> {
        let all = |emit: &mut Emitter, shapes: &mut dyn Iterator<Item = &Self>, values: Vec<Value>| {
            shapes.zip(values).map(|(s, v)| s.check(emit, v, at)).collect::<Result<Vec<_>>>()
        };
        match (self, value) {
            (Self::Inferred, value) | (Self::Unit, value @ Value::Unit) => Ok(value),
            (Self::Scalar(d), Value::Scalar(s)) => Ok(emit.coerce(s, *d, at)?.into()),
            (Self::Size, Value::Scalar(s)) if s.known_int().is_some_and(|v| v >= 0) => Ok(s.into()),
            (Self::Size, _) => {
                Err(error(at, "a usize must be known while compiling; use i32 or u32 for values"))
            }
            (Self::Tuple(shapes), Value::Tuple(values)) if shapes.len() == values.len() => {
                Ok(Value::Tuple(all(emit, &mut shapes.iter(), values)?))
            }
            (Self::Array(of, len), Value::Array(values)) if len.is_none_or(|n| n == values.len()) => {
                Ok(Value::Array(all(emit, &mut std::iter::repeat(&**of), values)?))
            }
            (shape, value) => Err(error(at, format!("expected {}, found {}", shape.name(), value.name()))),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Unit => "no value `()`".to_owned(),
            Self::Scalar(d) => d.name().to_owned(),
            Self::Size => "usize".to_owned(),
            Self::Inferred => "_".to_owned(),
            Self::Tuple(s) => format!("a tuple of {}", s.len()),
            Self::Array(_, Some(n)) => format!("an array of {n}"),
            Self::Array(_, None) => "an array".to_owned(),
        }
    }
}
