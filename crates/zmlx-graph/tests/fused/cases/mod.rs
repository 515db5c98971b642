//! Graphs that each pattern matches.

use zmlx_graph::op::Op;
use zmlx_graph::ops::*;
use zmlx_graph::state::SlotKind;
use zmlx_graph::weights::{Format, Quantization};
use zmlx_graph::{Builder, Value};
use zmlx_mlx::Dtype;

use super::compare::{Case, Kind};
use super::setup::{Storage, VOCABULARY};

/// Every way in which matrices are stored.
pub fn formats() -> Vec<Storage> {
    let mut all = Vec::new();
    let dtypes = [Dtype::Bfloat16, Dtype::Float16, Dtype::Float32];
    let mut quantized = |mode: &str, bits: i32, group_size: i32, dtype: Dtype| {
        let label = format!("{mode} {bits}/{group_size}");
        let format = Format::Quantized(Quantization { group_size, bits, mode: mode.to_owned() });
        all.push(Storage { label, format, dtype, width: 3 * group_size.max(32) });
    };
    for (i, bits) in [4, 2, 3, 5, 6, 8].into_iter().enumerate() {
        for (j, group) in [32, 64, 128].into_iter().enumerate() {
            quantized("affine", bits, group, dtypes[(i + j) % 3]);
        }
    }
    quantized("mxfp4", 4, 32, Dtype::Bfloat16);
    quantized("mxfp8", 8, 32, Dtype::Bfloat16);
    quantized("nvfp4", 4, 16, Dtype::Bfloat16);
    for (label, dtype) in [("f32", Dtype::Float32), ("bf16", Dtype::Bfloat16), ("f16", Dtype::Float16)] {
        all.push(Storage { label: label.to_owned(), format: Format::Dense, dtype, width: 72 });
    }
    all
}

/// What varies: three things that may be there or not, and what a case makes of the number.
#[derive(Debug, Clone, Copy)]
pub struct Variant(pub usize);

impl Variant {
    fn norm(self) -> bool {
        self.0 & 1 != 0
    }

    fn bias(self) -> bool {
        self.0 & 2 != 0
    }

    fn more(self) -> bool {
        self.0 & 4 != 0
    }
}

/// A graph being written, with the activations that a pattern gets.
pub struct Draft<'a> {
    pub b: Builder<'a>,
    pub x: Value,
    pub width: i32,
    v: Variant,
}

impl Draft<'_> {
    /// `x`, normalised if the variant says so.
    pub fn input(&mut self) -> Value {
        let (x, width) = (self.x, self.width);
        if self.v.norm() { self.b.rms_norm("norm", x, width, 1e-5) } else { x }
    }

    /// A product, with a bias if the variant says so.
    pub fn linear(&mut self, path: &str, x: Value, out: i32, input: i32) -> Value {
        if self.v.bias() {
            self.b.linear_bias(path, x, out, input)
        } else {
            self.b.linear(path, x, out, input)
        }
    }
}

/// Writes a graph; matrices are stored as the storage says, but for the embedding that stands for activations.
pub fn draft(
    label: &str,
    storage: &Storage,
    variant: usize,
    before: &'static [&'static str],
    write: impl FnOnce(&mut Draft<'_>) -> (Value, Kind),
) -> Case {
    let format = storage.format.clone();
    let format_of = |path: &str, _: i32| {
        if path == "embed" || path == "embed.other" { Format::Dense } else { format.clone() }
    };
    let mut b = Builder::new(&format_of);
    let ids = b.tokens();
    let x = b.embedding("embed", ids, VOCABULARY, storage.width);
    let mut d = Draft { b, x, width: storage.width, v: Variant(variant) };
    let (output, kind) = write(&mut d);
    let graph = d.b.finish(output);
    Case { label: format!("{label}, variant {variant}"), graph, storage: storage.clone(), before, kind }
}

/// The cases of a pattern; none for one that is not known here.
pub fn cases(pattern: &str, storage: &Storage, variant: usize) -> Vec<Case> {
    let one = |before, write: fn(&mut Draft<'_>) -> Value| {
        vec![draft(pattern, storage, variant, before, |d| (write(d), Kind::Numbers))]
    };
    match pattern {
        "embedding" => one(&[], embedding),
        "qkv_rope_append" => [Products::Apart, Products::Fused, Products::Normed]
            .map(|from| draft(pattern, storage, variant, &[], |d| (qkv(d, from, false), Kind::Numbers)))
            .into(),
        "attention_out" => one(&["qkv_rope_append"], |d| qkv(d, Products::Apart, true)),
        "glm47_rope" => one(&[], |d| latent_attention(d, Latent::Alone)),
        "skv_mla" => one(&["glm47_rope"], |d| latent_attention(d, Latent::WithProduct)),
        "sparse_mla" => one(&["glm47_rope"], |d| latent_attention(d, Latent::Sparse)),
        "kv_f16" => {
            let plain = draft(pattern, storage, variant, &["qkv_rope_append", "attention_out"], |d| {
                (qkv(d, Products::Apart, true), Kind::Numbers)
            });
            let latent = draft("latent kv_f16", storage, variant, &["glm47_rope", "skv_mla"], |d| {
                (latent_attention(d, Latent::WithProduct), Kind::Numbers)
            });
            let sparse =
                draft("latent sparse kv_f16", storage, variant, &["glm47_rope", "sparse_mla"], |d| {
                    (latent_attention(d, Latent::Sparse), Kind::Numbers)
                });
            vec![plain, latent, sparse]
        }
        "short_conv" => one(&[], short_conv),
        "deltanet" => [false, true]
            .map(|mixed| draft(pattern, storage, variant, &[], |d| (delta_net(d, mixed), Kind::Numbers)))
            .into(),
        "router" => vec![
            draft(pattern, storage, variant, &[], |d| router(d, 12, 4)),
            draft(pattern, storage, variant, &[], |d| {
                let (n, width) = (d.input(), d.width);
                let logits = d.linear("router", n, 12, width);
                softmax_route(d, logits, 4)
            }),
        ],
        "deepseek_router" => vec![draft(pattern, storage, variant, &[], |d| {
            let (n, width) = (d.input(), d.width);
            let logits = d.b.linear("router", n, 16, width);
            grouped(d, logits, 16, [4, 2], 3)
        })],
        "moe_mlp" => one(&["router"], moe),
        "swiglu_mlp" => {
            let clamped = ClampedSwiGlu { alpha: 1.702, limit: 0.4 };
            let numbers = |label, write: &dyn Fn(&mut Draft<'_>) -> Value| {
                draft(label, storage, variant, &[], |d| (write(d), Kind::Numbers))
            };
            vec![
                numbers(pattern, &|d| mlp(d, SwiGlu)),
                numbers("clamped", &|d| mlp(d, clamped)),
                numbers("fused", &|d| fused_mlp(d)),
            ]
        }
        "geglu_mlp" => [GeGlu::Tanh, GeGlu::Erf]
            .map(|op| draft(op.name(), storage, variant, &[], |d| (mlp(d, op), Kind::Numbers)))
            .into(),
        "linear_residual" => one(&[], linear_residual),
        "lm_head" => one(&[], lm_head),
        "norm_linear" => one(&[], |d| {
            let (n, width) = (d.input(), d.width);
            let y = d.linear("product", n, width, width);
            // Not the graph's output, which is a head.
            d.b.node("end", Sigmoid, &[y])
        }),
        "residual_norm" => one(&[], residual_norm),
        "rmsnorm" => one(&[], |d| {
            let (x, width) = (d.x, d.width);
            let n = match d.v.norm() {
                true => d.b.rms_norm_above_one("norm", x, width, 1e-6),
                false => d.b.rms_norm("norm", x, width, 1e-6),
            };
            if d.v.bias() { d.b.add("residual", x, n) } else { n }
        }),
        "layernorm" => one(&[], layer_norm),
        "softmax" => one(&[], |d| {
            let x = d.input();
            d.b.node("softmax", Softmax { precise: true }, &[x])
        }),
        _ => Vec::new(),
    }
}

fn layer_norm(d: &mut Draft<'_>) -> Value {
    let width = d.width;
    let weight = (!d.v.bias()).then(|| d.b.tensor("norm", &[width]));
    let bias = (!d.v.more()).then(|| d.b.bias("norm", width));
    d.b.node("norm", LayerNorm { weight, bias, eps: 1e-5 }, &[d.x])
}

fn embedding(d: &mut Draft<'_>) -> Value {
    let (ids, width) = (d.b.tokens(), d.width);
    let h = d.b.embedding("table", ids, VOCABULARY, width);
    if d.v.norm() { d.b.node("table", MultiplyScalar(11.3125), &[h]) } else { h }
}

/// What queries, keys and values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Products {
    /// A product each.
    Apart,
    /// One product.
    Fused,
    /// A product each, and a norm over all heads of queries and of keys.
    Normed,
}

/// Attention, with the product after it or without.
fn qkv(d: &mut Draft<'_>, from: Products, out: bool) -> Value {
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
enum Latent {
    Alone,
    WithProduct,
    /// Over chosen positions, with the product after it.
    Sparse,
}

/// Multi-head latent attention.
fn latent_attention(d: &mut Draft<'_>, form: Latent) -> Value {
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

fn short_conv(d: &mut Draft<'_>) -> Value {
    let (n, width) = (d.input(), d.width);
    let bcx = d.linear("in", n, 3 * width, width);
    let [b, c, x] = d.b.node_n("conv", Split { parts: 3 }, &[bcx]);
    let bx = d.b.multiply("conv", b, x);
    let taps = if d.v.bias() { 4 } else { 3 };
    let slot = d.b.slot("conv", SlotKind::ConvState { keep: taps - 1 });
    let s = d.b.node("conv", ConvStep { slot, keep: taps - 1 }, &[bx]);
    let weight = d.b.tensor("conv", &[width, taps, 1]);
    let bias = d.v.more().then(|| d.b.bias("conv", width));
    let y = d.b.node("conv", DepthwiseConv1d { weight, bias }, &[s]);
    d.b.multiply("conv", c, y)
}

/// The gated delta net of Qwen3.5, between its products, or of Qwen3-Next, whose products are mixed: key head by key head.
fn delta_net(d: &mut Draft<'_>, mixed: bool) -> Value {
    let (path, n, width) = ("delta", d.input(), d.width);
    let (key_heads, heads, key, value) = if d.v.more() { (3, 3, 16, 8) } else { (2, 4, 24, 20) };
    let taps = if d.v.bias() { 3 } else { 4 };
    let channels = 2 * key_heads * key + heads * value;
    let product = |d: &mut Draft<'_>, name: &str, out| d.b.linear(name, n, out, width);
    let [x, z, b, a] = if mixed {
        let all = product(d, "in_proj_qkvz", channels + heads * value);
        let gates = product(d, "in_proj_ba", 2 * heads);
        let all = d.b.node(path, SplitHeads { heads: key_heads }, &[all]);
        let gates = d.b.node(path, SplitHeads { heads: key_heads }, &[gates]);
        let shared = heads / key_heads;
        let at = vec![key, 2 * key, 2 * key + shared * value];
        let parts: [Value; 4] = d.b.node_n(path, SplitAt { at }, &[all]);
        let [q, k, v, z] = parts.map(|part| d.b.node(path, FlattenHeads, &[part]));
        let gates: [Value; 2] = d.b.node_n(path, SplitAt { at: vec![shared] }, &[gates]);
        let [b, a] = gates.map(|part| d.b.node(path, FlattenHeads, &[part]));
        [d.b.node(path, Concatenate { axis: -1 }, &[q, k, v]), z, b, a]
    } else {
        let (x, z) = (product(d, "in_proj_qkv", channels), product(d, "in_proj_z", heads * value));
        [x, z, product(d, "in_proj_b", heads), product(d, "in_proj_a", heads)]
    };
    let slot = d.b.slot("conv", SlotKind::ConvState { keep: taps - 1 });
    let s = d.b.node(path, ConvStep { slot, keep: taps - 1 }, &[x]);
    let weight = d.b.tensor("conv1d", &[channels, taps, 1]);
    let bias = d.v.more().then(|| d.b.bias("conv1d", channels));
    let c = d.b.node(path, DepthwiseConv1d { weight, bias }, &[s]);
    let c = d.b.node(path, Silu, &[c]);
    let at = vec![key_heads * key, 2 * key_heads * key];
    let [q, k, v] = d.b.node_n(path, SplitAt { at }, &[c]);
    let of = |d: &mut Draft<'_>, x, heads| d.b.node(path, SplitHeads { heads }, &[x]);
    let (q, k, v) = (of(d, q, key_heads), of(d, k, key_heads), of(d, v, heads));
    let inverse = 1.0 / f64::from(key).sqrt();
    let eps = 1e-6 / key as f32;
    let q = d.b.node(path, UnitNorm { scale: inverse * inverse, eps }, &[q]);
    let k = d.b.node(path, UnitNorm { scale: inverse, eps }, &[k]);
    let beta = d.b.node(path, Sigmoid, &[b]);
    let (a_log, dt_bias) = (d.b.bare_f32("A_log", &[heads]), d.b.bare_f32("dt_bias", &[heads]));
    let g = d.b.node(path, DeltaGate { a_log, dt_bias }, &[a]);
    let slot = d.b.slot("delta", SlotKind::DeltaState);
    let y = d.b.node(path, GatedDelta { slot }, &[q, k, v, g, beta]);
    let mut n = d.b.rms_norm("delta.norm", y, value, 1e-6);
    let mut z = of(d, z, heads);
    if !d.v.bias() {
        (z, n) = (
            d.b.node(path, Cast(Some(Dtype::Float32)), &[z]),
            d.b.node(path, Cast(Some(Dtype::Float32)), &[n]),
        );
    }
    let mut o = d.b.node(path, SwiGlu, &[z, n]);
    if !d.v.bias() {
        o = d.b.node(path, Cast(None), &[o, y]);
    }
    d.b.node(path, FlattenHeads, &[o])
}

/// Routing in one of the four ways that are known; gives the weights.
pub fn router(d: &mut Draft<'_>, experts: i32, k: i32) -> (Value, Kind) {
    let (n, width) = (d.input(), d.width);
    let logits = d.b.linear("router", n, experts, width);
    route(d, n, logits, experts, k)
}

/// From logits to a choice.
pub fn route(d: &mut Draft<'_>, n: Value, logits: Value, experts: i32, k: i32) -> (Value, Kind) {
    let path = "router";
    let way = d.v.0 >> 1 & 3;
    let scores = if way < 2 {
        d.b.node(path, Sigmoid, &[logits])
    } else {
        d.b.node(path, Softmax { precise: true }, &[logits])
    };
    let mut ranked = scores;
    if way == 0 {
        let wide = d.b.node(path, Cast(Some(Dtype::Float32)), &[scores]);
        let weight = d.b.bare_f32("router.correction", &[experts]);
        ranked = d.b.node(path, AddWeight { weight }, &[wide]);
    }
    let indices = d.b.node(path, TopKIndices { k }, &[ranked]);
    let mut weights = d.b.node(path, TakeAlongLast, &[scores, indices]);
    if way == 0 || way == 2 {
        let mut total = d.b.node(path, Sum { axis: -1, keepdims: true }, &[weights]);
        if way == 0 {
            total = d.b.node(path, AddScalar(1e-6), &[total]);
        }
        weights = d.b.node(path, Binary::Divide, &[weights, total]);
    }
    if way < 2 {
        weights = d.b.node(path, MultiplyScalar(2.5), &[weights]);
        weights = d.b.node(path, Cast(None), &[weights, n]);
    }
    (weights, Kind::Choice { indices, weights })
}

/// From logits to a choice weighed by a softmax, over all or over the chosen; of equal experts the first or the last is
/// chosen.
pub fn softmax_route(d: &mut Draft<'_>, logits: Value, k: i32) -> (Value, Kind) {
    let (path, mut scores) = ("router", logits);
    let all = d.v.0 >= 5;
    if all {
        scores = d.b.node(path, Softmax { precise: true }, &[scores]);
    }
    let indices = match d.v.0 {
        0..3 => d.b.node(path, TopKIndices { k }, &[scores]),
        _ => d.b.node(path, TopKOfNegated { k }, &[scores]),
    };
    let mut weights = d.b.node(path, TakeAlongLast, &[scores, indices]);
    if !all {
        weights = d.b.node(path, Softmax { precise: true }, &[weights]);
    } else if d.v.0 == 6 {
        let total = d.b.node(path, Sum { axis: -1, keepdims: true }, &[weights]);
        weights = d.b.node(path, Binary::Divide, &[weights, total]);
    }
    (weights, Kind::Choice { indices, weights })
}

/// From logits to a choice of experts in groups, as DeepSeek-V3 does it.
pub fn grouped(
    d: &mut Draft<'_>,
    logits: Value,
    experts: i32,
    [groups, keep]: [i32; 2],
    k: i32,
) -> (Value, Kind) {
    let path = "router";
    let wide = d.b.node(path, Cast(Some(Dtype::Float32)), &[logits]);
    let scores = d.b.node(path, Sigmoid, &[wide]);
    let weight = d.b.bare_f32("router.correction", &[experts]);
    let mut ranked = d.b.node(path, AddWeight { weight }, &[scores]);
    if groups > 1 {
        ranked = d.b.node(path, MaskGroups { groups, keep }, &[ranked]);
    }
    let indices = d.b.node(path, TopKOfNegated { k }, &[ranked]);
    let mut weights = d.b.node(path, TakeAlongLast, &[scores, indices]);
    if !d.v.more() {
        let mut total = d.b.node(path, Sum { axis: -1, keepdims: true }, &[weights]);
        if d.v.bias() {
            total = d.b.node(path, AddScalar(1e-20), &[total]);
        }
        weights = d.b.node(path, Binary::Divide, &[weights, total]);
    }
    weights = d.b.node(path, MultiplyScalar(2.5), &[weights]);
    (weights, Kind::Choice { indices, weights })
}

fn moe(d: &mut Draft<'_>) -> Value {
    let (path, experts, k, width) = ("moe", 6, 3, d.width);
    let n = d.input();
    let logits = d.b.linear("router", n, experts, width);
    let (weights, Kind::Choice { indices, .. }) = route(d, n, logits, experts, k) else { unreachable!() };
    let [rows, expert, order] = d.b.node_n(path, ExpertSort, &[n, indices]);
    let biased = d.v.norm();
    let linear = |d: &mut Draft<'_>, name: &str, rows| {
        let weight = d.b.matrix(name, &[experts, width, width]);
        let bias = biased.then(|| d.b.expert_bias(name, experts, width));
        d.b.node(name, ExpertLinear { weight, bias }, &[rows, expert])
    };
    let (up, gate) = (linear(d, "experts.up", rows), linear(d, "experts.gate", rows));
    let a = match d.v.0 {
        5 => d.b.node(path, GeGlu::Tanh, &[gate, up]),
        6 => d.b.node(path, GeGlu::Erf, &[gate, up]),
        1 | 7 => d.b.node(path, ClampedSwiGlu { alpha: 1.702, limit: 0.5 }, &[gate, up]),
        _ => d.b.node(path, SwiGlu, &[gate, up]),
    };
    let down = linear(d, "experts.down", a);
    let y = d.b.node(path, ExpertUnsort, &[down, order, indices]);
    let we = d.b.node(path, ExpandLast, &[weights]);
    let yw = d.b.multiply(path, y, we);
    let s = d.b.node(path, Sum { axis: -2, keepdims: false }, &[yw]);
    let s = if d.v.bias() { d.b.node(path, Cast(None), &[s, y]) } else { s };
    let s = match d.v.0 {
        // What a shared expert gives, with a residual after it and without.
        1 | 3 | 4 => {
            let shared = d.b.linear("shared", n, width, width);
            d.b.add(path, s, shared)
        }
        _ => s,
    };
    let x = d.x;
    if d.v.more() { s } else { d.b.add("residual", x, s) }
}

/// A gated feed-forward part with that activation.
pub fn mlp(d: &mut Draft<'_>, activation: impl Op) -> Value {
    let (n, width) = (d.input(), d.width);
    let silu = activation.name() == "swiglu";
    let hidden = 2 * width;
    let (g, u) = (d.linear("gate", n, hidden, width), d.linear("up", n, hidden, width));
    let a = d.b.node("mlp", activation, &[g, u]);
    let (mut y, x) = (d.linear("down", a, width, hidden), d.x);
    // Weighed by a sigmoid of its own, as shared experts are.
    if silu && matches!(d.v.0, 1 | 2 | 6) {
        let weight = d.linear("weight", n, 1, width);
        let weight = d.b.node("mlp", Sigmoid, &[weight]);
        y = d.b.multiply("mlp", weight, y);
    }
    if d.v.more() { y } else { d.b.add("residual", y, x) }
}

/// One whose gate and up are one matrix.
fn fused_mlp(d: &mut Draft<'_>) -> Value {
    let (n, width) = (d.input(), d.width);
    let both = d.linear("gate_up", n, 4 * width, width);
    let [g, u] = d.b.node_n("mlp", Split { parts: 2 }, &[both]);
    let a = d.b.node("mlp", SwiGlu, &[g, u]);
    let (y, x) = (d.linear("down", a, width, 2 * width), d.x);
    if d.v.more() { y } else { d.b.add("residual", y, x) }
}

fn linear_residual(d: &mut Draft<'_>) -> Value {
    let (n, x, width) = (d.input(), d.x, d.width);
    let y = d.linear("product", n, width, width);
    if d.v.more() { d.b.add("residual", x, y) } else { d.b.add("residual", y, x) }
}

fn lm_head(d: &mut Draft<'_>) -> Value {
    let (n, width) = (d.input(), d.width);
    // 24 rows make whole panels, 21 do not.
    let out = if d.v.more() { 21 } else { 24 };
    d.linear("head", n, out, width)
}

fn residual_norm(d: &mut Draft<'_>) -> Value {
    let (ids, x, width) = (d.b.tokens(), d.x, d.width);
    let y = d.b.embedding("embed.other", ids, VOCABULARY, width);
    let h = d.b.add("sum", x, y);
    let n = d.b.rms_norm("norm", h, width, 1e-5);
    // Both leave.
    d.b.multiply("product", h, n)
}

/// Attention, convolution, experts and a plain feed-forward part, each with its residual.
pub fn layer(d: &mut Draft<'_>) -> Value {
    d.x = qkv(d, Products::Apart, true);
    let (y, x, width) = (short_conv(d), d.x, d.width);
    let y = d.b.linear("conv.out", y, width, width);
    d.x = d.b.add("residual", x, y);
    d.x = moe(d);
    mlp(d, SwiGlu)
}
