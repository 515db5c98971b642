//! Values while a body is read: scalars with their Rust type, tuples and arrays.

use quote::ToTokens;
use syn::{Error, Result};
use zmlx_lang::{Dtype, Id};

/// The Rust type of a scalar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// A type of the language. Every float is `F32`: narrower ones are storage only.
    Known(Dtype),
    /// An integer literal without suffix, or a choice between such, which takes the type of what it meets.
    Integer,
}

impl Type {
    pub const F32: Self = Self::Known(Dtype::F32);
    pub const BOOL: Self = Self::Known(Dtype::Bool);
    pub const U32: Self = Self::Known(Dtype::U32);

    pub fn is_float(self) -> bool {
        self == Self::F32
    }

    pub fn is_int(self) -> bool {
        match self {
            Self::Known(d) => d.compute().is_int(),
            Self::Integer => true,
        }
    }

    pub fn is_signed(self) -> bool {
        matches!(self, Self::Integer | Self::Known(Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64))
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Known(d) => d.name(),
            Self::Integer => "integer literal",
        }
    }
}

/// Least and largest value of an integer dtype.
pub fn int_range(dtype: Dtype) -> (i128, i128) {
    let bits = dtype.size() as u32 * 8;
    if Type::Known(dtype).is_signed() {
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        (0, (1 << bits) - 1)
    }
}

/// A value known while compiling. A float is held as written; it counts as its rounding to `f32`.
#[derive(Debug, Clone, Copy)]
pub enum Known {
    Int(i128),
    Float(f64),
    Bool(bool),
}

impl PartialEq for Known {
    /// Floats by their bits: 0.0 and -0.0 are not the same value to write.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::Float(a), Self::Float(b)) => a.to_bits() == b.to_bits(),
            (Self::Bool(a), Self::Bool(b)) => a == b,
            _ => false,
        }
    }
}

/// How a scalar is had.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Repr {
    Known(Known),
    Node(Id),
    /// A choice between integer literals whose type is not known yet: its number in the emitter.
    Choice(usize),
}

/// One number or boolean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scalar {
    pub ty: Type,
    pub repr: Repr,
}

impl Scalar {
    pub fn node(dtype: Dtype, id: Id) -> Self {
        Self { ty: Type::Known(dtype), repr: Repr::Node(id) }
    }

    pub fn known(ty: Type, known: Known) -> Self {
        Self { ty, repr: Repr::Known(known) }
    }

    pub fn int(dtype: Dtype, v: i128) -> Self {
        Self::known(Type::Known(dtype), Known::Int(v))
    }

    pub fn float(v: f64) -> Self {
        Self::known(Type::F32, Known::Float(v))
    }

    pub fn boolean(v: bool) -> Self {
        Self::known(Type::BOOL, Known::Bool(v))
    }

    pub fn known_value(&self) -> Option<Known> {
        match self.repr {
            Repr::Known(k) => Some(k),
            Repr::Node(_) | Repr::Choice(_) => None,
        }
    }

    pub fn known_int(&self) -> Option<i128> {
        match self.repr {
            Repr::Known(Known::Int(v)) => Some(v),
            _ => None,
        }
    }

    pub fn known_bool(&self) -> Option<bool> {
        match self.repr {
            Repr::Known(Known::Bool(v)) => Some(v),
            _ => None,
        }
    }
}

/// What an expression gives.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unit,
    Scalar(Scalar),
    Tuple(Vec<Value>),
    Array(Vec<Value>),
    /// An input that is read at computed places.
    Table(Table),
}

/// An input that is read at computed places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Table {
    pub input: u32,
    pub rank: u32,
    /// The type its elements are computed in.
    pub dtype: Dtype,
}

impl Value {
    /// The scalar, or an error at `at`.
    pub fn scalar(self, at: &dyn ToTokens) -> Result<Scalar> {
        match self {
            Self::Scalar(s) => Ok(s),
            other => Err(error(at, format!("expected a number or a boolean, found {}", other.name()))),
        }
    }

    /// Number of scalars.
    pub fn size(&self) -> usize {
        match self {
            Self::Tuple(v) | Self::Array(v) => v.iter().map(Self::size).sum(),
            _ => 1,
        }
    }

    pub fn name(&self) -> String {
        match self {
            Self::Unit => "no value `()`".to_owned(),
            Self::Scalar(s) => s.ty.name().to_owned(),
            Self::Tuple(v) => format!("a tuple of {}", v.len()),
            Self::Array(v) => format!("an array of {}", v.len()),
            Self::Table(_) => "an input that is read at places, like t[i]".to_owned(),
        }
    }
}

impl From<Scalar> for Value {
    fn from(s: Scalar) -> Self {
        Self::Scalar(s)
    }
}

/// A compile error that underlines all of `at`.
pub fn error(at: &dyn ToTokens, message: impl std::fmt::Display) -> Error {
    Error::new_spanned(at, message)
}
