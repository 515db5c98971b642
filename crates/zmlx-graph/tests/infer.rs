//! Inferred types against what MLX gives, and the words for graphs whose shapes do not fit.

use std::sync::Arc;

use zmlx_graph::ops::*;
use zmlx_graph::state::SlotKind;
use zmlx_graph::weights::Format;
use zmlx_graph::{Builder, Executor, Graph, GraphError, Sizes, Value};
use zmlx_mlx::{Array, Dtype, Result};

mod support;
use support::{WIDTH, everything, quantized, tensor};

#[test]
fn every_value_has_the_shape_and_dtype_that_was_inferred() -> Result<()> {
    let (whole, nodes) = everything();
    check_types(&whole, nodes)?;
    let (whole, nodes) = latent_attention();
    check_types(&whole, nodes)
}

/// Latent attention, dense and sparse. No call sees as many positions as are chosen: then there are fewer.
fn latent_attention() -> (Graph, usize) {
    let mut b = Builder::new(&quantized);
    let ids = b.tokens();
    let x = b.embedding("embed", ids, 64, WIDTH);
    let heads_first = |b: &mut Builder<'_>, path: &str, heads: i32, width: i32| {
        let x = b.linear(path, x, heads * width, WIDTH);
        let x = b.node(path, SplitHeads { heads }, &[x]);
        b.node(path, Transpose(vec![0, 2, 1, 3]), &[x])
    };
    let (heads, latent, nope, value) = (3, 64, 32, 16);
    let [q, q_pe] = [("q", nope), ("q_pe", 8)].map(|(path, width)| heads_first(&mut b, path, heads, width));
    let [c, k_pe] = [("c", latent), ("k_pe", 8)].map(|(path, width)| heads_first(&mut b, path, 1, width));
    let slot = b.slot("mla", SlotKind::KvCache);
    let [c, k_pe] = b.node_n("mla", KvAppend { slot }, &[c, k_pe]);
    let embed = b.matrices("embed_q", [heads, latent, nope]);
    let unembed = b.matrices("unembed_out", [heads, value, latent]);
    let attention = MlaAttention { embed, unembed, scale: 0.2 };
    let dense = b.node("mla", attention, &[q, q_pe, c, k_pe]);
    let (index_q, index_k) = (heads_first(&mut b, "iq", 2, 24), heads_first(&mut b, "ik", 1, 24));
    let [column, _] = b.node_n("index", SplitAt { at: vec![1] }, &[index_k]);
    let slot = b.slot("index", SlotKind::KvCache);
    let [keys, _] = b.node_n("index", KvAppend { slot }, &[index_k, column]);
    let weights = b.linear("weights", x, 2, WIDTH);
    let positions = b.node("index", TopPositions { k: 50 }, &[index_q, keys, weights]);
    let sparse = b.node("mla", SparseMlaAttention(attention), &[q, q_pe, c, k_pe, positions]);
    let out = b.add("out", dense, sparse);
    let last = out.to_string()[1..].parse().unwrap();
    (b.finish(out), last)
}

/// Runs the graph up to each of its values, and compares.
fn check_types(whole: &Graph, nodes: usize) -> Result<()> {
    let types = whole.infer().unwrap();
    // Few expert rows: the sorted form of a long call has another shape, which is documented.
    for (batch, lengths) in [(1, [1, 2, 5]), (2, [3, 1, 1])] {
        for node in 0..=nodes {
            for output in 0..types.node(node).len() {
                let mut graph = whole.clone();
                // As a reader sees it: `%node` or `%node.output`.
                graph.output = whole.values().find(|v| v.place() == (node, output)).unwrap();
                let executor = Executor::new(Arc::new(graph), tensor).unwrap();
                let mut state = executor.graph().new_state();
                for length in lengths {
                    let position = state.position().into();
                    let ids = Array::from_vec(vec![3u32; (batch * length) as usize], &[batch, length])?;
                    let found = executor.run(&ids, &mut state).unwrap();
                    let inferred = &types.node(node)[output];
                    let sizes = Sizes { batch: batch.into(), length: length.into(), position };
                    let shape: Vec<i64> = inferred.shape.0.iter().map(|d| d.at(sizes)).collect();
                    let expected = (shape, inferred.dtype.resolve(Dtype::Float32));
                    let found = (found.shape().iter().map(|&d| d.into()).collect(), found.dtype());
                    let node = &whole.nodes[node];
                    assert_eq!(found, expected, "{} at {}: {inferred}", node.op.name(), node.path);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn shapes_are_symbolic_and_the_state_has_them_too() {
    let (graph, _) = everything();
    let types = graph.infer().unwrap();
    let of = |name: &str| {
        let node = graph.nodes.iter().position(|n| n.op.name() == name).unwrap();
        types.node(node).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    let cases = [
        ("tokens", "[B, L] uint32"),
        ("attention", "[B, 4, L, 8] activation"),
        ("kv_append", "[B, 2, S, 8] activation [B, 2, S, 8] activation"),
        ("conv_step", "[B, L+2, 32] activation"),
        ("depthwise_conv1d", "[B, L, 32] activation"),
        ("add_weight", "[B, L, 6] float32"),
        ("top_k_indices", "[B, L, 3] uint32"),
        ("expert_linear", "[B, L, 3, 1, 64] activation"),
        ("expert_unsort", "[B, L, 3, 32] activation"),
    ];
    for (name, expected) in cases {
        assert_eq!(of(name), expected, "{name}");
    }
    let slots: Vec<String> = graph.slot_ids().map(|id| types.slot(id)[0].to_string()).collect();
    assert_eq!(slots, ["[B, 2, S, 8] activation", "[B, 2, 32] activation"]);
}

/// Writes one wrong node after an embedding of `[B, L, 32]`, and gives the message.
fn message(write: impl FnOnce(&mut Builder<'_>, Value) -> Value) -> String {
    let dense = |_: &str, _: i32| Format::Dense;
    let mut b = Builder::new(&dense);
    let ids = b.tokens();
    let x = b.embedding("embed", ids, 64, WIDTH);
    let out = write(&mut b, x);
    let error = b.finish(out).infer().unwrap_err();
    assert!(matches!(error, GraphError::Shape { .. }), "{error}");
    error.to_string()
}

#[test]
fn what_does_not_fit_is_said_with_place_found_and_expected() {
    type Write = fn(&mut Builder<'_>, Value) -> Value;
    let cases: &[(Write, &[&str])] = &[
        (
            |b, x| b.linear("mlp.up", x, 8, 31),
            &["%2 at mlp.up: linear: input 0 is [B, L, 32] activation, expected [..., 31]", "mlp.up"],
        ),
        (|b, x| b.rms_norm("norm", x, 16, 1e-5), &["rms_norm", "[..., 16]", "[B, L, 32]"]),
        (|b, x| b.node("a", SplitHeads { heads: 5 }, &[x]), &["split_heads", "n * 5"]),
        (|b, x| b.node("a", SplitHeads { heads: 0 }, &[x]), &["split_heads", "n * 0"]),
        (|b, x| b.node("a", Split { parts: 3 }, &[x]), &["split", "n * 3"]),
        (|b, x| b.node("a", Transpose(vec![0, 1]), &[x]), &["transpose", "[0, 1]"]),
        (|b, x| b.node("a", Transpose(vec![0, 0, 2]), &[x]), &["transpose", "each once"]),
        (|b, x| b.node("a", Sum { axis: 3, keepdims: true }, &[x]), &["sum", "axis 3"]),
        (|b, x| b.node("a", TopKIndices { k: 33 }, &[x]), &["top_k_indices", "33 or more"]),
        (|b, x| b.node("a", Binary::Add, &[x]), &["add: takes 2 inputs, not 1"]),
        (|b, x| b.node("a", Cast(None), &[x]), &["cast: takes 2 inputs, not 1"]),
        (
            |b, x| {
                let half = b.linear("half", x, 16, WIDTH);
                b.add("sum", x, half)
            },
            &["%3 at sum: add: input 1 is [B, L, 16]", "broadcasts with [B, L, 32]"],
        ),
        (|b, x| b.embedding("again", x, 4, 4), &["embedding", "integers"]),
        (
            |b, x| {
                let x = b.node("a", SplitHeads { heads: 4 }, &[x]);
                b.node("a", Rope { dims: 8, base: 1e4, traditional: false, scale: 1.0 }, &[x])
            },
            &["rope: input 0 is [B, L, 4, 8]", "[batch, heads, L, 8 or more]"],
        ),
        (
            |b, x| {
                let slot = b.slot("layer", SlotKind::ConvState { keep: 2 });
                let x = b.node("a", SplitHeads { heads: 4 }, &[x]);
                let x = b.node("a", Transpose(vec![0, 2, 1, 3]), &[x]);
                b.node("layer", KvAppend { slot }, &[x, x])
            },
            &["slot layer holds the last 2 inputs of a convolution, expected keys and values"],
        ),
        (
            |b, x| {
                let slot = b.slot("layer", SlotKind::ConvState { keep: 2 });
                let half = b.linear("half", x, 16, WIDTH);
                b.node("layer", ConvStep { slot, keep: 2 }, &[half]);
                b.node("other", ConvStep { slot, keep: 2 }, &[x])
            },
            &["other: conv_step: slot layer holds [B, 2, 32]", "expected [B, 2, 16]"],
        ),
        (
            |b, x| {
                let weight = b.tensor("w", &[WIDTH, 3]);
                b.node("conv", DepthwiseConv1d { weight, bias: None }, &[x])
            },
            &["conv: depthwise_conv1d: weight w is [32, 3], expected [channels, kernel, 1]"],
        ),
        (
            |b, x| {
                let x = b.node("a", SplitHeads { heads: 4 }, &[x]);
                let q = b.node("a", Transpose(vec![0, 2, 1, 3]), &[x]);
                let k = b.node("a", Split { parts: 2 }, &[q]);
                b.node("a", Attention { scale: 1.0 }, &[q, k, k])
            },
            &["attention: input 1 is [B, 4, L, 4]", "[B, kv_heads, S, 8]"],
        ),
        (
            |b, x| {
                let indices = b.node("a", TopKIndices { k: 2 }, &[x]);
                let weight = b.matrix("w", &[32, 8, 16]);
                b.node("w", ExpertLinear { weight, bias: None }, &[x, indices])
            },
            &["w: expert_linear: input 0 is [B, L, 32]", "rows [..., 1, 16]"],
        ),
        (
            |b, x| {
                let q = b.node("a", SplitHeads { heads: 4 }, &[x]);
                let q = b.node("a", Transpose(vec![0, 2, 1, 3]), &[q]);
                b.node("a", TopPositions { k: 4 }, &[q, q, x])
            },
            &["top_positions: input 1 is [B, 4, L, 8]", "[B, 1, S, 8]"],
        ),
        (
            |b, x| {
                let k = b.node("a", SplitHeads { heads: 1 }, &[x]);
                let k = b.node("a", Transpose(vec![0, 2, 1, 3]), &[k]);
                b.node("a", TopPositions { k: 0 }, &[k, k, x])
            },
            &["top_positions", "k=0"],
        ),
        (|b, x| b.node("a", ExpertUnsort, &[x, x, x]), &["expert_unsort", "one for each index"]),
        (|b, x| b.node("a", ExpertSort, &[x, x]), &["expert_sort: input 1", "[B, L, k] of integers"]),
        (|b, x| b.node("a", TakeAlongLast, &[x, x]), &["take_along_last: input 1", "integers"]),
    ];
    for (write, words) in cases {
        let text = message(*write);
        for word in *words {
            assert!(text.contains(word), "no '{word}' in: {text}");
        }
    }
}
