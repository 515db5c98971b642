//! What several families are made of.

use zmlx_graph::op::Op;
use zmlx_graph::ops::{ExpandLast, ExpertLinear, ExpertSort, ExpertUnsort, Sum, SwiGlu};
use zmlx_graph::{Builder, Value};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

/// Graphs are built before weights are looked at, so a wild number must not build a wild graph.
const MOST_LAYERS: i32 = 1024;

/// `num_hidden_layers`.
pub(super) fn layer_count(c: &ModelConfig) -> Result<i32, LoadError> {
    let layers = c.size("num_hidden_layers")?;
    if layers > MOST_LAYERS {
        let message = format!("{layers} is more than the {MOST_LAYERS} that are supported");
        return Err(c.contradiction("num_hidden_layers", message));
    }
    Ok(layers)
}

/// Sizes of grouped-query attention.
pub(super) struct Heads {
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
}

impl Heads {
    /// Of `num_attention_heads`; without `head_dim` the heads share the `hidden` columns.
    pub(super) fn read(
        c: &ModelConfig,
        hidden: i32,
        kv_heads: i32,
        head_dim: Option<i32>,
    ) -> Result<Self, LoadError> {
        Self::of(c, hidden, c.size("num_attention_heads")?, kv_heads, head_dim)
    }

    /// Of so many heads.
    pub(super) fn of(
        c: &ModelConfig,
        hidden: i32,
        heads: i32,
        kv_heads: i32,
        head_dim: Option<i32>,
    ) -> Result<Self, LoadError> {
        let fail = |message| Err(c.contradiction("num_attention_heads", message));
        if (head_dim.is_none() && hidden % heads != 0) || heads % kv_heads != 0 {
            return fail(format!(
                "{hidden} hidden, {heads} attention and {kv_heads} key/value heads must divide one another"
            ));
        }
        let head_dim = head_dim.unwrap_or(hidden / heads);
        if head_dim % 2 != 0 {
            return fail(format!("rotary embedding needs an even head size, not {head_dim}"));
        }
        if i64::from(heads) * i64::from(head_dim) > i64::from(i32::MAX) {
            return fail(format!("{heads} heads of {head_dim} are too many to count"));
        }
        Ok(Self { heads, kv_heads, head_dim })
    }

    /// Columns of all queries.
    pub(super) fn q_width(&self) -> i32 {
        self.heads * self.head_dim
    }

    /// Columns of all keys, and of all values.
    pub(super) fn kv_width(&self) -> i32 {
        self.kv_heads * self.head_dim
    }

    /// `head_dim^-1/2`.
    pub(super) fn scale(&self) -> f32 {
        f64::from(self.head_dim).powf(-0.5) as f32
    }
}

/// `down(silu(gate(x)) * up(x))`.
pub(super) fn mlp(b: &mut Builder<'_>, path: &str, x: Value, hidden: i32, inner: i32, bias: bool) -> Value {
    let gate = linear(b, &format!("{path}.gate_proj"), x, inner, hidden, bias);
    let up = linear(b, &format!("{path}.up_proj"), x, inner, hidden, bias);
    let y = b.node(path, SwiGlu, &[gate, up]);
    linear(b, &format!("{path}.down_proj"), y, hidden, inner, bias)
}

/// `x @ w.T`, with a bias or without.
pub(super) fn linear(b: &mut Builder<'_>, path: &str, x: Value, out: i32, input: i32, bias: bool) -> Value {
    if bias { b.linear_bias(path, x, out, input) } else { b.linear(path, x, out, input) }
}

/// Sizes of routed experts.
pub(super) struct Experts {
    pub(super) count: i32,
    pub(super) per_token: i32,
    pub(super) hidden: i32,
    pub(super) inner: i32,
}

impl Experts {
    /// Of `num_experts`, `num_experts_per_tok` and `moe_intermediate_size`.
    pub(super) fn read(c: &ModelConfig, hidden: i32) -> Result<Self, LoadError> {
        Self::of(c, "num_experts", "moe_intermediate_size", hidden)
    }

    /// Of the keys `count` and `inner`, and `num_experts_per_tok`.
    pub(super) fn of(c: &ModelConfig, count: &str, inner: &str, hidden: i32) -> Result<Self, LoadError> {
        let (count, per_token) = (c.size(count)?, c.size("num_experts_per_tok")?);
        if per_token > count {
            return Err(c.contradiction("num_experts_per_tok", format!("{per_token} of {count} experts")));
        }
        Ok(Self { count, per_token, hidden, inner: c.size(inner)? })
    }

    /// The chosen experts' answers `[batch, length, k, hidden]` to tokens `[batch, length, hidden]`, for indices
    /// `[batch, length, k]`.
    pub(super) fn switch_glu(&self, b: &mut Builder<'_>, path: &str, x: Value, indices: Value) -> Value {
        self.switch(b, path, x, indices, false, SwiGlu)
    }

    /// The same with biases or without, and another activation of (gate, up).
    pub(super) fn switch(
        &self,
        b: &mut Builder<'_>,
        path: &str,
        x: Value,
        indices: Value,
        bias: bool,
        activation: impl Op,
    ) -> Value {
        let [rows, expert, order] = b.node_n(path, ExpertSort, &[x, indices]);
        let linear = |b: &mut Builder<'_>, name: &str, rows, out, input| {
            let path = format!("{path}.{name}");
            let weight = b.matrix(&path, &[self.count, out, input]);
            let bias = bias.then(|| b.expert_bias(&path, self.count, out));
            b.node(&path, ExpertLinear { weight, bias }, &[rows, expert])
        };
        let up = linear(b, "up_proj", rows, self.inner, self.hidden);
        let gate = linear(b, "gate_proj", rows, self.inner, self.hidden);
        let y = b.node(path, activation, &[gate, up]);
        let y = linear(b, "down_proj", y, self.hidden, self.inner);
        b.node(path, ExpertUnsort, &[y, order, indices])
    }

    /// Stacks the experts of a published checkpoint, which has them apart as `base.experts.N`.
    pub(super) fn stack(&self, tensors: &mut Tensors, base: &str) -> Result<(), LoadError> {
        for projection in ["gate_proj", "up_proj", "down_proj"] {
            for part in ["weight", "scales", "biases"] {
                let stacked = format!("{base}.switch_mlp.{projection}.{part}");
                let of = |e: i32| format!("{base}.experts.{e}.{projection}.{part}");
                tensors.stack(&stacked, self.count, of)?;
            }
        }
        Ok(())
    }
}

/// The sum of the chosen experts' answers `[batch, length, k, hidden]` by their weights `[batch, length, k]`.
pub(super) fn weighed_sum(b: &mut Builder<'_>, path: &str, y: Value, weights: Value) -> Value {
    let weights = b.node(path, ExpandLast, &[weights]);
    let weighed = b.multiply(path, y, weights);
    b.node(path, Sum { axis: -2, keepdims: false }, &[weighed])
}

/// The logits: `lm_head`, or the embedding matrix where the two are tied.
pub(super) fn head(b: &mut Builder<'_>, tied: bool, h: Value, vocabulary: i32, hidden: i32) -> Value {
    b.linear(if tied { "model.embed_tokens" } else { "lm_head" }, h, vocabulary, hidden)
}
