//! Functions over whole slices: one dispatch, then a loop over registers.

use crate::SimdError;
use crate::error::same_length;
use crate::{convert, math};
use pulp::{Arch, Simd, WithSimd};

/// A function of one register, as a type, so that each gets its own loop.
trait Unary {
    fn eval<S: Simd>(simd: S, x: S::f32s) -> S::f32s;
}

struct MapUnary<'a, O> {
    src: &'a [f32],
    dst: &'a mut [f32],
    op: core::marker::PhantomData<O>,
}

impl<O: Unary> WithSimd for MapUnary<'_, O> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (src, src_tail) = S::as_simd_f32s(self.src);
        let (dst, dst_tail) = S::as_mut_simd_f32s(self.dst);
        for (d, s) in dst.iter_mut().zip(src) {
            *d = O::eval(simd, *s);
        }
        if !src_tail.is_empty() {
            let y = O::eval(simd, simd.partial_load_f32s(src_tail));
            simd.partial_store_f32s(dst_tail, y);
        }
    }
}

macro_rules! math_fns {
    ($($variant:ident $name:literal = $($path:ident)::+;)*) => {
        /// The functions of one argument that [`map`] offers; see the function of the same name in [`math`]
        /// ([`convert`] for the two roundings).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum MathFn {
            $(#[doc = concat!("`", $name, "`")] $variant,)*
        }

        impl MathFn {
            /// Every function.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name, as in [`math`].
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }

        /// dst\[i\] = f(src\[i\]) on the given instruction set.
        ///
        /// # Errors
        /// [`SimdError::Length`] if the lengths differ.
        pub fn map_with(arch: Arch, f: MathFn, src: &[f32], dst: &mut [f32]) -> Result<(), SimdError> {
            same_length("map", dst.len(), src.len())?;
            match f {
                $(MathFn::$variant => {
                    struct Op;
                    impl Unary for Op {
                        #[inline(always)]
                        fn eval<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
                            $($path)::+(simd, x)
                        }
                    }
                    arch.dispatch(MapUnary::<Op> { src, dst, op: core::marker::PhantomData });
                })*
            }
            Ok(())
        }
    };
}

math_fns! {
    Exp "exp" = math::exp;
    Exp2 "exp2" = math::exp2;
    Expm1 "expm1" = math::expm1;
    Log "log" = math::log;
    Log2 "log2" = math::log2;
    Log10 "log10" = math::log10;
    Log1p "log1p" = math::log1p;
    Tanh "tanh" = math::tanh;
    Sigmoid "sigmoid" = math::sigmoid;
    Silu "silu" = math::silu;
    Softplus "softplus" = math::softplus;
    Mish "mish" = math::mish;
    GeluTanh "gelu_tanh" = math::gelu_tanh;
    GeluErf "gelu_erf" = math::gelu_erf;
    Erf "erf" = math::erf;
    Erfc "erfc" = math::erfc;
    Sin "sin" = math::sin;
    Cos "cos" = math::cos;
    Sqrt "sqrt" = math::sqrt;
    Rsqrt "rsqrt" = math::rsqrt;
    Recip "recip" = math::recip;
    Floor "floor" = math::floor;
    Ceil "ceil" = math::ceil;
    Trunc "trunc" = math::trunc;
    Round "round" = math::round;
    Sign "sign" = math::sign;
    Abs "abs" = math::abs;
    RoundToF16 "round_to_f16" = convert::round_to_f16;
    RoundToBf16 "round_to_bf16" = convert::round_to_bf16;
}

/// dst\[i\] = f(src\[i\]) on the instruction set of [`crate::arch`].
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
pub fn map(f: MathFn, src: &[f32], dst: &mut [f32]) -> Result<(), SimdError> {
    map_with(crate::arch(), f, src, dst)
}

struct Pow<'a> {
    x: &'a [f32],
    y: &'a [f32],
    dst: &'a mut [f32],
}

impl WithSimd for Pow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (x, x_tail) = S::as_simd_f32s(self.x);
        let (y, y_tail) = S::as_simd_f32s(self.y);
        let (dst, dst_tail) = S::as_mut_simd_f32s(self.dst);
        for ((d, x), y) in dst.iter_mut().zip(x).zip(y) {
            *d = math::pow(simd, *x, *y);
        }
        if !x_tail.is_empty() {
            let (x, y) = (simd.partial_load_f32s(x_tail), simd.partial_load_f32s(y_tail));
            simd.partial_store_f32s(dst_tail, math::pow(simd, x, y));
        }
    }
}

/// dst\[i\] = x\[i\] ^ y\[i\] on the given instruction set; rules as [`math::pow`].
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
pub fn map_pow_with(arch: Arch, x: &[f32], y: &[f32], dst: &mut [f32]) -> Result<(), SimdError> {
    same_length("map_pow (base)", dst.len(), x.len())?;
    same_length("map_pow (exponent)", dst.len(), y.len())?;
    arch.dispatch(Pow { x, y, dst });
    Ok(())
}
