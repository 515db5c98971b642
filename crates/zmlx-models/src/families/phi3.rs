//! Phi-3 and Phi-4-mini (Microsoft): Llama's layers, with one matrix for queries, keys and values and one for gate and up.
//!
//! The order of ops is that of `mlx_lm.models.phi3` 0.32.2.

use zmlx_graph::Builder;

use super::attention::{Projections, rotated};
use super::blocks::Heads;
use super::decoder::Decoder;
use super::dense::{Dense, Mlp, kv_heads};
use super::rope::{Rope, rope_theta};
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family = Family { model_types: &["phi3"], sanitize, build, routers: &[] };

fn read(c: &ModelConfig) -> Result<Dense, LoadError> {
    let decoder = Decoder::read(c, false)?;
    let heads = Heads::read(c, decoder.hidden_size, kv_heads(c)?, None)?;
    let dims = rotated(c, heads.head_dim, c.positive_or("partial_rotary_factor", Some(1.0))?)?;
    let (base, traditional) = (rope_theta(c, Some(10_000.0))?, c.flag_or("rope_traditional", false)?);
    let rope = Rope::read(c, dims, base, traditional)?;
    let mut dense = Dense::new(c, decoder, heads, rope)?;
    dense.attention.projections = Projections::Fused;
    dense.mlp = Mlp::Fused;
    Ok(dense)
}

fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    read(config)?.tidy(tensors);
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(read(config)?.build(b))
}
