use std::sync::Arc;

use zmlx_engine::stages::{Groups, Linear as LinearStage, Route, Scores, Ties};

use super::{NormOf, source};
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::{AddScalar, AddWeight, Linear, MultiplyScalar, Softmax, Sum, TopKIndices, TopKOfNegated};
use crate::pattern::{Match, Pattern};
use crate::weights::WeightId;

/// From activations to chosen experts and their weights.
///
/// The choice is that of MLX's argpartition on the CPU: the `k` largest pairs (score, index), so of equal scores the
/// higher index; or, of negated scores, the `k` smallest pairs (-score, index), so of equal scores the lower index. The
/// chosen come in ascending order of score; argpartition leaves them in no stated order.
pub static PATTERN: Pattern = Pattern {
    name: "router",
    summary: "norm, logits, scores, bias, top-k, renormalisation and scale as one op",
    class: Fidelity::TokenIdentical,
    templates: &[
        // Sigmoid scores, a bias that counts for the choice only.
        "
        n ~ rms_norm?(x)
        logits = linear(n)
        scores = sigmoid(logits)
        wide = cast?(scores)
        ranked = add_weight?(wide)
        indices = top_k_indices(ranked)
        w = take_along_last(scores, indices)
        total = sum(w)
        floored = add_scalar?(total)
        shares = divide(w, floored)
        scaled = multiply_scalar?(shares)
        weights = cast?(scaled, n)
        return indices, weights
    ",
        "
        n ~ rms_norm?(x)
        logits = linear(n)
        scores = sigmoid(logits)
        wide = cast?(scores)
        ranked = add_weight?(wide)
        indices = top_k_indices(ranked)
        w = take_along_last(scores, indices)
        scaled = multiply_scalar?(w)
        weights = cast?(scaled, n)
        return indices, weights
    ",
        // Softmax over all experts.
        "
        n ~ rms_norm?(x)
        logits = linear(n)
        scores = softmax(logits)
        indices = top_k_indices|top_k_of_negated(scores)
        w = take_along_last(scores, indices)
        total = sum(w)
        floored = add_scalar?(total)
        shares = divide(w, floored)
        return indices, shares
    ",
        "
        n ~ rms_norm?(x)
        logits = linear(n)
        scores = softmax(logits)
        indices = top_k_indices|top_k_of_negated(scores)
        w = take_along_last(scores, indices)
        return indices, w
    ",
        // Logits choose; softmax over those of the chosen.
        "
        n ~ rms_norm?(x)
        logits = linear(n)
        indices = top_k_indices|top_k_of_negated(logits)
        w = take_along_last(logits, indices)
        weights = softmax(w)
        return indices, weights
    ",
    ],
    build,
};

/// A router that is one op: what the patterns of this file and of others fill in.
#[derive(Debug)]
pub(super) struct Fused {
    pub(super) input: usize,
    pub(super) norm: NormOf,
    pub(super) linear: Linear,
    pub(super) scores: Scores,
    pub(super) bias: Option<WeightId>,
    pub(super) k: usize,
    pub(super) ties: Ties,
    pub(super) groups: Option<Groups>,
    pub(super) renormalise: Option<f32>,
    pub(super) scale: f32,
}

/// What weights are divided by besides their sum: the op that sums them is `total`, that which adds to it `floored`.
pub(super) fn renormalised(m: &Match<'_>) -> Result<Option<f32>, String> {
    match m.op::<Sum>("total") {
        Some(Sum { axis: -1, keepdims: true }) => {
            Ok(Some(m.op::<AddScalar>("floored").map_or(0.0, |a| a.0 as f32)))
        }
        Some(_) => Err("weights are summed over another axis".to_owned()),
        None => Ok(None),
    }
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let linear = m.need::<Linear>("logits")?.clone();
    let (experts, _) = m.matrix(linear.weight)?;
    let (k, ties) = match m.op::<TopKOfNegated>("indices") {
        Some(top) => (top.k, Ties::Lower),
        None => (m.need::<TopKIndices>("indices")?.k, Ties::Higher),
    };
    if k < 1 || k as usize > experts {
        return Err(format!("{k} of {experts} experts"));
    }
    let scores = match (m.op::<Softmax>("scores"), m.op::<Softmax>("weights")) {
        (Some(_), _) => Scores::Softmax,
        (None, Some(_)) => Scores::SoftmaxOfChosen,
        (None, None) => Scores::Sigmoid,
    };
    let bias = m.op::<AddWeight>("ranked").map(|b| b.weight);
    let renormalise = renormalised(m)?;
    let scale = m.op::<MultiplyScalar>("scaled").map_or(1.0, |s| s.0 as f32);
    let input = m.rows("x")?;
    let (norm, k, groups) = (m.norm("n"), k as usize, None);
    Ok(Arc::new(Fused { input, norm, linear, scores, bias, k, ties, groups, renormalise, scale }))
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        2
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let matrix = l.matrix(self.linear.weight)?;
        let experts = matrix.rows();
        let source = source(l, self.input, self.norm, &matrix)?;
        let logits = l.temporary(experts);
        let linear_bias = l.bias(self.linear.bias)?;
        l.push(LinearStage {
            source,
            matrix,
            bias: linear_bias,
            gate: None,
            residual: None,
            out: logits,
            wanted_only: false,
        });
        let bias = l.bias(self.bias)?;
        let indices = l.output(0, Form::Indices { width: self.k });
        let weights = l.output(1, Form::Flat { width: self.k });
        l.push(Route {
            logits,
            experts,
            k: self.k,
            scores: self.scores,
            bias,
            ties: self.ties,
            groups: self.groups,
            renormalise: self.renormalise,
            scale: self.scale,
            indices,
            weights,
        });
        Ok(())
    }
}
