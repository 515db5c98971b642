//! Activations as products take them.

use super::portable;
#[cfg(target_arch = "x86_64")]
use super::{avx2, panel, product::has_avx2};

/// How a product takes its activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// As they are.
    Floats,
    /// Sums of `terms` 16-bit integers, each with a scale a group of that many.
    Integers {
        /// Activations that share a scale.
        group: usize,
        /// 1, or 2: the second is what the first leaves.
        terms: usize,
    },
    /// The same, with the two bytes of an integer apart as well.
    Bytes {
        /// Activations that share a scale.
        group: usize,
        /// 1 or 2.
        terms: usize,
    },
}

impl Layout {
    /// Groups of a row of `columns`, rounded up to a multiple of 8.
    fn padded(self, columns: usize) -> usize {
        match self {
            Self::Floats => 0,
            Self::Integers { group, .. } | Self::Bytes { group, .. } => {
                columns.div_ceil(group).next_multiple_of(8)
            }
        }
    }

    /// Rows that a row of activations is stored in.
    pub(super) fn terms(self) -> usize {
        match self {
            Self::Floats => 1,
            Self::Integers { terms, .. } | Self::Bytes { terms, .. } => terms,
        }
    }
}

/// Room for rows of activations in any [`Layout`].
#[derive(Debug, Default, Clone)]
pub struct Activations {
    floats: Vec<f32>,
    values: Vec<i16>,
    high: Vec<i8>,
    low: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<f32>,
}

/// Rows of activations in one layout.
#[derive(Debug, Clone, Copy)]
// Bytes are for matrices in panels, which only some processors have.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub struct Rows<'a> {
    pub(crate) columns: usize,
    /// Groups a row, rounded up to a multiple of 8.
    pub(crate) padded: usize,
    pub(crate) floats: &'a [f32],
    pub(crate) values: &'a [i16],
    pub(crate) high: &'a [i8],
    pub(crate) low: &'a [i8],
    pub(crate) scales: &'a [f32],
    /// Sums of the groups' activations, as the integers stand for them.
    pub(crate) sums: &'a [f32],
}

impl Activations {
    /// Makes room for `rows` rows of `columns`.
    pub fn reserve(&mut self, layout: Layout, rows: usize, columns: usize) {
        let (padded, rows) = (layout.padded(columns), rows * layout.terms());
        match layout {
            Layout::Floats => grow(&mut self.floats, rows * columns),
            Layout::Integers { .. } => grow(&mut self.values, rows * columns),
            Layout::Bytes { .. } => {
                grow(&mut self.values, rows * columns);
                grow(&mut self.high, rows * columns);
                grow(&mut self.low, rows * columns);
            }
        }
        grow(&mut self.scales, rows * padded);
        grow(&mut self.sums, rows * padded);
    }

    /// Stores row `row` of rows as wide as `x`.
    ///
    /// # Panics
    /// If there is no room for it.
    pub fn set(&mut self, layout: Layout, row: usize, x: &[f32]) {
        // SAFETY: this is the only reference.
        unsafe { self.raw().set(layout, row, x) };
    }

    /// Rows of that layout and width, as they were stored.
    pub fn rows(&self, layout: Layout, columns: usize) -> Rows<'_> {
        Rows {
            columns,
            padded: layout.padded(columns),
            floats: &self.floats,
            values: &self.values,
            high: &self.high,
            low: &self.low,
            scales: &self.scales,
            sums: &self.sums,
        }
    }

    /// For writing and reading from several threads.
    pub(crate) fn raw(&mut self) -> Raw {
        Raw {
            floats: part(&mut self.floats),
            values: part(&mut self.values),
            high: part(&mut self.high),
            low: part(&mut self.low),
            scales: part(&mut self.scales),
            sums: part(&mut self.sums),
        }
    }
}

fn grow<T: Clone + Default>(v: &mut Vec<T>, len: usize) {
    if v.len() < len {
        v.resize(len, T::default());
    }
}

fn part<T>(v: &mut Vec<T>) -> (*mut T, usize) {
    (v.as_mut_ptr(), v.len())
}

/// [`Activations`] as pointers; valid while they are not changed otherwise or dropped.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    floats: (*mut f32, usize),
    values: (*mut i16, usize),
    high: (*mut i8, usize),
    low: (*mut i8, usize),
    scales: (*mut f32, usize),
    sums: (*mut f32, usize),
}

// SAFETY: only pointers, whose use is unsafe anyway.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

/// Row `row` of rows of `len`.
///
/// # Safety
/// The part is valid and nobody else uses the row.
unsafe fn row_mut<'a, T>((start, room): (*mut T, usize), row: usize, len: usize) -> &'a mut [T] {
    assert!((row + 1) * len <= room, "room for the row");
    // SAFETY: within, and the caller promises the rest.
    unsafe { std::slice::from_raw_parts_mut(start.add(row * len), len) }
}

impl Raw {
    /// Stores row `row` of rows as wide as `x`.
    ///
    /// # Safety
    /// The activations are there and as they were, and nobody else reads or writes this row.
    ///
    /// # Panics
    /// If there is no room for the row.
    pub(crate) unsafe fn set(&self, layout: Layout, row: usize, x: &[f32]) {
        // SAFETY: as the caller promises.
        unsafe {
            match layout.terms() {
                _ if layout == Layout::Floats => row_mut(self.floats, row, x.len()).copy_from_slice(x),
                1 => self.set_term(layout, row, x),
                _ => {
                    self.set_term(layout, 2 * row, x);
                    let rest = self.rest(layout, 2 * row, x);
                    self.set_term(layout, 2 * row + 1, &rest);
                }
            }
        }
    }

    /// What the integers of a stored row leave of `x`.
    ///
    /// # Safety
    /// As for [`Self::set`].
    unsafe fn rest(&self, layout: Layout, row: usize, x: &[f32]) -> Vec<f32> {
        // The place of each of eight in a row of bytes, see `panel::X::pairs`.
        const PAIRED: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        let (group, paired) = match layout {
            Layout::Floats => return vec![0.0; x.len()],
            Layout::Integers { group, .. } => (group, false),
            Layout::Bytes { group, .. } => (group, true),
        };
        // SAFETY: as the caller promises.
        let (values, scales) = unsafe {
            (row_mut(self.values, row, x.len()), row_mut(self.scales, row, layout.padded(x.len())))
        };
        let rest = x.iter().enumerate().map(|(i, &v)| {
            let at = if paired { i / 8 * 8 + PAIRED[i % 8] } else { i };
            (-scales[i / group]).mul_add(f32::from(values[at]), v)
        });
        rest.collect()
    }

    /// Stores one of the rows that a row of activations is stored in.
    ///
    /// # Safety
    /// As for [`Self::set`].
    unsafe fn set_term(&self, layout: Layout, row: usize, x: &[f32]) {
        let (columns, padded) = (x.len(), layout.padded(x.len()));
        // SAFETY: as the caller promises.
        unsafe {
            let (Layout::Integers { group, .. } | Layout::Bytes { group, .. }) = layout else { return };
            let (scales, sums) = (row_mut(self.scales, row, padded), row_mut(self.sums, row, padded));
            scales[columns / group..].fill(0.0);
            sums[columns / group..].fill(0.0);
            #[cfg(target_arch = "x86_64")]
            if let Layout::Bytes { .. } = layout {
                let bytes = (
                    row_mut(self.values, row, columns),
                    row_mut(self.high, row, columns),
                    row_mut(self.low, row, columns),
                );
                // Matrices ask for bytes where AVX2 is there, in groups of 32 or more.
                panel::pack_row(x, group, bytes, scales, sums);
                return;
            }
            pack_row(x, group, row_mut(self.values, row, columns), scales, sums);
        }
    }

    /// Rows of that layout and width.
    ///
    /// # Safety
    /// The activations are there and as they were; rows that are read are not written meanwhile.
    pub(crate) unsafe fn rows<'a>(&self, layout: Layout, columns: usize) -> Rows<'a> {
        /// # Safety
        /// As the caller's.
        unsafe fn all<'a, T>((start, room): (*mut T, usize)) -> &'a [T] {
            // SAFETY: as the caller promises.
            unsafe { std::slice::from_raw_parts(start, room) }
        }
        // SAFETY: as the caller promises.
        unsafe {
            Rows {
                columns,
                padded: layout.padded(columns),
                floats: all(self.floats),
                values: all(self.values),
                high: all(self.high),
                low: all(self.low),
                scales: all(self.scales),
                sums: all(self.sums),
            }
        }
    }
}

/// Packs one row: integers to `values`, and a scale and a sum a group.
fn pack_row(x: &[f32], group: usize, values: &mut [i16], scales: &mut [f32], sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() && group >= 32 {
        // SAFETY: the instructions are there.
        unsafe { avx2::pack_row(x, group, values, scales, sums) };
        return;
    }
    portable::pack_row(x, group, values, scales, sums);
}
