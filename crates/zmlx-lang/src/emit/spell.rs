//! How the two languages spell types, literals and built-in functions.

use super::Dialect;
use crate::graph::Const;
use crate::{Dtype, Ty};

impl Dialect {
    /// The type that elements are stored in, as MLX declares parameters.
    pub(super) fn storage(self, dtype: Dtype) -> &'static str {
        match (dtype, self) {
            (Dtype::Bool, _) => "bool",
            (Dtype::U8, _) => "uint8_t",
            (Dtype::U16, _) => "uint16_t",
            (Dtype::U32, _) => "uint32_t",
            (Dtype::U64, _) => "uint64_t",
            (Dtype::I8, _) => "int8_t",
            (Dtype::I16, _) => "int16_t",
            (Dtype::I32, _) => "int32_t",
            (Dtype::I64, _) => "int64_t",
            (Dtype::F32, _) => "float",
            (Dtype::F16, Self::Metal) => "half",
            (Dtype::Bf16, Self::Metal) => "bfloat16_t",
            (Dtype::F16, Self::Cuda) => "__half",
            (Dtype::Bf16, Self::Cuda) => "__nv_bfloat16",
        }
    }

    /// The type that values are computed in.
    pub(super) fn ty(self, ty: Ty) -> &'static str {
        match ty {
            Ty::Bool => "bool",
            Ty::I32 => "int",
            Ty::U32 => "uint32_t",
            Ty::I64 => "int64_t",
            Ty::U64 => "uint64_t",
            Ty::F32 => "float",
        }
    }

    /// A zero to store.
    pub(super) fn zero(self, dtype: Dtype) -> String {
        match dtype {
            Dtype::Bool => "false".to_owned(),
            Dtype::F32 => "0.0f".to_owned(),
            Dtype::I32 => "0".to_owned(),
            d if d.is_float() => format!("{}(0.0f)", self.storage(d)),
            d => format!("{}(0)", self.storage(d)),
        }
    }

    /// A literal of a type.
    pub(super) fn literal(self, c: Const, ty: Ty) -> String {
        match (c, ty) {
            (Const::Bool(v), Ty::Bool) => v.to_string(),
            (Const::Float(_), Ty::F32) => self.float(c.as_f64() as f32),
            (Const::Int(v), Ty::F32) => self.float(v as f32),
            (Const::Bool(v), _) => self.literal(Const::Int(v.into()), ty),
            (Const::Int(v), Ty::Bool) => (v != 0).to_string(),
            (Const::Int(v), _) => int(v, ty),
            (Const::Float(_), _) => int(c.as_f64() as i64, ty),
        }
    }

    /// A float literal with exactly these bits.
    pub(super) fn float(self, v: f32) -> String {
        if v.is_finite() {
            // The shortest text that reads back as this float.
            let text = format!("{v:?}f");
            return if v.is_sign_negative() { format!("({text})") } else { text };
        }
        let bits = if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() };
        format!("{}({bits:#x}u)", self.float_of_bits())
    }

    /// The float of 32 bits.
    pub(super) fn float_of_bits(self) -> &'static str {
        self.pick("as_type<float>", "__uint_as_float")
    }

    /// The bits of a float.
    pub(super) fn bits_of_float(self) -> &'static str {
        self.pick("as_type<uint32_t>", "__float_as_uint")
    }

    /// One of two spellings.
    pub(super) fn pick(self, metal: &'static str, cuda: &'static str) -> &'static str {
        match self {
            Self::Metal => metal,
            Self::Cuda => cuda,
        }
    }

    /// A function of floats from the language's library: `exp` is `metal::precise::exp` or `expf`.
    pub(super) fn math(self, name: &str) -> String {
        // The others are as exact without asking, in the mode that MLX compiles in.
        let plain = matches!(name, "floor" | "ceil" | "trunc" | "rint" | "fma" | "fabs" | "exp2" | "pow");
        match self {
            Self::Metal if plain => format!("metal::{name}"),
            Self::Metal => format!("metal::precise::{name}"),
            Self::Cuda => format!("{name}f"),
        }
    }
}

fn int(v: i64, ty: Ty) -> String {
    match ty {
        Ty::U32 => format!("{}u", v as u32),
        Ty::U64 => format!("uint64_t({}u)", v as u64),
        Ty::I64 if v == i64::MIN => "(-int64_t(9223372036854775807) - 1)".to_owned(),
        Ty::I64 => format!("int64_t({v})"),
        _ if v == i64::from(i32::MIN) => "(-2147483647 - 1)".to_owned(),
        _ if v < 0 => format!("({v})"),
        _ => v.to_string(),
    }
}

/// Least and largest value of an integer type, as a literal; infinities for floats.
pub(super) fn extreme(dialect: Dialect, ty: Ty, largest: bool) -> String {
    match (ty, largest) {
        (Ty::F32, true) => dialect.float(f32::INFINITY),
        (Ty::F32, false) => dialect.float(f32::NEG_INFINITY),
        (Ty::U32 | Ty::U64, false) => int(0, ty),
        (Ty::U32, true) => int(u32::MAX.into(), ty),
        (Ty::U64, true) => "uint64_t(18446744073709551615u)".to_owned(),
        (Ty::I64, true) => int(i64::MAX, ty),
        (Ty::I64, false) => int(i64::MIN, ty),
        (_, true) => int(i32::MAX.into(), Ty::I32),
        (_, false) => int(i32::MIN.into(), Ty::I32),
    }
}
