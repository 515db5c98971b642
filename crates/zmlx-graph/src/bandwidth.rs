//! How fast this machine reads memory.

use std::hint::black_box;
use std::time::Instant;

/// Bytes that are read in one pass: more than the last-level caches of common machines hold.
const BYTES: usize = 256 << 20;
/// Passes; the fastest counts.
const PASSES: usize = 24;
/// Sums side by side, so that the processor need not wait for the one before.
const LANES: usize = 32;

/// Bytes a second that `threads` threads read together: the fastest of some sums over 256 MiB. Takes about half a second.
pub fn read_bandwidth(threads: usize) -> f64 {
    let words: Vec<u64> = (0..BYTES as u64 / 8).collect();
    let part = words.len().div_ceil(threads.max(1)).next_multiple_of(LANES);
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            // The last part is read by this thread.
            let mut parts = words.chunks(part);
            let own = parts.next().unwrap_or_default();
            parts.for_each(|words| drop(scope.spawn(|| black_box(sum(words)))));
            black_box(sum(own));
        });
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}

fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; LANES];
    let rows = words.chunks_exact(LANES);
    let rest = rows.remainder();
    for row in rows {
        for (lane, word) in lanes.iter_mut().zip(row) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        for n in [0usize, 1, LANES - 1, LANES, 5 * LANES + 7] {
            let words: Vec<u64> = (1..=n as u64).collect();
            assert_eq!(sum(&words), (n * (n + 1) / 2) as u64, "{n}");
        }
        assert_eq!(sum(&[u64::MAX, 2]), 1);
    }
}
