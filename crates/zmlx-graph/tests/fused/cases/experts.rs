//! Routers and experts.

use zmlx_graph::Value;
use zmlx_graph::ops::*;
use zmlx_mlx::Dtype;

use super::Draft;
use crate::compare::Kind;

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

pub fn moe(d: &mut Draft<'_>) -> Value {
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
