//! erf, erfc and the Gaussian error linear unit in its erf form.

use super::exp::{Scaled, scaled_exp, scaled_exp_hi_lo};
use crate::lanes::F;
use pulp::Simd;

/// erf x = x + x P(x^2), P of degree 5 on |x| <= 0.93, relative error 2^-25.76.
const ERF_SMALL: [f32; 6] =
    [1.2837915e-1, -3.761249e-1, 1.128173e-1, -2.6762916e-2, 4.9872524e-3, -5.958971e-4];
/// log(erfc t) = t P(t) - t, P of degree 5 on [0.92, 3.95], error relative to erf 2^-28.32.
const ERF_LARGE: [f32; 6] =
    [-1.2851435e-1, -6.3571835e-1, -1.0526182e-1, 2.2889959e-2, -3.2149574e-3, 2.1398556e-4];
/// (1 + 2z) e^(z^2) erfc z as a polynomial of degree 11 in u = (z-2)/(z+2), z in [0, 10.2], relative error 2^-27.24.
const ERFCX: [f32; 12] = [
    1.2769784,
    -9.2763826e-2,
    -1.6602986e-1,
    1.6405128e-1,
    -5.422586e-2,
    -8.03429e-3,
    8.743946e-3,
    1.2715491e-3,
    -1.4833407e-3,
    -4.4170156e-4,
    2.08655e-4,
    1.0891565e-4,
];

#[inline(always)]
pub(super) fn erf<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let t = x.abs().at_most(3.95);
    let e = scaled_exp(t.poly(ERF_LARGE).fma_e(t, -t)).value();
    let large = (e.k(1.0) - e).with_sign_of(x);
    let small = (x * x).poly(ERF_SMALL).fma_e(x, x);
    t.lt(t.k(0.92)).select(small, large)
}

/// e^(z^2) erfc(z) for 0 <= z <= 10.6.
#[inline(always)]
fn erfcx<S: Simd, const K: usize>(z: F<S, K>) -> F<S, K> {
    // One division serves both quotients.
    let (p, q) = (z + 2.0, z.fma_e(z.k(2.0), z.k(1.0)));
    let inv = z.k(1.0) / (p * q);
    let u = (z - 2.0) * (q * inv);
    u.poly(ERFCX) * (p * inv)
}

/// e^(-c a^2) as a scaled pair, c being 1 or 1/2. a^2 is carried to full accuracy: the tail amplifies its error.
#[inline(always)]
fn exp_minus_square<S: Simd, const K: usize>(a: F<S, K>, c: f32) -> Scaled<S, K> {
    // The head keeps 12 bits, so its square is exact on every machine.
    let head = (a.bits() & 0xffff_f000).float();
    let rest = (a - head) * (a + head);
    scaled_exp_hi_lo(head * head * (-c), Some(rest * (-c)))
}

#[inline(always)]
pub(super) fn erfc<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let z = x.abs().at_most(10.3);
    let e = exp_minus_square(z, 1.0);
    let y = (erfcx(z) * e.root()) * e.scale();
    x.lt(x.k(0.0)).select(x.k(2.0) - y, y)
}

#[inline(always)]
pub(super) fn gelu_erf<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    // x⁺ - a Q(a), a = |x|, Q the upper tail of the normal distribution: no cancellation for x < 0.
    let a = x.abs().at_most(14.9);
    let e = exp_minus_square(a, 0.5);
    let g = erfcx(a * core::f32::consts::FRAC_1_SQRT_2) * (a * 0.5);
    x.positive_part() - (g * e.root()) * e.scale()
}
