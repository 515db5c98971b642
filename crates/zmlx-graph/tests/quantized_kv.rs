//! Attention over keys and values in few bits, against plain ops over what the codes stand for, in float32.

use std::sync::Arc;

use zmlx_graph::ops::{Attention, KvAppend, MergeHeads, SplitHeads, Transpose};
use zmlx_graph::state::SlotKind;
use zmlx_graph::weights::Format;
use zmlx_graph::{Builder, CostContext, Executor, Graph, KvQuantization, quantize_caches};
use zmlx_mlx::{Array, Dtype, ops};

const VOCABULARY: i32 = 50;

/// Tokens to rows of three tables, and attention over them: its output is the graph's.
fn graph(heads: i32, kv_heads: i32, width: i32) -> Graph {
    let mut b = Builder::new(&|_, _| Format::Dense);
    let ids = b.tokens();
    let mut split = |name: &str, heads: i32| {
        let x = b.embedding(name, ids, VOCABULARY, heads * width);
        let x = b.node(name, SplitHeads { heads }, &[x]);
        b.node(name, Transpose(vec![0, 2, 1, 3]), &[x])
    };
    let (q, k, v) = (split("q", heads), split("k", kv_heads), split("v", kv_heads));
    let slot = b.slot("attention", SlotKind::KvCache);
    let [k, v] = b.node_n("attention", KvAppend { slot }, &[k, v]);
    let y = b.node("attention", Attention { scale: 0.17 }, &[q, k, v]);
    let y = b.node("attention", MergeHeads, &[y]);
    b.finish(y)
}

fn table(name: &str, shape: &[i32]) -> Array {
    let seed = name.bytes().next().map_or(0, u32::from);
    let n = shape.iter().product::<i32>() as u32;
    let value =
        |i: u32| ((i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8) % 2001) as f32 / 500.0 - 2.0;
    Array::from_vec((0..n).map(value).collect(), shape).unwrap()
}

fn executor(graph: Graph) -> Executor {
    Executor::new(Arc::new(graph), |spec| Some(table(&spec.name, &spec.shape))).unwrap()
}

/// Rows of a table as heads, `[1, heads, L, width]`.
fn rows(name: &str, heads: i32, width: i32, ids: &[u32]) -> Array {
    let ids = Array::from_slice(ids, &[ids.len() as i32]).unwrap();
    let x = table(&format!("{name}.weight"), &[VOCABULARY, heads * width]).take(&ids, 0).unwrap();
    x.reshape(&[1, -1, heads, width]).unwrap().transpose(&[0, 2, 1, 3]).unwrap()
}

fn codes_stand_for(x: &Array, q: KvQuantization) -> Array {
    let (group, bits) = (Some(q.group_size), Some(q.bits));
    let made = ops::quantize(x, group, bits, "affine", None).unwrap();
    ops::dequantize(&made[0], &made[1], Some(&made[2]), group, bits, "affine", None, None).unwrap()
}

/// Attention of the last `length` of all tokens, as its definition says it.
fn reference(q: &Array, k: &Array, v: &Array, length: i32) -> Vec<f32> {
    let (heads, seen) = (q.dim(1).unwrap(), k.dim(2).unwrap());
    let repeats = heads / k.dim(1).unwrap();
    let (k, v) = (k.repeat(repeats, 1).unwrap(), v.repeat(repeats, 1).unwrap());
    let scores = q.multiply_scalar(0.17).unwrap().matmul(&k.swapaxes(-1, -2).unwrap()).unwrap();
    let row = |from: i32| ops::arange(from.into(), seen.into(), 1.0, Dtype::Int32).unwrap();
    let sees = row(seen - length).expand_dims(&[-1]).unwrap().greater_equal(&row(0)).unwrap();
    let least = Array::scalar(-1e30f32).unwrap();
    let weights = sees.where_(&scores, &least).unwrap().softmax(&[-1], true).unwrap();
    weights.matmul(&v).unwrap().transpose(&[0, 2, 1, 3]).unwrap().to_vec::<f32>().unwrap()
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn it_is_attention_over_what_the_codes_stand_for() {
    for (heads, kv_heads, width) in [(4, 4, 64), (6, 2, 64), (8, 1, 128)] {
        for (bits, group_size, bound) in [(4, 32, 0.7), (4, 64, 0.7), (8, 64, 0.05)] {
            for start in [0, 5, 13, 1000] {
                let with = KvQuantization { bits, group_size, start };
                let stock = graph(heads, kv_heads, width);
                let quantized = quantize_caches(&stock, with).unwrap();
                assert_eq!(quantized.nodes.len() + 1, stock.nodes.len());
                let (exact, quantized) = (executor(stock), executor(quantized));
                let (mut state, mut plain) = (quantized.new_state(), exact.new_state());
                let mut seen: Vec<u32> = Vec::new();
                // Across the step by which the buffers grow.
                for length in [7, 1, 5, 1, 1, 300, 2] {
                    let before = seen.len() as i32;
                    let new: Vec<u32> = (0..length as u32).map(|i| (before as u32 + i) * 7 % 50).collect();
                    seen.extend(&new);
                    let tokens = Array::from_slice(&new, &[1, length]).unwrap();
                    let run =
                        |e: &Executor, state: &mut _| e.run(&tokens, state).unwrap().to_vec::<f32>().unwrap();
                    let (made, full) = (run(&quantized, &mut state), run(&exact, &mut plain));
                    let q = rows("q", heads, width, &new);
                    let mut kv = ["k", "v"].map(|name| rows(name, kv_heads, width, &seen));
                    // All or nothing is in few bits, by where the call began.
                    if before > 0 && before >= start {
                        kv = kv.map(|x| codes_stand_for(&x, with));
                    }
                    let off = farthest(&made, &reference(&q, &kv[0], &kv[1], length));
                    let name =
                        format!("{heads}/{kv_heads} heads of {width}, {with:?}, {length} after {before}");
                    assert!(off < 2e-5, "{name}: {off} off what the codes stand for");
                    let error = farthest(&made, &full);
                    assert!(error < bound, "{name}: {error} off attention in float32");
                    assert!((error > 1e-4) == (before > 0 && before >= start), "{name}: {error}");
                }
            }
        }
    }
}

#[test]
fn few_bits_are_fewer_bytes_in_the_plan_too() {
    let stock = graph(8, 2, 128);
    let with = KvQuantization { bits: 4, group_size: 64, start: 0 };
    let quantized = quantize_caches(&stock, with).unwrap();
    let read = |graph: &Graph| {
        let context = CostContext::decode(999, Dtype::Bfloat16, graph.weight_bytes(Dtype::Bfloat16));
        graph.cost(&context).unwrap().total.state_read
    };
    assert_eq!(read(&stock), 2 * 1000 * 2 * 128 * 2);
    // Four bits an element, and of each group a scale and a bias of two bytes.
    assert_eq!(read(&quantized), 2 * 1000 * 2 * (128 / 2 + 128 / 64 * 4));
    assert!(quantized.to_string().contains("quantized_attention"), "{quantized}");
}
