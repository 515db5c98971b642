//! Model families: from a configuration to a stock graph.

use zmlx_graph::builder::FormatOf;
use zmlx_graph::weights::Format;
use zmlx_graph::{Builder, Dim, Graph, GraphError, Shape};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::quantize::{self, Recode, Recoded};
use crate::tensors::{Tensors, format_alone};

mod attention;
mod blocks;
mod decoder;
mod deepseek_v3;
mod dense;
mod gated_delta;
mod gemma3;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod lfm2_moe;
mod llama;
mod mistral3;
mod mixtral;
mod mla;
mod mla_weights;
mod olmoe;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_5;
mod qwen3_moe;
mod qwen3_next;
mod rope;

/// A family: its names, how its checkpoints are read, and its graph.
pub struct Family {
    /// Values of `model_type` that mean it.
    pub model_types: &'static [&'static str],
    /// Brings the names and layouts of published checkpoints to those of the graph.
    pub sanitize: fn(&ModelConfig, &mut Tensors) -> Result<(), LoadError>,
    /// Writes the graph, which repeats mlx-lm's order of ops exactly.
    pub build: fn(&ModelConfig, &mut Builder<'_>) -> Result<Outline, LoadError>,
    /// Ends of the paths of routers, which mlx-lm's converter stores in 8 bits.
    pub routers: &'static [&'static str],
}

/// The families, one a line.
const FAMILIES: &[Family] = &[
    deepseek_v3::V3,
    deepseek_v3::V32,
    deepseek_v3::KIMI,
    gemma3::FAMILY,
    glm4_moe::FAMILY,
    glm4_moe_lite::FAMILY,
    gpt_oss::FAMILY,
    lfm2_moe::FAMILY,
    llama::FAMILY,
    mistral3::FAMILY,
    mixtral::FAMILY,
    olmoe::FAMILY,
    phi3::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    qwen3_5::FAMILY,
    qwen3_moe::FAMILY,
    qwen3_next::FAMILY,
];

/// What a family builder tells besides the graph.
#[derive(Debug, Clone)]
pub struct Outline {
    /// The logits.
    pub output: zmlx_graph::Value,
    /// What each layer is made of.
    pub layers: Vec<LayerInfo>,
    /// Width of the residual stream.
    pub hidden_size: i32,
    /// Number of token ids.
    pub vocab_size: i32,
    /// Most positions.
    pub context_length: Option<i32>,
    /// Experts a layer, and how many of them a token uses.
    pub experts: Option<(i32, i32)>,
}

/// A graph with its outline.
pub(crate) struct Built {
    pub(crate) family: String,
    pub(crate) graph: Graph,
    pub(crate) outline: Outline,
    pub(crate) tensors: Tensors,
    /// Weights that the graph has in another form than the tensors.
    pub(crate) recoded: Recoded,
}

/// All families.
pub(crate) fn all() -> &'static [Family] {
    FAMILIES
}

/// The names of each family, the one that it goes by first.
pub fn groups() -> impl Iterator<Item = &'static [&'static str]> {
    FAMILIES.iter().map(|f| f.model_types)
}

/// Names of all families.
pub fn known() -> Vec<&'static str> {
    FAMILIES.iter().flat_map(|f| f.model_types.iter().copied()).collect()
}

/// The family that a configuration names.
pub(crate) fn find(config: &ModelConfig) -> Result<&'static Family, LoadError> {
    let model_type = config.model_type();
    FAMILIES
        .iter()
        .find(|f| f.model_types.contains(&model_type))
        .ok_or_else(|| LoadError::UnknownFamily { found: model_type.to_owned(), known: known().join(", ") })
}

/// The graph that a configuration asks for, with matrices stored as `format_of` says.
pub(crate) fn draw(
    family: &Family,
    config: &ModelConfig,
    format_of: &FormatOf<'_>,
) -> Result<(Graph, Outline), LoadError> {
    finish(family, config, Builder::new(format_of))
}

fn finish(
    family: &Family,
    config: &ModelConfig,
    mut builder: Builder<'_>,
) -> Result<(Graph, Outline), LoadError> {
    let outline = (family.build)(config, &mut builder)?;
    Ok((builder.finish(outline.output), outline))
}

/// Builds and checks the graph that a configuration and the tensors of its checkpoint ask for, with its matrices in the form
/// that `recode` wants.
pub(crate) fn build(config: &ModelConfig, mut tensors: Tensors, recode: &Recode) -> Result<Built, LoadError> {
    let family = find(config)?;
    (family.sanitize)(config, &mut tensors)?;
    let stored = write(config, tensors, |tensors, path, columns| tensors.format(config, path, columns))?;
    stored.tensors.check(&stored.graph)?;
    match recode {
        Recode::Keep => Ok(stored),
        _ => recoded(config, family, stored, recode),
    }
}

fn recoded(
    config: &ModelConfig,
    family: &Family,
    stored: Built,
    recode: &Recode,
) -> Result<Built, LoadError> {
    let before = stored.graph.weights;
    let mut built = write(config, stored.tensors, |tensors, path, columns| {
        Ok(recode.target(family, path, columns, tensors.format(config, path, columns)?))
    })?;
    built.recoded = Recoded::new(&before, &built.graph.weights, quantize::float_of_config(config));
    if built.recoded.stored.is_empty() {
        return Err(match recode {
            Recode::Quantize(q) => LoadError::NothingToQuantize { group_size: q.group_size },
            _ => LoadError::NothingToDequantize,
        });
    }
    Ok(built)
}

/// Builds the graph that a configuration alone asks for: without tensors to compare with, all matrices are stored as its
/// section on quantization says.
pub(crate) fn build_from_config(config: &ModelConfig) -> Result<Built, LoadError> {
    write(config, Tensors::default(), |_, path, columns| format_alone(config, path, columns))
}

fn write(
    config: &ModelConfig,
    tensors: Tensors,
    format: impl Fn(&Tensors, &str, i32) -> Result<Format, LoadError>,
) -> Result<Built, LoadError> {
    let family = find(config)?;
    // The builder asks for formats one by one; the first that is wrong is reported once it is done.
    let failure = std::cell::RefCell::new(None);
    let format_of = |path: &str, columns: i32| match format(&tensors, path, columns) {
        Ok(format) => format,
        Err(error) => {
            failure.borrow_mut().get_or_insert(error);
            Format::Dense
        }
    };
    let stored = |name: &str| tensors.get(name).is_some();
    let mut builder = Builder::new(&format_of);
    if !tensors.is_empty() {
        builder = builder.knowing(&stored);
    }
    let (graph, outline) = finish(family, config, builder)?;
    if let Some(error) = failure.take() {
        return Err(error);
    }
    check_types(&graph, &outline)?;
    let recoded = Recoded::default();
    Ok(Built { family: config.model_type().to_owned(), graph, outline, tensors, recoded })
}

/// A family that writes a graph whose shapes do not fit is found out before any weight is read.
fn check_types(graph: &Graph, outline: &Outline) -> Result<(), GraphError> {
    let types = graph.infer()?;
    let logits = Shape::from([Dim::batch(), Dim::length(), outline.vocab_size.into()]);
    match types.get(graph.output) {
        Some(found) if found.shape == logits => Ok(()),
        found => {
            let found = found.map_or_else(|| "nothing".to_owned(), ToString::to_string);
            Err(GraphError::Malformed(format!("the output is {found}, expected logits {logits}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_graph_that_gives_no_logits_is_an_error() {
        let dense = |_: &str, _: i32| Format::Dense;
        let checked = |vocab_size: i32, head: i32| {
            let mut b = Builder::new(&dense);
            let ids = b.tokens();
            let x = b.embedding("embed", ids, 64, 8);
            let output = b.linear("head", x, 64, head);
            let outline = Outline {
                output,
                layers: Vec::new(),
                hidden_size: 8,
                vocab_size,
                context_length: None,
                experts: None,
            };
            check_types(&b.finish(output), &outline).map_err(|e| e.to_string())
        };
        assert_eq!(checked(64, 8), Ok(()));
        let error = checked(65, 8).unwrap_err();
        assert!(error.contains("is [B, L, 64] activation, expected logits [B, L, 65]"), "{error}");
        let error = checked(64, 9).unwrap_err();
        assert!(error.contains("head: linear: input 0 is [B, L, 8]"), "{error}");
    }
}
