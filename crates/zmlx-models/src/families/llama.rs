//! Llama and what is built like it (Mistral, SmolLM2): grouped-query attention and a gated MLP in every layer.
//!
//! The order of ops is that of `mlx_lm.models.llama` 0.32.2.

use zmlx_graph::Builder;

use super::attention::Projections;
use super::dense::{Dense, Mlp};
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["llama", "mistral"], sanitize, build, routers: &[] };

/// A configuration that says nothing of its head has the embedding's (`tied`).
pub(super) fn read(c: &ModelConfig, tied: bool) -> Result<Dense, LoadError> {
    let mut dense = Dense::read(c, tied, Some(10_000.0))?;
    let bias = c.flag_or("attention_bias", false)?;
    dense.attention.projections = Projections::Apart { bias };
    dense.attention.out.1 = bias;
    dense.mlp = Mlp::Apart { bias: c.flag_or("mlp_bias", false)? };
    Ok(dense)
}

fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    read(config, true)?.tidy(tensors);
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(read(config, true)?.build(b))
}
