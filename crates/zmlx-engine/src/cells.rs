//! Numbers that the threads of a team write in disjoint parts.

use std::cell::UnsafeCell;
use std::ops::Range;

/// A buffer of numbers that several threads use at once, each its own part.
pub struct Cells<T = f32>(Vec<UnsafeCell<T>>);

// SAFETY: all access to the elements goes through unsafe functions, whose callers keep parts disjoint.
unsafe impl<T: Send + Sync> Sync for Cells<T> {}

impl<T> Default for Cells<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> std::fmt::Debug for Cells<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cells({})", self.0.len())
    }
}

impl<T: Copy + Default> Clone for Cells<T> {
    fn clone(&self) -> Self {
        // A buffer is cloned between runs, by someone who could also write it.
        // SAFETY: no run is on, since runs borrow their buffers.
        Self::from(unsafe { self.get(0..self.len()) }.to_vec())
    }
}

impl<T> From<Vec<T>> for Cells<T> {
    fn from(values: Vec<T>) -> Self {
        Self(values.into_iter().map(UnsafeCell::new).collect())
    }
}

impl<T: Copy + Default> Cells<T> {
    /// `len` zeros.
    pub fn new(len: usize) -> Self {
        Self::from(vec![T::default(); len])
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes room for `len` elements; what is there stays.
    pub fn grow(&mut self, len: usize) {
        if self.0.len() < len {
            self.0.resize_with(len, UnsafeCell::default);
        }
    }

    /// The elements, when nobody else has the buffer.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: UnsafeCell<T> is laid out as T, and the reference is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len()) }
    }

    /// A part, to read.
    ///
    /// # Safety
    /// Nobody writes this part meanwhile.
    ///
    /// # Panics
    /// If the range is not within.
    pub unsafe fn get(&self, range: Range<usize>) -> &[T] {
        let part = &self.0[range];
        // SAFETY: laid out as T; the caller promises that nobody writes.
        unsafe { std::slice::from_raw_parts(part.as_ptr().cast(), part.len()) }
    }

    /// A part, to write.
    ///
    /// # Safety
    /// Nobody else reads or writes this part meanwhile.
    ///
    /// # Panics
    /// If the range is not within.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn get_mut(&self, range: Range<usize>) -> &mut [T] {
        let part = &self.0[range];
        // SAFETY: laid out as T and in cells; the caller promises that nobody else uses it.
        unsafe { std::slice::from_raw_parts_mut(UnsafeCell::raw_get(part.as_ptr()), part.len()) }
    }
}
