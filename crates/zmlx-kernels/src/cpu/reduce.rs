//! Accumulators of reductions over a row.

use pulp::Simd;
use zmlx_lang::{ReduceOp, Ty};

/// The state of one reduction. Which field counts depends on the operation and the type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Acc {
    pub op: ReduceOp,
    pub ty: Ty,
    /// Float sums and products are kept in double precision between blocks.
    pub f: f64,
    pub i: i64,
    pub at: u32,
    pub empty: bool,
}

impl Acc {
    /// An empty accumulator for operands of type `ty`.
    pub fn new(op: ReduceOp, ty: Ty) -> Self {
        let (f, i) = match op {
            ReduceOp::Sum => (0.0, 0),
            ReduceOp::Prod => (1.0, 1),
            ReduceOp::Max | ReduceOp::ArgMax => (f64::NEG_INFINITY, least(ty)),
            ReduceOp::Min | ReduceOp::ArgMin => (f64::INFINITY, greatest(ty)),
        };
        Self { op, ty, f, i, at: 0, empty: true }
    }

    /// The result as the bits of a lane.
    pub fn bits(&self) -> u64 {
        if matches!(self.op, ReduceOp::ArgMax | ReduceOp::ArgMin) {
            return u64::from(self.at);
        }
        match self.ty {
            Ty::F32 => u64::from((self.f as f32).to_bits()),
            Ty::I32 | Ty::U32 | Ty::Bool => u64::from(self.i as u32),
            Ty::I64 | Ty::U64 => self.i as u64,
        }
    }

    /// Adds what another part of the row, after this one, gave.
    pub fn merge(&mut self, later: &Self) {
        if later.empty {
            return;
        }
        if self.empty {
            *self = *later;
            return;
        }
        match self.op {
            ReduceOp::Sum => {
                self.f += later.f;
                self.i = self.i.wrapping_add(later.i);
            }
            ReduceOp::Prod => {
                self.f *= later.f;
                self.i = self.i.wrapping_mul(later.i);
            }
            op => {
                if better(op, self.ty, (later.f, later.i), (self.f, self.i)) {
                    (self.f, self.i, self.at) = (later.f, later.i, later.at);
                }
            }
        }
    }

    fn take(&mut self, f: f64, i: i64, at: impl FnOnce() -> u32) {
        if self.empty || better(self.op, self.ty, (f, i), (self.f, self.i)) {
            (self.f, self.i) = (f, i);
            if matches!(self.op, ReduceOp::ArgMax | ReduceOp::ArgMin) {
                self.at = at();
            }
        }
        self.empty = false;
    }
}

fn least(ty: Ty) -> i64 {
    match ty {
        Ty::I32 => i64::from(i32::MIN),
        Ty::I64 => i64::MIN,
        _ => 0,
    }
}

fn greatest(ty: Ty) -> i64 {
    match ty {
        Ty::I32 => i64::from(i32::MAX),
        Ty::U32 => i64::from(u32::MAX),
        Ty::U64 => u64::MAX as i64,
        _ => i64::MAX,
    }
}

/// Whether `new` replaces `old`: strictly better, or the first NaN.
fn better(op: ReduceOp, ty: Ty, new: (f64, i64), old: (f64, i64)) -> bool {
    let max = matches!(op, ReduceOp::Max | ReduceOp::ArgMax);
    match ty {
        Ty::F32 => (!old.0.is_nan()) && (new.0.is_nan() || if max { new.0 > old.0 } else { new.0 < old.0 }),
        Ty::U64 => {
            let (new, old) = (new.1 as u64, old.1 as u64);
            if max { new > old } else { new < old }
        }
        _ if max => new.1 > old.1,
        _ => new.1 < old.1,
    }
}

/// Adds a block of floats that starts at column `col`.
#[inline(always)]
pub(super) fn floats<S: Simd>(simd: S, acc: &mut Acc, x: &[f32], col: usize) {
    match acc.op {
        ReduceOp::Sum => {
            acc.f += f64::from(sum(simd, x));
            acc.empty = false;
        }
        ReduceOp::Prod => {
            acc.f *= x.iter().map(|v| f64::from(*v)).product::<f64>();
            acc.empty = false;
        }
        op => {
            let max = matches!(op, ReduceOp::Max | ReduceOp::ArgMax);
            let best = extreme(simd, x, max);
            let first = || {
                let found = if best.is_nan() {
                    x.iter().position(|v| v.is_nan())
                } else {
                    x.iter().position(|v| *v == best)
                };
                (col + found.unwrap_or(0)) as u32
            };
            acc.take(f64::from(best), 0, first);
        }
    }
}

/// Adds the sum of products of two blocks. Products round on their own, as if they had been stored.
#[inline(always)]
pub(super) fn dot<S: Simd>(simd: S, acc: &mut Acc, x: &[f32], y: &[f32]) {
    let ((xv, xt), (yv, yt)) = (S::as_simd_f32s(x), S::as_simd_f32s(y));
    let zero = simd.splat_f32s(0.0);
    let mut sums = [zero; 4];
    let ((xq, xr), (yq, yr)) = (pulp::as_arrays::<4, _>(xv), pulp::as_arrays::<4, _>(yv));
    for (x, y) in xq.iter().zip(yq) {
        for k in 0..4 {
            sums[k] = simd.add_f32s(sums[k], simd.mul_f32s(x[k], y[k]));
        }
    }
    for (x, y) in xr.iter().zip(yr) {
        sums[0] = simd.add_f32s(sums[0], simd.mul_f32s(*x, *y));
    }
    if !xt.is_empty() {
        let product = simd.mul_f32s(simd.partial_load_f32s(xt), simd.partial_load_f32s(yt));
        sums[1] = simd.add_f32s(sums[1], product);
    }
    let total = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
    acc.f += f64::from(simd.reduce_sum_f32s(total));
    acc.empty = false;
}

#[inline(always)]
fn sum<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (body, tail) = S::as_simd_f32s(x);
    let zero = simd.splat_f32s(0.0);
    let mut acc = [zero; 4];
    let (quads, rest) = pulp::as_arrays::<4, _>(body);
    for [a, b, c, d] in quads {
        acc[0] = simd.add_f32s(acc[0], *a);
        acc[1] = simd.add_f32s(acc[1], *b);
        acc[2] = simd.add_f32s(acc[2], *c);
        acc[3] = simd.add_f32s(acc[3], *d);
    }
    for a in rest {
        acc[0] = simd.add_f32s(acc[0], *a);
    }
    if !tail.is_empty() {
        acc[1] = simd.add_f32s(acc[1], simd.partial_load_f32s(tail));
    }
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(acc[0], acc[1]), simd.add_f32s(acc[2], acc[3])))
}

/// The largest (or smallest), or NaN if there is one. `x` is not empty.
#[inline(always)]
fn extreme<S: Simd>(simd: S, x: &[f32], max: bool) -> f32 {
    let (body, tail) = S::as_simd_f32s(x);
    let start = if max { f32::NEG_INFINITY } else { f32::INFINITY };
    let mut best = [simd.splat_f32s(start); 4];
    // x + x is NaN only for NaN (an infinity keeps its sign), so adding up 0 * x would miss nothing but cost a
    // multiplication; comparing x with itself is as cheap and exact.
    let mut ordered = simd.equal_f32s(best[0], best[0]);
    let pick = |a: S::f32s, b: S::f32s| if max { simd.max_f32s(a, b) } else { simd.min_f32s(a, b) };
    let (quads, rest) = pulp::as_arrays::<4, _>(body);
    for q in quads {
        for k in 0..4 {
            best[k] = pick(q[k], best[k]);
            ordered = simd.and_m32s(ordered, simd.equal_f32s(q[k], q[k]));
        }
    }
    for v in rest {
        best[0] = pick(*v, best[0]);
        ordered = simd.and_m32s(ordered, simd.equal_f32s(*v, *v));
    }
    let folded = pick(pick(best[0], best[1]), pick(best[2], best[3]));
    let mut out = if max { simd.reduce_max_f32s(folded) } else { simd.reduce_min_f32s(folded) };
    // As numbers, because what pulp offers to look into a mask is not the same on every instruction set.
    let ones = simd.select_f32s(ordered, simd.splat_f32s(1.0), simd.splat_f32s(0.0));
    let nan = simd.reduce_min_f32s(ones) < 1.0;
    for v in tail {
        if v.is_nan() {
            return f32::NAN;
        }
        out = if max { out.max(*v) } else { out.min(*v) };
    }
    if nan { f32::NAN } else { out }
}

macro_rules! integers {
    ($name:ident, $t:ty) => {
        /// Adds a block of integers that starts at column `col`.
        #[inline(always)]
        pub(super) fn $name(acc: &mut Acc, x: &[$t], col: usize) {
            match acc.op {
                ReduceOp::Sum => {
                    acc.i = acc.i.wrapping_add(x.iter().fold(0 as $t, |s, v| s.wrapping_add(*v)) as i64);
                    acc.empty = false;
                }
                ReduceOp::Prod => {
                    acc.i = acc.i.wrapping_mul(x.iter().fold(1 as $t, |s, v| s.wrapping_mul(*v)) as i64);
                    acc.empty = false;
                }
                ReduceOp::Max | ReduceOp::ArgMax => {
                    let best = x.iter().copied().fold(<$t>::MIN, <$t>::max);
                    acc.take(0.0, best as i64, || {
                        (col + x.iter().position(|v| *v == best).unwrap_or(0)) as u32
                    });
                }
                ReduceOp::Min | ReduceOp::ArgMin => {
                    let best = x.iter().copied().fold(<$t>::MAX, <$t>::min);
                    acc.take(0.0, best as i64, || {
                        (col + x.iter().position(|v| *v == best).unwrap_or(0)) as u32
                    });
                }
            }
        }
    };
}

integers!(signed, i32);
integers!(unsigned, u32);
integers!(signed_wide, i64);
integers!(unsigned_wide, u64);
