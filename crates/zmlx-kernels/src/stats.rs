//! What kernels did: counted always, timed on request.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Counters of one kernel.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub calls: AtomicU64,
    pub cpu: AtomicU64,
    pub gpu: AtomicU64,
    pub bytes: AtomicU64,
    pub nanoseconds: AtomicU64,
    pub timed: AtomicU64,
    pub timing: AtomicBool,
    pub programs: AtomicU64,
    pub sources: AtomicU64,
}

/// A kernel's counts since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Times it was put into a graph.
    pub calls: u64,
    /// Times it ran on the CPU.
    pub cpu_launches: u64,
    /// Times it was put on a GPU stream.
    pub gpu_launches: u64,
    /// Bytes that its launches had to move: inputs once, outputs once.
    pub bytes: u64,
    /// Programs made: one for each combination of input dtypes.
    pub programs: u64,
    /// GPU source texts made.
    pub sources: u64,
    /// CPU launches that were timed.
    pub timed: u64,
    /// How long those took.
    pub time: Duration,
}

impl Counters {
    pub fn add(&self, counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Relaxed);
    }

    pub fn read(&self) -> Stats {
        Stats {
            calls: self.calls.load(Relaxed),
            cpu_launches: self.cpu.load(Relaxed),
            gpu_launches: self.gpu.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            programs: self.programs.load(Relaxed),
            sources: self.sources.load(Relaxed),
            timed: self.timed.load(Relaxed),
            time: Duration::from_nanos(self.nanoseconds.load(Relaxed)),
        }
    }
}
