use std::sync::Arc;

use zmlx_engine::stages::RmsNorm as Stage;

use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::pattern::{Match, Pattern};

/// A norm over the width of the residual stream that no product took with it.
pub static PATTERN: Pattern = Pattern {
    name: "rmsnorm",
    summary: "RMS norm of each token, in float32, weight applied after scaling",
    class: Fidelity::TokenIdentical,
    templates: &["
        n = rms_norm(x)
        return n
    "],
    build,
};

#[derive(Debug)]
struct Norm {
    input: usize,
    norm: super::NormOf,
    width: usize,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let (width, norm) = (m.row_width("x")?, m.norm("n"));
    Ok(Arc::new(Norm { input: m.input("x")?, norm, width }))
}

impl Body for Norm {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let form = Form::Flat { width: self.width };
        let x = l.input(self.input, form)?;
        let out = l.output(0, form);
        let norm = l.norm(self.norm)?.ok_or_else(|| LoweringError::Pattern("no norm".to_owned()))?;
        l.push(Stage { norm, x, out, width: self.width });
        Ok(())
    }
}
