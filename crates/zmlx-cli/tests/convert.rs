//! `zmlx convert`, `--quantize` and `zmlx models`, through the real binary.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_zmlx")).args(args).stdin(Stdio::null()).output().expect("zmlx starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A small model as it would be published, in bfloat16.
fn published() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../zmlx-models/tests/convert");
    path.to_str().expect("UTF-8").to_owned()
}

fn json(args: &[&str]) -> Value {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn generated(model: &str, more: &[&str]) -> Value {
    let usual = ["generate", "--prompt-ids", "5,17", "-n", "8", "--ignore-eos", "--json", "--model", model];
    json(&[&usual[..], more].concat())["tokens"].clone()
}

#[test]
fn converting_and_quantising_on_load_are_one() {
    let parent = TempDir::new().expect("temporary folder");
    let cases: [(&str, &[&str]); 3] = [
        ("q4", &["--quantize", "4"]),
        ("q3", &["--quantize", "3", "--group-size", "32"]),
        ("mxfp4", &["--quantize", "mxfp4"]),
    ];
    for (name, how) in cases {
        let out = parent.path().join("new").join(name);
        let out = out.to_str().expect("UTF-8");
        let written = run(&[&["convert", &published(), "--out", out], how].concat());
        assert!(written.status.success(), "{}", text(&written.stderr));
        assert_eq!(text(&written.stdout).trim_end(), out);
        assert!(text(&written.stderr).contains("bits a parameter"), "{}", text(&written.stderr));
        assert_eq!(generated(&published(), how), generated(out, &[]), "{name}");
    }
    let four = parent.path().join("new/q4");
    let info = json(&["info", "--json", four.to_str().expect("UTF-8")]);
    assert_eq!(
        (&info["quantization"][0]["bits"], &info["quantization"][0]["group_size"]),
        (&4.into(), &64.into())
    );
    // The other way of saying it, and back to floats.
    let out = parent.path().join("mode");
    let out = out.to_str().expect("UTF-8");
    let mode = ["convert", &published(), "--out", out, "--quantize", "4", "--mode", "nvfp4", "-q"];
    let written = run(&mode);
    assert!(written.status.success() && written.stderr.is_empty(), "{}", text(&written.stderr));
    let floats = parent.path().join("floats");
    let floats = floats.to_str().expect("UTF-8");
    let written = run(&["convert", out, "--out", floats, "--dequantize", "--dtype", "float32"]);
    assert!(written.status.success(), "{}", text(&written.stderr));
    let info = json(&["info", "--json", floats]);
    assert_eq!(
        (&info["quantization"][0]["mode"], &info["quantization"][0]["bits"]),
        (&"none".into(), &32.into())
    );
}

#[test]
fn validate_takes_it_too() {
    // It has no tokenizer: the prompts are token ids.
    let capsule = json(&["validate", &published(), "--quantize", "4", "-n", "4", "--runs", "1", "--json"]);
    assert_eq!(capsule["model"]["quantization"][0]["bits"], 4, "{}", capsule["model"]);
}

#[test]
fn what_cannot_be_meant_is_one_line() {
    let parent = TempDir::new().expect("temporary folder");
    let out = parent.path().join("out");
    let out = out.to_str().expect("UTF-8");
    let there = parent.path().to_str().expect("UTF-8");
    let source = published();
    let cases: [(&[&str], i32, &str); 12] = [
        (&["--quantize", "7"], 2, "2, 3, 4, 5, 6 or 8 bits"),
        (&["--quantize", "-4"], 2, "there is no affine quantization with -4 bits"),
        (&["--quantize", "four"], 2, "--quantize must be a number of bits"),
        (&["--quantize", "4", "--group-size", "16"], 2, "groups of 16"),
        (&["--quantize", "4", "--group-size", "x"], 2, "--group-size must be"),
        (&["--group-size", "32"], 2, "--quantize"),
        (&["--quantize", "mxfp4", "--mode", "nvfp4"], 2, "--mode says nvfp4"),
        (&["--quantize", "mxfp4", "--group-size", "64"], 2, "mxfp4 has 4 in groups of 32"),
        (&["--quantize", "4", "--dequantize"], 2, "cannot be used"),
        (&["--dequantize"], 3, "nothing to dequantize"),
        (&["--quantize", "8", "--group-size", "128"], 3, "nothing to quantize"),
        (&["--quantize", "8", "--group-size", "-128"], 2, "--group-size"),
    ];
    for (typed, code, words) in cases {
        let failed = run(&[&["convert", &source, "--out", out], typed].concat());
        let error = text(&failed.stderr);
        assert_eq!(failed.status.code(), Some(code), "{typed:?}: {error}");
        assert!(error.starts_with("error: ") && error.trim_end().lines().count() == 1, "{error}");
        assert!(error.contains(words), "{words:?} is not in: {error}");
    }
    let nowhere = run(&["convert", "/no/such/folder", "--out", out]);
    assert_eq!(nowhere.status.code(), Some(3));
    let failed = run(&["convert", &source, "--out", there]);
    assert_eq!(failed.status.code(), Some(2));
    assert!(text(&failed.stderr).contains("is there already"), "{}", text(&failed.stderr));
    assert!(!Path::new(out).exists());
    let smart =
        run(&["generate", "-m", &source, "--prompt-ids", "1", "--preset", "smart", "--quantize", "4"]);
    assert_eq!(smart.status.code(), Some(2));
    assert!(text(&smart.stderr).contains("zmlx convert"), "{}", text(&smart.stderr));
}

#[test]
fn families_and_their_patterns_are_listed() {
    let list = run(&["models"]);
    assert!(list.status.success());
    let list = text(&list.stdout);
    for words in ["lfm2_moe\n", "qwen3_moe\n", "mistral", "short_conv x18", "launches a token", "mlx-lm's"] {
        assert!(list.contains(words), "{words:?} is not in: {list}");
    }
    let table = run(&["models", "--patterns"]);
    let table = text(&table.stdout);
    let row = table.lines().find(|line| line.starts_with("short_conv ")).expect("a row");
    assert!(row.contains("token-identical") && row.contains("18"), "{row}");
    let page = run(&["models", "--patterns", "--markdown"]);
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/models.md");
    assert_eq!(text(&page.stdout), std::fs::read_to_string(kept).expect("docs/models.md"));
    let all = json(&["models", "--json"]);
    let family =
        all.as_array().expect("a list").iter().find(|f| f["family"] == "lfm2_moe").expect("lfm2_moe");
    assert_eq!(family["models"][0], "lfm2_8b");
    assert_eq!(run(&["models", "--markdown"]).status.code(), Some(2));
}
