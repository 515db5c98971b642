//! Where the time of a call goes, node by node.

use std::time::Instant;

use serde::Serialize;
use zmlx_mlx::Array;

use crate::Wanted;
use crate::cost::{Cost, Work, pool};
use crate::error::{GraphError, Result};
use crate::exec::{Done, Executor};
use crate::graph::Graph;
use crate::print::pooled_path;
use crate::state::State;

/// Seconds of each node of a graph, in order.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// By number of the node.
    pub seconds: Vec<f64>,
}

impl Profile {
    /// The median of each node over several calls; the mean of the two in the middle where their number is even. Calls of
    /// different graphs cannot be compared: what is missing counts as 0. Empty without a call.
    pub fn median(calls: &[Self]) -> Self {
        let nodes = calls.iter().map(|c| c.seconds.len()).max().unwrap_or(0);
        let of = |node: usize| {
            let mut times: Vec<f64> =
                calls.iter().map(|c| c.seconds.get(node).copied().unwrap_or(0.0)).collect();
            median(&mut times)
        };
        Self { seconds: (0..nodes).map(of).collect() }
    }

    /// All nodes together.
    pub fn total(&self) -> f64 {
        self.seconds.iter().sum()
    }
}

/// The median; 0 of nothing.
pub fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    match (times.get(times.len() / 2), times.len()) {
        (None, _) => 0.0,
        (Some(&middle), n) if n % 2 == 1 => middle,
        (Some(&middle), n) => (middle + times[n / 2 - 1]) / 2.0,
    }
}

impl Executor {
    /// As [`Executor::run`], but each node is evaluated and waited for before the next begins, so that its time is known.
    /// A node's time holds all that a node costs: writing its part of MLX's graph, its kernels, and the wait; nothing is
    /// subtracted, so that together they are more than what an undisturbed call takes. A node that a pattern made of many
    /// has one time; nodes that run as one program of the engine share its time as its stages did. On a GPU past MLX a node's
    /// time is that of its launches, by the GPU's clock.
    ///
    /// # Errors
    /// As [`Executor::run`]; an evaluation that fails is an error of the node.
    pub fn profile(&self, tokens: &Array, state: &mut State) -> Result<(Array, Profile)> {
        tokens.eval().map_err(|source| self.node_error(0, source))?;
        let mut seconds = vec![0.0; self.graph().nodes.len()];
        let mut next = 0;
        let mut start = Instant::now();
        self.measure(true);
        let logits = self.walk(tokens, state, Wanted::All, &mut |done| {
            match done {
                Done::Node { outputs, slot, .. } => {
                    let mut arrays: Vec<&Array> = outputs.iter().collect();
                    arrays.extend(slot.iter().flat_map(|s| s.arrays()));
                    zmlx_mlx::eval(&arrays)?;
                    seconds[next] = start.elapsed().as_secs_f64();
                    next += 1;
                }
                Done::Tokens { gpu, tokens, state, logits } => {
                    // Launch by launch, each timed by the GPU itself.
                    let timed = gpu.timed_step(tokens, state).map_err(zmlx_mlx::Error::custom)?;
                    for launch in &timed.1 {
                        seconds[launch.node] += launch.seconds;
                    }
                    *logits = Some(timed.0);
                }
                Done::Region { region, runner, .. } => {
                    // Each stage's share of the region's time, by the threads' time in it.
                    let spent = start.elapsed().as_secs_f64();
                    let times = runner.take_times();
                    let all: u64 = times.iter().sum();
                    for (time, owner) in times.iter().zip(region.program.owners()) {
                        seconds[*owner] += spent * *time as f64 / all.max(1) as f64;
                    }
                    next += region.nodes.len();
                }
            }
            start = Instant::now();
            Ok(())
        });
        self.measure(false);
        let missing = || GraphError::Malformed("the output has no value".to_owned());
        let logits = logits?.ok_or_else(missing)?;
        Ok((logits, Profile { seconds }))
    }
}

/// Time and bytes of nodes that have something in common.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProfileRow {
    /// Name of the op, or path of the module with `*` for the number of the layer.
    pub name: String,
    /// How many nodes.
    pub nodes: usize,
    /// Their time.
    pub seconds: f64,
    /// Its part of the time of all nodes.
    pub share: f64,
    /// Bytes of weights and state that they read and write.
    pub bytes: u64,
    /// Bytes a second; absent where there are none to speak of.
    pub bytes_per_second: Option<f64>,
    /// Bytes a second as a part of what memory moves.
    pub roofline: Option<f64>,
    /// Faster than memory: the bytes came from a processor's cache.
    pub cache_resident: bool,
}

/// A profile by op and by module.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProfileReport {
    /// Bytes a second that memory moves, which the roofline fractions refer to.
    pub bandwidth: f64,
    /// All nodes.
    pub total: ProfileRow,
    /// By op, the longest first.
    pub by_op: Vec<ProfileRow>,
    /// By module, all layers together, the longest first.
    pub by_module: Vec<ProfileRow>,
}

impl ProfileReport {
    /// Puts times beside bytes. `cost` and `profile` are of `graph`; `bandwidth` is in bytes a second.
    pub fn new(graph: &Graph, cost: &Cost, profile: &Profile, bandwidth: f64) -> Self {
        let nodes = || {
            let timed = cost.nodes.iter().zip(&profile.seconds);
            graph.nodes.iter().zip(timed.map(|(work, seconds)| (*work, *seconds)))
        };
        let all = profile.total();
        let row = |(name, nodes, (work, seconds)): (String, usize, (Work, f64))| {
            let bytes = work.memory_bytes();
            let rate = (bytes > 0 && seconds > 0.0).then(|| bytes as f64 / seconds);
            let roofline = rate.map(|r| r / bandwidth);
            ProfileRow {
                name,
                nodes,
                seconds,
                share: if all > 0.0 { seconds / all } else { 0.0 },
                bytes,
                bytes_per_second: rate,
                roofline,
                cache_resident: roofline.is_some_and(|r| r > 1.0),
            }
        };
        let join = |a: (Work, f64), b: (Work, f64)| (a.0 + b.0, a.1 + b.1);
        let rows = |named: Vec<(String, (Work, f64))>| {
            let mut rows: Vec<ProfileRow> = pool(named.into_iter(), join).into_iter().map(row).collect();
            rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
            rows
        };
        let by_op = nodes().map(|(n, one)| (n.op.name().to_owned(), one)).collect();
        let by_module = nodes().map(|(n, one)| (pooled_path(&n.path), one)).collect();
        let whole = nodes().map(|(_, one)| one).fold((Work::default(), 0.0), join);
        Self {
            bandwidth,
            total: row(("all".to_owned(), nodes().count(), whole)),
            by_op: rows(by_op),
            by_module: rows(by_module),
        }
    }
}
