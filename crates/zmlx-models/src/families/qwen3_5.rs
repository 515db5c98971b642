//! Qwen3.5, dense and with experts: the text part. Three gated delta nets to one layer of gated attention.
//!
//! The order of ops is that of `mlx_lm.models.qwen3_5` and `qwen3_5_moe` 0.32.2.

use zmlx_graph::Builder;

use super::blocks::{Heads, layer_count};
use super::gated_delta::{Config, DeltaNet, Layer, ROUTERS, Routed, attention_layers, rotated};
use super::rope::Rope;
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["qwen3_5_moe", "qwen3_5"], sanitize, build, routers: ROUTERS };

/// The part of a head that is rotated if the configuration does not say.
const ROTATED: f64 = 0.25;

/// `text_config` of a model that sees, or all of one that only reads.
fn read(config: &ModelConfig) -> Result<Config, LoadError> {
    let text = config.section("text_config")?;
    let c = text.as_ref().unwrap_or(config);
    let count = layer_count(c)?;
    let hidden_size = c.size("hidden_size")?;
    let heads = Heads::read(c, hidden_size, c.size("num_key_value_heads")?, c.size_opt("head_dim")?)?;
    let rope = c.section("rope_parameters")?.ok_or_else(|| c.missing("rope_parameters"))?;
    let factor = rope.positive_or("partial_rotary_factor", Some(ROTATED))?;
    let dims = rotated(&rope, "partial_rotary_factor", heads.head_dim, factor)?;
    let with_experts = match config.model_type() {
        "qwen3_5_moe" => c.size("num_experts").map(|_| true)?,
        _ => c.get("num_experts").is_some() && c.count("num_experts")? > 0,
    };
    let layers = attention_layers(c, count)?.into_iter();
    Ok(Config {
        prefix: "language_model.",
        vocab_size: c.size("vocab_size")?,
        hidden_size,
        // Without experts all layers need it; with experts none does.
        intermediate_size: if with_experts { 1 } else { c.size("intermediate_size")? },
        attention_bias: c.flag_or("attention_bias", false)?,
        rope: Rope::read(c, dims, rope.positive("rope_theta")?, false)?,
        heads,
        delta: DeltaNet::read(c, false)?,
        routed: if with_experts { Some(Routed::read(c, hidden_size, true)?) } else { None },
        norm_eps: c.positive("rms_norm_eps")? as f32,
        tied: c.flag_or("tie_word_embeddings", false)?,
        context_length: c.size("max_position_embeddings")?,
        layers: layers.map(|attention| Layer { attention, sparse: with_experts }).collect(),
    })
}

/// Names of published checkpoints and of those that only read become those of mlx-lm's; the part that sees is left out.
/// Kernels that are still `[C, 1, K]` mark a published checkpoint.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = read(config)?;
    tensors.remove(|name| name.starts_with("vision_tower") || name.starts_with("model.visual"));
    tensors.rename(|name| match name.strip_prefix("model.language_model") {
        Some(rest) => Some(format!("language_model.model{rest}")),
        None if name.starts_with(c.prefix) => None,
        None => Some(format!("{}{name}", c.prefix)),
    });
    for (index, _) in c.layers.iter().enumerate().filter(|(_, layer)| layer.sparse) {
        let mlp = format!("{}model.layers.{index}.mlp", c.prefix);
        let gate_up = format!("{mlp}.experts.gate_up_proj");
        if tensors.get(&gate_up).is_some() {
            let new = |name: &str| format!("{mlp}.switch_mlp.{name}.weight");
            tensors.split(&gate_up, -2, &[&new("gate_proj"), &new("up_proj")])?;
            let down = format!("{mlp}.experts.down_proj");
            tensors.rename(|name| (name == down).then(|| new("down_proj")));
        }
    }
    let published = |name: &str| {
        let kernel = tensors.get(name).filter(|_| name.ends_with("conv1d.weight"));
        kernel.is_some_and(|t| t.shape.last() != Some(&1))
    };
    if tensors.names().any(published) {
        c.adapt_published(tensors);
    }
    c.tidy(tensors)
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(read(config)?.build(b))
}
