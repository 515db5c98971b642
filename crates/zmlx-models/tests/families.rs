//! Configurations that cannot be, and layouts of published checkpoints. Tokens and logits of each family: `oracle.rs`.

mod folders;

use folders::{check, copy, edit_config, refused};
use serde_json::{Value as Json, json};
use zmlx_mlx::{Array, Dtype, io, ops};
use zmlx_models::{LoadOptions, Model};

#[test]
fn configurations_that_cannot_be() {
    type Edit = fn(&mut Json);
    let cases: [(&str, Edit, &[&str]); 39] = [
        (
            "llama-q4",
            |c| c["rope_scaling"] = json!({ "rope_type": "dynamic", "factor": 4 }),
            &["rope_scaling", "llama3"],
        ),
        ("llama-q4", |c| c["rope_scaling"] = json!({ "type": 3 }), &["rope_scaling"]),
        (
            "llama-q4",
            |c| c["rope_scaling"] = json!({ "type": "linear" }),
            &["rope_scaling.factor", "missing"],
        ),
        ("llama-q4", |c| c["rope_scaling"]["factor"] = json!(0), &["rope_scaling.factor", "above 0"]),
        ("llama-q4", |c| c["rope_scaling"]["low_freq_factor"] = json!("x"), &["low_freq_factor"]),
        (
            "llama-q4",
            |c| c["rope_scaling"] = json!({ "type": "factors", "factors": [1, 2] }),
            &["factors", "half"],
        ),
        ("llama-q4", |c| c["layer_types"] = json!(["full_attention", "sliding_attention"]), &["sliding"]),
        ("llama-q4", |c| c["num_key_value_heads"] = json!(3), &["divide"]),
        ("llama-q4", |c| c["head_dim"] = json!(63), &["even"]),
        (
            "llama-q4",
            |c| {
                c["num_attention_heads"] = json!(256);
                c["head_dim"] = json!(16_777_216);
            },
            &["too many"],
        ),
        ("llama-q4", |c| c["num_hidden_layers"] = json!(100_000), &["1024"]),
        ("llama-q4", |c| c["attention_bias"] = json!(true), &["missing", "q_proj.bias"]),
        ("llama-q4", |c| c["mlp_bias"] = json!(1), &["mlp_bias", "true or false"]),
        ("llama-q4", |c| c["intermediate_size"] = json!(512), &["expected shape"]),
        ("qwen3_moe-q4", |c| c["decoder_sparse_step"] = json!(0), &["decoder_sparse_step"]),
        ("qwen3_moe-q4", |c| c["mlp_only_layers"] = json!([9]), &["mlp_only_layers", "layer numbers"]),
        ("qwen3_moe-q4", |c| c["mlp_only_layers"] = json!(1), &["mlp_only_layers", "list"]),
        ("qwen3_moe-q4", |c| c["mlp_only_layers"] = json!([1]), &["missing", "layers.1.mlp.gate_proj"]),
        ("qwen3_moe-q4", |c| c["num_experts_per_tok"] = json!(9), &["9 of 8 experts"]),
        ("qwen3_moe-q4", |c| c["rope_scaling"] = json!({ "rope_type": "yarn" }), &["rope_scaling", "plain"]),
        ("qwen3_moe-q4", |c| drop(c.as_object_mut().unwrap().remove("head_dim")), &["head_dim", "missing"]),
        ("qwen3_moe-q4", |c| c["num_experts"] = json!(-1), &["num_experts"]),
        ("gpt_oss-q4", |c| c["num_experts_per_tok"] = json!(5), &["num_experts_per_tok", "5 of 4 experts"]),
        ("gpt_oss-q4", |c| c["num_local_experts"] = json!(8), &["expected shape", "8"]),
        ("gpt_oss-q4", |c| c["layer_types"] = json!(["full_attention"]), &["layer_types", "4 times"]),
        ("gpt_oss-q4", |c| c["layer_types"][1] = json!("linear_attention"), &["layer_types", "sliding"]),
        ("gpt_oss-q4", |c| c["sliding_window"] = json!(0), &["sliding_window", "from 1"]),
        (
            "gpt_oss-q4",
            |c| drop(c.as_object_mut().unwrap().remove("sliding_window")),
            &["sliding_window", "missing"],
        ),
        ("gpt_oss-q4", |c| c["swiglu_limit"] = json!(5.0), &["swiglu_limit", "7"]),
        ("gpt_oss-q4", |c| c["attention_bias"] = json!(false), &["attention_bias", "true"]),
        ("gpt_oss-q4", |c| c["head_dim"] = json!(32), &["expected shape"]),
        ("gpt_oss-q4", |c| c["rope_scaling"]["factor"] = json!("x"), &["rope_scaling.factor", "number"]),
        ("gpt_oss-q4", |c| c["rope_theta"] = json!(1), &["rope_theta", "above 1"]),
        (
            "gpt_oss-q4",
            |c| c["quantization"]["model.layers.0.mlp.router"]["mode"] = json!("int4"),
            &["model.layers.0.mlp.router", "int4"],
        ),
        (
            "gemma3_text-q4",
            |c| drop(c.as_object_mut().unwrap().remove("hidden_size")),
            &["hidden_size", "missing"],
        ),
        ("gemma3_text-q4", |c| c["layer_types"] = json!(["full_attention"]), &["layer_types", "every 3th"]),
        ("gemma3_text-q4", |c| c["sliding_window_pattern"] = json!(0), &["sliding_window_pattern", "from 1"]),
        (
            "gemma3-q4",
            |c| drop(c.as_object_mut().unwrap().remove("text_config")),
            &["text_config", "missing"],
        ),
        (
            "gemma3-q4",
            |c| c["text_config"]["head_dim"] = json!("wide"),
            &["text_config.head_dim", "a whole number"],
        ),
    ];
    for (name, edit, words) in cases {
        let dir = copy(name);
        edit_config(dir.path(), edit);
        refused(dir.path(), words);
    }
}

#[test]
fn published_layouts_give_the_same_tokens() {
    // Experts apart.
    let dir = copy("qwen3_moe-q4");
    let path = dir.path().join("model.safetensors");
    let mut weights = io::load_safetensors(&path).unwrap();
    for (name, array) in std::mem::take(&mut weights) {
        if !name.contains("switch_mlp") {
            weights.insert(name, array);
            continue;
        }
        for (expert, one) in array.split(8, 0).unwrap().into_iter().enumerate() {
            let name = name.replace("switch_mlp", &format!("experts.{expert}"));
            weights.insert(name, one.squeeze(&[0]).unwrap().contiguous().unwrap());
        }
    }
    io::save_safetensors(&path, &weights, &Default::default()).unwrap();
    check(dir.path());

    // Frequencies that nobody reads.
    let dir = copy("llama-q4");
    let path = dir.path().join("model.safetensors");
    let mut weights = io::load_safetensors(&path).unwrap();
    let odd = Array::from_slice(&[1.0f32; 32], &[32]).unwrap();
    weights.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), odd);
    io::save_safetensors(&path, &weights, &Default::default()).unwrap();
    check(dir.path());
}

/// GPT-OSS as OpenAI publishes it: bytes, gate and up in turns, and a section on quantization of another program.
#[test]
fn published_experts_in_mxfp4_give_the_same_tokens() {
    let dir = copy("gpt_oss-mxfp4");
    let path = dir.path().join("model.safetensors");
    let mut weights = io::load_safetensors(&path).unwrap();
    let experts: Vec<String> = weights.keys().filter(|n| n.contains(".experts.")).cloned().collect();
    let mut taken: std::collections::BTreeMap<String, Array> =
        experts.into_iter().map(|name| (name.clone(), weights.remove(&name).unwrap())).collect();
    let bytes = |words: Array| {
        let shape = words.shape().to_vec();
        let (rows, groups) = (shape[1], shape[2] / 4);
        words.view(Dtype::Uint8).unwrap().reshape(&[shape[0], rows, groups, 16]).unwrap()
    };
    for layer in 0..4 {
        let base = format!("model.layers.{layer}.mlp.experts");
        let mut take = |name: &str| taken.remove(&format!("{base}.{name}")).unwrap();
        let mut both = |part: &str| {
            let (gate, up) = (take(&format!("gate_proj.{part}")), take(&format!("up_proj.{part}")));
            let shape = [&gate.shape()[..1], &[2 * gate.shape()[1]], &gate.shape()[2..]].concat();
            ops::stack(&[&gate, &up], 2).unwrap().reshape(&shape).unwrap()
        };
        let new = [
            ("gate_up_proj_blocks", bytes(both("weight"))),
            ("gate_up_proj_scales", both("scales")),
            ("gate_up_proj_bias", both("bias")),
            ("down_proj_blocks", bytes(take("down_proj.weight"))),
            ("down_proj_scales", take("down_proj.scales")),
            ("down_proj_bias", take("down_proj.bias")),
        ];
        weights.extend(new.map(|(name, a)| (format!("{base}.{name}"), a.contiguous().unwrap())));
    }
    assert!(taken.is_empty(), "{:?}", taken.keys());
    io::save_safetensors(&path, &weights, &Default::default()).unwrap();
    edit_config(dir.path(), |c| {
        let section = json!({ "quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"] });
        c.as_object_mut().unwrap().remove("quantization");
        c["quantization_config"] = section;
    });
    check(dir.path());
    edit_config(dir.path(), |c| c["quantization_config"]["quant_method"] = json!("gptq"));
    let error = Model::load(dir.path(), &LoadOptions::default(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("gptq"), "{error}");
}

/// Gemma 3 with images, as newer checkpoints name its parts.
#[test]
fn newer_names_of_gemma3_give_the_same_tokens() {
    let dir = copy("gemma3-q4");
    let path = dir.path().join("model.safetensors");
    let old = io::load_safetensors(&path).unwrap();
    let mut weights: std::collections::BTreeMap<String, Array> = old
        .into_iter()
        .map(|(name, array)| {
            (format!("model.language_model.{}", name.strip_prefix("language_model.model.").unwrap()), array)
        })
        .collect();
    let image = Array::from_slice(&[1.0f32; 4], &[4]).unwrap();
    weights.insert("model.vision_tower.embeddings.weight".to_owned(), image.clone());
    weights.insert("model.multi_modal_projector.mm_soft_emb_norm.weight".to_owned(), image);
    io::save_safetensors(&path, &weights, &Default::default()).unwrap();
    check(dir.path());
}
