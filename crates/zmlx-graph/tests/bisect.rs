//! The op that is not what it replaces is found, and no other is blamed.

use std::sync::Arc;

use zmlx_engine::stages::{Linear as LinearStage, Source};
use zmlx_graph::bisect::{OpError, bisect};
use zmlx_graph::fused::Body;
use zmlx_graph::native::{Form, Lowering, LoweringError};
use zmlx_graph::ops::*;
use zmlx_graph::pattern::{Backend, Choice, Match, Pattern, rewrite};
use zmlx_graph::state::SlotKind;
use zmlx_graph::weights::{Format, Quantization, TensorSpec};
use zmlx_graph::{Builder, Executor, Fidelity, Graph, patterns};
use zmlx_mlx::{Array, Dtype, random};

/// A product with a residual that forgets the residual.
static BROKEN: Pattern = Pattern {
    name: "broken",
    summary: "a product that forgets what is added to it",
    class: Fidelity::TokenIdentical,
    templates: &["
        y = linear(n)
        h = add(y, r)
        return h
    "],
    build: |m: &Match<'_>| {
        let linear = m.need::<Linear>("y")?.clone();
        Ok(Arc::new(Forgetful { linear, input: m.input("n")? }))
    },
};

#[derive(Debug)]
struct Forgetful {
    linear: Linear,
    input: usize,
}

impl Body for Forgetful {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let matrix = l.matrix(self.linear.weight)?;
        let buffer = l.input(self.input, Form::Flat { width: matrix.columns() })?;
        let source = Source::new(buffer, None, &matrix);
        l.push(source.pack());
        let out = l.output(0, Form::Flat { width: matrix.rows() });
        l.push(LinearStage {
            source,
            matrix,
            bias: None,
            gate: None,
            residual: None,
            out,
            wanted_only: false,
        });
        Ok(())
    }
}

const WIDTH: i32 = 64;
const EXPERTS: i32 = 8;

/// Two layers of a convolution and experts, quantised.
fn graph() -> Graph {
    let format = |_: &str, _: i32| {
        Format::Quantized(Quantization { group_size: 32, bits: 4, mode: "affine".to_owned() })
    };
    let mut b = Builder::new(&format);
    let ids = b.tokens();
    let mut h = b.embedding("embed", ids, 128, WIDTH);
    for layer in 0..2 {
        let path = format!("layers.{layer}");
        let x = b.rms_norm(&format!("{path}.norm"), h, WIDTH, 1e-5);
        let mixed = conv(&mut b, &format!("{path}.conv"), x);
        h = b.add(&path, h, mixed);
        let x = b.rms_norm(&format!("{path}.ffn_norm"), h, WIDTH, 1e-5);
        let gate = b.linear(&format!("{path}.gate"), x, EXPERTS, WIDTH);
        let scores = b.node(&path, Softmax { precise: true }, &[gate]);
        let indices = b.node(&path, TopKIndices { k: 2 }, &[scores]);
        let weights = b.node(&path, TakeAlongLast, &[scores, indices]);
        let routed = experts(&mut b, &path, x, indices, weights);
        h = b.add(&path, h, routed);
    }
    let h = b.rms_norm("norm", h, WIDTH, 1e-5);
    let out = b.linear("embed", h, 128, WIDTH);
    b.finish(out)
}

fn conv(b: &mut Builder<'_>, path: &str, x: zmlx_graph::Value) -> zmlx_graph::Value {
    let keep = 2;
    let all = b.linear(&format!("{path}.in_proj"), x, 3 * WIDTH, WIDTH);
    let [gate, c, v] = b.node_n(path, Split { parts: 3 }, &[all]);
    let gated = b.multiply(path, gate, v);
    let slot = b.slot(path, SlotKind::ConvState { keep });
    let kept = b.node(path, ConvStep { slot, keep }, &[gated]);
    let weight = b.tensor(&format!("{path}.conv"), &[WIDTH, keep + 1, 1]);
    let y = b.node(path, DepthwiseConv1d { weight, bias: None }, &[kept]);
    let y = b.multiply(path, c, y);
    b.linear(&format!("{path}.out_proj"), y, WIDTH, WIDTH)
}

fn experts(
    b: &mut Builder<'_>,
    path: &str,
    x: zmlx_graph::Value,
    indices: zmlx_graph::Value,
    weights: zmlx_graph::Value,
) -> zmlx_graph::Value {
    let [rows, expert, order] = b.node_n(path, ExpertSort, &[x, indices]);
    let linear = |b: &mut Builder<'_>, name: &str, rows, out, input| {
        let weight = b.matrix(&format!("{path}.{name}"), &[EXPERTS, out, input]);
        b.node(path, ExpertLinear { weight, bias: None }, &[rows, expert])
    };
    let up = linear(b, "up", rows, 32, WIDTH);
    let gate = linear(b, "gate_proj", rows, 32, WIDTH);
    let y = b.node(path, SwiGlu, &[gate, up]);
    let y = linear(b, "down", y, WIDTH, 32);
    let y = b.node(path, ExpertUnsort, &[y, order, indices]);
    let weights = b.node(path, ExpandLast, &[weights]);
    let y = b.multiply(path, y, weights);
    b.node(path, Sum { axis: -2, keepdims: false }, &[y])
}

/// Random weights, the same for the same name.
fn tensor(spec: &TensorSpec) -> Option<Array> {
    let seed = spec.name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let key = random::key(seed).ok()?;
    let uniform = |low: f32, high: f32| {
        let (low, high) = (Array::from_slice(&[low], &[])?, Array::from_slice(&[high], &[])?);
        random::uniform(&low, &high, &spec.shape, Dtype::Float32, &key)
    };
    let made = match spec.name.as_str() {
        _ if !spec.float => random::bits(&spec.shape, 4, &key),
        name if name.ends_with("norm.weight") => uniform(0.5, 1.5),
        name if name.ends_with("scales") => uniform(0.005, 0.02),
        name if name.ends_with("biases") => uniform(-0.15, 0.0),
        _ => uniform(-0.5, 0.5),
    };
    made.and_then(|a| a.contiguous()).ok()
}

/// The same as bytes.
fn stored(spec: &TensorSpec, bytes: &mut Vec<u8>) -> Option<Dtype> {
    let array = tensor(spec)?;
    *bytes = array.view(Dtype::Uint8).and_then(|a| a.contiguous()).and_then(|a| a.to_vec::<u8>()).ok()?;
    Some(array.dtype())
}

/// A prompt of 9, then single tokens; the errors of all fused ops.
fn errors(extra: Option<&'static Pattern>) -> Vec<OpError> {
    let all = patterns::ALL.iter().copied();
    let patterns = extra.into_iter().chain(all).collect();
    let choice = Choice { patterns, max_class: Fidelity::Bounded, backend: Backend::Cpu };
    let graph = Arc::new(rewrite(&graph(), &choice).unwrap().graph);
    assert!(graph.nodes.iter().all(|n| n.op.fused().is_some()), "{graph}");
    let reference = Executor::new(Arc::clone(&graph), tensor).unwrap();
    let engine = Executor::separate(graph, 2, stored, tensor).unwrap();
    let call = |ids: &[u32]| Array::from_slice(ids, &[1, ids.len() as i32]).unwrap();
    let mut calls = vec![call(&[5, 3, 77, 1, 1, 100, 42, 9, 12])];
    calls.extend([3u32, 90, 17].map(|id| call(&[id])));
    bisect(&reference, &engine, &calls).unwrap()
}

#[test]
fn sound_ops_stay_within_their_class() {
    let errors = errors(None);
    assert_eq!(errors.len(), 1 + 2 * 4 + 1);
    for e in &errors {
        assert!(e.is_within() && e.error < e.bound / 5.0, "{e:?}");
    }
    assert!(errors.iter().any(|e| e.error > 0.0), "the engine does round");
}

#[test]
fn the_first_broken_op_is_named_and_no_other() {
    let errors = errors(Some(&BROKEN));
    let bad: Vec<&OpError> = errors.iter().filter(|e| !e.is_within()).collect();
    let names: Vec<(&str, &str)> = bad.iter().map(|e| (e.pattern.as_str(), e.path.as_str())).collect();
    assert_eq!(names, [("broken", "layers.0"), ("broken", "layers.1")], "its users are not blamed");
    assert!(bad[0].error > 0.1 && bad[0].output == 0);
}

/// Executors of one model share what is loaded: another set of patterns asks only for what no one had.
#[test]
fn weights_in_memory_are_not_asked_for_again() {
    let with = |names: &dyn Fn(&str) -> bool| {
        let patterns = patterns::ALL.iter().copied().filter(|p| names(p.name)).collect();
        let choice = Choice { patterns, max_class: Fidelity::TokenIdentical, backend: Backend::Cpu };
        Arc::new(rewrite(&graph(), &choice).unwrap().graph)
    };
    let (all, headless) = (with(&|_| true), with(&|name| !["lm_head", "norm_linear"].contains(&name)));
    let asked = std::cell::RefCell::new(Vec::new());
    let count = |spec: &TensorSpec| asked.borrow_mut().push(spec.name.clone());
    let write = |spec: &TensorSpec, bytes: &mut Vec<u8>| {
        count(spec);
        stored(spec, bytes)
    };
    let convert = |spec: &TensorSpec| {
        count(spec);
        tensor(spec)
    };
    let first = Executor::native(Arc::clone(&all), 2, write, convert).unwrap();
    assert!(asked.take().len() > 10);
    let mut held = first.held();
    let again = held.native(Arc::clone(&all), 1, write, convert).unwrap();
    let apart = held.separate(Arc::clone(&all), 1, write, convert).unwrap();
    assert!(asked.take().is_empty(), "all was there");
    // The head runs on MLX now, which wants it in its own form.
    let other = held.native(Arc::clone(&headless), 1, write, convert).unwrap();
    let missing = asked.take();
    assert!(!missing.is_empty() && missing.iter().all(|name| name.starts_with("embed")), "{missing:?}");
    held.join(other.held());
    let last = held.native(headless, 1, write, convert).unwrap();
    assert!(asked.take().is_empty(), "the head too is there now");
    let stock = held.stock(Arc::new(graph()), convert).unwrap();
    assert!(!asked.take().is_empty(), "MLX has none of what only the engine read");

    let ids = Array::from_slice(&[5u32, 3, 77], &[1, 3]).unwrap();
    let logits = |e: &Executor| e.run(&ids, &mut e.new_state()).unwrap().to_vec::<f32>().unwrap();
    let expected = logits(&first);
    assert_eq!(logits(&again), expected);
    assert_eq!(logits(&apart), expected);
    for other in [&other, &last, &stock] {
        let found = logits(other);
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-3));
    }
    // Those of another model are no use.
    let mut another = graph();
    another.weights[0].path.push_str(".other");
    let _ = held.native(Arc::new(another), 1, write, convert);
    assert!(asked.take().len() > 10);
}
