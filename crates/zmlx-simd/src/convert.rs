//! Conversions between storage types, slice to slice, and rounding of f32 lanes to narrower floats.
//!
//! Every slice function takes (source, destination), runs on the instruction set of [`crate::arch`] and returns
//! [`SimdError::Length`] if the lengths differ.

use crate::SimdError;
use crate::error::same_length;
use crate::lanes::{F, U};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

/// f16 to f32, exact (F16C or the NEON conversion where present).
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
pub fn f16_to_f32(src: &[f16], dst: &mut [f32]) -> Result<(), SimdError> {
    same_length("f16_to_f32", dst.len(), src.len())?;
    src.convert_to_f32_slice(dst);
    Ok(())
}

/// f32 to f16, to nearest with ties to even; beyond 65519.99 gives inf, gradual underflow, NaN kept.
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
pub fn f32_to_f16(src: &[f32], dst: &mut [f16]) -> Result<(), SimdError> {
    same_length("f32_to_f16", dst.len(), src.len())?;
    dst.convert_from_f32_slice(src);
    Ok(())
}

/// Defines a slice conversion as a plain loop, which the compiler vectorises for the dispatched instruction set.
macro_rules! loops {
    ($($(#[$doc:meta])* $name:ident: $from:ty => $to:ty = |$x:ident| $body:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// [`SimdError::Length`] if the lengths differ.
        pub fn $name(src: &[$from], dst: &mut [$to]) -> Result<(), SimdError> {
            same_length(stringify!($name), dst.len(), src.len())?;
            crate::arch().dispatch(
                #[inline(always)]
                || {
                    for (d, &$x) in dst.iter_mut().zip(src) {
                        *d = $body;
                    }
                },
            );
            Ok(())
        }
    )*};
}

loops! {
    /// bf16 to f32, exact.
    bf16_to_f32: bf16 => f32 = |x| f32::from_bits(u32::from(x.to_bits()) << 16);
    /// f32 to bf16, to nearest with ties to even; NaN stays NaN (made quiet).
    f32_to_bf16: f32 => bf16 = |x| bf16::from_bits(bf16_bits(x));
    /// i8 to i32, value kept.
    i8_to_i32: i8 => i32 = |x| i32::from(x);
    /// u8 to u32, value kept.
    u8_to_u32: u8 => u32 = |x| u32::from(x);
    /// u8 to i32, value kept.
    u8_to_i32: u8 => i32 = |x| i32::from(x);
    /// i16 to i32, value kept.
    i16_to_i32: i16 => i32 = |x| i32::from(x);
    /// u16 to u32, value kept.
    u16_to_u32: u16 => u32 = |x| u32::from(x);
    /// u16 to i32, value kept.
    u16_to_i32: u16 => i32 = |x| i32::from(x);
    /// i32 to i8, low bits kept (wraps).
    i32_to_i8: i32 => i8 = |x| x as i8;
    /// i32 to i16, low bits kept (wraps).
    i32_to_i16: i32 => i16 = |x| x as i16;
    /// u32 to u8, low bits kept (wraps).
    u32_to_u8: u32 => u8 = |x| x as u8;
    /// u32 to u16, low bits kept (wraps).
    u32_to_u16: u32 => u16 = |x| x as u16;
    /// i32 to f32, to nearest with ties to even.
    i32_to_f32: i32 => f32 = |x| x as f32;
    /// u32 to f32, to nearest with ties to even.
    u32_to_f32: u32 => f32 = |x| x as f32;
    /// Boolean bytes to lane masks: 0 to 0, anything else to all ones.
    bool_to_mask: u8 => u32 = |x| if x != 0 { u32::MAX } else { 0 };
    /// Lane masks to boolean bytes: 0 to 0, anything else to 1.
    mask_to_bool: u32 => u8 = |x| u8::from(x != 0);
}

/// f32 to i32, toward zero; saturates, NaN gives 0.
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
pub fn f32_to_i32(src: &[f32], dst: &mut [i32]) -> Result<(), SimdError> {
    same_length("f32_to_i32", dst.len(), src.len())?;
    crate::arch().dispatch(ToInteger { src, dst: pulp::bytemuck::cast_slice_mut(dst), signed: true });
    Ok(())
}

/// f32 to u32, toward zero; saturates (negative gives 0), NaN gives 0.
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
pub fn f32_to_u32(src: &[f32], dst: &mut [u32]) -> Result<(), SimdError> {
    same_length("f32_to_u32", dst.len(), src.len())?;
    crate::arch().dispatch(ToInteger { src, dst, signed: false });
    Ok(())
}

/// The loop of both: the compiler does not vectorise a saturating cast by itself.
struct ToInteger<'a> {
    src: &'a [f32],
    dst: &'a mut [u32],
    signed: bool,
}

impl WithSimd for ToInteger<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (src, src_tail) = S::as_simd_f32s(self.src);
        let (dst, dst_tail) = S::as_mut_simd_u32s(self.dst);
        for (d, s) in dst.iter_mut().zip(src) {
            *d = to_integer(simd, *s, self.signed);
        }
        if !src_tail.is_empty() {
            simd.partial_store_u32s(
                dst_tail,
                to_integer(simd, simd.partial_load_f32s(src_tail), self.signed),
            );
        }
    }
}

/// [`to_i32`] as bits, or [`to_u32`].
#[inline(always)]
fn to_integer<S: Simd>(simd: S, x: S::f32s, signed: bool) -> S::u32s {
    if signed { pulp::cast(to_i32(simd, x)) } else { to_u32(simd, x) }
}

/// trunc(|x|) for |x| < 2^32 (garbage beyond): the mantissa, left-aligned, shifted right by its exponent.
#[inline(always)]
fn magnitude<S: Simd>(x: F<S, 1>) -> U<S, 1> {
    let bits = x.abs().bits();
    let mantissa = (bits << 8) | 0x8000_0000;
    let whole = mantissa >> (bits.k(158) - (bits >> 23));
    x.abs().lt(x.k(1.0)).select(x.k(0.0), whole.float()).bits()
}

/// Each lane to i32, toward zero; saturates, NaN gives 0 (Rust's `as`).
#[inline(always)]
pub fn to_i32<S: Simd>(simd: S, x: S::f32s) -> S::i32s {
    let x = F(simd, [x]);
    let sign = x.bits() >> 31;
    let mask = sign.k(0) - sign;
    let value = (magnitude(x) ^ mask) - mask;
    let limit = sign + 0x7fff_ffff;
    let value = x.abs().lt(x.k(2_147_483_648.0)).select(value.float(), limit.float());
    pulp::cast(x.eq(x).select(value, x.k(0.0)).1[0])
}

/// Each lane to u32, toward zero; saturates (negative gives 0), NaN gives 0 (Rust's `as`).
#[inline(always)]
pub fn to_u32<S: Simd>(simd: S, x: S::f32s) -> S::u32s {
    let x = F(simd, [x]);
    let all = x.bits().k(u32::MAX);
    let value = x.lt(x.k(4_294_967_296.0)).select(magnitude(x).float(), all.float());
    // x > 0 is false for NaN.
    x.gt(x.k(0.0)).select(value, x.k(0.0)).bits().1[0]
}

/// 2^39 as bits: its unit in the last place is 2^16, so or-ing a 16-bit h into it adds h 2^16.
const TWO39_BITS: u32 = 0x5300_0000;
/// 2^23 as bits: or-ing a 16-bit l into it adds l.
const TWO23_BITS: u32 = 0x4b00_0000;

/// Each lane to f32, to nearest with ties to even.
#[inline(always)]
pub fn from_u32<S: Simd>(simd: S, x: S::u32s) -> S::f32s {
    let x = U(simd, [x]);
    let high = ((x >> 16) | TWO39_BITS).float();
    let low = ((x & 0xffff) | TWO23_BITS).float();
    // The subtraction is exact (and takes off low's 2^23 too); the addition rounds once.
    ((high - (549_755_813_888.0 + 8_388_608.0)) + low).1[0]
}

/// Each lane to f32, to nearest with ties to even.
#[inline(always)]
pub fn from_i32<S: Simd>(simd: S, x: S::i32s) -> S::f32s {
    // x + 2^31 is unsigned; the 2^31 goes off again with the other offsets.
    let x = U(simd, [pulp::cast(x)]) ^ 0x8000_0000;
    let high = ((x >> 16) | TWO39_BITS).float();
    let low = ((x & 0xffff) | TWO23_BITS).float();
    ((high - (549_755_813_888.0 + 2_147_483_648.0 + 8_388_608.0)) + low).1[0]
}

/// The bits of f32 rounded to bf16.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    // Half a unit of the last kept bit, less one when that bit is even: carries exactly when rounding up.
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// Rounds each lane to the nearest bf16 value (ties to even), kept as f32. NaN kept.
#[inline(always)]
pub fn round_to_bf16<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    let x = F(simd, x);
    let bits = x.bits();
    let rounded = ((bits + ((bits >> 16) & 1) + 0x7fff) & 0xffff_0000).float();
    x.eq(x).select(rounded, x).1
}

/// Rounds each lane to the nearest f16 value (ties to even, overflow to inf, gradual underflow), kept as f32. NaN kept.
#[inline(always)]
pub fn round_to_f16<S: Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K] {
    let x = F(simd, x);
    let a = x.abs();
    let bits = a.bits();
    let normal = ((bits + ((bits >> 13) & 1) + 0xfff) & 0xffff_e000).float();
    // Below 2^-14 the spacing is 2^-24 throughout, which is f32's spacing just above 0.5.
    let tiny = (a + 0.5) - 0.5;
    let y = a.lt(a.k(6.103_515_6e-5)).select(tiny, normal);
    let y = y.lt(y.k(65_536.0)).select(y, y.k(f32::INFINITY));
    x.eq(x).select(y.with_sign_of(x), x).1
}
