//! The names and hyperparameters of GGUF's architectures, as the families here know them.

use std::fs::File;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::header::{GgufTensor, Header, Value};
use super::{GgufError, convert};

/// Most layers that a file may claim; names are made for each.
const MOST_LAYERS: i64 = 1024;

/// Where a tensor of the file belongs.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    /// Number in the header's list.
    pub(super) tensor: usize,
    /// Name in the family's graph, with `.weight` or `.bias`.
    pub(super) name: String,
    /// Heads whose rows come in rotary pairs in the file.
    pub(super) heads: Option<i32>,
    /// Another shape of the same elements.
    pub(super) shape: Option<Vec<i32>>,
}

/// An architecture: its hyperparameters and the names of its modules.
struct Architecture {
    /// `general.architecture`.
    name: &'static str,
    /// What `config.json` would say.
    config: fn(&Metadata<'_>) -> Result<Map<String, Json>, GgufError>,
    /// Modules outside of the layers: name there and here.
    outer: &'static [(&'static str, &'static str)],
    /// Modules of a layer.
    layer: &'static [(&'static str, &'static str)],
    /// Modules of a layer whose rows llama.cpp has in rotary pairs, and the key that counts their heads.
    paired: &'static [(&'static str, &'static str)],
}

const ARCHITECTURES: [Architecture; 3] = [
    Architecture {
        name: "llama",
        config: llama,
        outer: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
        layer: &[
            ("attn_norm", "input_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ],
        paired: &[("attn_q", "attention.head_count"), ("attn_k", "attention.head_count_kv")],
    },
    Architecture {
        name: "qwen3moe",
        config: qwen3moe,
        outer: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
        layer: &[
            ("attn_norm", "input_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate_inp", "mlp.gate"),
            ("ffn_gate_exps", "mlp.switch_mlp.gate_proj"),
            ("ffn_up_exps", "mlp.switch_mlp.up_proj"),
            ("ffn_down_exps", "mlp.switch_mlp.down_proj"),
        ],
        paired: &[],
    },
    Architecture {
        name: "lfm2moe",
        config: lfm2moe,
        outer: &[("token_embd", "model.embed_tokens"), ("token_embd_norm", "model.embedding_norm")],
        layer: &[
            ("attn_norm", "operator_norm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_q_norm", "self_attn.q_layernorm"),
            ("attn_k_norm", "self_attn.k_layernorm"),
            ("attn_output", "self_attn.out_proj"),
            ("shortconv.conv", "conv.conv"),
            ("shortconv.in_proj", "conv.in_proj"),
            ("shortconv.out_proj", "conv.out_proj"),
            ("ffn_norm", "ffn_norm"),
            ("ffn_gate", "feed_forward.gate_proj"),
            ("ffn_up", "feed_forward.up_proj"),
            ("ffn_down", "feed_forward.down_proj"),
            ("ffn_gate_inp", "feed_forward.gate"),
            ("ffn_gate_exps", "feed_forward.switch_mlp.gate_proj"),
            ("ffn_up_exps", "feed_forward.switch_mlp.up_proj"),
            ("ffn_down_exps", "feed_forward.switch_mlp.down_proj"),
        ],
        paired: &[],
    },
];

/// Factors of llama's rotary frequencies; they become part of the configuration.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The configuration of a file, and where its tensors belong. A tensor without a place keeps its own name, so that the
/// family reports it.
pub(super) fn understand(
    path: &Path,
    header: &Header,
) -> Result<(Map<String, Json>, Vec<Placed>), GgufError> {
    let general = Metadata { path, header, architecture: "general" };
    let found = general.text("architecture")?;
    let architecture = ARCHITECTURES.iter().find(|a| a.name == found);
    let architecture = architecture.ok_or_else(|| GgufError::UnknownArchitecture {
        path: path.to_owned(),
        found: found.to_owned(),
        known: ARCHITECTURES.map(|a| a.name).join(", "),
    })?;
    let metadata = Metadata { path, header, architecture: architecture.name };
    let mut config = (architecture.config)(&metadata)?;
    config.insert("quantization".to_owned(), json!({ "bits": 4, "group_size": 32 }));
    config.insert("eos_token_id".to_owned(), json!(metadata.end_ids()));
    let mut placed = Vec::new();
    for (index, tensor) in header.tensors.iter().enumerate() {
        if architecture.name != "llama" || tensor.name != ROPE_FACTORS {
            placed.push(place(architecture, &metadata, index, tensor)?);
        }
    }
    Ok((config, placed))
}

fn place(
    architecture: &Architecture,
    metadata: &Metadata<'_>,
    index: usize,
    tensor: &GgufTensor,
) -> Result<Placed, GgufError> {
    let mut placed = Placed { tensor: index, name: tensor.name.clone(), heads: None, shape: None };
    let Some((module, part)) = tensor.name.rsplit_once('.') else { return Ok(placed) };
    let renamed = |list: &[(&str, &str)], name: &str| {
        list.iter().find(|(there, _)| *there == name).map(|(_, here)| (*here).to_owned())
    };
    let Some((layer, inner)) = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
        if let Some(here) = renamed(architecture.outer, module) {
            placed.name = format!("{here}.{part}");
        }
        return Ok(placed);
    };
    if (architecture.name, inner, part) == ("lfm2moe", "exp_probs_b", "bias") {
        placed.name = format!("model.layers.{layer}.feed_forward.expert_bias");
        return Ok(placed);
    }
    let Some(here) = renamed(architecture.layer, inner) else { return Ok(placed) };
    placed.name = format!("model.layers.{layer}.{here}.{part}");
    if let Some((_, key)) = architecture.paired.iter().find(|(there, _)| *there == inner) {
        let heads = metadata.heads(key)?;
        let rows = tensor.shape.first().copied().unwrap_or(0);
        if rows % heads != 0 || (rows / heads) % 2 != 0 {
            let message = format!("{heads} heads do not share the {rows} rows of {} evenly", tensor.name);
            return Err(metadata.fail(key, message));
        }
        placed.heads = Some(heads);
    }
    if inner == "shortconv.conv" && tensor.shape.len() == 2 {
        placed.shape = Some([&tensor.shape[..], &[1]].concat());
    }
    Ok(placed)
}

/// Typed access to the keys of an architecture.
struct Metadata<'a> {
    path: &'a Path,
    header: &'a Header,
    architecture: &'static str,
}

impl Metadata<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(&self.key(key))
    }

    fn fail(&self, key: &str, message: impl Into<String>) -> GgufError {
        GgufError::Metadata { path: self.path.to_owned(), key: self.key(key), message: message.into() }
    }

    fn missing(&self, key: &str) -> GgufError {
        self.fail(key, "missing")
    }

    fn text(&self, key: &str) -> Result<&str, GgufError> {
        match self.get(key) {
            Some(Value::Text(text)) => Ok(text),
            Some(_) => Err(self.fail(key, "must be a text")),
            None => Err(self.missing(key)),
        }
    }

    /// A whole number; a list of equal ones counts as one.
    fn integer_opt(&self, key: &str) -> Result<Option<i64>, GgufError> {
        let number = match self.get(key) {
            None => return Ok(None),
            Some(Value::Integer(n)) => i64::try_from(*n).ok(),
            Some(Value::Integers(list)) => match list.as_slice() {
                [first, rest @ ..] if rest.iter().all(|n| n == first) => Some(*first),
                _ => return Err(self.fail(key, "differs between layers, which is not supported")),
            },
            Some(_) => None,
        };
        number.map(Some).ok_or_else(|| self.fail(key, "must be a whole number"))
    }

    fn integer(&self, key: &str) -> Result<i64, GgufError> {
        self.integer_opt(key)?.ok_or_else(|| self.missing(key))
    }

    fn heads(&self, key: &str) -> Result<i32, GgufError> {
        let heads = match self.integer_opt(key)? {
            Some(heads) => heads,
            None => self.integer("attention.head_count")?,
        };
        i32::try_from(heads).ok().filter(|h| *h > 0).ok_or_else(|| self.fail(key, "must be 1 or more"))
    }

    fn float_opt(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(Value::Integer(n)) => Ok(Some(*n as f64)),
            Some(_) => Err(self.fail(key, "must be a number")),
        }
    }

    fn float(&self, key: &str) -> Result<f64, GgufError> {
        self.float_opt(key)?.ok_or_else(|| self.missing(key))
    }

    fn layers(&self) -> Result<i64, GgufError> {
        match self.integer("block_count")? {
            layers @ 1..=MOST_LAYERS => Ok(layers),
            _ => Err(self.fail("block_count", format!("must be 1 to {MOST_LAYERS}"))),
        }
    }

    fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.header.tensors.iter().find(|t| t.name == name)
    }

    /// Rows of the embedding: the vocabulary, padding included.
    fn vocabulary(&self) -> Result<i32, GgufError> {
        let rows = self.tensor("token_embd.weight").and_then(|t| t.shape.first());
        rows.copied().ok_or_else(|| self.fail("vocab_size", "the file has no tensor token_embd.weight"))
    }

    /// Ids that end a sequence.
    fn end_ids(&self) -> Vec<i128> {
        let keys = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
        let mut ids = Vec::new();
        for key in keys {
            if let Some(Value::Integer(id)) = self.header.metadata.get(key)
                && !ids.contains(id)
            {
                ids.push(*id);
            }
        }
        ids
    }

    /// What all three architectures have.
    fn common(&self, model_type: &str, eps: &str) -> Result<Map<String, Json>, GgufError> {
        let mut config = Map::new();
        let mut set = |key: &str, value: Json| drop(config.insert(key.to_owned(), value));
        set("model_type", json!(model_type));
        set("num_hidden_layers", json!(self.layers()?));
        set("hidden_size", json!(self.integer("embedding_length")?));
        set("num_attention_heads", json!(self.integer("attention.head_count")?));
        set("max_position_embeddings", json!(self.integer("context_length")?));
        set("vocab_size", json!(self.vocabulary()?));
        set(eps, json!(self.float("attention.layer_norm_rms_epsilon")?));
        set("rope_theta", json!(self.float_opt("rope.freq_base")?.unwrap_or(10_000.0)));
        Ok(config)
    }

    /// Width of a head, where the file says it; keys, values and the rotated part must agree.
    fn head_dim(&self) -> Result<Option<i64>, GgufError> {
        let width = self.integer_opt("attention.key_length")?;
        let rotated = self.integer_opt("rope.dimension_count")?;
        for (key, other) in [
            ("attention.value_length", self.integer_opt("attention.value_length")?),
            ("rope.dimension_count", rotated),
        ] {
            if let (Some(width), Some(other)) = (width, other)
                && width != other
            {
                return Err(
                    self.fail(key, format!("{other} differs from the keys' {width}, which is not supported"))
                );
            }
        }
        Ok(width.or(rotated))
    }

    fn tied(&self) -> bool {
        self.tensor("output.weight").is_none()
    }

    /// The kind of rotary scaling, `none` where there is none.
    fn rope_scaling(&self) -> Result<&str, GgufError> {
        if self.get("rope.scaling.type").is_some() { self.text("rope.scaling.type") } else { Ok("none") }
    }

    fn plain_rope(&self) -> Result<(), GgufError> {
        match self.rope_scaling()? {
            "none" => Ok(()),
            other => Err(self.fail("rope.scaling.type", format!("{other:?} is not supported"))),
        }
    }
}

fn llama(m: &Metadata<'_>) -> Result<Map<String, Json>, GgufError> {
    if m.integer_opt("expert_count")?.is_some_and(|n| n > 0) {
        return Err(m.fail("expert_count", "llama with experts is not supported"));
    }
    let mut config = m.common("llama", "rms_norm_eps")?;
    let mut set = |key: &str, value: Json| drop(config.insert(key.to_owned(), value));
    set("intermediate_size", json!(m.integer("feed_forward_length")?));
    set("num_key_value_heads", json!(m.heads("attention.head_count_kv")?));
    set("head_dim", json!(m.head_dim()?));
    set("tie_word_embeddings", json!(m.tied()));
    set("attention_bias", json!(m.tensor("blk.0.attn_q.bias").is_some()));
    set("mlp_bias", json!(m.tensor("blk.0.ffn_gate.bias").is_some()));
    let scaling = match (m.rope_scaling()?, m.tensor(ROPE_FACTORS)) {
        ("none", None) => Json::Null,
        ("none", Some(tensor)) => {
            let read = |source| GgufError::Read { path: m.path.to_owned(), source };
            let file = File::open(m.path).map_err(read)?;
            if tensor.kind.bits().is_some() {
                return Err(m.fail(ROPE_FACTORS, "must be floats"));
            }
            json!({ "type": "factors", "factors": convert::floats(m.path, &file, tensor, None)?.to_f32() })
        }
        ("linear", None) => json!({ "type": "linear", "factor": m.float("rope.scaling.factor")? }),
        (other, _) => return Err(m.fail("rope.scaling.type", format!("{other:?} is not supported"))),
    };
    set("rope_scaling", scaling);
    Ok(config)
}

fn qwen3moe(m: &Metadata<'_>) -> Result<Map<String, Json>, GgufError> {
    m.plain_rope()?;
    let mut config = m.common("qwen3_moe", "rms_norm_eps")?;
    let mut set = |key: &str, value: Json| drop(config.insert(key.to_owned(), value));
    let inner = m.integer("expert_feed_forward_length")?;
    // No layer is dense, so the dense width is never used; some files have 0 there.
    let dense = m.integer_opt("feed_forward_length")?.filter(|n| *n > 0).unwrap_or(inner);
    set("intermediate_size", json!(dense));
    set("moe_intermediate_size", json!(inner));
    set("num_key_value_heads", json!(m.heads("attention.head_count_kv")?));
    set("head_dim", json!(m.head_dim()?.ok_or_else(|| m.missing("attention.key_length"))?));
    set("num_experts", json!(m.integer("expert_count")?));
    set("num_experts_per_tok", json!(m.integer("expert_used_count")?));
    set("norm_topk_prob", json!(true));
    set("decoder_sparse_step", json!(1));
    set("mlp_only_layers", json!([]));
    set("tie_word_embeddings", json!(m.tied()));
    if m.float_opt("expert_weights_scale")?.is_some_and(|s| s != 0.0 && s != 1.0) {
        return Err(m.fail("expert_weights_scale", "must be 1"));
    }
    Ok(config)
}

fn lfm2moe(m: &Metadata<'_>) -> Result<Map<String, Json>, GgufError> {
    m.plain_rope()?;
    // Layers without key/value heads are convolutions.
    let key = "attention.head_count_kv";
    let kv_heads = match m.get(key) {
        Some(Value::Integers(list)) => list.clone(),
        Some(Value::Integer(n)) => vec![*n as i64; m.layers()? as usize],
        Some(_) => return Err(m.fail(key, "must be a list of whole numbers")),
        None => return Err(m.missing(key)),
    };
    let heads = kv_heads.iter().copied().find(|n| *n != 0).unwrap_or(1);
    if kv_heads.len() as i64 != m.layers()? || kv_heads.iter().any(|n| *n != 0 && *n != heads) {
        return Err(m.fail(key, "must have one number a layer, 0 or the same for all"));
    }
    let sigmoid = 2;
    if m.integer_opt("expert_gating_func")?.is_some_and(|f| f != sigmoid) {
        return Err(m.fail("expert_gating_func", "must be 2 (sigmoid)"));
    }
    let mut config = m.common("lfm2_moe", "norm_eps")?;
    let mut set = |key: &str, value: Json| drop(config.insert(key.to_owned(), value));
    let kind = |n: &i64| if *n == 0 { "conv" } else { "full_attention" };
    set("layer_types", json!(kv_heads.iter().map(kind).collect::<Vec<_>>()));
    set("num_key_value_heads", json!(heads));
    set("intermediate_size", json!(m.integer("feed_forward_length")?));
    set("moe_intermediate_size", json!(m.integer("expert_feed_forward_length")?));
    set("num_dense_layers", json!(m.integer_opt("leading_dense_block_count")?.unwrap_or(0)));
    set("num_experts", json!(m.integer("expert_count")?));
    set("num_experts_per_tok", json!(m.integer("expert_used_count")?));
    set("norm_topk_prob", json!(true));
    let bias = |t: &GgufTensor| t.name.ends_with(".exp_probs_b.bias");
    set("use_expert_bias", json!(m.header.tensors.iter().any(bias)));
    // llama.cpp takes 0 for no scale.
    let scale = m.float_opt("expert_weights_scale")?.filter(|s| *s != 0.0).unwrap_or(1.0);
    set("routed_scaling_factor", json!(scale));
    set("conv_L_cache", json!(m.integer("shortconv.l_cache")?));
    set("conv_bias", json!(false));
    Ok(config)
}
