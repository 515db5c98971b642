use std::sync::Arc;

use zmlx_engine::stages::Embed;

use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::{Embedding, MultiplyScalar};
use crate::pattern::{Match, Pattern};
use crate::weights::{Format, WeightId};

/// Looks rows up without leaving the engine.
pub static PATTERN: Pattern = Pattern {
    name: "embedding",
    summary: "rows of the (quantised) embedding matrix, scaled if the model says so",
    class: Fidelity::TokenIdentical,
    templates: &["
        ids ~ tokens()
        h = embedding(ids)
        y = multiply_scalar?(h)
        return y
    "],
    build,
};

#[derive(Debug)]
struct Rows {
    weight: WeightId,
    width: usize,
    scale: f32,
    /// Whether MLX has the rows in bfloat16, whatever the model runs in.
    rounded: bool,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let weight = m.need::<Embedding>("h")?.weight;
    let (_, width) = m.matrix(weight)?;
    let scale = m.op::<MultiplyScalar>("y").map_or(1.0, |s| s.0 as f32);
    let rounded = matches!(&m.weight(weight)?.format, Format::Quantized(q) if q.mode != "affine");
    Ok(Arc::new(Rows { weight, width, scale, rounded }))
}

impl Body for Rows {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let matrix = l.matrix(self.weight)?;
        let out = l.output(0, Form::Flat { width: self.width });
        l.push(Embed { matrix, scale: self.scale, rounded: self.rounded, out });
        Ok(())
    }
}
