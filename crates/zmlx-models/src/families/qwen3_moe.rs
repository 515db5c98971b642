//! Qwen3-MoE (Alibaba): grouped-query attention with normed queries and keys, sparse experts with softmax routing.
//!
//! The order of ops is that of `mlx_lm.models.qwen3_moe` 0.32.2.

use zmlx_graph::ops::{
    Attention, Binary, Cast, ExpandLast, KvAppend, MergeHeads, Rope, Softmax, SplitHeads, Sum, TakeAlongLast,
    TopKIndices, Transpose,
};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};

use super::blocks::{Experts, Heads, head, layer_count, mlp};
use super::{Family, Outline};
use crate::config::{ModelConfig, missing, wrong};
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["qwen3_moe"], sanitize, build, routers: &["mlp.gate"] };

struct Config {
    vocab_size: i32,
    hidden_size: i32,
    intermediate_size: i32,
    heads: Heads,
    /// Sizes of the experts, if any layer has them.
    experts: Option<Experts>,
    norm_topk_prob: bool,
    context_length: i32,
    rms_norm_eps: f32,
    rope_theta: f32,
    tied: bool,
    /// For each layer, whether it has experts.
    sparse: Vec<bool>,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        let hidden_size = c.size("hidden_size")?;
        let sparse = sparse_layers(c, layer_count(c)?)?;
        // mlx-lm ignores the key, and gives other text than the model was trained for.
        let kind = c.get("rope_scaling").map(|s| s.get("type").or_else(|| s.get("rope_type")));
        if let (Some(section), Some(kind)) = (c.get("rope_scaling"), kind)
            && !kind.is_none_or(|k| k == "default")
        {
            return Err(wrong(
                "rope_scaling",
                section,
                "absent: this family has plain rotary embedding only",
            ));
        }
        let (kv_heads, head_dim) = (c.size("num_key_value_heads")?, c.size("head_dim")?);
        Ok(Self {
            vocab_size: c.size("vocab_size")?,
            hidden_size,
            intermediate_size: c.size("intermediate_size")?,
            heads: Heads::read(c, hidden_size, kv_heads, Some(head_dim))?,
            experts: match sparse.contains(&true) {
                true => Some(Experts::read(c, hidden_size)?),
                false => None,
            },
            norm_topk_prob: c.flag("norm_topk_prob")?,
            context_length: c.size("max_position_embeddings")?,
            rms_norm_eps: c.positive("rms_norm_eps")? as f32,
            rope_theta: c.positive("rope_theta")? as f32,
            tied: c.flag("tie_word_embeddings")?,
            sparse,
        })
    }
}

/// Every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`.
pub(super) fn sparse_layers(c: &ModelConfig, layers: i32) -> Result<Vec<bool>, LoadError> {
    let (experts, step) = (c.count("num_experts")?, c.size("decoder_sparse_step")?);
    let mut sparse: Vec<bool> = (1..=layers).map(|n| experts > 0 && n % step == 0).collect();
    let value = c.get("mlp_only_layers").ok_or_else(|| missing("mlp_only_layers"))?;
    let numbers =
        value.as_array().ok_or_else(|| wrong("mlp_only_layers", value, "a list of layer numbers"))?;
    for item in numbers {
        let slot = item.as_u64().and_then(|i| sparse.get_mut(i as usize));
        *slot.ok_or_else(|| wrong("mlp_only_layers", value, "layer numbers"))? = false;
    }
    Ok(sparse)
}

/// Published checkpoints keep experts apart, and some have a copy of a tied head.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = Config::read(config)?;
    if c.tied {
        tensors.remove(|name| name == "lm_head.weight");
    }
    for (layer, _) in c.sparse.iter().enumerate().filter(|(_, sparse)| **sparse) {
        if let Some(experts) = &c.experts {
            experts.stack(tensors, &format!("model.layers.{layer}.mlp"))?;
        }
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let tokens = b.tokens();
    let mut h = b.embedding("model.embed_tokens", tokens, c.vocab_size, c.hidden_size);
    let mut layers = Vec::new();
    for (index, &sparse) in c.sparse.iter().enumerate() {
        let path = format!("model.layers.{index}");
        let x = b.rms_norm(&format!("{path}.input_layernorm"), h, c.hidden_size, c.rms_norm_eps);
        let r = self_attention(b, &c, &format!("{path}.self_attn"), x);
        h = b.add(&path, h, r);
        let x = b.rms_norm(&format!("{path}.post_attention_layernorm"), h, c.hidden_size, c.rms_norm_eps);
        let feed_forward = format!("{path}.mlp");
        let r = match &c.experts {
            Some(experts) if sparse => routed(b, &c, experts, &feed_forward, x),
            _ => mlp(b, &feed_forward, x, c.hidden_size, c.intermediate_size, false),
        };
        h = b.add(&path, h, r);
        layers.push(LayerInfo {
            index,
            mixer: "full_attention".to_owned(),
            feed_forward: if sparse { "moe" } else { "dense" }.to_owned(),
        });
    }
    let h = b.rms_norm("model.norm", h, c.hidden_size, c.rms_norm_eps);
    let output = head(b, c.tied, h, c.vocab_size, c.hidden_size);
    Ok(Outline {
        output,
        layers,
        hidden_size: c.hidden_size,
        vocab_size: c.vocab_size,
        context_length: Some(c.context_length),
        experts: c.experts.map(|e| (e.count, e.per_token)),
    })
}

fn self_attention(b: &mut Builder<'_>, c: &Config, path: &str, x: Value) -> Value {
    let Heads { heads, kv_heads, head_dim } = c.heads;
    let (q_width, kv_width) = (c.heads.q_width(), c.heads.kv_width());
    let q = b.linear(&format!("{path}.q_proj"), x, q_width, c.hidden_size);
    let k = b.linear(&format!("{path}.k_proj"), x, kv_width, c.hidden_size);
    let v = b.linear(&format!("{path}.v_proj"), x, kv_width, c.hidden_size);
    let heads_first = || Transpose(vec![0, 2, 1, 3]);
    let norm = |b: &mut Builder<'_>, name: &str, x: Value, heads: i32| {
        let x = b.node(path, SplitHeads { heads }, &[x]);
        let x = b.rms_norm(&format!("{path}.{name}"), x, head_dim, c.rms_norm_eps);
        b.node(path, heads_first(), &[x])
    };
    let q = norm(b, "q_norm", q, heads);
    let k = norm(b, "k_norm", k, kv_heads);
    let v = b.node(path, SplitHeads { heads: kv_heads }, &[v]);
    let v = b.node(path, heads_first(), &[v]);
    let rope = || Rope { dims: head_dim, base: c.rope_theta, traditional: false, scale: 1.0 };
    let q = b.node(path, rope(), &[q]);
    let k = b.node(path, rope(), &[k]);
    let slot = b.slot(path, SlotKind::KvCache);
    let [keys, values] = b.node_n(path, KvAppend { slot }, &[k, v]);
    let y = b.node(path, Attention { scale: c.heads.scale() }, &[q, keys, values]);
    let y = b.node(path, MergeHeads, &[y]);
    b.linear(&format!("{path}.o_proj"), y, c.hidden_size, q_width)
}

/// Softmax over all experts; the scores of the best weigh them.
fn routed(b: &mut Builder<'_>, c: &Config, experts: &Experts, path: &str, x: Value) -> Value {
    let logits = b.linear(&format!("{path}.gate"), x, experts.count, c.hidden_size);
    let gates = b.node(path, Softmax { precise: true }, &[logits]);
    let indices = b.node(path, TopKIndices { k: experts.per_token }, &[gates]);
    let mut scores = b.node(path, TakeAlongLast, &[gates, indices]);
    if c.norm_topk_prob {
        let total = b.node(path, Sum { axis: -1, keepdims: true }, &[scores]);
        scores = b.node(path, Binary::Divide, &[scores, total]);
    }
    let y = experts.switch_glu(b, &format!("{path}.switch_mlp"), x, indices);
    let scores = b.node(path, ExpandLast, &[scores]);
    let weighed = b.multiply(path, y, scores);
    let sum = b.node(path, Sum { axis: -2, keepdims: false }, &[weighed]);
    b.node(path, Cast(None), &[sum, y])
}
