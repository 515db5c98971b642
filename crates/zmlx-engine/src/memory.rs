//! Memory for weights: one allocation in huge pages where the system has them, cut into shared pieces.

use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes after the end that may be read (not written), so that vector loads need no tail.
const SLACK: usize = 64;

/// Bytes in [`Huge`] allocations now, and the most since [`reset_peak`].
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The most bytes that [`Huge`] allocations of the process held at a time since [`reset_peak`].
pub fn peak() -> u64 {
    PEAK.load(Ordering::Relaxed) as u64
}

/// From now on [`peak`] counts from what is held now.
pub fn reset_peak() {
    PEAK.store(HELD.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// An allocation of zeroed bytes, aligned to 2 MiB and in huge pages where the system gives them: reading
/// gigabytes a token through 4 KiB pages costs some 8 % in address translation.
#[derive(Debug)]
pub struct Huge {
    start: std::ptr::NonNull<u8>,
    len: usize,
    layout: std::alloc::Layout,
}

// SAFETY: it owns its bytes like a Vec<u8>.
unsafe impl Send for Huge {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for Huge {}

impl Huge {
    /// `len` zeroed bytes.
    ///
    /// # Errors
    /// [`OutOfMemory`] if the system refuses.
    pub fn new(len: usize) -> Result<Self, OutOfMemory> {
        let refuse = || OutOfMemory { bytes: len };
        let total = len.checked_add(SLACK).ok_or_else(refuse)?;
        let align = if total >= 1 << 21 { 1 << 21 } else { 64 };
        let layout = std::alloc::Layout::from_size_align(total, align).map_err(|_| refuse())?;
        // Not alloc_zeroed: for large alignments it writes zeros itself, before huge pages could be asked for.
        // SAFETY: the layout's size is not zero.
        let start = unsafe { std::alloc::alloc(layout) };
        let start = std::ptr::NonNull::new(start).ok_or_else(refuse)?;
        #[cfg(target_os = "linux")]
        if align == 1 << 21 {
            // Only advice: without huge pages all works, slower.
            // SAFETY: the range is an allocation of ours and starts at a page.
            unsafe { libc::madvise(start.as_ptr().cast(), total & !((1 << 21) - 1), libc::MADV_HUGEPAGE) };
        }
        let huge = Self { start, len, layout };
        PEAK.fetch_max(HELD.fetch_add(total, Ordering::Relaxed) + total, Ordering::Relaxed);
        // Writing also touches the pages, which takes long enough to share it.
        let part = total.div_ceil(copying_threads(total)).next_multiple_of(1 << 21);
        std::thread::scope(|scope| {
            for first in (0..total).step_by(part) {
                let (huge, n) = (&huge, part.min(total - first));
                // SAFETY: `total` bytes were allocated, and no part is written twice.
                scope.spawn(move || unsafe { huge.start.as_ptr().add(first).write_bytes(0, n) });
            }
        });
        Ok(huge)
    }

    /// Bytes it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, to fill them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes that nobody else refers to.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Shares it, whole.
    pub fn share(self) -> Bytes {
        let range = 0..self.len;
        Bytes { owner: Arc::new(self), range }
    }
}

impl Drop for Huge {
    fn drop(&mut self) {
        HELD.fetch_sub(self.layout.size(), Ordering::Relaxed);
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Threads that copying so many bytes is worth.
pub fn copying_threads(bytes: usize) -> usize {
    const WORTH: usize = 8 << 20;
    if bytes < WORTH { 1 } else { std::thread::available_parallelism().map_or(1, usize::from).min(8) }
}

/// The system has not that much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot allocate {bytes} bytes: close other programs or take a smaller model")]
pub struct OutOfMemory {
    /// What was asked for.
    pub bytes: usize,
}

/// A shared piece of a [`Huge`] allocation. 64 bytes after its end may be read, though they mean nothing.
#[derive(Debug, Clone)]
pub struct Bytes {
    owner: Arc<Huge>,
    range: Range<usize>,
}

impl Bytes {
    /// Copies `bytes`.
    ///
    /// # Errors
    /// [`OutOfMemory`] if the system refuses.
    pub fn copy_of(bytes: &[u8]) -> Result<Self, OutOfMemory> {
        let mut huge = Huge::new(bytes.len())?;
        huge.bytes_mut().copy_from_slice(bytes);
        Ok(huge.share())
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range is not within.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len(), "piece within the bytes");
        let start = self.range.start + range.start;
        Self { owner: Arc::clone(&self.owner), range: start..start + range.len() }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range is within the owner's initialised bytes, which nobody writes once shared.
        unsafe {
            std::slice::from_raw_parts(self.owner.start.as_ptr().add(self.range.start), self.range.len())
        }
    }
}
