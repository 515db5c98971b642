use std::sync::Arc;

use zmlx_engine::program::Slot;
use zmlx_engine::stages::{IndexAppend, IndexScores, PickPositions, SparseLatentAttend, TopK};

use super::skv_mla::{Absorbed, Operands};
use super::turn;
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError, Turn};
use crate::ops::{
    KvAppend, LayerNorm, MultiplyScalar, SparseMlaAttention, SplitAt, SplitHeads, TopPositions, Transpose,
};
use crate::pattern::{Match, Pattern};
use crate::state::SlotId;

/// Latent attention that looks at chosen positions only (DeepSeek-V3.2), with the indexer that chooses them.
///
/// The choice is that of MLX's argpartition on the CPU: the `k` largest pairs (score, position), so of equal scores the
/// later position. What is chosen is added up in the order of positions.
pub static PATTERN: Pattern = Pattern {
    name: "sparse_mla",
    summary: "indexer's norm, rope, cache, scores and top-k; absorbed queries, attention over chosen latents, values, output product and residual",
    class: Fidelity::TokenIdentical,
    templates: &["
        iq1 = split_heads(iq0)
        iq2 = transpose(iq1)
        iq = rope|rope_frequencies(iq2)
        ik1 = layer_norm(ik0)
        ik2 = split_heads(ik1)
        ik3 = transpose(ik2)
        ik = rope|rope_frequencies(ik3)
        column, rest = split_at(ik)
        ikeys, ivalues = kv_append(ik, column)
        iw = multiply_scalar(iw0)
        p = top_positions(iq, ikeys, iw)
        a = sparse_mla_attention(q, pe, latents, keys, p)
        m = merge_heads(a)
        o = linear(m)
        h = add?(o, r)
        return h
    "],
    build,
};

#[derive(Debug)]
struct Fused {
    absorbed: Absorbed,
    /// Queries, keys and weights of the indexer.
    inputs: [usize; 3],
    heads: usize,
    width: usize,
    norm: LayerNorm,
    turns: [Turn; 2],
    slot: SlotId,
    scale: f32,
    top_k: TopK,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let absorbed = Absorbed::read(m, m.need::<SparseMlaAttention>("a")?.0)?;
    let heads = m.need::<SplitHeads>("iq1")?.heads.max(1) as usize;
    let width = m.row_width("ik0")?;
    if m.need::<SplitHeads>("ik2")?.heads != 1 || m.row_width("iq0")? != heads * width {
        return Err("the indexer's keys are not one head as wide as its queries'".to_owned());
    }
    for name in ["iq2", "ik3"] {
        if m.need::<Transpose>(name)?.0 != [0, 2, 1, 3] {
            return Err("heads are brought to another place than in front of the length".to_owned());
        }
    }
    if m.need::<SplitAt>("column")?.at != [1] {
        return Err("the indexer's cache has more than one column of values".to_owned());
    }
    m.row_width("iw0")?;
    let turn = |name: &str| turn(m, name)?.ok_or_else(|| "no rope".to_owned());
    Ok(Arc::new(Fused {
        absorbed,
        inputs: [m.input("iq0")?, m.input("ik0")?, m.input("iw0")?],
        heads,
        width,
        norm: m.need::<LayerNorm>("ik1")?.clone(),
        turns: [turn("iq")?, turn("ik")?],
        slot: m.need::<KvAppend>("ikeys")?.slot,
        scale: m.need::<MultiplyScalar>("iw")?.0 as f32,
        top_k: TopK(m.need::<TopPositions>("p")?.k.max(1) as usize),
    }))
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        self.absorbed.launches() + 1
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let &Self { heads, width, top_k, .. } = self;
        let queries = l.input(self.inputs[0], Form::Flat { width: heads * width })?;
        let keys = l.input(self.inputs[1], Form::Flat { width })?;
        let weights = l.input(self.inputs[2], Form::Flat { width: heads })?;
        let (weight, bias, eps) = (l.bias(self.norm.weight)?, l.bias(self.norm.bias)?, self.norm.eps);
        let [query_rope, key_rope] = [l.rope(&self.turns[0]), l.rope(&self.turns[1])];
        let slot = l.slot(self.slot, Slot::kv(1, width, 1));
        let turned = l.temporary(heads * width);
        l.push(IndexAppend {
            queries,
            heads,
            keys,
            width,
            weight,
            bias,
            eps,
            query_rope,
            key_rope,
            slot,
            turned,
        });
        let chosen = l.temporary(top_k.0);
        l.push(IndexScores { queries: turned, heads, weights, scale: self.scale, slot, top_k });
        l.push(PickPositions { top_k, out: chosen });
        let (heads, scale) = (self.absorbed.heads, self.absorbed.attention.scale);
        self.absorbed.lower(l, |l, Operands { queries, turned, slot, out, .. }| {
            l.push(SparseLatentAttend { queries, turned, heads, slot, scale, chosen, top_k, out });
            Ok(())
        })
    }
}
