//! Mixtral (Mistral): grouped-query attention, and experts weighed by a softmax over those that were chosen.
//!
//! The order of ops is that of `mlx_lm.models.mixtral` 0.32.2.

use zmlx_graph::ops::{Softmax, TakeAlongLast, TopKOfNegated};
use zmlx_graph::{Builder, Value};

use super::attention::SelfAttention;
use super::blocks::{Experts, Heads, weighed_sum};
use super::decoder::{Decoder, FeedForward};
use super::dense::kv_heads;
use super::rope::Rope;
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family = Family { model_types: &["mixtral"], sanitize, build, routers: &[] };

struct Config {
    decoder: Decoder,
    attention: SelfAttention,
    experts: Experts,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        let decoder = Decoder::read(c, false)?;
        let hidden = decoder.hidden_size;
        let heads = Heads::read(c, hidden, kv_heads(c)?, None)?;
        // mlx-lm ignores the key, and gives other text than the model was trained for.
        if let Some(value) = c.get("rope_scaling") {
            return Err(c.wrong(
                "rope_scaling",
                value,
                "absent: this family has plain rotary embedding only",
            ));
        }
        let (base, traditional) =
            (c.positive_or("rope_theta", Some(1e6))?, c.flag_or("rope_traditional", false)?);
        let rope = Rope::plain(heads.head_dim, base, traditional);
        let attention = SelfAttention::plain(hidden, heads, rope);
        let experts = Experts::of(c, "num_local_experts", "intermediate_size", hidden)?;
        Ok(Self { decoder, attention, experts })
    }

    fn path(&self, layer: &str) -> String {
        format!("{layer}.block_sparse_moe")
    }

    /// The best experts by their logits; a softmax over theirs weighs them.
    fn routed(&self, b: &mut Builder<'_>, path: &str, x: Value) -> Value {
        let k = self.experts.per_token;
        let logits = b.linear(&format!("{path}.gate"), x, self.experts.count, self.decoder.hidden_size);
        let indices = b.node(path, TopKOfNegated { k }, &[logits]);
        let scores = b.node(path, TakeAlongLast, &[logits, indices]);
        let scores = b.node(path, Softmax { precise: true }, &[scores]);
        let y = self.experts.switch_glu(b, &format!("{path}.switch_mlp"), x, indices);
        weighed_sum(b, path, y, scores)
    }
}

/// Published checkpoints keep experts apart and name their projections w1, w2, w3; some have a copy of a tied head.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = Config::read(config)?;
    if c.decoder.tied {
        tensors.remove(|name| name == "lm_head.weight");
    }
    tensors.rename(|name| {
        let (head, rest) = name.split_once(".block_sparse_moe.experts.")?;
        let (expert, rest) = rest.split_once('.')?;
        let (old, part) = rest.split_once('.')?;
        let projections = [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")];
        let (_, new) = projections.into_iter().find(|(name, _)| *name == old)?;
        Some(format!("{head}.block_sparse_moe.experts.{expert}.{new}.{part}"))
    });
    for layer in 0..c.decoder.layers as usize {
        c.experts.stack(tensors, &c.path(&c.decoder.layer(layer)))?;
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let counts = Some((c.experts.count, c.experts.per_token));
    Ok(c.decoder.build(b, &c.attention, counts, |b, _, layer, x| {
        (c.routed(b, &c.path(layer), x), FeedForward::Experts)
    }))
}
