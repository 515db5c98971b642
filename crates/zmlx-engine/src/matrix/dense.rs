//! Products of rows of floats.

use super::product::{Scratch, Tokens};
use super::{Data, Matrix, Rows, decode, portable};
#[cfg(target_arch = "x86_64")]
use super::{
    avx2,
    product::{has_avx2, stored},
};

/// `n` rows from `first` (counted through all that are stored) on, in f32.
#[allow(clippy::too_many_arguments)]
pub(crate) fn product(
    m: &Matrix,
    data: &Data,
    first: usize,
    n: usize,
    x: Rows<'_>,
    tokens: Tokens<'_>,
    out: &mut [f32],
    stride: usize,
    scratch: &mut Scratch,
) {
    let columns = m.columns();
    let input = |t: usize| &x.floats[tokens.row(t) * columns..][..columns];
    for i in 0..n {
        let r = first + i;
        #[cfg(target_arch = "x86_64")]
        if let (Data::Dense { elements, float }, 1, true) = (data, tokens.len(), has_avx2()) {
            let bytes = columns * float.bytes();
            let from = &elements[r * bytes..][..bytes];
            out[i] = one(from, stored(*float), input(0));
            continue;
        }
        scratch.floats.resize(columns, 0.0);
        match data {
            Data::Dense { elements, float } => {
                let bytes = columns * float.bytes();
                decode::floats(&elements[r * bytes..][..bytes], *float, &mut scratch.floats);
            }
            Data::Quantized { .. } => m.stored_row(r, &mut scratch.floats),
        }
        for t in 0..tokens.len() {
            out[t * stride + i] = dot_f32(&scratch.floats, input(t));
        }
    }
}

/// One stored row times one row of activations, where AVX2 is there.
#[cfg(target_arch = "x86_64")]
fn one(row: &[u8], format: super::ScaleFormat, x: &[f32]) -> f32 {
    // SAFETY: called with AVX2 only; the row is as long as the activations, and 64 bytes after it may be read.
    unsafe {
        match format {
            super::ScaleFormat::Bf16 => avx2::dot_stored::<{ avx2::BF16 }>(row.as_ptr(), x),
            super::ScaleFormat::F16 => avx2::dot_stored::<{ avx2::F16 }>(row.as_ptr(), x),
            _ => avx2::dot_stored::<{ avx2::F32 }>(row.as_ptr(), x),
        }
    }
}

/// `sum(a * b)`.
pub(crate) fn dot_f32(a: &[f32], b: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: AVX2 is there.
        return unsafe { avx2::dot_f32(a, b) };
    }
    portable::dot_f32(a, b)
}
