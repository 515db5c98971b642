//! Damaged, mismatched and hostile model folders, and bad options: each gets one clear error.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use zmlx_mlx::{Array, io};
use zmlx_models::{Flow, GenerateOptions, LoadOptions, Model, SamplerOptions, Session, inspect};

fn embedded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-lfm2-moe")
}

/// A copy of the embedded model to damage.
fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(embedded()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

fn load_error(dir: &Path) -> String {
    let error = Model::load(dir, &LoadOptions::default(), &mut |_| {}).expect_err("a damaged model");
    let text = error.to_string();
    assert!(!text.contains('\n'), "one line: {text}");
    text
}

fn expect(dir: &Path, words: &[&str]) {
    let text = load_error(dir);
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

fn edit_config(dir: &Path, edit: impl Fn(&mut Value)) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

fn edit_weights(dir: &Path, edit: impl Fn(&mut BTreeMap<String, Array>)) {
    let path = dir.join("model.safetensors");
    let mut arrays = io::load_safetensors(&path).unwrap();
    edit(&mut arrays);
    io::save_safetensors(&path, &arrays, &BTreeMap::new()).unwrap();
}

#[test]
fn folders_and_configurations() {
    expect(Path::new("/no/such/folder"), &["/no/such/folder"]);
    type Edit = fn(&mut Value);
    let cases: [(&str, Edit, &[&str]); 19] = [
        ("no family", |c| drop(c.as_object_mut().unwrap().remove("model_type")), &["model_type"]),
        ("unknown family", |c| c["model_type"] = json!("gpt5"), &["gpt5", "lfm2_moe"]),
        (
            "missing key",
            |c| drop(c.as_object_mut().unwrap().remove("hidden_size")),
            &["hidden_size", "missing"],
        ),
        ("negative", |c| c["num_hidden_layers"] = json!(-3), &["num_hidden_layers", "-3"]),
        ("huge", |c| c["vocab_size"] = json!(1u64 << 60), &["vocab_size"]),
        ("string", |c| c["num_experts"] = json!("many"), &["num_experts", "many"]),
        ("zero heads", |c| c["num_attention_heads"] = json!(0), &["num_attention_heads"]),
        ("heads do not divide", |c| c["num_attention_heads"] = json!(5), &["num_attention_heads"]),
        ("more experts used than there are", |c| c["num_experts_per_tok"] = json!(33), &["33 of 32"]),
        ("layer types", |c| c["layer_types"] = json!(["conv"]), &["layer_types", "6"]),
        ("unknown layer type", |c| c["layer_types"][0] = json!("mamba"), &["layer_types", "mamba"]),
        ("eps", |c| c["norm_eps"] = json!(0), &["norm_eps"]),
        ("layers", |c| c["num_hidden_layers"] = json!(1 << 20), &["num_hidden_layers", "1024"]),
        ("attention list", |c| c["full_attn_idxs"] = json!("x"), &["full_attn_idxs", "list"]),
        ("odd head", |c| c["hidden_size"] = json!(4 * 63), &["num_attention_heads", "even"]),
        ("eps out of range", |c| c["norm_eps"] = json!(1e308), &["norm_eps", "float32"]),
        ("method", |c| c["quantization"] = json!({"quant_method": "awq"}), &["awq", "convert"]),
        (
            "override",
            |c| c["quantization"]["model.embed_tokens"] = json!({"group_size": 7, "bits": 4}),
            &["model.embed_tokens", "groups of 7"],
        ),
        ("not quantised", |c| c["quantization"] = Value::Null, &[]),
    ];
    for (name, edit, words) in cases {
        let dir = copy();
        edit_config(dir.path(), edit);
        if name == "not quantised" {
            edit_config(dir.path(), |c| drop(c.as_object_mut().unwrap().remove("quantization_config")));
            expect(dir.path(), &["extra tensor", "scales"]);
            continue;
        }
        expect(dir.path(), words);
        assert_eq!(
            inspect(dir.path()).unwrap_err().to_string(),
            load_error(dir.path()),
            "{name}: info and load agree"
        );
    }
    let dir = copy();
    fs::write(dir.path().join("config.json"), "{\"model_type\": ").unwrap();
    expect(dir.path(), &["config.json", "not valid JSON"]);
    fs::write(dir.path().join("config.json"), "[1]").unwrap();
    expect(dir.path(), &["not a JSON object"]);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    expect(dir.path(), &["config.json", "not found"]);
}

#[test]
fn weights() {
    let norm = "model.layers.2.operator_norm.weight";
    let dir = copy();
    edit_weights(dir.path(), |w| drop(w.remove(norm)));
    expect(dir.path(), &["1 missing tensor", norm]);

    let dir = copy();
    edit_weights(dir.path(), |w| {
        drop(w.insert("stranger.weight".to_owned(), Array::scalar(1.0f32).unwrap()))
    });
    expect(dir.path(), &["1 extra tensor", "stranger.weight"]);

    let dir = copy();
    edit_weights(dir.path(), |w| {
        drop(w.insert(norm.to_owned(), Array::from_slice(&[0.0f32; 255], &[255]).unwrap()))
    });
    expect(dir.path(), &[norm, "expected shape [256]", "found [255]"]);

    let dir = copy();
    edit_weights(dir.path(), |w| {
        drop(w.insert(norm.to_owned(), Array::from_slice(&[0i32; 256], &[256]).unwrap()))
    });
    expect(dir.path(), &[norm, "I32"]);

    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1000]).unwrap();
    expect(dir.path(), &["model.safetensors"]);
    fs::write(&path, &whole[..100]).unwrap();
    expect(dir.path(), &["model.safetensors", "header"]);
    fs::write(&path, [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()).unwrap();
    expect(dir.path(), &["model.safetensors", "header"]);
    fs::remove_file(&path).unwrap();
    expect(dir.path(), &["no model*.safetensors"]);
}

#[test]
fn tokenizers_that_make_the_library_panic() {
    type Edit = fn(&mut Value);
    let cases: [(&str, Edit); 4] = [
        ("empty pattern", |t| {
            t["normalizer"] = json!({"type": "Replace", "pattern": {"String": ""}, "content": "b"})
        }),
        ("charsmap", |t| t["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": ""})),
        ("length 0", |t| t["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})),
        ("prefix", |t| t["model"]["continuing_subword_prefix"] = json!("zzz")),
    ];
    for (name, edit) in cases {
        let dir = copy();
        let path = dir.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        // Some are noticed when the file is read, some when it is used; none ends the process.
        let used = Model::load(dir.path(), &LoadOptions::default(), &mut |_| {})
            .map_err(|e| e.to_string())
            .and_then(|m| m.tokenizer().unwrap().encode("a story", true).map_err(|e| e.to_string()));
        assert!(used.is_err_and(|text| !text.contains('\n')), "{name}");
    }
    let dir = copy();
    let path = dir.path().join("tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("\"decoder\"", "\"dec\u{1}oder\"", 1)).unwrap();
    expect(dir.path(), &["tokenizer.json", "control character"]);
    #[cfg(unix)]
    {
        // A folder where a file should be stands for pipes and devices: none is opened.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        expect(dir.path(), &["tokenizer.json", "not a regular file"]);
    }
}

#[test]
fn sharded_and_published_layouts_load_too() {
    let whole = Model::load(&embedded(), &LoadOptions::default(), &mut |_| {}).unwrap();
    let tokens = |model: &Model| {
        let options = GenerateOptions { max_tokens: 12, ignore_eos: true, ..GenerateOptions::default() };
        Session::new(model).generate(&[1, 5, 9], &options, &mut |_| Flow::Continue).unwrap().tokens
    };

    // Two shards with an index.
    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let arrays = io::load_safetensors(&path).unwrap();
    let mut map = BTreeMap::new();
    let mut shards = [BTreeMap::new(), BTreeMap::new()];
    for (i, (name, array)) in arrays.into_iter().enumerate() {
        map.insert(name.clone(), format!("model-0000{}-of-00002.safetensors", i % 2 + 1));
        shards[i % 2].insert(name, array);
    }
    for (i, shard) in shards.iter().enumerate() {
        let file = dir.path().join(format!("model-0000{}-of-00002.safetensors", i + 1));
        io::save_safetensors(file, shard, &BTreeMap::new()).unwrap();
    }
    fs::remove_file(&path).unwrap();
    fs::write(dir.path().join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string())
        .unwrap();
    let sharded = Model::load(dir.path(), &LoadOptions::default(), &mut |_| {}).unwrap();
    assert_eq!(tokens(&sharded), tokens(&whole));

    // The names and layouts of the original release: w1, w2, w3, experts apart, kernels [C, 1, K].
    let dir = copy();
    edit_weights(dir.path(), |w| {
        for (name, array) in std::mem::take(w) {
            let renamed =
                name.replace("gate_proj.", "w1.").replace("down_proj.", "w2.").replace("up_proj.", "w3.");
            if renamed.contains("switch_mlp") {
                for (expert, one) in array.split(32, 0).unwrap().into_iter().enumerate() {
                    let name = renamed.replace("switch_mlp", &format!("experts.{expert}"));
                    w.insert(name, one.squeeze(&[0]).unwrap().contiguous().unwrap());
                }
            } else if renamed.ends_with("conv.conv.weight") {
                w.insert(renamed, array.transpose(&[0, 2, 1]).unwrap().contiguous().unwrap());
            } else {
                w.insert(renamed, array);
            }
        }
    });
    let published = Model::load(dir.path(), &LoadOptions::default(), &mut |_| {}).unwrap();
    assert_eq!(tokens(&published), tokens(&whole));
    assert_eq!(published.info().parameters_total, whole.info().parameters_total);
    assert_eq!(published.info().bytes_per_token, whole.info().bytes_per_token);
}

#[test]
fn counts_are_those_of_the_configuration() {
    let info = inspect(&embedded()).unwrap();
    // Embedding (also the head), 4 convolution and 2 attention mixers, 1 dense and 5 expert feed-forwards, norms.
    let (d, v) = (256u64, 4096u64);
    let conv = d * 3 * d + 3 * d + d * d;
    let attention = d * d + 2 * d * 128 + d * d + 2 * 64;
    let expert = 3 * d * 128;
    let shared = v * d + 4 * conv + 2 * attention + 3 * d * 768 + 5 * (32 * d + 32) + 13 * d;
    assert_eq!(info.parameters_total, shared + 5 * 32 * expert);
    assert_eq!(info.parameters_active, shared + 5 * 4 * expert);
    let weights: u64 = info.quantization.iter().map(|q| q.bytes).sum();
    assert_eq!(weights, info.file_bytes, "every byte of the file belongs to a weight");
    assert_eq!((info.layers.len(), info.experts), (6, Some((32, 4))));
}

#[test]
fn prompts_and_options() {
    let model = Model::load(&embedded(), &LoadOptions::default(), &mut |_| {}).unwrap();
    let run = |prompt: &[u32], options: &GenerateOptions| {
        Session::new(&model).generate(prompt, options, &mut |_| Flow::Continue)
    };
    let plain = GenerateOptions { max_tokens: 3, ..GenerateOptions::default() };
    let with = |sampler: SamplerOptions| GenerateOptions { sampler, ..plain.clone() };
    let base = SamplerOptions::default;
    let cases: Vec<(Vec<u32>, GenerateOptions, &str)> = vec![
        (vec![], plain.clone(), "empty"),
        (vec![4096], plain.clone(), "4096 is outside the vocabulary (0 to 4095)"),
        (vec![1; 2048], plain.clone(), "2048 tokens"),
        (vec![1], GenerateOptions { max_tokens: 0, ..plain.clone() }, "max_tokens"),
        (vec![1], GenerateOptions { prefill_chunk: 0, ..plain.clone() }, "prefill_chunk"),
        (vec![1], with(SamplerOptions { temperature: -1.0, ..base() }), "temperature"),
        (vec![1], with(SamplerOptions { temperature: f64::NAN, ..base() }), "temperature"),
        (vec![1], with(SamplerOptions { top_p: 0.0, ..base() }), "top_p"),
        (vec![1], with(SamplerOptions { min_p: 1.5, ..base() }), "min_p"),
        (vec![1], with(SamplerOptions { repetition_penalty: 0.0, ..base() }), "repetition_penalty"),
        (vec![1], with(SamplerOptions { logit_bias: vec![(9999, 1.0)], ..base() }), "9999"),
        (vec![1], with(SamplerOptions { logit_bias: vec![(1, f32::NAN)], ..base() }), "logit_bias"),
        (vec![1], GenerateOptions { stop: vec![String::new()], ..plain.clone() }, "stop"),
    ];
    for (prompt, options, words) in cases {
        let text = run(&prompt, &options).expect_err(words).to_string();
        assert!(text.contains(words), "{words:?} is not in: {text}");
    }
    // The context ends generation, it does not break it.
    let long = GenerateOptions { max_tokens: 50, ignore_eos: true, ..GenerateOptions::default() };
    assert_eq!(run(&[1; 2040], &long).unwrap().tokens.len(), 8);
}

#[test]
fn damaged_weights_are_not_taken_for_text() {
    let dir = copy();
    edit_weights(dir.path(), |w| {
        let nan = Array::from_slice(&[f32::NAN; 256], &[256]).unwrap();
        w.insert("model.embedding_norm.weight".to_owned(), nan);
    });
    let model = Model::load(dir.path(), &LoadOptions::default(), &mut |_| {}).unwrap();
    let done = Session::new(&model).generate(&[1], &GenerateOptions::default(), &mut |_| Flow::Continue);
    assert!(done.unwrap_err().to_string().contains("not a number"));
}
