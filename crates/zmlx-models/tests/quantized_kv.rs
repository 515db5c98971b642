//! Keys and values in few bits: mlx-lm's tokens, attention computed from what the codes stand for, and refusals.
//!
//! `data/kv_quantization.json` holds what mlx-lm 0.32.2 on the CPU gives for folders of `oracle/`, every float tensor cast
//! to float32, with `kv_bits`, `kv_group_size` and `quantized_kv_start`: 24 greedy tokens after prompt number `prompt` of
//! the folder's `golden.json`, and the smallest gap between the two best logits of a step.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use zmlx_graph::{Keep, KvQuantization, KvQuantizationError};
use zmlx_models::{
    DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadError, LoadOptions, Model, PatchOptions, Session,
};

#[derive(Deserialize)]
struct Case {
    folder: String,
    bits: i32,
    group_size: i32,
    start: i32,
    prompt: usize,
    tokens: Vec<u32>,
    smallest_margin: f32,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(name)
}

fn load(name: &str, with: KvQuantization, patched: bool) -> Result<Model, LoadError> {
    let options = LoadOptions {
        dtype: DtypeChoice::F32,
        device: DeviceChoice::Cpu,
        patch: patched.then(|| PatchOptions { environment: false, ..PatchOptions::default() }),
        kv_quantization: Some(with),
        ..LoadOptions::default()
    };
    Model::load(&folder(name), &options, &mut |_| {})
}

fn prompt(name: &str, index: usize) -> Vec<u32> {
    let text = std::fs::read_to_string(folder(name).join("golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(golden["f32"][index]["prompt"].clone()).unwrap()
}

#[test]
fn tokens_are_those_of_mlx_lm() {
    let text = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/kv_quantization.json"),
    );
    let cases: Vec<Case> = serde_json::from_str(&text.unwrap()).unwrap();
    for patched in [false, true] {
        for case in &cases {
            let Case { folder, bits, group_size, start, .. } = case;
            let with = KvQuantization { bits: *bits, group_size: *group_size, start: *start };
            let model = load(folder, with, patched).unwrap();
            if let Some(report) = model.patch_report() {
                let some = report.patterns.iter().any(|p| p.matched > 0);
                assert!(some && !report.native, "{folder}: attention is on MLX, the rest is not\n{report}");
            }
            let options =
                GenerateOptions { max_tokens: case.tokens.len(), ignore_eos: true, ..Default::default() };
            let prompt = prompt(folder, case.prompt);
            let made = Session::new(&model).generate(&prompt, &options, &mut |_| Flow::Continue).unwrap();
            let margin = case.smallest_margin;
            assert!(margin > 0.02, "{folder}: a margin of {margin} says little");
            assert_eq!(
                made.tokens, case.tokens,
                "{folder}, patched {patched}, {with:?}, prompt {}, smallest margin {margin}",
                case.prompt
            );
        }
    }
}

#[test]
fn sessions_go_back_and_states_are_saved_in_few_bits() {
    for (name, start) in [("qwen3_moe-q4", 0), ("lfm2_moe-q4", 0), ("qwen3_moe-q4", 100)] {
        let with = KvQuantization { bits: 8, group_size: 64, start };
        let model = load(name, with, false).unwrap();
        let first = prompt(name, 2);
        let options = GenerateOptions { max_tokens: 8, ignore_eos: true, ..Default::default() };
        let mut session = Session::new(&model);
        session.keep_checkpoints(1 << 20);
        session.expect_prefix(60);
        let mut go = |prompt: &[u32]| session.generate(prompt, &options, &mut |_| Flow::Continue).unwrap();
        go(&first);
        let other = [&first[..60], &first[5..20]].concat();
        assert_eq!(go(&other).reused_tokens, 60, "{name}");

        let mut state = model.new_state();
        for part in first.chunks(40) {
            model.run(part, &mut state).unwrap().eval().unwrap();
        }
        let saved = model.executor().save(&mut state, Keep::All).unwrap();
        let names: Vec<&str> =
            saved.slots.iter().flatten().flat_map(|s| &s.arrays).map(|(name, _)| *name).collect();
        assert_eq!(names.contains(&"keys.codes"), start == 0, "{name}: {names:?}");
        assert_eq!(names.contains(&"keys"), start == 100, "{name}: {names:?}");
        let mut loaded = model.executor().load(&saved).unwrap();
        // Twice, so that with the later start both cross it.
        for tokens in [&first[..30], &first[30..33]] {
            let [a, b] = [&mut loaded, &mut state]
                .map(|state| model.run(tokens, state).unwrap().to_vec::<f32>().unwrap());
            assert!(a == b, "{name}: a loaded state goes on as the other");
        }

        // Other settings, or none, hold something else.
        let others = [KvQuantization { bits: 4, ..with }, KvQuantization { group_size: 32, ..with }];
        for other in others {
            let model = load(name, other, false).unwrap();
            assert!(start > 0 || model.executor().load(&saved).is_err(), "{name} {other:?}");
        }
    }
}

#[test]
fn what_cannot_be_quantised_is_refused_with_the_reason() {
    let with = KvQuantization { bits: 4, group_size: 64, start: 0 };
    for (name, says) in [
        ("gpt_oss-q4", "sliding window"),
        ("gemma3_text-q4", "sliding window"),
        ("glm4_moe_lite-q4", "mla_attention"),
        ("deepseek_v32-q4", "sparse_mla_attention"),
    ] {
        match load(name, with, true).unwrap_err() {
            LoadError::KvQuantization(error @ KvQuantizationError::Cache { .. }) => {
                let text = error.to_string();
                assert!(text.contains(says) && text.contains("--kv-bits"), "{name}: {text}");
            }
            other => panic!("{name}: {other}"),
        }
    }
    match load("llama-q4", KvQuantization { group_size: 128, ..with }, true).unwrap_err() {
        LoadError::KvQuantization(KvQuantizationError::Heads {
            width: 64, group_size: 128, hint, ..
        }) => {
            assert_eq!(hint, "--kv-group-size 64 fits");
        }
        other => panic!("{other}"),
    }
    for wrong in [
        KvQuantization { bits: 3, ..with },
        KvQuantization { bits: 0, ..with },
        KvQuantization { group_size: 0, ..with },
        KvQuantization { start: -1, ..with },
    ] {
        let error = load("llama-q4", wrong, false).unwrap_err();
        assert!(
            matches!(error, LoadError::KvQuantization(KvQuantizationError::Setting { .. })),
            "{wrong:?}: {error}"
        );
    }
}
