//! Copies of the models in `oracle/`, to be changed.

#![allow(dead_code)] // Not every test that includes it needs all of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use zmlx_mlx::{Array, io};
use zmlx_models::{DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, Session, inspect};

/// A copy of the model of that name.
pub fn copy(name: &str) -> tempfile::TempDir {
    let from: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(name);
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::write(dir.path().join(path.file_name().unwrap()), std::fs::read(&path).unwrap()).unwrap();
    }
    dir
}

fn read(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn edit_config(dir: &Path, edit: impl FnOnce(&mut Json)) {
    let path = dir.join("config.json");
    let mut config = read(&path);
    edit(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

pub fn edit_weights(dir: &Path, edit: impl FnOnce(&mut BTreeMap<String, Array>)) {
    let path = dir.join("model.safetensors");
    let mut weights = io::load_safetensors(&path).unwrap().into_iter().collect();
    edit(&mut weights);
    io::save_safetensors(&path, &weights, &BTreeMap::new()).unwrap();
}

/// Takes stacked experts apart, as published checkpoints have them; `rename` gives the names of their parts.
pub fn experts_apart(weights: &mut BTreeMap<String, Array>, experts: i32, rename: impl Fn(&str) -> String) {
    for (name, array) in std::mem::take(weights) {
        if !name.contains("switch_mlp") {
            weights.insert(name, array);
            continue;
        }
        for (expert, one) in array.split(experts, 0).unwrap().into_iter().enumerate() {
            let name = rename(&name.replace("switch_mlp", &format!("experts.{expert}")));
            weights.insert(name, one.squeeze(&[0]).unwrap().contiguous().unwrap());
        }
    }
}

/// The stock model's tokens are mlx-lm's.
#[track_caller]
pub fn check(dir: &Path) {
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, ..LoadOptions::default() };
    let model = Model::load(dir, &options, &mut |_| {}).unwrap();
    for case in read(&dir.join("golden.json"))["f32"].as_array().unwrap() {
        let numbers = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
        let (prompt, tokens) = (numbers("prompt"), numbers("tokens"));
        let options = GenerateOptions { max_tokens: tokens.len(), ignore_eos: true, ..Default::default() };
        let done = Session::new(&model).generate(&prompt, &options, &mut |_| Flow::Continue).unwrap();
        assert_eq!(done.tokens, tokens, "{}", dir.display());
    }
}

/// Loading fails with one line that has these words; so does looking at it.
#[track_caller]
pub fn refused(dir: &Path, words: &[&str]) {
    let error = Model::load(dir, &LoadOptions::default(), &mut |_| {}).expect_err(words[0]).to_string();
    assert!(!error.contains('\n'), "{error}");
    words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in: {error}"));
    assert_eq!(inspect(dir).unwrap_err().to_string(), error);
}
