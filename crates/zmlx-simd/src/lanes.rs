//! Operator syntax over SIMD registers, so that the kernels read like their formulas.
//!
//! `F` is K registers of f32, `U` the same registers seen as u32, `M` their lane masks. Every method is one instruction
//! a register (or a documented few) and is always inlined into the caller's `pulp::WithSimd` body.
//!
//! The K registers go through a function in lockstep: a polynomial is one long chain of dependent operations, of which a
//! core's scheduler holds only a few at a time, and several chains side by side keep its units busy.

use core::any::TypeId;
use core::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Shl, Shr, Sub};
use pulp::Simd;

/// K registers of f32 lanes.
#[derive(Clone, Copy)]
pub(crate) struct F<S: Simd, const K: usize>(pub S, pub [S::f32s; K]);

/// K registers of u32 lanes.
#[derive(Clone, Copy)]
pub(crate) struct U<S: Simd, const K: usize>(pub S, pub [S::u32s; K]);

/// K lane masks.
#[derive(Clone, Copy)]
pub(crate) struct M<S: Simd, const K: usize>(pub S, pub [S::m32s; K]);

/// `[e(0), e(1), ...]`: a loop, because a closure would not inherit the instruction set of its caller.
macro_rules! each {
    ($i:ident => $e:expr) => {{
        let $i = 0;
        let mut out = [$e; K];
        let mut $i = 1;
        while $i < K {
            out[$i] = $e;
            $i += 1;
        }
        out
    }};
}

/// 1.5 * 2^23: adding it to |x| < 2^22 rounds x to an integer (half to even) that sits in the low mantissa bits.
pub(crate) const MAGIC: f32 = 12_582_912.0;
/// The bits of 1.0f32.
pub(crate) const ONE_BITS: u32 = 0x3f80_0000;
const SIGN: u32 = 0x8000_0000;

/// Whether `min`/`max` of this instruction set return the number when one argument is NaN (as `f32::min` does).
///
/// All hardware sets used here keep a NaN in the second argument; pulp's emulated ones go through `f32::min`.
/// The answer is a constant of the type, so the test costs nothing at run time.
#[inline(always)]
fn min_drops_nan<S: Simd>() -> bool {
    let id = TypeId::of::<S>();
    S::IS_SCALAR
        || id == TypeId::of::<pulp::Scalar128b>()
        || id == TypeId::of::<pulp::Scalar256b>()
        || id == TypeId::of::<pulp::Scalar512b>()
}

impl<S: Simd, const K: usize> F<S, K> {
    /// `v` in every lane.
    #[inline(always)]
    pub fn k(self, v: f32) -> Self {
        Self(self.0, [self.0.splat_f32s(v); K])
    }

    /// `self * b + c`, fused where the machine has FMA.
    #[inline(always)]
    pub fn fma_e(self, b: Self, c: Self) -> Self {
        Self(self.0, each!(i => self.0.mul_add_e_f32s(self.1[i], b.1[i], c.1[i])))
    }

    /// `self * b + c` with one rounding on every machine (slow where it must be emulated).
    #[inline(always)]
    pub fn fma(self, b: Self, c: Self) -> Self {
        Self(self.0, each!(i => self.0.mul_add_f32s(self.1[i], b.1[i], c.1[i])))
    }

    /// The lanes' bits.
    #[inline(always)]
    pub fn bits(self) -> U<S, K> {
        U(self.0, each!(i => pulp::cast(self.1[i])))
    }

    /// |self|.
    #[inline(always)]
    pub fn abs(self) -> Self {
        (self.bits() & !SIGN).float()
    }

    /// |self| with the sign of `s`.
    #[inline(always)]
    pub fn copysign(self, s: Self) -> Self {
        ((self.bits() & !SIGN) | (s.bits() & SIGN)).float()
    }

    /// |self| given that self has no sign bit, with the sign of `s`.
    #[inline(always)]
    pub fn with_sign_of(self, s: Self) -> Self {
        (self.bits() | (s.bits() & SIGN)).float()
    }

    /// min(self, c), NaN kept.
    #[inline(always)]
    pub fn at_most(self, c: f32) -> Self {
        let c = self.k(c);
        if min_drops_nan::<S>() {
            self.gt(c).select(c, self)
        } else {
            Self(self.0, each!(i => self.0.min_f32s(c.1[i], self.1[i])))
        }
    }

    /// max(self, c), NaN kept.
    #[inline(always)]
    pub fn at_least(self, c: f32) -> Self {
        let c = self.k(c);
        if min_drops_nan::<S>() {
            self.lt(c).select(c, self)
        } else {
            Self(self.0, each!(i => self.0.max_f32s(c.1[i], self.1[i])))
        }
    }

    /// self < b (false for NaN).
    #[inline(always)]
    pub fn lt(self, b: Self) -> M<S, K> {
        M(self.0, each!(i => self.0.less_than_f32s(self.1[i], b.1[i])))
    }

    /// self <= b (false for NaN).
    #[inline(always)]
    pub fn le(self, b: Self) -> M<S, K> {
        M(self.0, each!(i => self.0.less_than_or_equal_f32s(self.1[i], b.1[i])))
    }

    /// self > b (false for NaN).
    #[inline(always)]
    pub fn gt(self, b: Self) -> M<S, K> {
        M(self.0, each!(i => self.0.greater_than_f32s(self.1[i], b.1[i])))
    }

    /// self == b (false for NaN, +0 == -0).
    #[inline(always)]
    pub fn eq(self, b: Self) -> M<S, K> {
        M(self.0, each!(i => self.0.equal_f32s(self.1[i], b.1[i])))
    }

    /// Correctly rounded square root.
    #[inline(always)]
    pub fn sqrt(self) -> Self {
        Self(self.0, each!(i => self.0.sqrt_f32s(self.1[i])))
    }

    /// Polynomial c[0] + c[1] x + ... by Horner's rule.
    #[inline(always)]
    pub fn poly<const N: usize>(self, c: [f32; N]) -> Self {
        let mut p = self.k(c[N - 1]);
        for i in (0..N - 1).rev() {
            p = p.fma_e(self, self.k(c[i])).together();
        }
        p
    }

    /// The same registers, with all of them computed before anything that uses one: without it, the compiler sorts the
    /// chains of a polynomial one after another, to save registers, and the core is left waiting for each in turn.
    #[inline(always)]
    pub fn together(mut self) -> Self {
        crate::together::together::<S, K>(&mut self.1);
        self
    }

    /// x where x is +0 or above (or NaN, or -0), and -0 below: the x⁺ of `x⁺ - |x| s(|x|)`, which keeps signed zeros.
    #[inline(always)]
    pub fn positive_part(self) -> Self {
        self.lt(self.k(0.0)).select(self.k(-0.0), self)
    }

    /// Applies a scalar function to the lanes where `mask` holds and leaves the others of `self` alone. Slow path.
    #[inline(always)]
    pub fn patch(self, mask: M<S, K>, inputs: [Self; 2], f: fn(f32, f32) -> f32) -> Self {
        const MAX: usize = 64;
        let n = S::F32_LANES;
        let flag = mask.select(self.k(1.0), self.k(0.0));
        let mut out = self.1;
        for (i, out) in out.iter_mut().enumerate() {
            let (mut m, mut a, mut b, mut y) = ([0.0f32; MAX], [0.0f32; MAX], [0.0f32; MAX], [0.0f32; MAX]);
            self.0.partial_store_f32s(&mut m[..n], flag.1[i]);
            self.0.partial_store_f32s(&mut a[..n], inputs[0].1[i]);
            self.0.partial_store_f32s(&mut b[..n], inputs[1].1[i]);
            self.0.partial_store_f32s(&mut y[..n], self.1[i]);
            patch_lanes(&m[..n], &a[..n], &b[..n], &mut y[..n], f);
            *out = self.0.partial_load_f32s(&y[..n]);
        }
        Self(self.0, out)
    }
}

/// The scalar loop of [`F::patch`], kept out of line: it is rare and would only bloat the hot code.
#[cold]
#[inline(never)]
fn patch_lanes(m: &[f32], a: &[f32], b: &[f32], y: &mut [f32], f: fn(f32, f32) -> f32) {
    for (((&m, &a), &b), y) in m.iter().zip(a).zip(b).zip(y) {
        if m != 0.0 {
            *y = f(a, b);
        }
    }
}

impl<S: Simd, const K: usize> U<S, K> {
    /// `v` in every lane.
    #[inline(always)]
    pub fn k(self, v: u32) -> Self {
        Self(self.0, [self.0.splat_u32s(v); K])
    }

    /// The lanes as f32 bits.
    #[inline(always)]
    pub fn float(self) -> F<S, K> {
        F(self.0, each!(i => pulp::cast(self.1[i])))
    }

    /// min(self, c) as signed integers.
    #[inline(always)]
    pub fn min_signed(self, c: i32) -> Self {
        let c = self.0.splat_i32s(c);
        Self(self.0, each!(i => pulp::cast(self.0.min_i32s(pulp::cast(self.1[i]), c))))
    }

    /// self == c.
    #[inline(always)]
    pub fn eq(self, c: u32) -> M<S, K> {
        let c = self.0.splat_u32s(c);
        M(self.0, each!(i => self.0.equal_u32s(self.1[i], c)))
    }

    /// self >= c as unsigned integers.
    #[inline(always)]
    pub fn ge(self, c: u32) -> M<S, K> {
        let c = self.0.splat_u32s(c);
        M(self.0, each!(i => self.0.greater_than_or_equal_u32s(self.1[i], c)))
    }
}

impl<S: Simd, const K: usize> M<S, K> {
    /// `a` where the mask holds, else `b`.
    #[inline(always)]
    pub fn select(self, a: F<S, K>, b: F<S, K>) -> F<S, K> {
        let (a, b) = (a.bits(), b.bits());
        U(self.0, each!(i => self.0.select_u32s(self.1[i], a.1[i], b.1[i]))).float()
    }

    /// Whether any lane holds.
    #[inline(always)]
    pub fn any(self) -> bool {
        let mut all = self.1[0];
        for m in &self.1[1..] {
            all = self.0.or_m32s(all, *m);
        }
        self.0.first_true_m32s(all) < S::F32_LANES
    }
}

impl<S: Simd, const K: usize> BitOr for M<S, K> {
    type Output = Self;
    #[inline(always)]
    fn bitor(self, b: Self) -> Self {
        Self(self.0, each!(i => self.0.or_m32s(self.1[i], b.1[i])))
    }
}

impl<S: Simd, const K: usize> BitAnd for M<S, K> {
    type Output = Self;
    #[inline(always)]
    fn bitand(self, b: Self) -> Self {
        Self(self.0, each!(i => self.0.and_m32s(self.1[i], b.1[i])))
    }
}

impl<S: Simd, const K: usize> Neg for F<S, K> {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        (self.bits() ^ self.bits().k(SIGN)).float()
    }
}

/// Implements an operator registers-registers and registers-constant.
macro_rules! operator {
    ($reg:ident, $elem:ty, $trait:ident, $method:ident, $op:ident) => {
        impl<S: Simd, const K: usize> $trait for $reg<S, K> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, b: Self) -> Self {
                Self(self.0, each!(i => self.0.$op(self.1[i], b.1[i])))
            }
        }
        impl<S: Simd, const K: usize> $trait<$elem> for $reg<S, K> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, b: $elem) -> Self {
                self.$method(self.k(b))
            }
        }
    };
}
operator!(F, f32, Add, add, add_f32s);
operator!(F, f32, Sub, sub, sub_f32s);
operator!(F, f32, Mul, mul, mul_f32s);
operator!(F, f32, Div, div, div_f32s);
operator!(U, u32, Add, add, add_u32s);
operator!(U, u32, Sub, sub, sub_u32s);
operator!(U, u32, BitAnd, bitand, and_u32s);
operator!(U, u32, BitOr, bitor, or_u32s);
operator!(U, u32, BitXor, bitxor, xor_u32s);
operator!(U, u32, Shl, shl, wrapping_dyn_shl_u32s);
operator!(U, u32, Shr, shr, wrapping_dyn_shr_u32s);
