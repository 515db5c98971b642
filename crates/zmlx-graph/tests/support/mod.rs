//! A graph with one of each op, shared by tests.

#![allow(dead_code)] // each test file uses its part

use zmlx_graph::ops::*;
use zmlx_graph::state::SlotKind;
use zmlx_graph::weights::{Format, Quantization, TensorSpec};
use zmlx_graph::{Builder, Graph, Value};
use zmlx_mlx::{Array, Dtype};

const HEADS: i32 = 4;
const KV_HEADS: i32 = 2;
const HEAD: i32 = 8;
pub const WIDTH: i32 = 32;

pub fn quantized(path: &str, _: i32) -> Format {
    if path.ends_with("down") {
        return Format::Dense;
    }
    Format::Quantized(Quantization { group_size: 32, bits: 4, mode: "affine".to_owned() })
}

/// One of each op, in the ways that models put them together.
pub fn everything() -> (Graph, usize) {
    let mut b = Builder::new(&quantized);
    let ids = b.tokens();
    let x = b.embedding("embed", ids, 64, WIDTH);
    let x = b.rms_norm("norm", x, WIDTH, 1e-5);
    let heads_first = || Transpose(vec![0, 2, 1, 3]);
    let rope = || Rope { dims: HEAD, base: 1e4, traditional: false, scale: 1.0 };
    let q = b.linear("q", x, HEADS * HEAD, WIDTH);
    let q = b.node("q", SplitHeads { heads: HEADS }, &[q]);
    let q = b.node("q", heads_first(), &[q]);
    let q = b.node("q", rope(), &[q]);
    let kv = b.linear_bias("kv", x, 2 * KV_HEADS * HEAD, WIDTH);
    let [k, v] = b.node_n("kv", Split { parts: 2 }, &[kv]);
    let k = b.node("k", SplitHeads { heads: KV_HEADS }, &[k]);
    let k = b.node("k", heads_first(), &[k]);
    let frequencies = Frequencies::Factors { base: 1e4, factors: vec![1.0, 1.0, 2.0, 2.0] };
    let k = b.node("k", RopeFrequencies::new(HEAD, false, frequencies, 1.5), &[k]);
    let v = b.node("v", SplitHeads { heads: KV_HEADS }, &[v]);
    let v = b.node("v", heads_first(), &[v]);
    let slot = b.slot("attention", SlotKind::KvCache);
    let [k, v] = b.node_n("attention", KvAppend { slot }, &[k, v]);
    let y = b.node("attention", Attention { scale: 0.3 }, &[q, k, v]);
    let y = b.node("attention", MergeHeads, &[y]);
    let x = b.add("add", x, y);
    let keep = 2;
    let slot = b.slot("conv", SlotKind::ConvState { keep });
    let y = b.node("conv", ConvStep { slot, keep }, &[x]);
    let (weight, bias) = (b.tensor("conv", &[WIDTH, 3, 1]), b.bias("conv", WIDTH));
    let y = b.node("conv", DepthwiseConv1d { weight, bias: Some(bias) }, &[y]);
    let x = b.multiply("gate", x, y);
    let x = experts(&mut b, x);
    let out = b.linear("embed", x, 64, WIDTH);
    let last = out.to_string()[1..].parse().unwrap();
    (b.finish(out), last)
}

fn experts(b: &mut Builder<'_>, x: Value) -> Value {
    let (path, experts, hidden) = ("moe", 6, 64);
    let logits = b.linear("router", x, experts, WIDTH);
    let scores = b.node(path, Sigmoid, &[logits]);
    let wide = b.node(path, Cast(Some(Dtype::Float32)), &[scores]);
    let weight = b.bare_f32("moe.bias", &[experts]);
    let ranked = b.node(path, AddWeight { weight }, &[wide]);
    let indices = b.node(path, TopKIndices { k: 3 }, &[ranked]);
    let weights = b.node(path, TakeAlongLast, &[scores, indices]);
    let total = b.node(path, Sum { axis: -1, keepdims: true }, &[weights]);
    let total = b.node(path, AddScalar(1e-6), &[total]);
    let weights = b.node(path, Binary::Divide, &[weights, total]);
    let weights = b.node(path, Softmax { precise: true }, &[weights]);
    let weights = b.node(path, MultiplyScalar(1.5), &[weights]);
    let weights = b.node(path, Cast(None), &[weights, x]);
    let [rows, expert, order] = b.node_n(path, ExpertSort, &[x, indices]);
    let linear = |b: &mut Builder<'_>, name: &str, rows, out, input| {
        let weight = b.matrix(name, &[experts, out, input]);
        b.node(name, ExpertLinear { weight, bias: None }, &[rows, expert])
    };
    let up = linear(b, "moe.up", rows, hidden, WIDTH);
    let gate = linear(b, "moe.gate", rows, hidden, WIDTH);
    let y = b.node(path, SwiGlu, &[gate, up]);
    let y = linear(b, "moe.down", y, WIDTH, hidden);
    let y = b.node(path, ExpertUnsort, &[y, order, indices]);
    let weights = b.node(path, ExpandLast, &[weights]);
    let y = b.multiply(path, y, weights);
    b.node(path, Sum { axis: -2, keepdims: false }, &[y])
}

/// Small numbers of the right shape: what they are does not matter here.
pub fn tensor(spec: &TensorSpec) -> Option<Array> {
    let n: i32 = spec.shape.iter().product();
    let made = if spec.float {
        Array::from_vec((0..n).map(|i| (i % 7) as f32 * 0.1).collect(), &spec.shape)
    } else {
        Array::from_vec((0..n).map(|i| (i as u32).wrapping_mul(2_654_435_761)).collect(), &spec.shape)
    };
    made.ok()
}
