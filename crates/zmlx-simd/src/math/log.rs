//! log, log2, log10, log1p and the shared splitting x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt 2.

use crate::lanes::{F, ONE_BITS, U};
use pulp::Simd;

/// Bits of sqrt(1/2).
const SQRT_HALF: u32 = 0x3f35_04f3;
const OFFSET: u32 = ONE_BITS - SQRT_HALF;
/// 2^23 as bits: or-ing an integer below 2^23 into it gives the float 2^23 + integer.
const TWO23_BITS: u32 = 0x4b00_0000;

/// ln(1+f) = f + f^2 Q(f), Q of degree 8 on [sqrt(1/2)-1, sqrt(2)-1], relative error 2^-27.83.
const LN_Q: [f32; 9] = [
    -4.9999988e-1,
    3.3333325e-1,
    -2.500161e-1,
    2.0002005e-1,
    -1.6608411e-1,
    1.4180851e-1,
    -1.324806e-1,
    1.2912975e-1,
    -7.61914e-2,
];
/// log2(1+f) = f C + f^2 Q(f), same interval, relative error 2^-27.69; C = 1/ln 2 = hi + lo.
const LOG2_Q: [f32; 9] = [
    -7.2134733e-1,
    4.808982e-1,
    -3.6069867e-1,
    2.8857142e-1,
    -2.3956734e-1,
    2.0448656e-1,
    -1.9139107e-1,
    1.8708844e-1,
    -1.1025536e-1,
];
const LOG2_C: (f32, f32) = (core::f32::consts::LOG2_E, 1.925963e-8);
/// log10(1+f) = f C + f^2 Q(f), same interval, relative error 2^-27.75; C = 1/ln 10 = hi + lo.
const LOG10_Q: [f32; 9] = [
    -2.1714719e-1,
    1.4476478e-1,
    -1.08580895e-1,
    8.6868696e-2,
    -7.212285e-2,
    6.1559044e-2,
    -5.7564694e-2,
    5.6283277e-2,
    -3.3273786e-2,
];
const LOG10_C: (f32, f32) = (core::f32::consts::LOG10_E, -1.010305e-8);
/// ln 2 and log10 2 = hi + lo, hi with 14 bits so that k * hi is exact.
const LN2: (f32, f32) = (0.69311523, 3.1946183e-5);
const LOG10_2: (f32, f32) = (0.3010254, 4.605039e-6);

/// x = 2^k m for positive x (denormals too): (k, m). Garbage for x <= 0, inf and NaN.
#[inline(always)]
pub(super) fn split<S: Simd, const K: usize>(x: F<S, K>) -> (F<S, K>, F<S, K>) {
    let tiny = x.lt(x.k(f32::MIN_POSITIVE));
    let scaled = tiny.select(x * 33_554_432.0, x);
    let bias = tiny.select(x.k(8_388_608.0 + 127.0 + 25.0), x.k(8_388_608.0 + 127.0));
    let shifted: U<S, K> = scaled.bits() + OFFSET;
    let k = ((shifted >> 23) | TWO23_BITS).float() - bias;
    let m = ((shifted & 0x007f_ffff) + SQRT_HALF).float();
    (k, m)
}

/// Puts in the special values of a logarithm: -inf at 0, NaN below, inf at inf, NaN at NaN.
#[inline(always)]
fn special<S: Simd, const K: usize>(x: F<S, K>, at_zero: F<S, K>, y: F<S, K>) -> F<S, K> {
    let zero = x.k(0.0);
    let bad = at_zero.eq(zero).select(x.k(f32::NEG_INFINITY), x.k(f32::NAN));
    let y = at_zero.le(zero).select(bad, y);
    x.lt(x.k(f32::INFINITY)).select(y, x)
}

/// k ln 2 + ln(1 + f).
#[inline(always)]
fn ln_parts<S: Simd, const K: usize>(k: F<S, K>, f: F<S, K>) -> F<S, K> {
    let a = f.poly(LN_Q).fma_e(f * f, f);
    k.fma_e(k.k(LN2.0), k.fma_e(k.k(LN2.1), a))
}

/// ln(1 + e) for 0 <= e <= 1, NaN kept.
#[inline(always)]
pub(super) fn ln_1p_unit<S: Simd, const K: usize>(e: F<S, K>) -> F<S, K> {
    let big = e.gt(e.k(0.414_213_57));
    let f = big.select(e.fma_e(e.k(0.5), e.k(-0.5)), e);
    let base = big.select(e.k(core::f32::consts::LN_2), e.k(0.0));
    base + f.poly(LN_Q).fma_e(f * f, f)
}

#[inline(always)]
pub(super) fn log<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let (k, m) = split(x);
    special(x, x, ln_parts(k, m - 1.0))
}

#[inline(always)]
pub(super) fn log2<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let (k, m) = split(x);
    let f = m - 1.0;
    let g = f.poly(LOG2_Q).fma_e(f, f.k(LOG2_C.1));
    special(x, x, f.fma_e(f.k(LOG2_C.0), f * g) + k)
}

#[inline(always)]
pub(super) fn log10<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let (k, m) = split(x);
    let f = m - 1.0;
    let g = f.poly(LOG10_Q).fma_e(f, f.k(LOG10_C.1));
    let a = f.fma_e(f.k(LOG10_C.0), f * g);
    special(x, x, k.fma_e(k.k(LOG10_2.0), k.fma_e(k.k(LOG10_2.1), a)))
}

#[inline(always)]
pub(super) fn log1p<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    // k comes from the rounded 1 + x; f = 2^-k x + (2^-k - 1) then has one rounding, and none at k = 0.
    let u = x + 1.0;
    let shifted = u.bits() + OFFSET;
    let k = ((shifted >> 23) | TWO23_BITS).float() - (8_388_608.0 + 127.0);
    let exponent = (shifted & 0xff80_0000) - ONE_BITS;
    let scaled = (x.bits() - exponent).float();
    // Past k = 100 the 2^-k in (2^-k - 1) no longer matters, but its exponent field would wrap at 127.
    let inv = (x.bits().k(ONE_BITS) - exponent.min_signed(100 << 23)).float();
    let y = special(x, u, ln_parts(k, scaled + (inv - 1.0)));
    // Below 2^-25, log(1 + x) rounds to x; keeps -0.
    x.abs().lt(x.k(2.5e-8)).select(x, y)
}
