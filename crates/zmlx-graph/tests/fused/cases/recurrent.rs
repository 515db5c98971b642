//! Parts that keep a state: short convolution and delta net.

use zmlx_graph::Value;
use zmlx_graph::ops::*;
use zmlx_graph::state::SlotKind;
use zmlx_mlx::Dtype;

use super::Draft;

/// The short convolution of LFM2, between its products.
pub fn short_conv(d: &mut Draft<'_>) -> Value {
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
pub fn delta_net(d: &mut Draft<'_>, mixed: bool) -> Value {
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
