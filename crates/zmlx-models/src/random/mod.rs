//! Model folders with random weights at the shapes of published models: for speed, never for text.
//!
//! A folder is what mlx-lm's converter would write of a trained checkpoint: `config.json` with its quantisation, and
//! safetensors in shards of at most 5 GiB with an index. The list of tensors comes from the family's own graph, so a new
//! model is one entry of [`MODELS`]. There is no tokenizer: prompts are token ids.
//!
//! Values come from a small pool that is read at random places, which is as fast as the disk. Packed words are random
//! bits; scales and biases make them numbers of mean 0 and a standard deviation of 0.02. Norms are 1, biases and expert
//! biases 0. The same options give the same bytes.

mod decoders;
mod pool;
mod table;

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use thiserror::Error;
use zmlx_graph::weights::{Format, Quantization};

pub use table::{MODELS, PublishedModel};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::families;
use crate::folder::{self, FolderError, NewFolder, Shard};
use crate::generate::Flow;
use crate::quantize;
use pool::Pool;

/// How random weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomOptions {
    /// Bits of a weight: 2, 3, 4, 5, 6 or 8.
    pub bits: i32,
    /// Weights that share a scale: 32, 64 or 128.
    pub group_size: i32,
    /// Seed of all values.
    pub seed: u64,
}

impl Default for RandomOptions {
    fn default() -> Self {
        Self { bits: 4, group_size: 64, seed: 0 }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RandomModel {
    /// The folder.
    pub dir: PathBuf,
    /// Its weight files.
    pub shards: Vec<String>,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Why no random model was written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RandomError {
    /// No entry of [`MODELS`] has this name.
    #[error("no model is called {found:?}; known: {known}")]
    UnknownModel {
        /// What was asked for.
        found: String,
        /// The names of all entries.
        known: String,
    },
    /// An option that MLX's format does not have.
    #[error("{name} = {value}: must be {allowed}")]
    Option {
        /// The option.
        name: &'static str,
        /// Its value.
        value: i32,
        /// What it may be.
        allowed: &'static str,
    },
    /// The folder could not be written.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The family cannot make the model's graph.
    #[error(transparent)]
    Family(#[from] LoadError),
}

/// Writes a folder `dir` for the entry of [`MODELS`] called `name`. `progress` is told the bytes written and their total,
/// and may stop it. The folder appears under its name when it is whole.
///
/// # Errors
/// [`RandomError`]; then there is no folder `dir`.
pub fn write_random_model(
    name: &str,
    dir: &Path,
    options: &RandomOptions,
    progress: &mut dyn FnMut(u64, u64) -> Flow,
) -> Result<RandomModel, RandomError> {
    let model = MODELS.iter().find(|m| m.name == name).ok_or_else(|| RandomError::UnknownModel {
        found: name.to_owned(),
        known: MODELS.iter().map(|m| m.name).collect::<Vec<_>>().join(", "),
    })?;
    write_model(&(model.config)(), dir, options, progress)
}

fn write_model(
    config: &Json,
    dir: &Path,
    options: &RandomOptions,
    progress: &mut dyn FnMut(u64, u64) -> Flow,
) -> Result<RandomModel, RandomError> {
    check(options)?;
    let (config, graph) = plan(config, options)?;
    let parameters = graph.weights.iter().map(|w| w.parameters()).sum();
    let shards = folder::shards(graph.weights.iter().flat_map(pool::tensors).collect());
    let bytes = shards.iter().map(Shard::bytes).sum();
    let new = NewFolder::begin(dir, bytes)?;
    let pool = Pool::new(options.seed);
    let mut done = 0;
    for shard in &shards {
        let failed = FolderError::write(&new.path(&shard.name));
        new.write_shard(shard, |tensor, to: &mut dyn Write| {
            let mut told = |n: u64| {
                done += n;
                progress(done, bytes)
            };
            folder::go_on(pool.write(tensor, to, &mut told).map_err(&failed)?)
        })?;
    }
    new.write_json("config.json", &config)?;
    new.write_json("model.safetensors.index.json", &folder::index(&shards, bytes, parameters))?;
    new.finish()?;
    let shards = shards.into_iter().map(|s| s.name).collect();
    Ok(RandomModel { dir: dir.to_owned(), shards, parameters, bytes })
}

fn check(options: &RandomOptions) -> Result<(), RandomError> {
    let RandomOptions { bits, group_size, .. } = *options;
    if !matches!(bits, 2..=6 | 8) {
        return Err(RandomError::Option { name: "bits", value: bits, allowed: "2, 3, 4, 5, 6 or 8" });
    }
    if !matches!(group_size, 32 | 64 | 128) {
        let allowed = "32, 64 or 128";
        return Err(RandomError::Option { name: "group_size", value: group_size, allowed });
    }
    Ok(())
}

/// The configuration of a published model as its random folder in 4 bits has it.
pub(crate) fn config_of(model: &PublishedModel) -> Result<ModelConfig, LoadError> {
    let (config, _) = plan(&(model.config)(), &RandomOptions::default())?;
    Ok(ModelConfig::from_json(config.as_object().cloned().unwrap_or_default()))
}

/// The configuration with its quantisation, and the graph of a model stored so.
fn plan(config: &Json, options: &RandomOptions) -> Result<(Json, zmlx_graph::Graph), LoadError> {
    let mut root = config.as_object().cloned().unwrap_or_default();
    let parsed = ModelConfig::from_json(root.clone());
    let family = families::find(&parsed)?;
    let (bits, group_size) = (options.bits, options.group_size);
    let all = Quantization { group_size, bits, mode: "affine".to_owned() };
    let overrides = std::cell::RefCell::new(serde_json::Map::new());
    let format_of = |path: &str, columns: i32| {
        let format = quantize::converted(family, &all, path, columns);
        if let (Format::Quantized(q), true) = (&format, quantize::is_router(family, path)) {
            let setting = json!({ "bits": q.bits, "group_size": q.group_size });
            overrides.borrow_mut().insert(path.to_owned(), setting);
        }
        format
    };
    let (graph, _) = families::draw(family, &parsed, &format_of)?;
    let mut section = json!({ "bits": options.bits, "group_size": options.group_size, "mode": "affine" });
    if let Some(section) = section.as_object_mut() {
        section.extend(overrides.into_inner());
    }
    root.insert("quantization".to_owned(), section.clone());
    root.insert("quantization_config".to_owned(), section);
    Ok((Json::Object(root), graph))
}

#[cfg(test)]
mod tests;
