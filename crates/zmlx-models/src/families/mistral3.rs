//! Mistral 3 and Ministral 3 (Mistral), text only: Llama's layers; Ministral's queries grow with the logarithm of their
//! position.
//!
//! The order of ops is that of `mlx_lm.models.mistral3` and `mlx_lm.models.ministral3` 0.32.2.

use zmlx_graph::Builder;
use zmlx_graph::ops::PositionScale;

use super::dense::Dense;
use super::llama;
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["mistral3", "ministral3"], sanitize, build, routers: &[] };

const PREFIX: &str = "language_model.";

fn read(c: &ModelConfig) -> Result<Dense, LoadError> {
    if c.model_type() == "ministral3" {
        return ministral3(c, true);
    }
    let text = c.section("text_config")?.ok_or_else(|| c.missing("text_config"))?;
    let mut dense = match text.model_type() {
        "ministral3" => ministral3(&text, false)?,
        "mistral" | "llama" | "" => llama::read(&text, false)?,
        _ => {
            let value = text.get("model_type").cloned().unwrap_or_default();
            return Err(text.wrong("model_type", &value, "mistral, llama or ministral3"));
        }
    };
    dense.decoder.prefix = PREFIX;
    Ok(dense)
}

fn ministral3(c: &ModelConfig, tied: bool) -> Result<Dense, LoadError> {
    let section = c.section("rope_parameters")?.ok_or_else(|| c.missing("rope_parameters"))?;
    section.positive("rope_theta")?;
    let beta = match section.get("llama_4_scaling_beta") {
        Some(value) if value.as_f64() == Some(0.0) => 0.0,
        _ => section.positive("llama_4_scaling_beta")?,
    };
    let original_context = section.positive("original_max_position_embeddings")?;
    let mut dense = Dense::read(c, tied, None)?;
    dense.attention.growth = (beta > 0.0).then_some(PositionScale { beta, original_context });
    Ok(dense)
}

/// Published checkpoints have an image part, which is left out, and other prefixes; old ones carry rotary frequencies.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let dense = read(config)?;
    if dense.decoder.prefix == PREFIX {
        tensors.remove(|name| name.contains("vision_tower") || name.contains("multi_modal_projector"));
        tensors.rename(|name| {
            let text = match name.strip_prefix("model.language_model.") {
                Some(rest) => format!("model.{rest}"),
                None => name.strip_prefix(PREFIX).unwrap_or(name).to_owned(),
            };
            Some(format!("{PREFIX}{text}"))
        });
    }
    if let Some(name) = tensors.names().find(|name| name.ends_with("weight_scale_inv")) {
        return Err(LoadError::Unsupported(format!(
            "{name}: 8-bit floats with scales of their own are not supported: convert the model with mlx-lm first"
        )));
    }
    dense.tidy(tensors);
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    Ok(read(config)?.build(b))
}
