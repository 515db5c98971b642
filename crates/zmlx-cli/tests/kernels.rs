//! `zmlx kernels` as a user runs it.

use std::collections::BTreeMap;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use zmlx_kernels::catalogue;

fn zmlx(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zmlx"));
    command.arg("kernels").args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    zmlx(args).output().expect("zmlx starts")
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

#[track_caller]
fn json(args: &[&str]) -> Value {
    let text = printed(args);
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).expect("one JSON record")
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

#[test]
fn the_list_has_every_entry() {
    let text = printed(&[]);
    let names: Vec<&str> = text.lines().filter_map(|l| l.split_whitespace().next()).collect();
    let missing: Vec<_> = catalogue::entries().iter().filter(|e| !names.contains(&e.name.as_ref())).collect();
    assert!(missing.is_empty(), "{:?}", missing.iter().map(|e| &e.name).collect::<Vec<_>>());
    for word in ["formula", "gradient", "[softmax]", "[gate]", "cpu, metal, cuda"] {
        assert!(text.contains(word), "no '{word}' in:\n{text}");
    }
}

#[test]
fn the_json_list_says_what_the_catalogue_says() {
    let record = json(&["--json"]);
    let rows = record["kernels"].as_array().expect("kernels");
    let by_name: BTreeMap<&str, &Value> =
        rows.iter().filter_map(|r| Some((r["name"].as_str()?, r))).collect();
    assert_eq!(by_name.len(), catalogue::entries().len());
    for entry in catalogue::entries() {
        let row = by_name[entry.name.as_ref()];
        assert_eq!(row["formula"], entry.formula.as_ref(), "{}", entry.name);
        assert_eq!(row["family"], entry.domain.name(), "{}", entry.name);
        let none = matches!(entry.gradient, catalogue::Gradient::None(_));
        assert_eq!(row["gradient"] == "none", none, "{}", entry.name);
        assert!(!row["backends"].as_array().expect("list").is_empty(), "{}", entry.name);
    }
    let softmax = json(&["--family", "softmax", "--json"]);
    for row in softmax["kernels"].as_array().expect("kernels") {
        assert_eq!(row["family"], "softmax");
    }
    refused(&["--family", "softmx"], 2, &["softmx", "did you mean softmax?", "norm", "activation"]);
}

#[test]
fn show_prints_text_and_gradient() {
    let text = printed(&["show", "softmax"]);
    for word in ["softmax(x) =", "row_max", "gradient:", "softmax_vjp", "cpu, metal, cuda"] {
        assert!(text.contains(word), "no '{word}' in:\n{text}");
    }
    let text = printed(&["show", "x * sigmoid(x)"]);
    assert!(text.contains("sigmoid(x)") && text.contains("gradient:"), "{text}");
    // An expression may begin like an option.
    assert!(printed(&["show", "-x * 2"]).contains("-x"));
    assert!(printed(&["show", "top_k"]).contains("written by hand"));
    assert!(printed(&["show", "argmax"]).contains("none"));
}

#[test]
fn sources_are_whole_in_both_dialects() {
    for name in ["softmax", "silu", "cross_entropy", "x * sigmoid(x)"] {
        for (language, word) in [("metal", "threadgroup_position_in_grid"), ("cuda", "threadIdx.x")] {
            for dtype in ["f32", "bf16"] {
                let text =
                    printed(&["show", name, "--source", language, "--dtype", dtype, "--shape", "64x1000"]);
                assert!(text.contains("[64, 1000]") && text.contains("// launch: "), "{text}");
                let (header, body) = text.split_once("// Body of the function").expect("header and body");
                assert!(header.len() > 20 && body.contains("out"), "{text}");
                assert!(
                    body.contains(word) || body.contains("thread_position_in_grid"),
                    "{name} {language}:\n{text}"
                );
            }
            let own = printed(&["show", name, "--source", language]);
            let gradient = printed(&["show", name, "--source", language, "--grad"]);
            assert_ne!(own, gradient, "{name} {language}");
            assert!(gradient.contains("g_"), "{gradient}");
        }
    }
    let text = printed(&["show", "--source", "cuda", "top_k_gating"]);
    assert!(text.contains("GATE_WEIGHTS 1") && text.contains("blockIdx.x"), "{text}");
}

/// The list says that each kernel with a text runs on Metal and CUDA.
#[test]
fn every_entry_has_source_at_its_default_shape() {
    let mut wrong = Vec::new();
    for entry in catalogue::entries() {
        for language in ["metal", "cuda"] {
            let output = run(&["show", &entry.name, "--source", language]);
            if output.status.code() != Some(0) || output.stdout.is_empty() {
                wrong.push(format!("{} {language}: {}", entry.name, stderr(&output).trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn explain_has_bytes_and_the_roofline() {
    let text = printed(&["show", "rms_norm", "--explain", "--shape", "8x64", "--bandwidth", "100"]);
    // x and the result, the weights, eps.
    assert!(
        text.contains(&format!("bytes: {} read, {} written", 8 * 64 * 4 + 64 * 4 + 4, 8 * 64 * 4)),
        "{text}"
    );
    assert!(text.contains("at 100.0 GB/s") && text.contains("as given"), "{text}");
    let text = printed(&["show", "silu", "--explain", "--shape", "8x64", "--grad", "--bandwidth", "1e3"]);
    assert!(text.contains("g_out"), "{text}");
}

#[test]
fn a_syntax_error_shows_the_place() {
    let output = run(&["show", "x * tahn(x)"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    let caret = text.lines().find(|l| l.contains('^')).expect("a caret");
    let line = text.lines().find(|l| l.contains("x * tahn(x)")).expect("the line");
    assert_eq!(caret.find('^'), line.find("tahn"), "{text}");
    assert!(text.contains("did you mean tanh?"), "{text}");
    assert!(text.lines().last().is_some_and(|l| l.starts_with("error: ")), "{text}");
}

#[test]
fn bad_input_is_one_line() {
    let cases: [(&[&str], i32, &[&str]); 20] = [
        (&["show", "sofmax"], 2, &["did you mean softmax?"]),
        (&["bench", "rmsnorm"], 2, &["did you mean rms_norm"]),
        (&["tune", "qqqqq"], 2, &["zmlx kernels"]),
        (&["show", ""], 2, &[]),
        (&["show", "softmax", "--source", "metal", "--shape", "0x4"], 2, &["--shape", "0x4"]),
        (&["show", "softmax", "--source", "metal", "--shape", "-3"], 2, &["--shape"]),
        (&["show", "softmax", "--source", "metal", "--shape", "2147483647x2147483647"], 2, &["2^40"]),
        (&["show", "softmax", "--source", "opencl"], 2, &["metal", "cuda"]),
        (&["show", "softmax", "--source", "metal", "--dtype", "f64"], 2, &["f32", "bf16"]),
        (&["show", "softmax", "--grad"], 2, &["--source"]),
        (&["show", "softmax", "--explain", "--bandwidth", "0"], 2, &["--bandwidth"]),
        (&["show", "top_k", "--explain"], 2, &["by hand"]),
        (&["show", "top_k", "--source", "metal", "--grad"], 2, &["by hand"]),
        (&["show", "argmax", "--source", "metal", "--grad"], 1, &["argmax"]),
        (&["bench", "softmax", "--samples", "2"], 2, &["--samples", "3 to 10000"]),
        (&["bench", "softmax", "--shape", "1000000x1000000"], 2, &["smaller --shape"]),
        (&["bench", "top_k", "--shape", "8x4"], 2, &["k = 8"]),
        (&["bench", "gather_add", "--shape", "8x4"], 2, &["leave --shape out"]),
        (&["tune", "top_k"], 2, &["by hand"]),
        (&["--json", "bench"], 2, &["--json"]),
    ];
    for (args, code, words) in cases {
        if args == ["show", ""] {
            // An empty expression has a report, too.
            assert_eq!(run(args).status.code(), Some(code));
            continue;
        }
        refused(args, code, words);
    }
}

#[test]
fn bench_prints_finite_numbers() {
    let names =
        ["softmax", "rms_norm", "cross_entropy", "top_k_gating", "gather_add", "scatter_add", "swiglu"];
    let shaped = ["bench", "softmax", "rms_norm", "cross_entropy", "top_k_gating", "--shape", "4x40"];
    let cpu = ["--device", "cpu", "--samples", "3", "--json"];
    let own = ["bench", "gather_add", "scatter_add"];
    let wide = ["bench", "swiglu", "--shape", "4x40", "--dtype", "bf16"];
    let records = [&shaped[..], &own[..], &wide[..]].map(|args| json(&[args, &cpu[..]].concat()));
    let mut found = Vec::new();
    for record in &records {
        assert_eq!(record["device"], "cpu");
        assert_eq!(record["samples"], 3);
        for row in record["kernels"].as_array().expect("kernels") {
            found.push(row["kernel"].as_str().expect("name").to_owned());
            for number in ["ms", "gb_per_s", "copy_gb_per_s", "share_of_copy", "plain_mlx_ms", "speedup"] {
                assert!(row[number].as_f64().is_some_and(|v| v.is_finite() && v > 0.0), "{number}: {row}");
            }
            assert_eq!(row["above_copy"].as_bool(), row["share_of_copy"].as_f64().map(|s| s > 1.0), "{row}");
        }
    }
    assert_eq!(found, names);
    // x and the result of 4 x 40 elements.
    assert_eq!(records[0]["kernels"][0]["bytes"], 2 * 4 * 40 * 4);
    // Twice 4 x 40 elements in, once out, of two bytes.
    assert_eq!(records[2]["kernels"][0]["bytes"], 3 * 4 * 40 * 2);
    let text = printed(&["bench", "silu", "--shape", "4x40", "--device", "cpu", "--samples", "3"]);
    assert!(
        text.lines().nth(1).is_some_and(|l| l.starts_with("silu") && l.contains("f32 [4, 40]")),
        "{text}"
    );
}

#[test]
fn tune_prints_and_stores_its_decision() {
    let folder = TempDir::new().expect("temporary folder");
    let args = ["tune", "x * sigmoid(x)", "--shape", "16x512", "--device", "cpu"];
    let output = zmlx(&args).env("ZMLX_TUNE_DIR", folder.path()).output().expect("zmlx starts");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.contains("candidate") && text.contains("chosen"), "{text}");
    assert!(text.contains(&format!("stored in {}", folder.path().display())), "{text}");
    assert!(folder.path().read_dir().expect("folder").next().is_some(), "nothing was stored");
}
