//! `zmlx validate` and `zmlx bench` as a user runs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lfm2-moe");

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zmlx"));
    command.args(args).stdin(Stdio::null()).output().expect("zmlx starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// stdout of a run that must succeed.
#[track_caller]
fn printed(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).expect("stdout is UTF-8")
}

/// One line `error: ...` with all of `words`, this code, nothing on stdout.
#[track_caller]
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let output = run(args);
    let text = stderr(&output);
    assert!(!text.contains("panicked"), "{args:?}: {text}");
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert!(text.starts_with("error: ") && text.trim_end().lines().count() == 1, "{args:?}: {text}");
    assert!(output.stdout.is_empty(), "{args:?}");
    for word in words {
        assert!(text.contains(word), "{args:?}: no '{word}' in: {text}");
    }
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().expect("temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), text).expect("written");
        self.arg(name)
    }
}

fn parse(text: &str) -> Value {
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(text).expect("one JSON record")
}

/// A capsule of a short bench.
fn bench_into(file: &str) {
    printed(&[
        "bench",
        MODEL,
        "--preset",
        "none",
        "--prompt-tokens",
        "4",
        "-n",
        "3",
        "--runs",
        "3",
        "--capsule",
        file,
    ]);
}

#[test]
fn validate_passes_where_nothing_is_patched_and_writes_what_it_prints() {
    let folder = Folder::new();
    let prompts =
        folder.write("prompts.json", r#"["Once upon a time", {"name": "c", "text": "Hi", "chat": true}]"#);
    let capsule = folder.arg("capsule.json");
    let args = ["validate", MODEL, "--preset", "none", "-n", "4", "--runs", "1", "--prompts", &prompts];
    let record = parse(&printed(&[&args[..], &["--json", "--capsule", &capsule]].concat()));
    assert_eq!(record["schema"], "zmlx.capsule/1");
    assert_eq!(record["kind"], "validate");
    assert_eq!(record["model"]["name"], "tiny-lfm2-moe", "the folder's last part, not its path");
    let fidelity = &record["fidelity"];
    assert_eq!(fidelity["gate"]["passed"], true);
    assert_eq!(fidelity["logits"]["steps"], 8);
    assert_eq!(fidelity["logits"]["max_abs"], 0.0);
    assert_eq!(fidelity["prompts"][1]["prompt"], "c");
    assert_eq!(record["arms"].as_array().expect("arms").len(), 2);
    let written: Value = serde_json::from_slice(&fs::read(&capsule).expect("capsule")).expect("JSON");
    assert_eq!(written, record);
    assert_eq!(fs::read_dir(folder.0.path()).expect("folder").count(), 2, "no temporary file is left");

    let report = printed(&["bench", "report", &capsule]);
    assert!(report.contains("PASS as bit-exact: 8 of 8 greedy tokens equal"), "{report}");
}

#[test]
fn a_model_without_a_tokenizer_is_validated_on_ids() {
    let folder = Folder::new();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(Path::new(MODEL).join(name), folder.path(name)).expect("copied");
    }
    let text = printed(&["validate", &folder.arg(""), "--preset", "none", "-n", "2", "--runs", "1"]);
    for word in ["ids-short 8, ids-long 256", "pseudo-random token ids", "PASS"] {
        assert!(text.contains(word), "no '{word}' in:\n{text}");
    }
}

#[test]
fn bench_measures_compares_and_reports() {
    let folder = Folder::new();
    let (a, b) = (folder.arg("a.json"), folder.arg("b.json"));
    bench_into(&a);
    bench_into(&b);
    let same = printed(&["bench", "compare", &a, &a]);
    assert_eq!(same.matches("1.00x, within noise").count(), 6, "{same}");
    let record = parse(&printed(&["bench", "compare", &a, &b, "--json"]));
    assert_eq!(record["rows"].as_array().expect("rows").len(), 6);
    assert!(record["rows"][0]["gain"]["noise"].as_f64() >= Some(0.01));

    let page = folder.write("page.html", "old");
    let text = printed(&["bench", "report", &a, &b, "--html", &page]);
    assert_eq!(text.matches("decode median").count(), 2, "{text}");
    let page = fs::read_to_string(page).expect("page");
    assert!(
        page.starts_with("<!doctype html>") && page.matches("<svg").count() == 2 && !page.contains("http")
    );
}

#[test]
fn one_arm_alone_has_no_gain() {
    let args =
        ["bench", MODEL, "--arms", "stock", "--prompt-tokens", "2", "-n", "2", "--runs", "1", "--json"];
    let record = parse(&printed(&args));
    assert_eq!(record["arms"][0]["arm"], "stock");
    assert!(record["arms"].as_array().is_some_and(|a| a.len() == 1) && record["gains"].is_null());
    assert!(record["roofline"]["bandwidth"]["median"].as_f64() > Some(1e8));
}

#[test]
fn the_schema_is_the_published_one() {
    let published =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/capsule.schema.json"));
    assert_eq!(printed(&["bench", "schema"]), published.expect("docs/capsule.schema.json"));
}

#[test]
fn damaged_capsules_are_code_2_with_what_to_do() {
    let folder = Folder::new();
    let good = folder.arg("good.json");
    bench_into(&good);
    let text = fs::read_to_string(&good).expect("capsule");
    let cases = [
        (folder.write("cut.json", &text[..text.len() / 2]), "cut off"),
        (folder.write("empty.json", ""), "cut off"),
        (folder.write("other.json", "{\"a\": 1}"), "not a capsule"),
        (folder.write("old.json", text.replace("zmlx.capsule/1", "zmlx.capsule/0")), "zmlx.capsule/0"),
        (folder.write("type.json", text.replace("\"cores\": ", "\"cores\": -")), "measure again"),
        (folder.write("lie.json", text.replace("\"median\": ", "\"median\": 9")), "is not that of"),
        (folder.write("bytes.json", [0xff, 0xfe, 0x00]), "cut off"),
        (folder.arg("none.json"), "none.json"),
        (folder.arg(""), "not a regular file"),
    ];
    for (file, word) in &cases {
        refused(&["bench", "report", file], 2, &[word]);
        refused(&["bench", "compare", &good, file], 2, &[word]);
    }
}

#[test]
fn bad_usage_is_code_2_and_says_what_is_allowed() {
    let folder = Folder::new();
    let bad = folder.write("bad.txt", "\n\n");
    let cases: [(&[&str], &[&str]); 11] = [
        (&["validate", "--max-tokens", "1"], &["--max-tokens", "2 or more"]),
        (&["validate", "--runs", "0"], &["--runs", "1 to 1000"]),
        (&["validate", "--prompts", &bad], &["bad.txt", "0 prompts"]),
        (&["validate", "--reference", "f64"], &["--reference", "f32"]),
        (&["validate", "--max-tokens", "3000"], &["context of 2048", "fewer tokens"]),
        (&["validate", "--patterns", "no_such_pattern"], &["no_such_pattern"]),
        (&["validate", "--patterns", "a", "--preset", "fast"], &["--patterns", "--preset"]),
        (&["bench", "--prompt-tokens", "x"], &["--prompt-tokens", "1 or more"]),
        (&["bench", "--arms", "third"], &["--arms", "stock,patched"]),
        (&["bench", "--arms", "stock,stock"], &["arms", "both"]),
        (&["bench", "--cooldown", "-1"], &["--cooldown", "0 to 3600"]),
    ];
    for (args, words) in cases {
        refused(args, 2, words);
    }
}

#[test]
fn other_failures_have_their_codes() {
    refused(&["validate", "/nowhere/model"], 3, &["/nowhere/model"]);
    refused(&["bench", "/nowhere/model"], 3, &["/nowhere/model"]);
    let folder = Folder::new();
    let good = folder.arg("good.json");
    bench_into(&good);
    let output = run(&["bench", "report", &good, "--html", "/nowhere/at/all.html"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot write /nowhere/at/all.html"), "{}", stderr(&output));
}

#[test]
fn help_says_what_the_exit_codes_mean() {
    let text = printed(&["validate", "--help"]);
    assert!(text.contains("4 it failed") && text.contains("--reference"), "{text}");
    let text = printed(&["bench", "--help"]);
    assert!(text.contains("5 a speed was above the roofline") && text.contains("compare"), "{text}");
    assert!(printed(&["--help"]).contains("the fidelity gate failed"));
}

#[test]
fn bisect_finds_no_fault_with_the_default_preset() {
    let text = printed(&["validate", MODEL, "--bisect", "-n", "4", "-q"]);
    assert!(text.contains("all 25 fused ops keep their class"), "{text}");
    for pattern in ["router", "moe_mlp", "attention_out", "lm_head"] {
        assert!(text.lines().any(|l| l.starts_with(pattern)), "{text}");
    }
    let line = printed(&["validate", MODEL, "--bisect", "-n", "2", "--json", "--patterns", "short_conv"]);
    let record: Value = serde_json::from_str(&line).expect("one JSON record");
    assert_eq!(record["ops"].as_array().map(Vec::len), Some(4));
    assert!(record["ops"][0]["error"].as_f64() < Some(5e-3) && record["ops"][0]["pattern"] == "short_conv");
    assert!(
        printed(&["validate", MODEL, "--bisect", "--preset", "none", "-n", "2"])
            .contains("nothing was patched")
    );
    refused(&["validate", MODEL, "--bisect", "--patterns", "moe"], 2, &["moe_mlp"]);
}

#[test]
fn patterns_that_pay_are_measured_and_remembered() {
    let folder = Folder::new();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zmlx"));
        command.args(args).env("ZMLX_CACHE_DIR", folder.path("cache")).env_remove("ZMLX_PATCH");
        command.stdin(Stdio::null()).output().expect("zmlx starts")
    };
    let generate = ["generate", "-m", MODEL, "--preset", "smart", "--prompt-ids", "1,5", "-n", "4", "--json"];
    let before = run(&generate);
    assert_eq!(before.status.code(), Some(2), "{}", stderr(&before));
    assert!(stderr(&before).contains("zmlx lab smart-patch"), "{}", stderr(&before));

    let measured = run(&[
        "lab",
        "smart-patch",
        MODEL,
        "--rounds",
        "3",
        "-n",
        "4",
        "--patterns",
        "router,moe_mlp",
        "--json",
    ]);
    assert_eq!(measured.status.code(), Some(0), "{}", stderr(&measured));
    let record: Value = serde_json::from_slice(&measured.stdout).expect("one JSON record");
    let rows = record["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2, "{record}");
    assert_eq!((&rows[0]["name"], &rows[0]["needed_by"][0]), (&"router".into(), &"moe_mlp".into()));

    let after = run(&generate);
    assert_eq!(after.status.code(), Some(0), "{}", stderr(&after));
    let record: Value = serde_json::from_slice(&after.stdout).expect("one JSON record");
    assert_eq!(record["tokens"].as_array().map(Vec::len), Some(4));
}
