//! What Qwen3-Next and Qwen3.5 share: layers of gated delta nets, every few layers one of attention with an output gate,
//! and experts beside an expert that all tokens use.

use zmlx_graph::ops::{
    Attention, Binary, Cast, Concatenate, ConvStep, DeltaGate, DepthwiseConv1d, ExpandLast, FlattenHeads,
    GatedDelta, KvAppend, MergeHeads, Sigmoid, Silu, Softmax, Split, SplitAt, SplitHeads, Sum, SwiGlu,
    TakeAlongLast, TopKIndices, Transpose, UnitNorm,
};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};
use zmlx_mlx::Dtype;

use super::Outline;
use super::blocks::{Experts, Heads, linear, mlp};
use super::rope::Rope;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

/// Added to the sum of squares of a query or key before its root is taken.
const UNIT_EPS: f64 = 1e-6;

/// Ends of the paths of what mlx-lm's converter stores in 8 bits.
pub(super) const ROUTERS: &[&str] = &["mlp.gate", "mlp.shared_expert_gate"];

/// Sizes of a gated delta net.
pub(super) struct DeltaNet {
    key_heads: i32,
    heads: i32,
    key: i32,
    value: i32,
    taps: i32,
    /// Whether queries, keys, values and gates come from one product, key head by key head.
    pub(super) interleaved: bool,
}

impl DeltaNet {
    /// Of `linear_num_key_heads`, `linear_num_value_heads`, `linear_key_head_dim`, `linear_value_head_dim` and
    /// `linear_conv_kernel_dim`.
    pub(super) fn read(c: &ModelConfig, interleaved: bool) -> Result<Self, LoadError> {
        let (key_heads, heads) = (c.size("linear_num_key_heads")?, c.size("linear_num_value_heads")?);
        if heads % key_heads != 0 {
            let message = format!("{heads} value heads cannot share {key_heads} key heads evenly");
            return Err(c.contradiction("linear_num_value_heads", message));
        }
        let (key, value) = (c.size("linear_key_head_dim")?, c.size("linear_value_head_dim")?);
        let taps = c.size("linear_conv_kernel_dim")?;
        let wide = |heads: i32, width: i32| i64::from(heads) * i64::from(width);
        if 2 * (wide(key_heads, key) + wide(heads, value)) > i64::from(i32::MAX) {
            let message = format!("{heads} heads of {value} with {key_heads} of {key} are too many to count");
            return Err(c.contradiction("linear_num_value_heads", message));
        }
        if taps < 2 {
            return Err(c.contradiction("linear_conv_kernel_dim", "1: must be 2 or more".to_owned()));
        }
        Ok(Self { key_heads, heads, key, value, taps, interleaved })
    }

    /// Columns of all queries, and of all keys.
    fn key_width(&self) -> i32 {
        self.key_heads * self.key
    }

    /// Columns of all values.
    fn value_width(&self) -> i32 {
        self.heads * self.value
    }

    /// Channels of the convolution.
    fn channels(&self) -> i32 {
        2 * self.key_width() + self.value_width()
    }
}

/// Experts of a token's own choice, and one that all tokens use.
pub(super) struct Routed {
    experts: Experts,
    shared: i32,
    normalise: bool,
}

impl Routed {
    /// Of [`Experts::read`]'s keys, `shared_expert_intermediate_size` and `norm_topk_prob`.
    pub(super) fn read(c: &ModelConfig, hidden: i32, normalise: bool) -> Result<Self, LoadError> {
        Ok(Self {
            experts: Experts::read(c, hidden)?,
            shared: c.size("shared_expert_intermediate_size")?,
            normalise: c.flag_or("norm_topk_prob", normalise)?,
        })
    }
}

/// A layer.
#[derive(Clone, Copy)]
pub(super) struct Layer {
    pub(super) attention: bool,
    pub(super) sparse: bool,
}

/// Layers whose every `interval`-th is one of attention.
///
/// # Errors
/// [`LoadError`] if `layer_types` is there and says something else.
pub(super) fn attention_layers(c: &ModelConfig, layers: i32) -> Result<Vec<bool>, LoadError> {
    let interval = c.size_opt("full_attention_interval")?.unwrap_or(4);
    let attention: Vec<bool> = (1..=layers).map(|n| n % interval == 0).collect();
    let Some(value) = c.get("layer_types") else { return Ok(attention) };
    let named = |attention: &bool| if *attention { "full_attention" } else { "linear_attention" };
    let expected = attention.iter().map(|a| Some(named(a)));
    let found = value.as_array().map_or(&[][..], Vec::as_slice);
    if found.len() != attention.len() || !found.iter().map(|t| t.as_str()).eq(expected) {
        let allowed =
            format!("linear_attention for {layers} layers, but full_attention for every {interval}th");
        return Err(c.wrong("layer_types", value, &allowed));
    }
    Ok(attention)
}

/// How much of a head is turned: its leading `factor`, which `key` gives.
pub(super) fn rotated(c: &ModelConfig, key: &str, head_dim: i32, factor: f64) -> Result<i32, LoadError> {
    let dims = (f64::from(head_dim) * factor) as i32;
    if !(2..=head_dim).contains(&dims) || dims % 2 != 0 {
        let message =
            format!("{factor} of a head of {head_dim} is {dims}: must be even, from 2 to {head_dim}");
        return Err(c.contradiction(key, message));
    }
    Ok(dims)
}

/// A model of these layers.
pub(super) struct Config {
    /// What stands before `model.` and `lm_head` in the names of modules.
    pub(super) prefix: &'static str,
    pub(super) vocab_size: i32,
    pub(super) hidden_size: i32,
    /// Of layers without experts.
    pub(super) intermediate_size: i32,
    pub(super) heads: Heads,
    pub(super) attention_bias: bool,
    pub(super) rope: Rope,
    pub(super) delta: DeltaNet,
    pub(super) routed: Option<Routed>,
    pub(super) norm_eps: f32,
    pub(super) tied: bool,
    pub(super) context_length: i32,
    pub(super) layers: Vec<Layer>,
}

impl Config {
    fn module(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Leaves out layers that predict further tokens and a copy of a tied head, and stacks experts that are apart.
    pub(super) fn tidy(&self, tensors: &mut Tensors) -> Result<(), LoadError> {
        tensors.remove(|name| name.contains("mtp."));
        if self.tied {
            let head = self.module("lm_head.weight");
            tensors.remove(|name| name == head);
        }
        if let Some(routed) = &self.routed {
            for (index, _) in self.layers.iter().enumerate().filter(|(_, layer)| layer.sparse) {
                routed.experts.stack(tensors, &self.module(&format!("model.layers.{index}.mlp")))?;
            }
        }
        Ok(())
    }

    /// Brings kernels and norms of a published checkpoint to the form of mlx-lm's: kernels `[C, 1, K]` to `[C, K, 1]`, and
    /// 1 is added to the weights of all norms but those inside of delta nets.
    pub(super) fn adapt_published(&self, tensors: &mut Tensors) {
        let norms = [
            ".input_layernorm.weight",
            ".post_attention_layernorm.weight",
            "model.norm.weight",
            ".q_norm.weight",
            ".k_norm.weight",
        ];
        tensors.offset(1.0, |name| norms.iter().any(|end| name.ends_with(end)));
        tensors.transpose("conv1d.weight", &[0, 2, 1], |shape| shape[2] != 1);
    }

    /// Writes the graph.
    pub(super) fn build(&self, b: &mut Builder<'_>) -> Outline {
        let tokens = b.tokens();
        let embedding = self.module("model.embed_tokens");
        let mut h = b.embedding(&embedding, tokens, self.vocab_size, self.hidden_size);
        let mut layers = Vec::new();
        for (index, &layer) in self.layers.iter().enumerate() {
            let path = self.module(&format!("model.layers.{index}"));
            let x = self.norm(b, &format!("{path}.input_layernorm"), h);
            let r = if layer.attention {
                self.attention(b, &format!("{path}.self_attn"), x)
            } else {
                self.gated_delta_net(b, &format!("{path}.linear_attn"), x)
            };
            h = b.add(&path, h, r);
            let x = self.norm(b, &format!("{path}.post_attention_layernorm"), h);
            let feed_forward = format!("{path}.mlp");
            let r = match &self.routed {
                Some(routed) if layer.sparse => self.experts(b, routed, &feed_forward, x),
                _ => mlp(b, &feed_forward, x, self.hidden_size, self.intermediate_size, false),
            };
            h = b.add(&path, h, r);
            layers.push(LayerInfo {
                index,
                mixer: if layer.attention { "full_attention" } else { "linear_attention" }.to_owned(),
                feed_forward: if layer.sparse { "moe" } else { "dense" }.to_owned(),
            });
        }
        let h = self.norm(b, &self.module("model.norm"), h);
        let head = if self.tied { embedding } else { self.module("lm_head") };
        Outline {
            output: b.linear(&head, h, self.vocab_size, self.hidden_size),
            layers,
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            context_length: Some(self.context_length),
            experts: self.routed.as_ref().map(|r| (r.experts.count, r.experts.per_token)),
        }
    }

    fn norm(&self, b: &mut Builder<'_>, path: &str, x: Value) -> Value {
        b.rms_norm(path, x, self.hidden_size, self.norm_eps)
    }

    /// Attention whose result is multiplied with the sigmoid of a gate that comes out of the product for the queries.
    fn attention(&self, b: &mut Builder<'_>, path: &str, x: Value) -> Value {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let (q_width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        let product = |b: &mut Builder<'_>, name: &str, x, out, input| {
            linear(b, &format!("{path}.{name}"), x, out, input, self.attention_bias)
        };
        let q = product(b, "q_proj", x, 2 * q_width, self.hidden_size);
        let q = b.node(path, SplitHeads { heads }, &[q]);
        let [q, gate] = b.node_n(path, Split { parts: 2 }, &[q]);
        let gate = b.node(path, FlattenHeads, &[gate]);
        let k = product(b, "k_proj", x, kv_width, self.hidden_size);
        let v = product(b, "v_proj", x, kv_width, self.hidden_size);
        let heads_first = || Transpose(vec![0, 2, 1, 3]);
        let norm = |b: &mut Builder<'_>, name: &str, x: Value| {
            let x = b.rms_norm(&format!("{path}.{name}"), x, head_dim, self.norm_eps);
            b.node(path, heads_first(), &[x])
        };
        let q = norm(b, "q_norm", q);
        let k = b.node(path, SplitHeads { heads: kv_heads }, &[k]);
        let k = norm(b, "k_norm", k);
        let v = b.node(path, SplitHeads { heads: kv_heads }, &[v]);
        let v = b.node(path, heads_first(), &[v]);
        let q = self.rope.apply(b, path, q);
        let k = self.rope.apply(b, path, k);
        let slot = b.slot(path, SlotKind::KvCache);
        let [keys, values] = b.node_n(path, KvAppend { slot }, &[k, v]);
        let y = b.node(path, Attention { scale: self.heads.scale() }, &[q, keys, values]);
        let y = b.node(path, MergeHeads, &[y]);
        let gate = b.node(path, Sigmoid, &[gate]);
        let y = b.multiply(path, y, gate);
        product(b, "o_proj", y, self.hidden_size, q_width)
    }

    /// Queries, keys and values in one row, gates `z` `[B, L, heads * value]`, and `b` and `a` `[B, L, heads]`.
    fn delta_inputs(&self, b: &mut Builder<'_>, path: &str, x: Value) -> [Value; 4] {
        let d = &self.delta;
        let mut product = |name: &str, out| b.linear(&format!("{path}.{name}"), x, out, self.hidden_size);
        if !d.interleaved {
            let qkv = product("in_proj_qkv", d.channels());
            let z = product("in_proj_z", d.value_width());
            return [qkv, z, product("in_proj_b", d.heads), product("in_proj_a", d.heads)];
        }
        let mixed = product("in_proj_qkvz", d.channels() + d.value_width());
        let gates = product("in_proj_ba", 2 * d.heads);
        // A key head's queries, keys, and then values and gates of the value heads that share it.
        let (of_key, of_value) = (d.key, d.heads / d.key_heads * d.value);
        let mixed = b.node(path, SplitHeads { heads: d.key_heads }, &[mixed]);
        let gates = b.node(path, SplitHeads { heads: d.key_heads }, &[gates]);
        let at = vec![of_key, 2 * of_key, 2 * of_key + of_value];
        let parts: [Value; 4] = b.node_n(path, SplitAt { at }, &[mixed]);
        let gates: [Value; 2] = b.node_n(path, SplitAt { at: vec![d.heads / d.key_heads] }, &[gates]);
        let [q, k, v, z] = parts.map(|part| b.node(path, FlattenHeads, &[part]));
        let [beta, a] = gates.map(|part| b.node(path, FlattenHeads, &[part]));
        let qkv = b.node(path, Concatenate { axis: -1 }, &[q, k, v]);
        [qkv, z, beta, a]
    }

    fn gated_delta_net(&self, b: &mut Builder<'_>, path: &str, x: Value) -> Value {
        let d = &self.delta;
        let [qkv, z, beta, a] = self.delta_inputs(b, path, x);
        let conv = format!("{path}.conv1d");
        let keep = d.taps - 1;
        let slot = b.slot(&conv, SlotKind::ConvState { keep });
        let x = b.node(&conv, ConvStep { slot, keep }, &[qkv]);
        let weight = b.tensor(&conv, &[d.channels(), d.taps, 1]);
        let x = b.node(&conv, DepthwiseConv1d { weight, bias: None }, &[x]);
        let x = b.node(&conv, Silu, &[x]);
        let at = vec![d.key_width(), 2 * d.key_width()];
        let [q, k, v] = b.node_n(path, SplitAt { at }, &[x]);
        // L2 norms, by way of a norm over the mean of squares; the scale of the scores is part of the queries'.
        let inverse = f64::from(d.key).powf(-0.5);
        let eps = (UNIT_EPS * inverse * inverse) as f32;
        let unit = |b: &mut Builder<'_>, x: Value, scale: f64| {
            let x = b.node(path, SplitHeads { heads: d.key_heads }, &[x]);
            b.node(path, UnitNorm { scale, eps }, &[x])
        };
        let q = unit(b, q, inverse * inverse);
        let k = unit(b, k, inverse);
        let v = b.node(path, SplitHeads { heads: d.heads }, &[v]);
        let beta = b.node(path, Sigmoid, &[beta]);
        let a_log = b.bare_f32(&format!("{path}.A_log"), &[d.heads]);
        let dt_bias = b.bare(&format!("{path}.dt_bias"), &[d.heads]);
        let g = b.node(path, DeltaGate { a_log, dt_bias }, &[a]);
        let slot = b.slot(path, SlotKind::DeltaState);
        let y = b.node(path, GatedDelta { slot }, &[q, k, v, g, beta]);
        let z = b.node(path, SplitHeads { heads: d.heads }, &[z]);
        let normalised = b.rms_norm(&format!("{path}.norm"), y, d.value, self.norm_eps);
        let wide = |b: &mut Builder<'_>, x: Value| b.node(path, Cast(Some(Dtype::Float32)), &[x]);
        let (gate, normalised) = (wide(b, z), wide(b, normalised));
        let gated = b.node(path, SwiGlu, &[gate, normalised]);
        let gated = b.node(path, Cast(None), &[gated, y]);
        let gated = b.node(path, FlattenHeads, &[gated]);
        b.linear(&format!("{path}.out_proj"), gated, self.hidden_size, d.value_width())
    }

    /// Softmax over all experts; the scores of the best weigh them. The shared expert is weighed by a sigmoid of its own.
    fn experts(&self, b: &mut Builder<'_>, routed: &Routed, path: &str, x: Value) -> Value {
        let experts = &routed.experts;
        let logits = b.linear(&format!("{path}.gate"), x, experts.count, self.hidden_size);
        let gates = b.node(path, Softmax { precise: true }, &[logits]);
        let indices = b.node(path, TopKIndices { k: experts.per_token }, &[gates]);
        let mut scores = b.node(path, TakeAlongLast, &[gates, indices]);
        if routed.normalise {
            let total = b.node(path, Sum { axis: -1, keepdims: true }, &[scores]);
            scores = b.node(path, Binary::Divide, &[scores, total]);
        }
        let y = experts.switch_glu(b, &format!("{path}.switch_mlp"), x, indices);
        let scores = b.node(path, ExpandLast, &[scores]);
        let weighed = b.multiply(path, y, scores);
        let y = b.node(path, Sum { axis: -2, keepdims: false }, &[weighed]);
        let shared_path = format!("{path}.shared_expert");
        let shared = mlp(b, &shared_path, x, self.hidden_size, routed.shared, false);
        let gate = b.linear(&format!("{path}.shared_expert_gate"), x, 1, self.hidden_size);
        let gate = b.node(&shared_path, Sigmoid, &[gate]);
        let shared = b.multiply(&shared_path, gate, shared);
        b.add(path, y, shared)
    }
}
