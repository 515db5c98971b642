//! Qwen2 and Qwen2.5 (Alibaba): Llama's layers, with biases on queries, keys and values.
//!
//! The order of ops is that of `mlx_lm.models.qwen2` 0.32.2.

use zmlx_graph::Builder;

use super::attention::Projections;
use super::dense::Dense;
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family = Family { model_types: &["qwen2"], sanitize, build, routers: &[] };

fn read(c: &ModelConfig) -> Result<Dense, LoadError> {
    if let Some(value) = c.get("use_sliding_window").filter(|v| v.as_bool() != Some(false)) {
        return Err(c.wrong("use_sliding_window", value, "false: this family has no sliding windows"));
    }
    let mut dense = Dense::read(c, true, Some(1_000_000.0))?;
    dense.attention.projections = Projections::Apart { bias: true };
    Ok(dense)
}

fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    read(config)?.tidy(tensors);
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(read(config)?.build(b))
}
