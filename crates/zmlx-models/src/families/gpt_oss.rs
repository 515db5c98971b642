//! GPT-OSS (OpenAI): attention with sinks, through a sliding window in every other layer, and experts with biases whose
//! activation is cut off.
//!
//! The order of ops is that of `mlx_lm.models.gpt_oss` 0.32.2.

use serde_json::Value as Json;
use zmlx_graph::ops::{
    ClampedSwiGlu, ExpandLast, KvAppend, MergeHeads, Softmax, SplitHeads, Sum, TakeAlongLast, TopKIndices,
    Transpose, WindowAttention,
};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};

use super::blocks::{Experts, Heads, head, layer_count};
use super::rope::{Rope, rope_theta};
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["gpt_oss"], sanitize, build, routers: &["mlp.router"] };

/// The activation that mlx-lm applies whatever the configuration says.
const ACTIVATION: ClampedSwiGlu = ClampedSwiGlu { alpha: 1.702, limit: 7.0 };

struct Config {
    vocab_size: i32,
    hidden_size: i32,
    heads: Heads,
    experts: Experts,
    rope: Rope,
    window: i32,
    /// For each layer, whether it looks through the window.
    sliding: Vec<bool>,
    rms_norm_eps: f32,
    context_length: Option<i32>,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        let hidden_size = c.size("hidden_size")?;
        let heads = Heads::read(c, hidden_size, c.size("num_key_value_heads")?, Some(c.size("head_dim")?))?;
        let (count, per_token) = (c.size("num_local_experts")?, c.size("num_experts_per_tok")?);
        if per_token > count {
            return Err(c.contradiction("num_experts_per_tok", format!("{per_token} of {count} experts")));
        }
        // Keys that mlx-lm does not look at, whose other values would be another model.
        for (key, expected) in [("attention_bias", true), ("tie_word_embeddings", false)] {
            if let Some(found) = c.get(key).filter(|found| **found != expected) {
                return Err(c.wrong(
                    key,
                    found,
                    &format!("{expected}, as all models of this family have it"),
                ));
            }
        }
        if let Some(limit) = c.get("swiglu_limit").filter(|l| l.as_f64() != Some(ACTIVATION.limit)) {
            return Err(c.wrong("swiglu_limit", limit, "7, as all models of this family have it"));
        }
        let base = rope_theta(c, Some(150_000.0))?;
        Ok(Self {
            vocab_size: c.size("vocab_size")?,
            hidden_size,
            experts: Experts { count, per_token, hidden: hidden_size, inner: c.size("intermediate_size")? },
            rope: Rope::read(c, heads.head_dim, base, false)?,
            heads,
            window: c.size("sliding_window")?,
            sliding: sliding_layers(c, layer_count(c)? as usize)?,
            rms_norm_eps: c.positive("rms_norm_eps")? as f32,
            context_length: c.size_opt("max_position_embeddings")?,
        })
    }
}

/// Of `layer_types`; without it every other layer slides, the first too.
fn sliding_layers(c: &ModelConfig, layers: usize) -> Result<Vec<bool>, LoadError> {
    let Some(types) = c.get("layer_types") else { return Ok((0..layers).map(|i| i % 2 == 0).collect()) };
    let allowed = format!("a list of {layers} times sliding_attention or full_attention");
    let sliding = |t: &Json| match t.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let read: Option<Vec<bool>> = types.as_array().and_then(|types| types.iter().map(sliding).collect());
    read.filter(|read| read.len() == layers).ok_or_else(|| c.wrong("layer_types", types, &allowed))
}

/// Published checkpoints have bytes and not words, and gate and up in turns.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    for layer in 0..Config::read(config)?.sliding.len() {
        let base = format!("model.layers.{layer}.mlp.experts");
        let of = |projection: &str, part: &str| format!("{base}.{projection}.{part}");
        for projection in ["gate_up_proj", "down_proj"] {
            tensors.pack(&format!("{base}.{projection}_blocks"), &of(projection, "weight"));
            for (stored, part) in [("_scales", "scales"), ("_bias", "bias")] {
                let old = format!("{base}.{projection}{stored}");
                tensors.rename_one(&old, &of(projection, part));
            }
        }
        for (part, axis) in [("weight", -2), ("scales", -2), ("bias", -1)] {
            let parts = [of("gate_proj", part), of("up_proj", part)];
            tensors.split_in_turns(&of("gate_up_proj", part), axis, &[&parts[0], &parts[1]])?;
        }
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let tokens = b.tokens();
    let mut h = b.embedding("model.embed_tokens", tokens, c.vocab_size, c.hidden_size);
    let mut layers = Vec::new();
    for (index, &sliding) in c.sliding.iter().enumerate() {
        let path = format!("model.layers.{index}");
        let x = b.rms_norm(&format!("{path}.input_layernorm"), h, c.hidden_size, c.rms_norm_eps);
        let r = self_attention(b, &c, &format!("{path}.self_attn"), x, sliding);
        h = b.add(&path, h, r);
        let x = b.rms_norm(&format!("{path}.post_attention_layernorm"), h, c.hidden_size, c.rms_norm_eps);
        let r = routed(b, &c, &format!("{path}.mlp"), x);
        h = b.add(&path, h, r);
        layers.push(LayerInfo {
            index,
            mixer: if sliding { "sliding_attention" } else { "full_attention" }.to_owned(),
            feed_forward: "moe".to_owned(),
        });
    }
    let h = b.rms_norm("model.norm", h, c.hidden_size, c.rms_norm_eps);
    let output = head(b, false, h, c.vocab_size, c.hidden_size);
    Ok(Outline {
        output,
        layers,
        hidden_size: c.hidden_size,
        vocab_size: c.vocab_size,
        context_length: c.context_length,
        experts: Some((c.experts.count, c.experts.per_token)),
    })
}

fn self_attention(b: &mut Builder<'_>, c: &Config, path: &str, x: Value, sliding: bool) -> Value {
    let Heads { heads, kv_heads, .. } = c.heads;
    let (q_width, kv_width) = (c.heads.q_width(), c.heads.kv_width());
    let project = |b: &mut Builder<'_>, name: &str, heads: i32, width: i32| {
        let x = b.linear_bias(&format!("{path}.{name}"), x, width, c.hidden_size);
        let x = b.node(path, SplitHeads { heads }, &[x]);
        b.node(path, Transpose(vec![0, 2, 1, 3]), &[x])
    };
    let q = project(b, "q_proj", heads, q_width);
    let k = project(b, "k_proj", kv_heads, kv_width);
    let v = project(b, "v_proj", kv_heads, kv_width);
    let q = c.rope.apply(b, path, q);
    let k = c.rope.apply(b, path, k);
    let window = sliding.then_some(c.window);
    let slot = b.slot(path, window.map_or(SlotKind::KvCache, |window| SlotKind::WindowCache { window }));
    let [keys, values] = b.node_n(path, KvAppend { slot }, &[k, v]);
    let sinks = Some(b.bare(&format!("{path}.sinks"), &[heads]));
    let y = b.node(path, WindowAttention { scale: c.heads.scale(), window, sinks }, &[q, keys, values]);
    let y = b.node(path, MergeHeads, &[y]);
    b.linear_bias(&format!("{path}.o_proj"), y, c.hidden_size, q_width)
}

/// Logits choose; softmax over those of the chosen experts weighs them.
fn routed(b: &mut Builder<'_>, c: &Config, path: &str, x: Value) -> Value {
    let logits = b.linear_bias(&format!("{path}.router"), x, c.experts.count, c.hidden_size);
    let indices = b.node(path, TopKIndices { k: c.experts.per_token }, &[logits]);
    let chosen = b.node(path, TakeAlongLast, &[logits, indices]);
    let weights = b.node(path, Softmax { precise: true }, &[chosen]);
    let y = c.experts.switch(b, &format!("{path}.experts"), x, indices, true, ACTIVATION);
    let weights = b.node(path, ExpandLast, &[weights]);
    let weighed = b.multiply(path, y, weights);
    b.node(path, Sum { axis: -2, keepdims: false }, &[weighed])
}
