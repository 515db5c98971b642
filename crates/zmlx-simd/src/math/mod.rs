//! Vector maths: `fn f<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K]`, always inlined into the
//! caller's `WithSimd` body. K registers go through a function side by side: with four, 1.3 to 1.9 times as fast a register
//! as one alone, because a function is a chain of dependent operations.
//!
//! Units: f32 in, f32 out, angles in radians. Nothing here fails: a value outside a function's domain gives NaN, and
//! NaN in gives NaN out. Measured error bounds are in the table of the crate's front page. `S` should be the one that
//! [`crate::arch`] dispatches to.

mod activation;
mod erf;
mod exp;
mod log;
mod pow;
mod round;
mod trig;

use crate::lanes::F;
use pulp::Simd;

/// Publishes a kernel over `F` as a function over arrays of pulp's registers.
macro_rules! publish {
    ($($(#[$doc:meta])* $name:ident = $module:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
            $module::$name(F(simd, x)).1
        }
    )*};
}

publish! {
    /// e^x. inf above 88.72, gradual underflow, 0 below -103.98.
    exp = exp;
    /// 2^x. inf from 128 on, gradual underflow, 0 below -150; exact at integers.
    exp2 = exp;
    /// e^x - 1, accurate near 0. -1 at -inf; expm1(±0) = ±0.
    expm1 = exp;
    /// Hyperbolic tangent. tanh(±0) = ±0, tanh(±inf) = ±1.
    tanh = exp;
    /// 1 / (1 + e^-x). 0 at -inf with gradual underflow, 1 at inf.
    sigmoid = exp;
    /// Natural logarithm, denormals included. -inf at ±0, NaN below.
    log = log;
    /// Logarithm to base 2, exact at powers of two. -inf at ±0, NaN below.
    log2 = log;
    /// Logarithm to base 10. -inf at ±0, NaN below.
    log10 = log;
    /// log(1 + x), accurate near 0. -inf at -1, NaN below; log1p(±0) = ±0.
    log1p = log;
    /// x sigmoid(x). 0 at -inf.
    silu = activation;
    /// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), computed as x sigmoid(2u). 0 at -inf.
    gelu_tanh = activation;
    /// 0.5 x (1 + erf(x / sqrt 2)), with a small relative error in the negative tail too. 0 at -inf.
    gelu_erf = erf;
    /// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). 0 at -inf with gradual underflow, x for large x.
    softplus = activation;
    /// x tanh(softplus x) = x (n^2 + 2n) / (n^2 + 2n + 2) with n = e^x. 0 at -inf.
    mish = activation;
    /// Error function. erf(±0) = ±0, erf(±inf) = ±1.
    erf = erf;
    /// 1 - erf(x), with a small relative error in the positive tail.
    erfc = erf;
    /// Sine of radians, full range. NaN at ±inf; sin(±0) = ±0.
    sin = trig;
    /// Cosine of radians, full range. NaN at ±inf.
    cos = trig;
    /// Largest integer not above x.
    floor = round;
    /// Smallest integer not below x.
    ceil = round;
    /// Integer part, toward 0.
    trunc = round;
    /// Nearest integer, halves to even. Zero results keep the sign of x.
    round = round;
    /// 1 for x > 0, -1 for x < 0, x itself for ±0 and NaN.
    sign = round;
}

/// |x| (clears the sign bit, of NaN too).
#[inline(always)]
pub fn abs<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    F(simd, x).abs().1
}

/// Square root, correctly rounded. NaN for x < 0.
#[inline(always)]
pub fn sqrt<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    F(simd, x).sqrt().1
}

/// 1 / sqrt(x), by a true square root and division. ±inf at ±0, NaN for x < 0.
#[inline(always)]
pub fn rsqrt<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    let x = F(simd, x);
    (x.k(1.0) / x.sqrt()).1
}

/// 1 / x, correctly rounded.
#[inline(always)]
pub fn recip<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    let x = F(simd, x);
    (x.k(1.0) / x).1
}

/// x^y with the sign and special-value rules of C's `powf`: NaN for x < 0 and y not an integer, 1 for y = 0 or x = 1.
#[inline(always)]
pub fn pow<S: Simd, const K: usize>(simd: S, x: [S::f32s; K], y: [S::f32s; K]) -> [S::f32s; K] {
    pow::pow(F(simd, x), F(simd, y)).1
}

/// Publishes an operator on registers.
macro_rules! operators {
    ($($(#[$doc:meta])* $name:ident = $op:tt;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name<S: Simd, const K: usize>(simd: S, x: [S::f32s; K], y: [S::f32s; K]) -> [S::f32s; K] {
            (F(simd, x) $op F(simd, y)).1
        }
    )*};
}

operators! {
    /// x + y.
    add = +;
    /// x - y.
    sub = -;
    /// x y.
    mul = *;
}

/// x y + z with one rounding on every machine (slow where it must be emulated).
#[inline(always)]
pub fn fma<S: Simd, const K: usize>(
    simd: S,
    x: [S::f32s; K],
    y: [S::f32s; K],
    z: [S::f32s; K],
) -> [S::f32s; K] {
    F(simd, x).fma(F(simd, y), F(simd, z)).1
}
