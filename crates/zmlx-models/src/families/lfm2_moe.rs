//! LFM2-MoE (Liquid AI): gated short convolutions and grouped-query attention, sparse experts with sigmoid routing.
//!
//! The order of ops is that of `mlx_lm.models.lfm2_moe` 0.32.2.

use serde_json::Value as Json;
use zmlx_graph::ops::{
    AddScalar, AddWeight, Attention, Binary, Cast, ConvStep, DepthwiseConv1d, ExpandLast, KvAppend,
    MergeHeads, MultiplyScalar, Rope, Sigmoid, Split, SplitHeads, Sum, TakeAlongLast, TopKIndices, Transpose,
};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};
use zmlx_mlx::Dtype;

use super::blocks::{Experts, Heads, head, layer_count, linear, mlp};
use super::rope::rope_theta;
use super::{Family, Outline};
use crate::config::{ModelConfig, missing, wrong};
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["lfm2_moe"], sanitize, build, routers: &["feed_forward.gate"] };

struct Config {
    vocab_size: i32,
    hidden_size: i32,
    intermediate_size: i32,
    experts: Experts,
    norm_topk_prob: bool,
    heads: Heads,
    context_length: i32,
    use_expert_bias: bool,
    num_dense_layers: i32,
    norm_eps: f32,
    conv_bias: bool,
    conv_kernel: i32,
    rope_theta: f32,
    routed_scaling_factor: f64,
    /// For each layer, whether it is an attention layer.
    attention: Vec<bool>,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        let layers = layer_count(c)?;
        let hidden_size = c.size("hidden_size")?;
        let heads = Heads::read(c, hidden_size, c.size("num_key_value_heads")?, None)?;
        Ok(Self {
            vocab_size: c.size("vocab_size")?,
            hidden_size,
            intermediate_size: c.size("intermediate_size")?,
            experts: Experts::read(c, hidden_size)?,
            norm_topk_prob: c.flag("norm_topk_prob")?,
            heads,
            context_length: c.size("max_position_embeddings")?,
            use_expert_bias: c.flag("use_expert_bias")?,
            num_dense_layers: c.count("num_dense_layers")?,
            norm_eps: c.positive("norm_eps")? as f32,
            conv_bias: c.flag("conv_bias")?,
            conv_kernel: c.size("conv_L_cache")?,
            rope_theta: rope_theta(c, Some(1_000_000.0))? as f32,
            routed_scaling_factor: c.positive_or("routed_scaling_factor", Some(1.0))?,
            attention: attention_layers(c, layers)?,
        })
    }
}

fn attention_layers(c: &ModelConfig, layers: i32) -> Result<Vec<bool>, LoadError> {
    let layers = layers as usize;
    if let Some(value) = c.get("full_attn_idxs") {
        let mut attention = vec![false; layers];
        let numbers =
            value.as_array().ok_or_else(|| wrong("full_attn_idxs", value, "a list of layer numbers"))?;
        for item in numbers {
            let slot = item.as_u64().and_then(|i| attention.get_mut(i as usize));
            *slot.ok_or_else(|| wrong("full_attn_idxs", value, "layer numbers"))? = true;
        }
        return Ok(attention);
    }
    let value = c.get("layer_types").ok_or_else(|| missing("layer_types"))?;
    let types = value.as_array().map_or(&[][..], Vec::as_slice);
    if types.len() != layers {
        return Err(wrong("layer_types", value, &format!("a list of {layers} layer types")));
    }
    let one = |t: &Json| match t.as_str() {
        Some("full_attention") => Ok(true),
        Some("conv") => Ok(false),
        _ => Err(wrong("layer_types", t, "\"conv\" or \"full_attention\"")),
    };
    types.iter().map(one).collect()
}

/// Published checkpoints name the projections w1, w2, w3, keep experts apart and store kernels as `[C, 1, K]`.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = Config::read(config)?;
    tensors.transpose("conv.weight", &[0, 2, 1], |s| s[2] > s[1]);
    tensors.rename(|name| {
        let projections = [("w1.", "gate_proj."), ("w2.", "down_proj."), ("w3.", "up_proj.")];
        let (old, new) = projections.into_iter().find(|(old, _)| name.contains(&format!(".{old}")))?;
        Some(name.replace(&format!(".{old}"), &format!(".{new}")))
    });
    for layer in 0..c.attention.len() {
        c.experts.stack(tensors, &format!("model.layers.{layer}.feed_forward"))?;
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let tokens = b.tokens();
    let mut h = b.embedding("model.embed_tokens", tokens, c.vocab_size, c.hidden_size);
    let mut layers = Vec::new();
    for (index, &attention) in c.attention.iter().enumerate() {
        let path = format!("model.layers.{index}");
        let x = b.rms_norm(&format!("{path}.operator_norm"), h, c.hidden_size, c.norm_eps);
        let mixed = if attention {
            self_attention(b, &c, &format!("{path}.self_attn"), x)
        } else {
            short_conv(b, &c, &format!("{path}.conv"), x)
        };
        h = b.add(&path, h, mixed);
        let x = b.rms_norm(&format!("{path}.ffn_norm"), h, c.hidden_size, c.norm_eps);
        let dense = (index as i32) < c.num_dense_layers;
        let feed_forward = format!("{path}.feed_forward");
        let y = if dense {
            mlp(b, &feed_forward, x, c.hidden_size, c.intermediate_size, false)
        } else {
            experts(b, &c, &feed_forward, x)
        };
        h = b.add(&path, h, y);
        layers.push(LayerInfo {
            index,
            mixer: if attention { "full_attention" } else { "conv" }.to_owned(),
            feed_forward: if dense { "dense" } else { "moe" }.to_owned(),
        });
    }
    let h = b.rms_norm("model.embedding_norm", h, c.hidden_size, c.norm_eps);
    // The head is the embedding matrix.
    let output = head(b, true, h, c.vocab_size, c.hidden_size);
    Ok(Outline {
        output,
        layers,
        hidden_size: c.hidden_size,
        vocab_size: c.vocab_size,
        context_length: Some(c.context_length),
        experts: Some((c.experts.count, c.experts.per_token)),
    })
}

fn self_attention(b: &mut Builder<'_>, c: &Config, path: &str, x: Value) -> Value {
    let Heads { heads, kv_heads, head_dim } = c.heads;
    let (q_width, kv_width) = (c.heads.q_width(), c.heads.kv_width());
    let q = b.linear(&format!("{path}.q_proj"), x, q_width, c.hidden_size);
    let k = b.linear(&format!("{path}.k_proj"), x, kv_width, c.hidden_size);
    let v = b.linear(&format!("{path}.v_proj"), x, kv_width, c.hidden_size);
    let heads_first = || Transpose(vec![0, 2, 1, 3]);
    let rope = || Rope { dims: head_dim, base: c.rope_theta, traditional: false, scale: 1.0 };
    let norm_and_turn = |b: &mut Builder<'_>, norm: &str, x: Value, heads: i32| {
        let x = b.node(path, SplitHeads { heads }, &[x]);
        let x = b.rms_norm(&format!("{path}.{norm}"), x, head_dim, c.norm_eps);
        b.node(path, heads_first(), &[x])
    };
    let q = norm_and_turn(b, "q_layernorm", q, heads);
    let k = norm_and_turn(b, "k_layernorm", k, kv_heads);
    let v = b.node(path, SplitHeads { heads: kv_heads }, &[v]);
    let v = b.node(path, heads_first(), &[v]);
    let q = b.node(path, rope(), &[q]);
    let k = b.node(path, rope(), &[k]);
    let slot = b.slot(path, SlotKind::KvCache);
    let [keys, values] = b.node_n(path, KvAppend { slot }, &[k, v]);
    let y = b.node(path, Attention { scale: c.heads.scale() }, &[q, keys, values]);
    let y = b.node(path, MergeHeads, &[y]);
    b.linear(&format!("{path}.out_proj"), y, c.hidden_size, q_width)
}

fn short_conv(b: &mut Builder<'_>, c: &Config, path: &str, x: Value) -> Value {
    let linear = |b: &mut Builder<'_>, name: &str, x, out| {
        linear(b, &format!("{path}.{name}"), x, out, c.hidden_size, c.conv_bias)
    };
    let bcx = linear(b, "in_proj", x, 3 * c.hidden_size);
    let [gate_in, gate_out, x] = b.node_n(path, Split { parts: 3 }, &[bcx]);
    let bx = b.multiply(path, gate_in, x);
    let keep = c.conv_kernel - 1;
    let slot = b.slot(path, SlotKind::ConvState { keep });
    let bx = b.node(path, ConvStep { slot, keep }, &[bx]);
    let conv = format!("{path}.conv");
    let weight = b.tensor(&conv, &[c.hidden_size, c.conv_kernel, 1]);
    let bias = c.conv_bias.then(|| b.bias(&conv, c.hidden_size));
    let y = b.node(&conv, DepthwiseConv1d { weight, bias }, &[bx]);
    let y = b.multiply(path, gate_out, y);
    linear(b, "out_proj", y, c.hidden_size)
}

/// Sigmoid scores choose experts together with a bias, and weigh them without it.
fn experts(b: &mut Builder<'_>, c: &Config, path: &str, x: Value) -> Value {
    let logits = b.linear(&format!("{path}.gate"), x, c.experts.count, c.hidden_size);
    let scores = b.node(path, Sigmoid, &[logits]);
    let ranked = if c.use_expert_bias {
        let wide = b.node(path, Cast(Some(Dtype::Float32)), &[scores]);
        let weight = b.bare_f32(&format!("{path}.expert_bias"), &[c.experts.count]);
        b.node(path, AddWeight { weight }, &[wide])
    } else {
        scores
    };
    let indices = b.node(path, TopKIndices { k: c.experts.per_token }, &[ranked]);
    let mut weights = b.node(path, TakeAlongLast, &[scores, indices]);
    if c.norm_topk_prob {
        let total = b.node(path, Sum { axis: -1, keepdims: true }, &[weights]);
        let total = b.node(path, AddScalar(1e-6), &[total]);
        weights = b.node(path, Binary::Divide, &[weights, total]);
    }
    weights = b.node(path, MultiplyScalar(c.routed_scaling_factor), &[weights]);
    weights = b.node(path, Cast(None), &[weights, x]);

    let y = c.experts.switch_glu(b, &format!("{path}.switch_mlp"), x, indices);
    let weights = b.node(path, ExpandLast, &[weights]);
    let y = b.multiply(path, y, weights);
    b.node(path, Sum { axis: -2, keepdims: false }, &[y])
}
