use std::sync::Arc;

use zmlx_engine::stages::Softmax as Stage;

use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::pattern::{Match, Pattern};

/// A softmax over the last axis that no other op took with it.
pub static PATTERN: Pattern = Pattern {
    name: "softmax",
    summary: "softmax of each token's row, in float32 with the largest subtracted first",
    class: Fidelity::TokenIdentical,
    templates: &["
        p = softmax(x)
        return p
    "],
    build,
};

#[derive(Debug)]
struct Rows {
    input: usize,
    width: usize,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let (width, input) = (m.row_width("x")?, m.input("x")?);
    Ok(Arc::new(Rows { input, width }))
}

impl Body for Rows {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let form = Form::Flat { width: self.width };
        let (x, out) = (l.input(self.input, form)?, l.output(0, form));
        l.push(Stage { x, out, width: self.width });
        Ok(())
    }
}
