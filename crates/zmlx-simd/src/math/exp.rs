//! exp, exp2, expm1, tanh, sigmoid.
//!
//! All start from x = n ln 2 + r with n an integer found by the add-a-big-number rounding, and a minimax polynomial
//! in r. ln 2 is split in two so that n * hi is exact with or without FMA.
//!
//! Two reductions are used:
//! * *even*: n = 2h, |r| <= ln 2. e^x = (S (1 + d)) S with S = 2^h, d = e^r - 1. Neither S nor the product leaves
//!   the normal range before the last multiplication, so overflow and gradual underflow come out right with no test.
//! * *unit*: |r| <= ln(2)/2, where d must keep its relative accuracy (expm1, tanh).

use crate::lanes::{F, MAGIC, ONE_BITS, U};
use pulp::Simd;

/// d and S of the even reduction; see the module text.
#[derive(Clone, Copy)]
pub(super) struct Scaled<S: Simd, const K: usize> {
    /// e^r - 1 for |r| <= ln 2.
    pub d: F<S, K>,
    /// The integer h shifted to the exponent field.
    pub h: U<S, K>,
}

impl<S: Simd, const K: usize> Scaled<S, K> {
    /// S = 2^h.
    #[inline(always)]
    pub fn scale(self) -> F<S, K> {
        (self.h + ONE_BITS).float()
    }

    /// 1/S = 2^-h.
    #[inline(always)]
    pub fn inv_scale(self) -> F<S, K> {
        (self.h.k(ONE_BITS) - self.h).float()
    }

    /// S (1 + d) = e^x / S.
    #[inline(always)]
    pub fn root(self) -> F<S, K> {
        let s = self.scale();
        self.d.fma_e(s, s)
    }

    /// e^x, or 0 and inf past the range.
    #[inline(always)]
    pub fn value(self) -> F<S, K> {
        self.root() * self.scale()
    }
}

/// d(r) = e^r - 1 = r + r^2 q(r), q of degree 6 on |r| <= ln 2, relative error of e^r 2^-30.24.
const EXP_EVEN: [f32; 7] =
    [0.5, 1.6666672e-1, 4.1666605e-2, 8.332655e-3, 1.3891982e-3, 2.009271e-4, 2.4548746e-5];
/// 2 ln 2 = hi + lo, hi with 15 bits.
const TWO_LN2_HI: f32 = 1.3862915;
const TWO_LN2_LO: f32 = 2.8572135e-6;
const HALF_LOG2E: f32 = 0.7213475;

/// Even reduction of hi + lo, |hi| <= 120, with lo a small correction: r, and h shifted to the exponent field.
#[inline(always)]
fn even_reduction<S: Simd, const K: usize>(hi: F<S, K>, lo: Option<F<S, K>>) -> (F<S, K>, U<S, K>) {
    let t = hi.fma_e(hi.k(HALF_LOG2E), hi.k(MAGIC)).together();
    let n = (t - MAGIC).together();
    let r = n.fma_e(n.k(-TWO_LN2_HI), hi).together();
    let r = n.fma_e(n.k(-TWO_LN2_LO), r).together();
    let r = match lo {
        Some(lo) => r + lo,
        None => r,
    };
    (r, t.bits() << 23)
}

/// e^(hi + lo), |hi| <= 120.
#[inline(always)]
pub(super) fn scaled_exp_hi_lo<S: Simd, const K: usize>(hi: F<S, K>, lo: Option<F<S, K>>) -> Scaled<S, K> {
    let (r, h) = even_reduction(hi, lo);
    Scaled { d: r.poly(EXP_EVEN).fma_e(r * r, r), h }
}

/// Even reduction of x, |x| <= 120.
#[inline(always)]
pub(super) fn scaled_exp<S: Simd, const K: usize>(x: F<S, K>) -> Scaled<S, K> {
    scaled_exp_hi_lo(x, None)
}

/// e^x for x <= 0 up to rounding (no clamp above): e^-inf = 0, NaN kept.
#[inline(always)]
pub(super) fn exp_nonpositive<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    scaled_exp(x.at_least(-105.0)).value()
}

#[inline(always)]
pub(super) fn exp<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    scaled_exp(x.at_least(-105.0).at_most(89.0)).value()
}

/// d(r) = 2^r - 1 = r p(r), degree 8 in all, on |r| <= 1, relative error of 2^r 2^-30.03.
const EXP2_EVEN: [f32; 8] = [
    6.931472e-1,
    2.402265e-1,
    5.5504113e-2,
    9.618113e-3,
    1.3332687e-3,
    1.5407457e-4,
    1.5434252e-5,
    1.3047412e-6,
];

#[inline(always)]
pub(super) fn exp2<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let x = x.at_least(-152.0).at_most(129.0);
    let t = x.fma_e(x.k(0.5), x.k(MAGIC));
    let n = t - MAGIC;
    let r = n.fma_e(n.k(-2.0), x);
    Scaled { d: r.poly(EXP2_EVEN) * r, h: t.bits() << 23 }.value()
}

/// d(r) = 2^r - 1 = r p(r), degree 6 in all, on |r| <= 0.5005, relative error of 2^r 2^-28.31.
const EXP2_UNIT: [f32; 6] =
    [6.931472e-1, 2.4022648e-1, 5.5503596e-2, 9.618502e-3, 1.3390993e-3, 1.5328148e-4];

/// 2^(hi + lo) for |hi| <= 300, with gradual underflow and overflow; used by pow.
#[inline(always)]
pub(super) fn exp2_hi_lo<S: Simd, const K: usize>(hi: F<S, K>, lo: F<S, K>) -> F<S, K> {
    let t = hi + MAGIC;
    let r = (hi - (t - MAGIC)) + lo;
    let d = r.poly(EXP2_UNIT) * r;
    // n = n1 + n2 with n1 = floor(n / 2): each half alone is a normal power of two. The bias makes n positive.
    let n = (t.bits() + 512) & 0x3ff;
    let n1 = n >> 1;
    let n2 = n - n1;
    let s1 = ((n1 - (256 - 127)) << 23).float();
    let s2 = ((n2 - (256 - 127)) << 23).float();
    d.fma_e(s1, s1) * s2
}

/// d(r) = e^r - 1 = r + r^2 q(r), q of degree 5 on |r| <= ln(2)/2, error relative to d 2^-31.10.
const EXPM1_UNIT: [f32; 6] = [0.5, 1.6666666e-1, 4.1666493e-2, 8.333546e-3, 1.3932325e-3, 1.9761804e-4];
/// ln 2 = hi + lo, hi with 14 bits.
const LN2_HI: f32 = 0.69311523;
const LN2_LO: f32 = 3.1946183e-5;
const LOG2E: f32 = core::f32::consts::LOG2_E;

/// Unit reduction: (e^r - 1, n shifted to the exponent field).
#[inline(always)]
fn unit_expm1<S: Simd, const K: usize>(x: F<S, K>) -> (F<S, K>, U<S, K>) {
    let t = x.fma_e(x.k(LOG2E), x.k(MAGIC));
    let n = t - MAGIC;
    let r = n.fma_e(n.k(-LN2_LO), n.fma_e(n.k(-LN2_HI), x));
    (r.poly(EXPM1_UNIT).fma_e(r * r, r), t.bits() << 23)
}

#[inline(always)]
pub(super) fn expm1<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    let c = x.at_least(-20.0).at_most(89.0);
    let (d, n) = unit_expm1(c);
    // S/2 rather than S = 2^n, because n reaches 128.
    let half = (n + (ONE_BITS - (1 << 23))).float();
    let y = d.fma_e(half, half - 0.5);
    let y = y + y;
    // Below 2^-25, e^x - 1 rounds to x (also keeps -0 and the denormals that the halving would lose).
    x.abs().lt(x.k(3e-8)).select(x, y)
}

#[inline(always)]
pub(super) fn tanh<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    // tanh(a) = e / (e + 2) with e = e^2a - 1; 1 from a = 9.02 on.
    let a = x.abs().at_most(9.1);
    let (d, n) = unit_expm1(a + a);
    let s = (n + ONE_BITS).float();
    let e = d.fma_e(s, s - 1.0);
    (e / (e + 2.0)).with_sign_of(x)
}

/// x / (1 + e^-w) for w >= -120 and |x| <= 120 wherever w < 0, with gradual underflow.
#[inline(always)]
pub(super) fn times_sigmoid<S: Simd, const K: usize>(x: F<S, K>, w: F<S, K>) -> F<S, K> {
    // With e^-w = 2^2h (1 + d): x 2^-h / (2^-h + 2^h (1 + d)), where nothing underflows before the quotient. From w = 17 on
    // the quotient is x; what is computed there, from an exponent out of range, is thrown away.
    let e = scaled_exp(-w);
    let inv = e.inv_scale();
    let quotient = (x * inv).together() / (e.root().together() + inv).together();
    w.gt(w.k(17.0)).select(x, quotient)
}

#[inline(always)]
pub(super) fn sigmoid<S: Simd, const K: usize>(x: F<S, K>) -> F<S, K> {
    // 2^-h / (2^-h + 2^h (1 + d)): nothing overflows, and the quotient underflows gradually.
    let e = scaled_exp((-x).at_least(-20.0).at_most(105.0));
    let inv = e.inv_scale();
    inv / (e.root() + inv)
}
