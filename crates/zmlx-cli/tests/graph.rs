//! `zmlx graph`, `zmlx plan` and `zmlx profile` on the embedded model, and what they refuse.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lfm2-moe");

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zmlx"));
    command.args(args).stdin(Stdio::null()).output().expect("zmlx starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("stdout is UTF-8")
}

#[track_caller]
fn fine(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    stdout(&output)
}

#[track_caller]
fn json(args: &[&str]) -> Value {
    let text = fine(args);
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).expect("one JSON record")
}

#[track_caller]
fn refused(args: &[&str], code: i32, word: &str) {
    let output = run(args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert!(text.starts_with("error: ") && text.trim_end().lines().count() == 1, "{text}");
    assert!(text.contains(word), "no '{word}' in: {text}");
    assert_eq!(stdout(&output), "");
}

fn arg(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn the_graph_is_printed_with_shapes() {
    let text = fine(&["graph", MODEL]);
    for part in [
        "%0 = tokens() : [B, L] uint32 [input]",
        "[4096, 256] affine 4-bit group 64 [model.embed_tokens]",
        "kv_cache : [B, 2, S, 64] activation, [B, 2, S, 64] activation [model.layers.2.self_attn]",
        ": [B, L, 4096] activation [model.embed_tokens]",
    ] {
        assert!(text.contains(part), "no '{part}' in:\n{text}");
    }
    let record = json(&["graph", MODEL, "--json"]);
    assert_eq!(record["nodes"].as_array().map(Vec::len), Some(194));
    assert_eq!(record["slots"].as_array().map(Vec::len), Some(6));
}

#[test]
fn the_patched_graph_is_printed_without_weights() {
    let record = json(&["graph", MODEL, "--patched", "--json"]);
    let nodes = record["nodes"].as_array().expect("nodes");
    assert_eq!(nodes.len(), 25);
    assert!(nodes.iter().all(|n| n["pattern"].is_string()), "{record}");
    let text = fine(&["graph", MODEL, "--patterns", "moe_mlp,router"]);
    assert!(text.contains("<moe_mlp>") && !text.contains("<attention_out>"), "{text}");
    assert_eq!(fine(&["graph", MODEL, "--preset", "none"]), fine(&["graph", MODEL]));
    refused(&["graph", MODEL, "--patterns", "moe"], 2, "moe_mlp");
    refused(&["plan", MODEL, "--preset", "quick"], 2, "--preset");
}

#[test]
fn graphs_are_written_whole_or_not_at_all() {
    let folder = TempDir::new().expect("folder");
    let (dot, svg) = (folder.path().join("g.dot"), folder.path().join("g.svg"));
    assert_eq!(fine(&["graph", MODEL, "--dot", arg(&dot), "--svg", arg(&svg)]), "");
    let read = |path: &Path| fs::read_to_string(path).expect("written");
    assert!(read(&dot).starts_with("digraph") && read(&dot).contains("model.layers.5"));
    let once = read(&svg);
    assert!(once.starts_with("<svg") && once.ends_with("</svg>\n") && once.contains("model.layers.1, 3-4"));
    fine(&["graph", MODEL, "--svg", arg(&svg), "--all-layers", "-q"]);
    assert!(read(&svg).len() > once.len());
    // Nothing temporary stays.
    assert_eq!(fs::read_dir(folder.path()).expect("folder").count(), 2);
    refused(&["graph", MODEL, "--svg", arg(&folder.path().join("no/such/g.svg"))], 1, "cannot write");
    refused(&["graph", MODEL, "--svg", arg(folder.path())], 1, "cannot write");
    assert_eq!(fs::read_dir(folder.path()).expect("folder").count(), 2);
    refused(&["graph", MODEL, "--all-layers"], 2, "--svg");
    refused(&["graph", arg(&folder.path().join("nothing"))], 3, "nothing");
}

#[test]
fn a_plan_counts_what_info_says() {
    let info = json(&["info", MODEL, "--json"]);
    let plan = json(&["plan", MODEL, "--bandwidth", "20", "--json"]);
    let total = &plan["as_stored"]["total"];
    assert_eq!(total["weight_bytes"], info["bytes_per_token"]);
    assert_eq!(total["launches"], 172);
    assert_eq!(plan["bandwidth"]["measured"], false);
    let bytes: u64 =
        ["weight_bytes", "state_read", "state_written"].iter().filter_map(|k| total[k].as_u64()).sum();
    let seconds = plan["roofline"]["seconds_per_token"].as_f64().expect("a number");
    assert!((seconds - bytes as f64 / 20e9).abs() < 1e-12, "{seconds}");
    let later = json(&["plan", MODEL, "--bandwidth", "20", "--context", "500", "--json"]);
    assert!(later["as_stored"]["total"]["state_read"].as_u64() > total["state_read"].as_u64());

    let patched = &plan["patched"];
    assert_eq!(
        (&patched["cost"]["total"]["launches"], &patched["report"]["native"]),
        (&43.into(), &true.into())
    );
    assert_eq!(patched["report"]["launches_per_token"], 43);

    let text = fine(&["plan", MODEL, "--modules"]);
    let launches = text.lines().find(|l| l.starts_with("launches")).expect("a line");
    assert_eq!(launches.split_whitespace().collect::<Vec<_>>(), ["launches", "172", "167", "43"]);
    for part in ["2.9 MB", "read by ", "expert_linear", "model.layers.*.conv.in_proj", "5 x moe_mlp"] {
        assert!(text.contains(part), "no '{part}' in:\n{text}");
    }
    let text = fine(&["plan", MODEL, "--patched", "--bandwidth", "20"]);
    assert!(text.contains("moe_mlp  ") && !text.contains("expert_linear"), "{text}");
    let text = fine(&["plan", MODEL, "--preset", "none", "--bandwidth", "20"]);
    assert!(text.contains("patterns     none") && !text.contains("moe_mlp"), "{text}");
}

/// The embedded model has 6 layers, of which 2 attend and 4 convolve, 1 is dense and 5 have experts.
#[test]
fn a_plan_for_a_gpu_needs_none() {
    let plan = json(&["plan", MODEL, "--device", "gpu", "--bandwidth", "3350", "--json"]);
    let stock = json(&["plan", MODEL, "--bandwidth", "3350", "--json"]);
    assert_eq!((&plan["past_mlx"], &plan["launches_stock"]), (&true.into(), &172.into()));
    let kernels = plan["kernels"].as_array().expect("a list");
    let launches: u64 = kernels.iter().filter_map(|k| k["launches"].as_u64()).sum();
    assert_eq!(plan["launches"], launches);
    let of = |name: &str| kernels.iter().find(|k| k["name"] == name).expect(name)["launches"].clone();
    assert_eq!([of("short_conv"), of("router"), of("qkv")], [4.into(), 5.into(), serde_json::Value::from(2)]);
    assert_eq!(plan["seconds_per_token"], stock["roofline"]["seconds_per_token"]);
    let text = fine(&["plan", MODEL, "--device", "gpu"]);
    for part in ["launches past MLX, as one graph", "head + argmax", "GB/s"] {
        assert!(text.contains(part), "no '{part}' in:\n{text}");
    }
    if plan["gpu"]["found"] == false {
        assert!(text.contains("NVIDIA H100 80GB HBM3, as an example: this machine has none"), "{text}");
        assert!(text.contains("3350.0 GB/s"), "{text}");
    }
    let text = fine(&["plan", MODEL, "--device", "gpu", "--preset", "none"]);
    assert!(text.contains("MLX runs the stock graph: ") && text.contains("are in no pattern"), "{text}");
}

#[test]
fn a_plan_needs_no_weights() {
    let folder = TempDir::new().expect("folder");
    fs::copy(Path::new(MODEL).join("config.json"), folder.path().join("config.json")).expect("copied");
    let text = fine(&["plan", arg(folder.path()), "--bandwidth", "20"]);
    assert!(
        text.contains("sizes from   config.json alone") && text.contains("20.0 GB/s, as given"),
        "{text}"
    );
    assert!(fine(&["graph", arg(folder.path())]).contains("[B, L, 4096] activation"));
    let text = fine(&["info", arg(folder.path())]);
    assert!(text.contains("by config.json: there are no weight files"), "{text}");
}

#[test]
fn published_models_have_their_published_sizes() {
    let published = [
        ("lfm2_8b", "8.34 B", "1.56 B", 0.88),
        ("lfm2_24b", "23.84 B", "2.33 B", 1.31),
        ("qwen3_30b", "30.53 B", "3.04 B", 1.72),
    ];
    for (name, parameters, active, gigabytes) in published {
        let folder = TempDir::new().expect("folder");
        let model = zmlx_models::random::MODELS.iter().find(|m| m.name == name).expect(name);
        let mut config = (model.config)();
        config["quantization"] = serde_json::json!({ "bits": 4, "group_size": 64 });
        fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
        let text = fine(&["info", arg(folder.path())]);
        let line = format!("{parameters} total, {active} active per token");
        assert!(text.contains(&line), "no '{line}' in:\n{text}");
        let bytes = json(&["info", arg(folder.path()), "--json"])["bytes_per_token"].as_f64().expect("bytes");
        assert!((bytes / 1e9 - gigabytes).abs() < 0.01, "{name}: {bytes}");
        let text = fine(&["plan", arg(folder.path()), "--bandwidth", "20"]);
        let line = format!("parameters   {parameters}, {active} of them a token");
        assert!(text.contains(&line), "no '{line}' in:\n{text}");
    }
}

#[test]
fn a_profile_is_printed_and_drawn() {
    let folder = TempDir::new().expect("folder");
    let (svg, html) = (folder.path().join("p.svg"), folder.path().join("p.html"));
    let short = ["--steps", "2", "--prompt-tokens", "4", "--device", "cpu", "--dtype", "f32"];
    let with = |more: &[&'static str]| -> Vec<String> {
        ["profile", MODEL].iter().chain(&short).chain(more).map(ToString::to_string).collect()
    };
    let mut args = with(&["--bandwidth", "20", "--preset", "none"]);
    args.extend(["--svg", arg(&svg), "--html", arg(&html)].map(str::to_owned));
    let text = fine(&args.iter().map(String::as_str).collect::<Vec<_>>());
    for part in
        ["float32 on cpu", "stock", "expert_linear", "model.layers.*.self_attn", "20.0 GB/s, as given"]
    {
        assert!(text.contains(part), "no '{part}' in:\n{text}");
    }
    let picture = fs::read_to_string(&svg).expect("written");
    assert!(picture.starts_with("<svg") && picture.contains("model.layers.5"));
    assert!(
        fs::read_to_string(&html)
            .expect("written")
            .contains("lfm2_moe: a decode step on cpu in float32, stock")
    );

    let args = with(&["--bandwidth", "0.000001", "--json"]);
    let record = json(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(record["report"]["total"]["nodes"], 25, "patched, if nothing else is said");
    // Memory that moves a kilobyte a second is slower than any cache.
    assert_eq!(record["report"]["total"]["cache_resident"], true);
    assert!(record["step_seconds"].as_f64() > Some(0.0));
    assert!(record.get("launches").is_none(), "only a GPU has launches");
}

#[test]
fn numbers_out_of_range_are_bad_usage() {
    refused(&["plan", MODEL, "--bandwidth", "0"], 2, "--bandwidth");
    refused(&["plan", MODEL, "--context", "-1"], 2, "--context");
    refused(&["profile", MODEL, "--steps", "0"], 2, "--steps");
    refused(&["profile", MODEL, "--prompt-tokens", "x"], 2, "--prompt-tokens");
    refused(&["profile", MODEL, "--prompt-tokens", "2048", "--bandwidth", "20"], 2, "--prompt-tokens");
}
