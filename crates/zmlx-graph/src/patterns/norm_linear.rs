use std::sync::Arc;

use super::linear_residual::Product;
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::ops::Linear;
use crate::pattern::{Match, Pattern};

/// Any product that no other op took with it, with the norm before it.
pub static PATTERN: Pattern = Pattern {
    name: "norm_linear",
    summary: "norm, product and bias as one op",
    class: Fidelity::TokenIdentical,
    templates: &["
        n ~ rms_norm?(x)
        y = linear(n)
        return y
    "],
    build,
};

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let linear = m.need::<Linear>("y")?.clone();
    m.matrix(linear.weight)?;
    let input = m.rows("x")?;
    Ok(Arc::new(Product { input, norm: m.norm("n"), linear, residual: None, wanted_only: false }))
}
