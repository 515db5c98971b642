//! Graphs that each pattern matches.

mod attention;
mod experts;
mod recurrent;

use attention::{Latent, Products, latent_attention, qkv};
use experts::moe;
pub use experts::{grouped, route, router, softmax_route};
use recurrent::{delta_net, short_conv};
use zmlx_graph::op::Op;
use zmlx_graph::ops::*;
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
