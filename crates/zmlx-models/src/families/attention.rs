//! Grouped-query attention, as most families have it.

use zmlx_graph::ops::{Attention, KvAppend, MergeHeads, PositionScale, SplitAt, SplitHeads, Transpose};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};

use super::blocks::{Heads, linear};
use super::rope::Rope;
use crate::config::ModelConfig;
use crate::error::LoadError;

/// Norms of queries and keys, before they are turned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum QkNorm {
    /// None.
    None,
    /// One over each head, of weights with these names.
    Heads { q: &'static str, k: &'static str, eps: f32 },
    /// One over all heads together, of weights `q_norm` and `k_norm`.
    Rows { eps: f32 },
}

/// The matrices that queries, keys and values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Projections {
    /// `q_proj`, `k_proj` and `v_proj`, with biases or without.
    Apart { bias: bool },
    /// One `qkv_proj`.
    Fused,
}

/// Attention of the layers of a family.
pub(super) struct SelfAttention {
    /// Width of what comes and goes.
    pub(super) hidden: i32,
    pub(super) heads: Heads,
    pub(super) projections: Projections,
    pub(super) norm: QkNorm,
    pub(super) rope: Rope,
    /// By what queries grow with their position, after they are turned.
    pub(super) growth: Option<PositionScale>,
    /// Name of the output matrix, and whether it has a bias.
    pub(super) out: (&'static str, bool),
}

impl SelfAttention {
    /// `[batch, length, hidden]` to the same, with a cache of its own.
    pub(super) fn write(&self, b: &mut Builder<'_>, path: &str, x: Value) -> Value {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let (q_width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        let [q, k, v] = self.project(b, path, x);
        let (q, k) = match self.norm {
            QkNorm::Rows { eps } => (
                b.rms_norm(&format!("{path}.q_norm"), q, q_width, eps),
                b.rms_norm(&format!("{path}.k_norm"), k, kv_width, eps),
            ),
            _ => (q, k),
        };
        let split = |b: &mut Builder<'_>, x: Value, heads: i32, norm: Option<&str>| {
            let mut x = b.node(path, SplitHeads { heads }, &[x]);
            if let (Some(name), QkNorm::Heads { eps, .. }) = (norm, self.norm) {
                x = b.rms_norm(&format!("{path}.{name}"), x, head_dim, eps);
            }
            b.node(path, Transpose(vec![0, 2, 1, 3]), &[x])
        };
        let (q_norm, k_norm) = match self.norm {
            QkNorm::Heads { q, k, .. } => (Some(q), Some(k)),
            _ => (None, None),
        };
        let q = split(b, q, heads, q_norm);
        let k = split(b, k, kv_heads, k_norm);
        let v = split(b, v, kv_heads, None);
        let q = self.rope.apply(b, path, q);
        let k = self.rope.apply(b, path, k);
        let slot = b.slot(path, SlotKind::KvCache);
        let [keys, values] = b.node_n(path, KvAppend { slot }, &[k, v]);
        let q = self.growth.map_or(q, |growth| b.node(path, growth, &[q]));
        let y = b.node(path, Attention { scale: self.heads.scale() }, &[q, keys, values]);
        let y = b.node(path, MergeHeads, &[y]);
        let (out, bias) = self.out;
        linear(b, &format!("{path}.{out}"), y, self.hidden, q_width, bias)
    }

    /// Plain: apart and without biases or norms.
    pub(super) fn plain(hidden: i32, heads: Heads, rope: Rope) -> Self {
        let projections = Projections::Apart { bias: false };
        Self { hidden, heads, projections, norm: QkNorm::None, rope, growth: None, out: ("o_proj", false) }
    }

    fn project(&self, b: &mut Builder<'_>, path: &str, x: Value) -> [Value; 3] {
        let (q_width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        match self.projections {
            Projections::Apart { bias } => [("q", q_width), ("k", kv_width), ("v", kv_width)]
                .map(|(name, width)| linear(b, &format!("{path}.{name}_proj"), x, width, self.hidden, bias)),
            Projections::Fused => {
                let qkv = b.linear(&format!("{path}.qkv_proj"), x, q_width + 2 * kv_width, self.hidden);
                b.node_n(path, SplitAt { at: vec![q_width, q_width + kv_width] }, &[qkv])
            }
        }
    }
}

/// The leading part of a head that is turned, `partial_rotary_factor` of it.
pub(super) fn rotated(c: &ModelConfig, head_dim: i32, factor: f64) -> Result<i32, LoadError> {
    let dims = (f64::from(head_dim) * factor) as i32;
    if !(2..=head_dim).contains(&dims) || dims % 2 != 0 {
        let message =
            format!("{factor} of a head of {head_dim} is {dims}: must be even, from 2 to {head_dim}");
        return Err(c.contradiction("partial_rotary_factor", message));
    }
    Ok(dims)
}
