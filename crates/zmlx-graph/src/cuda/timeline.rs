//! Where the time of decode steps past MLX goes, launch by launch.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;

use super::LaunchMoments;
use crate::error::{GraphError, Result};
use crate::exec::Executor;
use crate::profile::median;
use crate::state::State;

/// The launches of a decode step, those that do the same together, timed while they overlap.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Timeline {
    /// Steps that were noted.
    pub steps: usize,
    /// Seconds of a step, noting included: the median.
    pub seconds: f64,
    /// Launches of one name, size and number of blocks, the longest together first.
    pub rows: Vec<LaunchRow>,
}

/// Launches of one name, size and number of blocks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LaunchRow {
    /// What they do.
    pub name: &'static str,
    /// How many there are in a step.
    pub count: usize,
    /// Blocks of each.
    pub blocks: usize,
    /// Bytes that each reads, as far as they do not depend on the position.
    pub bytes: u64,
    /// Mean seconds of one.
    pub each: LaunchParts,
    /// Bytes a second; absent where there are none.
    pub bytes_per_second: Option<f64>,
    /// The part of the step's time that all of them take.
    pub share: f64,
}

/// Seconds of a launch. The first five parts follow one another and are together the whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct LaunchParts {
    /// From the end of the launch before to its own end, so that those of a step add up to the step.
    pub whole: f64,
    /// From the end of the launch before until its first block knows of that end.
    pub wait: f64,
    /// Until its last block knows.
    pub all: f64,
    /// Until the last block has placed its activations.
    pub place: f64,
    /// Until the last block has its sums.
    pub sums: f64,
    /// Until the last block has ended.
    pub end: f64,
    /// How long before the end of the wait the first block began.
    pub first: f64,
    /// How long before the end of the wait the last block began.
    pub last: f64,
}

impl LaunchParts {
    /// Of the moments of a launch, where the one before it ended at `before`.
    fn of(launch: &LaunchMoments, before: u64) -> Self {
        let [begun, waited, placed, summed, ended] = launch.moments;
        // Kernels without such moments take no time there.
        let placed = placed[1].max(waited[1]);
        let summed = summed[1].max(placed);
        let between = |from: u64, to: u64| (to as f64 - from as f64) * 1e-9;
        Self {
            whole: between(before, ended[1]),
            wait: between(before, waited[0]),
            all: between(waited[0], waited[1]),
            place: between(waited[1], placed),
            sums: between(placed, summed),
            end: between(summed, ended[1]),
            first: between(begun[0], waited[0]),
            last: between(begun[1], waited[0]),
        }
    }

    fn each(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            whole: f(self.whole, other.whole),
            wait: f(self.wait, other.wait),
            all: f(self.all, other.all),
            place: f(self.place, other.place),
            sums: f(self.sums, other.sums),
            end: f(self.end, other.end),
            first: f(self.first, other.first),
            last: f(self.last, other.last),
        }
    }
}

impl Timeline {
    /// Of steps of one plan, each as [`Executor::launch_moments`] gives it; `None` without a launch.
    pub fn new(steps: &[Vec<LaunchMoments>]) -> Option<Self> {
        let mut rows: BTreeMap<(&'static str, u64, usize), (usize, LaunchParts)> = BTreeMap::new();
        let mut ends = Vec::new();
        for step in steps {
            let mut before = 0;
            for launch in step {
                let row = rows.entry((launch.name, launch.bytes, launch.blocks)).or_default();
                row.0 += 1;
                row.1 = row.1.each(LaunchParts::of(launch, before), |sum, one| sum + one);
                before = launch.moments[4][1];
            }
            ends.push(before as f64 * 1e-9);
        }
        if rows.is_empty() {
            return None;
        }
        let all: f64 = ends.iter().sum();
        let row =
            |((name, bytes, blocks), (count, sum)): ((&'static str, u64, usize), (usize, LaunchParts))| {
                let each = sum.each(LaunchParts::default(), |sum, _| sum / count as f64);
                LaunchRow {
                    name,
                    count: count / steps.len(),
                    blocks,
                    bytes,
                    each,
                    bytes_per_second: (bytes > 0 && each.whole > 0.0).then(|| bytes as f64 / each.whole),
                    share: if all > 0.0 { sum.whole / all } else { 0.0 },
                }
            };
        let mut rows: Vec<LaunchRow> = rows.into_iter().map(row).collect();
        rows.sort_by(|a, b| b.share.total_cmp(&a.share));
        Some(Self { steps: steps.len(), seconds: median(&mut ends), rows })
    }

    /// Launches of a step.
    pub fn launches(&self) -> usize {
        self.rows.iter().map(|row| row.count).sum()
    }
}

/// How long undisturbed decode takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeTime {
    /// Mean seconds a token.
    pub seconds: f64,
    /// Whether the last logits are numbers.
    pub finite: bool,
}

impl Executor {
    /// The launches of decode steps on a GPU past MLX, which `tokens` are fed to one by one; the first warms up and is not
    /// counted. `None` if calls of one token run on MLX or the engine, or there is no second token. The state has seen the
    /// tokens after it.
    ///
    /// # Errors
    /// [`GraphError::Cuda`].
    pub fn timeline(&self, tokens: &[u32], state: &mut State) -> Result<Option<Timeline>> {
        let mut steps = Vec::new();
        for &token in tokens {
            steps.push(self.launch_moments(token, state)?);
        }
        Ok(Timeline::new(steps.get(1..).unwrap_or_default()))
    }

    /// The time of [`Executor::decode`] from `token`, of `count` tokens after a first that is not counted. `None` if calls of
    /// one token run on MLX or the engine, or for no token. The state has seen the tokens after it.
    ///
    /// # Errors
    /// [`GraphError::Cuda`].
    pub fn decode_time(&self, token: u32, state: &mut State, count: usize) -> Result<Option<DecodeTime>> {
        if count == 0 {
            return Ok(None);
        }
        let mut first = None;
        let mut seconds = 0.0;
        let done = self.decode::<GraphError>(token, state, count + 1, |_| {
            seconds = first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
            Ok(true)
        })?;
        Ok(done.map(|done| DecodeTime { seconds: seconds / count as f64, finite: done.finite }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(name: &'static str, bytes: u64, moments: [[u64; 2]; 5]) -> LaunchMoments {
        LaunchMoments { name, node: 0, bytes, blocks: 132, moments }
    }

    fn near(found: LaunchParts, nanoseconds: [f64; 8]) {
        let LaunchParts { whole, wait, all, place, sums, end, first, last } = found;
        let found = [whole, wait, all, place, sums, end, first, last].map(|s| s * 1e9);
        let close = found.iter().zip(nanoseconds).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close, "{found:?} for {nanoseconds:?}");
    }

    /// Two launches of a product, and one without moments of its own in between that begins before the first has ended.
    fn step(late: u64) -> Vec<LaunchMoments> {
        vec![
            launch("linear", 4000, [[0, 100], [200, 300], [350, 400], [700, 800], [750, 1000]]),
            launch("rope", 0, [[600, 900], [1100, 1150], [0, 0], [0, 0], [1200, 1500]]),
            launch(
                "linear",
                4000,
                [[1000, 1300], [1600, 1700], [1750, 1800], [2900, 3000 + late], [3000, 3500 + late]],
            ),
        ]
    }

    #[test]
    fn parts_follow_the_end_of_the_launch_before() {
        let found = Timeline::new(&[step(0)]).unwrap();
        assert_eq!((found.steps, found.launches()), (1, 3));
        assert!((found.seconds - 3.5e-6).abs() < 1e-15, "{}", found.seconds);
        let [linear, rope] = &found.rows[..] else { panic!("{:?}", found.rows) };
        // The means of the first (1,000 ns) and the third (2,000).
        assert_eq!((linear.name, linear.count, linear.blocks, linear.bytes), ("linear", 2, 132, 4000));
        near(linear.each, [1500.0, 150.0, 100.0, 100.0, 800.0, 350.0, 400.0, 200.0]);
        assert!((linear.share - 3000.0 / 3500.0).abs() < 1e-12, "{}", linear.share);
        assert!((linear.bytes_per_second.unwrap() / (4000.0 / 1500e-9) - 1.0).abs() < 1e-12);
        assert_eq!((rope.name, rope.count, rope.bytes_per_second), ("rope", 1, None));
        near(rope.each, [500.0, 100.0, 50.0, 0.0, 0.0, 350.0, 500.0, 200.0]);
        for row in &found.rows {
            let p = row.each;
            assert!((p.wait + p.all + p.place + p.sums + p.end - p.whole).abs() < 1e-15, "{row:?}");
        }
    }

    #[test]
    fn steps_count_once_and_their_median_is_the_time() {
        let found = Timeline::new(&[step(0), step(3000), step(300)]).unwrap();
        assert_eq!((found.steps, found.launches()), (3, 3));
        assert!((found.seconds - 3.8e-6).abs() < 1e-15, "{}", found.seconds);
        let [linear, rope] = &found.rows[..] else { panic!("{:?}", found.rows) };
        assert_eq!((linear.count, rope.count), (2, 1));
        // 6 launches: three of 1,000, and 2,000, 5,000, 2,300.
        assert!((linear.each.whole - 12_300e-9 / 6.0).abs() < 1e-15, "{linear:?}");
        assert!((found.rows.iter().map(|row| row.share).sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn other_sizes_are_other_rows_the_longest_first() {
        let mut step = step(0);
        step[2].bytes = 9000;
        let rows = Timeline::new(&[step]).unwrap().rows;
        let found: Vec<_> = rows.iter().map(|row| (row.name, row.bytes, row.count)).collect();
        assert_eq!(found, [("linear", 9000, 1), ("linear", 4000, 1), ("rope", 0, 1)]);
    }

    #[test]
    fn without_a_launch_there_is_none() {
        assert_eq!(Timeline::new(&[]), None);
        assert_eq!(Timeline::new(&[Vec::new()]), None);
    }
}
