//! Every family's greedy tokens and first logits are mlx-lm's.
//!
//! `data/` holds small models with random weights, and what mlx-lm 0.32.2 on the CPU gives for them with every float
//! tensor cast to float32: prompts of 1, 11 and 80 tokens (the last takes the path that sorts expert rows), 32 tokens
//! each, and the margin between the two best logits of every step, never below 0.05. `ZMLX_ORACLE` may name a folder with
//! more of such models.

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use zmlx_mlx::{Array, io};
use zmlx_models::{
    DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, PatchOptions, Session, families,
};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn read(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Json) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The models of a folder that a family here can run, by name.
fn models(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    found.retain(|dir| {
        let config = dir.join("config.json");
        config.exists() && families::known().iter().any(|f| read(&config)["model_type"] == *f)
    });
    found.sort();
    found
}

/// Stock, and patched by the default preset.
#[track_caller]
fn check(dir: &Path) {
    let default = PatchOptions { environment: false, ..PatchOptions::default() };
    for patch in [None, Some(default)] {
        let options = LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, patch };
        let model = Model::load(dir, &options, &mut |_| {}).unwrap();
        if let Some(report) = model.patch_report() {
            assert!(report.native, "{}: {report}", dir.display());
        }
        check_model(&model, dir);
    }
}

#[track_caller]
fn check_model(model: &Model, dir: &Path) {
    let golden = read(&dir.join("golden.json"));
    let cases = golden["f32"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        // The engine's products take activations as 16-bit integers.
        let (form, bound) = if model.is_patched() { ("patched", 1e-2) } else { ("stock", 1e-3) };
        let name = format!("{} {form} after {} tokens", dir.display(), case["length"]);
        let (prompt, tokens): (Vec<u32>, Vec<u32>) = (numbers(&case["prompt"]), numbers(&case["tokens"]));

        let first = &case["modes"]["prefill"];
        let (ids, logits): (Vec<usize>, Vec<f32>) =
            (numbers(&first["top5_ids"]), numbers(&first["top5_logits"]));
        let all = model.run(&prompt, &mut model.new_state()).unwrap().to_vec::<f32>().unwrap();
        let row = &all[(prompt.len() - 1) * model.vocab_size()..];
        for (&id, &want) in ids.iter().zip(&logits) {
            assert!((row[id] - want).abs() < bound, "{name}: token {id}: {} instead of {want}", row[id]);
        }

        let options = GenerateOptions { max_tokens: tokens.len(), ignore_eos: true, ..Default::default() };
        let done = Session::new(model).generate(&prompt, &options, &mut |_| Flow::Continue).unwrap();
        assert_eq!(done.tokens, tokens, "{name}: margins {}", case["margins"]);
    }
}

#[test]
fn greedy_tokens_are_those_of_mlx_lm() {
    let committed = models(&data());
    assert_eq!(committed.len(), 2, "{committed:?}");
    for dir in committed {
        check(&dir);
    }
}

#[test]
fn more_models_where_they_are_at_hand() {
    let Some(folder) = std::env::var_os("ZMLX_ORACLE") else { return };
    let models = models(Path::new(&folder));
    assert!(!models.is_empty(), "{folder:?} holds no model of a known family");
    for dir in models {
        println!("{}", dir.display());
        check(&dir);
    }
}

/// A copy of one of the models in `data/`, to be changed.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(data().join(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::write(dir.path().join(path.file_name().unwrap()), std::fs::read(&path).unwrap()).unwrap();
    }
    dir
}

fn edit_config(dir: &Path, edit: impl FnOnce(&mut Json)) {
    let path = dir.join("config.json");
    let mut config = read(&path);
    edit(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn configurations_that_cannot_be() {
    type Edit = fn(&mut Json);
    let cases: [(&str, Edit, &[&str]); 22] = [
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
    ];
    for (name, edit, words) in cases {
        let dir = copy(name);
        edit_config(dir.path(), edit);
        let error =
            Model::load(dir.path(), &LoadOptions::default(), &mut |_| {}).expect_err(words[0]).to_string();
        assert!(!error.contains('\n'), "{error}");
        words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in: {error}"));
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
