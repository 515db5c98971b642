//! Llama and what is built like it (Mistral, SmolLM2): grouped-query attention and a gated MLP in every layer.
//!
//! The order of ops is that of `mlx_lm.models.llama` 0.32.2.

use serde_json::Value as Json;
use zmlx_graph::ops::{Attention, KvAppend, MergeHeads, SplitHeads, Transpose};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};

use super::blocks::{Heads, head, layer_count, linear, mlp};
use super::rope::{Rope, rope_theta};
use super::{Family, Outline};
use crate::config::{ModelConfig, wrong};
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["llama", "mistral"], sanitize, build, routers: &[] };

struct Config {
    vocab_size: i32,
    hidden_size: i32,
    intermediate_size: i32,
    layers: i32,
    heads: Heads,
    rope: Rope,
    context_length: Option<i32>,
    rms_norm_eps: f32,
    attention_bias: bool,
    mlp_bias: bool,
    tied: bool,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        let layers = layer_count(c)?;
        let hidden_size = c.size("hidden_size")?;
        let kv_heads = match c.size_opt("num_key_value_heads")? {
            Some(kv_heads) => kv_heads,
            None => c.size("num_attention_heads")?,
        };
        if let Some(types) = c.get("layer_types") {
            let full = |t: &Json| t.as_str() == Some("full_attention");
            if !types.as_array().is_some_and(|types| types.iter().all(full)) {
                return Err(wrong(
                    "layer_types",
                    types,
                    "all full_attention: sliding windows are not supported",
                ));
            }
        }
        let heads = Heads::read(c, hidden_size, kv_heads, c.size_opt("head_dim")?)?;
        let base = rope_theta(c, Some(10_000.0))?;
        Ok(Self {
            vocab_size: c.size("vocab_size")?,
            hidden_size,
            intermediate_size: c.size("intermediate_size")?,
            layers,
            rope: Rope::read(c, heads.head_dim, base, c.flag_or("rope_traditional", false)?)?,
            heads,
            context_length: c.size_opt("max_position_embeddings")?,
            rms_norm_eps: c.positive("rms_norm_eps")? as f32,
            attention_bias: c.flag_or("attention_bias", false)?,
            mlp_bias: c.flag_or("mlp_bias", false)?,
            tied: c.flag_or("tie_word_embeddings", true)?,
        })
    }
}

/// Old checkpoints carry the rotary frequencies, and some a copy of a tied head.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let tied = Config::read(config)?.tied;
    tensors
        .remove(|name| name.contains("self_attn.rotary_emb.inv_freq") || (tied && name == "lm_head.weight"));
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let tokens = b.tokens();
    let mut h = b.embedding("model.embed_tokens", tokens, c.vocab_size, c.hidden_size);
    let mut layers = Vec::new();
    for index in 0..c.layers {
        let path = format!("model.layers.{index}");
        let x = b.rms_norm(&format!("{path}.input_layernorm"), h, c.hidden_size, c.rms_norm_eps);
        let r = self_attention(b, &c, &format!("{path}.self_attn"), x);
        h = b.add(&path, h, r);
        let x = b.rms_norm(&format!("{path}.post_attention_layernorm"), h, c.hidden_size, c.rms_norm_eps);
        let r = mlp(b, &format!("{path}.mlp"), x, c.hidden_size, c.intermediate_size, c.mlp_bias);
        h = b.add(&path, h, r);
        layers.push(LayerInfo {
            index: index as usize,
            mixer: "full_attention".to_owned(),
            feed_forward: "dense".to_owned(),
        });
    }
    let h = b.rms_norm("model.norm", h, c.hidden_size, c.rms_norm_eps);
    let output = head(b, c.tied, h, c.vocab_size, c.hidden_size);
    Ok(Outline {
        output,
        layers,
        hidden_size: c.hidden_size,
        vocab_size: c.vocab_size,
        context_length: c.context_length,
        experts: None,
    })
}

fn self_attention(b: &mut Builder<'_>, c: &Config, path: &str, x: Value) -> Value {
    let Heads { heads, kv_heads, .. } = c.heads;
    let (q_width, kv_width) = (c.heads.q_width(), c.heads.kv_width());
    let project = |b: &mut Builder<'_>, name: &str, x, out, input| {
        linear(b, &format!("{path}.{name}"), x, out, input, c.attention_bias)
    };
    let q = project(b, "q_proj", x, q_width, c.hidden_size);
    let k = project(b, "k_proj", x, kv_width, c.hidden_size);
    let v = project(b, "v_proj", x, kv_width, c.hidden_size);
    let split = |b: &mut Builder<'_>, x: Value, heads: i32| {
        let x = b.node(path, SplitHeads { heads }, &[x]);
        b.node(path, Transpose(vec![0, 2, 1, 3]), &[x])
    };
    let q = split(b, q, heads);
    let k = split(b, k, kv_heads);
    let v = split(b, v, kv_heads);
    let q = c.rope.apply(b, path, q);
    let k = c.rope.apply(b, path, k);
    let slot = b.slot(path, SlotKind::KvCache);
    let [keys, values] = b.node_n(path, KvAppend { slot }, &[k, v]);
    let y = b.node(path, Attention { scale: c.heads.scale() }, &[q, keys, values]);
    let y = b.node(path, MergeHeads, &[y]);
    project(b, "o_proj", y, c.hidden_size, q_width)
}
