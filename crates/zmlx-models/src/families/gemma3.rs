//! Gemma 3 (Google), its text part: norms before and after each part, attention through a sliding window in most layers, two
//! rotary embeddings, and a feed-forward part gated by GELU.
//!
//! The order of ops is that of `mlx_lm.models.gemma3_text` 0.32.2.

use half::bf16;
use serde_json::Value as Json;
use zmlx_graph::ops::{
    Attention, Binary, GeGlu, KvAppend, MergeHeads, MultiplyScalar, SplitHeads, Transpose, WindowAttention,
};
use zmlx_graph::state::SlotKind;
use zmlx_graph::{Builder, Value};

use super::blocks::{Heads, layer_count};
use super::rope::Rope;
use super::{Family, Outline};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::info::LayerInfo;
use crate::tensors::Tensors;

pub(super) const FAMILY: Family =
    Family { model_types: &["gemma3_text", "gemma3"], sanitize, build, routers: &[] };

/// The name of the model that also sees images, whose text part is a section of its own.
const WITH_IMAGES: &str = "gemma3";

struct Config {
    /// Before the names of all weights.
    prefix: &'static str,
    vocab_size: i32,
    hidden_size: i32,
    intermediate_size: i32,
    layers: i32,
    heads: Heads,
    /// Scale of the scores.
    scale: f32,
    window: i32,
    /// Every so many layers one sees all positions.
    pattern: i32,
    /// Rotary embeddings of the layers that see all, and of the others.
    ropes: [Rope; 2],
    eps: f32,
    context_length: i32,
    tied: bool,
}

impl Config {
    fn read(root: &ModelConfig) -> Result<Self, LoadError> {
        if root.model_type() != WITH_IMAGES {
            return Self::of_section(root, "", |key| root.size_opt(key));
        }
        let text = root.section("text_config")?.ok_or_else(|| root.missing("text_config"))?;
        // Published files leave out what is usual; the vocabulary is that of the whole model.
        Self::of_section(&text, "language_model.", |key| match key {
            "vocab_size" => Ok(root.size_opt(key)?.or(Some(262_208))),
            "num_attention_heads" => Ok(text.size_opt(key)?.or(Some(8))),
            "num_key_value_heads" => Ok(text.size_opt(key)?.or(Some(4))),
            key => text.size_opt(key),
        })
    }

    fn of_section(
        c: &ModelConfig,
        prefix: &'static str,
        size: impl Fn(&str) -> Result<Option<i32>, LoadError>,
    ) -> Result<Self, LoadError> {
        let or = |key: &str, usual: i32| Ok::<i32, LoadError>(size(key)?.unwrap_or(usual));
        let hidden_size = c.size("hidden_size")?;
        let (count, kv_heads, head_dim) =
            (or("num_attention_heads", 4)?, or("num_key_value_heads", 1)?, or("head_dim", 256)?);
        let heads = Heads::of(c, hidden_size, count, kv_heads, Some(head_dim))?;
        let (theta, local) = (
            c.positive_or("rope_theta", Some(1_000_000.0))?,
            c.positive_or("rope_local_base_freq", Some(10_000.0))?,
        );
        let of = |kind: &str, base: f64| Rope::of_layers(c, kind, head_dim, base, false);
        let full = match of("full_attention", theta)? {
            Some(rope) => rope,
            None => Rope::read(c, head_dim, theta, false)?,
        };
        let sliding = of("sliding_attention", local)?;
        let ropes = [full, sliding.unwrap_or_else(|| Rope::plain(head_dim, local, false))];
        let (layers, pattern) = (layer_count(c)?, or("sliding_window_pattern", 6)?);
        check_types(c, layers, pattern)?;
        Ok(Self {
            prefix,
            vocab_size: or("vocab_size", 262_144)?,
            hidden_size,
            intermediate_size: c.size("intermediate_size")?,
            layers,
            heads,
            scale: c.positive_or("query_pre_attn_scalar", Some(256.0))?.powf(-0.5) as f32,
            window: or("sliding_window", 512)?,
            pattern,
            ropes,
            eps: c.positive_or("rms_norm_eps", Some(1e-6))? as f32,
            context_length: or("max_position_embeddings", 32_768)?,
            tied: c.flag_or("tie_word_embeddings", true)?,
        })
    }

    fn slides(&self, layer: i32) -> bool {
        slides(layer, self.pattern)
    }
}

/// Whether a layer looks through the window.
fn slides(layer: i32, pattern: i32) -> bool {
    layer % pattern != pattern - 1
}

/// mlx-lm goes by `sliding_window_pattern` alone; a list that says otherwise is another model.
fn check_types(c: &ModelConfig, layers: i32, pattern: i32) -> Result<(), LoadError> {
    let Some(types) = c.get("layer_types") else { return Ok(()) };
    let expected =
        (0..layers).map(|i| if slides(i, pattern) { "sliding_attention" } else { "full_attention" });
    if types.as_array().is_some_and(|types| types.iter().map(Json::as_str).eq(expected.map(Some))) {
        return Ok(());
    }
    let allowed = format!("{layers} entries, full_attention at every {pattern}th (sliding_window_pattern)");
    Err(c.wrong("layer_types", types, &allowed))
}

/// The parts that see images go.
fn sanitize(config: &ModelConfig, tensors: &mut Tensors) -> Result<(), LoadError> {
    Config::read(config)?;
    if config.model_type() == WITH_IMAGES {
        // Newer checkpoints have the parts the other way round.
        tensors.rename(|name| match name.strip_prefix("model.") {
            Some(rest) => Some(match rest.strip_prefix("language_model.") {
                Some(rest) => format!("language_model.model.{rest}"),
                None => rest.to_owned(),
            }),
            None => (name == "lm_head.weight").then(|| format!("language_model.{name}")),
        });
        tensors
            .remove(|name| name.starts_with("vision_tower.") || name.starts_with("multi_modal_projector."));
    }
    Ok(())
}

fn build(config: &ModelConfig, b: &mut Builder<'_>) -> Result<Outline, LoadError> {
    let c = Config::read(config)?;
    let tokens = b.tokens();
    let embedding = format!("{}model.embed_tokens", c.prefix);
    let h = b.embedding(&embedding, tokens, c.vocab_size, c.hidden_size);
    // The factor is a bfloat16 whatever the model runs in.
    let scale = bf16::from_f64(f64::from(c.hidden_size).sqrt()).to_f64();
    let mut h = b.node(&embedding, MultiplyScalar(scale), &[h]);
    let mut layers = Vec::new();
    for index in 0..c.layers {
        let path = format!("{}model.layers.{index}", c.prefix);
        let norm = |b: &mut Builder<'_>, name: &str, x: Value| {
            b.rms_norm_above_one(&format!("{path}.{name}"), x, c.hidden_size, c.eps)
        };
        let x = norm(b, "input_layernorm", h);
        let r = self_attention(b, &c, &format!("{path}.self_attn"), x, c.slides(index));
        let r = norm(b, "post_attention_layernorm", r);
        h = b.node(&path, Binary::AddFinite, &[h, r]);
        let x = norm(b, "pre_feedforward_layernorm", h);
        let r = feed_forward(b, &c, &format!("{path}.mlp"), x);
        let r = norm(b, "post_feedforward_layernorm", r);
        h = b.node(&path, Binary::AddFinite, &[h, r]);
        let mixer = if c.slides(index) { "sliding_attention" } else { "full_attention" };
        layers.push(LayerInfo {
            index: index as usize,
            mixer: mixer.to_owned(),
            feed_forward: "dense".to_owned(),
        });
    }
    let h = b.rms_norm_above_one(&format!("{}model.norm", c.prefix), h, c.hidden_size, c.eps);
    let head = format!("{}lm_head", c.prefix);
    // As in mlx-lm, a head that is there is used, whatever the configuration says.
    let own = b.has(&format!("{head}.weight")).unwrap_or(!c.tied);
    let output = b.linear(if own { &head } else { &embedding }, h, c.vocab_size, c.hidden_size);
    Ok(Outline {
        output,
        layers,
        hidden_size: c.hidden_size,
        vocab_size: c.vocab_size,
        context_length: Some(c.context_length),
        experts: None,
    })
}

fn self_attention(b: &mut Builder<'_>, c: &Config, path: &str, x: Value, sliding: bool) -> Value {
    let Heads { heads, kv_heads, head_dim } = c.heads;
    let (q_width, kv_width) = (c.heads.q_width(), c.heads.kv_width());
    // A norm over a head gives the same before and after heads are brought to the front.
    let project = |b: &mut Builder<'_>, letter: &str, heads: i32, width: i32, normed: bool| {
        let x = b.linear(&format!("{path}.{letter}_proj"), x, width, c.hidden_size);
        let mut x = b.node(path, SplitHeads { heads }, &[x]);
        if normed {
            x = b.rms_norm_above_one(&format!("{path}.{letter}_norm"), x, head_dim, c.eps);
        }
        b.node(path, Transpose(vec![0, 2, 1, 3]), &[x])
    };
    let q = project(b, "q", heads, q_width, true);
    let k = project(b, "k", kv_heads, kv_width, true);
    let v = project(b, "v", kv_heads, kv_width, false);
    let rope = &c.ropes[usize::from(sliding)];
    let q = rope.apply(b, path, q);
    let k = rope.apply(b, path, k);
    let (scale, window) = (c.scale, sliding.then_some(c.window));
    let slot = b.slot(path, window.map_or(SlotKind::KvCache, |window| SlotKind::WindowCache { window }));
    let [keys, values] = b.node_n(path, KvAppend { slot }, &[k, v]);
    let y = match window {
        Some(_) => b.node(path, WindowAttention { scale, window, sinks: None }, &[q, keys, values]),
        None => b.node(path, Attention { scale }, &[q, keys, values]),
    };
    let y = b.node(path, MergeHeads, &[y]);
    b.linear(&format!("{path}.o_proj"), y, c.hidden_size, q_width)
}

/// `down(gelu(gate(x)) * up(x))`.
fn feed_forward(b: &mut Builder<'_>, c: &Config, path: &str, x: Value) -> Value {
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let gate = b.linear(&format!("{path}.gate_proj"), x, inner, hidden);
    let up = b.linear(&format!("{path}.up_proj"), x, inner, hidden);
    let y = b.node(path, GeGlu::Tanh, &[gate, up]);
    b.linear(&format!("{path}.down_proj"), y, hidden, inner)
}
