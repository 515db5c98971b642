//! Small vector functions of the stages.

use zmlx_simd::{MathFn, map};

pub(crate) use crate::matrix::dot_f32 as dot;

/// `y += a * x`.
#[inline]
pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::matrix::has_avx2() {
        // SAFETY: AVX2 and FMA are there.
        unsafe { axpy_avx2(a, x, y) };
        return;
    }
    axpy_plain(a, x, y);
}

#[inline(always)]
fn axpy_plain(a: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// # Safety
/// AVX2 and FMA must be there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn axpy_avx2(a: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = a.mul_add(*x, *y));
}

/// `f` of every element, in place.
pub(crate) fn apply(f: MathFn, x: &mut [f32], room: &mut Vec<f32>) {
    room.clear();
    room.extend_from_slice(x);
    // Both are as long.
    map(f, room, x).unwrap_or_else(|e| unreachable!("{e}"));
}

/// `x / sqrt(mean(x^2) + eps) * w` into `out`; without `w` it is 1.
pub(crate) fn rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    match weight {
        Some(w) => out.iter_mut().zip(x).zip(w).for_each(|((o, x), w)| *o = x * inverse * w),
        None => out.iter_mut().zip(x).for_each(|(o, x)| *o = x * inverse),
    }
}

/// Softmax in place; every element minus infinity gives NaN, as its formula does.
pub(crate) fn softmax(x: &mut [f32], room: &mut Vec<f32>) {
    let largest = x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    x.iter_mut().for_each(|v| *v -= largest);
    apply(MathFn::Exp, x, room);
    let total: f32 = sum(x);
    let inverse = 1.0 / total;
    x.iter_mut().for_each(|v| *v *= inverse);
}

/// Sum in eight partial sums.
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let chunks = x.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().sum();
    for c in chunks {
        for (s, v) in sums.iter_mut().zip(c) {
            *s += v;
        }
    }
    sums.iter().sum::<f32>() + rest
}
