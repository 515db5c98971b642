use std::sync::Arc;

use zmlx_engine::stages::Embed;

use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::Embedding;
use crate::pattern::{Match, Pattern};
use crate::weights::WeightId;

/// Looks rows up without leaving the engine.
pub static PATTERN: Pattern = Pattern {
    name: "embedding",
    summary: "rows of the (quantised) embedding matrix",
    class: Fidelity::TokenIdentical,
    templates: &["
        ids ~ tokens()
        h = embedding(ids)
        return h
    "],
    build,
};

#[derive(Debug)]
struct Rows {
    weight: WeightId,
    width: usize,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let weight = m.need::<Embedding>("h")?.weight;
    let (_, width) = m.matrix(weight)?;
    Ok(Arc::new(Rows { weight, width }))
}

impl Body for Rows {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let matrix = l.matrix(self.weight)?;
        let out = l.output(0, Form::Flat { width: self.width });
        l.push(Embed { matrix, scale: 1.0, out });
        Ok(())
    }
}
