//! Damaged and hostile GGUF files: each gets one clear error, and none ends the process.

mod gguf_writer;

use std::path::Path;

use gguf_writer::{F32, Q4_1, Writer};
use zmlx_models::{LoadOptions, Model, inspect};

const H: i32 = 32;
const V: i32 = 64;

/// A llama of one layer.
fn tiny() -> Writer {
    let mut w = Writer::default();
    w.text("general.architecture", "llama").u32("llama.block_count", 1).u32("llama.context_length", 64);
    w.u32("llama.embedding_length", H as u32).u32("llama.feed_forward_length", 64);
    w.u32("llama.attention.head_count", 2).u32("llama.attention.head_count_kv", 1);
    w.f32("llama.attention.layer_norm_rms_epsilon", 1e-5).f32("llama.rope.freq_base", 1e4);
    let quantized = |w: &mut Writer, name: &str, rows: i32, columns: i32| {
        let bytes: Vec<u8> = [0x00, 0x20, 0x00, 0xa8].into_iter().chain((0..16).map(|i| i * 17)).collect();
        let data = bytes.repeat((rows * columns / 32) as usize);
        w.tensor(name, &[rows, columns], Q4_1, data);
    };
    quantized(&mut w, "token_embd.weight", V, H);
    w.floats("output_norm.weight", &[H], &[1.0; H as usize]);
    for (name, rows, columns) in [
        ("attn_q", H, H),
        ("attn_k", H / 2, H),
        ("attn_v", H / 2, H),
        ("attn_output", H, H),
        ("ffn_gate", 64, H),
        ("ffn_up", 64, H),
        ("ffn_down", H, 64),
    ] {
        quantized(&mut w, &format!("blk.0.{name}.weight"), rows, columns);
    }
    for name in ["attn_norm", "ffn_norm"] {
        w.floats(&format!("blk.0.{name}.weight"), &[H], &[1.0; H as usize]);
    }
    w.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "gpt-2");
    let tokens: Vec<String> = (0..V).map(|i| char::from_u32(0x21 + i as u32).unwrap().to_string()).collect();
    w.texts("tokenizer.ggml.tokens", &tokens).texts("tokenizer.ggml.merges", &[]);
    w
}

fn load(dir: &Path, bytes: &[u8]) -> Result<Model, String> {
    let path = dir.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::load(&path, &LoadOptions::default(), &mut |_| {}).map_err(|e| e.to_string())
}

#[track_caller]
fn expect(dir: &Path, what: &str, bytes: &[u8], words: &[&str]) {
    let text = load(dir, bytes).err().unwrap_or_else(|| panic!("{what} loads"));
    assert!(!text.contains('\n') && text.contains("model.gguf"), "{what}: {text}");
    for word in words {
        assert!(text.contains(word), "{what}: {word:?} is not in: {text}");
    }
}

#[test]
fn the_file_that_is_spoilt_below_is_fine() {
    let dir = tempfile::tempdir().unwrap();
    let model = load(dir.path(), &tiny().bytes()).unwrap();
    assert_eq!(model.vocab_size(), V as usize);
    assert_eq!(model.tokenizer().unwrap().encode("A!", true).unwrap(), [32, 0]);
}

#[test]
fn metadata() {
    let dir = tempfile::tempdir().unwrap();
    type Edit = fn(&mut Writer) -> &mut Writer;
    let cases: [(&str, Edit, &[&str]); 27] = [
        ("no architecture", |w| w.remove("general.architecture"), &["general.architecture", "missing"]),
        ("other architecture", |w| w.text("general.architecture", "gemma"), &["gemma", "lfm2moe"]),
        ("architecture a number", |w| w.u32("general.architecture", 1), &["must be a text"]),
        ("no layers", |w| w.remove("llama.block_count"), &["llama.block_count", "missing"]),
        ("too many layers", |w| w.u32("llama.block_count", 4_000_000_000), &["1 to 1024"]),
        ("more layers", |w| w.u32("llama.block_count", 2), &["missing tensor", "model.layers.1"]),
        ("0 heads", |w| w.u32("llama.attention.head_count", 0), &["head_count"]),
        ("7 heads", |w| w.u32("llama.attention.head_count", 7), &["head_count", "evenly"]),
        ("eps a text", |w| w.text("llama.attention.layer_norm_rms_epsilon", "x"), &["must be a number"]),
        (
            "eps not a number",
            |w| w.f32("llama.attention.layer_norm_rms_epsilon", f32::NAN),
            &["rms_norm_eps"],
        ),
        ("width", |w| w.u32("llama.embedding_length", 64), &["expected shape"]),
        ("huge width", |w| w.u32("llama.embedding_length", u32::MAX), &["hidden_size"]),
        ("experts", |w| w.u32("llama.expert_count", 8), &["expert_count", "not supported"]),
        ("yarn", |w| w.text("llama.rope.scaling.type", "yarn"), &["yarn", "not supported"]),
        (
            "partly rotated",
            |w| w.u32("llama.attention.key_length", 16).u32("llama.rope.dimension_count", 8),
            &["8 differs"],
        ),
        ("split", |w| w.u32("split.count", 3), &["one part of several", "llama-gguf-split"]),
        ("alignment 0", |w| w.u32("general.alignment", 0), &["general.alignment = 0"]),
        ("alignment 48", |w| w.u32("general.alignment", 48), &["general.alignment = 48"]),
        ("alignment a text", |w| w.text("general.alignment", "32"), &["no whole number"]),
        ("value type", |w| w.raw("odd", 77, vec![]), &["odd", "unknown value type 77"]),
        (
            "array of arrays",
            |w| w.raw("odd", 9, [9u32.to_le_bytes().as_slice(), &[0; 8]].concat()),
            &["value type 9"],
        ),
        ("endless text", |w| w.raw("odd", 8, u64::MAX.to_le_bytes().to_vec()), &["odd", "claims", "follow"]),
        (
            "endless array",
            |w| w.raw("odd", 9, [8u32.to_le_bytes().as_slice(), &[255; 8]].concat()),
            &["odd", "claims"],
        ),
        ("spm", |w| w.text("tokenizer.ggml.model", "llama"), &["tokenizer.ggml.model", "gpt2"]),
        ("pre", |w| w.text("tokenizer.ggml.pre", "tekken"), &["tekken", "smollm", "llama-bpe"]),
        ("no tokens", |w| w.remove("tokenizer.ggml.tokens"), &["tokenizer.ggml.tokens", "missing"]),
        ("a merge of one", |w| w.texts("tokenizer.ggml.merges", &["zz".to_owned()]), &["\"zz\" is no pair"]),
    ];
    for (what, edit, words) in cases {
        let mut w = tiny();
        edit(&mut w);
        expect(dir.path(), what, &w.bytes(), words);
    }
    let more: [(&str, Edit, &[&str]); 5] = [
        (
            "merges of nothing",
            |w| {
                w.texts("tokenizer.ggml.tokens", &["a".to_owned(), "ab".to_owned()]);
                w.texts("tokenizer.ggml.merges", &["a b".to_owned()])
            },
            &["`b` out of vocabulary"],
        ),
        (
            "token twice",
            |w| w.texts("tokenizer.ggml.tokens", &["a".to_owned(), "a".to_owned()]),
            &["there twice"],
        ),
        ("kinds too short", |w| w.i32s("tokenizer.ggml.token_type", &[1]), &["token_type"]),
        ("end token", |w| w.u32("tokenizer.ggml.eos_token_id", 9999), &["9999 is no token"]),
        ("bos a text", |w| w.text("tokenizer.ggml.bos_token_id", "x"), &["bos_token_id"]),
    ];
    for (what, edit, words) in more {
        let mut w = tiny();
        edit(&mut w);
        expect(dir.path(), what, &w.bytes(), words);
    }
}

#[test]
fn tensors() {
    let dir = tempfile::tempdir().unwrap();
    type Edit = fn(&mut Vec<(String, Vec<u64>, u32, Vec<u8>)>);
    let cases: [(&str, Edit, &[&str]); 13] = [
        ("missing", |t| drop(t.remove(3)), &["missing tensor"]),
        (
            "extra",
            |t| t.push(("blk.0.attn_sinks.weight".into(), vec![1], F32, vec![0; 4])),
            &["extra", "attn_sinks"],
        ),
        (
            "twice",
            |t| {
                let first = t[2].clone();
                t.push(first)
            },
            &["is there twice"],
        ),
        ("Q6_K", |t| t[0].2 = 14, &["token_embd.weight", "Q6_K", "requantise"]),
        ("unknown type", |t| t[0].2 = 1234, &["number 1234"]),
        ("no axes", |t| t[1].1 = vec![], &["0 axes"]),
        ("five axes", |t| t[1].1 = vec![1; 5], &["5 axes"]),
        ("an empty axis", |t| t[1].1 = vec![0, 32], &["cannot be"]),
        ("a wild axis", |t| t[1].1 = vec![u64::MAX, 32], &["cannot be"]),
        ("half a block", |t| t[0].1 = vec![64, 16], &["blocks of 32"]),
        ("beyond the end", |t| t.last_mut().unwrap().1 = vec![1 << 20], &["cut off"]),
        ("wrong shape", |t| t[0].1 = vec![32, 64], &["model.embed_tokens", "32 columns"]),
        ("infinite scale", |t| t[0].3[1] = 0x7c, &["token_embd.weight", "finite"]),
    ];
    for (what, edit, words) in cases {
        let mut w = tiny();
        edit(w.tensors());
        expect(dir.path(), what, &w.bytes(), words);
    }
}

#[test]
fn the_frame() {
    let dir = tempfile::tempdir().unwrap();
    let fine = tiny().bytes();
    let edit = |at: usize, bytes: &[u8]| {
        let mut file = fine.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let cases: [(&str, Vec<u8>, &[&str]); 9] = [
        ("empty", vec![], &["no GGUF file"]),
        ("three bytes", b"GGU".to_vec(), &["no GGUF file"]),
        ("another format", b"PK\x03\x04 and more".to_vec(), &["no GGUF file"]),
        ("version 1", edit(4, &[1]), &["version 1", "2 and 3"]),
        ("big-endian", edit(4, &3u32.to_be_bytes()), &["big-endian"]),
        ("endless tensors", edit(8, &[255; 8]), &["tensor"]),
        ("endless keys", edit(16, &[255; 8]), &["model.gguf"]),
        ("endless key", edit(24, &[255; 8]), &["a key claims"]),
        ("key not UTF-8", edit(32, &[0xff]), &["not UTF-8"]),
    ];
    for (what, bytes, words) in cases {
        expect(dir.path(), what, &bytes, words);
    }
    // One tensor inside another.
    let at = fine.windows(17).position(|w| w == b"token_embd.weight").unwrap();
    let offset = at + 17 + 4 + 16 + 4;
    let second = fine.windows(18).position(|w| w == b"output_norm.weight").unwrap() + 18 + 4 + 8 + 4;
    assert_eq!(fine[offset..offset + 8], [0; 8]);
    expect(dir.path(), "overlap", &edit(second, &32u64.to_le_bytes()), &["share bytes"]);
    expect(dir.path(), "misaligned", &edit(second, &33u64.to_le_bytes()), &["33", "multiple of 32"]);
    expect(dir.path(), "far away", &edit(second, &(u64::MAX - 31).to_le_bytes()), &["cut off"]);
}

#[test]
fn every_cut_and_many_flips_end_in_an_error_or_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let fine = tiny().bytes();
    let path = dir.path().join("model.gguf");
    for length in (0..fine.len()).step_by(7) {
        std::fs::write(&path, &fine[..length]).unwrap();
        assert!(inspect(&path).is_err(), "{length} of {} bytes", fine.len());
    }
    let mut rng = fastrand::Rng::with_seed(5);
    for _ in 0..600 {
        let mut file = fine.clone();
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(4..fine.len());
            file[at] = rng.u8(..);
        }
        std::fs::write(&path, &file).unwrap();
        // A panic would end the test.
        if let Err(error) = inspect(&path) {
            assert!(!error.to_string().is_empty());
        }
    }
}

#[test]
fn what_is_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model.gguf");
    std::fs::create_dir(&folder).unwrap();
    assert!(inspect(&folder).unwrap_err().to_string().contains("config.json"));
    let missing = dir.path().join("none.gguf");
    assert!(inspect(&missing).unwrap_err().to_string().contains("none.gguf"));
}
