//! Running a graph both ways.

use std::sync::Arc;

use zmlx_graph::pattern::{Backend, Choice, Pattern, PatternReport, Rewritten, rewrite};
use zmlx_graph::{Executor, Fidelity, Graph, Sizes, State, Value, Wanted, patterns};
use zmlx_mlx::{Array, Dtype};

use super::setup::{OUTLIERS, Storage, Tensors, ZEROS, noise};

/// A batch and the lengths of calls, one after another.
pub type Calls = (i32, &'static [i32]);

/// What an output is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Rows of numbers.
    Numbers,
    /// The experts chosen for each token, in any order, and their weights.
    Choice { indices: Value, weights: Value },
}

/// A graph that a pattern matches.
#[derive(Debug, Clone)]
pub struct Case {
    pub label: String,
    pub graph: Graph,
    pub storage: Storage,
    /// Patterns that must have matched before.
    pub before: &'static [&'static str],
    pub kind: Kind,
}

/// By how much a body may be off, as a part of a row's root mean square: the root mean square of the error, and its largest.
///
/// Products hold activations in 16 bits a group, which loses 1e-5 of the largest in it.
pub fn bound(class: Fidelity) -> (f64, f64) {
    match class {
        Fidelity::BitExact => (0.0, 0.0),
        Fidelity::TokenIdentical => (2e-4, 1e-3),
        Fidelity::Bounded => (1e-2, 5e-2),
    }
}

/// The graph rewritten with these patterns and no others.
pub fn rewritten(graph: &Graph, names: &[&str]) -> Rewritten {
    let patterns = names.iter().map(|n| patterns::named(n).unwrap_or_else(|| panic!("no {n}"))).collect();
    let choice = Choice { patterns, max_class: Fidelity::Bounded, backend: Backend::Cpu };
    rewrite(graph, &choice).unwrap()
}

pub fn report<'a>(r: &'a Rewritten, name: &str) -> &'a PatternReport {
    r.patterns.iter().find(|p| p.name == name).unwrap()
}

/// The graph on MLX, and with fused ops on the engine.
pub struct Both {
    stock: Executor,
    fused: Executor,
    states: Option<(State, State)>,
}

impl Both {
    pub fn new(stock: &Graph, fused: Graph, tensors: &Tensors) -> Self {
        let stock = Executor::new(Arc::new(stock.clone()), |s| tensors.converted(s)).unwrap();
        let fused = Executor::native(
            Arc::new(fused),
            2,
            |spec, bytes| tensors.write(spec, bytes),
            |spec| tensors.converted(spec),
        );
        let fused = fused.unwrap();
        Self { stock, fused, states: None }
    }

    pub fn begin(&mut self) {
        self.states = Some((self.stock.new_state(), self.fused.new_state()));
    }

    /// The outputs of a call for some positions.
    pub fn wanted(&mut self, batch: i32, ids: &[u32], wanted: Wanted) -> (Option<Array>, Option<Array>) {
        let (stock, fused) = self.states.as_mut().unwrap();
        let ids = Array::from_slice(ids, &[batch, ids.len() as i32 / batch]).unwrap();
        let expected = self.stock.run_for(&ids, stock, wanted).unwrap();
        (expected, self.fused.run_for(&ids, fused, wanted).unwrap())
    }

    /// The outputs of a call, stock and fused.
    pub fn call(&mut self, batch: i32, ids: &[u32]) -> (Array, Array) {
        let (stock, fused) = self.states.as_mut().unwrap();
        let ids = Array::from_slice(ids, &[batch, ids.len() as i32 / batch]).unwrap();
        let expected = self.stock.run(&ids, stock).unwrap();
        (expected, self.fused.run(&ids, fused).unwrap())
    }
}

/// Compares all calls; gives how many rows were compared.
pub fn compare(pattern: &Pattern, case: &Case, calls: &[Calls]) -> usize {
    let mut names = case.before.to_vec();
    names.push(pattern.name);
    let label = format!("{}, {}, {}", pattern.name, case.label, case.storage.label);
    let with_output = |output: Value| Graph { output, ..case.graph.clone() };
    let outputs = match case.kind {
        Kind::Numbers => vec![case.graph.output],
        Kind::Choice { indices, weights } => vec![indices, weights],
    };
    let tensors = Tensors::new(&case.graph, &case.storage);
    let mut all: Vec<Both> = Vec::new();
    for output in outputs {
        let stock = with_output(output);
        let fused = rewritten(&stock, &names);
        let found = report(&fused, pattern.name);
        assert!(found.matched >= 1, "{label} does not match: {:?}\n{stock}", found.refused);
        let printed = fused.graph.to_string();
        let mine = fused.graph.nodes.iter().filter(|n| n.op.pattern() == Some(pattern.name)).count();
        assert!(mine >= 1, "{label} is not in the graph that is to run:\n{printed}");
        all.push(Both::new(&stock, fused.graph, &tensors));
    }
    let mut rows = 0;
    for (batch, lengths) in calls {
        all.iter_mut().for_each(Both::begin);
        for (number, &length) in lengths.iter().enumerate() {
            let ids: Vec<u32> = noise(&format!("ids {number}"), (batch * length) as usize)
                .iter()
                .map(|v| (v.abs() * ZEROS as f32) as u32 % ZEROS)
                .enumerate()
                .map(|(i, id)| if i % 11 == 7 { OUTLIERS } else { id })
                .collect();
            let made: Vec<(Array, Array)> = all.iter_mut().map(|b| b.call(*batch, &ids)).collect();
            let label = format!("{label}, batch {batch}, call {number} of {lengths:?}");
            rows += match case.kind {
                Kind::Numbers => close(&label, &made[0].0, &made[0].1, bound(pattern.class)),
                Kind::Choice { .. } => same_choice(&label, &made[0], &made[1]),
            };
        }
    }
    rows
}

pub fn floats(a: &Array) -> Vec<f32> {
    a.astype(Dtype::Float32).unwrap().to_vec::<f32>().unwrap()
}

/// Whether two outputs agree row by row; NaN must be where NaN is. Gives how many rows.
pub fn close(label: &str, expected: &Array, found: &Array, bound: (f64, f64)) -> usize {
    close_but_for(0, label, expected, found, bound)
}

/// [`close`], where that many rows may be further off: a bounded error may tip a router's near-tie, and other experts answer.
pub fn close_but_for(
    mut others: usize,
    label: &str,
    expected: &Array,
    found: &Array,
    (mean, most): (f64, f64),
) -> usize {
    assert_eq!(expected.shape(), found.shape(), "{label}");
    let width = *expected.shape().last().unwrap() as usize;
    let (expected, found) = (floats(expected), floats(found));
    for (row, (e, f)) in expected.chunks(width).zip(found.chunks(width)).enumerate() {
        if e.iter().any(|v| !v.is_finite()) {
            let differ = e.iter().zip(f).position(|(e, f)| e.is_finite() != f.is_finite());
            assert!(differ.is_none(), "{label}, row {row}: {:?} is not finite on one side only", differ);
            continue;
        }
        let square = |v: f64| v * v;
        let rms = (e.iter().map(|v| square(f64::from(*v))).sum::<f64>() / width as f64).sqrt();
        let errors = || e.iter().zip(f).map(|(e, f)| (f64::from(*e) - f64::from(*f)).abs());
        let error = (errors().map(square).sum::<f64>() / width as f64).sqrt();
        let worst = errors().fold(0.0, |m: f64, v| if v.is_nan() { f64::NAN } else { m.max(v) });
        let fine = error <= mean * rms && worst <= most * rms;
        if !fine && others > 0 && worst.is_finite() {
            others -= 1;
            continue;
        }
        assert!(
            fine,
            "{label}, row {row}: error {:e}, worst {:e} of {rms:e}; {mean:e} and {most:e} allowed\n{:?}\n{:?}",
            error / rms,
            worst / rms,
            &e[..width.min(8)],
            &f[..width.min(8)]
        );
    }
    expected.len() / width
}

/// Largest difference of two weights, relative to the expected one. A softmax makes an error of a logit the same relative
/// error of a weight.
const WEIGHTS_DIFFER: f32 = 1e-5;

/// Whether the same experts are chosen, with the same weights. Where the least of the chosen ones is another, its weight
/// must be the same: then the two are tied but for rounding.
pub fn same_choice(label: &str, indices: &(Array, Array), weights: &(Array, Array)) -> usize {
    assert_eq!(indices.0.shape(), indices.1.shape(), "{label}");
    let k = *indices.0.shape().last().unwrap() as usize;
    let pairs = |indices: &Array, weights: &Array| -> Vec<Vec<(u32, f32)>> {
        let all: Vec<(u32, f32)> =
            indices.to_vec::<u32>().unwrap().into_iter().zip(floats(weights)).collect();
        let sorted = |row: &[(u32, f32)]| {
            let mut row = row.to_vec();
            row.sort_by_key(|p| p.0);
            row
        };
        all.chunks(k).map(sorted).collect()
    };
    let (expected, found) = (pairs(&indices.0, &weights.0), pairs(&indices.1, &weights.1));
    for (row, (e, f)) in expected.iter().zip(&found).enumerate() {
        let least = |p: &[(u32, f32)]| p.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1));
        let only = |a: &[(u32, f32)], b: &[(u32, f32)]| -> Vec<(u32, f32)> {
            a.iter().filter(|p| b.iter().all(|q| q.0 != p.0)).copied().collect()
        };
        let alike =
            |a: f32, b: f32| (a - b).abs() <= WEIGHTS_DIFFER * a.abs() + 1e-12 || a.is_nan() && b.is_nan();
        match (only(e, f).as_slice(), only(f, e).as_slice()) {
            ([], []) => {}
            ([a], [b]) => {
                let tied = least(e) == Some(*a) && least(f) == Some(*b) && alike(a.1, b.1);
                assert!(tied, "{label}, row {row}: {e:?} and {f:?}");
            }
            _ => panic!("{label}, row {row}: {e:?} and {f:?}"),
        }
        for (e, f) in e.iter().filter_map(|e| Some((e, f.iter().find(|f| f.0 == e.0)?))) {
            assert!(alike(e.1, f.1), "{label}, row {row}: {e:?} and {f:?}");
        }
    }
    expected.len()
}

/// Whether every value of a graph has the shape and dtype that were inferred.
pub fn types(case: &Case) {
    let types = case.graph.infer().unwrap();
    let tensors = Tensors::new(&case.graph, &case.storage);
    for value in case.graph.values() {
        let graph = Graph { output: value, ..case.graph.clone() };
        let executor = Executor::new(Arc::new(graph), |s| tensors.converted(s)).unwrap();
        let mut state = executor.new_state();
        for length in [1, 3] {
            let position = state.position().into();
            let ids = Array::from_vec(vec![3u32; 2 * length as usize], &[2, length]).unwrap();
            let found = executor.run(&ids, &mut state).unwrap();
            let inferred = types.get(value).unwrap();
            let sizes = Sizes { batch: 2, length: length.into(), position };
            let shape: Vec<i32> = inferred.shape.0.iter().map(|d| d.at(sizes) as i32).collect();
            let node = &case.graph.nodes[value.place().0];
            let label = format!("{}: {} {value}: {inferred}", case.label, node.op.name());
            assert_eq!(found.shape(), shape, "{label}");
            assert_eq!(found.dtype(), inferred.dtype.resolve(Dtype::Float32), "{label}");
        }
    }
}
