//! Products: which kernel takes which matrix.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::{Coding, Float, ScaleFormat, avx2, panel};
use super::{Data, Layout, Matrix, Rows, Stored, decode, dense, portable};

/// Whether AVX2, FMA and half-precision conversions are there and not ruled out by `ZMLX_SIMD`.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    static HAS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *HAS.get_or_init(|| {
        let wanted = matches!(zmlx_simd::isa_name(), "avx2" | "avx512");
        wanted
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    })
}

/// Rows of activations that a product takes.
#[derive(Debug, Clone, Copy)]
pub enum Tokens<'a> {
    /// The first so many from a row on.
    Run(usize, usize),
    /// These.
    List(&'a [u32]),
}

impl Tokens<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Run(_, n) => *n,
            Self::List(list) => list.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The row of number `i`.
    pub fn row(&self, i: usize) -> usize {
        match self {
            Self::Run(first, _) => first + i,
            Self::List(list) => list[i] as usize,
        }
    }
}

/// Room that products need while they run; one a thread.
#[derive(Debug, Default)]
pub struct Scratch {
    codes: Vec<i16>,
    pub(crate) floats: Vec<f32>,
    scales: Vec<f32>,
    biases: Vec<f32>,
    /// Rows of activations that are stored, and their products.
    terms: (Vec<u32>, Vec<f32>),
}

/// From this many tokens on, rows are unpacked once for all of them.
#[cfg(target_arch = "x86_64")]
const UNPACK_FROM: usize = 3;

/// Rows that are unpacked together: their integers should stay in the second-level cache.
const UNPACKED_ROWS: usize = 16;

impl Matrix {
    /// `out[t * stride + i] = x[tokens[t]] . w[expert][rows[i]]`, with `x` in the matrix's [`Layout`].
    ///
    /// # Panics
    /// If rows, tokens or `out` are not within what was made.
    #[allow(clippy::too_many_arguments)]
    pub fn product(
        &self,
        expert: usize,
        rows: Range<usize>,
        x: Rows<'_>,
        tokens: Tokens<'_>,
        out: &mut [f32],
        stride: usize,
        scratch: &mut Scratch,
    ) {
        assert!(
            expert < self.experts && rows.start <= rows.end && rows.end <= self.rows,
            "rows within the matrix"
        );
        assert!(x.columns == self.columns, "activations as wide as the matrix");
        if tokens.is_empty() || rows.is_empty() {
            return;
        }
        assert!((tokens.len() - 1) * stride + rows.len() <= out.len(), "room for the product");
        if self.layout().terms() == 1 {
            return self.product_of_terms(expert, rows, x, tokens, out, stride, scratch);
        }
        // The rows that stand for a token lie next to each other, and so do their products.
        let n = rows.len();
        let (mut stored, mut made) = std::mem::take(&mut scratch.terms);
        stored.clear();
        stored.extend((0..tokens.len()).map(|t| 2 * tokens.row(t) as u32).flat_map(|row| [row, row + 1]));
        made.resize(stored.len() * n, 0.0);
        self.product_of_terms(expert, rows, x, Tokens::List(&stored), &mut made, n, scratch);
        for (t, both) in made.chunks_exact(2 * n).enumerate() {
            let (first, second) = both.split_at(n);
            let out = &mut out[t * stride..][..n];
            out.iter_mut().zip(first.iter().zip(second)).for_each(|(y, (a, b))| *y = a + b);
        }
        scratch.terms = (stored, made);
    }

    /// As [`Self::product`], for rows of activations as they are stored.
    #[allow(clippy::too_many_arguments)]
    fn product_of_terms(
        &self,
        expert: usize,
        rows: Range<usize>,
        x: Rows<'_>,
        tokens: Tokens<'_>,
        out: &mut [f32],
        stride: usize,
        scratch: &mut Scratch,
    ) {
        let (first, n) = (self.first + expert * self.rows + rows.start, rows.len());
        let data = match &self.data {
            #[cfg(target_arch = "x86_64")]
            Stored::Panels(panels) => {
                assert!(
                    rows.start.is_multiple_of(panel::ROWS) && n.is_multiple_of(panel::ROWS),
                    "whole panels"
                );
                return in_panels(panels, first / panel::ROWS, n / panel::ROWS, x, tokens, out, stride);
            }
            Stored::Outline { .. } => {
                for t in 0..tokens.len() {
                    out[t * stride..][..n].fill(f32::NAN);
                }
                return;
            }
            Stored::Rows(data) => data,
        };
        match self.layout() {
            Layout::Integers { group, .. } => {
                #[cfg(target_arch = "x86_64")]
                if tokens.len() < UNPACK_FROM
                    && has_avx2()
                    && self.direct(data, first, n, x, tokens, out, stride)
                {
                    return;
                }
                for start in (0..n).step_by(UNPACKED_ROWS) {
                    let n = UNPACKED_ROWS.min(n - start);
                    self.unpack(data, first + start, n, scratch);
                    self.unpacked(n, group, x, tokens, &mut out[start..], stride, scratch);
                }
            }
            _ => dense::product(self, data, first, n, x, tokens, out, stride, scratch),
        }
    }

    /// Products straight from the packed codes; false where there is no such kernel.
    #[cfg(target_arch = "x86_64")]
    #[allow(clippy::too_many_arguments)]
    fn direct(
        &self,
        data: &Data,
        first: usize,
        n: usize,
        x: Rows<'_>,
        tokens: Tokens<'_>,
        out: &mut [f32],
        stride: usize,
    ) -> bool {
        let Data::Quantized {
            codes,
            scales,
            biases: Some(biases),
            coding: Coding::Affine(bits),
            scale,
            group,
        } = data
        else {
            return false;
        };
        if *bits != 8 {
            return false;
        }
        let groups = self.columns / group;
        let row = |i: usize| {
            let r = first + i;
            avx2::Row {
                codes: codes[r * self.columns * *bits as usize / 8..].as_ptr(),
                scales: scales[r * groups * scale.bytes()..].as_ptr(),
                biases: biases[r * groups * scale.bytes()..].as_ptr(),
            }
        };
        for t in 0..tokens.len() {
            let x = activations(x, tokens.row(t));
            let out = &mut out[t * stride..];
            let mut i = 0;
            while i < n {
                let left = n - i;
                // SAFETY: AVX2 is there; the matrix was checked against its shape, its bytes may be read 64 past the end,
                // and the activations are as wide and padded.
                unsafe {
                    macro_rules! run {
                        ($rows:literal, $format:expr) => {{
                            let rows: [avx2::Row; $rows] = std::array::from_fn(|k| row(i + k));
                            let y = match group {
                                32 => avx2::dot8::<$rows, 32, { $format }>(rows, x, self.columns),
                                64 => avx2::dot8::<$rows, 64, { $format }>(rows, x, self.columns),
                                _ => avx2::dot8::<$rows, 128, { $format }>(rows, x, self.columns),
                            };
                            out[i..i + $rows].copy_from_slice(&y);
                            i += $rows;
                        }};
                    }
                    macro_rules! by_format {
                        ($rows:literal) => {
                            match scale {
                                ScaleFormat::Bf16 => run!($rows, avx2::BF16),
                                ScaleFormat::F16 => run!($rows, avx2::F16),
                                _ => run!($rows, avx2::F32),
                            }
                        };
                    }
                    match left {
                        1 => by_format!(1),
                        _ => by_format!(2),
                    }
                }
            }
        }
        true
    }

    /// Unpacks rows to integers and floats in the scratch.
    fn unpack(&self, data: &Data, first: usize, n: usize, scratch: &mut Scratch) {
        let Data::Quantized { codes, scales, biases, coding, scale, group } = data else { return };
        let groups = self.columns / group;
        let padded = groups.next_multiple_of(8);
        let row_bytes = self.columns * coding.bits() as usize / 8;
        for (v, len) in [(&mut scratch.scales, n * padded), (&mut scratch.biases, n * padded)] {
            v.clear();
            v.resize(len, 0.0);
        }
        if scratch.codes.len() < n * self.columns {
            scratch.codes.resize(n * self.columns, 0);
        }
        for i in 0..n {
            let r = first + i;
            let to = &mut scratch.codes[i * self.columns..][..self.columns];
            let from = &codes[r * row_bytes..][..row_bytes];
            decode::codes(from, *coding, to);
            let range = r * groups * scale.bytes()..(r + 1) * groups * scale.bytes();
            decode::scales(
                &scales[range.clone()],
                *scale,
                *coding,
                &mut scratch.scales[i * padded..][..groups],
            );
            if let Some(biases) = biases {
                decode::scales(&biases[range], *scale, *coding, &mut scratch.biases[i * padded..][..groups]);
            }
        }
    }

    /// Products of the `n` rows in the scratch.
    #[allow(clippy::too_many_arguments)]
    fn unpacked(
        &self,
        n: usize,
        group: usize,
        x: Rows<'_>,
        tokens: Tokens<'_>,
        out: &mut [f32],
        stride: usize,
        scratch: &Scratch,
    ) {
        let columns = self.columns;
        let padded = (columns / group).next_multiple_of(8);
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            let row = |i: usize| avx2::Unpacked {
                codes: scratch.codes[i * columns..].as_ptr(),
                scales: scratch.scales[i * padded..].as_ptr(),
                biases: scratch.biases[i * padded..].as_ptr(),
            };
            let mut t = 0;
            while t < tokens.len() {
                // Four tokens' activations stay in the first-level cache while the rows pass by.
                let some = (tokens.len() - t).min(4);
                let mut i = 0;
                while i < n {
                    let mut k = 0;
                    let rows = (n - i).min(2);
                    while k < some {
                        // SAFETY: AVX2 is there; rows and activations are `columns` long and padded.
                        unsafe {
                            macro_rules! run {
                                ($rows:literal, $tokens:literal) => {{
                                    let w: [avx2::Unpacked; $rows] = std::array::from_fn(|r| row(i + r));
                                    let x: [avx2::X; $tokens] =
                                        std::array::from_fn(|j| activations(x, tokens.row(t + k + j)));
                                    let y = avx2::tile(w, x, columns, group);
                                    for (r, y) in y.iter().enumerate() {
                                        for (j, y) in y.iter().enumerate() {
                                            out[(t + k + j) * stride + i + r] = *y;
                                        }
                                    }
                                    k += $tokens;
                                }};
                            }
                            match (rows, some - k) {
                                (2, 1) => run!(2, 1),
                                (2, _) => run!(2, 2),
                                (_, 1) => run!(1, 1),
                                _ => run!(1, 2),
                            }
                        }
                    }
                    i += rows;
                }
                t += some;
            }
            return;
        }
        let mut factors = vec![0.0; padded];
        for t in 0..tokens.len() {
            let from = tokens.row(t);
            let (values, scales) =
                (&x.values[from * columns..][..columns], &x.scales[from * padded..][..padded]);
            let sums = &x.sums[from * padded..][..padded];
            for i in 0..n {
                for (f, (a, b)) in factors.iter_mut().zip(scratch.scales[i * padded..].iter().zip(scales)) {
                    *f = a * b;
                }
                let y = portable::dot(&scratch.codes[i * columns..][..columns], values, group, &factors);
                out[t * stride + i] = y + portable::dot_f32(&scratch.biases[i * padded..][..padded], sums);
            }
        }
    }

    /// One row of one matrix, as floats: `out` has `columns` elements.
    pub fn row(&self, expert: usize, row: usize, out: &mut [f32]) {
        self.stored_row(self.first + expert * self.rows + row, out);
    }

    /// Row `r` of all that are stored, as floats.
    pub(super) fn stored_row(&self, r: usize, out: &mut [f32]) {
        match &self.data {
            Stored::Outline { .. } => out.fill(f32::NAN),
            Stored::Rows(Data::Dense { elements, float }) => {
                let bytes = self.columns * float.bytes();
                decode::floats(&elements[r * bytes..][..bytes], *float, out);
            }
            Stored::Rows(Data::Quantized { codes, scales, biases, coding, scale, group }) => {
                let row_bytes = self.columns * coding.bits() as usize / 8;
                let n = self.columns / group * scale.bytes();
                let codes = &codes[r * row_bytes..][..row_bytes];
                let biases = biases.as_ref().map(|b| &b[r * n..][..n]);
                decode::row(codes, &scales[r * n..][..n], biases, *coding, *scale, *group, out);
            }
            #[cfg(target_arch = "x86_64")]
            Stored::Panels(p) => {
                let (codes, scales, biases) = p.row(r);
                decode::row(&codes, &scales, Some(&biases), Coding::Affine(4), p.scale, p.group, out);
            }
        }
    }
}

/// Products of whole panels.
#[cfg(target_arch = "x86_64")]
fn in_panels(
    m: &panel::Panels,
    first: usize,
    panels: usize,
    x: Rows<'_>,
    tokens: Tokens<'_>,
    out: &mut [f32],
    stride: usize,
) {
    let row = |t: usize| {
        let t = tokens.row(t);
        let range = t * x.columns..(t + 1) * x.columns;
        panel::X {
            pairs: x.values[range.clone()].as_ptr(),
            high: x.high[range.clone()].as_ptr(),
            low: x.low[range].as_ptr(),
            scales: x.scales[t * x.padded..][..x.padded].as_ptr(),
            sums: x.sums[t * x.padded..][..x.padded].as_ptr(),
        }
    };
    // Four tokens' activations stay in the first-level cache while the panels pass by.
    for t in (0..tokens.len()).step_by(4) {
        let some = (tokens.len() - t).min(4);
        for p in 0..panels {
            let from = m.panel(first + p).as_ptr();
            let mut store = |j: usize, y: &[f32; panel::ROWS]| {
                out[(t + j) * stride + p * panel::ROWS..][..panel::ROWS].copy_from_slice(y);
            };
            // SAFETY: panels are made where AVX2 is there, and are as long as activations are wide.
            unsafe {
                macro_rules! run {
                    (1, $group:literal, $format:expr) => {
                        store(0, &panel::product::<$group, { $format }>(from, row(t), m.groups))
                    };
                    ($tokens:literal, $group:literal, $format:expr) => {{
                        let x: [panel::X; $tokens] = std::array::from_fn(|j| row(t + j));
                        let y = panel::products::<$tokens, $group, { $format }>(from, x, m.groups);
                        y.iter().enumerate().for_each(|(j, y)| store(j, y));
                    }};
                }
                macro_rules! by_group {
                    ($tokens:tt, $format:expr) => {
                        match m.group {
                            32 => run!($tokens, 32, $format),
                            64 => run!($tokens, 64, $format),
                            _ => run!($tokens, 128, $format),
                        }
                    };
                }
                macro_rules! by_format {
                    ($tokens:tt) => {
                        match m.scale {
                            ScaleFormat::Bf16 => by_group!($tokens, avx2::BF16),
                            ScaleFormat::F16 => by_group!($tokens, avx2::F16),
                            _ => by_group!($tokens, avx2::F32),
                        }
                    };
                }
                match some {
                    1 => by_format!(1),
                    2 => by_format!(2),
                    3 => by_format!(3),
                    _ => by_format!(4),
                }
            }
        }
    }
}

/// Pointers to a row of integer activations.
#[cfg(target_arch = "x86_64")]
fn activations(x: Rows<'_>, row: usize) -> avx2::X {
    // Indexing checks that the row is there.
    avx2::X {
        values: x.values[row * x.columns..][..x.columns].as_ptr(),
        scales: x.scales[row * x.padded..][..x.padded].as_ptr(),
        sums: x.sums[row * x.padded..][..x.padded].as_ptr(),
    }
}

/// How floats are stored, as a scale format: both are read by the same loads.
#[cfg(target_arch = "x86_64")]
pub(crate) fn stored(float: Float) -> ScaleFormat {
    match float {
        Float::F32 => ScaleFormat::F32,
        Float::F16 => ScaleFormat::F16,
        Float::Bf16 => ScaleFormat::Bf16,
    }
}
