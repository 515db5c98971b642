//! What a cache holds: rows of float32, or of half precision.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::cells::Cells;

/// Keys or values of a cache, which the threads of a team write in disjoint parts.
///
/// In half precision a number is rounded to the nearest of 11 significant bits: off by 2^-11 of itself at most, or by 2^-25
/// where it is below 2^-14. What is beyond 65,504 becomes infinite, and shows as such.
#[derive(Debug, Clone)]
pub enum Store {
    /// float32
    F32(Cells),
    /// IEEE half
    F16(Cells<f16>),
}

/// A part of a [`Store`], to read.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// float32
    F32(&'a [f32]),
    /// IEEE half
    F16(&'a [f16]),
}

impl From<Cells> for Store {
    fn from(cells: Cells) -> Self {
        Self::F32(cells)
    }
}

impl Store {
    /// An empty one of half precision.
    pub fn half() -> Self {
        Self::F16(Cells::default())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(cells) => cells.len(),
            Self::F16(cells) => cells.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of its elements.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(cells) => 4 * cells.len(),
            Self::F16(cells) => 2 * cells.len(),
        }
    }

    /// The same kind with `parts` parts of `room` elements each, which begin with what was at `kept` of the old parts of
    /// `old` elements.
    pub(crate) fn regrown(&mut self, parts: usize, old: usize, kept: Range<usize>, room: usize) -> Self {
        fn regrown<T: Copy + Default>(
            cells: &mut Cells<T>,
            parts: usize,
            [old, room]: [usize; 2],
            kept: Range<usize>,
        ) -> Cells<T> {
            let mut grown = vec![T::default(); parts * room];
            if !kept.is_empty() {
                let from = cells.as_mut_slice();
                for part in 0..parts {
                    let from = &from[part * old..][kept.clone()];
                    grown[part * room..][..kept.len()].copy_from_slice(from);
                }
            }
            grown.into()
        }
        match self {
            Self::F32(cells) => Self::F32(regrown(cells, parts, [old, room], kept)),
            Self::F16(cells) => Self::F16(regrown(cells, parts, [old, room], kept)),
        }
    }

    /// A part as float32, when nobody else has it.
    ///
    /// # Panics
    /// If the range is not within.
    pub fn to_f32(&mut self, range: Range<usize>) -> Vec<f32> {
        match self {
            Self::F32(cells) => cells.as_mut_slice()[range].to_vec(),
            Self::F16(cells) => cells.as_mut_slice()[range].to_f32_vec(),
        }
    }

    /// A part, to read.
    ///
    /// # Safety
    /// Nobody writes this part meanwhile.
    ///
    /// # Panics
    /// If the range is not within.
    pub unsafe fn read(&self, range: Range<usize>) -> Part<'_> {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Self::F32(cells) => Part::F32(cells.get(range)),
                Self::F16(cells) => Part::F16(cells.get(range)),
            }
        }
    }

    /// Writes `values` from element `at` on.
    ///
    /// # Safety
    /// Nobody else reads or writes this part meanwhile.
    ///
    /// # Panics
    /// If they do not fit in.
    pub unsafe fn write(&self, at: usize, values: &[f32]) {
        let range = at..at + values.len();
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Self::F32(cells) => cells.get_mut(range).copy_from_slice(values),
                Self::F16(cells) => cells.get_mut(range).convert_from_f32_slice(values),
            }
        }
    }
}

impl Part<'_> {
    /// `out += weight * part`.
    pub(crate) fn add_to(&self, weight: f32, out: &mut [f32]) {
        match self {
            Self::F32(part) => crate::vector::axpy(weight, part, out),
            Self::F16(part) => out.iter_mut().zip(*part).for_each(|(y, x)| *y += weight * x.to_f32()),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(part) => part.len(),
            Self::F16(part) => part.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
