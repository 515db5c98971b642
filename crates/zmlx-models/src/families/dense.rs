//! Decoders whose feed-forward parts are dense: Llama and what is built like it.

use serde_json::Value as Json;
use zmlx_graph::Builder;
use zmlx_graph::ops::{Split, SwiGlu};

use super::Outline;
use super::attention::SelfAttention;
use super::blocks::{Heads, mlp};
use super::decoder::{Decoder, FeedForward};
use super::rope::{Rope, rope_theta};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

/// The matrices of a feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mlp {
    /// `gate_proj`, `up_proj` and `down_proj`, with biases or without.
    Apart { bias: bool },
    /// One `gate_up_proj`, and `down_proj`.
    Fused,
}

/// A dense decoder.
pub(super) struct Dense {
    pub(super) decoder: Decoder,
    pub(super) attention: SelfAttention,
    pub(super) inner: i32,
    pub(super) mlp: Mlp,
}

impl Dense {
    /// The keys that most of these families have in common. `tied` and `theta` are for configurations that do not say.
    pub(super) fn read(c: &ModelConfig, tied: bool, theta: Option<f64>) -> Result<Self, LoadError> {
        let decoder = Decoder::read(c, tied)?;
        only_full_attention(c)?;
        let kv_heads = kv_heads(c)?;
        let heads = Heads::read(c, decoder.hidden_size, kv_heads, c.size_opt("head_dim")?)?;
        let (base, traditional) = (rope_theta(c, theta)?, c.flag_or("rope_traditional", false)?);
        let rope = Rope::read(c, heads.head_dim, base, traditional)?;
        Self::new(c, decoder, heads, rope)
    }

    /// Of heads and a rope that a family reads in its own way. Projections have no biases, queries and keys no norms:
    /// families set what is theirs.
    pub(super) fn new(
        c: &ModelConfig,
        decoder: Decoder,
        heads: Heads,
        rope: Rope,
    ) -> Result<Self, LoadError> {
        let attention = SelfAttention::plain(decoder.hidden_size, heads, rope);
        let inner = c.size("intermediate_size")?;
        Ok(Self { decoder, attention, inner, mlp: Mlp::Apart { bias: false } })
    }

    /// Old checkpoints carry the rotary frequencies, and some a copy of a tied head.
    pub(super) fn tidy(&self, tensors: &mut Tensors) {
        let head = self.decoder.tied.then(|| format!("{}lm_head.weight", self.decoder.prefix));
        tensors
            .remove(|name| name.contains("self_attn.rotary_emb.inv_freq") || head.as_deref() == Some(name));
    }

    /// The graph.
    pub(super) fn build(&self, b: &mut Builder<'_>) -> Outline {
        let (hidden, inner) = (self.decoder.hidden_size, self.inner);
        self.decoder.build(b, &self.attention, None, |b, _, layer, x| {
            let path = format!("{layer}.mlp");
            let y = match self.mlp {
                Mlp::Apart { bias } => mlp(b, &path, x, hidden, inner, bias),
                Mlp::Fused => {
                    let both = b.linear(&format!("{path}.gate_up_proj"), x, 2 * inner, hidden);
                    let [gate, up] = b.node_n(&path, Split { parts: 2 }, &[both]);
                    let y = b.node(&path, SwiGlu, &[gate, up]);
                    b.linear(&format!("{path}.down_proj"), y, hidden, inner)
                }
            };
            (y, FeedForward::Dense)
        })
    }
}

/// `num_key_value_heads`, without which every head has its own keys and values.
pub(super) fn kv_heads(c: &ModelConfig) -> Result<i32, LoadError> {
    match c.size_opt("num_key_value_heads")? {
        Some(kv_heads) => Ok(kv_heads),
        None => c.size("num_attention_heads"),
    }
}

fn only_full_attention(c: &ModelConfig) -> Result<(), LoadError> {
    let Some(types) = c.get("layer_types") else { return Ok(()) };
    let full = |t: &Json| t.as_str() == Some("full_attention");
    if types.as_array().is_some_and(|types| types.iter().all(full)) {
        return Ok(());
    }
    Err(c.wrong("layer_types", types, "all full_attention: this family has no sliding windows"))
}
