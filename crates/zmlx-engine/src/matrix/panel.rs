//! 4-bit matrices in panels of eight rows, for AVX2.
//!
//! A panel holds, group after group, the codes of eight rows, then their eight scales, then their eight biases, so that a
//! product reads one stream. Codes come in vectors of eight 32-bit words, one a row: eight codes each, as the checkpoint
//! packs them. A product keeps one row of the matrix in each lane, so that nothing is summed across lanes and scales
//! apply eight at a time. Activations are integers of two bytes. For one row of them the bytes are apart, `256 * high + low`,
//! both signed: a multiplication of bytes takes 32 codes at once, and the codes need no widening. For several rows codes are
//! widened once for all. Sums are exact in integers, so both ways give the same numbers.

#![allow(clippy::needless_range_loop)] // registers are indexed: iterators hide which stay registers

use std::arch::x86_64::*;

use super::ScaleFormat;
use crate::memory::{Bytes, Huge, OutOfMemory};

/// Rows of a panel.
pub(crate) const ROWS: usize = 8;

/// Bytes ahead that are asked for while a panel is read.
const AHEAD: usize = 4096;

/// A stack of matrices in panels.
#[derive(Debug, Clone)]
pub(crate) struct Panels {
    pub(crate) bytes: Bytes,
    pub(crate) group: usize,
    pub(crate) scale: ScaleFormat,
    pub(crate) groups: usize,
}

impl Panels {
    /// Bytes of one group of a panel.
    fn group_bytes(group: usize, scale: ScaleFormat) -> usize {
        ROWS * (group / 2 + 2 * scale.bytes())
    }

    /// Bytes of `rows` rows.
    pub(crate) fn size(rows: usize, columns: usize, group: usize, scale: ScaleFormat) -> usize {
        rows / ROWS * (columns / group) * Self::group_bytes(group, scale)
    }

    /// Fills `out` with the panels of rows whose parts are given.
    pub(crate) fn fill(
        out: &mut [u8],
        (codes, scales, biases): (&[u8], &[u8], &[u8]),
        columns: usize,
        group: usize,
        scale: ScaleFormat,
    ) {
        let (row, groups) = (columns / 2, columns / group);
        let row_scales = groups * scale.bytes();
        let panel_bytes = groups * Self::group_bytes(group, scale);
        for (p, panel) in out.chunks_exact_mut(panel_bytes).enumerate() {
            let codes = &codes[p * ROWS * row..][..ROWS * row];
            let scales = &scales[p * ROWS * row_scales..][..ROWS * row_scales];
            let biases = &biases[p * ROWS * row_scales..][..ROWS * row_scales];
            for (g, part) in panel.chunks_exact_mut(Self::group_bytes(group, scale)).enumerate() {
                let (words, rest) = part.split_at_mut(ROWS * group / 2);
                for (v, vector) in words.chunks_exact_mut(4 * ROWS).enumerate() {
                    let at = g * group / 2 + 4 * v;
                    for (r, word) in vector.chunks_exact_mut(4).enumerate() {
                        word.copy_from_slice(&codes[r * row + at..][..4]);
                    }
                }
                let n = scale.bytes();
                let (s, b) = rest.split_at_mut(ROWS * n);
                for r in 0..ROWS {
                    s[r * n..][..n].copy_from_slice(&scales[r * row_scales + g * n..][..n]);
                    b[r * n..][..n].copy_from_slice(&biases[r * row_scales + g * n..][..n]);
                }
            }
        }
    }

    /// Panels of `rows` rows (of all experts together) whose parts are given.
    pub(crate) fn new(
        parts: (&[u8], &[u8], &[u8]),
        rows: usize,
        columns: usize,
        group: usize,
        scale: ScaleFormat,
    ) -> Result<Self, OutOfMemory> {
        let mut huge = Huge::new(Self::size(rows, columns, group, scale))?;
        let (codes, scales, biases) = parts;
        // Each thread some panels.
        let panels = rows / ROWS;
        let each = panels.div_ceil(crate::memory::copying_threads(huge.len())).max(1);
        let row_scales = columns / group * scale.bytes();
        std::thread::scope(|scope| {
            let size = each * Self::size(ROWS, columns, group, scale);
            for (i, out) in huge.bytes_mut().chunks_mut(size.max(1)).enumerate() {
                let first = i * each * ROWS;
                let rows = out.len() / Self::size(ROWS, columns, group, scale) * ROWS;
                let codes = &codes[first * columns / 2..][..rows * columns / 2];
                let scales = &scales[first * row_scales..][..rows * row_scales];
                let biases = &biases[first * row_scales..][..rows * row_scales];
                scope.spawn(move || Self::fill(out, (codes, scales, biases), columns, group, scale));
            }
        });
        Ok(Self { bytes: huge.share(), group, scale, groups: columns / group })
    }

    fn panel_bytes(&self) -> usize {
        self.groups * Self::group_bytes(self.group, self.scale)
    }

    /// Where panel `p` begins.
    pub(crate) fn panel(&self, p: usize) -> &[u8] {
        &self.bytes[p * self.panel_bytes()..][..self.panel_bytes()]
    }

    /// Codes, scales and biases of row `r`, as the checkpoint has them.
    pub(crate) fn row(&self, r: usize) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let (n, lane) = (self.scale.bytes(), r % ROWS);
        let (mut codes, mut scales, mut biases) = (Vec::new(), Vec::new(), Vec::new());
        for part in self.panel(r / ROWS).chunks_exact(Self::group_bytes(self.group, self.scale)) {
            let (words, rest) = part.split_at(ROWS * self.group / 2);
            words.chunks_exact(4 * ROWS).for_each(|v| codes.extend_from_slice(&v[4 * lane..][..4]));
            scales.extend_from_slice(&rest[lane * n..][..n]);
            biases.extend_from_slice(&rest[(ROWS + lane) * n..][..n]);
        }
        (codes, scales, biases)
    }
}

/// One row of activations.
#[derive(Clone, Copy)]
pub(crate) struct X {
    /// Both bytes as one number, for several rows at a time; in each eight: 0 4 1 5 2 6 3 7.
    pub(crate) pairs: *const i16,
    /// In each eight: 0 2 4 6 1 3 5 7, the order in which codes fall out of bytes.
    pub(crate) high: *const i8,
    pub(crate) low: *const i8,
    pub(crate) scales: *const f32,
    pub(crate) sums: *const f32,
}

/// Largest magnitude of a two-byte activation: its high byte stays within -127..=127.
const LARGEST: f32 = 32639.0;

/// Packs one row into pairs and bytes, and a scale and a sum a group.
///
/// # Safety
/// AVX2 must be there; `group` is a multiple of 16 and divides `x.len()`; `pairs`, `high` and `low` are as long as `x`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn pack_row(
    x: &[f32],
    group: usize,
    (pairs, high, low): (&mut [i16], &mut [i8], &mut [i8]),
    scales: &mut [f32],
    sums: &mut [f32],
) {
    let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
    // In each half, which holds eight numbers of two bytes: the first four and the last four in turn.
    let paired = _mm256_setr_epi8(
        0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7,
        14, 15,
    );
    // In each eight of a half: even ones, then odd ones.
    let order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (g, part) in x.chunks_exact(group).enumerate() {
        let (mut largest, mut odd) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for i in (0..group).step_by(8) {
            // SAFETY: `i + 8 <= group`.
            let v = unsafe { _mm256_loadu_ps(part.as_ptr().add(i)) };
            largest = _mm256_max_ps(largest, _mm256_and_ps(v, magnitude));
            odd = _mm256_or_ps(odd, _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        }
        let (scale, inverse) =
            super::portable::group_scale(super::avx2::max(largest), _mm256_movemask_ps(odd) != 0, LARGEST);
        scales[g] = scale;
        let (inverse, mut total) = (_mm256_set1_ps(inverse), _mm256_setzero_si256());
        for i in (0..group).step_by(16) {
            // SAFETY: `i + 16 <= group`, and the bytes are as long as `x`.
            unsafe {
                let at = part.as_ptr().add(i);
                let a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at), inverse));
                let b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at.add(8)), inverse));
                total = _mm256_add_epi32(total, _mm256_add_epi32(a, b));
                let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
                let l = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(both));
                let h = _mm256_srai_epi16::<8>(_mm256_sub_epi16(both, l));
                let narrow = |v: __m256i| {
                    let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(v, v));
                    _mm_shuffle_epi8(_mm256_castsi256_si128(bytes), order)
                };
                let to = pairs.as_mut_ptr().add(g * group + i);
                _mm256_storeu_si256(to.cast(), _mm256_shuffle_epi8(both, paired));
                _mm_storeu_si128(high.as_mut_ptr().add(g * group + i).cast(), narrow(h));
                _mm_storeu_si128(low.as_mut_ptr().add(g * group + i).cast(), narrow(l));
            }
        }
        sums[g] = scale * super::avx2::sum_i32(total) as f32;
    }
}

/// Products of a panel with one row of activations: its eight rows.
///
/// # Safety
/// AVX2 must be there; the panel holds `groups` groups of `GROUP` columns, the row of activations as many.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn product<const GROUP: usize, const FORMAT: u8>(
    panel: *const u8,
    x: X,
    groups: usize,
) -> [f32; ROWS] {
    let nibble = _mm256_set1_epi8(15);
    let (ones, high_weight) = (_mm256_set1_epi16(1), _mm256_set1_epi16(256));
    let mut total = _mm256_setzero_ps();
    for g in 0..groups {
        let mut sum = _mm256_setzero_si256();
        // SAFETY: within panel and activations, as promised.
        unsafe {
            let from = panel.add(g * group_bytes::<GROUP, FORMAT>());
            // Sums of 16 products of bytes stay within 16 bits: 16 * 15 * 128 < 32768.
            for half in (0..GROUP).step_by(32) {
                let (mut h, mut l) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                for v in 0..4 {
                    let column = half + 8 * v;
                    let from = from.add(column / 8 * 32);
                    if v % 2 == 0 {
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
                    }
                    let codes = _mm256_loadu_si256(from.cast());
                    let q = [
                        _mm256_and_si256(codes, nibble),
                        _mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble),
                    ];
                    for part in 0..2 {
                        let at = g * GROUP + column + 4 * part;
                        h = _mm256_add_epi16(
                            h,
                            _mm256_maddubs_epi16(q[part], broadcast(x.high.add(at).cast())),
                        );
                        l = _mm256_add_epi16(
                            l,
                            _mm256_maddubs_epi16(q[part], broadcast(x.low.add(at).cast())),
                        );
                    }
                }
                let both = _mm256_add_epi32(_mm256_madd_epi16(h, high_weight), _mm256_madd_epi16(l, ones));
                sum = _mm256_add_epi32(sum, both);
            }
            let at = from.add(ROWS * GROUP / 2);
            // The line that the steps of 64 above leave out.
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
            let (scale, bias) = scale_and_bias::<FORMAT>(at);
            total = scaled(total, sum, scale, bias, x.scales.add(g), x.sums.add(g));
        }
    }
    let mut out = [0.0; ROWS];
    // SAFETY: room for eight.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), total) };
    out
}

/// Products of a panel with `T` rows of activations, `out[t]` those of its eight rows; the same numbers as [`product`]'s.
///
/// Codes are widened to pairs of 16 bits once for all rows. That takes one accumulator a row where bytes take three, so
/// that four rows of activations stay in registers.
///
/// # Safety
/// As for [`product`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn products<const T: usize, const GROUP: usize, const FORMAT: u8>(
    panel: *const u8,
    x: [X; T],
    groups: usize,
) -> [[f32; ROWS]; T] {
    let nibbles = _mm256_set1_epi32(0x000f_000f);
    let mut total = [_mm256_setzero_ps(); T];
    for g in 0..groups {
        let mut sum = [_mm256_setzero_si256(); T];
        // SAFETY: within panel and activations, as promised.
        unsafe {
            let from = panel.add(g * group_bytes::<GROUP, FORMAT>());
            // Sums of 128 products stay within 32 bits: 128 * 15 * 32639 < 2^31.
            for v in 0..GROUP / 8 {
                let codes = _mm256_loadu_si256(from.add(32 * v).cast());
                // Codes 0 and 4 of each row, then 1 and 5, and so on.
                let q = [
                    _mm256_and_si256(codes, nibbles),
                    _mm256_and_si256(_mm256_srli_epi32::<4>(codes), nibbles),
                    _mm256_and_si256(_mm256_srli_epi32::<8>(codes), nibbles),
                    _mm256_and_si256(_mm256_srli_epi32::<12>(codes), nibbles),
                ];
                for t in 0..T {
                    for k in 0..4 {
                        let pair = broadcast(x[t].pairs.add(g * GROUP + 8 * v + 2 * k).cast());
                        sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(q[k], pair));
                    }
                }
            }
            let (scale, bias) = scale_and_bias::<FORMAT>(from.add(ROWS * GROUP / 2));
            for t in 0..T {
                total[t] = scaled(total[t], sum[t], scale, bias, x[t].scales.add(g), x[t].sums.add(g));
            }
        }
    }
    let mut out = [[0.0; ROWS]; T];
    for t in 0..T {
        // SAFETY: room for eight.
        unsafe { _mm256_storeu_ps(out[t].as_mut_ptr(), total[t]) };
    }
    out
}

/// Bytes of a group of a panel.
const fn group_bytes<const GROUP: usize, const FORMAT: u8>() -> usize {
    ROWS * (GROUP / 2 + 2 * super::avx2::size(FORMAT))
}

/// Eight scales and eight biases.
///
/// # Safety
/// They may be read, and AVX2 is there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale_and_bias<const FORMAT: u8>(at: *const u8) -> (__m256, __m256) {
    // SAFETY: as the caller promises.
    unsafe {
        let bias = at.add(ROWS * super::avx2::size(FORMAT));
        (super::avx2::load_scales::<FORMAT>(at), super::avx2::load_scales::<FORMAT>(bias))
    }
}

/// `total + scale * (x_scale * sum) + bias * x_sum`.
///
/// # Safety
/// `x_scale` and `x_sum` may be read, and AVX2 is there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scaled(
    total: __m256,
    sum: __m256i,
    scale: __m256,
    bias: __m256,
    x_scale: *const f32,
    x_sum: *const f32,
) -> __m256 {
    // SAFETY: as the caller promises.
    let (x_scale, x_sum) = unsafe { (_mm256_broadcast_ss(&*x_scale), _mm256_broadcast_ss(&*x_sum)) };
    let total = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), x_scale), scale, total);
    _mm256_fmadd_ps(bias, x_sum, total)
}

/// Four bytes in every lane.
///
/// # Safety
/// Four bytes may be read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn broadcast(at: *const i32) -> __m256i {
    // SAFETY: as the caller promises.
    _mm256_set1_epi32(unsafe { at.read_unaligned() })
}
