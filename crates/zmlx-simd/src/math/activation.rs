//! silu, gelu (tanh form), softplus, mish.

use super::exp::{exp_nonpositive, scaled_exp, times_sigmoid};
use super::log::ln_1p_unit;
use crate::lanes::F;
use pulp::Simd;

#[inline(always)]
pub(super) fn silu<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    // Below -110 the product is less than half the smallest denormal.
    let x = x.at_least(-110.0);
    times_sigmoid(x, x)
}

/// 2 sqrt(2/pi) and the same times 0.044715.
const GELU: (f32, f32) = (1.5957692, 7.1354814e-2);

#[inline(always)]
pub(super) fn gelu_tanh<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    // 0.5 x (1 + tanh u) = x sigmoid(2u); 2u = -118 at x = -11.2, where the product has vanished.
    let x = x.at_least(-11.2);
    let w = (x * x).fma_e(x.k(GELU.1), x.k(GELU.0)) * x;
    times_sigmoid(x, w)
}

#[inline(always)]
pub(super) fn softplus<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let tail = ln_1p_unit(exp_nonpositive(-x.abs()));
    x.at_least(0.0) + tail
}

#[inline(always)]
pub(super) fn mish<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    // x w / (w + 2), w = n^2 + 2n, n = e^x. The last factor 2^h of n is applied at the end, for gradual underflow.
    let x = x.at_least(-110.0);
    let e = scaled_exp(x.at_most(20.0));
    let (root, s) = (e.root(), e.scale());
    let n = root * s;
    let m = n + 2.0;
    let ratio = (root * m) / n.fma_e(m, n.k(2.0));
    (x * ratio) * s
}
