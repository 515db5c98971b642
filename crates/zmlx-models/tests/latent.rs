//! Families with latent attention: published wrappings of them, and configurations and checkpoints that cannot be, each of
//! which gets one clear error. Tokens and logits: `oracle.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value as Json, json};
use zmlx_mlx::{Array, Dtype, io};
use zmlx_models::{LoadOptions, Model, PatchOptions, inspect};

/// A copy of an oracle folder, to be changed.
fn copy(name: &str) -> tempfile::TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(name);
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::write(dir.path().join(file), fs::read(from.join(file)).unwrap()).unwrap();
    }
    dir
}

#[track_caller]
fn expect(dir: &Path, words: &[&str]) {
    let error = Model::load(dir, &LoadOptions::default(), &mut |_| {}).expect_err(words[0]).to_string();
    assert!(!error.contains('\n'), "{error}");
    words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in: {error}"));
}

fn without(config: &mut Json, key: &str) {
    config.as_object_mut().unwrap().remove(key).unwrap();
}

#[test]
fn configurations_that_cannot_be() {
    type Edit = fn(&mut Json);
    let glm = "glm4_moe_lite-q4";
    let cases: &[(&str, Edit, &[&str])] = &[
        (glm, |c| without(c, "kv_lora_rank"), &["config.json: kv_lora_rank is missing"]),
        (glm, |c| without(c, "q_lora_rank"), &["config.json: q_lora_rank is missing"]),
        (glm, |c| without(c, "n_routed_experts"), &["config.json: n_routed_experts is missing"]),
        (glm, |c| without(c, "first_k_dense_replace"), &["config.json: first_k_dense_replace is missing"]),
        (glm, |c| without(c, "rope_theta"), &["config.json: rope_theta is missing"]),
        (glm, |c| c["q_lora_rank"] = Json::Null, &["missing", "self_attn.q_proj"]),
        (glm, |c| c["n_shared_experts"] = Json::Null, &["extra", "shared_experts"]),
        (glm, |c| c["n_routed_experts"] = json!(7), &["mlp.gate.weight", "expected shape [7", "found [8"]),
        (glm, |c| c["n_routed_experts"] = json!("many"), &["n_routed_experts", "\"many\""]),
        (glm, |c| c["num_experts_per_tok"] = json!(9), &["num_experts_per_tok", "9 of 8 experts"]),
        (glm, |c| c["topk_method"] = json!("greedy"), &["topk_method", "\"greedy\"", "\"noaux_tc\""]),
        (glm, |c| c["scoring_func"] = json!("softmax"), &["scoring_func", "\"softmax\"", "\"sigmoid\""]),
        (glm, |c| c["hidden_act"] = json!("gelu"), &["hidden_act", "\"gelu\"", "\"silu\""]),
        (glm, |c| c["n_group"] = json!(3), &["n_group", "3 groups of 8 experts"]),
        (glm, |c| c["n_group"] = json!(8), &["n_group", "two or more"]),
        (glm, |c| c["topk_group"] = json!(2), &["topk_group", "2 of 1 groups"]),
        (glm, |c| c["moe_layer_freq"] = json!(0), &["moe_layer_freq", "from 1"]),
        (glm, |c| c["qk_rope_head_dim"] = json!(63), &["qk_rope_head_dim", "even"]),
        (glm, |c| c["qk_nope_head_dim"] = json!(128), &["embed_q", "3 groups", "128 columns"]),
        (glm, |c| c["v_head_dim"] = json!(128), &["expected shape"]),
        (glm, |c| c["qk_head_dim"] = json!(200), &["qk_head_dim", "200", "256 together"]),
        (
            glm,
            |c| c["num_attention_heads"] = json!(16_777_216),
            &["num_attention_heads", "too many to count"],
        ),
        (glm, |c| c["rope_interleave"] = json!(false), &["rope_interleave", "must be true"]),
        (glm, |c| c["partial_rotary_factor"] = json!(0.5), &["partial_rotary_factor", "0.5"]),
        (glm, |c| c["rope_scaling"] = json!({ "type": "dynamic", "factor": 2 }), &["rope_scaling"]),
        (glm, |c| c["num_hidden_layers"] = json!(4), &["missing", "model.layers.3."]),
        (glm, |c| c["num_hidden_layers"] = json!(4000), &["num_hidden_layers", "1024"]),
        (glm, |c| c["attention_bias"] = json!(true), &["missing", "q_a_proj.bias"]),
        (
            glm,
            |c| c["quantization"]["model.layers.0.self_attn.embed_q"] = json!({ "mode": "mxfp5" }),
            &["embed_q", "mxfp5"],
        ),
        ("kimi_k25-q4", |c| without(c, "text_config"), &["config.json: text_config is missing"]),
        ("kimi_k25-q4", |c| c["text_config"] = json!(3), &["text_config", "an object"]),
        (
            "kimi_k25-q4",
            |c| without(&mut c["text_config"], "kv_lora_rank"),
            &["config.json: text_config.kv_lora_rank is missing"],
        ),
        (
            "kimi_k25-q4",
            |c| c["text_config"]["topk_method"] = json!("greedy"),
            &["text_config.topk_method", "noaux_tc"],
        ),
        ("deepseek_v32-q4", |c| without(c, "index_topk"), &["config.json: index_topk is missing"]),
        ("deepseek_v32-q4", |c| c["index_head_dim"] = json!(32), &["index_head_dim", "qk_rope_head_dim"]),
        ("deepseek_v32-q4", |c| c["q_lora_rank"] = Json::Null, &["q_lora_rank", "indexer"]),
        ("deepseek_v32-q4", |c| c["index_n_heads"] = json!(2), &["expected shape"]),
        (
            "deepseek_v32-q4",
            |c| c["indexer_rope_interleave"] = json!(1),
            &["indexer_rope_interleave", "true or false"],
        ),
    ];
    for (name, edit, words) in cases {
        let dir = copy(name);
        let path = dir.path().join("config.json");
        let mut config: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut config);
        fs::write(path, config.to_string()).unwrap();
        expect(dir.path(), words);
    }
}

#[test]
fn published_layouts_that_are_damaged() {
    type Edit = fn(&mut BTreeMap<String, Array>);
    const KV: &str = "model.layers.0.self_attn.kv_b_proj";
    const DOWN: &str = "model.layers.1.mlp.experts.2.down_proj";
    fn zeros(shape: &[i32], dtype: Dtype) -> Array {
        zmlx_mlx::ops::zeros(shape, dtype).unwrap()
    }
    fn remove(tensors: &mut BTreeMap<String, Array>, name: &str) {
        tensors.remove(name).unwrap();
    }
    let cases: &[(&str, Edit, &[&str])] = &[
        ("deepseek_v3-fp8", |t| remove(t, &format!("{KV}.weight")), &["missing", KV]),
        (
            "deepseek_v3-fp8",
            |t| drop(t.insert(format!("{KV}.weight_scale_inv"), zeros(&[3, 3], Dtype::Float32))),
            &[KV, "expected shape [2, 1]", "found [3, 3]"],
        ),
        (
            "deepseek_v3-fp8",
            |t| drop(t.insert(format!("{KV}.weight"), zeros(&[256, 64], Dtype::Bfloat16))),
            &[KV, "8-bit floats", "BF16"],
        ),
        ("deepseek_v3-fp8", |t| remove(t, &format!("{KV}.weight_scale_inv")), &["embed_q", "U8"]),
        ("deepseek_v3-fp8", |t| remove(t, &format!("{DOWN}.weight")), &["missing", DOWN]),
        ("deepseek_v3-int4", |t| remove(t, &format!("{DOWN}.weight_scale")), &["missing", DOWN]),
        (
            "deepseek_v3-int4",
            |t| drop(t.insert(format!("{DOWN}.weight_packed"), zeros(&[128, 8], Dtype::Float32))),
            &[DOWN, "packed int32", "F32"],
        ),
        ("deepseek_v3-q4-whole-kv_b", |t| remove(t, &format!("{KV}.biases")), &["missing", KV]),
        (
            "deepseek_v3-q4-whole-kv_b",
            |t| drop(t.insert(format!("{KV}.weight"), zeros(&[128, 8], Dtype::Uint32))),
            &[KV, "expected shape [256, 8]", "found [128, 8]"],
        ),
        (
            "deepseek_v3-q4-whole-kv_b",
            |t| drop(t.insert(format!("{KV}.weight"), zeros(&[256, 7], Dtype::Uint32))),
            &[KV, "7 words a row"],
        ),
    ];
    for (name, edit, words) in cases {
        let dir = copy(name);
        let path = dir.path().join("model.safetensors");
        let mut tensors = io::load_safetensors(&path).unwrap();
        edit(&mut tensors);
        io::save_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
        expect(dir.path(), words);
    }
}

/// Kimi-K2.5 as it is published: DeepSeek-V3 with packed experts under another prefix, beside what sees images.
#[test]
fn the_text_part_of_a_model_that_sees_is_the_model() {
    let (plain, wrapped) = (copy("deepseek_v3-int4"), copy("deepseek_v3-int4"));
    let path = wrapped.path().join("model.safetensors");
    let tensors = io::load_safetensors(&path).unwrap();
    let mut renamed: BTreeMap<String, Array> =
        tensors.into_iter().map(|(name, array)| (format!("language_model.{name}"), array)).collect();
    for name in ["vision_tower.patch_embed.proj.weight", "mm_projector.linear_1.weight"] {
        renamed.insert(name.to_owned(), zmlx_mlx::ops::zeros(&[4, 4], Dtype::Bfloat16).unwrap());
    }
    io::save_safetensors(&path, &renamed, &BTreeMap::new()).unwrap();
    let path = wrapped.path().join("config.json");
    let mut text: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    text["model_type"] = json!("kimi_k2");
    fs::write(path, json!({ "model_type": "kimi_k25", "text_config": text }).to_string()).unwrap();

    let ids = [5, 17, 99, 3, 3, 64];
    let logits = |dir: &Path, patch: Option<PatchOptions>| {
        let model = Model::load(dir, &LoadOptions { patch, ..LoadOptions::default() }, &mut |_| {}).unwrap();
        model.run(&ids, &mut model.new_state()).unwrap().to_vec::<f32>().unwrap()
    };
    for patch in [None, Some(PatchOptions { environment: false, ..PatchOptions::default() })] {
        assert_eq!(logits(plain.path(), patch.clone()), logits(wrapped.path(), patch));
    }
    let [a, b] = [&plain, &wrapped].map(|dir| inspect(dir.path()).unwrap());
    assert_eq!((a.parameters_total, a.bytes_per_token), (b.parameters_total, b.bytes_per_token));
    assert_eq!(b.family, "kimi_k25");
}
