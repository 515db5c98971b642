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
mod safetensors;
mod table;

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use thiserror::Error;
use zmlx_graph::weights::{Format, Quantization};

pub use table::{MODELS, PublishedModel};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::families;
use crate::generate::Flow;
use pool::Pool;
use safetensors::Shard;

/// Bits of a router, in groups of 64, as mlx-lm's converter has it.
const ROUTER: (i32, i32) = (8, 64);

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
    /// The folder is there already.
    #[error("{} is there already: remove it, or choose another folder", path.display())]
    AlreadyThere {
        /// The folder.
        path: PathBuf,
    },
    /// The disk is too full.
    #[error("{} has room for {available} bytes, and the model takes {needed}: free some, or choose another disk", path.display())]
    NoRoom {
        /// The folder that would hold the model.
        path: PathBuf,
        /// Bytes that are free.
        available: u64,
        /// Bytes that the model takes.
        needed: u64,
    },
    /// A file could not be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The caller stopped it; nothing is left behind.
    #[error("stopped")]
    Stopped,
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
    let tensors: Vec<pool::Tensor> = graph.weights.iter().flat_map(pool::tensors).collect();
    let parameters = graph.weights.iter().map(|w| w.parameters()).sum();
    let shards = safetensors::shards(tensors);
    let bytes = shards.iter().map(Shard::bytes).sum();

    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| RandomError::Write { path, source }
    };
    if dir.symlink_metadata().is_ok() {
        return Err(RandomError::AlreadyThere { path: dir.to_owned() });
    }
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(fail(parent))?;
    check_room(parent, bytes)?;
    // Beside the folder, so that renaming moves no bytes; removed if anything fails.
    let temporary = temporary_folder(parent).map_err(fail(parent))?;

    let pool = Pool::new(options.seed);
    let mut done = 0;
    for shard in &shards {
        let path = temporary.path().join(&shard.name);
        let mut told = |n: u64| {
            done += n;
            progress(done, bytes)
        };
        match shard.write(&path, &pool, &mut told).map_err(fail(&path))? {
            Flow::Continue => {}
            Flow::Stop => return Err(RandomError::Stopped),
        }
    }
    let index = safetensors::index(&shards, bytes, parameters);
    for (name, json) in [("config.json", &config), ("model.safetensors.index.json", &index)] {
        let path = temporary.path().join(name);
        std::fs::write(&path, format!("{json:#}\n")).map_err(fail(&path))?;
    }
    std::fs::rename(temporary.path(), dir).map_err(fail(dir))?;
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

/// The configuration with its quantisation, and the graph of a model stored so.
fn plan(config: &Json, options: &RandomOptions) -> Result<(Json, zmlx_graph::Graph), RandomError> {
    let mut root = config.as_object().cloned().unwrap_or_default();
    let parsed = ModelConfig::from_json(root.clone());
    let family = families::find(&parsed)?;
    let affine = |bits, group_size| Quantization { group_size, bits, mode: "affine".to_owned() };
    // As the converter has it: rows that do not split into groups stay as they are, and routers get more bits.
    let overrides = std::cell::RefCell::new(serde_json::Map::new());
    let format_of = |path: &str, columns: i32| {
        if columns % options.group_size != 0 {
            return Format::Dense;
        }
        if family.routers.iter().any(|end| path.ends_with(end)) && columns % ROUTER.1 == 0 {
            let setting = json!({ "bits": ROUTER.0, "group_size": ROUTER.1 });
            overrides.borrow_mut().insert(path.to_owned(), setting);
            return Format::Quantized(affine(ROUTER.0, ROUTER.1));
        }
        Format::Quantized(affine(options.bits, options.group_size))
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

/// Besides its weights a folder takes a few small files.
const SMALL_FILES: u64 = 8 << 20;

fn check_room(parent: &Path, bytes: u64) -> Result<(), RandomError> {
    let needed = bytes + SMALL_FILES;
    let write =
        |source: rustix::io::Errno| RandomError::Write { path: parent.to_owned(), source: source.into() };
    let disk = rustix::fs::statvfs(parent).map_err(write)?;
    let available = disk.f_bavail.saturating_mul(disk.f_frsize);
    if available < needed {
        return Err(RandomError::NoRoom { path: parent.to_owned(), available, needed });
    }
    Ok(())
}

fn temporary_folder(parent: &Path) -> std::io::Result<tempfile::TempDir> {
    use std::os::unix::fs::PermissionsExt;
    let mut builder = tempfile::Builder::new();
    // A model is no secret: the usual permissions, which the umask narrows.
    builder.prefix(".random-model-").permissions(std::fs::Permissions::from_mode(0o777));
    builder.tempdir_in(parent)
}

#[cfg(test)]
mod tests;
