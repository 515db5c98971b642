//! Qwen3-Next and Qwen3.5: published layouts of their checkpoints, and configurations that cannot be.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use tempfile::TempDir;
use zmlx_mlx::{Array, Dtype, io, ops};
use zmlx_models::{
    DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, PatchOptions, Session,
};

type Weights = BTreeMap<String, Array>;

const NEXT: &str = "qwen3_next-q4";
const MOE: &str = "qwen3_5_moe-q4";
const DENSE: &str = "qwen3_5-q4";

fn committed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(name)
}

fn read(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A copy of a model with other weights and another configuration.
fn changed(name: &str, weights: impl FnOnce(&mut Weights), config: impl FnOnce(&mut Json)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = committed(name);
    let mut json = read(&from.join("config.json"));
    config(&mut json);
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    let mut arrays = io::load_safetensors(from.join("model.safetensors")).unwrap();
    weights(&mut arrays);
    io::save_safetensors(dir.path().join("model.safetensors"), &arrays, &BTreeMap::new()).unwrap();
    dir
}

/// Stock and patched, the model gives the tokens that the one called `name` gives.
#[track_caller]
fn gives_the_tokens_of(dir: &Path, name: &str) {
    let golden = read(&committed(name).join("golden.json"));
    let default = PatchOptions { environment: false, ..PatchOptions::default() };
    for patch in [None, Some(default)] {
        let options = LoadOptions {
            dtype: DtypeChoice::F32,
            device: DeviceChoice::Cpu,
            patch,
            ..LoadOptions::default()
        };
        let model = Model::load(dir, &options, &mut |_| {}).unwrap();
        for case in golden["f32"].as_array().unwrap() {
            let ids = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
            let (prompt, tokens) = (ids("prompt"), ids("tokens"));
            let options =
                GenerateOptions { max_tokens: tokens.len(), ignore_eos: true, ..Default::default() };
            let done = Session::new(&model).generate(&prompt, &options, &mut |_| Flow::Continue).unwrap();
            assert_eq!(done.tokens, tokens, "{name} patched: {}", model.is_patched());
        }
    }
}

/// Norms without their 1 and kernels `[C, 1, K]`, as training code has them.
fn as_published(weights: &mut Weights) {
    let norms = ["input_layernorm", "post_attention_layernorm", "model.norm", "q_norm", "k_norm"];
    for (name, array) in weights.iter_mut() {
        if norms.iter().any(|norm| name.ends_with(&format!("{norm}.weight"))) {
            *array = array.astype(Dtype::Float32).unwrap().add_scalar(-1.0).unwrap();
        } else if name.ends_with("conv1d.weight") {
            *array = array.transpose(&[0, 2, 1]).unwrap().contiguous().unwrap();
        }
    }
    // What predicts further tokens.
    let one = Array::from_slice(&[1.0f32; 4], &[4]).unwrap();
    weights.insert("mtp.layers.0.input_layernorm.weight".to_owned(), one);
}

fn rename(weights: &mut Weights, new_name: impl Fn(&str) -> String) {
    *weights = std::mem::take(weights).into_iter().map(|(name, array)| (new_name(&name), array)).collect();
}

/// Takes the matrix at `path` out and gives it unpacked.
fn unpacked(weights: &mut Weights, path: &str) -> Array {
    let [w, scales, biases] =
        ["weight", "scales", "biases"].map(|part| weights.remove(&format!("{path}.{part}")).unwrap());
    // As the model has them when it runs in float32.
    let [scales, biases] = [scales, biases].map(|array| array.astype(Dtype::Float32).unwrap());
    ops::dequantize(&w, &scales, Some(&biases), Some(64), Some(4), "affine", None, None).unwrap()
}

#[test]
fn experts_that_are_apart_mark_a_published_qwen3_next() {
    let dir = changed(
        NEXT,
        |weights| {
            as_published(weights);
            for (name, array) in std::mem::take(weights) {
                if !name.contains("switch_mlp") {
                    weights.insert(name, array);
                    continue;
                }
                for (expert, one) in array.split(4, 0).unwrap().into_iter().enumerate() {
                    let name = name.replace("switch_mlp", &format!("experts.{expert}"));
                    weights.insert(name, one.squeeze(&[0]).unwrap().contiguous().unwrap());
                }
            }
        },
        |_| {},
    );
    gives_the_tokens_of(dir.path(), NEXT);
}

#[test]
fn a_published_qwen3_5_has_a_part_that_sees_and_experts_in_two_tensors() {
    let dir = changed(
        MOE,
        |weights| {
            as_published(weights);
            for layer in 0..4 {
                let mlp = format!("language_model.model.layers.{layer}.mlp");
                let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"]
                    .map(|name| unpacked(weights, &format!("{mlp}.switch_mlp.{name}")));
                let both = ops::concatenate(&[&gate, &up], 1).unwrap();
                weights.insert(format!("{mlp}.experts.gate_up_proj"), both);
                weights.insert(format!("{mlp}.experts.down_proj"), down);
            }
            rename(weights, |name| match name.strip_prefix("language_model.model.") {
                Some(rest) => format!("model.language_model.{rest}"),
                None => name.strip_prefix("language_model.").unwrap_or(name).to_owned(),
            });
            let one = Array::from_slice(&[1.0f32; 4], &[2, 2]).unwrap();
            weights.insert("model.visual.patch_embed.proj.weight".to_owned(), one);
        },
        |_| {},
    );
    gives_the_tokens_of(dir.path(), MOE);
}

#[test]
fn a_qwen3_5_that_only_reads_has_no_sections() {
    let dir = changed(
        DENSE,
        |weights| rename(weights, |name| name.strip_prefix("language_model.").unwrap().to_owned()),
        |config| {
            let mut text = config["text_config"].take();
            text["quantization"] = config["quantization"].take();
            text["model_type"] = json!("qwen3_5");
            *config = text;
        },
    );
    gives_the_tokens_of(dir.path(), DENSE);
}

#[test]
fn configurations_that_cannot_be() {
    type Edit = fn(&mut Json);
    fn text(config: &mut Json) -> &mut Json {
        &mut config["text_config"]
    }
    fn drop_key(config: &mut Json, key: &str) {
        config.as_object_mut().unwrap().remove(key);
    }
    let cases: [(&str, Edit, &[&str]); 24] = [
        (NEXT, |c| drop_key(c, "linear_num_value_heads"), &["linear_num_value_heads", "missing"]),
        (NEXT, |c| c["linear_num_value_heads"] = json!(3), &["linear_attn.out_proj", "384 columns"]),
        (
            NEXT,
            |c| c["linear_num_key_heads"] = json!(4),
            &["linear_num_value_heads", "2 value heads", "4 key"],
        ),
        (NEXT, |c| c["linear_conv_kernel_dim"] = json!(1), &["linear_conv_kernel_dim", "2 or more"]),
        (NEXT, |c| c["linear_key_head_dim"] = json!(16_777_216), &["in_proj_qkvz", "expected shape"]),
        (
            NEXT,
            |c| {
                c["linear_num_value_heads"] = json!(128);
                c["linear_value_head_dim"] = json!(16_777_216);
            },
            &["linear_num_value_heads", "too many"],
        ),
        (NEXT, |c| c["partial_rotary_factor"] = json!(0.001), &["partial_rotary_factor", "even"]),
        (NEXT, |c| c["partial_rotary_factor"] = json!(1.5), &["partial_rotary_factor", "from 2 to 256"]),
        (NEXT, |c| c["rope_scaling"] = json!({ "rope_type": "yarn" }), &["rope_scaling.factor", "missing"]),
        (NEXT, |c| c["full_attention_interval"] = json!(0), &["full_attention_interval"]),
        (NEXT, |c| c["full_attention_interval"] = json!(2), &["missing", "layers.1.self_attn"]),
        (
            NEXT,
            |c| c["layer_types"] = json!(["linear_attention", "full_attention"]),
            &["layer_types", "every 4th"],
        ),
        (NEXT, |c| c["num_experts_per_tok"] = json!(5), &["num_experts_per_tok", "5 of 4 experts"]),
        (NEXT, |c| c["num_experts"] = json!(8), &["mlp.gate", "expected shape"]),
        (
            NEXT,
            |c| drop_key(c, "shared_expert_intermediate_size"),
            &["shared_expert_intermediate_size", "missing"],
        ),
        (NEXT, |c| c["head_dim"] = json!(128), &["self_attn", "expected shape"]),
        (NEXT, |c| c["head_dim"] = json!(255), &["num_attention_heads", "even"]),
        (
            NEXT,
            |c| c["quantization"]["model.layers.1.mlp.gate"]["mode"] = json!("int4"),
            &["layers.1.mlp.gate", "int4"],
        ),
        (MOE, |c| c["text_config"] = json!(3), &["text_config", "an object"]),
        (MOE, |c| drop_key(text(c), "num_experts"), &["text_config.num_experts", "missing"]),
        (MOE, |c| drop_key(text(c), "rope_parameters"), &["text_config.rope_parameters", "missing"]),
        (
            MOE,
            |c| text(c)["rope_parameters"]["rope_theta"] = json!("x"),
            &["text_config.rope_parameters.rope_theta", "above 0"],
        ),
        (
            MOE,
            |c| text(c)["rope_parameters"]["type"] = json!("dynamic"),
            &["rope_parameters", "must be of type default"],
        ),
        (DENSE, |c| drop_key(text(c), "intermediate_size"), &["text_config.intermediate_size", "missing"]),
    ];
    for (name, edit, words) in cases {
        let dir = changed(name, |_| {}, edit);
        let error =
            Model::load(dir.path(), &LoadOptions::default(), &mut |_| {}).expect_err(words[0]).to_string();
        assert!(!error.contains('\n'), "{error}");
        words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in: {error}"));
    }
}

#[test]
fn a_tensor_of_experts_that_cannot_be_cut_is_named() {
    let dir = changed(
        MOE,
        |weights| {
            let odd = Array::from_slice(&[0.0f32; 3 * 4], &[1, 3, 4]).unwrap();
            weights.insert("model.language_model.layers.0.mlp.experts.gate_up_proj".to_owned(), odd);
        },
        |_| {},
    );
    let error = Model::load(dir.path(), &LoadOptions::default(), &mut |_| {}).unwrap_err().to_string();
    for word in ["experts.gate_up_proj", "equal parts", "[1, 3, 4]"] {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
}
