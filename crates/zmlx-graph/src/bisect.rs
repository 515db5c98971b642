//! Which fused op is not what it replaces.
//!
//! Two executors run the same rewritten graph: one on MLX, where a fused op is its reference, and one whose fused ops are
//! engine programs of their own. Each op of the second is given the values of the first, so that its error is its own and
//! not what came before it.

use serde::Serialize;
use zmlx_mlx::{Array, Dtype};

use crate::Wanted;
use crate::error::{GraphError, Result};
use crate::exec::{Done, Executor};
use crate::fidelity::Fidelity;
use crate::graph::{Graph, Value};

/// The error of a fused op, where it was largest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OpError {
    /// Number of its node.
    pub node: usize,
    /// Path of the module.
    pub path: String,
    /// The pattern that made it.
    pub pattern: String,
    /// What the pattern promises; of an op that reads a cache, also the one that keeps it.
    pub class: Fidelity,
    /// Which of its outputs.
    pub output: usize,
    /// In which call.
    pub call: usize,
    /// Largest absolute difference over the root of the reference's mean square. Of chosen experts: by how much the scores
    /// of those that only one side chose lie apart, over the same root of the scores. Infinite where one side has a number
    /// and the other does not.
    pub error: f64,
    /// What its class allows.
    pub bound: f64,
}

impl OpError {
    /// Whether it keeps what its class promises.
    pub fn is_within(&self) -> bool {
        self.error <= self.bound
    }
}

/// The ops that choose experts by the scores that are their first input.
const CHOOSE: [&str; 2] = ["top_k_indices", "top_k_of_negated"];

/// The largest error that one op of that class may have, relative to the root of its reference's mean square.
///
/// A token-identical op rounds its activations to 16 bits with a scale a group and sums in another order: that
/// stays below a tenth of this. A wrong one is orders above.
pub fn bound(class: Fidelity) -> f64 {
    match class {
        Fidelity::BitExact => 0.0,
        Fidelity::TokenIdentical => 5e-3,
        Fidelity::Bounded => 5e-2,
    }
}

/// Holds each fused op of a graph against its reference over some calls (token ids `[batch, length]`), one after another
/// on the same state. Gives each op's largest error, in order of execution; the first that is not
/// [within](OpError::is_within) its class is where a model goes astray.
///
/// `reference` is [`Executor::new`] of the graph and `engine` [`Executor::separate`].
///
/// # Errors
/// [`GraphError`], as [`Executor::run`]; [`GraphError::Malformed`] if the executors are of different graphs.
pub fn bisect(reference: &Executor, engine: &Executor, calls: &[Array]) -> Result<Vec<OpError>> {
    let graph = reference.graph();
    if graph.nodes.len() != engine.graph().nodes.len() {
        return Err(GraphError::Malformed("two different graphs are held against each other".to_owned()));
    }
    let fused = graph.nodes.iter().enumerate().filter_map(|(i, n)| Some((i, n, n.op.fused()?)));
    let mut errors: Vec<OpError> = fused
        .map(|(node, n, fused)| OpError {
            node,
            path: n.path.clone(),
            pattern: fused.pattern.to_owned(),
            class: class_of(graph, node),
            output: 0,
            call: 0,
            error: 0.0,
            bound: bound(class_of(graph, node)),
        })
        .collect();
    let (mut stock_state, mut own_state) = (reference.new_state(), engine.new_state());
    for (call, tokens) in calls.iter().enumerate() {
        let position = stock_state.position();
        let mut stock: Vec<Vec<Array>> = vec![Vec::new(); graph.nodes.len()];
        reference.walk(tokens, &mut stock_state, Wanted::All, &mut |done| {
            if let Done::Node { index, outputs, .. } = done {
                zmlx_mlx::eval(&outputs.iter().collect::<Vec<_>>())?;
                stock[index].clone_from(outputs);
            }
            Ok(())
        })?;
        engine.walk(tokens, &mut own_state, Wanted::All, &mut |done| {
            match done {
                Done::Node { index, outputs, .. } => outputs.clone_from(&stock[index]),
                // Calls of one token on a GPU have no nodes to look at.
                Done::Tokens { .. } => {}
                Done::Region { outputs, .. } => {
                    let scores = |node: usize| -> zmlx_mlx::Result<Option<Array>> {
                        let value = |v: &Value| stock[v.node][v.output].clone();
                        let inputs: Vec<Array> = graph.nodes[node].inputs.iter().map(value).collect();
                        reference.inner_input(node, &CHOOSE, tokens, position, &inputs)
                    };
                    for (output, error) in differences(outputs, &stock, &scores)? {
                        let of_node = errors.iter_mut().find(|e| e.node == output.node);
                        if let Some(worst) = of_node.filter(|e| error > e.error) {
                            (worst.output, worst.call, worst.error) = (output.output, call, error);
                        }
                    }
                    for (value, array) in outputs.iter_mut() {
                        *array = stock[value.node][value.output].clone();
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(errors)
}

/// What a fused node promises: what its pattern does, or, if it reads a cache that is held in fewer bits, what the op that
/// keeps the cache does.
fn class_of(graph: &Graph, node: usize) -> Fidelity {
    let node = &graph.nodes[node];
    let keeper = |v: &Value| graph.nodes[v.node].op.fused().filter(|f| f.body.held_in(v.output).is_some());
    let all = node.op.fused().into_iter().chain(node.inputs.iter().filter_map(keeper));
    all.map(|fused| fused.class).max().unwrap_or(Fidelity::BitExact)
}

/// The error of each output of a node. An output of whole numbers is a choice of experts: its order says nothing, and the
/// outputs beside it follow its order.
fn differences(
    found: &[(Value, Array)],
    stock: &[Vec<Array>],
    scores: &dyn Fn(usize) -> zmlx_mlx::Result<Option<Array>>,
) -> zmlx_mlx::Result<Vec<(Value, f64)>> {
    let wanted = |value: &Value| &stock[value.node][value.output];
    let mut out = Vec::new();
    let mut choice = None;
    for (value, array) in found.iter().filter(|(_, a)| a.dtype() == Dtype::Uint32) {
        let chosen = Choice::new(array, wanted(value))?;
        let error = match chosen.differs() {
            false => 0.0,
            true => scores(value.node)?.map_or(Ok(f64::INFINITY), |s| chosen.error(&s))?,
        };
        out.push((*value, error));
        choice = Some((array.shape().to_vec(), chosen));
    }
    for (value, array) in found.iter().filter(|(_, a)| a.dtype() != Dtype::Uint32) {
        let (mut own, mut theirs) = (floats(array)?, floats(wanted(value))?);
        if let Some((_, chosen)) = choice.as_ref().filter(|(shape, _)| shape == array.shape()) {
            (own, theirs) = chosen.aligned(&own, &theirs);
        }
        out.push((*value, relative(&own, &theirs)));
    }
    Ok(out)
}

fn floats(array: &Array) -> zmlx_mlx::Result<Vec<f32>> {
    array.astype(Dtype::Float32)?.to_vec::<f32>()
}

fn root_mean_square(values: &[f32]) -> f64 {
    let finite = || values.iter().filter(|v| v.is_finite()).map(|v| f64::from(*v));
    let count = finite().count().max(1) as f64;
    (finite().map(|v| v * v).sum::<f64>() / count).sqrt()
}

/// Largest absolute difference over the root mean square of what is wanted. Equal infinities, and NaN on both sides, are
/// no difference.
fn relative(found: &[f32], wanted: &[f32]) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    let worst = found.iter().zip(wanted).map(|(f, w)| match (f.is_finite(), w.is_finite()) {
        (true, true) => (f64::from(*f) - f64::from(*w)).abs(),
        (false, false) if f == w || (f.is_nan() && w.is_nan()) => 0.0,
        _ => f64::INFINITY,
    });
    let worst = worst.fold(0.0, f64::max);
    if worst == 0.0 { 0.0 } else { worst / root_mean_square(wanted).max(f64::MIN_POSITIVE) }
}

/// Experts that both sides chose for each row, `k` a row, with their places before they were sorted.
struct Choice {
    k: usize,
    found: Vec<(u32, usize)>,
    wanted: Vec<(u32, usize)>,
}

impl Choice {
    fn new(found: &Array, wanted: &Array) -> zmlx_mlx::Result<Self> {
        let k = found.shape().last().map_or(1, |k| (*k).max(1) as usize);
        let sorted = |array: &Array| -> zmlx_mlx::Result<Vec<(u32, usize)>> {
            let mut pairs: Vec<(u32, usize)> =
                array.astype(Dtype::Uint32)?.to_vec::<u32>()?.into_iter().zip(0..).collect();
            pairs.chunks_mut(k).for_each(<[_]>::sort_unstable);
            Ok(pairs)
        };
        Ok(Self { k, found: sorted(found)?, wanted: sorted(wanted)? })
    }

    /// Both sides' choices of each row.
    fn rows(&self) -> impl Iterator<Item = (Vec<u32>, Vec<u32>)> + '_ {
        let experts = |row: &[(u32, usize)]| row.iter().map(|(expert, _)| *expert).collect::<Vec<_>>();
        self.found.chunks(self.k).zip(self.wanted.chunks(self.k)).map(move |(f, w)| (experts(f), experts(w)))
    }

    fn differs(&self) -> bool {
        self.found.len() != self.wanted.len() || self.rows().any(|(f, w)| f != w)
    }

    /// By how much the scores of what only one side chose lie apart.
    fn error(&self, scores: &Array) -> zmlx_mlx::Result<f64> {
        let experts = scores.shape().last().map_or(1, |n| (*n).max(1) as usize);
        let scores = floats(scores)?;
        let scale = root_mean_square(&scores).max(f64::MIN_POSITIVE);
        let mut worst: f64 = 0.0;
        for ((found, wanted), row) in self.rows().zip(scores.chunks(experts)) {
            let of = |expert: &u32| row.get(*expert as usize).map_or(f64::NEG_INFINITY, |s| f64::from(*s));
            let missed =
                wanted.iter().filter(|e| !found.contains(e)).map(of).fold(f64::NEG_INFINITY, f64::max);
            let taken = found.iter().filter(|e| !wanted.contains(e)).map(of).fold(f64::INFINITY, f64::min);
            if missed.is_finite() || taken.is_finite() {
                worst = worst.max((missed - taken).abs() / scale);
            }
        }
        Ok(worst)
    }

    /// What goes with the choices, in their order, of the rows that chose alike.
    fn aligned(&self, found: &[f32], wanted: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let alike = self.rows().map(|(f, w)| f == w);
        let places = self.found.chunks(self.k).zip(self.wanted.chunks(self.k)).zip(alike);
        let places = places.filter(|(_, alike)| *alike).flat_map(|((f, w), _)| f.iter().zip(w));
        places.filter_map(|(f, w)| Some((*found.get(f.1)?, *wanted.get(w.1)?))).unzip()
    }
}

impl Executor {
    /// What the first node named one of `ops` in a fused node's reference is given as its first input, when the fused node gets
    /// `inputs`; none if there is no such node.
    fn inner_input(
        &self,
        index: usize,
        ops: &[&str],
        tokens: &Array,
        position: i32,
        inputs: &[Array],
    ) -> zmlx_mlx::Result<Option<Array>> {
        let Some(fused) = self.graph().nodes[index].op.fused() else { return Ok(None) };
        let mut state = self.new_state();
        state.position = position;
        let mut context = self.context(tokens, &mut state);
        let mut seen = None;
        let run = fused.reference.fold(inputs, |node, given| {
            if ops.contains(&node.op.name()) && seen.is_none() {
                seen = given.first().cloned();
            }
            node.op.run(&mut context, &given.iter().collect::<Vec<_>>())
        });
        run.map(|_| seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[u32]) -> Array {
        Array::from_slice(values, &[1, values.len() as i32 / 2, 2]).unwrap()
    }

    #[test]
    fn differences_are_relative_and_numbers_must_be_numbers() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert_eq!(relative(&[1.0, -1.0], &[1.0, -1.0]), 0.0);
        assert!((relative(&[2.0, -2.0], &[2.0, -2.2]) - 0.2 / (4.42f64).sqrt()).abs() < 1e-6);
        assert_eq!(relative(&[nan, -inf, 1.0], &[nan, -inf, 1.0]), 0.0);
        assert_eq!(relative(&[nan, 1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(relative(&[1.0, 1.0], &[inf, 1.0]), f64::INFINITY);
        assert_eq!(relative(&[1.0], &[1.0, 1.0]), f64::INFINITY);
        assert!(relative(&[1e-3], &[0.0]) > 1e9, "nothing was expected");
    }

    #[test]
    fn the_order_of_choices_says_nothing_but_the_choice_does() {
        let same = Choice::new(&of(&[3, 1, 0, 2]), &of(&[1, 3, 0, 2])).unwrap();
        assert!(!same.differs());
        assert_eq!(same.aligned(&[0.3, 0.1, 0.0, 0.2], &[0.1, 0.3, 0.0, 0.2]).0, [0.1, 0.3, 0.0, 0.2]);
        let other = Choice::new(&of(&[3, 1, 0, 2]), &of(&[1, 2, 0, 2])).unwrap();
        assert!(other.differs());
        let scores =
            |third: f32| Array::from_slice(&[0.0, 1.0, third, 0.5, 1., 1., 1., 1.], &[1, 2, 4]).unwrap();
        assert!(other.error(&scores(0.5)).unwrap() == 0.0, "a tie");
        assert!(other.error(&scores(0.9)).unwrap() > 0.3);
        assert_eq!(
            other.aligned(&[1.0, 2.0, 3.0, 4.0], &[1.0, 2.0, 3.0, 4.0]).0,
            [3.0, 4.0],
            "the second row"
        );
    }
}
