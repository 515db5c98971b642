//! The folders of `oracle/`: a small model each, and what mlx-lm gives for it in float32. And what it gives for the embedded
//! model.

#![allow(dead_code)] // Not every test that includes it needs all of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use zmlx_mlx::io;

/// How far logits may be off mlx-lm's.
pub const LOGITS: f32 = 1e-3;

/// A prompt, and what comes after it.
#[derive(Default, Deserialize)]
pub struct Case {
    pub prompt: Vec<u32>,
    /// Greedy tokens.
    pub tokens: Vec<u32>,
    /// From the best logit of a step to the next.
    pub margins: Vec<f32>,
    /// Smallest gap in the choices of experts among that many.
    pub router_gap_by_width: BTreeMap<String, f64>,
    /// `[n, vocabulary]`: those after the prompt and after the first tokens.
    #[serde(skip)]
    pub logits: Vec<f32>,
}

#[derive(Deserialize)]
struct Golden {
    f32: Vec<Case>,
}

/// Where the folders are.
pub fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle")
}

/// The model folders in a folder, or the folder itself if it is one.
pub fn models(folder: &Path) -> Result<Vec<PathBuf>, String> {
    if folder.join("config.json").exists() {
        return Ok(vec![folder.to_owned()]);
    }
    let fail = |e: std::io::Error| format!("{}: {e}", folder.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.join("config.json").exists() {
            found.push(path);
        }
    }
    found.sort();
    if found.is_empty() { Err(format!("{}: no model", folder.display())) } else { Ok(found) }
}

/// The cases of a folder.
pub fn cases(dir: &Path) -> Result<Vec<Case>, String> {
    let text = std::fs::read_to_string(dir.join("golden.json")).map_err(|e| format!("golden.json: {e}"))?;
    let golden: Golden = serde_json::from_str(&text).map_err(|e| format!("golden.json: {e}"))?;
    let rows = io::load_safetensors(dir.join("golden.safetensors")).map_err(|e| e.to_string())?;
    let rows: BTreeMap<_, _> = rows.into_iter().collect();
    let mut cases = golden.f32;
    for (index, case) in cases.iter_mut().enumerate() {
        let name = format!("f32.p{index}.decode8");
        let rows = rows.get(&name).ok_or_else(|| format!("golden.safetensors lacks {name}"))?;
        case.logits = rows.to_vec::<f32>().map_err(|e| e.to_string())?;
    }
    Ok(cases)
}

/// A prompt of the embedded model, and what comes after it.
#[derive(Deserialize)]
pub struct EmbeddedCase {
    pub prompt_ids: Vec<u32>,
    /// Greedy tokens.
    pub tokens: Vec<u32>,
    /// From the best logit of a step to the next.
    pub margins: Vec<f32>,
    /// The five best logits after the prompt.
    pub top5_first: Vec<(usize, f32)>,
}

#[derive(Deserialize)]
struct Embedded {
    cases: Vec<EmbeddedCase>,
}

/// The cases of the embedded model.
pub fn embedded() -> Result<Vec<EmbeddedCase>, String> {
    let text = include_str!("../../../../fixtures/tiny-lfm2-moe.golden.json");
    let golden: Embedded =
        serde_json::from_str(text).map_err(|e| format!("tiny-lfm2-moe.golden.json: {e}"))?;
    Ok(golden.cases)
}
