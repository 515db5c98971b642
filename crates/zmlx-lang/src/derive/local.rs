//! The derivative of each operation at a place.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, FRAC_2_SQRT_PI, LN_2, LN_10};

use super::build::Build;
use crate::{Id, Op};

/// A derivative as what it does to a change (or to a cotangent): `mask ? scale * v * times / over : 0`. Factors stay
/// apart so that a quotient is one, as in MLX, and a mask keeps infinities out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Local {
    scale: f64,
    times: Option<Id>,
    over: Option<Id>,
    mask: Option<Id>,
}

const ONE: Local = Local { scale: 1.0, times: None, over: None, mask: None };

impl Local {
    fn times(id: Id) -> Option<Self> {
        Some(Self { times: Some(id), ..ONE })
    }

    fn over(id: Id) -> Option<Self> {
        Some(Self { over: Some(id), ..ONE })
    }

    fn mask(id: Id) -> Option<Self> {
        Some(Self { mask: Some(id), ..ONE })
    }

    fn scaled(scale: f64) -> Option<Self> {
        Some(Self { scale, ..ONE })
    }

    pub(super) fn apply(self, b: &mut Build, v: Id) -> Id {
        let mut v = if self.scale == 1.0 { v } else { b.times_const(self.scale, v) };
        if let Some(t) = self.times {
            v = b.times(v, t);
        }
        if let Some(o) = self.over {
            v = b.over(v, o);
        }
        match self.mask {
            Some(m) => b.only(m, v),
            None => v,
        }
    }
}

/// The derivative of `y = op(args)` with respect to operand `k`; `None` where it is 0 everywhere.
pub(super) fn local(b: &mut Build, op: Op, args: &[Id], y: Id, k: usize) -> Option<Local> {
    let x = args[0];
    match op {
        Op::Add => Some(ONE),
        Op::Sub => Local::scaled(if k == 0 { 1.0 } else { -1.0 }),
        Op::Mul => Local::times(args[1 - k]),
        Op::Fma if k < 2 => Local::times(args[1 - k]),
        Op::Fma => Some(ONE),
        Op::Div if k == 0 => Local::over(args[1]),
        Op::Div => Some(Local { scale: -1.0, times: Some(y), over: Some(args[1]), mask: None }),
        Op::Rem if k == 0 => Some(ONE),
        Op::Rem => {
            let ratio = b.over(x, args[1]);
            let whole = b.op(Op::Floor, &[ratio]);
            Some(Local { scale: -1.0, times: Some(whole), ..ONE })
        }
        Op::Pow => power(b, args, y, k),
        Op::Max | Op::Min => {
            let (first, second) = if op == Op::Max { (Op::Gt, Op::Le) } else { (Op::Lt, Op::Ge) };
            Local::mask(b.op(if k == 0 { first } else { second }, args))
        }
        Op::Select if k == 1 => Local::mask(x),
        Op::Select if k == 2 => Local::mask(b.op(Op::Not, &[x])),
        Op::Neg => Local::scaled(-1.0),
        Op::Abs => Local::times(b.op(Op::Sign, &[x])),
        _ if op.arity() == 1 => function(b, op, x, y),
        _ => None,
    }
}

fn power(b: &mut Build, args: &[Id], y: Id, k: usize) -> Option<Local> {
    let (base, exponent) = (args[0], args[1]);
    if k == 1 {
        // 0 where the power is 0, for `0 * log 0`.
        let zero = b.c(0.0);
        let mask = b.op(Op::Ne, &[y, zero]);
        let log = b.op(Op::Log, &[base]);
        let slope = b.times(log, y);
        return Some(Local { times: Some(slope), mask: Some(mask), ..ONE });
    }
    match b.literal(exponent) {
        Some(0.0) => None,
        Some(1.0) => Some(ONE),
        Some(2.0) => Some(Local { scale: 2.0, times: Some(base), ..ONE }),
        Some(n) => {
            let less = b.c(n - 1.0);
            let slope = b.op(Op::Pow, &[base, less]);
            Some(Local { scale: n, times: Some(slope), ..ONE })
        }
        None => {
            let one = b.c(1.0);
            let less = b.minus(exponent, one);
            let slope = b.op(Op::Pow, &[base, less]);
            let slope = b.times(slope, exponent);
            Local::times(slope)
        }
    }
}

fn function(b: &mut Build, op: Op, x: Id, y: Id) -> Option<Local> {
    let one = b.c(1.0);
    match op {
        Op::Exp => Local::times(y),
        Op::Exp2 => Some(Local { scale: LN_2, times: Some(y), ..ONE }),
        Op::Log => Local::over(x),
        Op::Log2 => Some(Local { scale: 1.0 / LN_2, over: Some(x), ..ONE }),
        Op::Log10 => Some(Local { scale: 1.0 / LN_10, over: Some(x), ..ONE }),
        Op::Log1p => Local::over(b.plus(one, x)),
        Op::Expm1 => Local::times(b.plus(y, one)),
        Op::Sqrt => Some(Local { scale: 0.5, over: Some(y), ..ONE }),
        Op::Rsqrt => Some(Local { scale: -0.5, times: Some(y), over: Some(x), mask: None }),
        Op::Sin => Local::times(b.op(Op::Cos, &[x])),
        Op::Cos => {
            let sin = b.op(Op::Sin, &[x]);
            Some(Local { scale: -1.0, times: Some(sin), ..ONE })
        }
        Op::Tan => {
            let square = b.times(y, y);
            Local::times(b.plus(one, square))
        }
        Op::Asin | Op::Acos => {
            // (1 - x)(1 + x) keeps its digits near the ends.
            let (low, high) = (b.minus(one, x), b.plus(one, x));
            let product = b.times(low, high);
            let slope = b.op(Op::Rsqrt, &[product]);
            Some(Local { scale: if op == Op::Asin { 1.0 } else { -1.0 }, times: Some(slope), ..ONE })
        }
        Op::Atan => {
            let square = b.times(x, x);
            Local::over(b.plus(one, square))
        }
        Op::Tanh => {
            let square = b.times(y, y);
            Local::times(b.minus(one, square))
        }
        Op::Erf => {
            let bell = gauss(b, x, 1.0);
            Some(Local { scale: FRAC_2_SQRT_PI, times: Some(bell), ..ONE })
        }
        Op::Softplus => Local::times(b.op(Op::Sigmoid, &[x])),
        Op::Sigmoid | Op::Silu | Op::GeluTanh | Op::GeluErf | Op::Mish => {
            Local::times(activation(b, op, x, y))
        }
        _ => None,
    }
}

/// `exp(-scale x^2)`.
fn gauss(b: &mut Build, x: Id, scale: f64) -> Id {
    let square = b.times(x, x);
    let exponent = b.times_const(-scale, square);
    b.op(Op::Exp, &[exponent])
}

/// The slope of an activation, in a form that holds for large `|x|`.
fn activation(b: &mut Build, op: Op, x: Id, y: Id) -> Id {
    let one = b.c(1.0);
    match op {
        Op::Sigmoid => {
            let rest = b.minus(one, y);
            b.times(y, rest)
        }
        Op::Silu => {
            // s + y (1 - s), with s = sigmoid(x)
            let s = b.op(Op::Sigmoid, &[x]);
            let rest = b.minus(one, s);
            let bend = b.times(y, rest);
            b.plus(s, bend)
        }
        Op::GeluTanh => {
            // y = x s with s = sigmoid(2u), u = k (x + a x^3): s + y (1 - s) 2 k (1 + 3 a x^2)
            let (k, a) = (FRAC_2_PI.sqrt(), 0.044715);
            let square = b.times(x, x);
            let inner = b.times_const(a, square);
            let inner = b.plus(one, inner);
            let twice_u = b.times_const(2.0 * k, x);
            let twice_u = b.times(twice_u, inner);
            let s = b.op(Op::Sigmoid, &[twice_u]);
            let slope = b.times_const(6.0 * k * a, square);
            let offset = b.c(2.0 * k);
            let slope = b.plus(slope, offset);
            let rest = b.minus(one, s);
            let bend = b.times(y, rest);
            let bend = b.times(bend, slope);
            b.plus(s, bend)
        }
        Op::GeluErf => {
            // The normal distribution function plus x times its density.
            let arg = b.times_const(FRAC_1_SQRT_2, x);
            let erf = b.op(Op::Erf, &[arg]);
            let distribution = b.plus(one, erf);
            let distribution = b.times_const(0.5, distribution);
            let bell = gauss(b, x, 0.5);
            let density = b.times_const(0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2, bell);
            let bend = b.times(x, density);
            b.plus(distribution, bend)
        }
        _ => {
            // Mish: t + x (1 - t^2) sigmoid(x), with t = tanh(softplus(x))
            let softplus = b.op(Op::Softplus, &[x]);
            let t = b.op(Op::Tanh, &[softplus]);
            let square = b.times(t, t);
            let rest = b.minus(one, square);
            let s = b.op(Op::Sigmoid, &[x]);
            let bend = b.times(x, rest);
            let bend = b.times(bend, s);
            b.plus(t, bend)
        }
    }
}
