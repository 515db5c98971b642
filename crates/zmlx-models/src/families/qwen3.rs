//! Qwen3, dense (Alibaba): Llama's layers, with norms of each head's queries and keys.
//!
//! The order of ops is that of `mlx_lm.models.qwen3` 0.32.2.

use zmlx_graph::Builder;

use super::attention::QkNorm;
use super::dense::Dense;
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family = Family { model_types: &["qwen3"], sanitize, build, routers: &[] };

fn read(c: &ModelConfig) -> Result<Dense, LoadError> {
    for key in ["num_key_value_heads", "head_dim"] {
        c.size(key)?;
    }
    c.flag("tie_word_embeddings")?;
    let mut dense = Dense::read(c, false, None)?;
    dense.attention.norm = QkNorm::Heads { q: "q_norm", k: "k_norm", eps: dense.decoder.eps };
    Ok(dense)
}

fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    read(config)?.tidy(tensors);
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(read(config)?.build(b))
}
