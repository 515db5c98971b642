//! sin, cos: three-term Cody-Waite reduction by pi/2 up to |x| = 1e5, the standard library's f64 beyond.

use crate::lanes::{F, M, MAGIC};
use pulp::Simd;

/// sin r = r + r^3 P(r^2), P of degree 2 on |r| <= 1.006 pi/4, relative error 2^-27.84.
const SIN: [f32; 3] = [-1.6666654e-1, 8.332106e-3, -1.9507884e-4];
/// cos r = 1 - r^2/2 + r^4 Q(r^2), Q of degree 2, same interval, relative error 2^-32.85.
const COS: [f32; 3] = [4.1666646e-2, -1.3887304e-3, 2.4431196e-5];
/// pi/2 = a + b + c to 73 bits.
const PIO2: (f32, f32, f32) = (1.5707964, -4.371139e-8, -1.7151245e-15);
const TWO_OVER_PI: f32 = core::f32::consts::FRAC_2_PI;
/// Bound of the vector reduction: n = round(2x/pi) stays below 2^16, and r within 1.006 pi/4.
const LIMIT: f32 = 1e5;

/// sin(x + quarter pi/2), quarter being 0 or 1; also the mask of lanes that need the slow path.
#[inline(always)]
fn sin_quarter<S: Simd, const K: usize>(x: F<S, K>, quarter: u32) -> (F<S, K>, M<S, K>) {
    let huge = x.k(LIMIT).lt(x.abs());
    let t = x.fma_e(x.k(TWO_OVER_PI), x.k(MAGIC));
    let n = t - MAGIC;
    // Exact FMA: the first step cancels to an exact remainder, and the next two supply what pi/2 lacks.
    let r = n.fma(n.k(-PIO2.0), x);
    let r = n.fma(n.k(-PIO2.1), r);
    let r = n.fma(n.k(-PIO2.2), r);
    let quadrant = t.bits() + quarter;
    let r2 = r * r;
    let sin = r2.poly(SIN).fma_e(r2 * r, r);
    let cos = r2.poly(COS).fma_e(r2 * r2, r2.fma_e(r2.k(-0.5), r2.k(1.0)));
    let y = (quadrant & 1).eq(0).select(sin, cos);
    // Quadrants 2 and 3 are the negated ones.
    ((y.bits() ^ ((quadrant & 2) << 30)).float(), huge)
}

#[inline(always)]
pub(super) fn sin<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let (y, huge) = sin_quarter(x, 0);
    // r of -0 comes out as +0.
    let y = x.eq(x.k(0.0)).select(x, y);
    if huge.any() { y.patch(huge, [x, x], |x, _| f64::from(x).sin() as f32) } else { y }
}

#[inline(always)]
pub(super) fn cos<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let (y, huge) = sin_quarter(x, 1);
    if huge.any() { y.patch(huge, [x, x], |x, _| f64::from(x).cos() as f32) } else { y }
}
