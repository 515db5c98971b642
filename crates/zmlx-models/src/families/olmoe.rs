//! OLMoE (Ai2): grouped-query attention with norms over all queries and all keys, experts chosen and weighed by a softmax
//! over all.
//!
//! The order of ops is that of `mlx_lm.models.olmoe` 0.32.2.

use zmlx_graph::ops::{Binary, Softmax, Sum, TakeAlongLast, TopKOfNegated};
use zmlx_graph::{Builder, Value};

use super::attention::{Projections, QkNorm, SelfAttention};
use super::blocks::{Experts, Heads, weighed_sum};
use super::decoder::{Decoder, FeedForward};
use super::dense::kv_heads;
use super::rope::{Rope, rope_theta};
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family = Family { model_types: &["olmoe"], sanitize, build, routers: &[] };

struct Config {
    decoder: Decoder,
    attention: SelfAttention,
    experts: Experts,
    norm_topk_prob: bool,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        let decoder = Decoder::read(c, true)?;
        let hidden = decoder.hidden_size;
        for key in ["mlp_bias", "clip_qkv"] {
            if let Some(value) = c.get(key).filter(|v| v.as_bool() != Some(false)) {
                return Err(c.wrong(key, value, "absent or false: another value is not supported"));
            }
        }
        let heads = Heads::read(c, hidden, kv_heads(c)?, c.size_opt("head_dim")?)?;
        let (base, traditional) = (rope_theta(c, Some(1e4))?, c.flag_or("rope_traditional", false)?);
        let bias = c.flag_or("attention_bias", false)?;
        let rope = Rope::read(c, heads.head_dim, base, traditional)?;
        let attention = SelfAttention {
            projections: Projections::Apart { bias },
            norm: QkNorm::Rows { eps: decoder.eps },
            out: ("o_proj", bias),
            ..SelfAttention::plain(hidden, heads, rope)
        };
        let experts = Experts::of(c, "num_experts", "intermediate_size", hidden)?;
        Ok(Self { decoder, attention, experts, norm_topk_prob: c.flag_or("norm_topk_prob", false)? })
    }

    fn routed(&self, b: &mut Builder<'_>, path: &str, x: Value) -> Value {
        let k = self.experts.per_token;
        let logits = b.linear(&format!("{path}.gate"), x, self.experts.count, self.decoder.hidden_size);
        let weights = b.node(path, Softmax { precise: true }, &[logits]);
        let indices = b.node(path, TopKOfNegated { k }, &[weights]);
        let mut scores = b.node(path, TakeAlongLast, &[weights, indices]);
        if self.norm_topk_prob {
            let total = b.node(path, Sum { axis: -1, keepdims: true }, &[scores]);
            scores = b.node(path, Binary::Divide, &[scores, total]);
        }
        let y = self.experts.switch_glu(b, &format!("{path}.switch_mlp"), x, indices);
        weighed_sum(b, path, y, scores)
    }
}

/// Published checkpoints keep experts apart, and some have a copy of a tied head.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = Config::read(config)?;
    if c.decoder.tied {
        tensors.remove(|name| name == "lm_head.weight");
    }
    for layer in 0..c.decoder.layers as usize {
        c.experts.stack(tensors, &format!("{}.mlp", c.decoder.layer(layer)))?;
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let counts = Some((c.experts.count, c.experts.per_token));
    Ok(c.decoder.build(b, &c.attention, counts, |b, _, layer, x| {
        (c.routed(b, &format!("{layer}.mlp"), x), FeedForward::Experts)
    }))
}
