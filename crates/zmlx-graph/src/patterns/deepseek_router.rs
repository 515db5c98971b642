use std::sync::Arc;

use zmlx_engine::stages::{Groups, Scores, Ties};
use zmlx_mlx::Dtype;

use super::router::{Fused, renormalised};
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::ops::{AddWeight, Cast, Linear, MaskGroups, MultiplyScalar, TopKOfNegated};
use crate::pattern::{Match, Pattern};

/// The router of DeepSeek-V3 and of what follows it (GLM-4.x, Kimi): sigmoid scores, a bias for the choice, groups of which
/// some are kept, and dropped groups that rank as 0.
///
/// The choice is that of the first `k` of MLX's argpartition of negated scores on the CPU: of equal scores the lower
/// index. Of equal groups that of the higher index is kept. The order among the chosen is ascending by score.
pub static PATTERN: Pattern = Pattern {
    name: "deepseek_router",
    summary: "norm, logits, sigmoid, bias, groups, top-k, renormalisation and scale as one op",
    class: Fidelity::TokenIdentical,
    templates: &[
        "
        n ~ rms_norm?(x)
        logits = linear(n)
        wide = cast?(logits)
        scores = sigmoid(wide)
        ranked = add_weight(scores)
        masked = mask_groups?(ranked)
        indices = top_k_of_negated(masked)
        w = take_along_last(scores, indices)
        total = sum(w)
        floored = add_scalar?(total)
        shares = divide(w, floored)
        weights = multiply_scalar?(shares)
        return indices, weights
    ",
        "
        n ~ rms_norm?(x)
        logits = linear(n)
        wide = cast?(logits)
        scores = sigmoid(wide)
        ranked = add_weight(scores)
        masked = mask_groups?(ranked)
        indices = top_k_of_negated(masked)
        w = take_along_last(scores, indices)
        weights = multiply_scalar?(w)
        return indices, weights
    ",
    ],
    build,
};

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let linear = m.need::<Linear>("logits")?.clone();
    let (experts, _) = m.matrix(linear.weight)?;
    let k = m.need::<TopKOfNegated>("indices")?.k;
    if k < 1 || k as usize > experts {
        return Err(format!("{k} of {experts} experts"));
    }
    if let Some(Cast(dtype)) = m.op("wide")
        && *dtype != Some(Dtype::Float32)
    {
        return Err("logits are cast to another dtype than float32".to_owned());
    }
    let groups = m.op::<MaskGroups>("masked");
    let groups = groups.map(|m| Groups { count: m.groups as usize, keep: m.keep as usize });
    let bias = Some(m.need::<AddWeight>("ranked")?.weight);
    Ok(Arc::new(Fused {
        input: m.rows("x")?,
        norm: m.norm("n"),
        linear,
        scores: Scores::Sigmoid,
        bias,
        k: k as usize,
        ties: Ties::Lower,
        groups,
        renormalise: renormalised(m)?,
        scale: m.op::<MultiplyScalar>("weights").map_or(1.0, |s| s.0 as f32),
    }))
}
