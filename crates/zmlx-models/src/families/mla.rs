//! What families with multi-head latent attention are made of: DeepSeek-V3 and those that follow it.

use zmlx_graph::ops::{
    AddScalar, AddWeight, Binary, Cast, ExpandLast, KvAppend, LayerNorm, Linear, MaskGroups, MergeHeads,
    MlaAttention, MultiplyScalar, Sigmoid, SparseMlaAttention, SplitAt, SplitHeads, Sum, TakeAlongLast,
    TopKOfNegated, TopPositions, Transpose,
};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};
use zmlx_mlx::Dtype;

use super::Outline;
use super::blocks::{Experts, layer_count, linear, mlp};
use super::mla_weights::{self, SplitLatent};
use super::rope::{Rope, rope_theta};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

/// In what families differ whose configurations look alike.
pub(super) struct Variant {
    /// Of the norms of compressed queries and of latents; `rms_norm_eps` if none is given.
    pub(super) latent_eps: Option<f32>,
    /// Added to the sum of an expert's weights before they are divided by it.
    pub(super) weight_eps: Option<f64>,
    /// Whether attention looks at chosen positions only.
    pub(super) sparse: bool,
    /// The value of `routed_scaling_factor` where the configuration has none.
    pub(super) routed_scale: f64,
}

/// A configuration of such a family.
pub(super) struct Config {
    vocab_size: i32,
    hidden_size: i32,
    intermediate_size: i32,
    attention: Latent,
    /// Sizes of the experts and how they are chosen, if any layer has them.
    experts: Option<Routed>,
    context_length: i32,
    rms_norm_eps: f32,
    /// For each layer, whether it has experts.
    sparse: Vec<bool>,
}

/// Latent attention: queries and keys have a part without and a part with a rotary embedding, and keys and values are
/// projections of one latent a position, which is what the cache holds.
struct Latent {
    heads: i32,
    /// Width that queries are compressed to first, if they are.
    q_rank: Option<i32>,
    kv_rank: i32,
    nope: i32,
    rope_width: i32,
    value: i32,
    bias: bool,
    eps: f32,
    rope: Rope,
    scale: f32,
    indexer: Option<Indexer>,
}

/// What chooses the positions that sparse attention looks at.
struct Indexer {
    heads: i32,
    width: i32,
    top_k: i32,
    rope: Rope,
}

/// Experts with the router of DeepSeek-V3.
pub(super) struct Routed {
    pub(super) experts: Experts,
    /// How many experts' width the shared expert has, which every token uses.
    shared: Option<i32>,
    /// Groups of experts, and how many are kept.
    groups: (i32, i32),
    /// Whether weights are divided by their sum, and what is added to it.
    normalise: Option<Option<f64>>,
    scale: f64,
}

impl Config {
    /// Reads a configuration; `variant` says what it leaves open.
    pub(super) fn read(c: &ModelConfig, variant: &Variant) -> Result<Self, LoadError> {
        let hidden_size = c.size("hidden_size")?;
        let layers = layer_count(c)?;
        only(c, "hidden_act", "silu")?;
        let experts = Routed::read(c, hidden_size, variant)?;
        let sparse = match &experts {
            Some(_) => {
                let (first, step) = (c.count("first_k_dense_replace")?, c.size_opt("moe_layer_freq")?);
                (0..layers).map(|i| i >= first && i % step.unwrap_or(1) == 0).collect()
            }
            None => vec![false; layers as usize],
        };
        let rms_norm_eps = c.positive("rms_norm_eps")? as f32;
        Ok(Self {
            vocab_size: c.size("vocab_size")?,
            hidden_size,
            intermediate_size: c.size("intermediate_size")?,
            attention: Latent::read(c, variant, rms_norm_eps)?,
            experts,
            context_length: c.size("max_position_embeddings")?,
            rms_norm_eps,
            sparse,
        })
    }

    /// Brings the names and layouts of published checkpoints to those of the graph, for weights whose names begin with
    /// `prefix`: layers past the last, which predict further tokens, are left out; weights in 8-bit floats or packed by
    /// compressed-tensors are translated; experts that are apart are stacked, and the product that makes keys and values
    /// of latents is split by heads.
    pub(super) fn sanitize(&self, prefix: &str, tensors: &mut Tensors) -> Result<(), LoadError> {
        let layers = format!("{prefix}model.layers.");
        tensors.remove(|name| {
            let number = name.strip_prefix(&layers).and_then(|rest| rest.split('.').next()?.parse().ok());
            number.is_some_and(|n: usize| n >= self.sparse.len()) || name.contains("rotary_emb.inv_freq")
        });
        mla_weights::translate(tensors)?;
        for (index, &sparse) in self.sparse.iter().enumerate() {
            if let (true, Some(routed)) = (sparse, &self.experts) {
                routed.experts.stack(tensors, &format!("{layers}{index}.mlp"))?;
            }
            let Latent { heads, nope, value, kv_rank, .. } = self.attention;
            let split = SplitLatent { heads, nope, value, kv_rank };
            split.apply(tensors, &format!("{layers}{index}.self_attn"))?;
        }
        Ok(())
    }
}

/// A key that may be absent and otherwise has one value that is supported.
fn only(c: &ModelConfig, key: &str, supported: &str) -> Result<(), LoadError> {
    match c.get(key) {
        Some(value) if value.as_str() != Some(supported) => {
            Err(c.wrong(key, value, &format!("{supported:?}: this family has nothing else")))
        }
        _ => Ok(()),
    }
}

impl Latent {
    fn read(c: &ModelConfig, variant: &Variant, rms_norm_eps: f32) -> Result<Self, LoadError> {
        let heads = c.size("num_attention_heads")?;
        let (nope, rope_width) = (c.size("qk_nope_head_dim")?, c.size("qk_rope_head_dim")?);
        let fail = |key: &str, message| Err(c.contradiction(key, message));
        if rope_width % 2 != 0 {
            let message = format!("rotary embedding needs an even width, not {rope_width}");
            return fail("qk_rope_head_dim", message);
        }
        let width = nope + rope_width;
        if let Some(value) = c.size_opt("qk_head_dim")?.filter(|&w| w != width) {
            let message = format!("{value}: qk_nope_head_dim and qk_rope_head_dim are {width} together");
            return fail("qk_head_dim", message);
        }
        let value = c.size("v_head_dim")?;
        if i64::from(heads) * i64::from(width.max(value)) > i64::from(i32::MAX) {
            let message = format!("{heads} heads of {} are too many to count", width.max(value));
            return fail("num_attention_heads", message);
        }
        // mlx-lm does not look at these two and turns neighbours, all of the rotary part.
        if let Some(value) = c.get("rope_interleave").filter(|v| v.as_bool() != Some(true)) {
            return Err(c.wrong("rope_interleave", value, "true: neighbours are turned together"));
        }
        if let Some(value) = c.get("partial_rotary_factor").filter(|v| v.as_f64() != Some(1.0)) {
            return Err(c.wrong("partial_rotary_factor", value, "1: the whole rotary part is turned"));
        }
        let base = rope_theta(c, None)?;
        let rope = Rope::read(c, rope_width, base, true)?;
        let scale = f64::from(width).powf(-0.5) * rope.attention_factor();
        let q_rank = c.size_or_null("q_lora_rank")?;
        let indexer = match (variant.sparse, q_rank) {
            (false, _) => None,
            (true, Some(_)) => Some(Indexer::read(c, rope_width, base)?),
            (true, None) => {
                return fail("q_lora_rank", "null: the indexer reads compressed queries".to_owned());
            }
        };
        Ok(Self {
            heads,
            q_rank,
            kv_rank: c.size("kv_lora_rank")?,
            nope,
            rope_width,
            value,
            bias: c.flag_or("attention_bias", false)?,
            eps: variant.latent_eps.unwrap_or(rms_norm_eps),
            rope,
            scale: scale as f32,
            indexer,
        })
    }

    fn write(&self, b: &mut Builder<'_>, path: &str, x: Value, hidden: i32) -> Value {
        let &Self { heads, kv_rank, nope, value, bias, eps, .. } = self;
        let q_width = heads * (nope + self.rope_width);
        let (q, compressed) = match self.q_rank {
            None => (b.linear(&format!("{path}.q_proj"), x, q_width, hidden), None),
            Some(rank) => {
                let c = linear(b, &format!("{path}.q_a_proj"), x, rank, hidden, bias);
                let c = if self.indexer.is_some() { b.compared(c) } else { c };
                let c = b.rms_norm(&format!("{path}.q_a_layernorm"), c, rank, eps);
                (b.linear(&format!("{path}.q_b_proj"), c, q_width, rank), Some((c, rank)))
            }
        };
        let q = split_heads(b, path, q, heads);
        let [q, q_pe] = b.node_n(path, SplitAt { at: vec![nope] }, &[q]);
        let kv_path = format!("{path}.kv_a_proj_with_mqa");
        let kv = linear(b, &kv_path, x, kv_rank + self.rope_width, hidden, bias);
        let [latent, k_pe] = b.node_n(path, SplitAt { at: vec![kv_rank] }, &[kv]);
        let k_pe = split_heads(b, path, k_pe, 1);
        let latent = b.rms_norm(&format!("{path}.kv_a_layernorm"), latent, kv_rank, eps);
        let q_pe = self.rope.apply(b, path, q_pe);
        let k_pe = self.rope.apply(b, path, k_pe);
        let latent = split_heads(b, path, latent, 1);
        let slot = b.slot(path, SlotKind::KvCache);
        let [latents, keys] = b.node_n(path, KvAppend { slot }, &[latent, k_pe]);
        let embed = b.matrices(&format!("{path}.embed_q"), [heads, kv_rank, nope]);
        let unembed = b.matrices(&format!("{path}.unembed_out"), [heads, value, kv_rank]);
        let attention = MlaAttention { embed, unembed, scale: self.scale };
        let y = match (&self.indexer, compressed) {
            (Some(indexer), Some(compressed)) => {
                let positions = indexer.write(b, &format!("{path}.indexer"), x, hidden, compressed);
                let inputs = [q, q_pe, latents, keys, positions];
                b.node(path, SparseMlaAttention(attention), &inputs)
            }
            _ => b.node(path, attention, &[q, q_pe, latents, keys]),
        };
        let y = b.node(path, MergeHeads, &[y]);
        linear(b, &format!("{path}.o_proj"), y, hidden, heads * value, bias)
    }
}

/// `[batch, length, heads * d]` to `[batch, heads, length, d]`.
fn split_heads(b: &mut Builder<'_>, path: &str, x: Value, heads: i32) -> Value {
    let x = b.node(path, SplitHeads { heads }, &[x]);
    b.node(path, Transpose(vec![0, 2, 1, 3]), &[x])
}

/// The norm of the indexer's keys has PyTorch's default.
const KEY_NORM_EPS: f32 = 1e-5;

impl Indexer {
    fn read(c: &ModelConfig, rope_width: i32, base: f64) -> Result<Self, LoadError> {
        let (heads, width) = (c.size("index_n_heads")?, c.size("index_head_dim")?);
        let fail = |message| Err(c.contradiction("index_head_dim", message));
        if width < rope_width {
            return fail(format!("{width}: the {rope_width} of qk_rope_head_dim do not fit"));
        }
        if i64::from(heads) * i64::from(width) > i64::from(i32::MAX) {
            return fail(format!("{heads} heads of {width} are too many to count"));
        }
        let interleave = c.flag_or("indexer_rope_interleave", false)?;
        let rope = Rope::read(c, rope_width, base, interleave)?;
        Ok(Self { heads, width, top_k: c.size("index_topk")?, rope })
    }

    /// The positions to look at, for the layer's input and compressed queries of some rank.
    fn write(
        &self,
        b: &mut Builder<'_>,
        path: &str,
        x: Value,
        hidden: i32,
        (compressed, rank): (Value, i32),
    ) -> Value {
        let &Self { heads, width, top_k, .. } = self;
        // Scores are sums of products that are cut off at zero. Many are exactly zero, and where too few are above it, position
        // settles the tie: rounding may not lift one above the others.
        let q = b.linear(&format!("{path}.wq_b"), compressed, heads * width, rank);
        let q = b.compared(q);
        let q = split_heads(b, path, q, heads);
        let k = b.linear(&format!("{path}.wk"), x, width, hidden);
        let k = b.compared(k);
        let norm = format!("{path}.k_norm");
        let (weight, bias) = (b.tensor(&norm, &[width]), b.bias(&norm, width));
        let k = b.node(&norm, LayerNorm { weight: Some(weight), bias: Some(bias), eps: KEY_NORM_EPS }, &[k]);
        let k = split_heads(b, path, k, 1);
        let q = self.rope.apply(b, path, q);
        let k = self.rope.apply(b, path, k);
        // The cache has values beside keys, and there are none: one column stands in for them.
        let [column, _] = b.node_n(path, SplitAt { at: vec![1] }, &[k]);
        let slot = b.slot(path, SlotKind::KvCache);
        let [keys, _] = b.node_n(path, KvAppend { slot }, &[k, column]);
        let weights = b.linear(&format!("{path}.weights_proj"), x, heads, hidden);
        let weights = b.compared(weights);
        let scale = f64::from(heads).powf(-0.5) * f64::from(width).powf(-0.5);
        let weights = b.node(path, MultiplyScalar(scale), &[weights]);
        b.node(path, TopPositions { k: top_k }, &[q, keys, weights])
    }
}

impl Routed {
    /// `None` without `n_routed_experts`.
    pub(super) fn read(c: &ModelConfig, hidden: i32, variant: &Variant) -> Result<Option<Self>, LoadError> {
        let Some(count) = c.size_or_null("n_routed_experts")? else { return Ok(None) };
        only(c, "topk_method", "noaux_tc")?;
        only(c, "scoring_func", "sigmoid")?;
        let fail = |key: &str, message| Err(c.contradiction(key, message));
        let per_token = c.size("num_experts_per_tok")?;
        if per_token > count {
            return fail("num_experts_per_tok", format!("{per_token} of {count} experts"));
        }
        let groups = c.size_opt("n_group")?.unwrap_or(1);
        let keep = c.size_opt("topk_group")?.unwrap_or(1);
        if count % groups != 0 || (groups > 1 && count / groups < 2) {
            let message = format!("{groups} groups of {count} experts: equal groups of two or more");
            return fail("n_group", message);
        }
        if keep > groups {
            return fail("topk_group", format!("{keep} of {groups} groups"));
        }
        let shared = c.size_or_null("n_shared_experts")?;
        let inner = c.size("moe_intermediate_size")?;
        if i64::from(inner) * i64::from(shared.unwrap_or(1)) > i64::from(i32::MAX) {
            return fail("n_shared_experts", format!("{inner} times {}: too wide", shared.unwrap_or(1)));
        }
        let normalise = c.flag_or("norm_topk_prob", true)? && per_token > 1;
        Ok(Some(Self {
            experts: Experts { count, per_token, hidden, inner },
            shared,
            groups: (groups, keep),
            normalise: normalise.then_some(variant.weight_eps),
            scale: c.positive_or("routed_scaling_factor", Some(variant.routed_scale))?,
        }))
    }

    /// The sum of the chosen experts' answers by their weights, and of the shared expert's.
    pub(super) fn write(&self, b: &mut Builder<'_>, path: &str, x: Value) -> Value {
        let (indices, weights) = self.route(b, &format!("{path}.gate"), x);
        let y = self.experts.switch_glu(b, &format!("{path}.switch_mlp"), x, indices);
        let weights = b.node(path, ExpandLast, &[weights]);
        let weighted = b.multiply(path, y, weights);
        let sum = b.node(path, Sum { axis: -2, keepdims: false }, &[weighted]);
        let sum = b.node(path, Cast(None), &[sum, y]);
        let Some(shared) = self.shared else { return sum };
        let Experts { hidden, inner, .. } = self.experts;
        let shared = mlp(b, &format!("{path}.shared_experts"), x, hidden, inner * shared, false);
        b.add(path, sum, shared)
    }

    /// Chosen experts and their weights: sigmoid scores choose together with a bias, in the best groups, and weigh without
    /// it.
    fn route(&self, b: &mut Builder<'_>, path: &str, x: Value) -> (Value, Value) {
        let Experts { count, per_token, hidden, .. } = self.experts;
        // Never quantised, whatever the configuration says.
        let weight = b.tensor(path, &[count, hidden]);
        let logits = b.node(path, Linear { weight, bias: None }, &[x]);
        let logits = b.node(path, Cast(Some(Dtype::Float32)), &[logits]);
        let scores = b.node(path, Sigmoid, &[logits]);
        let weight = b.bare_f32(&format!("{path}.e_score_correction_bias"), &[count]);
        let mut ranked = b.node(path, AddWeight { weight }, &[scores]);
        let (groups, keep) = self.groups;
        if groups > 1 {
            ranked = b.node(path, MaskGroups { groups, keep }, &[ranked]);
        }
        let indices = b.node(path, TopKOfNegated { k: per_token }, &[ranked]);
        let mut weights = b.node(path, TakeAlongLast, &[scores, indices]);
        if let Some(eps) = self.normalise {
            let mut total = b.node(path, Sum { axis: -1, keepdims: true }, &[weights]);
            if let Some(eps) = eps {
                total = b.node(path, AddScalar(eps), &[total]);
            }
            weights = b.node(path, Binary::Divide, &[weights, total]);
        }
        let weights = b.node(path, MultiplyScalar(self.scale), &[weights]);
        (indices, weights)
    }
}

/// The graph; `prefix` is what the names of all weights begin with.
pub(super) fn build(c: &Config, prefix: &str, b: &mut Builder<'_>) -> Outline {
    let tokens = b.tokens();
    let mut h = b.embedding(&format!("{prefix}model.embed_tokens"), tokens, c.vocab_size, c.hidden_size);
    let mut layers = Vec::new();
    for (index, &sparse) in c.sparse.iter().enumerate() {
        let path = format!("{prefix}model.layers.{index}");
        let norm = |b: &mut Builder<'_>, name: &str, h| {
            b.rms_norm(&format!("{path}.{name}"), h, c.hidden_size, c.rms_norm_eps)
        };
        let x = norm(b, "input_layernorm", h);
        let r = c.attention.write(b, &format!("{path}.self_attn"), x, c.hidden_size);
        h = b.add(&path, h, r);
        let x = norm(b, "post_attention_layernorm", h);
        let feed_forward = format!("{path}.mlp");
        let r = match &c.experts {
            Some(routed) if sparse => routed.write(b, &feed_forward, x),
            _ => mlp(b, &feed_forward, x, c.hidden_size, c.intermediate_size, false),
        };
        h = b.add(&path, h, r);
        layers.push(LayerInfo {
            index,
            mixer: if c.attention.indexer.is_some() { "sparse_latent_attention" } else { "latent_attention" }
                .to_owned(),
            feed_forward: if sparse { "moe" } else { "dense" }.to_owned(),
        });
    }
    let h = b.rms_norm(&format!("{prefix}model.norm"), h, c.hidden_size, c.rms_norm_eps);
    let output = b.linear(&format!("{prefix}lm_head"), h, c.vocab_size, c.hidden_size);
    Outline {
        output,
        layers,
        hidden_size: c.hidden_size,
        vocab_size: c.vocab_size,
        context_length: Some(c.context_length),
        experts: c.experts.as_ref().map(|r| (r.experts.count, r.experts.per_token)),
    }
}
