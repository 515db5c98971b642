//! GLM-4.7-Flash (Z.ai): multi-head latent attention, sparse experts with sigmoid routing and a shared expert.
//!
//! The order of ops is that of `mlx_lm.models.glm4_moe_lite` 0.32.2.

use zmlx_graph::Builder;

use super::mla::{self, Config, Variant};
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family = Family { model_types: &["glm4_moe_lite"], sanitize, build, routers: &[] };

const VARIANT: Variant =
    Variant { latent_eps: None, weight_eps: Some(1e-20), sparse: false, routed_scale: 1.8 };

fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    Config::read(config, &VARIANT)?.sanitize("", tensors)
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(mla::build(&Config::read(config, &VARIANT)?, "", b))
}
