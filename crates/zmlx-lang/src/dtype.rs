use std::fmt;

use serde::{Deserialize, Serialize};

/// How the elements of an array are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // the names say it
pub enum Dtype {
    Bool,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F16,
    Bf16,
    F32,
}

/// The type a value has while it is computed. Storage types narrower than 32 bits are computed in 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // the names say it
pub enum Ty {
    Bool,
    I32,
    U32,
    I64,
    U64,
    F32,
}

impl Dtype {
    /// Every dtype.
    pub const ALL: [Self; 12] = [
        Self::Bool,
        Self::U8,
        Self::U16,
        Self::U32,
        Self::U64,
        Self::I8,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::F16,
        Self::Bf16,
        Self::F32,
    ];

    /// The type that values of this dtype are computed in.
    pub fn compute(self) -> Ty {
        match self {
            Self::Bool => Ty::Bool,
            Self::U8 | Self::U16 | Self::U32 => Ty::U32,
            Self::I8 | Self::I16 | Self::I32 => Ty::I32,
            Self::U64 => Ty::U64,
            Self::I64 => Ty::I64,
            Self::F16 | Self::Bf16 | Self::F32 => Ty::F32,
        }
    }

    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 => 8,
        }
    }

    /// Whether it is a floating-point type.
    pub fn is_float(self) -> bool {
        self.compute() == Ty::F32
    }

    /// The name in the kernel language: `f32`, `bf16`, `i8`, `bool`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::U64 => "u64",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// The dtype of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl Ty {
    /// The dtype that stores values of this type as they are.
    pub fn storage(self) -> Dtype {
        match self {
            Self::Bool => Dtype::Bool,
            Self::I32 => Dtype::I32,
            Self::U32 => Dtype::U32,
            Self::I64 => Dtype::I64,
            Self::U64 => Dtype::U64,
            Self::F32 => Dtype::F32,
        }
    }

    /// Whether it is one of the four integer types.
    pub fn is_int(self) -> bool {
        matches!(self, Self::I32 | Self::U32 | Self::I64 | Self::U64)
    }

    /// The type in which two operands meet: `bool` gives way to anything, integers to `f32`, 32 bits to 64; `i32` with
    /// `u32` meets in `i64`. `i64` with `u64` has no common type: `None`.
    pub fn promote(self, other: Self) -> Option<Self> {
        use Ty::*;
        Some(match (self, other) {
            (a, b) if a == b => a,
            (Bool, a) | (a, Bool) => a,
            (F32, _) | (_, F32) => F32,
            (I64, U64) | (U64, I64) => return None,
            (I64, _) | (_, I64) => I64,
            (U64, U32) | (U32, U64) => U64,
            (U64, _) | (_, U64) => return None,
            _ => I64, // i32 with u32
        })
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Ty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.storage().name())
    }
}
