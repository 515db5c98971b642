//! What sessions remember: prompts that go on from earlier ones, states that are saved and loaded, files of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use zmlx_graph::{Keep, SavedError};
use zmlx_mlx::{Array, io};
use zmlx_models::{
    DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, PatchOptions, Preset,
    PromptCacheError, Session,
};

/// Keys and values; a window and sinks; convolutions; delta nets; latents; latents and an indexer.
const FOLDERS: [&str; 6] =
    ["qwen3_moe-q4", "gpt_oss-q4", "lfm2_moe-q4", "qwen3_next-q4", "glm4_moe_lite-q4", "deepseek_v32-q4"];

/// Room for checkpoints of models this small.
const ROOM: usize = 64 << 20;

fn model(folder: &str, preset: Preset) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(folder);
    let patch = match preset {
        Preset::None => None,
        preset => Some(PatchOptions { preset, environment: false, ..PatchOptions::default() }),
    };
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, patch, ..LoadOptions::default() };
    Model::load(&dir, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{folder}: {e}"))
}

/// Ids that look like nothing in particular.
fn ids(model: &Model, count: usize, seed: u32) -> Vec<u32> {
    let vocabulary = model.vocab_size() as u32;
    (0..count as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % vocabulary)
        .collect()
}

fn options() -> GenerateOptions {
    GenerateOptions { max_tokens: 12, ignore_eos: true, ..GenerateOptions::default() }
}

/// The tokens after a prompt, and how many of its own were reused.
fn go_on(session: &mut Session<'_>, prompt: &[u32]) -> (Vec<u32>, usize) {
    let done = session.generate(prompt, &options(), &mut |_| Flow::Continue).unwrap();
    (done.tokens, done.reused_tokens)
}

fn fresh(model: &Model, prompt: &[u32]) -> Vec<u32> {
    let (tokens, reused) = go_on(&mut Session::new(model), prompt);
    assert_eq!(reused, 0);
    tokens
}

fn concat(parts: &[&[u32]]) -> Vec<u32> {
    parts.concat()
}

#[test]
fn a_prompt_goes_on_from_what_it_shares_with_earlier_ones() {
    for folder in FOLDERS {
        for preset in [Preset::None, Preset::Default] {
            let model = model(folder, preset);
            let rewinds = !model.executor().needs_checkpoints();
            let name = format!("{folder} {preset}");
            let first = ids(&model, 90, 1);
            let mut session = Session::new(&model);
            session.keep_checkpoints(ROOM);
            // As a chat template that begins a reply with five tokens and does not repeat them.
            session.expect_prefix(85);
            let (reply, _) = go_on(&mut session, &first);
            assert_eq!(reply, fresh(&model, &first), "{name}");

            // The whole of it and more: all is reused but for the last token told, which was not run.
            let more = concat(&[&first, &reply, &ids(&model, 7, 2)]);
            let (tokens, reused) = go_on(&mut session, &more);
            assert_eq!((reused, &tokens), (first.len() + reply.len() - 1, &fresh(&model, &more)), "{name}");

            // Parts from the first prompt behind its end, where no checkpoint is: the nearest before serves.
            let other = concat(&[&first, &reply[..6], &ids(&model, 9, 3)]);
            let (tokens, reused) = go_on(&mut session, &other);
            assert_eq!(tokens, fresh(&model, &other), "{name}");
            assert!(reused == first.len() + 6 || (!rewinds && reused == first.len() - 1), "{name}: {reused}");

            // Parts where it was said to.
            let turn = concat(&[&first[..85], &ids(&model, 11, 4)]);
            let (tokens, reused) = go_on(&mut session, &turn);
            assert_eq!((reused, &tokens), (85, &fresh(&model, &turn)), "{name}");

            // Again, word for word: only its last token is run.
            let again = go_on(&mut session, &turn);
            assert_eq!(again, (tokens, turn.len() - 1), "{name}");

            // Nothing in common, or nothing from where a state could go on.
            let strange = ids(&model, 20, 5);
            let shared = strange.iter().zip(&turn).take_while(|(a, b)| a == b).count();
            let (tokens, reused) = go_on(&mut session, &strange);
            assert_eq!(tokens, fresh(&model, &strange), "{name}");
            assert!(reused <= shared, "{name}: {reused} of {shared}");
        }
    }
}

#[test]
fn without_checkpoints_what_cannot_go_back_begins_anew() {
    for (folder, reuses) in [("lfm2_moe-q4", false), ("qwen3_next-q4", false), ("qwen3_moe-q4", true)] {
        let model = model(folder, Preset::Default);
        let first = ids(&model, 40, 1);
        let mut session = Session::new(&model);
        go_on(&mut session, &first);
        let other = concat(&[&first[..30], &ids(&model, 9, 3)]);
        assert_eq!(session.reusable(&other), if reuses { 30 } else { 0 }, "{folder}");
        let (tokens, reused) = go_on(&mut session, &other);
        assert_eq!((reused, tokens), (if reuses { 30 } else { 0 }, fresh(&model, &other)), "{folder}");
        assert_eq!(session.checkpoint_bytes(), 0);
    }
}

#[test]
fn checkpoints_stay_within_their_bounds() {
    let model = model("qwen3_next-q4", Preset::Default);
    let mut session = Session::new(&model);
    session.keep_checkpoints(ROOM);
    let mut prompt = ids(&model, 10, 1);
    go_on(&mut session, &prompt);
    let one = session.checkpoint_bytes();
    assert!(one > 0);
    for turn in 0..12 {
        prompt.extend(ids(&model, 15, turn + 2));
        go_on(&mut session, &prompt);
        let bytes = session.checkpoint_bytes();
        assert_eq!(bytes, one * (turn as usize + 2).min(8), "turn {turn}");
    }
    session.keep_checkpoints(3 * one + 1);
    assert_eq!(session.checkpoint_bytes(), 3 * one);
    session.keep_checkpoints(one - 1);
    assert_eq!(session.checkpoint_bytes(), 0);
    session.reset();
    assert!(session.seen().is_empty());
}

/// Logits of three calls of some tokens each, as bits.
fn bits(model: &Model, state: &mut zmlx_graph::State) -> Vec<u32> {
    let mut all = Vec::new();
    for (n, seed) in [(1, 7), (1, 8), (5, 9)] {
        let logits = model.run(&ids(model, n, seed), state).unwrap();
        all.extend(logits.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits));
    }
    all
}

#[test]
fn a_saved_state_goes_on_bit_for_bit() {
    for folder in FOLDERS {
        for preset in [Preset::None, Preset::Default, Preset::Fast] {
            let model = model(folder, preset);
            let mut state = model.new_state();
            model.run(&ids(&model, 70, 1), &mut state).unwrap().eval().unwrap();
            let saved = model.executor().save(&mut state, Keep::All).unwrap();
            let mut loaded = model.executor().load(&saved).unwrap();
            assert_eq!(loaded.position(), 70);
            assert_eq!(bits(&model, &mut loaded), bits(&model, &mut state), "{folder} {preset}");
        }
    }
}

#[test]
fn stock_and_patched_take_each_others_states_and_half_precision_is_refused() {
    for folder in FOLDERS {
        let (stock, patched) = (model(folder, Preset::None), model(folder, Preset::Default));
        for (from, to) in [(&stock, &patched), (&patched, &stock)] {
            let prompt = ids(from, 70, 1);
            let (mut theirs, mut own) = (from.new_state(), to.new_state());
            from.run(&prompt, &mut theirs).unwrap().eval().unwrap();
            to.run(&prompt, &mut own).unwrap().eval().unwrap();
            let saved = from.executor().save(&mut theirs, Keep::All).unwrap();
            let mut taken = to.executor().load(&saved).unwrap();
            let logits = |state: &mut _| to.run(&ids(to, 3, 4), state).unwrap().to_vec::<f32>().unwrap();
            let (a, b) = (logits(&mut taken), logits(&mut own));
            let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let off = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!("{folder}: {off:.1e} off of {largest:.1}");
            assert!(off <= 2e-3 * largest, "{folder}: {off} of {largest}");
        }
        let fast = model(folder, Preset::Fast);
        let mut state = patched.new_state();
        patched.run(&ids(&patched, 9, 1), &mut state).unwrap().eval().unwrap();
        let saved = patched.executor().save(&mut state, Keep::All).unwrap();
        match fast.executor().load(&saved) {
            Err(SavedError::Slot { problem, .. }) => {
                assert!(problem.contains("float32") && problem.contains("float16"), "{problem}");
            }
            other => panic!("{folder}: {other:?}"),
        }
    }
}

/// A folder of its own, with a file in it that is not there yet.
fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cache.safetensors");
    (folder, file)
}

#[test]
fn a_file_goes_on_where_the_session_was() {
    for folder in FOLDERS {
        for preset in [Preset::None, Preset::Default] {
            let (dir, file) = place();
            let model = model(folder, preset);
            let first = ids(&model, 90, 1);
            let mut session = Session::new(&model);
            session.keep_checkpoints(ROOM);
            session.expect_prefix(80);
            let (reply, _) = go_on(&mut session, &first);
            session.save(&file).unwrap();
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");

            let more = concat(&[&first, &reply, &ids(&model, 7, 2)]);
            let other = concat(&[&first[..83], &ids(&model, 7, 2)]);
            for prompt in [more, other] {
                let mut loaded = Session::load(&model, &file, ROOM).unwrap();
                assert_eq!(loaded.seen(), session.seen());
                assert_eq!(loaded.checkpoint_bytes(), session.checkpoint_bytes());
                let (tokens, reused) = go_on(&mut loaded, &prompt);
                assert_eq!(tokens, fresh(&model, &prompt), "{folder} {preset}");
                assert!(reused >= 80, "{folder} {preset}: {reused}");
            }
        }
    }
}

#[test]
fn a_file_of_another_model_or_prompt_is_refused() {
    let (_dir, file) = place();
    let (four, three) = (model("qwen3_moe-q4", Preset::Default), model("qwen3_moe-q3", Preset::Default));
    let mut session = Session::new(&four);
    assert!(matches!(session.save(&file), Err(PromptCacheError::Empty)));
    let prompt = ids(&four, 20, 1);
    go_on(&mut session, &prompt);
    session.save(&file).unwrap();
    match Session::load(&three, &file, 0) {
        Err(PromptCacheError::Other { what: "quantization", .. }) => {}
        other => panic!("{:?}", other.err()),
    }
    let lfm2 = model("lfm2_moe-q4", Preset::None);
    let error = Session::load(&lfm2, &file, 0).err().unwrap();
    assert!(matches!(error, PromptCacheError::Other { what: "family", .. }), "{error}");

    let loaded = Session::load(&four, &file, 0).unwrap();
    assert_eq!(loaded.fits(&file, &prompt).unwrap(), 19);
    let strange: Vec<u32> = prompt.iter().map(|id| (id + 1) % 7).collect();
    match loaded.fits(&file, &strange) {
        Err(PromptCacheError::Prompt { cached: 31, shared: 0, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(Session::load(&four, &file.with_file_name("none"), 0), Err(PromptCacheError::Read(_))));
}

/// A file that was written, its tensors and what it says of itself.
fn taken_apart(file: &Path) -> (BTreeMap<String, Array>, BTreeMap<String, String>) {
    let bytes = std::fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let metadata = serde_json::from_value(header["__metadata__"].clone()).unwrap();
    (io::load_safetensors(file).unwrap(), metadata)
}

#[test]
fn damaged_and_hostile_files_are_one_error() {
    for folder in ["lfm2_moe-q4", "gpt_oss-q4"] {
        let (_dir, file) = place();
        let model = model(folder, Preset::Default);
        let mut session = Session::new(&model);
        session.keep_checkpoints(ROOM);
        go_on(&mut session, &ids(&model, 40, 1));
        session.save(&file).unwrap();
        let whole = std::fs::read(&file).unwrap();
        let broken = file.with_file_name("broken.safetensors");
        let refused = |what: &str| {
            let error = Session::load(&model, &broken, ROOM).err();
            let error = error.unwrap_or_else(|| panic!("{folder}: {what} was taken")).to_string();
            assert!(error.contains("prompt cache") && !error.contains('\n'), "{folder}: {what}: {error}");
        };
        for cut in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&broken, &whole[..cut]).unwrap();
            refused(&format!("cut to {cut} bytes"));
        }
        let (arrays, metadata) = taken_apart(&file);
        let state: Value = serde_json::from_str(&metadata["state"]).unwrap();
        let slot = (0..).find(|i| arrays.contains_key(&format!("state.{i}.keys"))).unwrap();

        type Change = fn(&mut BTreeMap<String, Array>, &mut BTreeMap<String, String>, &mut Value, usize);
        let changes: &[(&str, Change)] = &[
            ("no format", |_, m, _, _| drop(m.remove("format"))),
            ("another version", |_, m, _, _| drop(m.insert("version".into(), "9".into()))),
            ("no state", |_, m, s, _| {
                m.remove("state");
                *s = Value::Null;
            }),
            ("another dtype", |_, m, _, _| drop(m.insert("dtype".into(), "float16".into()))),
            ("no tokens", |a, _, _, _| drop(a.remove("tokens"))),
            ("a token too large", |a, _, _, _| {
                let n = a["tokens"].size();
                a.insert("tokens".into(), Array::from_vec(vec![u32::MAX; n], &[n as i32]).unwrap());
            }),
            ("fewer tokens", |a, _, _, _| {
                a.insert("tokens".into(), Array::from_slice(&[1u32, 2], &[2]).unwrap());
            }),
            ("a negative position", |_, _, s, _| s["state"]["position"] = json!(-1)),
            ("the last position", |_, _, s, _| s["state"]["position"] = json!(i32::MAX)),
            ("keys that are missing", |a, _, _, n| drop(a.remove(&format!("state.{n}.keys")))),
            ("keys of half precision", |a, _, _, n| {
                let name = format!("state.{n}.keys");
                let half = a[&name].astype(zmlx_mlx::Dtype::Float16).unwrap();
                a.insert(name, half);
            }),
            ("keys of another shape", |a, _, _, n| {
                let name = format!("state.{n}.keys");
                let flat = a[&name].reshape(&[1, 1, 1, -1]).unwrap();
                a.insert(name, flat);
            }),
            ("a first position beyond", |_, _, s, n| s["state"]["slots"][n]["first"] = json!(1 << 20)),
            ("a first position below 0", |_, _, s, n| s["state"]["slots"][n]["first"] = json!(i32::MIN)),
            ("slots of another kind", |_, _, s, n| s["state"]["slots"][n]["kind"] = json!("delta_state")),
            ("fewer slots", |_, _, s, _| drop(s["state"]["slots"].as_array_mut().unwrap().pop())),
            ("a slot left out", |_, _, s, n| s["state"]["slots"][n] = Value::Null),
            ("arrays of other names", |_, _, s, n| s["state"]["slots"][n]["arrays"] = json!(["state"])),
            ("an array too many", |a, _, _, _| {
                a.insert("more".into(), Array::from_slice(&[1.0f32], &[1]).unwrap());
            }),
            ("a checkpoint beyond the end", |_, _, s, _| s["checkpoints"][0]["position"] = json!(1000)),
            ("a checkpoint at -1", |_, _, s, _| s["checkpoints"][0]["position"] = json!(-1)),
        ];
        for (what, change) in changes {
            let (mut arrays, mut metadata, mut state) = (arrays.clone(), metadata.clone(), state.clone());
            change(&mut arrays, &mut metadata, &mut state, slot);
            if !state.is_null() {
                metadata.insert("state".into(), state.to_string());
            }
            io::save_safetensors(&broken, &arrays, &metadata).unwrap();
            refused(what);
        }
    }
}
