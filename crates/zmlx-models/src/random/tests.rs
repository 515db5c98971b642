use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value as Json, json};
use zmlx_mlx::{Array, Dtype, io, ops};

use super::*;
use crate::{GenerateOptions, LoadOptions, Model, Session, inspect};

/// The shapes of an entry, few layers and small.
fn small(name: &str) -> Json {
    let mut whole = (MODELS.iter().find(|m| m.name == name).unwrap().config)();
    let nested = whole.get("text_config").is_some();
    let config = if nested { &mut whole["text_config"] } else { &mut whole };
    // One layer of attention among delta nets.
    let layers = if config.get("full_attention_interval").is_some() { 4 } else { 3 };
    for (key, value) in [
        ("vocab_size", 512),
        ("num_hidden_layers", layers),
        ("intermediate_size", 128),
        ("moe_intermediate_size", 64),
        ("block_ff_dim", 384),
        ("num_local_experts", 4),
        ("n_routed_experts", 16),
    ] {
        if config.get(key).is_some() {
            config[key] = json!(value);
        }
    }
    if let Some(attention) = config.get_mut("full_attn_idxs") {
        *attention = json!([2]);
    }
    if config.get("num_experts").is_some_and(|n| n.as_u64() > Some(128)) {
        config["num_experts"] = json!(16);
    }
    // The largest have to be narrow too.
    if config.get("kv_lora_rank").is_some() && config["hidden_size"].as_u64() > Some(4096) {
        let sizes = [("hidden_size", 512), ("intermediate_size", 1024), ("n_routed_experts", 16)];
        for (key, value) in
            [("num_attention_heads", 4), ("first_k_dense_replace", 1)].into_iter().chain(sizes)
        {
            config[key] = json!(value);
        }
    }
    if let Some(types) = config.get_mut("layer_types").and_then(Json::as_array_mut) {
        types.truncate(3);
    }
    whole
}

fn write(name: &str, dir: &Path, options: &RandomOptions) -> RandomModel {
    write_model(&small(name), dir, options, &mut |_, _| Flow::Continue).unwrap()
}

fn read(dir: &Path) -> BTreeMap<String, Array> {
    io::load_safetensors(dir.join("model.safetensors")).unwrap().into_iter().collect()
}

#[test]
fn every_model_loads_and_runs() {
    for model in MODELS {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("model");
        let written = write(model.name, &dir, &RandomOptions::default());
        let info = inspect(&dir).unwrap();
        assert_eq!(info.parameters_total, written.parameters, "{}", model.name);
        assert_eq!(info.file_bytes, written.bytes, "{}", model.name);
        let loaded = Model::load(&dir, &LoadOptions::default(), &mut |_| {}).unwrap();
        let options = GenerateOptions { max_tokens: 3, ignore_eos: true, ..GenerateOptions::default() };
        let done = Session::new(&loaded).generate(&[1, 17, 5], &options, &mut |_| Flow::Continue).unwrap();
        assert_eq!(done.tokens.len(), 3, "{}", model.name);
    }
}

#[test]
fn published_sizes() {
    // Parameters and bytes at 4 bits in groups of 64, counted by hand from the configurations: packed matrices take 4.5
    // bits a parameter, routers 8.5, norms and kernels 16, expert biases 32.
    let size = |name: &str| {
        let model = MODELS.iter().find(|m| m.name == name).unwrap();
        let (_, graph) = plan(&(model.config)(), &RandomOptions::default()).unwrap();
        let bytes = graph.weights.iter().flat_map(pool::tensors).map(|t| t.bytes).sum();
        (graph.weights.iter().map(|w| w.parameters()).sum(), bytes)
    };
    for (name, expected) in PUBLISHED {
        assert_eq!(size(name), expected, "{name}");
    }
}

const PUBLISHED: [(&str, (u64, u64)); 22] = [
    ("deepseek_v3", latent(&Latent { indexer: false, ..DEEPSEEK })),
    ("deepseek_v32", latent(&DEEPSEEK)),
    ("gemma3_1b", gemma3_1b()),
    ("glm45_air", glm45_air()),
    ("glm4_7_flash", latent(&GLM)),
    ("gpt_oss_20b", gpt_oss(24, 32)),
    ("gpt_oss_120b", gpt_oss(36, 128)),
    ("kimi_k25", latent(&KIMI)),
    ("lfm2_8b", lfm2_8b()),
    ("lfm2_1b", lfm2_1b()),
    ("lfm2_24b", lfm2_24b()),
    ("ministral3_3b", dense(26, 131_072, 3072, [4096, 1024], 9216, 0)),
    ("mistral_7b", dense(32, 2 * 32_768, 4096, [4096, 1024], 14_336, 0)),
    ("mixtral_8x7b", sparse(32, 32_000, 4096, [4096, 1024], [8, 14_336], 0)),
    ("olmoe_7b", sparse(16, 50_304, 2048, [2048, 2048], [64, 1024], 2048 + 2048)),
    ("phi3_mini", dense(32, 2 * 32_064, 3072, [3072, 3072], 8192, 0)),
    ("qwen25_05b", dense(24, 151_936, 896, [896, 128], 4864, 896 + 2 * 128)),
    ("qwen3_30b", qwen3_30b()),
    ("qwen3_4b", dense(36, 151_936, 2560, [4096, 1024], 9728, 2 * 128)),
    ("qwen3_5_35b", gated_delta(248_320, 40, 256)),
    ("qwen3_next_80b", gated_delta(151_936, 48, 512)),
    ("smollm2_135m", smollm2_135m()),
];

/// `n` layers of attention with queries and keys of those widths and a feed-forward part; `rows` of embedding and head
/// together, and `floats` a layer that are not packed, besides two norms.
const fn dense(n: u64, rows: u64, h: u64, [q, kv]: [u64; 2], inner: u64, floats: u64) -> (u64, u64) {
    let matrices = rows * h + n * (2 * h * q + 2 * h * kv + 3 * h * inner);
    let floats = n * (2 * h + floats) + h;
    (matrices + floats, matrices * 9 / 16 + floats * 2)
}

/// The same with experts of which a router in 4 bits chooses, and a head of its own.
const fn sparse(
    n: u64,
    v: u64,
    h: u64,
    heads: [u64; 2],
    [experts, inner]: [u64; 2],
    floats: u64,
) -> (u64, u64) {
    let (parameters, bytes) = dense(n, 2 * v, h, heads, experts * inner, floats);
    let routers = n * experts * h;
    (parameters + routers, bytes + routers * 9 / 16)
}

/// Its router is bfloat16, with a correction in float32; queries, keys and values have biases.
const fn glm45_air() -> (u64, u64) {
    let (h, n, q, kv) = (4096, 46, 96 * 128, 8 * 128);
    let experts = 3 * h * 1408 * 129;
    let matrices = 2 * 151_552 * h + n * (2 * h * q + 2 * h * kv) + 3 * h * 10_944 + 45 * experts;
    let (floats, corrections) = (n * (2 * h + q + 2 * kv) + h + 45 * 128 * h, 45 * 128);
    (matrices + floats + corrections, matrices * 9 / 16 + floats * 2 + corrections * 4)
}

const fn lfm2_1b() -> (u64, u64) {
    let (h, v) = (2048, 65_536);
    let (attention, conv) = (6 * (2 * h * 2048 + 2 * h * 512), 10 * (3 * h * h + h * h));
    let matrices = v * h + attention + conv + 16 * 3 * h * 8192;
    let floats = 6 * 2 * 64 + 10 * 3 * h + 16 * 2 * h + h;
    (matrices + floats, matrices * 9 / 16 + floats * 2)
}

/// Sizes of a model with latent attention, whose latents are 512 wide with rotary parts of 64.
struct Latent {
    vocabulary: u64,
    hidden: u64,
    layers: u64,
    dense_layers: u64,
    dense: u64,
    experts: u64,
    expert: u64,
    heads: u64,
    q_rank: u64,
    nope: u64,
    value: u64,
    /// 64 heads of 128.
    indexer: bool,
}

const DEEPSEEK: Latent = Latent {
    vocabulary: 129_280,
    hidden: 7168,
    layers: 61,
    dense_layers: 3,
    dense: 18_432,
    experts: 256,
    expert: 2048,
    heads: 128,
    q_rank: 1536,
    nope: 128,
    value: 128,
    indexer: true,
};

const KIMI: Latent =
    Latent { vocabulary: 163_840, dense_layers: 1, experts: 384, heads: 64, indexer: false, ..DEEPSEEK };

const GLM: Latent = Latent {
    vocabulary: 154_880,
    hidden: 2048,
    layers: 47,
    dense_layers: 1,
    dense: 10_240,
    experts: 64,
    expert: 1536,
    heads: 20,
    q_rank: 768,
    nope: 192,
    value: 256,
    indexer: false,
};

const fn latent(c: &Latent) -> (u64, u64) {
    let (h, n, sparse) = (c.hidden, c.layers, c.layers - c.dense_layers);
    let queries = h * c.q_rank + c.q_rank * c.heads * (c.nope + 64);
    let keys = h * (512 + 64) + c.heads * 512 * (c.nope + c.value);
    let indexer = if c.indexer { c.q_rank * 64 * 128 + h * 128 + h * 64 } else { 0 };
    let attention = queries + keys + indexer + c.heads * c.value * h;
    let feed_forward = c.dense_layers * 3 * h * c.dense + sparse * (c.experts + 1) * 3 * h * c.expert;
    let matrices = 2 * c.vocabulary * h + n * attention + feed_forward;
    // Routers are never quantised.
    let norms = n * (2 * h + c.q_rank + 512 + if c.indexer { 2 * 128 } else { 0 }) + h;
    let (floats, biases) = (sparse * c.experts * h + norms, sparse * c.experts);
    (matrices + floats + biases, matrices * 9 / 16 + floats * 2 + biases * 4)
}

#[test]
fn published_counts_of_models_with_latent_attention() {
    for (model, billions) in [(GLM, 29.94), (KIMI, 1026.41), (Latent { indexer: false, ..DEEPSEEK }, 671.03)]
    {
        let found = latent(&model).0 as f64 / 1e9;
        assert!((found - billions).abs() < 0.005, "{found} for {billions}");
    }
}

/// Layers in fours: three delta nets with 16 and 32 heads of 128, one of attention with 16 and 2 heads of 256.
const fn gated_delta(v: u64, n: u64, experts: u64) -> (u64, u64) {
    let (h, heads, inner) = (2048, 32, 512);
    let (attentions, nets) = (n / 4, n - n / 4);
    let channels = 2 * 16 * 128 + heads * 128;
    let net = h * channels + 2 * h * heads * 128 + 2 * h * heads;
    let attention = h * 2 * 16 * 256 + 2 * h * 2 * 256 + 16 * 256 * h;
    let matrices = 2 * v * h + nets * net + attentions * attention + n * (experts + 1) * 3 * h * inner;
    let routers = n * (experts + 1) * h;
    // A_log is kept in four bytes.
    let (decays, floats) =
        (nets * heads, nets * (4 * channels + heads + 128) + attentions * 2 * 256 + n * 2 * h + h);
    let bytes = matrices * 9 / 16 + routers * 17 / 16 + decays * 4 + floats * 2;
    (matrices + routers + decays + floats, bytes)
}

const fn gemma3_1b() -> (u64, u64) {
    let (h, v, n) = (1152, 262_144, 26);
    let matrices = v * h + n * (2 * h * 1024 + 2 * h * 256 + 3 * h * 6912);
    let floats = n * (4 * h + 2 * 256) + h;
    (matrices + floats, matrices * 9 / 16 + floats * 2)
}

const fn gpt_oss(n: u64, experts: u64) -> (u64, u64) {
    let (h, v, q, kv) = (2880, 201_088, 4096, 512);
    let matrices = 2 * v * h + n * (2 * h * q + 2 * h * kv + experts * 3 * h * h);
    let router = n * experts * h;
    let biases = n * (q + 2 * kv + h + 64 + experts + experts * 3 * h);
    let floats = biases + n * 2 * h + h;
    (matrices + router + floats, matrices * 9 / 16 + router * 17 / 16 + floats * 2)
}

const fn qwen3_30b() -> (u64, u64) {
    let (h, v, n) = (2048, 151_936, 48);
    let matrices = 2 * v * h + n * (2 * h * 4096 + 2 * h * 512 + 128 * 3 * h * 768);
    let (router, floats) = (n * 128 * h, n * (2 * 128 + 2 * h) + h);
    (matrices + router + floats, matrices * 9 / 16 + router * 17 / 16 + floats * 2)
}

const fn smollm2_135m() -> (u64, u64) {
    let (h, v, n) = (576, 49_152, 30);
    let matrices = v * h + n * (2 * h * h + 2 * h * 192 + 3 * h * 1536);
    let floats = n * 2 * h + h;
    (matrices + floats, matrices * 9 / 16 + floats * 2)
}

const fn lfm2_8b() -> (u64, u64) {
    lfm2_moe(6, 18, 7168, 32, 1792)
}

const fn lfm2_24b() -> (u64, u64) {
    lfm2_moe(10, 30, 11_776, 64, 1536)
}

const fn lfm2_moe(attention: u64, conv: u64, dense: u64, experts: u64, inner: u64) -> (u64, u64) {
    let (h, v, layers) = (2048, 65536, attention + conv);
    let mixers = attention * (2 * h * 2048 + 2 * h * 512) + conv * (3 * h * h + h * h);
    let matrices = v * h + mixers + 2 * 3 * h * dense + (layers - 2) * experts * 3 * h * inner;
    let (router, bias) = ((layers - 2) * experts * h, (layers - 2) * experts);
    let floats = attention * 2 * 64 + conv * 3 * h + layers * 2 * h + h;
    (matrices + router + bias + floats, matrices * 9 / 16 + router * 17 / 16 + bias * 4 + floats * 2)
}

#[test]
fn weights_have_the_stated_spread() {
    for (bits, group_size) in [(2, 32), (3, 64), (4, 64), (5, 64), (6, 128), (8, 64)] {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("model");
        write("lfm2_8b", &dir, &RandomOptions { bits, group_size, seed: 7 });
        let arrays = read(&dir);
        let get = |name: &str| &arrays[name];
        let path = "model.layers.0.conv.in_proj";
        let (packed, scales, biases) =
            (get(&format!("{path}.weight")), get(&format!("{path}.scales")), get(&format!("{path}.biases")));
        let dense = ops::dequantize(
            packed,
            scales,
            Some(biases),
            Some(group_size),
            Some(bits),
            "affine",
            None,
            Some(Dtype::Float32),
        );
        let values = dense.unwrap().to_vec::<f32>().unwrap();
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let std = (values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt();
        assert!(mean.abs() < 1e-4 && (std - 0.02).abs() < 5e-4, "{bits} bits: mean {mean}, deviation {std}");
    }
}

#[test]
fn routers_get_eight_bits_and_floats_their_values() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    write("lfm2_8b", &dir, &RandomOptions::default());
    let config: Json = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let section = &config["quantization"];
    assert_eq!(section["model.layers.2.feed_forward.gate"], json!({ "bits": 8, "group_size": 64 }));
    assert_eq!(
        (&section["bits"], &section["group_size"], &section["mode"]),
        (&json!(4), &json!(64), &json!("affine"))
    );
    assert_eq!(section, &config["quantization_config"]);
    assert_eq!(section.as_object().unwrap().len(), 4);
    let arrays = read(&dir);
    let floats = |name: &str| arrays[name].astype(Dtype::Float32).unwrap().to_vec::<f32>().unwrap();
    assert_eq!(arrays["model.layers.2.feed_forward.gate.weight"].shape(), [32, 2048 / 4]);
    assert!(floats("model.layers.1.ffn_norm.weight").iter().all(|&v| v == 1.0));
    assert_eq!(arrays["model.layers.2.feed_forward.expert_bias"].dtype(), Dtype::Float32);
    assert!(floats("model.layers.2.feed_forward.expert_bias").iter().all(|&v| v == 0.0));
    assert!(floats("model.layers.0.conv.conv.weight").iter().any(|&v| v.abs() > 0.1));
}

#[test]
fn the_seed_decides_every_byte() {
    let parent = tempfile::tempdir().unwrap();
    let bytes = |name: &str, seed: u64| {
        let dir = parent.path().join(name);
        write("lfm2_8b", &dir, &RandomOptions { seed, ..RandomOptions::default() });
        std::fs::read(dir.join("model.safetensors")).unwrap()
    };
    let first = bytes("a", 1);
    assert!(first == bytes("b", 1));
    assert!(first != bytes("c", 2));
    // The data begins where a mapped file is aligned.
    let header = u64::from_le_bytes(first[..8].try_into().unwrap());
    assert_eq!((header + 8) % 64, 0);
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    let go = &mut |_, _| Flow::Continue;
    let options = RandomOptions::default();
    let case = |name: &str, options: RandomOptions, words: &str| {
        let error = write_random_model(name, &dir, &options, &mut |_, _| Flow::Continue).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    };
    case("lfm3", options, "lfm2_8b");
    case("lfm2_8b", RandomOptions { bits: 7, ..options }, "2, 3, 4, 5, 6 or 8");
    case("lfm2_8b", RandomOptions { group_size: 16, ..options }, "32, 64 or 128");
    let stopped = write_random_model("lfm2_8b", &dir, &options, &mut |_, _| Flow::Stop).unwrap_err();
    assert!(matches!(stopped, RandomError::Folder(FolderError::Stopped)));
    assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    std::fs::write(&dir, "a file").unwrap();
    let there = write_model(&small("lfm2_8b"), &dir, &options, go).unwrap_err();
    assert!(matches!(there, RandomError::Folder(FolderError::AlreadyThere { .. })), "{there}");
    assert_eq!(std::fs::read(&dir).unwrap(), b"a file");
}
