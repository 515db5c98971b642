//! What models cost, counted without weights and compared with weights; and profiles of the embedded model.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use zmlx_models::random::MODELS;
use zmlx_models::{
    Blueprint, DeviceChoice, DtypeChoice, GenerateError, LoadError, LoadOptions, Model, ModelConfig,
    PatchOptions, Preset, ProfileOptions, SizesFrom, inspect,
};

fn embedded() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lfm2-moe"))
}

fn load_with(folder: &Path, patch: Option<PatchOptions>) -> Model {
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, patch, ..LoadOptions::default() };
    Model::load(folder, &options, &mut |_| {}).unwrap()
}

fn load(folder: &Path) -> Model {
    load_with(folder, None)
}

fn default_preset() -> PatchOptions {
    PatchOptions { environment: false, ..PatchOptions::default() }
}

fn fast_preset() -> PatchOptions {
    PatchOptions { preset: Preset::Fast, ..default_preset() }
}

fn only(patterns: &[&str]) -> PatchOptions {
    let patterns = patterns.iter().map(|p| (*p).to_owned()).collect();
    PatchOptions { patterns: Some(patterns), ..default_preset() }
}

/// The embedded model and two of those in `oracle/`.
fn small_models() -> [PathBuf; 3] {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle/");
    [embedded(), format!("{data}llama-q4").into(), format!("{data}qwen3_moe-q4").into()]
}

/// A published shape, quantised as 4-bit checkpoints are.
fn published(name: &str) -> Value {
    let model = MODELS.iter().find(|m| m.name == name).unwrap();
    let mut config = (model.config)();
    config["quantization"] = json!({"group_size": 64, "bits": 4});
    config
}

fn lfm2_8b() -> Value {
    published("lfm2_8b")
}

fn config(value: &Value) -> ModelConfig {
    ModelConfig::from_json(value.as_object().unwrap().clone())
}

#[test]
fn the_embedded_model_costs_what_was_counted() {
    let blueprint = Blueprint::read(&embedded()).unwrap();
    assert_eq!(blueprint.sizes, SizesFrom::Headers);
    let cost = blueprint.decode_cost(0).unwrap();
    let info = inspect(&embedded()).unwrap();
    assert_eq!(cost.total.weight_bytes, info.bytes_per_token);
    assert_eq!((cost.total.launches, cost.total.weight_bytes), (172, WEIGHT_BYTES));
    // Two attention layers of two key/value heads of 64, four convolutions that keep two of 256 channels.
    let (kv, conv) = (2 * 2 * 2 * 64 * 2, 4 * 2 * 256 * 2);
    assert_eq!((cost.total.state_read, cost.total.state_written), (kv + conv, kv + conv));
    let later = blueprint.decode_cost(1000).unwrap();
    assert_eq!(later.total.state_read, 1001 * kv + conv);
    assert_eq!(later.total.launches, 172);
    assert_eq!(later.total.weight_bytes, cost.total.weight_bytes);
}

/// Counted from the shapes: see `matrices_of_the_embedded_model`.
const WEIGHT_BYTES: u64 = 2_934_400;

/// 4 bits, and a scale and a bias of two bytes for each 64.
fn packed(rows: u64, columns: u64) -> u64 {
    rows * (columns / 2 + columns / 64 * 4)
}

#[test]
fn matrices_of_the_embedded_model() {
    // The router stays unquantised.
    let dense = |n: u64| n * 2;
    let conv = packed(768, 256) + dense(256 * 3) + packed(256, 256);
    let attention = 2 * packed(256, 256) + 2 * packed(128, 256) + 2 * dense(64);
    let mlp = 2 * packed(768, 256) + packed(256, 768);
    let experts = 4 * (2 * packed(128, 256) + packed(256, 128)) + dense(32 * 256) + 32 * 4;
    let norms = dense(256);
    let bytes = 4 * conv + 2 * attention + mlp + 5 * experts + (2 * 6 + 1) * norms + packed(4096, 256);
    assert_eq!(bytes, WEIGHT_BYTES);
}

/// 24 layers' parts and both ends: what a token takes patched, where stock MLX takes 172 kernels (167 in float32, where
/// scores are not cast).
#[test]
fn the_embedded_model_patched_costs_what_was_counted() {
    let patched = Blueprint::read(&embedded()).unwrap().patched(&default_preset()).unwrap();
    assert!(patched.report.native, "{}", patched.report);
    let cost = patched.decode_cost(0).unwrap();
    // A dense layer takes 4, a sparse one 7 with a convolution and 8 with attention (one of them packs the rows of its four
    // choices); embedding and head one each.
    assert_eq!(cost.total.launches, 4 + 3 * 7 + 2 * 8 + 2);
    assert_eq!(patched.report.launches_per_token, cost.total.launches);

    // Matrices as they are stored, vectors in float32. A norm is read by each op that has taken it in: router and experts.
    let floats = |n: u64| n * 4;
    let conv = packed(768, 256) + floats(256 * 3) + packed(256, 256);
    let attention = 2 * packed(256, 256) + 2 * packed(128, 256) + 2 * floats(64);
    let mlp = 2 * packed(768, 256) + packed(256, 768);
    let experts = 4 * (2 * packed(128, 256) + packed(256, 128)) + 32 * 256 * 2 + floats(32);
    let norms = 6 + 1 + 2 * 5 + 1;
    let bytes = 4 * conv + 2 * attention + mlp + 5 * experts + norms * floats(256) + packed(4096, 256);
    assert_eq!(cost.total.weight_bytes, bytes);

    // State in float32, else as stock.
    let (kv, conv) = (2 * 2 * 2 * 64 * 4, 4 * 2 * 256 * 4);
    assert_eq!((cost.total.state_read, cost.total.state_written), (kv + conv, kv + conv));
    let later = patched.decode_cost(1000).unwrap().total;
    assert_eq!((later.state_read, later.launches), (1001 * kv + conv, cost.total.launches));
    // With a cache in half precision.
    let half = Blueprint::read(&embedded()).unwrap().patched(&fast_preset()).unwrap();
    let later = half.decode_cost(1000).unwrap().total;
    assert_eq!((later.state_read, later.state_written), (1001 * kv / 2 + conv, kv / 2 + conv));
    assert_eq!((later.launches, later.weight_bytes), (cost.total.launches, bytes));
}

/// What is counted from the graph is what the executor does, and what it holds.
#[test]
fn counts_of_plans_are_those_of_loaded_models() {
    let some = [only(&["moe_mlp", "router"]), only(&["qkv_rope_append", "attention_out", "lm_head"])];
    let choices: Vec<PatchOptions> =
        some.into_iter().chain([default_preset(), fast_preset(), PatchOptions::none()]).collect();
    for folder in small_models() {
        let blueprint = Blueprint::read(&folder).unwrap();
        for options in &choices {
            let name = format!("{} {:?} {:?}", folder.display(), options.preset, options.patterns);
            let (plan, model) =
                (blueprint.patched(options).unwrap(), load_with(&folder, Some(options.clone())));
            let (planned, cost) = (plan.decode_cost(7).unwrap(), model.decode_cost(7).unwrap());
            assert_eq!(planned.total, cost.total, "{name}");
            assert_eq!(cost.total.launches, model.executor().launches_per_token(), "{name}");
            assert_eq!(plan.report, model.patch_report().unwrap(), "{name}");
            assert_eq!(plan.graph.nodes.len(), model.graph().nodes.len(), "{name}");
            assert_eq!(plan.weight_bytes, model.executor().weight_bytes(), "{name}");
        }
        let stock = load(&folder);
        let planned = blueprint.decode_cost_f32(7).unwrap();
        assert_eq!(planned.total, stock.decode_cost(7).unwrap().total);
        assert_eq!(planned.total.launches, stock.executor().launches_per_token());
    }
    assert_eq!(load(&embedded()).executor().launches_per_token(), 167);
}

/// Bytes a token and parameters, from the published shapes: 4 bits with scales and biases of two bytes make 4.5.
#[test]
fn published_shapes_read_what_they_are_known_to() {
    let known = [
        ("lfm2_8b", 0.88, 8.34),
        ("lfm2_24b", 1.31, 23.84),
        ("glm4_7_flash", 2.02, 29.94),
        ("qwen3_30b", 1.72, 30.53),
        ("qwen3_5_35b", 1.66, 34.66),
        ("qwen3_next_80b", 2.01, 79.67),
    ];
    for (name, gigabytes, billions) in known {
        let blueprint = Blueprint::from_config(&config(&published(name))).unwrap();
        assert_eq!(blueprint.sizes, SizesFrom::Config);
        let total = blueprint.decode_cost(0).unwrap().total;
        assert_eq!(total.weight_bytes, blueprint.info.bytes_per_token, "{name}");
        let found = (total.weight_bytes as f64 / 1e9, blueprint.info.parameters_total as f64 / 1e9);
        assert!((found.0 - gigabytes).abs() < 0.01, "{name}: {} GB", found.0);
        assert!((found.1 - billions).abs() < 0.01, "{name}: {} B", found.1);
    }
}

#[test]
fn caches_and_wide_scales_come_on_top() {
    let blueprint = Blueprint::from_config(&config(&lfm2_8b())).unwrap();
    let total = blueprint.decode_cost(0).unwrap().total;
    // Six layers of eight heads of 64, keys and values of two bytes.
    let later = blueprint.decode_cost(999).unwrap().total;
    assert_eq!(later.state_read - total.state_read, 999 * 6 * 2 * 8 * 64 * 2);
    // 4.5 bits become 5 where scales and biases are held in float32.
    let held = blueprint.decode_cost_f32(0).unwrap().total.weight_bytes as f64;
    assert!((held / total.weight_bytes as f64 - 5.0 / 4.5).abs() < 0.01, "{held}");
}

#[test]
fn a_configuration_alone_will_do_and_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), lfm2_8b().to_string()).unwrap();
    let blueprint = Blueprint::read(folder.path()).unwrap();
    assert_eq!((blueprint.sizes, blueprint.info.layers.len()), (SizesFrom::Config, 24));

    let mut overridden = lfm2_8b();
    overridden["quantization"]["model.embed_tokens"] = json!({"group_size": 32, "bits": 8});
    overridden["quantization"]["model.layers.0.conv.in_proj"] = json!(false);
    let other = Blueprint::from_config(&config(&overridden)).unwrap();
    let bytes = |b: &Blueprint, path: &str| {
        let place = b.graph.weights.iter().position(|w| w.path == path).unwrap();
        b.weight_bytes[place]
    };
    assert_eq!(bytes(&other, "model.embed_tokens"), 65536 * (2048 + 2048 / 32 * 4));
    assert_eq!(bytes(&other, "model.layers.0.conv.in_proj"), 3 * 2048 * 2048 * 2);
    assert_eq!(
        bytes(&other, "model.layers.1.conv.in_proj"),
        bytes(&blueprint, "model.layers.1.conv.in_proj")
    );

    let mut wrong = lfm2_8b();
    wrong["quantization"]["bits"] = json!(7);
    let error = Blueprint::from_config(&config(&wrong)).unwrap_err();
    assert!(matches!(error, LoadError::Quantization { .. }), "{error}");
    let mut unknown = lfm2_8b();
    unknown["model_type"] = json!("abacus");
    assert!(matches!(Blueprint::from_config(&config(&unknown)), Err(LoadError::UnknownFamily { .. })));
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Blueprint::read(empty.path()), Err(LoadError::ConfigFile { .. })));
}

#[test]
fn loaded_weights_are_as_large_as_planned() {
    for folder in small_models() {
        let model = load(&folder);
        let blueprint = Blueprint::read(&folder).unwrap();
        let name = folder.display();
        assert_eq!(model.executor().weight_bytes(), blueprint.graph.weight_bytes(model.dtype()), "{name}");
        let total = blueprint.decode_cost(0).unwrap().total;
        assert_eq!(total.weight_bytes, blueprint.info.bytes_per_token, "{name}");
    }
}

#[test]
fn a_profile_covers_the_step() {
    let model = load(&embedded());
    let options = ProfileOptions { prompt_tokens: 8, steps: 3, bandwidth: 10e9 };
    let found = model.profile(&options).unwrap();
    let graph = model.executor().graph();
    assert_eq!(found.profile.seconds.len(), graph.nodes.len());
    assert_eq!((found.dtype, found.device.as_str()), ("float32", "cpu"));
    // The prompt, then twice four steps; the last of them is the position's own.
    assert_eq!(found.position, 8 + 2 * 4 - 1);
    assert!(found.step_seconds > 0.0);
    let report = &found.report;
    assert_eq!(report.total.nodes, graph.nodes.len());
    assert_eq!(report.by_op.iter().map(|r| r.nodes).sum::<usize>(), graph.nodes.len());
    assert!((report.total.seconds - found.profile.total()).abs() < 1e-9);
    assert!(found.svg.contains("expert_linear") && found.svg.contains("model.layers.5"));
}

#[test]
fn a_profile_of_a_patched_model_shares_the_step_among_fused_ops() {
    let model = load_with(&embedded(), Some(default_preset()));
    let options = ProfileOptions { prompt_tokens: 8, steps: 3, bandwidth: 10e9 };
    let found = model.profile(&options).unwrap();
    let graph = model.graph();
    assert!(found.profile.seconds.iter().all(|s| *s > 0.0), "{:?}", found.profile.seconds);
    assert_eq!(found.report.total.nodes, graph.nodes.len());
    let bytes = model.decode_cost(found.position).unwrap().total.memory_bytes();
    assert_eq!(found.report.total.bytes, bytes);
    let moe = found.report.by_op.iter().find(|r| r.name == "moe_mlp").unwrap();
    let rate = moe.bytes as f64 / moe.seconds;
    assert_eq!((moe.nodes, moe.bytes_per_second, moe.roofline), (5, Some(rate), Some(rate / 10e9)));
    assert!(moe.bytes > 5 * 4 * 3 * 128 * 256 / 2);
    for word in ["moe_mlp", "attention_out", "model.layers.5", "#ffb766"] {
        assert!(found.svg.contains(word), "{word}");
    }
}

#[test]
fn what_cannot_be_profiled_is_said() {
    let model = load(&embedded());
    let fine = ProfileOptions { prompt_tokens: 8, steps: 1, bandwidth: 1e9 };
    for (options, name) in [
        (ProfileOptions { steps: 0, ..fine }, "steps"),
        (ProfileOptions { prompt_tokens: 0, ..fine }, "prompt_tokens"),
        (ProfileOptions { bandwidth: 0.0, ..fine }, "bandwidth"),
        (ProfileOptions { bandwidth: f64::NAN, ..fine }, "bandwidth"),
    ] {
        match model.profile(&options) {
            Err(GenerateError::Option { name: found, .. }) => assert_eq!(found, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    for options in [
        ProfileOptions { prompt_tokens: 2045, ..fine },
        ProfileOptions { prompt_tokens: usize::MAX, ..fine },
        ProfileOptions { steps: usize::MAX, ..fine },
    ] {
        assert!(matches!(model.profile(&options), Err(GenerateError::PromptTooLong { context: 2048, .. })));
    }
}
