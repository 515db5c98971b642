use std::sync::Arc;

use super::linear_residual::Product;
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::ops::Linear;
use crate::pattern::{Match, Pattern};

/// The head, for the positions whose logits are wanted only.
pub static PATTERN: Pattern = Pattern {
    name: "lm_head",
    summary: "final norm and product with the head, for wanted positions only",
    class: Fidelity::TokenIdentical,
    templates: &["
        n ~ rms_norm?(x)
        y = linear(n)
        return y
    "],
    build,
};

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    if !m.is_output("y") {
        return Err("a product that is not the head".to_owned());
    }
    let linear = m.need::<Linear>("y")?.clone();
    m.matrix(linear.weight)?;
    let input = m.rows("x")?;
    Ok(Arc::new(Product { input, norm: m.norm("n"), linear, residual: None, wanted_only: true }))
}
