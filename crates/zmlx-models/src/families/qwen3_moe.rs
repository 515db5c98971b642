//! Qwen3-MoE (Alibaba): grouped-query attention with normed queries and keys, sparse experts with softmax routing.
//!
//! The order of ops is that of `mlx_lm.models.qwen3_moe` 0.32.2.

use zmlx_graph::ops::{Binary, Cast, Softmax, Sum, TakeAlongLast, TopKIndices};
use zmlx_graph::{Builder, Value};

use super::attention::{QkNorm, SelfAttention};
use super::blocks::{Experts, Heads, mlp, weighed_sum};
use super::decoder::{Decoder, FeedForward};
use super::rope::Rope;
use super::{Family, Outline};
use crate::config::{ModelConfig, missing, wrong};
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["qwen3_moe"], sanitize, build, routers: &["mlp.gate"] };

struct Config {
    decoder: Decoder,
    attention: SelfAttention,
    intermediate_size: i32,
    /// Sizes of the experts, if any layer has them.
    experts: Option<Experts>,
    norm_topk_prob: bool,
    /// For each layer, whether it has experts.
    sparse: Vec<bool>,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        c.flag("tie_word_embeddings")?;
        c.size("max_position_embeddings")?;
        let decoder = Decoder::read(c, false)?;
        let hidden = decoder.hidden_size;
        let sparse = sparse_layers(c, decoder.layers)?;
        // mlx-lm ignores the key, and gives other text than the model was trained for.
        let kind = c.get("rope_scaling").map(|s| s.get("type").or_else(|| s.get("rope_type")));
        if let (Some(section), Some(kind)) = (c.get("rope_scaling"), kind)
            && !kind.is_none_or(|k| k == "default")
        {
            return Err(wrong(
                "rope_scaling",
                section,
                "absent: this family has plain rotary embedding only",
            ));
        }
        let heads = Heads::read(c, hidden, c.size("num_key_value_heads")?, Some(c.size("head_dim")?))?;
        let rope = Rope::plain(heads.head_dim, c.positive("rope_theta")?, false);
        let attention = SelfAttention {
            norm: QkNorm::Heads { q: "q_norm", k: "k_norm", eps: decoder.eps },
            ..SelfAttention::plain(hidden, heads, rope)
        };
        Ok(Self {
            intermediate_size: c.size("intermediate_size")?,
            experts: match sparse.contains(&true) {
                true => Some(Experts::read(c, hidden)?),
                false => None,
            },
            norm_topk_prob: c.flag("norm_topk_prob")?,
            decoder,
            attention,
            sparse,
        })
    }
}

/// Every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`.
pub(super) fn sparse_layers(c: &ModelConfig, layers: i32) -> Result<Vec<bool>, LoadError> {
    let (experts, step) = (c.count("num_experts")?, c.size("decoder_sparse_step")?);
    let mut sparse: Vec<bool> = (1..=layers).map(|n| experts > 0 && n % step == 0).collect();
    let value = c.get("mlp_only_layers").ok_or_else(|| missing("mlp_only_layers"))?;
    let numbers =
        value.as_array().ok_or_else(|| wrong("mlp_only_layers", value, "a list of layer numbers"))?;
    for item in numbers {
        let slot = item.as_u64().and_then(|i| sparse.get_mut(i as usize));
        *slot.ok_or_else(|| wrong("mlp_only_layers", value, "layer numbers"))? = false;
    }
    Ok(sparse)
}

/// Published checkpoints keep experts apart, and some have a copy of a tied head.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = Config::read(config)?;
    if c.decoder.tied {
        tensors.remove(|name| name == "lm_head.weight");
    }
    for (layer, _) in c.sparse.iter().enumerate().filter(|(_, sparse)| **sparse) {
        if let Some(experts) = &c.experts {
            experts.stack(tensors, &format!("model.layers.{layer}.mlp"))?;
        }
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let hidden = c.decoder.hidden_size;
    let counts = c.experts.as_ref().map(|e| (e.count, e.per_token));
    Ok(c.decoder.build(b, &c.attention, counts, |b, index, layer, x| {
        let path = format!("{layer}.mlp");
        match &c.experts {
            Some(experts) if c.sparse[index] => (routed(b, &c, experts, &path, x), FeedForward::Experts),
            _ => (mlp(b, &path, x, hidden, c.intermediate_size, false), FeedForward::Dense),
        }
    }))
}

/// Softmax over all experts; the scores of the best weigh them.
fn routed(b: &mut Builder<'_>, c: &Config, experts: &Experts, path: &str, x: Value) -> Value {
    let logits = b.linear(&format!("{path}.gate"), x, experts.count, c.decoder.hidden_size);
    let gates = b.node(path, Softmax { precise: true }, &[logits]);
    let indices = b.node(path, TopKIndices { k: experts.per_token }, &[gates]);
    let mut scores = b.node(path, TakeAlongLast, &[gates, indices]);
    if c.norm_topk_prob {
        let total = b.node(path, Sum { axis: -1, keepdims: true }, &[scores]);
        scores = b.node(path, Binary::Divide, &[scores, total]);
    }
    let y = experts.switch_glu(b, &format!("{path}.switch_mlp"), x, indices);
    let sum = weighed_sum(b, path, y, scores);
    b.node(path, Cast(None), &[sum, y])
}
