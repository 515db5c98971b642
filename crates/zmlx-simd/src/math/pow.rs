//! pow(x, y) = 2^(y log2 |x|), the logarithm carried as an unevaluated sum hi + lo of two f32 (about 2^-35 relative).

use super::exp::exp2_hi_lo;
use super::log::split;
use super::round::trunc;
use crate::lanes::F;
use pulp::Simd;

/// (atanh(s)/s - 1 - s^2/3) / s^4 in powers of s^2, |s| <= 0.1718, absolute error times s^4 2^-36.76.
const ATANH_TAIL: [f32; 3] = [2.0000076e-1, 1.4273539e-1, 1.171007e-1];
/// 1/3 and 2/ln 2 as hi + lo.
const THIRD: (f32, f32) = (0.333_333_34, -9.934108e-9);
const TWO_LOG2E: (f32, f32) = (2.88539, 3.851926e-8);

/// a + b as hi + lo, given |a| >= |b| or a = 0.
#[inline(always)]
fn fast_two_sum<S: Simd, const K: usize>(a: F<S, K>, b: F<S, K>) -> (F<S, K>, F<S, K>) {
    let hi = a + b;
    (hi, b - (hi - a))
}

/// log2(x) = hi + lo for positive finite x.
#[inline(always)]
fn log2_hi_lo<S: Simd, const K: usize>(x: F<S, K>) -> (F<S, K>, F<S, K>) {
    let (k, m) = split(x);
    // s = (m - 1) / (m + 1) = s + sl, log2 m = (2 / ln 2) atanh s.
    let f = m - 1.0;
    let den = m + 1.0;
    let den_lo = m - (den - 1.0);
    let inv = den.k(1.0) / den;
    let s = f * inv;
    let sl = (-s).fma(den_lo, (-s).fma(den, f)) * inv;
    // w = s^3 / 3 as hi + lo; the rest of the series is small enough for plain f32.
    let t = s * s;
    let tl = s.fma(s, -t) + (s + s) * sl;
    let u = t * s;
    let ul = t.fma(s, -u) + t.fma_e(sl, tl * s);
    let w = u * THIRD.0;
    let wl = u.fma(u.k(THIRD.0), -w) + ul.fma_e(u.k(THIRD.0), u * THIRD.1);
    let tail = t.poly(ATANH_TAIL) * (t * u);
    let (a, al) = fast_two_sum(s, w);
    let al = al + (sl + (wl + tail));
    let l = a * TWO_LOG2E.0;
    let ll = a.fma(a.k(TWO_LOG2E.0), -l) + al.fma_e(al.k(TWO_LOG2E.0), a * TWO_LOG2E.1);
    let (hi, lo) = fast_two_sum(k, l);
    (hi, lo + ll)
}

#[inline(always)]
pub(super) fn pow<S: Simd, const K: usize>(x: F<S, K>, y: F<S, K>) -> F<S, K> {
    let ax = x.abs();
    let (hi, lo) = log2_hi_lo(ax);
    let e = y * hi;
    let el = y.fma(hi, -e) + y * lo;
    // Past the range of the result the correction may be inf - inf: clamp the sum's head and drop its tail.
    let inside = e.abs().lt(e.k(160.0));
    let el = inside.select(el, e.k(0.0));
    let magnitude = exp2_hi_lo(e.at_least(-160.0).at_most(160.0), el);

    // x < 0: NaN unless y is an integer, negative when it is odd. |y| >= 2^24 is always an even integer.
    let whole = trunc(y);
    let half = y * 0.5;
    let odd = whole.eq(y) & differ(trunc(half), half);
    let negative = x.lt(x.k(0.0));
    let signed = odd.select(-magnitude, magnitude);
    let below = whole.eq(y).select(signed, x.k(f32::NAN));
    let result = negative.select(below, magnitude);

    // Zeros, infinities and NaN follow C's table through the standard library, lane by lane.
    let inf = 0x7f80_0000;
    let rare = (ax.bits() - 1).ge(inf - 1) | y.abs().bits().ge(inf);
    if rare.any() { result.patch(rare, [x, y], f32::powf) } else { result }
}

/// a != b for numbers that are not NaN.
#[inline(always)]
fn differ<S: Simd, const K: usize>(a: F<S, K>, b: F<S, K>) -> crate::lanes::M<S, K> {
    a.lt(b) | a.gt(b)
}
