//! Scalar semantics of every operation.

use super::Rounding;
use crate::{Dtype, Op, ReduceOp, ScanOp, Ty};

/// One value: a float, or an integer or boolean (0 or 1) held exactly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Num {
    F(f64),
    I(i128),
}

use Num::{F, I};

impl Num {
    pub(crate) fn f(self) -> f64 {
        match self {
            F(v) => v,
            I(v) => v as f64,
        }
    }

    pub(crate) fn i(self) -> i128 {
        match self {
            F(v) => v as i128,
            I(v) => v,
        }
    }

    fn truth(self) -> bool {
        match self {
            F(v) => v != 0.0,
            I(v) => v != 0,
        }
    }

    fn zero(ty: Ty) -> Self {
        Self::of(0, ty)
    }

    pub(crate) fn of(v: i128, ty: Ty) -> Self {
        if ty == Ty::F32 { F(v as f64) } else { I(v) }
    }
}

/// Bits of an integer dtype and whether it has a sign.
fn bits(dtype: Dtype) -> (u32, bool) {
    use Dtype::*;
    let signed = matches!(dtype, I8 | I16 | I32 | I64);
    (dtype.size() as u32 * 8, signed)
}

/// Least and largest value of an integer dtype.
pub(crate) fn int_range(dtype: Dtype) -> (i128, i128) {
    match bits(dtype) {
        _ if dtype == Dtype::Bool => (0, 1),
        (n, true) => (-(1 << (n - 1)), (1 << (n - 1)) - 1),
        (n, false) => (0, (1 << n) - 1),
    }
}

/// An integer modulo 2^bits, in the dtype's range; booleans are `!= 0`.
pub(crate) fn wrap(v: i128, dtype: Dtype) -> i128 {
    if dtype == Dtype::Bool {
        return i128::from(v != 0);
    }
    let (n, signed) = bits(dtype);
    let low = v & ((1 << n) - 1);
    if signed && low >> (n - 1) == 1 { low - (1 << n) } else { low }
}

/// To the nearest value of a float dtype, by way of `f32` as backends do.
pub(crate) fn round_float(v: f64, dtype: Dtype) -> f64 {
    let v = v as f32;
    f64::from(match dtype {
        Dtype::F16 => half::f16::from_f32(v).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(v).to_f32(),
        _ => v,
    })
}

/// A conversion, rounding: see [`crate::Node::Cast`].
pub(crate) fn cast(x: Num, dtype: Dtype) -> Num {
    match (x, dtype) {
        (x, Dtype::Bool) => I(x.truth().into()),
        (x, d) if d.is_float() => F(round_float(x.f(), d)),
        (F(v), d) => {
            let (least, largest) = int_range(d);
            // `as` truncates, saturates and turns NaN into 0.
            I((v as i128).clamp(least, largest))
        }
        (I(v), d) => I(wrap(v, d)),
    }
}

/// The same 32 bits as another type.
pub(crate) fn bitcast(x: Num, to: Dtype) -> Num {
    let word = match x {
        F(v) => (v as f32).to_bits(),
        I(v) => v as u32,
    };
    match to {
        Dtype::F32 => F(f64::from(f32::from_bits(word))),
        d => I(wrap(i128::from(word), d)),
    }
}

/// What the result of an operation on floats is rounded to.
fn rounded(v: f64, rounding: Rounding) -> f64 {
    if rounding == Rounding::EachOperation { f64::from(v as f32) } else { v }
}

/// An operation. `ty` is the type of the operands (of the last one for a selection).
pub(crate) fn apply(op: Op, ty: Ty, args: &[Num], rounding: Rounding) -> Num {
    if op == Op::Select {
        return if args[0].truth() { args[1] } else { args[2] };
    }
    if let Some(result) = compare(op, args) {
        return I(result.into());
    }
    if ty != Ty::F32 {
        return I(wrap(integer(op, ty, args), ty.storage()));
    }
    let v: Vec<f64> = args.iter().map(|a| a.f()).collect();
    let r = |v| rounded(v, rounding);
    F(r(match (op, v.as_slice()) {
        (Op::Fma, &[a, b, c]) if rounding == Rounding::EachOperation => {
            f64::from((a as f32).mul_add(b as f32, c as f32))
        }
        (Op::Fma, &[a, b, c]) => libm::fma(a, b, c),
        (Op::Rem, &[a, b]) => a - r(b * r(r(a / b).floor())),
        (Op::FloorDiv, &[a, b]) => r(a / b).floor(),
        (op, &[x]) => unary(op, x),
        (op, &[a, b]) => binary(op, a, b),
        _ => f64::NAN,
    }))
}

fn compare(op: Op, args: &[Num]) -> Option<bool> {
    let order = match args {
        [F(a), F(b)] => a.partial_cmp(b),
        [I(a), I(b)] => Some(a.cmp(b)),
        _ => None,
    };
    let truth = |k: usize| args[k].truth();
    Some(match op {
        Op::Lt => order.is_some_and(|o| o.is_lt()),
        Op::Le => order.is_some_and(|o| o.is_le()),
        Op::Gt => order.is_some_and(|o| o.is_gt()),
        Op::Ge => order.is_some_and(|o| o.is_ge()),
        Op::Eq => order.is_some_and(|o| o.is_eq()),
        Op::Ne => !order.is_some_and(|o| o.is_eq()),
        Op::Not => !truth(0),
        Op::And => truth(0) && truth(1),
        Op::Or => truth(0) || truth(1),
        Op::IsNan => args[0].f().is_nan(),
        Op::IsInf => args[0].f().is_infinite(),
        _ => return None,
    })
}

fn integer(op: Op, ty: Ty, args: &[Num]) -> i128 {
    let a = args[0].i();
    let b = args.get(1).map_or(0, |b| b.i());
    let n = i128::from(bits(ty.storage()).0);
    match op {
        Op::Neg => -a,
        Op::Abs => a.abs(),
        Op::Sign => a.signum(),
        Op::Floor | Op::Ceil | Op::Trunc | Op::Round => a,
        Op::BitNot if ty == Ty::Bool => i128::from(a == 0),
        Op::BitNot => !a,
        Op::Popcount => i128::from((a & ((1 << n) - 1)).count_ones()),
        Op::Add => a + b,
        Op::Sub => a - b,
        Op::Mul => a.wrapping_mul(b),
        Op::FloorDiv | Op::Rem if b == 0 => 0,
        Op::FloorDiv => floor_div(a, b),
        Op::Rem => a - b * floor_div(a, b),
        Op::Min => a.min(b),
        Op::Max => a.max(b),
        Op::BitAnd => a & b,
        Op::BitOr => a | b,
        Op::BitXor => a ^ b,
        Op::Shl if (0..n).contains(&b) => a << b,
        Op::Shl => 0,
        Op::Shr if (0..n).contains(&b) => a >> b,
        Op::Shr => -i128::from(a < 0),
        _ => 0,
    }
}

fn floor_div(a: i128, b: i128) -> i128 {
    let q = a / b;
    if a % b != 0 && (a < 0) != (b < 0) { q - 1 } else { q }
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + libm::exp(-x))
    } else {
        let e = libm::exp(x);
        e / (1.0 + e)
    }
}

fn softplus(x: f64) -> f64 {
    if x.is_nan() { x } else { x.max(0.0) + libm::log1p(libm::exp(-x.abs())) }
}

fn unary(op: Op, x: f64) -> f64 {
    use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};
    match op {
        Op::Neg => -x,
        Op::Abs => x.abs(),
        Op::Sign if x == 0.0 || x.is_nan() => x,
        Op::Sign => x.signum(),
        Op::Exp => libm::exp(x),
        Op::Exp2 => libm::exp2(x),
        Op::Log => libm::log(x),
        Op::Log2 => libm::log2(x),
        Op::Log10 => libm::log10(x),
        Op::Log1p => libm::log1p(x),
        Op::Expm1 => libm::expm1(x),
        Op::Sqrt => x.sqrt(),
        Op::Rsqrt => 1.0 / x.sqrt(),
        Op::Sin => libm::sin(x),
        Op::Cos => libm::cos(x),
        Op::Tan => libm::tan(x),
        Op::Asin => libm::asin(x),
        Op::Acos => libm::acos(x),
        Op::Atan => libm::atan(x),
        Op::Tanh => libm::tanh(x),
        Op::Sigmoid => sigmoid(x),
        Op::Silu => x * sigmoid(x),
        // 0.5 (1 + tanh u) = sigmoid(2u), which does not cancel for negative u.
        Op::GeluTanh => x * sigmoid(2.0 * FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x)),
        Op::GeluErf => 0.5 * x * libm::erfc(-x * FRAC_1_SQRT_2),
        Op::Softplus => softplus(x),
        Op::Mish => x * libm::tanh(softplus(x)),
        Op::Erf => libm::erf(x),
        Op::Floor => x.floor(),
        Op::Ceil => x.ceil(),
        Op::Trunc => x.trunc(),
        Op::Round => x.round_ties_even(),
        _ => f64::NAN,
    }
}

fn binary(op: Op, a: f64, b: f64) -> f64 {
    match op {
        Op::Add => a + b,
        Op::Sub => a - b,
        Op::Mul => a * b,
        Op::Div => a / b,
        Op::Pow => libm::pow(a, b),
        Op::Min | Op::Max => extreme(op == Op::Max, a, b),
        _ => f64::NAN,
    }
}

/// The larger or the smaller; NaN if either is NaN.
fn extreme(max: bool, a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else if (a > b) == max {
        a
    } else {
        b
    }
}

/// What an empty row gives: a maximum its type's least value, a minimum its largest.
fn identity(max: bool, ty: Ty) -> Num {
    let (least, largest) = if ty == Ty::F32 { (0, 0) } else { int_range(ty.storage()) };
    match (ty, max) {
        (Ty::F32, true) => F(f64::NEG_INFINITY),
        (Ty::F32, false) => F(f64::INFINITY),
        (_, true) => I(least),
        (_, false) => I(largest),
    }
}

fn combine(op: ScanOp, ty: Ty, acc: Num, x: Num) -> Num {
    match (op, acc, x) {
        (ScanOp::Sum, F(a), F(b)) => F(a + b),
        (ScanOp::Prod, F(a), F(b)) => F(a * b),
        (ScanOp::Max, F(a), F(b)) => F(extreme(true, a, b)),
        (ScanOp::Min, F(a), F(b)) => F(extreme(false, a, b)),
        (ScanOp::Sum, a, b) => I(wrap(a.i() + b.i(), ty.storage())),
        (ScanOp::Prod, a, b) => I(wrap(a.i().wrapping_mul(b.i()), ty.storage())),
        (ScanOp::Max, a, b) => I(a.i().max(b.i())),
        (ScanOp::Min, a, b) => I(a.i().min(b.i())),
    }
}

fn start(op: ScanOp, ty: Ty) -> Num {
    match op {
        ScanOp::Sum => Num::zero(ty),
        ScanOp::Prod => Num::of(1, ty),
        ScanOp::Max => identity(true, ty),
        ScanOp::Min => identity(false, ty),
    }
}

/// A reduction of a row. Floats are accumulated in double precision and rounded once.
pub(crate) fn reduce(op: ReduceOp, ty: Ty, row: impl Iterator<Item = Num>, rounding: Rounding) -> Num {
    let scan = match op {
        ReduceOp::Sum => ScanOp::Sum,
        ReduceOp::Prod => ScanOp::Prod,
        ReduceOp::Max => ScanOp::Max,
        ReduceOp::Min => ScanOp::Min,
        ReduceOp::ArgMax | ReduceOp::ArgMin => return I(position(op == ReduceOp::ArgMax, row)),
    };
    match row.fold(start(scan, ty), |acc, x| combine(scan, ty, acc, x)) {
        F(v) => F(rounded(v, rounding)),
        v => v,
    }
}

fn position(max: bool, row: impl Iterator<Item = Num>) -> i128 {
    let mut best: Option<(usize, Num)> = None;
    for (i, x) in row.enumerate() {
        let better = match (best, x) {
            (None, _) => true,
            (Some((_, F(b))), F(x)) => !b.is_nan() && (x.is_nan() || if max { x > b } else { x < b }),
            (Some((_, b)), x) if max => x.i() > b.i(),
            (Some((_, b)), x) => x.i() < b.i(),
        };
        if better {
            best = Some((i, x));
        }
    }
    best.map_or(0, |(i, _)| i as i128)
}

/// A running reduction of a row; floats accumulate in double precision, each result is rounded.
pub(crate) fn scan(
    op: ScanOp,
    ty: Ty,
    reverse: bool,
    exclusive: bool,
    row: &[Num],
    rounding: Rounding,
) -> Vec<Num> {
    let mut acc = start(op, ty);
    let mut out = row.to_vec();
    for step in 0..row.len() {
        let i = if reverse { row.len() - 1 - step } else { step };
        let next = combine(op, ty, acc, row[i]);
        out[i] = match if exclusive { acc } else { next } {
            F(v) => F(rounded(v, rounding)),
            v => v,
        };
        acc = next;
    }
    out
}
