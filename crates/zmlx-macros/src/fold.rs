//! Arithmetic on values known while compiling, exactly as Rust does it.

use quote::ToTokens;
use syn::Result;
use zmlx_lang::{Dtype, Op};

use crate::value::{Known, Scalar, Type, error, int_range};

/// An integer in its type; one out of range is an error, as in a Rust constant (or wraps in a branch never taken).
pub fn in_range(ty: Type, v: i128, dead: bool, at: &dyn ToTokens) -> Result<Scalar> {
    let (low, high) = match ty {
        Type::Known(d) => int_range(d),
        Type::Integer => (i128::from(i64::MIN), i128::from(u64::MAX)),
    };
    if v < low || v > high {
        if !dead {
            return Err(error(at, format!("this arithmetic overflows {}", ty.name())));
        }
        return Ok(Scalar::known(ty, Known::Int(wrap(ty, v))));
    }
    Ok(Scalar::known(ty, Known::Int(v)))
}

/// An integer modulo the size of its type.
pub fn wrap(ty: Type, v: i128) -> i128 {
    let d = match ty {
        Type::Known(d) => d,
        Type::Integer => Dtype::I64,
    };
    let (low, high) = int_range(d);
    (v - low).rem_euclid(high - low + 1) + low
}

/// `a op b` of floats, rounded to `f32`.
pub fn float(op: Op, a: f64, b: f64) -> Option<Scalar> {
    let (a, b) = (a as f32, b as f32);
    let number = |v: f32| Some(Scalar::float(f64::from(v)));
    match op {
        Op::Add => number(a + b),
        Op::Sub => number(a - b),
        Op::Mul => number(a * b),
        Op::Div => number(a / b),
        _ => compare(op, a, b),
    }
}

/// `a op b` of integers of type `ty`, with Rust's division. `None` for an operation that is not folded.
pub fn int(op: Op, ty: Type, a: i128, b: i128, dead: bool, at: &dyn ToTokens) -> Result<Option<Scalar>> {
    let v = match op {
        Op::Add => a + b,
        Op::Sub => a - b,
        Op::Mul => match a.checked_mul(b) {
            Some(v) => v,
            None => return Err(error(at, format!("this arithmetic overflows {}", ty.name()))),
        },
        Op::FloorDiv | Op::Rem if b == 0 => {
            return if dead {
                Ok(Some(Scalar::known(ty, Known::Int(0))))
            } else {
                Err(error(at, "division by zero"))
            };
        }
        Op::FloorDiv => a / b,
        Op::Rem => a % b,
        Op::BitAnd => a & b,
        Op::BitOr => a | b,
        Op::BitXor => a ^ b,
        Op::Min => a.min(b),
        Op::Max => a.max(b),
        _ => return Ok(compare(op, a, b)),
    };
    in_range(ty, v, dead, at).map(Some)
}

/// A comparison of two known values.
pub fn compare<T: PartialOrd>(op: Op, a: T, b: T) -> Option<Scalar> {
    Some(Scalar::boolean(match op {
        Op::Lt => a < b,
        Op::Le => a <= b,
        Op::Gt => a > b,
        Op::Ge => a >= b,
        Op::Eq => a == b,
        Op::Ne => a != b,
        _ => return None,
    }))
}

/// `a op b` of booleans.
pub fn logic(op: Op, a: bool, b: bool) -> Option<Scalar> {
    match op {
        Op::And | Op::BitAnd => Some(Scalar::boolean(a & b)),
        Op::Or | Op::BitOr => Some(Scalar::boolean(a | b)),
        Op::BitXor => Some(Scalar::boolean(a ^ b)),
        _ => compare(op, a, b),
    }
}

/// `value as to`, for casts that Rust has; `to` is not `f16` or `bf16`.
pub fn cast(value: Known, to: Dtype) -> Known {
    let v = match value {
        Known::Float(v) if to.is_float() => return Known::Float(v),
        Known::Float(v) => {
            let (low, high) = int_range(to);
            return Known::Int((v as f32 as i128).clamp(low, high));
        }
        Known::Bool(b) if to == Dtype::Bool => return Known::Bool(b),
        Known::Bool(b) => i128::from(b),
        Known::Int(v) => v,
    };
    if to.is_float() { Known::Float(f64::from(v as f32)) } else { Known::Int(wrap(Type::Known(to), v)) }
}
