//! From stored codes and scales to numbers, one row at a time, for every coding.

use half::{bf16, f16};

use super::{Coding, Float, ScaleFormat};

/// The values of e2m1, doubled.
const E2M1_TWICE: [i16; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The scales of one row as floats. Codes of e2m1 are held doubled, so their scales are halved here.
pub(crate) fn scales(bytes: &[u8], format: ScaleFormat, coding: Coding, out: &mut [f32]) {
    let two = |i: usize| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]);
    match format {
        ScaleFormat::Bf16 => {
            out.iter_mut().enumerate().for_each(|(i, o)| *o = bf16::from_bits(two(i)).to_f32())
        }
        ScaleFormat::F16 => {
            out.iter_mut().enumerate().for_each(|(i, o)| *o = f16::from_bits(two(i)).to_f32())
        }
        ScaleFormat::F32 => {
            let words = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            out.iter_mut().zip(words).for_each(|(o, w)| *o = w);
        }
        ScaleFormat::E8m0 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = e8m0(b)),
        ScaleFormat::E4m3 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = e4m3(b)),
    }
    if coding == Coding::E2m1 {
        out.iter_mut().for_each(|o| *o *= 0.5);
    }
}

/// `2^(b - 127)`; 255 is NaN.
fn e8m0(b: u8) -> f32 {
    match b {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(b) << 23),
    }
}

/// The 8-bit float with 4 exponent bits, bias 7, no infinities; 0x7f and 0xff are NaN.
pub(crate) fn e4m3(b: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(b >> 3 & 15), f32::from(b & 7));
    let magnitude = match (exponent, b & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if b & 0x80 != 0 { -magnitude } else { magnitude }
}

/// The codes of one row as integers in their natural order.
pub(crate) fn codes(bytes: &[u8], coding: Coding, out: &mut [i16]) {
    match coding {
        Coding::Affine(4) => out.chunks_exact_mut(2).zip(bytes).for_each(|(o, &b)| {
            (o[0], o[1]) = (i16::from(b & 15), i16::from(b >> 4));
        }),
        Coding::Affine(8) => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = i16::from(b)),
        Coding::Affine(bits) => {
            // Eight codes take `bits` whole bytes.
            let (mask, bits) = ((1u64 << bits) - 1, bits as usize);
            for (o, b) in out.chunks_exact_mut(8).zip(bytes.chunks_exact(bits)) {
                let word = b.iter().rev().fold(0u64, |w, &byte| w << 8 | u64::from(byte));
                o.iter_mut().enumerate().for_each(|(i, o)| *o = (word >> (i * bits) & mask) as i16);
            }
        }
        Coding::E2m1 => out.chunks_exact_mut(2).zip(bytes).for_each(|(o, &b)| {
            (o[0], o[1]) = (E2M1_TWICE[usize::from(b & 15)], E2M1_TWICE[usize::from(b >> 4)]);
        }),
        // Not small integers: this coding goes through floats.
        Coding::E4m3 => unreachable!("e4m3 rows are decoded to floats"),
    }
}

/// One row of floats.
pub(crate) fn floats(bytes: &[u8], float: Float, out: &mut [f32]) {
    let format = match float {
        Float::F32 => ScaleFormat::F32,
        Float::F16 => ScaleFormat::F16,
        Float::Bf16 => ScaleFormat::Bf16,
    };
    scales(bytes, format, Coding::Affine(8), out);
}

/// One row of a quantised matrix as floats.
pub(crate) fn row(
    codes_of_row: &[u8],
    scales_of_row: &[u8],
    biases_of_row: Option<&[u8]>,
    coding: Coding,
    format: ScaleFormat,
    group: usize,
    out: &mut [f32],
) {
    if coding == Coding::E4m3 {
        out.iter_mut().zip(codes_of_row).for_each(|(o, &b)| *o = e4m3(b));
    } else {
        let mut integers = vec![0i16; out.len()];
        codes(codes_of_row, coding, &mut integers);
        out.iter_mut().zip(integers).for_each(|(o, q)| *o = f32::from(q));
    }
    let groups = out.len() / group;
    let (mut s, mut b) = (vec![0.0; groups], vec![0.0; groups]);
    scales(scales_of_row, format, coding, &mut s);
    if let Some(bytes) = biases_of_row {
        scales(bytes, format, coding, &mut b);
    }
    for (g, part) in out.chunks_exact_mut(group).enumerate() {
        part.iter_mut().for_each(|v| *v = s[g] * *v + b[g]);
    }
}
