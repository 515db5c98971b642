//! DeepSeek-V3 and its successors: multi-head latent attention, sparse experts in groups with sigmoid routing and shared
//! experts. Kimi-K2 is one of them, the text part of Kimi-K2.5 too; DeepSeek-V3.2 looks at chosen positions only.
//!
//! The order of ops is that of `mlx_lm.models.deepseek_v3`, `deepseek_v32` and `kimi_k25` 0.32.2.

use zmlx_graph::Builder;

use super::mla::{self, Config, Variant};
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

/// DeepSeek-V3, R1 and Kimi-K2.
pub(super) const V3: Family =
    Family { model_types: &["deepseek_v3", "kimi_k2"], sanitize, build, routers: &[] };

/// DeepSeek-V3.2.
pub(super) const V32: Family =
    Family { model_types: &["deepseek_v32"], sanitize: sanitize_v32, build: build_v32, routers: &[] };

/// The text part of Kimi-K2.5.
pub(super) const KIMI: Family =
    Family { model_types: &["kimi_k25"], sanitize: sanitize_kimi, build: build_kimi, routers: &[] };

const VARIANT: Variant =
    Variant { latent_eps: Some(1e-6), weight_eps: None, sparse: false, routed_scale: 1.0 };

const SPARSE: Variant = Variant { sparse: true, ..VARIANT };

fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    Config::read(config, &VARIANT)?.sanitize("", tensors)
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(mla::build(&Config::read(config, &VARIANT)?, "", b))
}

fn sanitize_v32(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    Config::read(config, &SPARSE)?.sanitize("", tensors)
}

fn build_v32(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(mla::build(&Config::read(config, &SPARSE)?, "", b))
}

/// What the names of the text part begin with.
const TEXT: &str = "language_model.";

/// What sees images.
const VISION: [&str; 4] = ["vision_tower.", "vision_model.", "multi_modal_projector.", "mm_projector."];

fn text(config: &ModelConfig) -> Result<Config, LoadError> {
    let text = config.section("text_config")?.ok_or_else(|| config.missing("text_config"))?;
    Config::read(&text, &VARIANT)
}

fn sanitize_kimi(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    tensors.remove(|name| VISION.iter().any(|part| name.starts_with(part)));
    text(config)?.sanitize(TEXT, tensors)
}

fn build_kimi(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(mla::build(&text(config)?, TEXT, b))
}
