//! Functions over whole slices: one dispatch, then a loop over registers.

use crate::SimdError;
use crate::error::same_length;
use crate::lockstep::{Lockstep, Loop, Source};
use crate::{convert, math};
use pulp::{Arch, Simd};

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
                    #[derive(Clone, Copy)]
                    struct Op;
                    impl Lockstep<1> for Op {
                        #[inline(always)]
                        fn eval<S: Simd, const K: usize>(self, simd: S, [x]: [[S::f32s; K]; 1]) -> [S::f32s; K] {
                            $($path)::+(simd, x)
                        }
                    }
                    arch.dispatch(Loop::new(Op, dst, [Source::Lanes(src)]));
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

/// dst\[i\] = x\[i\] ^ y\[i\] on the given instruction set; rules as [`math::pow`].
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
pub fn map_pow_with(arch: Arch, x: &[f32], y: &[f32], dst: &mut [f32]) -> Result<(), SimdError> {
    same_length("map_pow (base)", dst.len(), x.len())?;
    same_length("map_pow (exponent)", dst.len(), y.len())?;
    #[derive(Clone, Copy)]
    struct Op;
    impl Lockstep<2> for Op {
        #[inline(always)]
        fn eval<S: Simd, const K: usize>(self, simd: S, [x, y]: [[S::f32s; K]; 2]) -> [S::f32s; K] {
            math::pow(simd, x, y)
        }
    }
    arch.dispatch(Loop::new(Op, dst, [Source::Lanes(x), Source::Lanes(y)]));
    Ok(())
}
