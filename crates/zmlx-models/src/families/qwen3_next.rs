//! Qwen3-Next: three gated delta nets to one layer of gated attention, sparse experts with one that is shared.
//!
//! The order of ops is that of `mlx_lm.models.qwen3_next` 0.32.2.

use zmlx_graph::Builder;

use super::blocks::{Heads, layer_count};
use super::gated_delta::{Config, DeltaNet, Layer, ROUTERS, Routed, attention_layers, rotated};
use super::qwen3_moe::sparse_layers;
use super::rope::Rope;
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family = Family { model_types: &["qwen3_next"], sanitize, build, routers: ROUTERS };

fn read(c: &ModelConfig) -> Result<Config, LoadError> {
    let count = layer_count(c)?;
    let hidden_size = c.size("hidden_size")?;
    let heads = Heads::read(c, hidden_size, c.size("num_key_value_heads")?, Some(c.size("head_dim")?))?;
    let factor = c.positive("partial_rotary_factor")?;
    let dims = rotated(c, "partial_rotary_factor", heads.head_dim, factor)?;
    let sparse = sparse_layers(c, count)?;
    let layers = attention_layers(c, count)?.into_iter().zip(&sparse);
    Ok(Config {
        prefix: "",
        vocab_size: c.size("vocab_size")?,
        hidden_size,
        intermediate_size: c.size("intermediate_size")?,
        attention_bias: c.flag_or("attention_bias", false)?,
        rope: Rope::read(c, dims, c.positive("rope_theta")?, false)?,
        heads,
        delta: DeltaNet::read(c, true)?,
        routed: match sparse.contains(&true) {
            true => Some(Routed::read(c, hidden_size, false)?),
            false => None,
        },
        norm_eps: c.positive("rms_norm_eps")? as f32,
        tied: c.flag_or("tie_word_embeddings", false)?,
        context_length: c.size("max_position_embeddings")?,
        layers: layers.map(|(attention, &sparse)| Layer { attention, sparse }).collect(),
    })
}

/// Experts that are apart mark a published checkpoint.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = read(config)?;
    if tensors.names().any(|name| name.ends_with(".mlp.experts.0.up_proj.weight")) {
        c.adapt_published(tensors);
    }
    c.tidy(tensors)
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(read(config)?.build(b))
}
