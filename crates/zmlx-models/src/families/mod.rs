//! Model families: from a configuration to a stock graph.

use zmlx_graph::weights::Format;
use zmlx_graph::{Builder, Dim, Graph, GraphError, Shape};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

mod lfm2_moe;

/// A family: its names, how its checkpoints are read, and its graph.
pub struct Family {
    /// Values of `model_type` that mean it.
    pub model_types: &'static [&'static str],
    /// Brings the names and layouts of published checkpoints to those of the graph.
    pub sanitize: fn(&ModelConfig, &mut Tensors) -> Result<(), LoadError>,
    /// Writes the graph, which repeats mlx-lm's order of ops exactly.
    pub build: fn(&ModelConfig, &mut Builder<'_>) -> Result<Outline, LoadError>,
}

/// The families, one a line.
const FAMILIES: &[Family] = &[lfm2_moe::FAMILY];

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
    pub(crate) family: &'static str,
    pub(crate) graph: Graph,
    pub(crate) outline: Outline,
    pub(crate) tensors: Tensors,
}

/// Names of all families.
pub fn known() -> Vec<&'static str> {
    FAMILIES.iter().flat_map(|f| f.model_types.iter().copied()).collect()
}

/// Builds and checks the graph that a configuration and the tensors of its checkpoint ask for.
pub(crate) fn build(config: &ModelConfig, mut tensors: Tensors) -> Result<Built, LoadError> {
    let model_type = config.model_type();
    let found =
        FAMILIES.iter().find_map(|f| f.model_types.iter().find(|t| **t == model_type).map(|name| (f, *name)));
    let Some((family, name)) = found else {
        return Err(LoadError::UnknownFamily { found: model_type.to_owned(), known: known().join(", ") });
    };
    (family.sanitize)(config, &mut tensors)?;
    // The builder asks for formats one by one; the first that is wrong is reported once it is done.
    let failure = std::cell::RefCell::new(None);
    let format_of = |path: &str, columns: i32| match tensors.format(config, path, columns) {
        Ok(format) => format,
        Err(error) => {
            failure.borrow_mut().get_or_insert(error);
            Format::Dense
        }
    };
    let mut builder = Builder::new(&format_of);
    let outline = (family.build)(config, &mut builder)?;
    let graph = builder.finish(outline.output);
    if let Some(error) = failure.take() {
        return Err(error);
    }
    check_types(&graph, &outline)?;
    tensors.check(&graph)?;
    Ok(Built { family: name, graph, outline, tensors })
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
