//! Binary operators with Rust's meaning and typing.

use quote::ToTokens;
use syn::{BinOp, Result};
use zmlx_lang::{Dtype, Op};

use crate::emit::Emitter;
use crate::fold;
use crate::value::{Known, Scalar, Type, error};

/// The language's operation for an operator, and whether it is the operator's assigning form (`+=`).
pub fn operation(op: &BinOp) -> Option<(Op, bool)> {
    Some(match op {
        BinOp::Add(_) => (Op::Add, false),
        BinOp::Sub(_) => (Op::Sub, false),
        BinOp::Mul(_) => (Op::Mul, false),
        BinOp::Div(_) => (Op::Div, false),
        BinOp::Rem(_) => (Op::Rem, false),
        BinOp::And(_) => (Op::And, false),
        BinOp::Or(_) => (Op::Or, false),
        BinOp::BitXor(_) => (Op::BitXor, false),
        BinOp::BitAnd(_) => (Op::BitAnd, false),
        BinOp::BitOr(_) => (Op::BitOr, false),
        BinOp::Shl(_) => (Op::Shl, false),
        BinOp::Shr(_) => (Op::Shr, false),
        BinOp::Eq(_) => (Op::Eq, false),
        BinOp::Lt(_) => (Op::Lt, false),
        BinOp::Le(_) => (Op::Le, false),
        BinOp::Ne(_) => (Op::Ne, false),
        BinOp::Ge(_) => (Op::Ge, false),
        BinOp::Gt(_) => (Op::Gt, false),
        BinOp::AddAssign(_) => (Op::Add, true),
        BinOp::SubAssign(_) => (Op::Sub, true),
        BinOp::MulAssign(_) => (Op::Mul, true),
        BinOp::DivAssign(_) => (Op::Div, true),
        BinOp::RemAssign(_) => (Op::Rem, true),
        BinOp::BitXorAssign(_) => (Op::BitXor, true),
        BinOp::BitAndAssign(_) => (Op::BitAnd, true),
        BinOp::BitOrAssign(_) => (Op::BitOr, true),
        BinOp::ShlAssign(_) => (Op::Shl, true),
        BinOp::ShrAssign(_) => (Op::Shr, true),
        _ => return None,
    })
}

impl Emitter {
    /// `a op b`.
    pub fn binary(&mut self, op: Op, a: Scalar, b: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        if matches!(op, Op::Shl | Op::Shr) {
            return self.shift(op, a, b, at);
        }
        let (a, b) = self.unify(a, b, at)?;
        if let Some(folded) = self.fold(op, a, b, at)? {
            return Ok(folded);
        }
        match (op, a.ty) {
            (Op::Eq | Op::Ne, _) => Ok(self.test(op, &[a, b])),
            (Op::And | Op::Or, Type::BOOL) => Ok(self.test(op, &[a, b])),
            (Op::BitAnd | Op::BitOr | Op::BitXor, Type::BOOL) => Ok(self.test(op, &[a, b])),
            (Op::And | Op::Or, ty) => {
                Err(error(at, format!("`&&` and `||` take booleans, not {}", ty.name())))
            }
            (_, Type::BOOL) => Err(error(at, "booleans take `&&`, `||`, `^`, `==` and `!=` only")),
            (Op::Lt | Op::Le | Op::Gt | Op::Ge, _) => Ok(self.test(op, &[a, b])),
            (Op::Add | Op::Sub | Op::Mul | Op::Div, Type::F32) => Ok(self.float(op, &[a, b])),
            (Op::Rem, Type::F32) => {
                let what = "`%` on floats is not accepted: the language's remainder takes the sign of the divisor; \
                            write rem(a, b) for `a - b * (a / b).floor()`";
                Err(error(at, what))
            }
            (_, Type::F32) => Err(error(at, "bit operations take integers; use x.to_bits()")),
            (Op::Div, ty) => self.divide(Op::FloorDiv, ty, a, b, at),
            (Op::Rem, ty) => self.divide(Op::Rem, ty, a, b, at),
            (_, Type::Known(d)) => Ok(self.number(op, d, &[a, b])),
            (_, Type::Integer) => Err(error(at, "this operation on literals is not accepted")),
        }
    }

    /// The result when both sides are known. Operands have one type.
    fn fold(&self, op: Op, a: Scalar, b: Scalar, at: &dyn ToTokens) -> Result<Option<Scalar>> {
        match (a.known_value(), b.known_value()) {
            (Some(Known::Float(x)), Some(Known::Float(y))) => Ok(fold::float(op, x, y)),
            (Some(Known::Bool(x)), Some(Known::Bool(y))) => Ok(fold::logic(op, x, y)),
            (Some(Known::Int(x)), Some(Known::Int(y))) => {
                let op = if op == Op::Div { Op::FloorDiv } else { op };
                fold::int(op, a.ty, x, y, self.dead > 0, at)
            }
            _ => Ok(None),
        }
    }

    /// Rust's `/` (as `FloorDiv`) or `%`, which truncate toward zero, from the language's, which round down: they
    /// differ when the remainder is not 0 and the signs do. By 0, where Rust panics, they give 0.
    fn divide(&mut self, op: Op, ty: Type, a: Scalar, b: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let Type::Known(d) = ty else { return Err(error(at, "this division of literals is not accepted")) };
        if b.known_int() == Some(0) && self.dead == 0 {
            return Err(error(at, "division by zero"));
        }
        let rounded_down = self.number(op, d, &[a, b]);
        if !ty.is_signed() {
            return Ok(rounded_down);
        }
        let zero = Scalar::int(d, 0);
        let rem = self.number(Op::Rem, d, &[a, b]);
        let signs = match b.known_int() {
            Some(v) if v > 0 => a,
            _ => self.number(Op::BitXor, d, &[a, b]),
        };
        let inexact = self.test(Op::Ne, &[rem, zero]);
        let differ = self.test(Op::Lt, &[signs, zero]);
        let wrong = self.test(Op::And, &[inexact, differ]);
        let right = match op {
            Op::Rem => self.number(Op::Sub, d, &[rem, b]),
            _ => self.number(Op::Add, d, &[rounded_down, Scalar::int(d, 1)]),
        };
        self.select(wrong, right, rounded_down, at)
    }

    /// `a << b` and `a >> b`: the count may have another integer type, the result has the type of `a`.
    fn shift(&mut self, op: Op, a: Scalar, b: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        if !a.ty.is_int() || !b.ty.is_int() {
            return Err(error(at, format!("shifts take integers, not {} and {}", a.ty.name(), b.ty.name())));
        }
        let a = if a.known_int().is_none() || b.known_int().is_none() { self.settle(a, at)? } else { a };
        let b = if b.known_int().is_none() { self.settle(b, at)? } else { b };
        let dtype = match a.ty {
            Type::Known(d) => d,
            Type::Integer => Dtype::I64,
        };
        let bits = dtype.size() as i128 * 8;
        let dead = self.dead > 0;
        if let Some(count) = b.known_int() {
            if !(0..bits).contains(&count) && !dead {
                return Err(error(at, format!("a shift by {count} is out of range for {}", a.ty.name())));
            }
            if let Some(v) = a.known_int() {
                let count = count.clamp(0, bits - 1) as u32;
                let v = if op == Op::Shl { fold::wrap(a.ty, v << count) } else { v >> count };
                return Ok(Scalar::known(a.ty, Known::Int(v)));
            }
            return Ok(self.number(op, dtype, &[a, Scalar::int(dtype, count)]));
        }
        // The count takes the type that `a` is computed in. One out of range, where Rust panics, gives 0 (or -1);
        // a 64-bit count beyond that type wraps first.
        let wide = dtype.compute().storage();
        let count = if b.ty == Type::Known(dtype) { b } else { self.cast(b, wide, at)? };
        Ok(self.number(op, dtype, &[a, count]))
    }

    /// `a.wrapping_add(b)` and its kin: integers modulo the size of their type.
    pub fn wrapping(&mut self, op: Op, a: Scalar, b: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let (a, b) = self.unify(a, b, at)?;
        let (a, b) = (self.settle(a, at)?, self.settle(b, at)?);
        let Type::Known(d) = a.ty else { return Err(error(at, "expected an integer")) };
        if !a.ty.is_int() {
            return Err(error(at, format!("wrapping arithmetic takes integers, not {d}")));
        }
        match (a.known_int(), b.known_int()) {
            (Some(x), Some(y)) => {
                // The product of two 64-bit values may leave i128: only its low 64 bits matter.
                let v = match op {
                    Op::Add => x.wrapping_add(y),
                    Op::Sub => x.wrapping_sub(y),
                    _ => x.wrapping_mul(y) as u64 as i128,
                };
                Ok(Scalar::int(d, fold::wrap(a.ty, v)))
            }
            _ => Ok(self.number(op, d, &[a, b])),
        }
    }

    /// `a.rem_euclid(b)` of integers: never negative; by 0, where Rust panics, 0.
    pub fn rem_euclid(&mut self, a: Scalar, b: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let (a, b) = self.unify(a, b, at)?;
        let Type::Known(d) = a.ty else { return Err(error(at, "rem_euclid of literals is not accepted")) };
        if !a.ty.is_int() {
            return Err(error(
                at,
                "rem_euclid on floats is not accepted; write rem(a, b), which takes the sign of b",
            ));
        }
        if let (Some(x), Some(y)) = (a.known_int(), b.known_int()) {
            if y == 0 {
                return Err(error(at, "division by zero"));
            }
            return Ok(Scalar::int(d, x.rem_euclid(y)));
        }
        // The language's remainder has the sign of the divisor: only a negative one needs a correction.
        let rem = self.number(Op::Rem, d, &[a, b]);
        if !a.ty.is_signed() || b.known_int().is_some_and(|v| v > 0) {
            return Ok(rem);
        }
        let negative = self.test(Op::Lt, &[rem, Scalar::int(d, 0)]);
        let positive = self.number(Op::Sub, d, &[rem, b]);
        self.select(negative, positive, rem, at)
    }
}
