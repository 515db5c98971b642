//! LFM2 and LFM2-MoE (Liquid AI): gated short convolutions and grouped-query attention, sparse experts with sigmoid
//! routing in the latter.
//!
//! The order of ops is that of `mlx_lm.models.lfm2` and `mlx_lm.models.lfm2_moe` 0.32.2.

use serde_json::Value as Json;
use zmlx_graph::ops::{
    AddScalar, AddWeight, Binary, Cast, ConvStep, DepthwiseConv1d, MultiplyScalar, Sigmoid, Split, Sum,
    SwiGlu, TakeAlongLast, TopKIndices,
};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};
use zmlx_mlx::Dtype;

use super::attention::{QkNorm, SelfAttention};
use super::blocks::{Experts, Heads, head, layer_count, linear, mlp, weighed_sum};
use super::rope::{Rope, rope_theta};
use super::{Family, Outline};
use crate::config::{ModelConfig, missing, wrong};
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["lfm2_moe", "lfm2"], sanitize, build, routers: &["feed_forward.gate"] };

struct Config {
    vocab_size: i32,
    hidden_size: i32,
    attention: SelfAttention,
    /// Width of dense feed-forward parts.
    inner: i32,
    /// What layers from `num_dense_layers` on have; none in LFM2.
    routed: Option<Routed>,
    context_length: i32,
    norm_eps: f32,
    conv_bias: bool,
    conv_kernel: i32,
    /// For each layer, whether it is an attention layer.
    layers: Vec<bool>,
}

struct Routed {
    experts: Experts,
    norm_topk_prob: bool,
    use_expert_bias: bool,
    scale: f64,
    num_dense_layers: i32,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        let count = layer_count(c)?;
        let hidden_size = c.size("hidden_size")?;
        let heads = Heads::read(c, hidden_size, c.size("num_key_value_heads")?, None)?;
        let norm_eps = c.positive("norm_eps")? as f32;
        let rope = Rope::plain(heads.head_dim, rope_theta(c, Some(1_000_000.0))?, false);
        let attention = SelfAttention {
            norm: QkNorm::Heads { q: "q_layernorm", k: "k_layernorm", eps: norm_eps },
            out: ("out_proj", false),
            ..SelfAttention::plain(hidden_size, heads, rope)
        };
        let dense = c.model_type() == "lfm2";
        Ok(Self {
            vocab_size: c.size("vocab_size")?,
            hidden_size,
            attention,
            inner: if dense { dense_width(c, hidden_size)? } else { c.size("intermediate_size")? },
            routed: if dense { None } else { Some(Routed::read(c, hidden_size)?) },
            context_length: c.size("max_position_embeddings")?,
            norm_eps,
            conv_bias: c.flag("conv_bias")?,
            conv_kernel: c.size("conv_L_cache")?,
            layers: attention_layers(c, count)?,
        })
    }
}

impl Routed {
    fn read(c: &ModelConfig, hidden: i32) -> Result<Self, LoadError> {
        Ok(Self {
            experts: Experts::read(c, hidden)?,
            norm_topk_prob: c.flag("norm_topk_prob")?,
            use_expert_bias: c.flag("use_expert_bias")?,
            scale: c.positive_or("routed_scaling_factor", Some(1.0))?,
            num_dense_layers: c.count("num_dense_layers")?,
        })
    }
}

/// Width of LFM2's feed-forward parts: `block_ff_dim`, of which two thirds, times a factor, rounded up, if it is to be
/// adjusted.
fn dense_width(c: &ModelConfig, hidden: i32) -> Result<i32, LoadError> {
    let block = c.size_opt("block_dim")?.unwrap_or(hidden);
    if block != hidden {
        return Err(c.contradiction("block_dim", format!("{block}: must be hidden_size, {hidden}")));
    }
    let width = match c.size_opt("block_ff_dim")? {
        Some(width) => width,
        None => c.size("intermediate_size")?,
    };
    if !c.flag("block_auto_adjust_ff_dim")? {
        return Ok(width);
    }
    let multiple = i64::from(c.size("block_multiple_of")?);
    let factor = c.positive_or("block_ffn_dim_multiplier", Some(1.0))?;
    // Cut to whole numbers after each step.
    let width = (factor * (2.0 * f64::from(width) / 3.0).trunc()).min(f64::from(i32::MAX)) as i64;
    let width = multiple * ((width + multiple - 1) / multiple);
    i32::try_from(width).ok().filter(|w| (1..=1 << 24).contains(w)).ok_or_else(|| {
        c.contradiction("block_ffn_dim_multiplier", format!("{factor} gives {width} columns: 1 to 2^24"))
    })
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

/// Published checkpoints name the projections w1, w2, w3 (in LFM2 they keep these names), have experts apart and store
/// kernels as `[C, 1, K]`.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = Config::read(config)?;
    tensors.transpose("conv.weight", &[0, 2, 1], |s| s[2] > s[1]);
    let Some(routed) = &c.routed else { return Ok(()) };
    tensors.rename(|name| {
        let projections = [("w1.", "gate_proj."), ("w2.", "down_proj."), ("w3.", "up_proj.")];
        let (old, new) = projections.into_iter().find(|(old, _)| name.contains(&format!(".{old}")))?;
        Some(name.replace(&format!(".{old}"), &format!(".{new}")))
    });
    for layer in 0..c.layers.len() {
        routed.experts.stack(tensors, &format!("model.layers.{layer}.feed_forward"))?;
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let tokens = b.tokens();
    let mut h = b.embedding("model.embed_tokens", tokens, c.vocab_size, c.hidden_size);
    let mut layers = Vec::new();
    for (index, &attention) in c.layers.iter().enumerate() {
        let path = format!("model.layers.{index}");
        let x = b.rms_norm(&format!("{path}.operator_norm"), h, c.hidden_size, c.norm_eps);
        let mixed = if attention {
            c.attention.write(b, &format!("{path}.self_attn"), x)
        } else {
            short_conv(b, &c, &format!("{path}.conv"), x)
        };
        h = b.add(&path, h, mixed);
        let x = b.rms_norm(&format!("{path}.ffn_norm"), h, c.hidden_size, c.norm_eps);
        let feed_forward = format!("{path}.feed_forward");
        let (y, kind) = match &c.routed {
            None => (plain(b, &feed_forward, x, c.hidden_size, c.inner), "dense"),
            Some(routed) if (index as i32) < routed.num_dense_layers => {
                (mlp(b, &feed_forward, x, c.hidden_size, c.inner, false), "dense")
            }
            Some(routed) => (experts(b, routed, &feed_forward, x), "moe"),
        };
        h = b.add(&path, h, y);
        layers.push(LayerInfo {
            index,
            mixer: if attention { "full_attention" } else { "conv" }.to_owned(),
            feed_forward: kind.to_owned(),
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
        experts: c.routed.map(|r| (r.experts.count, r.experts.per_token)),
    })
}

/// `w2(silu(w1(x)) * w3(x))`
fn plain(b: &mut Builder<'_>, path: &str, x: Value, hidden: i32, inner: i32) -> Value {
    let gate = b.linear(&format!("{path}.w1"), x, inner, hidden);
    let up = b.linear(&format!("{path}.w3"), x, inner, hidden);
    let y = b.node(path, SwiGlu, &[gate, up]);
    b.linear(&format!("{path}.w2"), y, hidden, inner)
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
fn experts(b: &mut Builder<'_>, c: &Routed, path: &str, x: Value) -> Value {
    let Experts { count, per_token, hidden, .. } = c.experts;
    let logits = b.linear(&format!("{path}.gate"), x, count, hidden);
    let scores = b.node(path, Sigmoid, &[logits]);
    let ranked = if c.use_expert_bias {
        let wide = b.node(path, Cast(Some(Dtype::Float32)), &[scores]);
        let weight = b.bare_f32(&format!("{path}.expert_bias"), &[count]);
        b.node(path, AddWeight { weight }, &[wide])
    } else {
        scores
    };
    let indices = b.node(path, TopKIndices { k: per_token }, &[ranked]);
    let mut weights = b.node(path, TakeAlongLast, &[scores, indices]);
    if c.norm_topk_prob {
        let total = b.node(path, Sum { axis: -1, keepdims: true }, &[weights]);
        let total = b.node(path, AddScalar(1e-6), &[total]);
        weights = b.node(path, Binary::Divide, &[weights, total]);
    }
    weights = b.node(path, MultiplyScalar(c.scale), &[weights]);
    weights = b.node(path, Cast(None), &[weights, x]);
    let y = c.experts.switch_glu(b, &format!("{path}.switch_mlp"), x, indices);
    weighed_sum(b, path, y, weights)
}
