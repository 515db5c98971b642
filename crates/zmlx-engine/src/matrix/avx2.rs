//! Products with AVX2 and FMA.
//!
//! Every function needs `avx2`, `fma` and `f16c`, and the lengths its slices' names say; callers check both.

#![allow(clippy::needless_range_loop)] // registers are indexed: iterators hide which stay registers

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Sum of the eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum(v: __m256) -> f32 {
    let a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
}

/// Largest of the eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn max(v: __m256) -> f32 {
    let a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
}

/// Sum of the eight integers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn sum_i32(v: __m256i) -> i32 {
    let a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b01_00_11_10>(a));
    _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32::<0b10_11_00_01>(a)))
}

/// See [`super::pack::pack_row`].
///
/// # Safety
/// The instructions must be there; `group` divides `x.len()` and is a multiple of 32; `values` is as long as `x`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn pack_row(
    x: &[f32],
    group: usize,
    values: &mut [i16],
    scales: &mut [f32],
    sums: &mut [f32],
) {
    let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
    for (g, part) in x.chunks_exact(group).enumerate() {
        let (mut largest, mut odd) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for i in (0..group).step_by(8) {
            // SAFETY: `i + 8 <= group`.
            let v = unsafe { _mm256_loadu_ps(part.as_ptr().add(i)) };
            largest = _mm256_max_ps(largest, _mm256_and_ps(v, magnitude));
            odd = _mm256_or_ps(odd, _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        }
        let (scale, inverse) =
            super::portable::group_scale(max(largest), _mm256_movemask_ps(odd) != 0, 32767.0);
        scales[g] = scale;
        let (inverse, mut total) = (_mm256_set1_ps(inverse), _mm256_setzero_si256());
        for i in (0..group).step_by(16) {
            // SAFETY: `i + 16 <= group`, and `values` is as long as `x`.
            unsafe {
                let at = part.as_ptr().add(i);
                let low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at), inverse));
                let high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at.add(8)), inverse));
                total = _mm256_add_epi32(total, _mm256_add_epi32(low, high));
                let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
                _mm256_storeu_si256(values.as_mut_ptr().add(g * group + i).cast(), both);
            }
        }
        sums[g] = scale * sum_i32(total) as f32;
    }
}

/// Numbers of the formats, as constant parameters.
pub(crate) const BF16: u8 = 0;
pub(crate) const F16: u8 = 1;
pub(crate) const F32: u8 = 2;

/// Bytes an element of such a format.
pub(crate) const fn size(format: u8) -> usize {
    if format == F32 { 4 } else { 2 }
}

/// Eight numbers from `at` on: scales, or elements.
///
/// # Safety
/// Eight numbers of the format may be read from `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn load_scales<const FORMAT: u8>(at: *const u8) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe {
        match FORMAT {
            BF16 => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
            _ => _mm256_loadu_ps(at.cast()),
        }
    }
}

/// Lanes below `n`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn first_lanes(n: usize) -> __m256 {
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lanes))
}

/// One row of an affine matrix in direct products.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) codes: *const u8,
    pub(crate) scales: *const u8,
    pub(crate) biases: *const u8,
}

/// One row of activations.
#[derive(Clone, Copy)]
pub(crate) struct X {
    pub(crate) values: *const i16,
    /// Padded with zeros to a multiple of 8.
    pub(crate) scales: *const f32,
    pub(crate) sums: *const f32,
}

/// Products of both scales of `groups` groups into `out` (room for [`MOST_GROUPS`]), and the part of the result that the
/// biases give.
///
/// # Safety
/// The row has `groups` scales and biases, after which 32 bytes may be read; `x` is padded.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn group_factors<const FORMAT: u8>(row: Row, x: X, groups: usize, out: *mut f32) -> __m256 {
    let bytes = size(FORMAT);
    let mut bias = _mm256_setzero_ps();
    let mut g = 0;
    // SAFETY: the arrays are as long as promised; lanes past the end are masked.
    unsafe {
        while g < groups {
            // One line of scales serves several blocks of codes, too seldom for the hardware to fetch ahead.
            _mm_prefetch::<_MM_HINT_T0>(row.scales.wrapping_add(g * bytes + SCALES_AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(row.biases.wrapping_add(g * bytes + SCALES_AHEAD).cast());
            let mut s = load_scales::<FORMAT>(row.scales.add(g * bytes));
            let mut b = load_scales::<FORMAT>(row.biases.add(g * bytes));
            if g + 8 > groups {
                let mask = first_lanes(groups - g);
                s = _mm256_and_ps(s, mask);
                b = _mm256_and_ps(b, mask);
            }
            _mm256_storeu_ps(out.add(g), _mm256_mul_ps(s, _mm256_loadu_ps(x.scales.add(g))));
            bias = _mm256_fmadd_ps(b, _mm256_loadu_ps(x.sums.add(g)), bias);
            g += 8;
        }
    }
    bias
}

/// Most groups a row in direct products: longer rows go in pieces.
pub(crate) const MOST_GROUPS: usize = 64;

/// Bytes ahead that are asked for while scales are read.
const SCALES_AHEAD: usize = 512;

/// Bytes ahead that are asked for while a row of codes is read.
const AHEAD: usize = 2048;

/// Products of `R` rows of 8-bit codes with one row of activations in natural order; `columns` is a multiple of 32.
///
/// # Safety
/// The instructions must be there; rows, scales and activations as long as `columns` says, with 64 readable bytes after.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn dot8<const R: usize, const GROUP: usize, const FORMAT: u8>(
    rows: [Row; R],
    x: X,
    columns: usize,
) -> [f32; R] {
    let mut total = [_mm256_setzero_ps(); R];
    let mut factors = [const { MaybeUninit::<[f32; MOST_GROUPS]>::uninit() }; R];
    let mut start = 0;
    while start < columns {
        let piece = (columns - start).min(MOST_GROUPS * GROUP);
        let (g0, groups) = (start / GROUP, piece / GROUP);
        // SAFETY: within the rows, as promised.
        unsafe {
            let xs = X { values: x.values.add(start), scales: x.scales.add(g0), sums: x.sums.add(g0) };
            let mut codes = [std::ptr::null(); R];
            for r in 0..R {
                let skip = g0 * size(FORMAT);
                let row = Row {
                    codes: rows[r].codes.add(start),
                    scales: rows[r].scales.add(skip),
                    biases: rows[r].biases.add(skip),
                };
                codes[r] = row.codes;
                total[r] = _mm256_add_ps(
                    total[r],
                    group_factors::<FORMAT>(row, xs, groups, factors[r].as_mut_ptr().cast()),
                );
            }
            for g in 0..groups {
                let mut sums = [_mm256_setzero_si256(); R];
                for i in (0..GROUP).step_by(16) {
                    let x = _mm256_loadu_si256(xs.values.add(g * GROUP + i).cast());
                    for r in 0..R {
                        let from = codes[r].add(g * GROUP + i);
                        if i % 64 == 0 {
                            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
                        }
                        let v = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast()));
                        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(v, x));
                    }
                }
                for r in 0..R {
                    let factor = _mm256_broadcast_ss(&*factors[r].as_ptr().cast::<f32>().add(g));
                    total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r]), factor, total[r]);
                }
            }
        }
        start += piece;
    }
    let mut out = [0.0; R];
    for r in 0..R {
        out[r] = sum(total[r]);
    }
    out
}

/// One unpacked row: integers, a scale and a bias a group, both padded with zeros to a multiple of 8.
#[derive(Clone, Copy)]
pub(crate) struct Unpacked {
    pub(crate) codes: *const i16,
    pub(crate) scales: *const f32,
    pub(crate) biases: *const f32,
}

/// `out[r][t] = sum over groups of ws[r][g] * xs[t][g] * dot(w[r], x[t]) + wb[r][g] * sums[t][g]`, for integers in any
/// one order; `group` is a multiple of 16.
///
/// # Safety
/// The instructions must be there; rows are as long as `columns` and `group` say.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn tile<const R: usize, const T: usize>(
    w: [Unpacked; R],
    x: [X; T],
    columns: usize,
    group: usize,
) -> [[f32; T]; R] {
    let mut total = [[_mm256_setzero_ps(); T]; R];
    for g in (0..columns / group).step_by(8) {
        for r in 0..R {
            // SAFETY: both are padded to a multiple of 8.
            let bias = unsafe { _mm256_loadu_ps(w[r].biases.add(g)) };
            for t in 0..T {
                // SAFETY: as above.
                total[r][t] =
                    _mm256_fmadd_ps(bias, unsafe { _mm256_loadu_ps(x[t].sums.add(g)) }, total[r][t]);
            }
        }
    }
    for g in 0..columns / group {
        let mut sums = [[_mm256_setzero_si256(); T]; R];
        // SAFETY: within the rows, as promised.
        unsafe {
            let mut i = g * group;
            while i < (g + 1) * group {
                let mut wv = [_mm256_setzero_si256(); R];
                for r in 0..R {
                    wv[r] = _mm256_loadu_si256(w[r].codes.add(i).cast());
                }
                for t in 0..T {
                    let xv = _mm256_loadu_si256(x[t].values.add(i).cast());
                    for r in 0..R {
                        sums[r][t] = _mm256_add_epi32(sums[r][t], _mm256_madd_epi16(wv[r], xv));
                    }
                }
                i += 16;
            }
            for r in 0..R {
                for t in 0..T {
                    let factor = _mm256_mul_ps(
                        _mm256_broadcast_ss(&*w[r].scales.add(g)),
                        _mm256_broadcast_ss(&*x[t].scales.add(g)),
                    );
                    total[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][t]), factor, total[r][t]);
                }
            }
        }
    }
    let mut out = [[0.0; T]; R];
    for r in 0..R {
        for t in 0..T {
            out[r][t] = sum(total[r][t]);
        }
    }
    out
}

/// `sum(a * b)` of floats.
///
/// # Safety
/// The instructions must be there.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn dot_f32(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let mut s = [_mm256_setzero_ps(); 4];
    let mut i = 0;
    // SAFETY: `i + 8 <= n`.
    unsafe {
        while i + 32 <= n {
            for (k, s) in s.iter_mut().enumerate() {
                let at = i + 8 * k;
                *s = _mm256_fmadd_ps(
                    _mm256_loadu_ps(a.as_ptr().add(at)),
                    _mm256_loadu_ps(b.as_ptr().add(at)),
                    *s,
                );
            }
            i += 32;
        }
        while i + 8 <= n {
            s[0] =
                _mm256_fmadd_ps(_mm256_loadu_ps(a.as_ptr().add(i)), _mm256_loadu_ps(b.as_ptr().add(i)), s[0]);
            i += 8;
        }
    }
    let rest: f32 = (i..n).map(|i| a[i] * b[i]).sum();
    sum(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3]))) + rest
}

/// `sum(w * x)` of stored floats of two bytes.
///
/// # Safety
/// The instructions must be there; `w` points to `x.len()` elements with 32 readable bytes after.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn dot_stored<const FORMAT: u8>(w: *const u8, x: &[f32]) -> f32 {
    let (n, bytes) = (x.len(), size(FORMAT));
    let mut s = [_mm256_setzero_ps(); 4];
    let mut i = 0;
    // SAFETY: within the row; past its end lanes are masked, and the activations are not read there.
    unsafe {
        while i + 32 <= n {
            for (k, s) in s.iter_mut().enumerate() {
                let at = i + 8 * k;
                *s = _mm256_fmadd_ps(
                    load_scales::<FORMAT>(w.add(at * bytes)),
                    _mm256_loadu_ps(x.as_ptr().add(at)),
                    *s,
                );
            }
            i += 32;
        }
        while i + 8 <= n {
            s[0] = _mm256_fmadd_ps(
                load_scales::<FORMAT>(w.add(i * bytes)),
                _mm256_loadu_ps(x.as_ptr().add(i)),
                s[0],
            );
            i += 8;
        }
        if i < n {
            let mask = first_lanes(n - i);
            let v = _mm256_and_ps(load_scales::<FORMAT>(w.add(i * bytes)), mask);
            s[1] = _mm256_fmadd_ps(v, _mm256_maskload_ps(x.as_ptr().add(i), _mm256_castps_si256(mask)), s[1]);
        }
    }
    sum(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])))
}
