//! How fast this machine reads memory, now.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::stats::median;

/// Bytes that the probe sums, unless the caches are so large that they would hold much of it.
const BUFFER_BYTES: u64 = 512 << 20;

/// The buffer is at least this many times the last level of caches.
const TIMES_CACHE: u64 = 4;

/// Largest buffer.
const LARGEST_BYTES: u64 = 4 << 30;

/// Words that a thread takes at a time (4 MiB). Threads take what is left rather than an equal share, so one whose core is
/// taken away does not keep the others waiting.
const CHUNK_WORDS: usize = 1 << 19;

/// A buffer to be summed by some threads.
///
/// Plain loads of 64-bit words in safe Rust: enough to be bound by memory on current cores. Pages are of the system's
/// default size.
#[derive(Debug)]
pub struct Probe {
    words: Vec<u64>,
    threads: usize,
}

impl Probe {
    /// A probe of this many threads (at least 1): 512 MiB, or four times the caches.
    pub fn new(threads: usize, last_level_cache_bytes: Option<u64>) -> Self {
        let cache = last_level_cache_bytes.unwrap_or(0).saturating_mul(TIMES_CACHE);
        Self::of_bytes(threads, BUFFER_BYTES.max(cache).min(LARGEST_BYTES))
    }

    fn of_bytes(threads: usize, bytes: u64) -> Self {
        // Values other than 0, so that every page is really there.
        Self { words: vec![1; (bytes / 8) as usize], threads: threads.max(1) }
    }

    /// Bytes of its buffer.
    pub fn bytes(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// Threads that read.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Bytes a second: the median of some passes (at least 1) over the buffer.
    pub fn measure(&self, passes: usize) -> f64 {
        let rates: Vec<f64> = (0..passes.max(1))
            .map(|_| {
                let start = Instant::now();
                // The sum counts as used, so that the loads are not left out.
                std::hint::black_box(self.pass());
                let seconds = start.elapsed().as_secs_f64();
                self.bytes() as f64 / seconds.max(1e-9)
            })
            .collect();
        median(&rates).unwrap_or(0.0)
    }

    fn pass(&self) -> u64 {
        let chunks: Vec<&[u64]> = self.words.chunks(CHUNK_WORDS).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            let mut sum = 0u64;
            while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                sum = sum.wrapping_add(sum_words(chunk));
            }
            sum
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            others.into_iter().filter_map(|t| t.join().ok()).fold(own, u64::wrapping_add)
        })
    }
}

/// Bytes a second that `threads` threads read from memory: the median of nine passes over a fresh [`Probe`].
pub fn read_bandwidth(threads: usize, last_level_cache_bytes: Option<u64>) -> f64 {
    Probe::new(threads, last_level_cache_bytes).measure(9)
}

/// Sixteen independent sums, which the compiler keeps in vector registers.
fn sum_words(words: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    let mut chunks = words.chunks_exact(16);
    for chunk in &mut chunks {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    let rest = chunks.remainder().iter().copied().fold(0, u64::wrapping_add);
    sums.into_iter().fold(rest, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once_by_any_number_of_threads() {
        for threads in [0, 1, 2, 5] {
            let probe = Probe::of_bytes(threads, 8 * (3 * CHUNK_WORDS as u64 + 77));
            assert_eq!(probe.pass(), 3 * CHUNK_WORDS as u64 + 77, "{threads} threads");
            assert!(probe.measure(1) > 0.0);
        }
        assert_eq!(sum_words(&(0..1000).collect::<Vec<u64>>()), 499_500);
    }

    #[test]
    fn the_buffer_is_larger_than_the_caches() {
        for (cache, bytes) in [(None, 512 << 20), (Some(32 << 20), 512 << 20)] {
            assert_eq!(Probe::new(1, cache).bytes(), bytes);
        }
    }
}
