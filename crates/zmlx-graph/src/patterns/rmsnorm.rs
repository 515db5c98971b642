use std::sync::Arc;

use zmlx_engine::stages::{Add, RmsNorm as Stage};

use super::residual;
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::pattern::{Match, Pattern};

/// A norm over the width of the residual stream that no product took with it, and the residual sum where the norm comes
/// before it.
pub static PATTERN: Pattern = Pattern {
    name: "rmsnorm",
    summary: "RMS norm of each token, in float32, weight applied after scaling; residual",
    class: Fidelity::TokenIdentical,
    templates: &["
        n = rms_norm(x)
        h = add?(n, r)
        return h
    "],
    build,
};

#[derive(Debug)]
struct Norm {
    input: usize,
    norm: super::NormOf,
    width: usize,
    residual: Option<usize>,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let (width, norm) = (m.row_width("x")?, m.norm("n"));
    let residual = m.residual("h", "n", "r")?;
    Ok(Arc::new(Norm { input: m.input("x")?, norm, width, residual }))
}

impl Body for Norm {
    fn launches(&self) -> u64 {
        1 + u64::from(self.residual.is_some())
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let form = Form::Flat { width: self.width };
        let x = l.input(self.input, form)?;
        let residual = residual(l, self.residual, self.width)?;
        let out = l.output(0, form);
        let norm = l.norm(self.norm)?.ok_or_else(|| LoweringError::Pattern("no norm".to_owned()))?;
        l.push(Stage { norm, x, out, width: self.width });
        if let Some(b) = residual {
            l.push(Add { a: out, b, out, width: self.width });
        }
        Ok(())
    }
}
