//! `zmlx lab random-model`, and GGUF files that are none, through the real binary.

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

fn path(dir: &Path) -> &str {
    dir.to_str().expect("UTF-8")
}

#[test]
fn a_random_model_is_written_described_and_run() {
    let parent = TempDir::new().expect("temporary folder");
    let dir = parent.path().join("new").join("smol");
    let written = run(&["lab", "random-model", "smollm2_135m", "--out", path(&dir), "--bits", "3"]);
    assert!(written.status.success(), "{}", text(&written.stderr));
    assert_eq!(text(&written.stdout).trim_end(), path(&dir));
    assert!(text(&written.stderr).contains("134.5 M parameters"), "{}", text(&written.stderr));

    let info = run(&["info", "--json", path(&dir)]);
    let info: Value = serde_json::from_slice(&info.stdout).expect("JSON");
    assert_eq!(info["parameters_total"], 134_515_008);
    assert_eq!((&info["family"], &info["quantization"][0]["bits"]), (&"llama".into(), &3.into()));

    let args = ["--prompt-ids", "1,2,3", "--max-tokens", "2", "--ignore-eos", "--json"];
    let done = run(&[&["generate", "--model", path(&dir)], &args[..]].concat());
    let done: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!(done["tokens"].as_array().expect("tokens").len(), 2);
}

#[test]
fn the_list_names_every_model() {
    let list = run(&["lab", "random-model", "--list"]);
    assert!(list.status.success());
    let list = text(&list.stdout);
    for name in ["lfm2_8b", "qwen3_30b", "smollm2_135m"] {
        assert!(list.lines().any(|line| line.starts_with(name)), "{list}");
    }
}

#[test]
fn what_cannot_be_meant_is_one_line_and_code_2() {
    let parent = TempDir::new().expect("temporary folder");
    let new = parent.path().join("new");
    let there = path(parent.path());
    let cases: [(&[&str], &str); 7] = [
        (&["smollm"], "lfm2_8b"),
        (&["smollm2_135m", "--bits", "7"], "--bits must be 2, 3, 4, 5, 6 or 8"),
        (&["smollm2_135m", "--bits", "-4"], "--bits"),
        (&["smollm2_135m", "--group-size", "16"], "32, 64 or 128"),
        (&["smollm2_135m", "--seed", "x"], "--seed"),
        (&["--list", "lfm2_8b"], "cannot be used"),
        (&[], "not provided"),
    ];
    for (typed, words) in cases {
        let failed = run(&[&["lab", "random-model", "--out", path(&new)], typed].concat());
        let error = text(&failed.stderr);
        assert_eq!(failed.status.code(), Some(2), "{typed:?}: {error}");
        assert!(error.starts_with("error: ") && error.trim_end().lines().count() == 1, "{error}");
        assert!(error.contains(words), "{words:?} is not in: {error}");
        assert!(!new.exists(), "{typed:?}");
    }
    let failed = run(&["lab", "random-model", "smollm2_135m", "--out", there]);
    assert_eq!(failed.status.code(), Some(2));
    assert!(text(&failed.stderr).contains("is there already"), "{}", text(&failed.stderr));
}

#[test]
fn a_file_that_is_no_gguf_is_one_line_and_code_3() {
    let parent = TempDir::new().expect("temporary folder");
    let file = parent.path().join("model.GGUF");
    std::fs::write(&file, "nothing of the kind").expect("write");
    let failed = run(&["info", path(&file)]);
    assert_eq!(failed.status.code(), Some(3));
    let error = text(&failed.stderr);
    assert!(error.contains("model.GGUF") && error.contains("no GGUF file"), "{error}");
}
