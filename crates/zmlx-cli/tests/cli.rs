//! The real binary on the real embedded model, and on folders broken in every way we know.
//!
//! Each failure must be one line on stderr that begins with `error:`, with the documented exit
//! code, and never a panic.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lfm2-moe");
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-lfm2-moe.golden.json");

fn zmlx(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zmlx"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    zmlx(args).output().expect("zmlx starts")
}

fn run_with_stdin(args: &[&str], input: &[u8]) -> Output {
    let mut child = zmlx(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("zmlx starts");
    let mut stdin = child.stdin.take().expect("piped");
    // A program that refuses its arguments closes the pipe early.
    let _ = stdin.write_all(input);
    drop(stdin);
    child.wait_with_output().expect("zmlx ends")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("stdout is UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn assert_ok(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
}

/// One line `error: ...` that holds all `words` (letter case aside), this code, nothing on stdout.
#[track_caller]
fn assert_error(output: &Output, code: i32, words: &[&str]) {
    let text = stderr(output);
    assert!(!text.contains("panicked"), "{text}");
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.starts_with("error: "), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    assert_eq!(stdout(output), "");
    let lower = text.to_lowercase();
    for word in words {
        assert!(lower.contains(&word.to_lowercase()), "no '{word}' in: {text}");
    }
}

/// A copy of the embedded model to break.
struct Folder(TempDir);

impl Folder {
    fn copy() -> Self {
        let folder = TempDir::new().expect("temporary folder");
        for entry in fs::read_dir(MODEL).expect("embedded model") {
            let entry = entry.expect("entry");
            if entry.path().is_file() {
                // Read and write, so that a read-only original does not make a read-only copy.
                let bytes = fs::read(entry.path()).expect("read");
                fs::write(folder.path().join(entry.file_name()), bytes).expect("write");
            }
        }
        Self(folder)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn arg(&self) -> &str {
        self.0.path().to_str().expect("UTF-8 path")
    }

    fn edit_json(&self, name: &str, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let text = fs::read_to_string(self.file(name)).expect("read");
        let mut value: Value = serde_json::from_str(&text).expect("JSON");
        edit(value.as_object_mut().expect("object"));
        fs::write(self.file(name), value.to_string()).expect("write");
    }

    /// `zmlx generate` of two tokens after the ids 1 and 5.
    fn generate(&self) -> Output {
        run(&["generate", "--model", self.arg(), "--prompt-ids", "1,5", "--max-tokens", "2"])
    }
}

fn golden_cases() -> Vec<(Vec<u64>, Vec<u64>)> {
    let ids = |value: &Value| -> Vec<u64> {
        let list = value.as_array().expect("list");
        list.iter().map(|id| id.as_u64().expect("id")).collect()
    };
    let text = fs::read_to_string(GOLDEN).expect("golden tokens");
    let golden: Value = serde_json::from_str(&text).expect("JSON");
    let cases = golden["cases"].as_array().expect("cases");
    cases.iter().map(|case| (ids(&case["prompt_ids"]), ids(&case["tokens"]))).collect()
}

fn joined(ids: &[u64], between: &str) -> String {
    let words: Vec<String> = ids.iter().map(ToString::to_string).collect();
    words.join(between)
}

#[test]
fn help_lists_the_commands_and_the_exit_codes() {
    let output = run(&["--help"]);
    assert_ok(&output);
    let text = stdout(&output);
    for word in
        ["generate", "chat", "info", "demo", "doctor", "lab", "completions", "man", "Exit codes", "130"]
    {
        assert!(text.contains(word), "no '{word}' in:\n{text}");
    }
    assert!(stdout(&run(&["--version"])).starts_with("zmlx "));
}

#[test]
fn completions_and_man_pages_are_made() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert_ok(&output);
        assert!(stdout(&output).contains("prompt-ids"), "{shell}");
    }
    let page = stdout(&run(&["man"]));
    assert!(page.contains(".TH zmlx 1"), "{page}");
    let folder = TempDir::new().expect("temporary folder");
    let pages = folder.path().join("pages");
    assert_ok(&run(&["man", "--dir", pages.to_str().expect("UTF-8")]));
    assert!(pages.join("zmlx.1").is_file());
    assert!(pages.join("zmlx-generate.1").is_file());
}

#[test]
fn json_holds_the_golden_tokens() {
    for (prompt, tokens) in golden_cases() {
        let output = run(&[
            "generate",
            "--device",
            "cpu",
            "--dtype",
            "f32",
            "--prompt-ids",
            &joined(&prompt, ","),
            "--max-tokens",
            "20",
            "--ignore-eos",
            "--json",
        ]);
        assert_ok(&output);
        assert_eq!(stderr(&output), "");
        let text = stdout(&output);
        assert_eq!(text.lines().count(), 1, "{text}");
        let record: Value = serde_json::from_str(&text).expect("one JSON record");
        assert_eq!(record["prompt_ids"], Value::from(prompt));
        assert_eq!(record["tokens"], Value::from(tokens[..20].to_vec()));
        assert_eq!(record["dtype"], "float32");
        assert_eq!(record["device"], "cpu");
        assert_eq!(record["finish_reason"], "length");
        assert!(record["text"].is_string());
        for number in ["prompt_tps", "decode_tps", "peak_memory_bytes"] {
            assert!(record[number].is_number(), "{number}: {}", record[number]);
        }
    }
}

#[test]
fn without_a_tokenizer_ids_are_streamed() {
    let folder = Folder::copy();
    fs::remove_file(folder.file("tokenizer.json")).expect("removed");
    let (prompt, tokens) = golden_cases().swap_remove(0);
    let output = run(&[
        "generate",
        "--model",
        folder.arg(),
        "--device",
        "cpu",
        "--dtype",
        "f32",
        "--prompt-ids",
        &joined(&prompt, ","),
        "--max-tokens",
        "10",
        "--ignore-eos",
    ]);
    assert_ok(&output);
    assert_eq!(stdout(&output), format!("{}\n", joined(&tokens[..10], " ")));
}

#[test]
fn text_streams_to_stdout_and_stats_to_stderr() {
    let args = ["generate", "--max-tokens", "8", "--stats"];
    let piped = run_with_stdin(&args, "Tell a story about a fox.\n".as_bytes());
    assert_ok(&piped);
    let line = stderr(&piped);
    for word in ["prompt:", "decode:", "peak memory:", "finish:"] {
        assert!(line.contains(word), "{line}");
    }
    let mut typed = args.to_vec();
    typed.extend(["--prompt", "Tell a story about a fox."]);
    let typed = run(&typed);
    assert_eq!(stdout(&typed), stdout(&piped));
    assert!(!stdout(&typed).trim().is_empty());
}

#[test]
fn the_demo_needs_no_arguments_and_repeats_itself() {
    let once = run(&["demo", "--max-tokens", "12"]);
    assert_ok(&once);
    assert!(!stdout(&once).trim().is_empty());
    assert!(stderr(&once).contains("tok/s"), "{}", stderr(&once));
    assert_eq!(stdout(&once), stdout(&run(&["demo", "-n", "12"])));
}

#[test]
fn info_describes_the_embedded_model() {
    let output = run(&["info", MODEL]);
    assert_ok(&output);
    let text = stdout(&output);
    for word in [
        "lfm2_moe",
        "6: conv conv full_attention conv conv full_attention",
        "affine 4-bit group 64",
        "2,048 tokens",
        "4,096",
        "32, 4 active",
    ] {
        assert!(text.contains(word), "no '{word}' in:\n{text}");
    }
    let record: Value = serde_json::from_str(&stdout(&run(&["info", MODEL, "--json"]))).expect("JSON");
    assert_eq!(record["family"], "lfm2_moe");
    assert_eq!(record["layers"].as_array().map(Vec::len), Some(6));
}

#[test]
fn doctor_finds_a_backend() {
    let output = run(&["doctor"]);
    assert_ok(&output);
    assert!(stdout(&output).contains("cpu"), "{}", stdout(&output));
    let record: Value = serde_json::from_str(&stdout(&run(&["doctor", "--json"]))).expect("JSON");
    assert!(record["backends"].is_array());
    assert_eq!(record["zmlx"], env!("CARGO_PKG_VERSION"));
}

/// What decode on an NVIDIA GPU needs is described, or what is missing is said with what to do; neither is an error.
#[test]
fn doctor_says_what_decode_on_cuda_lacks() {
    let empty = tempfile::tempdir().expect("folder");
    let doctor = |args: &[&str]| {
        let output = zmlx(args).env("ZMLX_NVRTC", empty.path()).output().expect("run");
        assert_ok(&output);
        stdout(&output)
    };
    let record: Value = serde_json::from_str(&doctor(&["doctor", "--json"])).expect("JSON");
    let text = doctor(&["doctor"]);
    // There are no drivers for macOS.
    assert_eq!(record.get("cuda").is_none(), cfg!(target_os = "macos"), "{record}");
    let Some(cuda) = record.get("cuda") else { return };
    assert_eq!(cuda["nvrtc"]["found"], false);
    let nvrtc = text.lines().find(|l| l.starts_with("NVRTC")).expect("a line");
    for part in
        ["not available: ", "install the wheel nvidia-cuda-nvrtc", empty.path().to_str().expect("text")]
    {
        assert!(nvrtc.contains(part), "no '{part}' in: {nvrtc}");
    }
    let gpu = text.lines().find(|l| l.starts_with("GPU")).expect("a line");
    let expected = match cuda["gpu"]["found"].as_bool() {
        Some(true) => "compute capability",
        _ if gpu.contains("libcuda") => "install one, or run without CUDA",
        _ => "nvidia-smi",
    };
    assert!(gpu.contains(expected), "{gpu}");
}

#[test]
fn chat_talks_through_a_pipe() {
    let args = ["chat", "-n", "6"];
    let output =
        run_with_stdin(&args, b"/help\nTell a story.\n/reset\n/nope\nTell a story.\n/exit\nnot read\n");
    assert_ok(&output);
    let errors = stderr(&output);
    assert!(errors.contains("/reset") && errors.contains("/nope is not a command"), "{errors}");
    let text = stdout(&output);
    let half = text.len() / 2;
    // After /reset the same question gets the same greedy answer.
    assert!(half > 0, "{text:?}");
    assert_eq!(text[..half], text[half..]);
}

#[test]
fn chat_needs_a_tokenizer_and_a_template() {
    let folder = Folder::copy();
    folder.edit_json("tokenizer_config.json", |config| {
        config.remove("chat_template");
    });
    assert_error(&run(&["chat", "--model", folder.arg()]), 2, &["chat template"]);
    let system = ["generate", "--model", folder.arg(), "--prompt", "x", "--system", "y"];
    assert_error(&run(&system), 2, &["chat template", "--system"]);
    fs::remove_file(folder.file("tokenizer.json")).expect("removed");
    assert_error(&run(&["chat", "--model", folder.arg()]), 2, &["tokenizer"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = zmlx(&["generate", "--prompt-ids", "1", "--max-tokens", "200", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("zmlx starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("zmlx ends");
    assert_eq!(stderr(&output), "");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn bad_usage_is_code_2_and_says_the_range() {
    let cases: [(&[&str], &[&str]); 17] = [
        (&["generate", "--prompt", "x", "--temp", "-1"], &["--temp", "0 or more", "-1"]),
        (&["generate", "--prompt", "x", "--temp", "nan"], &["--temp", "0 or more"]),
        (&["generate", "--prompt", "x", "--top-p", "2"], &["--top-p", "up to 1"]),
        (&["generate", "--prompt", "x", "--min-p", "3"], &["--min-p", "0 to 1"]),
        (&["generate", "--prompt", "x", "--max-tokens", "0"], &["--max-tokens", "1 or more"]),
        (&["generate", "--prompt-ids", "1,x"], &["--prompt-ids", "1,17,5"]),
        (&["generate", "--prompt-ids", "1,4096"], &["--prompt-ids", "4096", "4095"]),
        (&["generate", "--prompt", "x", "--logit-bias", "5000=1"], &["--logit-bias", "4095"]),
        (&["generate", "--prompt-ids", "1", "--prompt", "x"], &["--prompt-ids", "--prompt"]),
        (&["generate", "--prompt", "x", "--dtype", "f64"], &["--dtype", "bf16"]),
        (&["generate", "--prompt", "x", "--model", ""], &["empty"]),
        (&["generate"], &["stdin", "empty"]),
        (&["chat", "--temp", "-1"], &["--temp", "0 or more"]),
        (&["demo", "--seed", "x"], &["--seed"]),
        (&["completions", "tcsh"], &["bash"]),
        (&["generat"], &["generate"]),
        (&["info", "--nope"], &["--nope"]),
    ];
    for (args, words) in cases {
        assert_error(&run(args), 2, words);
    }
}

#[test]
fn stdin_that_is_not_utf8_names_the_byte() {
    let output = run_with_stdin(&["generate"], b"Once \xff upon");
    assert_error(&output, 2, &["UTF-8", "offset 5", "0xff"]);
    let output = run_with_stdin(&["chat"], b"\xc3(\n");
    assert_error(&output, 2, &["UTF-8", "offset 0"]);
}

#[test]
fn missing_folder() {
    let folder = TempDir::new().expect("temporary folder");
    let missing = folder.path().join("not-there");
    let missing = missing.to_str().expect("UTF-8");
    for args in [
        &["generate", "--prompt", "x", "--model", missing][..],
        &["info", missing],
        &["chat", "--model", missing],
    ] {
        assert_error(&run(args), 3, &["not-there"]);
    }
}

#[test]
fn empty_folder() {
    let folder = TempDir::new().expect("temporary folder");
    let output = run(&["info", folder.path().to_str().expect("UTF-8")]);
    assert_error(&output, 3, &["config.json"]);
}

#[test]
fn config_without_model_type() {
    let folder = Folder::copy();
    folder.edit_json("config.json", |config| {
        config.remove("model_type");
    });
    assert_error(&folder.generate(), 3, &["model_type"]);
}

#[test]
fn unknown_family_lists_the_known_ones() {
    let folder = Folder::copy();
    folder.edit_json("config.json", |config| {
        config.insert("model_type".into(), "frobnicator".into());
    });
    assert_error(&folder.generate(), 3, &["frobnicator", "lfm2_moe"]);
}

#[test]
fn truncated_safetensors() {
    let folder = Folder::copy();
    let weights = folder.file("model.safetensors");
    let bytes = fs::read(&weights).expect("read");
    fs::write(&weights, &bytes[..bytes.len() / 2]).expect("write");
    assert_error(&folder.generate(), 3, &["model.safetensors"]);
}

#[test]
fn safetensors_header_longer_than_the_file() {
    let folder = Folder::copy();
    let weights = folder.file("model.safetensors");
    for length in [1_u64 << 30, u64::MAX] {
        let mut bytes = fs::read(Path::new(MODEL).join("model.safetensors")).expect("read");
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&weights, bytes).expect("write");
        assert_error(&folder.generate(), 3, &["model.safetensors", "header"]);
    }
}

#[test]
fn text_prompt_without_a_tokenizer() {
    let folder = Folder::copy();
    fs::remove_file(folder.file("tokenizer.json")).expect("removed");
    let output = run(&["generate", "--model", folder.arg(), "--prompt", "x"]);
    assert_error(&output, 2, &["tokenizer", "--prompt-ids"]);
    let output = run(&["generate", "--model", folder.arg(), "--prompt-ids", "1", "--stop", "x"]);
    assert_error(&output, 2, &["tokenizer", "--stop"]);
}

#[test]
fn template_that_errors() {
    let folder = Folder::copy();
    folder.edit_json("tokenizer_config.json", |config| {
        let template = "{{ raise_exception('no such role') }}";
        config.insert("chat_template".into(), template.into());
    });
    let output = run(&["generate", "--model", folder.arg(), "--prompt", "x"]);
    assert_error(&output, 1, &["template", "no such role"]);
    // Raw prompts do not touch the template.
    let raw = ["generate", "--model", folder.arg(), "--prompt", "x", "--raw", "-n", "1"];
    assert_ok(&run(&raw));
}

#[test]
fn prompt_longer_than_the_context() {
    let ids = vec!["5"; 3000].join(",");
    let output = run(&["generate", "--prompt-ids", &ids]);
    assert_error(&output, 1, &["context", "3000"]);
}

#[test]
fn offline_and_not_in_the_cache() {
    let cache = TempDir::new().expect("temporary folder");
    let output = zmlx(&["generate", "--model", "nobody/no-such-model", "--prompt", "x"])
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", cache.path())
        .output()
        .expect("zmlx starts");
    assert_error(&output, 3, &["nobody/no-such-model", "offline"]);
}

/// A folder below a regular file cannot be made by anybody, root included.
#[test]
fn cache_folder_that_cannot_be_written() {
    let place = TempDir::new().expect("temporary folder");
    let file = place.path().join("file");
    fs::write(&file, b"").expect("written");
    let cache = file.join("cache");
    let output = zmlx(&["generate", "--model", "nobody/no-such-model", "--prompt", "x"])
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", &cache)
        .output()
        .expect("zmlx starts");
    assert_error(&output, 3, &["nobody/no-such-model"]);
    // The embedded model either needs no cache or says which folder it could not write.
    let output = zmlx(&["info"])
        .env("XDG_CACHE_HOME", &cache)
        .env("ZMLX_CACHE_DIR", &cache)
        .output()
        .expect("zmlx starts");
    if output.status.code() != Some(0) {
        assert_error(&output, 3, &[cache.to_str().expect("UTF-8")]);
    }
}

/// ctrl-C while a reply is written: the text so far stays, exit code 130.
#[cfg(unix)]
#[test]
fn interrupt_ends_generate_with_130() {
    use std::io::Read;
    let mut child = zmlx(&["generate", "--prompt-ids", "1", "--max-tokens", "2000", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("zmlx starts");
    let mut first = [0];
    let mut out = child.stdout.take().expect("piped");
    out.read_exact(&mut first).expect("the reply has begun");
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(sent.success());
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("UTF-8");
    assert!(rest.ends_with('\n'), "{rest:?}");
    let output = child.wait_with_output().expect("zmlx ends");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
}
