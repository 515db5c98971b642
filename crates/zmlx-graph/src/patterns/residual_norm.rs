use std::sync::Arc;

use zmlx_engine::stages::Add;

use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::pattern::{Match, Pattern};

/// A sum of two activations that no product took with it.
pub static PATTERN: Pattern = Pattern {
    name: "residual_norm",
    summary: "residual sum and the norm that follows as one op; the sum is rounded before it is normalised",
    class: Fidelity::TokenIdentical,
    templates: &["
        h = add(a, b)
        n = rms_norm(h)
        return h, n
    "],
    build,
};

#[derive(Debug)]
struct Fused {
    inputs: [usize; 2],
    norm: super::NormOf,
    width: usize,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let (width, norm) = (m.row_width("h")?, m.norm("n"));
    if m.shape("a") != m.shape("b") {
        return Err("one of the two has another shape".to_owned());
    }
    Ok(Arc::new(Fused { inputs: [m.input("a")?, m.input("b")?], norm, width }))
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        2
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let (width, form) = (self.width, Form::Flat { width: self.width });
        let (a, b) = (l.input(self.inputs[0], form)?, l.input(self.inputs[1], form)?);
        let (sum, out) = (l.output(0, form), l.output(1, form));
        l.push(Add { a, b, out: sum, width });
        let norm = l.norm(self.norm)?.ok_or_else(|| LoweringError::Pattern("no norm".to_owned()))?;
        l.push(zmlx_engine::stages::RmsNorm { norm, x: sum, out, width });
        Ok(())
    }
}
