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

/// `(x - mean) / sqrt(mean((x - mean)^2) + eps) * w + b` into `out`; without `w` it is 1, without `b` 0.
pub(crate) fn layer_norm(x: &[f32], weight: Option<&[f32]>, bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let mean = sum(x) / x.len() as f32;
    out.iter_mut().zip(x).for_each(|(o, x)| *o = x - mean);
    let inverse = 1.0 / (dot(out, out) / x.len() as f32 + eps).sqrt();
    out.iter_mut().for_each(|o| *o *= inverse);
    if let Some(w) = weight {
        out.iter_mut().zip(w).for_each(|(o, w)| *o *= w);
    }
    if let Some(b) = bias {
        out.iter_mut().zip(b).for_each(|(o, b)| *o += b);
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

/// Replaces scores `s` by `exp(s - m)` with `m` the largest of them; gives `m` and the sum. Without a finite score the sum
/// is 0.
pub(crate) fn exponentials(x: &mut [f32], room: &mut Vec<f32>) -> (f32, f32) {
    let largest = x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    if x.iter().all(|v| *v == f32::NEG_INFINITY) {
        return (largest, 0.0);
    }
    x.iter_mut().for_each(|v| *v -= largest);
    apply(MathFn::Exp, x, room);
    (largest, sum(x))
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

/// `out[j] = scale * q . k[j]` for the rows of `k`, each as wide as `q`.
pub(crate) fn scores(q: &[f32], k: &[f32], scale: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::matrix::has_avx2() && q.len().is_multiple_of(8) && k.len() == q.len() * out.len() {
        // SAFETY: AVX2 and FMA are there, and the lengths fit.
        unsafe { scores_avx2(q, k, scale, out) };
        return;
    }
    out.iter_mut().zip(k.chunks_exact(q.len())).for_each(|(o, k)| *o = scale * dot(q, k));
}

/// # Safety
/// AVX2 and FMA must be there; `q` is a multiple of 8 wide, and `k` holds a row of that width for each of `out`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn scores_avx2(q: &[f32], k: &[f32], scale: f32, out: &mut [f32]) {
    use std::arch::x86_64::*;
    let d = q.len();
    for (block, out) in out.chunks_mut(4).enumerate() {
        let mut sums = [_mm256_setzero_ps(); 4];
        // Rows past the end repeat the last.
        let row = |i: usize| k[(4 * block + i.min(out.len() - 1)) * d..][..d].as_ptr();
        let rows = [row(0), row(1), row(2), row(3)];
        for i in (0..d).step_by(8) {
            // SAFETY: `i + 8 <= d`.
            unsafe {
                let x = _mm256_loadu_ps(q.as_ptr().add(i));
                for (s, r) in sums.iter_mut().zip(rows) {
                    *s = _mm256_fmadd_ps(x, _mm256_loadu_ps(r.add(i)), *s);
                }
            }
        }
        let pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
        let all = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
        let mut four = [0f32; 4];
        // SAFETY: room for four.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), _mm_mul_ps(all, _mm_set1_ps(scale))) };
        let n = out.len();
        out.copy_from_slice(&four[..n]);
    }
}

/// `out = sum of p[j] * v[j]` over the rows of `v`, each as wide as `out`.
pub(crate) fn weighted_sum(p: &[f32], v: &[f32], out: &mut [f32]) {
    let d = out.len();
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut start = 0;
    #[cfg(target_arch = "x86_64")]
    if crate::matrix::has_avx2() && v.len() == d * p.len() {
        while start + 64 <= d {
            // SAFETY: AVX2 and FMA are there, and 64 columns from `start` on are within each row.
            unsafe { weighted_sum_avx2(p, &v[start..], d, &mut out[start..start + 64]) };
            start += 64;
        }
    }
    if start < d {
        let out = &mut out[start..];
        out.fill(0.0);
        for (p, v) in p.iter().zip(v.chunks_exact(d)) {
            axpy(*p, &v[start..], out);
        }
    }
}

/// 64 columns.
///
/// # Safety
/// AVX2 and FMA must be there; `out` is 64 long, and row `j` of `v` begins at `j * stride`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn weighted_sum_avx2(p: &[f32], v: &[f32], stride: usize, out: &mut [f32]) {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_ps(); 8];
    for (j, p) in p.iter().enumerate() {
        let row = v[j * stride..][..64].as_ptr();
        let p = _mm256_set1_ps(*p);
        for (i, s) in sums.iter_mut().enumerate() {
            // SAFETY: within the 64 columns.
            *s = _mm256_fmadd_ps(p, unsafe { _mm256_loadu_ps(row.add(8 * i)) }, *s);
        }
    }
    for (i, s) in sums.iter().enumerate() {
        // SAFETY: `out` is 64 long.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), *s) };
    }
}
