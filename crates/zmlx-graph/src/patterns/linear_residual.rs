use std::sync::Arc;

use zmlx_engine::stages::Linear as LinearStage;

use super::{NormOf, residual, source};
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::Linear;
use crate::pattern::{Match, Pattern};

/// Any product, with the norm before and the residual after it.
pub static PATTERN: Pattern = Pattern {
    name: "linear_residual",
    summary: "norm, product, bias and residual as one op",
    class: Fidelity::TokenIdentical,
    templates: &["
        n ~ rms_norm?(x)
        y = linear(n)
        h = add(y, r)
        return h
    "],
    build,
};

/// `linear(norm(x)) + residual`.
#[derive(Debug)]
pub(super) struct Product {
    pub(super) input: usize,
    pub(super) norm: NormOf,
    pub(super) linear: Linear,
    pub(super) residual: Option<usize>,
    pub(super) wanted_only: bool,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let linear = m.need::<Linear>("y")?.clone();
    m.matrix(linear.weight)?;
    let input = m.rows("x")?;
    let residual = m.residual("h", "y", "r")?;
    Ok(Arc::new(Product { input, norm: m.norm("n"), linear, residual, wanted_only: false }))
}

impl Body for Product {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let matrix = l.matrix(self.linear.weight)?;
        let source = source(l, self.input, self.norm, &matrix)?;
        let residual = residual(l, self.residual, matrix.rows())?;
        let bias = l.bias(self.linear.bias)?;
        let out = l.output(0, Form::Flat { width: matrix.rows() });
        l.push(LinearStage {
            source,
            matrix,
            bias,
            gate: None,
            residual,
            out,
            wanted_only: self.wanted_only,
        });
        Ok(())
    }
}
