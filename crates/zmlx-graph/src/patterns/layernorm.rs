use std::sync::Arc;

use zmlx_engine::stages::LayerNorm as Stage;

use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::LayerNorm;
use crate::pattern::{Match, Pattern};
use crate::weights::WeightId;

/// A layer norm over the width of the residual stream.
pub static PATTERN: Pattern = Pattern {
    name: "layernorm",
    summary: "layer norm of each token, in float32, weight and bias applied after scaling",
    class: Fidelity::TokenIdentical,
    templates: &["
        n = layer_norm(x)
        return n
    "],
    build,
};

#[derive(Debug)]
struct Norm {
    input: usize,
    weight: Option<WeightId>,
    bias: Option<WeightId>,
    eps: f32,
    width: usize,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let (width, input) = (m.row_width("x")?, m.input("x")?);
    let &LayerNorm { weight, bias, eps } = m.need::<LayerNorm>("n")?;
    Ok(Arc::new(Norm { input, weight, bias, eps, width }))
}

impl Body for Norm {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let form = Form::Flat { width: self.width };
        let x = l.input(self.input, form)?;
        let (weight, bias) = (l.bias(self.weight)?, l.bias(self.bias)?);
        let out = l.output(0, form);
        l.push(Stage { weight, bias, eps: self.eps, x, out, width: self.width });
        Ok(())
    }
}
