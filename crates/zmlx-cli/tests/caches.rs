//! Files of caches, turns of a chat, and keys and values in few bits, with the real binary on the embedded model.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn zmlx(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_zmlx"))
        .args(args)
        .args(["--device", "cpu", "--dtype", "f32"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("zmlx starts");
    // A program that refuses its arguments closes the pipe early.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    child.wait_with_output().expect("zmlx ends")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn joined(ids: &[u32]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The record of a generation of eight tokens.
fn generate(prompt: &[u32], more: &[&str]) -> Value {
    let ids = joined(prompt);
    let args = [&["generate", "--prompt-ids", &ids, "-n", "8", "--ignore-eos", "--json"], more].concat();
    let output = zmlx(&args, "");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("one JSON record")
}

fn tokens(record: &Value) -> Vec<u32> {
    serde_json::from_value(record["tokens"].clone()).expect("tokens")
}

/// One line that holds all `words`, and exit code 2.
#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    let output = zmlx(args, "");
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.starts_with("error: ") && text.trim_end().lines().count() == 1, "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

fn path(file: &Path) -> &str {
    file.to_str().expect("UTF-8")
}

#[test]
fn a_prompt_goes_on_from_a_file() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("caches");
    let file = path(&file);
    let prompt: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 200).collect();
    // The file need not be there if it is the one that will be written.
    let first = generate(&prompt, &["--prompt-cache", file, "--save-prompt-cache", file]);
    assert_eq!(first["reused_tokens"], 0);

    let more = [&prompt[..], &tokens(&first), &[9, 8, 7]].concat();
    let fresh = generate(&more, &[]);
    for preset in ["default", "none"] {
        let loaded = generate(&more, &["--prompt-cache", file, "--preset", preset]);
        assert_eq!(tokens(&loaded), tokens(&fresh), "{preset}");
        assert_eq!(loaded["reused_tokens"], 47, "{preset}");
    }
    // The model has convolutions, which go back to the end of the prompt and no further.
    let parted = [&prompt[..], &[9, 8, 7]].concat();
    assert_eq!(generate(&parted, &["--prompt-cache", file])["reused_tokens"], 39);

    let ids = joined(&prompt[..20]);
    let args = ["generate", "--prompt-cache", file, "--prompt-ids"];
    refused(&[&args[..], &[&ids]].concat(), &["prompt cache", "shares 20 of its 47 tokens"]);
    refused(&[&args[..], &["5,5,5"]].concat(), &["prompt cache", "shares 0 of its 47 tokens"]);
    refused(&[&args[..], &[&ids, "--preset", "fast"]].concat(), &["float16", "float32"]);
    let none = folder.path().join("none");
    refused(&["generate", "--prompt-ids", "5", "--prompt-cache", path(&none)], &["prompt cache", "none"]);
    std::fs::write(&none, b"not a cache").expect("written");
    refused(&["generate", "--prompt-ids", "5", "--prompt-cache", path(&none)], &["prompt cache", "none"]);
}

#[test]
fn a_turn_of_a_chat_reuses_the_turns_before() {
    let lines = "Tell me a story about a fox.\nAnd then?\n/exit\n";
    let output = zmlx(&["chat", "-n", "12", "--stats"], lines);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let reused: Vec<(usize, usize)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("prompt: "))
        .map(|line| {
            let words: Vec<&str> = line.split([' ', '(']).filter(|w| !w.is_empty()).collect();
            (words[0].parse().expect("tokens"), words[2].parse().expect("reused tokens"))
        })
        .collect();
    let [(first, 0), (second, reused)] = reused[..] else { panic!("{text}") };
    assert!(reused + 6 >= first && reused < second, "{text}");
    assert!(text.contains("checkpoints: "), "{text}");
}

#[test]
fn keys_and_values_in_few_bits() {
    let prompt: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 200).collect();
    let plain =
        tokens(&generate(&prompt, &["--kv-bits", "8", "--kv-group-size", "32", "--kv-start", "1000"]));
    assert_eq!(plain, tokens(&generate(&prompt, &[])));
    assert_eq!(tokens(&generate(&prompt, &["--kv-bits", "8", "--kv-group-size", "32"])).len(), 8);
    let args = ["generate", "--prompt-ids", "5,6,7"];
    refused(&[&args[..], &["--kv-bits", "5"]].concat(), &["--kv-bits must be 4 or 8", "5"]);
    refused(&[&args[..], &["--kv-bits", "4", "--kv-group-size", "48"]].concat(), &["32, 64 or 128"]);
    refused(&[&args[..], &["--kv-bits", "4", "--kv-start", "-1"]].concat(), &["--kv-start", "0 to"]);
    refused(&[&args[..], &["--kv-start", "9"]].concat(), &["--kv-bits"]);
}
