//! Weights in another form than their files have: quantised while they are read, or unpacked.
//!
//! Which modules are quantised, and how, is what mlx-lm's converter decides: every matrix (linear, embedding, experts)
//! whose columns the groups divide; routers in 8 bits where the family has it so; the rest stays as it is. Floats are
//! first brought to the dtype that the configuration calls `torch_dtype`, so that a model quantised on load is, bit for
//! bit, what the converter would have written.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};
use zmlx_graph::weights::{Format, Quantization, TensorSpec, Weight};
use zmlx_mlx::{Array, Dtype, ops};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::families::{Built, Family};
use crate::tensors::Tensors;

/// Bits of a router, in groups of 64, as mlx-lm's converter has it.
const ROUTER: (i32, i32) = (8, 64);

/// What becomes of the matrices of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Recode {
    /// They stay as they are stored.
    #[default]
    Keep,
    /// Those that are not quantised are, routers by their family's rule.
    Quantize(Quantization),
    /// Those that are quantised become floats.
    Dequantize,
}

/// The quantisation of that mode (`affine`, `mxfp4`, `mxfp8` or `nvfp4`). What is not given is mlx-lm's default: 4 bits in
/// groups of 64 for `affine`; the other modes have one setting each.
///
/// # Errors
/// [`LoadError::NoSuchQuantization`] for what MLX does not have.
pub fn quantization(
    mode: &str,
    bits: Option<i32>,
    group_size: Option<i32>,
) -> Result<Quantization, LoadError> {
    let usual = match mode {
        "affine" => (4, 64),
        "mxfp4" => (4, 32),
        "mxfp8" => (8, 32),
        "nvfp4" => (4, 16),
        _ => (0, 0),
    };
    let (bits, group_size) = (bits.unwrap_or(usual.0), group_size.unwrap_or(usual.1));
    let there_is = match mode {
        "affine" => matches!(bits, 2..=6 | 8) && matches!(group_size, 32 | 64 | 128),
        _ => usual != (0, 0) && (bits, group_size) == usual,
    };
    let quantization = Quantization { group_size, bits, mode: mode.to_owned() };
    if there_is { Ok(quantization) } else { Err(LoadError::NoSuchQuantization { asked: quantization }) }
}

/// Whether the converter gives the module at `path` the router's setting.
pub(crate) fn is_router(family: &Family, path: &str) -> bool {
    family.routers.iter().any(|end| path.ends_with(end))
}

/// How the converter stores the matrix at `path` with that many columns, given the setting for all.
pub(crate) fn converted(family: &Family, q: &Quantization, path: &str, columns: i32) -> Format {
    if columns % q.group_size != 0 {
        return Format::Dense;
    }
    if !is_router(family, path) {
        return Format::Quantized(q.clone());
    }
    let (bits, group_size) = ROUTER;
    match columns % group_size {
        0 => Format::Quantized(Quantization { group_size, bits, mode: "affine".to_owned() }),
        _ => Format::Dense,
    }
}

impl Recode {
    /// How a matrix that is stored as `stored` is to be held.
    pub(crate) fn target(&self, family: &Family, path: &str, columns: i32, stored: Format) -> Format {
        match (self, stored) {
            (Self::Quantize(q), Format::Dense) => converted(family, q, path, columns),
            (Self::Dequantize, Format::Quantized(_)) => Format::Dense,
            (_, stored) => stored,
        }
    }
}

/// Which weights of a model are held in another form than they are stored in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recoded {
    /// These weights as they are stored, by path.
    pub(crate) stored: HashMap<String, Weight>,
    /// The dtype that floats are brought to before; `None` leaves them.
    pub(crate) float: Option<Dtype>,
}

impl Recoded {
    /// What is different between the weights as they are stored and as they are wanted.
    pub(crate) fn new(stored: &[Weight], wanted: &[Weight], float: Option<Dtype>) -> Self {
        let forms: HashMap<&str, &Format> = wanted.iter().map(|w| (w.path.as_str(), &w.format)).collect();
        let differs = |w: &&Weight| forms.get(w.path.as_str()).is_some_and(|format| **format != w.format);
        let stored = stored.iter().filter(differs).map(|w| (w.path.clone(), w.clone())).collect();
        Self { stored, float }
    }

    /// The tensors of `wanted`, which is stored as `arrays`.
    pub(crate) fn convert(
        &self,
        stored: &Weight,
        wanted: &Weight,
        arrays: &[Array],
    ) -> zmlx_mlx::Result<Vec<Array>> {
        let cast = |array: &Array| match self.float {
            Some(dtype) if is_float(array.dtype()) => array.astype(dtype),
            _ => Ok(array.clone()),
        };
        match (&stored.format, &wanted.format, arrays) {
            (Format::Dense, Format::Quantized(q), [dense]) => {
                ops::quantize(&cast(dense)?, Some(q.group_size), Some(q.bits), &q.mode, None)
            }
            (Format::Quantized(q), Format::Dense, [packed, scales, biases @ ..]) => {
                let biases = biases.first().map(cast).transpose()?;
                let (group_size, bits) = (Some(q.group_size), Some(q.bits));
                let scales = cast(scales)?;
                let dtype = self.float;
                let dense = ops::dequantize(
                    packed,
                    &scales,
                    biases.as_ref(),
                    group_size,
                    bits,
                    &q.mode,
                    None,
                    dtype,
                )?;
                Ok(vec![dense])
            }
            _ => Ok(arrays.to_vec()),
        }
    }
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16)
}

/// The dtype that mlx-lm's converter brings floats to: `torch_dtype`, else the `dtype` of a `text_config`; `None` leaves
/// them as they are.
pub(crate) fn float_of_config(config: &ModelConfig) -> Option<Dtype> {
    let inner = || config.get("text_config").and_then(|text| text.get("dtype"));
    match config.get("torch_dtype").or_else(inner)?.as_str()? {
        "float32" => Some(Dtype::Float32),
        "float16" => Some(Dtype::Float16),
        "bfloat16" => Some(Dtype::Bfloat16),
        _ => None,
    }
}

/// The dtype that a tensor of a built model has once it is read: floats in `float`, where that is given and the weight may
/// be converted, else as they are stored.
pub(crate) fn dtype_of(built: &Built, weight: &Weight, spec: &TensorSpec, float: Option<Dtype>) -> Dtype {
    if !spec.float {
        return if spec.name.ends_with(".scales") { Dtype::Uint8 } else { Dtype::Uint32 };
    }
    if let (Some(dtype), false) = (float, weight.keep_f32) {
        return dtype;
    }
    let stored = built.recoded.stored.get(&weight.path);
    let of = match stored.map(|w| (w, &w.format)) {
        None => stored_dtype(&built.tensors, &spec.name),
        // Scales take the dtype of what they scale.
        Some((w, Format::Dense)) => stored_dtype(&built.tensors, &w.tensors()[0].name),
        Some((w, Format::Quantized(_))) => stored_dtype(&built.tensors, &format!("{}.scales", w.path)),
    };
    // What the modes without float scales unpack to.
    of.unwrap_or(Dtype::Bfloat16)
}

/// The dtype of a float tensor as it is stored; `None` if it is none.
fn stored_dtype(tensors: &Tensors, name: &str) -> Option<Dtype> {
    match tensors.get(name)?.dtype.as_str() {
        "F32" => Some(Dtype::Float32),
        "F16" => Some(Dtype::Float16),
        "BF16" => Some(Dtype::Bfloat16),
        _ => None,
    }
}

/// The `quantization` section of the configuration of a built model, as mlx-lm's loader reads it; `None` if nothing is
/// quantised. What the configuration says of all modules stays; modules that differ from it have entries of their own.
pub(crate) fn section(built: &Built, family: &Family, config: &ModelConfig, recode: &Recode) -> Option<Json> {
    let weights = &built.graph.weights;
    let quantized = || {
        weights.iter().filter_map(|w| match &w.format {
            Format::Quantized(q) => Some((w.path.as_str(), q)),
            Format::Dense => None,
        })
    };
    let first = quantized().next()?.1;
    let before = config.get("quantization").or_else(|| config.get("quantization_config"));
    // A section in another library's words is replaced.
    let before = before.and_then(Json::as_object).filter(|s| !s.contains_key("quant_method"));
    let recoded = |path: &str| built.recoded.stored.contains_key(path);
    let kept = quantized().find(|(path, _)| !recoded(path)).map(|(_, q)| q);
    let mut section = match (before, kept, recode) {
        (Some(section), ..) => section.clone(),
        (None, None, Recode::Quantize(q)) => setting(q),
        (None, kept, _) => setting(kept.unwrap_or(first)),
    };
    // As mlx-lm has it: where some was quantised before, all that is new has an entry.
    let all_named = before.is_some() || kept.is_some();
    let number = |key: &str, usual: i32| {
        section.get(key).and_then(Json::as_i64).map_or(usual, |n| i32::try_from(n).unwrap_or(0))
    };
    let all = Quantization {
        group_size: number("group_size", 64),
        bits: number("bits", 4),
        mode: section.get("mode").and_then(Json::as_str).unwrap_or("affine").to_owned(),
    };
    for (path, q) in quantized() {
        let new = recoded(path);
        if new && is_router(family, path) {
            section.insert(path.to_owned(), json!({ "group_size": q.group_size, "bits": q.bits }));
        } else if if new { all_named || *q != all } else { *q != all && !section.contains_key(path) } {
            section.insert(path.to_owned(), Json::Object(setting(q)));
        }
    }
    // Entries of modules that are not quantised (any more).
    let paths: Vec<&str> = quantized().map(|(path, _)| path).collect();
    section.retain(|key, value| !value.is_object() || paths.contains(&key.as_str()));
    Some(Json::Object(section))
}

fn setting(q: &Quantization) -> Map<String, Json> {
    let mut map = Map::new();
    map.insert("group_size".to_owned(), json!(q.group_size));
    map.insert("bits".to_owned(), json!(q.bits));
    map.insert("mode".to_owned(), json!(q.mode));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_there_are() {
        let q = |mode: &str, bits, group_size| quantization(mode, bits, group_size);
        for (mode, bits, group_size) in
            [("affine", 4, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
        {
            let usual = Quantization { group_size, bits, mode: mode.to_owned() };
            assert_eq!(q(mode, None, None).unwrap(), usual);
            assert_eq!(q(mode, Some(bits), Some(group_size)).unwrap(), usual);
        }
        assert!(q("affine", Some(3), Some(128)).is_ok());
        for (mode, bits, group_size) in [
            ("affine", Some(7), None),
            ("affine", Some(1), None),
            ("affine", None, Some(16)),
            ("mxfp4", Some(8), None),
            ("nvfp4", None, Some(32)),
            ("q4_k", None, None),
        ] {
            let error = q(mode, bits, group_size).unwrap_err().to_string();
            assert!(error.contains(mode) && error.contains("nvfp4"), "{error}");
        }
    }
}
