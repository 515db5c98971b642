//! Attention, plain and over latents.

use zmlx_graph::Value;
use zmlx_graph::ops::*;
use zmlx_graph::state::SlotKind;

use super::Draft;

/// What queries, keys and values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Products {
    /// A product each.
    Apart,
    /// One product.
    Fused,
    /// A product each, and a norm over all heads of queries and of keys.
    Normed,
}

/// Attention, with the product after it or without.
pub fn qkv(d: &mut Draft<'_>, from: Products, out: bool) -> Value {
    // Heads of 8 in groups of three, or of 24 with keys and values of their own.
    let head = if d.v.more() { 24 } else { 8 };
    let heads = d.width / head;
    let kv_heads = if d.v.more() { heads } else { heads / 3 };
    // Values may be wider than keys.
    let value = if d.v.0 == 3 { 2 * head } else { head };
    let (n, width) = (d.input(), d.width);
    // Half of a query's columns may be a gate of the result.
    let gated = from == Products::Apart && matches!(d.v.0, 2 | 5 | 7);
    let mut gate = None;
    let [q_width, kv_width] = [heads * head, kv_heads * head];
    let fused = (from == Products::Fused).then(|| {
        let f = d.linear("qkv", n, q_width + kv_width + kv_heads * value, width);
        d.b.node_n::<3>("qkv", SplitAt { at: vec![q_width, q_width + kv_width] }, &[f])
    });
    let mut part = |d: &mut Draft<'_>, name: &str, heads: i32, head: i32| {
        let halves = if gated && name == "q" { 2 } else { 1 };
        let y = match (fused, name) {
            (Some([q, ..]), "q") => q,
            (Some([_, k, _]), "k") => k,
            (Some([.., v]), _) => v,
            (None, _) => d.linear(name, n, halves * heads * head, width),
        };
        let y = match from {
            Products::Normed if name != "v" => {
                d.b.rms_norm(&format!("{name}.row.norm"), y, heads * head, 1e-6)
            }
            _ => y,
        };
        let mut y = d.b.node(name, SplitHeads { heads }, &[y]);
        if halves == 2 {
            let [q, g] = d.b.node_n(name, Split { parts: 2 }, &[y]);
            gate = Some(d.b.node(name, FlattenHeads, &[g]));
            y = q;
        }
        if d.v.more() && name != "v" {
            y = d.b.rms_norm(&format!("{name}.norm"), y, head, 1e-6);
        }
        let y = d.b.node(name, Transpose(vec![0, 2, 1, 3]), &[y]);
        let rope = |dims, traditional| Rope { dims, base: 1e4, traditional, scale: 1.0 };
        match (name, d.v.0) {
            ("v", _) | (_, 1) => y,
            (_, 0 | 4) => d.b.node(name, rope(head, false), &[y]),
            (_, 2 | 6) => d.b.node(name, rope(head / 2, true), &[y]),
            _ => {
                let factors = (0..head / 2).map(|i| 1.0 + i as f32).collect();
                let frequencies = Frequencies::Factors { base: 1e4, factors };
                let op = RopeFrequencies::new(head, false, frequencies, 1.25);
                d.b.node(name, op, &[y])
            }
        }
    };
    let (mut q, k) = (part(d, "q", heads, head), part(d, "k", kv_heads, head));
    let v = part(d, "v", kv_heads, value);
    let (window, sinks) = match d.v.0 {
        1 => (Some(4), true),
        2 => (Some(3), false),
        5 => (None, true),
        7 => (Some(1), true),
        _ => (None, false),
    };
    let kind = window.map_or(SlotKind::KvCache, |window| SlotKind::WindowCache { window });
    let slot = d.b.slot("attention", kind);
    if d.v.0 >= 4 {
        q = d.b.node("q", PositionScale { beta: 0.3, original_context: 5.0 }, &[q]);
    }
    let [keys, values] = d.b.node_n("attention", KvAppend { slot }, &[k, v]);
    let scale = 1.0 / (head as f32).sqrt();
    let y = if window.is_some() || sinks {
        let sinks = sinks.then(|| d.b.bare("attention.sinks", &[heads]));
        d.b.node("attention", WindowAttention { scale, window, sinks }, &[q, keys, values])
    } else {
        d.b.node("attention", Attention { scale }, &[q, keys, values])
    };
    let mut y = d.b.node("attention", MergeHeads, &[y]);
    if let Some(gate) = gate {
        let gate = d.b.node("attention", Sigmoid, &[gate]);
        y = d.b.multiply("attention", y, gate);
    }
    if !out {
        return y;
    }
    let (x, y) = (d.x, d.linear("out", y, width, heads * value));
    if d.v.more() { y } else { d.b.add("residual", x, y) }
}

/// Forms of latent attention.
#[derive(Clone, Copy, PartialEq)]
pub enum Latent {
    Alone,
    WithProduct,
    /// Over chosen positions, with the product after it.
    Sparse,
}

/// Multi-head latent attention.
pub fn latent_attention(d: &mut Draft<'_>, form: Latent) -> Value {
    let path = "mla";
    let (n, width, rope) = (d.input(), d.width, 8);
    // The formats' widths are three groups, or anything.
    let (nope, latent) = (width / 3, 2 * width / 3);
    let (heads, value) = if d.v.more() { (3, width / 3) } else { (6, width / 2) };
    let q = d.linear("q", n, heads * (nope + rope), width);
    let q = d.b.node(path, SplitHeads { heads }, &[q]);
    let q = d.b.node(path, Transpose(vec![0, 2, 1, 3]), &[q]);
    let [q, q_pe] = d.b.node_n(path, SplitAt { at: vec![nope] }, &[q]);
    let kv = d.linear("kv", n, latent + rope, width);
    let [c, k_pe] = d.b.node_n(path, SplitAt { at: vec![latent] }, &[kv]);
    let one_head = |d: &mut Draft<'_>, x: Value| {
        let x = d.b.node(path, SplitHeads { heads: 1 }, &[x]);
        d.b.node(path, Transpose(vec![0, 2, 1, 3]), &[x])
    };
    let k_pe = one_head(d, k_pe);
    let c = d.b.rms_norm("latent.norm", c, latent, 1e-6);
    let (traditional, base) = (d.v.0 < 6, if d.v.bias() { 1e6 } else { 1e4 });
    let turned =
        |d: &mut Draft<'_>, x| d.b.node(path, Rope { dims: rope, base, traditional, scale: 1.0 }, &[x]);
    let (q_pe, k_pe) = (turned(d, q_pe), turned(d, k_pe));
    let c = one_head(d, c);
    let slot = d.b.slot(path, SlotKind::KvCache);
    let [latents, keys] = d.b.node_n(path, KvAppend { slot }, &[c, k_pe]);
    let embed = d.b.matrices("embed_q", [heads, latent, nope]);
    let unembed = d.b.matrices("unembed_out", [heads, value, latent]);
    let scale = 1.0 / ((nope + rope) as f32).sqrt();
    let op = MlaAttention { embed, unembed, scale };
    let y = if form == Latent::Sparse {
        let positions = indexer(d, n);
        d.b.node(path, SparseMlaAttention(op), &[q, q_pe, latents, keys, positions])
    } else {
        d.b.node(path, op, &[q, q_pe, latents, keys])
    };
    let y = d.b.node(path, MergeHeads, &[y]);
    if form == Latent::Alone {
        return y;
    }
    let (x, y) = (d.x, d.linear("out", y, width, heads * value));
    if d.v.more() { y } else { d.b.add("residual", x, y) }
}

/// The positions that sparse attention looks at.
fn indexer(d: &mut Draft<'_>, n: Value) -> Value {
    let (path, head, heads, dims) = ("indexer", 24, if d.v.more() { 2 } else { 5 }, 8);
    let q = d.linear("indexer.q", n, heads * head, d.width);
    let k = d.linear("indexer.k", n, head, d.width);
    let norm = (d.b.tensor("indexer.k_norm", &[head]), d.b.bias("indexer.k_norm", head));
    let k = d.b.node(path, LayerNorm { weight: Some(norm.0), bias: Some(norm.1), eps: 1e-5 }, &[k]);
    let turned = |d: &mut Draft<'_>, x: Value, heads: i32| {
        let x = d.b.node(path, SplitHeads { heads }, &[x]);
        let x = d.b.node(path, Transpose(vec![0, 2, 1, 3]), &[x]);
        d.b.node(path, Rope { dims, base: 1e4, traditional: d.v.bias(), scale: 1.0 }, &[x])
    };
    let (q, k) = (turned(d, q, heads), turned(d, k, 1));
    let [column, _] = d.b.node_n(path, SplitAt { at: vec![1] }, &[k]);
    let slot = d.b.slot(path, SlotKind::KvCache);
    let [keys, _] = d.b.node_n(path, KvAppend { slot }, &[k, column]);
    let weights = d.linear("indexer.weights", n, heads, d.width);
    let weights = d.b.node(path, MultiplyScalar(0.3), &[weights]);
    d.b.node(path, TopPositions { k: 6 }, &[q, keys, weights])
}
