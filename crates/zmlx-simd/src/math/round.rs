//! Rounding to integers and sign, over the full f32 range.

use crate::lanes::F;
use pulp::Simd;

/// Every f32 of at least this magnitude is an integer.
const TWO23: f32 = 8_388_608.0;

/// round(|x|) half to even, for |x| < 2^23.
#[inline(always)]
fn round_abs<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    (x.abs() + TWO23) - TWO23
}

/// `y` with the sign of x where |x| < 2^23, else x itself (also inf and NaN).
#[inline(always)]
fn finish<S: Simd, const K: usize>(x: F<S, K>, y: F<S, K>) -> F<S, K> {
    x.abs().lt(x.k(TWO23)).select(y.copysign(x), x)
}

#[inline(always)]
pub(super) fn round<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    finish(x, round_abs(x))
}

#[inline(always)]
pub(super) fn trunc<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let r = round_abs(x);
    let step = r.gt(x.abs()).select(r.k(1.0), r.k(0.0));
    finish(x, r - step)
}

#[inline(always)]
pub(super) fn floor<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let r = round_abs(x).copysign(x);
    let step = r.gt(x).select(r.k(1.0), r.k(0.0));
    finish(x, r - step)
}

#[inline(always)]
pub(super) fn ceil<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let r = round_abs(x).copysign(x);
    let step = r.lt(x).select(r.k(1.0), r.k(0.0));
    finish(x, r + step)
}

#[inline(always)]
pub(super) fn sign<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    // ±0 and NaN are returned as they are.
    let nonzero = x.lt(x.k(0.0)) | x.gt(x.k(0.0));
    nonzero.select(x.k(1.0).with_sign_of(x), x)
}
