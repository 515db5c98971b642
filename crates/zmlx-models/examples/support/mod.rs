//! What examples on an NVIDIA GPU share: published shapes with random weights, and how they end.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;
use zmlx_graph::pattern::{Backend, Choice, rewrite};
use zmlx_graph::weights::TensorSpec;
use zmlx_graph::{Executor, Fidelity, Held, patterns};
use zmlx_mlx::{Array, Dtype, ops, random};
use zmlx_models::random::MODELS;
use zmlx_models::{Blueprint, ModelConfig};

/// An executor that decodes a published shape past MLX, with random 4-bit weights made on the GPU, and what it is of.
pub fn random_shape(name: &str) -> Result<(Executor, Blueprint), Box<dyn Error>> {
    let known = || MODELS.iter().map(|m| m.name).collect::<Vec<_>>().join(", ");
    let model = MODELS.iter().find(|m| m.name == name);
    let model = model.ok_or_else(|| format!("{name} is none of {}", known()))?;
    let mut config = (model.config)();
    if config.get("quantization").is_none() {
        config["quantization"] = json!({"group_size": 64, "bits": 4});
    }
    let config = ModelConfig::from_json(config.as_object().cloned().unwrap_or_default());
    let blueprint = Blueprint::from_config(&config)?;
    let choice = Choice {
        patterns: patterns::ALL.iter().copied().filter(|p| p.class <= Fidelity::TokenIdentical).collect(),
        max_class: Fidelity::TokenIdentical,
        backend: Backend::Cuda,
    };
    let patched = Arc::new(rewrite(&blueprint.graph, &choice)?.graph);
    let mut key = random::key(0)?;
    let mut failure = None;
    let tensor = |spec: &TensorSpec| match random_tensor(spec, &mut key) {
        Ok(array) => Some(array),
        Err(error) => {
            failure.get_or_insert(error);
            None
        }
    };
    let made = Held::none().cuda(patched, tensor);
    if let Some(error) = failure {
        return Err(error.into());
    }
    match made? {
        (_, Some(reason)) => Err(format!("{name} does not decode past MLX: {reason}").into()),
        (past, None) => Ok((past, blueprint)),
    }
}

/// Random values on the GPU whose products have about the size of their input.
fn random_tensor(spec: &TensorSpec, key: &mut Array) -> zmlx_mlx::Result<Array> {
    let (own, rest) = random::split(key)?;
    *key = rest;
    let array = match (spec.float, spec.name.rsplit('.').next().unwrap_or("")) {
        (false, "scales") => ops::full(&spec.shape, &Array::scalar(120u8)?, Dtype::Uint8)?,
        (false, _) => random::bits(&spec.shape, 4, &own)?,
        (true, "scales" | "biases") => {
            // Codes of 4 bits around 0, with a standard deviation of 0.02.
            let value = if spec.name.ends_with("scales") { 0.0043f32 } else { -0.0043 * 7.5 };
            ops::full(&spec.shape, &Array::scalar(value)?, Dtype::Bfloat16)?
        }
        (true, _) if spec.shape.len() == 1 => ops::ones(&spec.shape, Dtype::Bfloat16)?,
        (true, _) => {
            let x = random::normal(&spec.shape, Dtype::Float32, None, None, &own)?;
            x.multiply_scalar(0.02)?.astype(Dtype::Bfloat16)?
        }
    };
    array.eval()?;
    Ok(array)
}

/// The status of a program, whose error is told in its own words.
pub fn exit(done: Result<(), Box<dyn Error>>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
