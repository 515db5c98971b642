//! A decoder of layers with one attention and one feed-forward part each, as most families have it.

use zmlx_graph::{Builder, Value};

use super::Outline;
use super::attention::SelfAttention;
use super::blocks::layer_count;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::info::LayerInfo;

/// `h += attention(norm(h)); h += feed_forward(norm(h))` in every layer, a norm and a head after the last.
pub(super) struct Decoder {
    /// Before the paths of all weights.
    pub(super) prefix: &'static str,
    pub(super) vocab_size: i32,
    pub(super) hidden_size: i32,
    pub(super) layers: i32,
    pub(super) eps: f32,
    /// Whether the head is the embedding matrix.
    pub(super) tied: bool,
    pub(super) context_length: Option<i32>,
}

/// What a layer's feed-forward part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FeedForward {
    Dense,
    Experts,
}

impl Decoder {
    /// Of `vocab_size`, `hidden_size`, `num_hidden_layers`, `rms_norm_eps`, `tie_word_embeddings` (or `tied`), and
    /// `max_position_embeddings` if it is there.
    pub(super) fn read(c: &ModelConfig, tied: bool) -> Result<Self, LoadError> {
        Ok(Self {
            prefix: "",
            vocab_size: c.size("vocab_size")?,
            hidden_size: c.size("hidden_size")?,
            layers: layer_count(c)?,
            eps: c.positive("rms_norm_eps")? as f32,
            tied: c.flag_or("tie_word_embeddings", tied)?,
            context_length: c.size_opt("max_position_embeddings")?,
        })
    }

    /// The path of a layer.
    pub(super) fn layer(&self, index: usize) -> String {
        format!("{}model.layers.{index}", self.prefix)
    }

    /// The graph. `feed_forward` is given a layer, its path and what comes in, and says what it made of it.
    pub(super) fn build(
        &self,
        b: &mut Builder<'_>,
        attention: &SelfAttention,
        experts: Option<(i32, i32)>,
        feed_forward: impl Fn(&mut Builder<'_>, usize, &str, Value) -> (Value, FeedForward),
    ) -> Outline {
        let &Self { prefix, vocab_size, hidden_size, eps, .. } = self;
        let tokens = b.tokens();
        let embedding = format!("{prefix}model.embed_tokens");
        let mut h = b.embedding(&embedding, tokens, vocab_size, hidden_size);
        let mut layers = Vec::new();
        for index in 0..self.layers as usize {
            let path = self.layer(index);
            let x = b.rms_norm(&format!("{path}.input_layernorm"), h, hidden_size, eps);
            let r = attention.write(b, &format!("{path}.self_attn"), x);
            h = b.add(&path, h, r);
            let x = b.rms_norm(&format!("{path}.post_attention_layernorm"), h, hidden_size, eps);
            let (r, kind) = feed_forward(b, index, &path, x);
            h = b.add(&path, h, r);
            layers.push(LayerInfo {
                index,
                mixer: "full_attention".to_owned(),
                feed_forward: if kind == FeedForward::Dense { "dense" } else { "moe" }.to_owned(),
            });
        }
        let h = b.rms_norm(&format!("{prefix}model.norm"), h, hidden_size, eps);
        let head = if self.tied { embedding } else { format!("{prefix}lm_head") };
        let output = b.linear(&head, h, vocab_size, hidden_size);
        let context_length = self.context_length;
        Outline { output, layers, hidden_size, vocab_size, context_length, experts }
    }
}
