//! A team of threads that goes through a program of stages together.
//!
//! Each stage is cut into more chunks than there are threads. A thread takes the next chunks by adding to the stage's
//! counter, a part of what is left, and a stage is complete when all of its chunks are, not when all threads have come by. So a thread whose core
//! is taken away holds up the others only if it holds a chunk; it finds the stages it missed complete and catches up.
//! When others use the cores so much that the team waits longer than it gains, it goes on alone for a while.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// What a team goes through.
pub trait Job: Sync {
    /// Number of stages.
    fn stages(&self) -> usize;

    /// How many chunks stage `stage` has; the same whenever and wherever it is asked.
    fn chunks(&self, stage: usize) -> usize;

    /// Works as thread `thread` on chunk `chunk` of stage `stage`. `first` says that this thread has taken no chunk of
    /// this stage before. All earlier stages are complete, and no other thread has this chunk.
    fn work(&self, thread: usize, stage: usize, chunk: usize, first: bool);
}

/// A stage's counters, on a cache line of their own.
#[repr(align(128))]
#[derive(Default)]
struct Progress {
    taken: AtomicUsize,
    done: AtomicUsize,
}

struct Shared {
    /// Which run is on; odd numbers never occur twice. Helpers wait for a change.
    epoch: Mutex<Epoch>,
    start: Condvar,
    /// Helpers that have not left the current run.
    inside: AtomicUsize,
    progress: Vec<Progress>,
    threads: usize,
    panicked: AtomicBool,
    /// A number that changes with every run, for helpers that poll before they sleep.
    signal: AtomicU32,
    /// How many threads sleep within a run, and all that might.
    sleepers: AtomicUsize,
    members: Mutex<Vec<Thread>>,
}

#[derive(Default)]
struct Epoch {
    number: u32,
    job: Option<&'static dyn JobPointer>,
    quit: bool,
}

/// A job as helpers see it; a trait of its own so that the pointer is `Send`.
trait JobPointer: Sync {
    fn job(&self) -> &dyn Job;
}

struct Pointer<'a>(&'a dyn Job);

impl JobPointer for Pointer<'_> {
    fn job(&self) -> &dyn Job {
        self.0
    }
}

/// How often a thread looks at a counter before it sleeps: some tens of microseconds. Sleeping gives the core away, and
/// being woken lets the system choose another: two threads that landed on one core come apart.
const SPINS: u32 = 1_500;

/// How long a thread sleeps at most before it looks again.
const NAP: Duration = Duration::from_micros(500);

/// How long a helper polls for the next run before it sleeps.
const POLL: Duration = Duration::from_micros(200);

/// Share of a run spent waiting from which on the team goes on alone.
const TOO_MUCH_WAITING: f64 = 0.3;

/// Threads that run jobs together: the caller and its helpers.
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Until when the caller works alone, and for how long it will next time.
    alone: Option<Instant>,
    alone_for: Duration,
    /// Waiting and working of the last runs.
    waited: Duration,
    worked: Duration,
}

impl Team {
    /// A team of `threads` threads, the caller's included; at most `stages` stages a job.
    pub fn new(threads: usize, stages: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: Mutex::default(),
            start: Condvar::new(),
            inside: AtomicUsize::new(0),
            progress: (0..stages).map(|_| Progress::default()).collect(),
            threads: threads.max(1),
            panicked: AtomicBool::new(false),
            signal: AtomicU32::new(0),
            sleepers: AtomicUsize::new(0),
            members: Mutex::default(),
        });
        let helpers = (1..threads.max(1))
            .filter_map(|i| {
                let shared = Arc::clone(&shared);
                // A helper that cannot be started is done without: the others take its chunks.
                thread::Builder::new().name(format!("zmlx-{i}")).spawn(move || help(&shared, i)).ok()
            })
            .collect();
        Self {
            shared,
            helpers,
            alone: None,
            alone_for: FIRST_ALONE,
            waited: Duration::ZERO,
            worked: Duration::ZERO,
        }
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        1 + self.helpers.len()
    }

    /// Goes through `job`; it is complete on return.
    ///
    /// # Panics
    /// If a chunk panicked, or if the job has more stages than the team was made for.
    pub fn run(&mut self, job: &dyn Job) {
        assert!(job.stages() <= self.shared.progress.len(), "a team for fewer stages");
        let alone = self.helpers.is_empty() || self.alone.is_some_and(|until| Instant::now() < until);
        if alone {
            for stage in 0..job.stages() {
                for chunk in 0..job.chunks(stage) {
                    job.work(0, stage, chunk, chunk == 0);
                }
            }
            return;
        }
        for p in &self.shared.progress[..job.stages()] {
            p.taken.store(0, Ordering::Relaxed);
            p.done.store(0, Ordering::Relaxed);
        }
        let begin = Instant::now();
        {
            let mut members = lock(&self.shared.members);
            members.clear();
            members.push(thread::current());
            members.extend(self.helpers.iter().map(|h| h.thread().clone()));
        }
        let pointer = Pointer(job);
        let pointer: &dyn JobPointer = &pointer;
        // SAFETY: helpers use it only while `inside` counts them, and this function does not return, nor unwind, before that
        // count is zero again and the job is taken back.
        let pointer: &'static dyn JobPointer = unsafe { std::mem::transmute(pointer) };
        self.shared.inside.store(self.helpers.len(), Ordering::Relaxed);
        {
            let mut epoch = lock(&self.shared.epoch);
            epoch.number = epoch.number.wrapping_add(1);
            epoch.job = Some(pointer);
            self.shared.signal.store(epoch.number, Ordering::Release);
        }
        self.shared.start.notify_all();
        let mut waited = Duration::ZERO;
        let leave = Leave(&self.shared);
        go_through(&self.shared, job, 0, &mut waited);
        let left = Instant::now();
        drop(leave);
        waited += left.elapsed();
        assert!(!self.shared.panicked.load(Ordering::Relaxed), "a thread of the team panicked");
        self.weigh(waited, begin.elapsed());
    }

    /// Decides whether company pays.
    fn weigh(&mut self, waited: Duration, took: Duration) {
        self.waited += waited;
        self.worked += took;
        if self.worked < MEASURED {
            return;
        }
        let share = self.waited.as_secs_f64() / self.worked.as_secs_f64();
        (self.waited, self.worked) = (Duration::ZERO, Duration::ZERO);
        if share > TOO_MUCH_WAITING {
            self.alone = Some(Instant::now() + self.alone_for);
            self.alone_for = (self.alone_for * 2).min(LONGEST_ALONE);
        } else {
            self.alone = None;
            self.alone_for = FIRST_ALONE;
        }
    }
}

/// Takes the job back from the helpers, also if the caller's own part panics: they must not outlive what it borrows.
struct Leave<'a>(&'a Shared);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.wait(|| self.0.inside.load(Ordering::Acquire) == 0);
        lock(&self.0.epoch).job = None;
    }
}

/// Work after which the team decides whether company pays.
const MEASURED: Duration = Duration::from_millis(20);
const FIRST_ALONE: Duration = Duration::from_millis(100);
const LONGEST_ALONE: Duration = Duration::from_millis(1600);

impl Drop for Team {
    fn drop(&mut self) {
        lock(&self.shared.epoch).quit = true;
        self.shared.signal.fetch_add(1, Ordering::Release);
        self.shared.start.notify_all();
        for helper in self.helpers.drain(..) {
            // A panic was reported by the run it happened in.
            let _ = helper.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What a helper does all its life.
fn help(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        // Polls a little, since runs follow one another closely; then sleeps.
        let since = Instant::now();
        while shared.signal.load(Ordering::Acquire) == seen && since.elapsed() < POLL {
            std::hint::spin_loop();
        }
        let pointer = {
            let mut epoch = lock(&shared.epoch);
            while !epoch.quit && (epoch.number == seen || epoch.job.is_none()) {
                epoch = shared.start.wait(epoch).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            if epoch.quit {
                return;
            }
            seen = epoch.number;
            epoch.job
        };
        if let Some(pointer) = pointer {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let mut waited = Duration::ZERO;
                go_through(shared, pointer.job(), thread, &mut waited);
            }));
            if result.is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
        }
        shared.inside.fetch_sub(1, Ordering::SeqCst);
        shared.wake();
    }
}

/// Takes chunks of every stage in turn; waits where others still work on theirs.
fn go_through(shared: &Shared, job: &dyn Job, thread: usize, waited: &mut Duration) {
    for stage in 0..job.stages() {
        let chunks = job.chunks(stage);
        let progress = &shared.progress[stage];
        let mut first = true;
        loop {
            // Neighbours together, so that memory is read in long runs: fewer and fewer, so that all end at once.
            let left = chunks.saturating_sub(progress.taken.load(Ordering::Relaxed));
            let some = (left / (4 * shared.threads)).max(1);
            let start = progress.taken.fetch_add(some, Ordering::Relaxed);
            if start >= chunks {
                break;
            }
            let end = (start + some).min(chunks);
            let guard = Finish { shared, progress, chunks: end - start };
            for chunk in start..end {
                job.work(thread, stage, chunk, first);
                first = false;
            }
            drop(guard);
        }
        if progress.done.load(Ordering::Acquire) < chunks {
            let since = Instant::now();
            shared.wait(|| progress.done.load(Ordering::Acquire) >= chunks);
            *waited += since.elapsed();
        }
    }
}

/// Counts chunks as done, also if one panics: the others must not wait for ever.
struct Finish<'a> {
    shared: &'a Shared,
    progress: &'a Progress,
    chunks: usize,
}

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.shared.panicked.store(true, Ordering::Relaxed);
        }
        self.progress.done.fetch_add(self.chunks, Ordering::SeqCst);
        self.shared.wake();
    }
}

impl Shared {
    /// Waits for a condition that another thread of the team brings about.
    fn wait(&self, met: impl Fn() -> bool) {
        for _ in 0..SPINS {
            if met() {
                return;
            }
            std::hint::spin_loop();
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !met() {
            thread::park_timeout(NAP);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Wakes those that sleep.
    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            lock(&self.members).iter().for_each(Thread::unpark);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    /// Every stage adds what the stage before left, so that a stage that starts too early is noticed.
    struct Sums {
        stages: Vec<(usize, AtomicU64)>,
    }

    impl Job for Sums {
        fn stages(&self) -> usize {
            self.stages.len()
        }

        fn chunks(&self, stage: usize) -> usize {
            self.stages[stage].0
        }

        fn work(&self, _: usize, stage: usize, chunk: usize, _: bool) {
            let before = if stage == 0 { 1 } else { self.stages[stage - 1].1.load(Ordering::Relaxed) };
            self.stages[stage].1.fetch_add(before % 1000 + chunk as u64, Ordering::Relaxed);
        }
    }

    fn sums() -> Sums {
        Sums { stages: (0..200).map(|i| ([7, 1, 0, 13][i % 4], AtomicU64::new(0))).collect() }
    }

    #[test]
    fn stages_follow_one_another_on_any_number_of_threads() {
        let expected = sums();
        Team::new(1, 200).run(&expected);
        for threads in [2, 3, 8] {
            let mut team = Team::new(threads, 200);
            for _ in 0..50 {
                let job = sums();
                team.run(&job);
                for (got, want) in job.stages.iter().zip(&expected.stages) {
                    assert_eq!(
                        got.1.load(Ordering::Relaxed),
                        want.1.load(Ordering::Relaxed),
                        "{threads} threads"
                    );
                }
            }
        }
    }

    struct Panics;

    impl Job for Panics {
        fn stages(&self) -> usize {
            3
        }

        fn chunks(&self, _: usize) -> usize {
            8
        }

        fn work(&self, _: usize, stage: usize, chunk: usize, _: bool) {
            assert!((stage, chunk) != (1, 3), "on purpose");
        }
    }

    #[test]
    fn a_panic_comes_out_and_nobody_hangs() {
        for threads in [1, 2, 4] {
            let result = std::panic::catch_unwind(|| Team::new(threads, 3).run(&Panics));
            assert!(result.is_err(), "{threads} threads");
        }
    }
}
