use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use zmlx_graph::weights::{Format, Weight};

use crate::blueprint::stored_bytes;
use crate::error::LoadError;
use crate::families::Built;
use crate::source::Source;

/// What a model is, from its configuration and the headers of its weights.
#[derive(Debug, Clone, Serialize)]
pub struct ModelInfo {
    /// `model_type`.
    pub family: String,
    /// The layers.
    pub layers: Vec<LayerInfo>,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Most positions.
    pub context_length: Option<usize>,
    /// Parameters in all.
    pub parameters_total: u64,
    /// Parameters that one token uses: all but the experts not chosen, and of a lookup table one row.
    pub parameters_active: u64,
    /// Bytes of all tensors in the weight files.
    pub file_bytes: u64,
    /// Bytes of weights that one token reads, as they are stored (those of a GGUF file, as they are converted).
    pub bytes_per_token: u64,
    /// How the weights are stored, one entry for each setting.
    pub quantization: Vec<QuantizationInfo>,
    /// Experts a layer, and how many of them a token uses.
    pub experts: Option<(usize, usize)>,
}

/// One layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerInfo {
    /// Its number.
    pub index: usize,
    /// What mixes positions: `conv` or `full_attention`.
    pub mixer: String,
    /// What follows: `dense` or `moe`.
    pub feed_forward: String,
}

/// Weights stored in one way.
#[derive(Debug, Clone, Serialize)]
pub struct QuantizationInfo {
    /// `affine`, `mxfp4`, `mxfp8`, `nvfp4`, or `none`.
    pub mode: String,
    /// Bits an element.
    pub bits: u32,
    /// Elements that share a scale; 0 when not quantised.
    pub group_size: u32,
    /// How many weights are stored so.
    pub modules: usize,
    /// Their bytes, scales included.
    pub bytes: u64,
}

/// Looks into a model folder or a GGUF file: reads configuration and headers, loads no weights.
pub fn inspect(path: &Path) -> Result<ModelInfo, LoadError> {
    let source = Source::open(path)?;
    let built = source.build()?;
    Ok(describe(&built, &stored_bytes(&built, &source), source.file_bytes()))
}

/// What a model is, when its weights (by number) have so many bytes, and all tensors of its files together `file_bytes`.
pub(crate) fn describe(built: &Built, weight_bytes: &[u64], file_bytes: u64) -> ModelInfo {
    let outline = &built.outline;
    // Which part of a weight one token uses, as a fraction.
    let used = |w: &Weight| -> (u64, u64) {
        match (w.experts, outline.experts) {
            (Some(_), Some((total, active))) => (active as u64, total as u64),
            _ if w.lookup => (1, w.shape.first().map_or(1, |&rows| rows.max(1) as u64)),
            _ => (1, 1),
        }
    };
    let part =
        |n: u64, (active, total): (u64, u64)| (u128::from(n) * u128::from(active) / u128::from(total)) as u64;
    let weights = &built.graph.weights;
    let mut settings: BTreeMap<(String, u32, u32), (usize, u64)> = BTreeMap::new();
    let sized = || weights.iter().zip(weight_bytes.iter().copied());
    for (w, bytes) in sized() {
        let key = match &w.format {
            Format::Quantized(q) => (q.mode.clone(), q.bits as u32, q.group_size as u32),
            Format::Dense => {
                let bits = bytes.saturating_mul(8) / w.parameters().max(1);
                ("none".to_owned(), bits as u32, 0)
            }
        };
        let entry = settings.entry(key).or_default();
        *entry = (entry.0 + 1, entry.1 + bytes);
    }
    let quantization = settings
        .into_iter()
        .map(|((mode, bits, group_size), (modules, bytes))| QuantizationInfo {
            mode,
            bits,
            group_size,
            modules,
            bytes,
        })
        .collect();
    ModelInfo {
        family: built.family.clone(),
        layers: outline.layers.clone(),
        hidden_size: outline.hidden_size as usize,
        vocab_size: outline.vocab_size as usize,
        context_length: outline.context_length.map(|c| c as usize),
        parameters_total: weights.iter().map(Weight::parameters).sum(),
        parameters_active: weights.iter().map(|w| part(w.parameters(), used(w))).sum(),
        file_bytes,
        bytes_per_token: sized().map(|(w, bytes)| part(bytes, used(w))).sum(),
        quantization,
        experts: outline.experts.map(|(t, a)| (t as usize, a as usize)),
    }
}
