//! What patterns must leave alone, and what they say about it.

use zmlx_graph::ops::*;
use zmlx_graph::state::SlotKind;
use zmlx_graph::weights::{Format, Quantization};
use zmlx_graph::{Builder, Graph, Value};

use super::compare::{Both, close, report, rewritten};
use super::setup::{Storage, Tensors, VOCABULARY};

const WIDTH: i32 = 96;

fn packed(bits: i32, group_size: i32) -> Format {
    Format::Quantized(Quantization { group_size, bits, mode: "affine".to_owned() })
}

/// A graph whose matrices are 4-bit, but for paths that begin with a digit, which say their bits.
fn graph(write: impl FnOnce(&mut Builder<'_>, Value) -> Value) -> Graph {
    let format_of = |path: &str, _: i32| match path.chars().next().and_then(|c| c.to_digit(10)) {
        _ if path.starts_with("embed") => Format::Dense,
        Some(bits) => packed(bits as i32, 32),
        None => packed(4, 32),
    };
    let mut b = Builder::new(&format_of);
    let ids = b.tokens();
    let x = b.embedding("embed", ids, VOCABULARY, WIDTH);
    let out = write(&mut b, x);
    b.finish(out)
}

/// How often a pattern matched, and why it did not; the rewritten graph still runs and gives the same.
fn tried(graph: &Graph, names: &[&str]) -> (usize, Vec<String>) {
    let fused = rewritten(graph, names);
    let last = report(&fused, names[names.len() - 1]).clone();
    let storage = Storage {
        label: String::new(),
        format: Format::Dense,
        dtype: zmlx_mlx::Dtype::Float32,
        width: WIDTH,
    };
    let mut both = Both::new(graph, fused.graph, &Tensors::new(graph, &storage));
    both.begin();
    for ids in [&[1u32, 2, 3][..], &[4]] {
        let (expected, found) = both.call(1, ids);
        close(&format!("{names:?}"), &expected, &found, (2e-4, 1e-3));
    }
    (last.matched, last.refused)
}

const NOTHING: &str = "nothing in this graph looks like it";

#[track_caller]
fn refused(graph: &Graph, names: &[&str], why: &str) {
    let (matched, reasons) = tried(graph, names);
    assert_eq!(matched, 0, "{names:?} matched\n{graph}");
    assert!(reasons.iter().any(|r| r.contains(why)), "{names:?}: {reasons:?} without {why:?}");
}

fn mlp(b: &mut Builder<'_>, n: Value, gate: &str, up: &str) -> [Value; 3] {
    let (g, u) = (b.linear(gate, n, WIDTH, WIDTH), b.linear(up, n, WIDTH, WIDTH));
    let a = b.node("mlp", SwiGlu, &[g, u]);
    [g, a, b.linear("down", a, WIDTH, WIDTH)]
}

#[test]
fn a_norm_that_others_read_is_done_twice_and_stays() {
    let g = graph(|b, x| {
        let n = b.rms_norm("norm", x, WIDTH, 1e-5);
        let [.., y] = mlp(b, n, "gate", "up");
        // The residual is the norm itself, as where norms come after.
        b.add("residual", y, n)
    });
    assert_eq!(tried(&g, &["swiglu_mlp"]).0, 1);
    let left = rewritten(&g, &["swiglu_mlp"]).graph.to_string();
    assert!(left.contains("rms_norm"), "{left}");
}

#[test]
fn what_is_read_from_inside_stays_as_it_is() {
    for inner in 0..2 {
        let g = graph(|b, x| {
            let made = mlp(b, x, "gate", "up");
            b.add("leak", made[2], made[inner])
        });
        // The down product may be taken with its sum, but the part before it may not.
        refused(&g, &["swiglu_mlp"], NOTHING);
    }
    let g = graph(|b, x| {
        let y = b.linear("y", x, WIDTH, WIDTH);
        b.add("twice", y, y)
    });
    refused(&g, &["linear_residual"], NOTHING);
}

#[test]
fn an_activation_is_never_taken_for_another() {
    let with = |op: fn(&mut Builder<'_>, Value, Value) -> Value| {
        graph(move |b, x| {
            let (g, u) = (b.linear("gate", x, WIDTH, WIDTH), b.linear("up", x, WIDTH, WIDTH));
            let a = op(b, g, u);
            b.linear("down", a, WIDTH, WIDTH)
        })
    };
    let silu = with(|b, g, u| b.node("mlp", SwiGlu, &[g, u]));
    let sigmoid = with(|b, g, u| {
        let s = b.node("mlp", Sigmoid, &[g]);
        b.multiply("mlp", s, u)
    });
    refused(&silu, &["geglu_mlp"], NOTHING);
    for gelu in [GeGlu::Tanh, GeGlu::Erf] {
        let gelu = with(match gelu {
            GeGlu::Tanh => |b, g, u| b.node("mlp", GeGlu::Tanh, &[g, u]),
            GeGlu::Erf => |b, g, u| b.node("mlp", GeGlu::Erf, &[g, u]),
        });
        refused(&gelu, &["swiglu_mlp"], NOTHING);
        assert_eq!(tried(&gelu, &["swiglu_mlp", "geglu_mlp"]).0, 1);
    }
    assert_eq!(tried(&silu, &["swiglu_mlp"]).0, 1);
    for name in ["swiglu_mlp", "geglu_mlp"] {
        refused(&sigmoid, &[name], NOTHING);
    }
}

#[test]
fn parts_that_are_stored_differently_are_refused() {
    let g = graph(|b, x| mlp(b, x, "4.gate", "8.up")[2]);
    refused(&g, &["swiglu_mlp"], "stored differently");
    // Queries, keys and values are then products of their own.
    for (k, v) in [("8.k", "v"), ("k", "6.v")] {
        let g = graph(|b, x| attention(b, x, k, v));
        assert_eq!(tried(&g, &["qkv_rope_append"]).0, 1);
        assert_eq!(tried(&g, &["qkv_rope_append", "attention_out"]).0, 1);
    }
}

fn attention(b: &mut Builder<'_>, x: Value, k: &str, v: &str) -> Value {
    let mut part = |path: &str, heads: i32| {
        let y = b.linear(path, x, heads * 8, WIDTH);
        let y = b.node(path, SplitHeads { heads }, &[y]);
        b.node(path, Transpose(vec![0, 2, 1, 3]), &[y])
    };
    let (q, k, v) = (part("q", 12), part(k, 4), part(v, 4));
    let slot = b.slot("attention", SlotKind::KvCache);
    let [keys, values] = b.node_n("attention", KvAppend { slot }, &[k, v]);
    let y = b.node("attention", Attention { scale: 0.3 }, &[q, keys, values]);
    let y = b.node("attention", MergeHeads, &[y]);
    b.linear("out", y, WIDTH, WIDTH)
}

#[test]
fn sums_that_broadcast_are_no_residuals() {
    let narrow = |b: &mut Builder<'_>, x: Value| b.linear("narrow", x, 1, WIDTH);
    let g = graph(|b, x| {
        let (y, r) = (b.linear("y", x, WIDTH, WIDTH), narrow(b, x));
        b.add("sum", y, r)
    });
    refused(&g, &["linear_residual"], "another shape");
    let g = graph(|b, x| {
        let r = narrow(b, x);
        let [.., y] = mlp(b, x, "gate", "up");
        b.add("sum", y, r)
    });
    // It may still be taken without the sum.
    tried(&g, &["swiglu_mlp"]);
    let g = graph(|b, x| {
        let r = narrow(b, x);
        let h = b.add("sum", x, r);
        b.rms_norm("norm", h, WIDTH, 1e-5)
    });
    refused(&g, &["residual_norm"], "another shape");
    let g = graph(|b, x| {
        let r = narrow(b, x);
        let y = attention(b, x, "k", "v");
        b.add("sum", y, r)
    });
    tried(&g, &["qkv_rope_append", "attention_out"]);
}

#[test]
fn norms_over_heads_and_products_that_are_no_head_are_refused() {
    let g = graph(|b, x| {
        let y = b.node("heads", SplitHeads { heads: 12 }, &[x]);
        let y = b.node("heads", Transpose(vec![0, 2, 1, 3]), &[y]);
        let y = b.rms_norm("norm", y, 8, 1e-5);
        b.node("heads", MergeHeads, &[y])
    });
    refused(&g, &["rmsnorm"], "one row a token");
    let g = graph(|b, x| {
        let y = b.linear("y", x, WIDTH, WIDTH);
        b.node("end", Sigmoid, &[y])
    });
    refused(&g, &["lm_head"], "not the head");
    let g = graph(|b, x| {
        let h = b.node("heads", SplitHeads { heads: 12 }, &[x]);
        let h = b.add("sum", h, h);
        let n = b.rms_norm("norm", h, 8, 1e-5);
        let n = b.node("heads", Transpose(vec![0, 2, 1, 3]), &[n]);
        b.node("heads", MergeHeads, &[n])
    });
    refused(&g, &["residual_norm"], "one row a token");
    let g = graph(|b, x| {
        let h = b.node("heads", SplitHeads { heads: 3 }, &[x]);
        let y = b.linear("y", h, 32, 32);
        let h = b.add("sum", y, h);
        let h = b.node("heads", Transpose(vec![0, 2, 1, 3]), &[h]);
        b.node("heads", MergeHeads, &[h])
    });
    refused(&g, &["linear_residual"], "one row a token");
}

#[test]
fn experts_without_a_fused_router_are_refused() {
    let g = graph(|b, x| {
        let logits = b.linear("router", x, 4, WIDTH);
        let scores = b.node("router", Sigmoid, &[logits]);
        let indices = b.node("router", TopKIndices { k: 2 }, &[scores]);
        let weights = b.node("router", TakeAlongLast, &[scores, indices]);
        let [rows, expert, order] = b.node_n("moe", ExpertSort, &[x, indices]);
        let mut linear = |path: &str, rows| {
            let weight = b.matrix(path, &[4, WIDTH, WIDTH]);
            b.node(path, ExpertLinear { weight, bias: None }, &[rows, expert])
        };
        let (up, gate) = (linear("up", rows), linear("5.gate", rows));
        let a = b.node("moe", SwiGlu, &[gate, up]);
        let weight = b.matrix("down", &[4, WIDTH, WIDTH]);
        let down = b.node("down", ExpertLinear { weight, bias: None }, &[a, expert]);
        let y = b.node("moe", ExpertUnsort, &[down, order, indices]);
        let w = b.node("moe", ExpandLast, &[weights]);
        let y = b.multiply("moe", y, w);
        b.node("moe", Sum { axis: -2, keepdims: false }, &[y])
    });
    refused(&g, &["moe_mlp"], "stored differently");
    refused(&g, &["router", "moe_mlp"], "stored differently");
}

#[test]
fn a_weight_of_a_result_is_one_a_token() {
    let g = graph(|b, x| {
        let [.., y] = mlp(b, x, "gate", "up");
        let w = b.linear("weight", x, WIDTH, WIDTH);
        let w = b.node("mlp", Sigmoid, &[w]);
        b.multiply("mlp", w, y)
    });
    // What comes before the weight may still be taken.
    let (matched, reasons) = tried(&g, &["swiglu_mlp"]);
    assert_eq!(matched, 1);
    assert!(reasons.iter().any(|r| r.contains("not one a token")), "{reasons:?}");
}

#[test]
fn heads_that_are_split_in_three_are_refused() {
    let g = graph(|b, x| {
        let q = b.linear("q", x, 3 * WIDTH, WIDTH);
        let q = b.node("q", SplitHeads { heads: 12 }, &[q]);
        let [q, gate, _rest] = b.node_n("q", Split { parts: 3 }, &[q]);
        let gate = b.node("q", FlattenHeads, &[gate]);
        let mut part = |path: &str| {
            let y = b.linear(path, x, 32, WIDTH);
            let y = b.node(path, SplitHeads { heads: 4 }, &[y]);
            b.node(path, Transpose(vec![0, 2, 1, 3]), &[y])
        };
        let (k, v) = (part("k"), part("v"));
        let q = b.node("q", Transpose(vec![0, 2, 1, 3]), &[q]);
        let slot = b.slot("attention", SlotKind::KvCache);
        let [keys, values] = b.node_n("attention", KvAppend { slot }, &[k, v]);
        let y = b.node("attention", Attention { scale: 0.3 }, &[q, keys, values]);
        let y = b.node("attention", MergeHeads, &[y]);
        let gate = b.node("attention", Sigmoid, &[gate]);
        let y = b.multiply("attention", y, gate);
        b.linear("out", y, WIDTH, WIDTH)
    });
    refused(&g, &["qkv_rope_append"], "split in 3");
    refused(&g, &["qkv_rope_append", "attention_out"], "qkv_rope_append");
}

/// How a delta net differs from those that are known.
#[derive(Clone, Copy, PartialEq)]
enum Odd {
    Nothing,
    Narrow,
    KeysFirst,
    GatesSwapped,
}

/// A delta net whose products are mixed, key head by key head.
fn delta_net(b: &mut Builder<'_>, x: Value, odd: Odd) -> Value {
    let (path, key_heads, heads, width) = ("delta", 2, 4, 8);
    let split = |b: &mut Builder<'_>, x, heads| b.node(path, SplitHeads { heads }, &[x]);
    let all = b.linear("qkvz", x, 96, WIDTH);
    let all = split(b, all, key_heads);
    let gates = b.linear("ba", x, 2 * heads, WIDTH);
    let gates = split(b, gates, key_heads);
    let parts: [Value; 4] = b.node_n(path, SplitAt { at: vec![8, 16, 32] }, &[all]);
    let gates: [Value; 2] = b.node_n(path, SplitAt { at: vec![2] }, &[gates]);
    let [q, k, v, z] = parts.map(|part| b.node(path, FlattenHeads, &[part]));
    let [mut beta, mut a] = gates.map(|part| b.node(path, FlattenHeads, &[part]));
    if odd == Odd::GatesSwapped {
        (beta, a) = (a, beta);
    }
    let joined = if odd == Odd::KeysFirst { [k, q, v] } else { [q, k, v] };
    let x = b.node(path, Concatenate { axis: -1 }, &joined);
    let slot = b.slot("conv", SlotKind::ConvState { keep: 3 });
    let x = b.node(path, ConvStep { slot, keep: 3 }, &[x]);
    let weight = b.tensor("conv", &[64, 4, 1]);
    let x = b.node(path, DepthwiseConv1d { weight, bias: None }, &[x]);
    let x = b.node(path, Silu, &[x]);
    let [q, k, v] = b.node_n(path, SplitAt { at: vec![16, 32] }, &[x]);
    let (q, k, v) = (split(b, q, key_heads), split(b, k, key_heads), split(b, v, heads));
    let q = b.node(path, UnitNorm { scale: 0.125, eps: 1e-6 }, &[q]);
    let k = b.node(path, UnitNorm { scale: 0.35, eps: 1e-6 }, &[k]);
    let beta = b.node(path, Sigmoid, &[beta]);
    let (a_log, dt_bias) = (b.bare_f32("A_log", &[heads]), b.bare("dt_bias", &[heads]));
    let g = b.node(path, DeltaGate { a_log, dt_bias }, &[a]);
    let slot = b.slot("delta", SlotKind::DeltaState);
    let y = b.node(path, GatedDelta { slot }, &[q, k, v, g, beta]);
    let n = b.rms_norm("delta.norm", y, width, 1e-6);
    let z = split(b, z, heads);
    let dtype = if odd == Odd::Narrow { zmlx_mlx::Dtype::Float16 } else { zmlx_mlx::Dtype::Float32 };
    let (z, n) = (b.node(path, Cast(Some(dtype)), &[z]), b.node(path, Cast(Some(dtype)), &[n]));
    let o = b.node(path, SwiGlu, &[z, n]);
    let o = b.node(path, Cast(None), &[o, y]);
    b.node(path, FlattenHeads, &[o])
}

#[test]
fn delta_nets_that_compute_something_else_are_refused() {
    let with = |odd| graph(move |b, x| delta_net(b, x, odd));
    assert_eq!(tried(&with(Odd::Nothing), &["deltanet"]).0, 1);
    // Of mixed products in another order the parts may still be taken, each as a row of its own.
    for odd in [Odd::KeysFirst, Odd::GatesSwapped] {
        let left = rewritten(&with(odd), &["deltanet"]).graph.to_string();
        assert!(left.contains("concatenate"), "{left}");
        tried(&with(odd), &["deltanet"]);
    }
    let fused = rewritten(&with(Odd::Narrow), &["deltanet"]);
    let found = report(&fused, "deltanet");
    assert_eq!(found.matched, 0);
    assert!(found.refused.iter().any(|r| r.contains("float32")), "{found:?}");
}

#[test]
fn attention_that_sees_more_than_its_cache_keeps_is_refused() {
    let with = |window: Option<i32>, plain: bool| {
        graph(move |b, x| {
            let heads = |b: &mut Builder<'_>, name: &str| {
                let y = b.linear(name, x, WIDTH, WIDTH);
                let y = b.node(name, SplitHeads { heads: 4 }, &[y]);
                b.node(name, Transpose(vec![0, 2, 1, 3]), &[y])
            };
            let (q, k, v) = (heads(b, "q"), heads(b, "k"), heads(b, "v"));
            let slot = b.slot("attention", SlotKind::WindowCache { window: 8 });
            let [keys, values] = b.node_n("attention", KvAppend { slot }, &[k, v]);
            let inputs = [q, keys, values];
            let y = match plain {
                true => b.node("attention", Attention { scale: 0.2 }, &inputs),
                false => b.node("attention", WindowAttention { scale: 0.2, window, sinks: None }, &inputs),
            };
            let y = b.node("attention", MergeHeads, &[y]);
            b.linear("out", y, WIDTH, WIDTH)
        })
    };
    let names = ["qkv_rope_append", "attention_out"];
    for graph in [with(None, true), with(None, false), with(Some(9), false)] {
        refused(&graph, &names, "its cache keeps");
    }
    for window in [1, 3, 8] {
        assert_eq!(tried(&with(Some(window), false), &names).0, 1, "{window}");
    }
}
