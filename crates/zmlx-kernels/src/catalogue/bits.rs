//! Booleans as bits, the lowest first.

use zmlx_lang::Dtype;
use zmlx_mlx::Array;

use super::case::{Case, Input};
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::Result;

const PACK: &str = "pack_bits(x: array[1]) -> (packed: u8) =
  let i = index(0) * 8;
  i32(x[i] != 0) | i32(x[i + 1] != 0) << 1 | i32(x[i + 2] != 0) << 2 | i32(x[i + 3] != 0) << 3
    | i32(x[i + 4] != 0) << 4 | i32(x[i + 5] != 0) << 5 | i32(x[i + 6] != 0) << 6 | i32(x[i + 7] != 0) << 7";

const UNPACK: &str = "unpack_bits(x: array[1] u8) -> (bits: u8) = x[index(0) >> 3] >> (index(0) & 7) & 1";

pub(super) fn entries() -> Vec<Entry> {
    let pack = || {
        let one = |bytes: i32| {
            let x = Input::mask(&[8 * bytes], 0.5, 1);
            Case::new(format!("{bytes} bytes"), vec![x]).domain(&[bytes])
        };
        let numbers = Input::floats(&[16], |i| if i % 3 == 0 { 0.0 } else { i as f64 - 8.0 });
        let numbers = Case::new("floats", vec![numbers]).domain(&[2]);
        vec![one(1), one(5), one(300), one(0), numbers]
    };
    let unpack = || {
        let one = |bytes: i32| {
            let x = Input::ints(Dtype::U8, &[bytes], |i| (i as i64 * 151 + 77) % 256);
            Case::new(format!("{bytes} bytes"), vec![x]).domain(&[8 * bytes])
        };
        vec![one(1), one(5), one(300), one(0)]
    };
    vec![
        Entry::text(Domain::Bits, PACK, "bit i of byte b is x[8 b + i] != 0", pack, |a, _| {
            let shifts = Array::from_slice(&[1i32, 2, 4, 8, 16, 32, 64, 128], &[8])?;
            let zero = Array::scalar_as(0.0, a[0].dtype())?;
            let bits =
                a[0].not_equal(&zero)?.astype(zmlx_mlx::Dtype::Int32)?.reshape(&[a[0].dim(0)? / 8, 8])?;
            Ok(vec![bits.multiply(&shifts)?.sum(&[-1], false)?.astype(zmlx_mlx::Dtype::Uint8)?])
        })
        .dtypes("any to u8")
        .no_gradient("bits do not change smoothly"),
        Entry::text(Domain::Bits, UNPACK, "x[i / 8] >> (i % 8) & 1", unpack, |a, _| {
            let shifts = Array::from_slice(&[0u8, 1, 2, 3, 4, 5, 6, 7], &[1, 8])?;
            let bytes = a[0].expand_dims(&[1])?.right_shift(&shifts)?;
            Ok(vec![bytes.bitwise_and(&Array::scalar(1u8)?)?.reshape(&[8 * a[0].dim(0)?])?])
        })
        .dtypes("u8")
        .no_gradient("bits do not change smoothly"),
    ]
}

/// Packs 8 elements into a `u8`: bit `i` of byte `b` is `x[8 b + i] != 0`, over the elements in row-major order.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when the number of elements is not a multiple of 8.
pub fn pack_bits(x: &Array) -> Result<Array> {
    let size = i32::try_from(x.size()).unwrap_or(i32::MAX);
    if size % 8 != 0 {
        return Err(argument("pack_bits", format!("{size} elements are not a multiple of 8")));
    }
    kernel("pack_bits")?.bind(&[&x.reshape(&[size])?]).domain(&[size / 8]).run1()
}

/// The bits of bytes as `u8` of 0 and 1, lowest first: `[8 n]` for `n` elements of `x` (`u8`).
///
/// # Errors
/// When `x` is not of `u8`; [`Error::Argument`](crate::Error::Argument) for more than 2^28 bytes.
pub fn unpack_bits(x: &Array) -> Result<Array> {
    let size = i32::try_from(x.size()).ok();
    let Some((size, bits)) = size.and_then(|n| Some((n, n.checked_mul(8)?))) else {
        return Err(argument("unpack_bits", format!("{} bytes are too many", x.size())));
    };
    kernel("unpack_bits")?.bind(&[&x.reshape(&[size])?]).domain(&[bits]).run1()
}
