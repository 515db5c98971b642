//! Every family's greedy tokens and first logits are mlx-lm's.
//!
//! `data/` holds small models with random weights, and what mlx-lm 0.32.2 on the CPU gives for them with every float
//! tensor cast to float32: prompts of 1, 11 and 80 tokens (the last takes the path that sorts expert rows), 32 tokens
//! each, and the margin between the two best logits of every step, never below 0.05. `ZMLX_ORACLE` may name a folder with
//! more of such models.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use zmlx_models::{DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, Session, families};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Json) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The models of a folder that a family here can run, by name.
fn models(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    found.retain(|dir| {
        let config = dir.join("config.json");
        config.exists() && families::known().iter().any(|f| json(&config)["model_type"] == *f)
    });
    found.sort();
    found
}

#[track_caller]
fn check(dir: &Path) {
    let options = LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, patch: None };
    let model = Model::load(dir, &options, &mut |_| {}).unwrap();
    let golden = json(&dir.join("golden.json"));
    let cases = golden["f32"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let name = format!("{} after {} tokens", dir.display(), case["length"]);
        let (prompt, tokens): (Vec<u32>, Vec<u32>) = (numbers(&case["prompt"]), numbers(&case["tokens"]));

        let first = &case["modes"]["prefill"];
        let (ids, logits): (Vec<usize>, Vec<f32>) =
            (numbers(&first["top5_ids"]), numbers(&first["top5_logits"]));
        let all = model.run(&prompt, &mut model.new_state()).unwrap().to_vec::<f32>().unwrap();
        let row = &all[(prompt.len() - 1) * model.vocab_size()..];
        for (&id, &want) in ids.iter().zip(&logits) {
            assert!((row[id] - want).abs() < 1e-3, "{name}: token {id}: {} instead of {want}", row[id]);
        }

        let options = GenerateOptions { max_tokens: tokens.len(), ignore_eos: true, ..Default::default() };
        let done = Session::new(&model).generate(&prompt, &options, &mut |_| Flow::Continue).unwrap();
        assert_eq!(done.tokens, tokens, "{name}: margins {}", case["margins"]);
    }
}

#[test]
fn greedy_tokens_are_those_of_mlx_lm() {
    let committed = models(&data());
    assert_eq!(committed.len(), 2, "{committed:?}");
    for dir in committed {
        check(&dir);
    }
}

#[test]
fn more_models_where_they_are_at_hand() {
    let Some(folder) = std::env::var_os("ZMLX_ORACLE") else { return };
    let models = models(Path::new(&folder));
    assert!(!models.is_empty(), "{folder:?} holds no model of a known family");
    for dir in models {
        println!("{}", dir.display());
        check(&dir);
    }
}
