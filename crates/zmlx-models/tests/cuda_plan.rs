//! What a token takes on an NVIDIA GPU, counted without one: launches and bytes.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value as Json, json};
use zmlx_cuda::kernels::Source;
use zmlx_cuda::module::compile_all;
use zmlx_cuda::nvrtc::Nvrtc;
use zmlx_graph::cuda::{Extent, outline, outline_within};
use zmlx_graph::pattern::{Backend, Choice, rewrite};
use zmlx_graph::{Fidelity, Graph, patterns};
use zmlx_mlx::Dtype;
use zmlx_models::random::MODELS;
use zmlx_models::{Blueprint, ModelConfig};

fn patched(graph: &Graph) -> Graph {
    let choice = Choice {
        patterns: patterns::ALL.iter().copied().filter(|p| p.class <= Fidelity::TokenIdentical).collect(),
        max_class: Fidelity::TokenIdentical,
        backend: Backend::Cuda,
    };
    rewrite(graph, &choice).unwrap().graph
}

fn published(name: &str, bits: i32) -> Graph {
    quantized(name, json!({"group_size": 64, "bits": bits}))
}

fn quantized(name: &str, how: Json) -> Graph {
    let model = MODELS.iter().find(|m| m.name == name).unwrap();
    let mut config = (model.config)();
    config["quantization"] = how;
    let config = ModelConfig::from_json(config.as_object().cloned().unwrap());
    patched(&Blueprint::from_config(&config).unwrap().graph)
}

/// How often each launch comes, and the bytes of all.
fn counted(graph: &Graph) -> (BTreeMap<&'static str, usize>, u64) {
    let plan = outline(graph, Dtype::Bfloat16, 1024).unwrap();
    let mut counts = BTreeMap::new();
    for step in &plan.steps {
        *counts.entry(step.name).or_default() += 1;
    }
    (counts, plan.bytes())
}

#[test]
fn lfm2_8b_takes_five_launches_a_layer() {
    let (counts, bytes) = counted(&published("lfm2_8b", 4));
    // 24 layers: 18 convolutions and 6 of attention; two dense, 22 of experts.
    let expected = BTreeMap::from([
        ("embedding", 1),
        ("short_conv", 18),
        ("qkv", 6),
        ("norm + rope + append + attention", 6),
        ("linear", 18 + 6 + 2),
        ("gate + up + activation", 2),
        ("router", 22),
        ("experts gate + up + activation", 22),
        ("experts down + combine + residual", 22),
        ("head + argmax", 1),
    ]);
    assert_eq!(counts, expected);
    // The plan of the CPU counts 0.88 GB of weights a token; norms and kernels of convolutions are not in it.
    assert!((870_000_000..890_000_000).contains(&bytes), "{bytes}");
}

/// Blocks that have no room beside those of the launch before begin late: a rehearsal would only hold them up.
#[test]
fn blocks_rehearse_where_they_begin_early() {
    let plan = outline(&published("qwen3_30b", 4), Dtype::Bfloat16, 1024).unwrap();
    let mut rehearsed: BTreeMap<&str, usize> = BTreeMap::new();
    for step in plan.steps.iter().filter(|s| s.source.device.contains("constexpr bool REHEARSED = true;")) {
        *rehearsed.entry(step.name).or_default() += 1;
    }
    // What experts up has on its way leaves no room for experts down.
    let expected =
        BTreeMap::from([("qkv", 48), ("linear", 48), ("router", 48), ("experts gate + up + activation", 48)]);
    assert_eq!(rehearsed, expected);
}

#[test]
fn qwen3_30b_takes_six_launches_a_layer() {
    let (counts, bytes) = counted(&published("qwen3_30b", 4));
    let expected = BTreeMap::from([
        ("embedding", 1),
        ("qkv", 48),
        ("norm + rope + append + attention", 48),
        ("linear", 48),
        ("router", 48),
        ("experts gate + up + activation", 48),
        ("experts down + combine + residual", 48),
        ("head + argmax", 1),
    ]);
    assert_eq!(counts, expected);
    assert!((1_700_000_000..1_740_000_000).contains(&bytes), "{bytes}");
}

#[test]
fn glm_4_7_flash_takes_eleven_launches_a_layer() {
    let (counts, bytes) = counted(&published("glm4_7_flash", 4));
    // 47 layers, the first of them dense. Queries come in two products, of which the first is with the latents'.
    let expected = BTreeMap::from([
        ("embedding", 1),
        ("queries + latents", 47),
        ("products of heads", 2 * 47),
        ("rope + append + latent attention", 47),
        ("linear", 2 * 47 + 1 + 46),
        ("gate + up + activation", 1 + 46),
        ("router", 46),
        ("experts gate + up + activation", 46),
        ("experts down + combine + residual", 46),
        ("head + argmax", 1),
    ]);
    assert_eq!(counts, expected);
    assert!((1_980_000_000..2_060_000_000).contains(&bytes), "{bytes}");
}

#[test]
fn the_delta_nets_of_qwen3_5_and_qwen3_next_are_launches() {
    // 40 layers, every fourth of attention: its gate is a launch, and each has a shared expert with a gate. Three of four
    // input products are one launch.
    let (counts, bytes) = counted(&published("qwen3_5_35b", 4));
    let expected = BTreeMap::from([
        ("embedding", 1),
        ("linear", 2 * 30 + 40 + 2 * 40),
        ("convolution + silu", 30),
        ("gated delta rule", 30),
        ("gated norm", 30),
        ("qkv", 10),
        ("norm + rope + append + attention", 10),
        ("gate", 10),
        ("router", 40),
        ("gate + up + activation", 40),
        ("experts gate + up + activation", 40),
        ("experts down + combine + residual", 40),
        ("head + argmax", 1),
    ]);
    assert_eq!(counts, expected);
    // 66 MB of them states.
    assert!((1_690_000_000..1_750_000_000).contains(&bytes), "{bytes}");
    // The same with two input products a delta net, one launch.
    let (counts, bytes) = counted(&published("qwen3_next_80b", 4));
    let expected = [("gated delta rule", 36), ("gated norm", 36), ("gate", 12), ("linear", 36 + 3 * 48)];
    expected.iter().for_each(|(name, count)| assert_eq!(counts[name], *count, "{name}"));
    assert!((2_050_000_000..2_110_000_000).contains(&bytes), "{bytes}");
}

#[test]
fn gpt_oss_20b_takes_six_launches_a_layer() {
    let layer = ["qkv", "norm + rope + append + attention", "linear", "router"];
    let experts = ["experts gate + up + activation", "experts down + combine + residual"];
    let once = ["embedding", "head + argmax"];
    let layers = layer.into_iter().chain(experts).map(|name| (name, 24));
    let expected: BTreeMap<_, _> = layers.chain(once.map(|name| (name, 1))).collect();
    let (counts, bytes) = counted(&published("gpt_oss_20b", 4));
    assert_eq!(counts, expected);
    assert!((2_000_000_000..2_060_000_000).contains(&bytes), "{bytes}");
    // All of it in mxfp4.
    let (counts, bytes) =
        counted(&quantized("gpt_oss_20b", json!({"group_size": 32, "bits": 4, "mode": "mxfp4"})));
    assert_eq!(counts, expected);
    assert!((1_890_000_000..1_950_000_000).contains(&bytes), "{bytes}");
}

/// A GPU of the desk gives a block 99 KiB of shared memory: less is on its way there.
#[test]
fn plans_fit_where_blocks_have_less_shared_memory() {
    for name in ["lfm2_8b", "qwen3_30b", "glm4_7_flash", "qwen3_5_35b"] {
        let graph = published(name, 4);
        let most = |shared_memory: usize| {
            let extent = Extent { shared_memory, ..Extent::new(1024) };
            let plan = outline_within(&graph, Dtype::Bfloat16, extent).unwrap();
            plan.steps.iter().map(|s| s.launch.shared).max().unwrap()
        };
        assert!(most(99 << 10) <= 99 << 10, "{name}: {}", most(99 << 10));
        assert!(most(227 << 10) > 99 << 10, "{name}: nothing had to give way");
    }
}

/// What several sequences take more: products of their rows are the same launches, as long as shared memory holds the rows.
#[test]
fn several_sequences_take_few_launches_more() {
    for (name, sequences, more) in [
        ("lfm2_8b", 4, 0),
        // The next tokens are a launch of their own.
        ("lfm2_8b", 3, 1),
        // Rows of the two dense layers are too wide.
        ("lfm2_8b", 8, 2),
        ("qwen3_30b", 8, 0),
        ("gpt_oss_20b", 8, 0),
        // Queries and latents of each layer are two.
        ("glm4_7_flash", 4, 47),
        // Input products of each delta net are four.
        ("qwen3_5_35b", 4, 2 * 30),
    ] {
        let graph = published(name, 4);
        let launches = |sequences: usize| {
            let extent = Extent { sequences, ..Extent::new(1024) };
            outline_within(&graph, Dtype::Bfloat16, extent).unwrap().steps.len()
        };
        assert_eq!(launches(sequences) - launches(1), more, "{sequences} of {name}");
    }
    let nine = outline_within(
        &published("qwen3_30b", 4),
        Dtype::Bfloat16,
        Extent { sequences: 9, ..Extent::new(1024) },
    );
    let error = nine.unwrap_err();
    assert!(error.contains("it must be 1 to 8"), "{error}");
}

/// With NVRTC, if it is there (its wheel is fetched by the tests of `zmlx-emulator`); without a GPU.
#[test]
fn the_kernels_of_published_shapes_compile_for_hopper() {
    compiles(1);
}

#[test]
fn those_of_four_sequences_compile_too() {
    compiles(4);
}

fn compiles(sequences: usize) {
    let cache = zmlx_mlx::locate::cache_dir().unwrap();
    let nvrtc = match Nvrtc::find(Some(&cache)) {
        Ok(nvrtc) => nvrtc,
        Err(error) if std::env::var_os("ZMLX_REQUIRE_NVRTC").is_none() => {
            eprintln!("not compiled: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let extent = Extent { sequences, ..Extent::new(1024) };
    let plans = ["lfm2_8b", "qwen3_30b", "glm4_7_flash", "gpt_oss_20b", "qwen3_5_35b"]
        .map(|name| outline_within(&published(name, 4), Dtype::Bfloat16, extent).unwrap());
    let sources: HashSet<&Source> = plans.iter().flat_map(|p| &p.steps).map(|s| &s.source).collect();
    let sources: Vec<&Source> = sources.into_iter().collect();
    assert!((30..80).contains(&sources.len()), "{} texts", sources.len());
    for (source, code) in compile_all(&nvrtc, "sm_90", None, &sources).unwrap() {
        assert!(code.starts_with(b"\x7fELF"), "{}", source.name);
    }
}

#[test]
fn what_has_no_kernel_refuses_all_with_one_reason() {
    let refused = |graph: &Graph| outline(graph, Dtype::Bfloat16, 1024).unwrap_err();
    let three_bits = refused(&published("qwen3_30b", 3));
    assert!(three_bits.contains("Affine(3)"), "{three_bits}");
    let model = MODELS.iter().find(|m| m.name == "qwen3_30b").unwrap();
    let config = ModelConfig::from_json((model.config)().as_object().cloned().unwrap());
    let stock = refused(&Blueprint::from_config(&config).unwrap().graph);
    assert!(stock.contains("are in no pattern"), "{stock}");
}
