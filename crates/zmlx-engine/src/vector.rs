//! Small vector functions of the stages.

use half::f16;
use half::slice::HalfFloatSliceExt;
use zmlx_simd::{MathFn, map};

pub(crate) use crate::matrix::dot_f32 as dot;
#[cfg(target_arch = "x86_64")]
use crate::matrix::{F16, F32, load_scales, size};
use crate::store::Part;

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

/// One row of the delta rule: `s = g s; s = s + beta (v - s . k) k`, and gives `s . q`. The row is read twice.
#[inline]
pub(crate) fn delta_row(s: &mut [f32], [k, q]: [&[f32]; 2], g: f32, v: f32, beta: f32) -> f32 {
    let delta = (v - g * dot(s, k)) * beta;
    #[cfg(target_arch = "x86_64")]
    if crate::matrix::has_avx2() {
        // SAFETY: AVX2 and FMA are there.
        return unsafe { decay_add_dot_avx2(s, [k, q], g, delta) };
    }
    decay_add_dot(s, [k, q], g, delta, |a, b, c| a * b + c)
}

/// Sums that are taken side by side.
const SUMS: usize = 32;

/// `s = g s + a k`, and gives `s . q`; `fma(a, b, c)` is `a b + c`.
#[inline(always)]
fn decay_add_dot(
    s: &mut [f32],
    [k, q]: [&[f32]; 2],
    g: f32,
    a: f32,
    fma: impl Fn(f32, f32, f32) -> f32,
) -> f32 {
    let mut sums = [0.0; SUMS];
    let (s, s_rest) = s.as_chunks_mut::<SUMS>();
    let ((k, k_rest), (q, q_rest)) = (k.as_chunks::<SUMS>(), q.as_chunks::<SUMS>());
    let mut rest = 0.0;
    for ((s, k), q) in s_rest.iter_mut().zip(k_rest).zip(q_rest) {
        *s = fma(a, *k, g * *s);
        rest = fma(*s, *q, rest);
    }
    for ((s, k), q) in s.iter_mut().zip(k).zip(q) {
        for i in 0..SUMS {
            s[i] = fma(a, k[i], g * s[i]);
            sums[i] = fma(s[i], q[i], sums[i]);
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// # Safety
/// AVX2 and FMA must be there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn decay_add_dot_avx2(s: &mut [f32], with: [&[f32]; 2], g: f32, a: f32) -> f32 {
    decay_add_dot(s, with, g, a, f32::mul_add)
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
pub(crate) fn scores(q: &[f32], k: Part<'_>, scale: f32, out: &mut [f32]) {
    let d = q.len();
    #[cfg(target_arch = "x86_64")]
    if crate::matrix::has_avx2() && d.is_multiple_of(8) && k.len() == d * out.len() {
        // SAFETY: AVX2, FMA and F16C are there, and the lengths fit.
        unsafe {
            match k {
                Part::F32(k) => scores_avx2::<{ F32 }>(q, k.as_ptr().cast(), scale, out),
                Part::F16(k) => scores_avx2::<{ F16 }>(q, k.as_ptr().cast(), scale, out),
            }
        }
        return;
    }
    match k {
        Part::F32(k) => out.iter_mut().zip(k.chunks_exact(d)).for_each(|(o, k)| *o = scale * dot(q, k)),
        Part::F16(k) => out.iter_mut().zip(k.chunks_exact(d)).for_each(|(o, k)| {
            *o = scale * pieces(k).zip(q.chunks(PIECE)).map(|((k, n), q)| dot(q, &k[..n])).sum::<f32>();
        }),
    }
}

/// Numbers of half precision that are converted at a time.
const PIECE: usize = 64;

/// A row in pieces of float32, each with its length.
fn pieces(row: &[f16]) -> impl Iterator<Item = ([f32; PIECE], usize)> + '_ {
    row.chunks(PIECE).map(|part| {
        let mut floats = [0.0; PIECE];
        part.convert_to_f32_slice(&mut floats[..part.len()]);
        (floats, part.len())
    })
}

/// # Safety
/// AVX2, FMA and F16C must be there; `q` is a multiple of 8 wide, and `k` holds a row of that width for each of `out`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scores_avx2<const FORMAT: u8>(q: &[f32], k: *const u8, scale: f32, out: &mut [f32]) {
    use std::arch::x86_64::*;
    let (d, bytes) = (q.len(), size(FORMAT));
    for (block, out) in out.chunks_mut(4).enumerate() {
        let mut sums = [_mm256_setzero_ps(); 4];
        // SAFETY: rows past the end repeat the last.
        let row = |i: usize| unsafe { k.add((4 * block + i.min(out.len() - 1)) * d * bytes) };
        let rows = [row(0), row(1), row(2), row(3)];
        for i in (0..d).step_by(8) {
            // SAFETY: `i + 8 <= d`.
            unsafe {
                let x = _mm256_loadu_ps(q.as_ptr().add(i));
                for (s, r) in sums.iter_mut().zip(rows) {
                    *s = _mm256_fmadd_ps(x, load_scales::<FORMAT>(r.add(i * bytes)), *s);
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
pub(crate) fn weighted_sum(p: &[f32], v: Part<'_>, out: &mut [f32]) {
    let d = out.len();
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut start = 0;
    #[cfg(target_arch = "x86_64")]
    if crate::matrix::has_avx2() && v.len() == d * p.len() {
        while start + 8 <= d {
            let step = if start + 64 <= d { 64 } else { 8 };
            let out = &mut out[start..start + step];
            // SAFETY: AVX2, FMA and F16C are there, and so many columns from `start` on are within each row.
            unsafe {
                match (v, step) {
                    (Part::F32(v), 64) => {
                        weighted_sum_avx2::<8, { F32 }>(p, v.as_ptr().cast(), start, d, out)
                    }
                    (Part::F32(v), _) => weighted_sum_avx2::<1, { F32 }>(p, v.as_ptr().cast(), start, d, out),
                    (Part::F16(v), 64) => {
                        weighted_sum_avx2::<8, { F16 }>(p, v.as_ptr().cast(), start, d, out)
                    }
                    (Part::F16(v), _) => weighted_sum_avx2::<1, { F16 }>(p, v.as_ptr().cast(), start, d, out),
                }
            }
            start += step;
        }
    }
    if start == d {
        return;
    }
    let out = &mut out[start..];
    out.fill(0.0);
    match v {
        Part::F32(v) => p.iter().zip(v.chunks_exact(d)).for_each(|(p, v)| axpy(*p, &v[start..], out)),
        Part::F16(v) => p.iter().zip(v.chunks_exact(d)).for_each(|(p, v)| {
            pieces(&v[start..]).zip(out.chunks_mut(PIECE)).for_each(|((v, n), out)| axpy(*p, &v[..n], out));
        }),
    }
}

/// `8 * N` columns from `start` on.
///
/// # Safety
/// AVX2, FMA and F16C must be there; `out` is so long, and row `j` of `v` begins at element `j * stride` and has these
/// columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weighted_sum_avx2<const N: usize, const FORMAT: u8>(
    p: &[f32],
    v: *const u8,
    start: usize,
    stride: usize,
    out: &mut [f32],
) {
    use std::arch::x86_64::*;
    let bytes = size(FORMAT);
    let mut sums = [_mm256_setzero_ps(); N];
    for (j, p) in p.iter().enumerate() {
        // SAFETY: within the row.
        let row = unsafe { v.add((j * stride + start) * bytes) };
        let p = _mm256_set1_ps(*p);
        for (i, s) in sums.iter_mut().enumerate() {
            // SAFETY: within the columns.
            *s = _mm256_fmadd_ps(p, unsafe { load_scales::<FORMAT>(row.add(8 * i * bytes)) }, *s);
        }
    }
    for (i, s) in sums.iter().enumerate() {
        // SAFETY: `out` is `8 * N` long.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), *s) };
    }
}
