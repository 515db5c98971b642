//! GLM-4.5 and GLM-4.6 (Zhipu): grouped-query attention of which a part of each head is turned, DeepSeek-V3's experts.
//!
//! The order of ops is that of `mlx_lm.models.glm4_moe` 0.32.2.

use zmlx_graph::Builder;

use super::attention::{Projections, QkNorm, SelfAttention, rotated};
use super::blocks::{Heads, mlp};
use super::decoder::{Decoder, FeedForward};
use super::mla::{Routed, Variant};
use super::rope::Rope;
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family = Family { model_types: &["glm4_moe"], sanitize, build, routers: &[] };

/// Of the experts; nothing here has to do with latents.
const VARIANT: Variant = Variant { latent_eps: None, weight_eps: None, sparse: false, routed_scale: 1.0 };

struct Config {
    decoder: Decoder,
    attention: SelfAttention,
    intermediate_size: i32,
    /// What layers from `first_sparse` on have, if any layer has experts.
    routed: Option<Routed>,
    first_sparse: usize,
}

impl Config {
    fn read(c: &ModelConfig) -> Result<Self, LoadError> {
        let mut decoder = Decoder::read(c, false)?;
        // The head is its own matrix, whatever the key says, as in mlx-lm.
        decoder.tied = false;
        let hidden = decoder.hidden_size;
        if let Some(value) = c.get("rope_scaling") {
            return Err(c.wrong("rope_scaling", value, "null: this family has plain rotary embedding only"));
        }
        let heads = Heads::read(c, hidden, c.size("num_key_value_heads")?, Some(c.size("head_dim")?))?;
        let dims = rotated(c, heads.head_dim, c.positive("partial_rotary_factor")?)?;
        let norm = match c.flag("use_qk_norm")? {
            true => QkNorm::Heads { q: "q_norm", k: "k_norm", eps: decoder.eps },
            false => QkNorm::None,
        };
        let rope = Rope::plain(dims, c.positive("rope_theta")?, false);
        let attention = SelfAttention {
            projections: Projections::Apart { bias: c.flag("attention_bias")? },
            norm,
            ..SelfAttention::plain(hidden, heads, rope)
        };
        let first_sparse = c.count("first_k_dense_replace")?;
        let routed = match first_sparse < decoder.layers {
            true => Routed::read(c, hidden, &VARIANT)?,
            false => None,
        };
        let intermediate_size = c.size("intermediate_size")?;
        Ok(Self { decoder, attention, intermediate_size, routed, first_sparse: first_sparse as usize })
    }
}

/// Published checkpoints keep experts apart, and have layers past the last that predict further tokens.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    let c = Config::read(config)?;
    let layers = c.decoder.layers as usize;
    tensors.remove(|name| {
        let number = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        number.is_some_and(|n: usize| n >= layers)
    });
    let Some(routed) = &c.routed else { return Ok(()) };
    for layer in c.first_sparse..layers {
        routed.experts.stack(tensors, &format!("{}.mlp", c.decoder.layer(layer)))?;
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let hidden = c.decoder.hidden_size;
    let counts = c.routed.as_ref().map(|r| (r.experts.count, r.experts.per_token));
    Ok(c.decoder.build(b, &c.attention, counts, |b, index, layer, x| {
        let path = format!("{layer}.mlp");
        match &c.routed {
            Some(routed) if index >= c.first_sparse => (routed.write(b, &path, x), FeedForward::Experts),
            _ => (mlp(b, &path, x, hidden, c.intermediate_size, false), FeedForward::Dense),
        }
    }))
}
