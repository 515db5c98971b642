//! silu, gelu (tanh form), softplus, mish.

use super::exp::{exp_nonpositive, over_one_plus_exp, scaled_exp};
use super::log::ln_1p_unit;
use crate::lanes::F;
use pulp::Simd;

#[inline(always)]
pub(super) fn silu<S: Simd>(x: F<S>) -> F<S> {
    // x sigmoid(x) = x⁺ - a sigmoid(-a), a = |x|. Past a = 110 the last term is below the smallest denormal.
    let a = x.abs().at_most(110.0);
    x.positive_part() - over_one_plus_exp(a, a)
}

/// 2 sqrt(2/pi) and the same times 0.044715.
const GELU: (f32, f32) = (1.5957692, 7.1354814e-2);

#[inline(always)]
pub(super) fn gelu_tanh<S: Simd>(x: F<S>) -> F<S> {
    // 0.5 x (1 + tanh u) = x sigmoid(2u); 2u = 118 at a = 11.2, where the last term has vanished.
    let a = x.abs().at_most(11.2);
    let w = (a * a).fma_e(a.k(GELU.1), a.k(GELU.0)) * a;
    x.positive_part() - over_one_plus_exp(a, w)
}

#[inline(always)]
pub(super) fn softplus<S: Simd>(x: F<S>) -> F<S> {
    let tail = ln_1p_unit(exp_nonpositive(-x.abs()));
    x.at_least(0.0) + tail
}

#[inline(always)]
pub(super) fn mish<S: Simd>(x: F<S>) -> F<S> {
    // x w / (w + 2), w = n^2 + 2n, n = e^x. The last factor 2^h of n is applied at the end, for gradual underflow.
    let x = x.at_least(-110.0);
    let e = scaled_exp(x.at_most(20.0));
    let (root, s) = (e.root(), e.scale());
    let n = root * s;
    let m = n + 2.0;
    let ratio = (root * m) / n.fma_e(m, n.k(2.0));
    (x * ratio) * s
}
