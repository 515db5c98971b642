//! A session's caches in a file, so that a long prompt is processed once.
//!
//! The file is safetensors. `tokens` holds the ids seen; the arrays of slot `n` are `state.n.keys` and so on; those of
//! checkpoint `i`, `checkpoint.i.n.state`. The metadata says what wrote it, which model it is of, and under `state` as JSON
//! what each slot is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zmlx_graph::{Keep, SavedError, SavedSlot, SavedState};
use zmlx_mlx::stream::with_stream;
use zmlx_mlx::{Array, eval, io};

use crate::checkpoint::{CheckpointError, read_header};
use crate::error::LoadError;
use crate::generate::Session;
use crate::load::Model;
use crate::reuse::Checkpoints;

const FORMAT: &str = "zmlx prompt cache";
const VERSION: &str = "1";

/// Why a prompt cache cannot be written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptCacheError {
    /// The session has seen nothing.
    #[error("there is nothing to save: no token was processed")]
    Empty,
    /// The file could not be read.
    #[error("prompt cache: {0}")]
    Read(CheckpointError),
    /// The file is none, or is damaged.
    #[error("prompt cache {}: {problem}; remove it and save it anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// It is of another model, or of this one loaded in another way.
    #[error("prompt cache {}: it was made with {what} {found}, and this is {expected}: use that one, or save it anew", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What the file says.
        found: String,
        /// What the model is.
        expected: String,
    },
    /// A slot does not fit.
    #[error("prompt cache {}: {source}", path.display())]
    Slot {
        /// The file.
        path: PathBuf,
        /// Which, and why.
        source: Box<SavedError>,
    },
    /// The prompt has nothing in common with it that could be used.
    #[error(
        "prompt cache {}: the prompt shares {shared} of its {cached} tokens, and none of them can be reused: begin the prompt as when it was saved, or leave it out",
        path.display()
    )]
    Prompt {
        /// The file.
        path: PathBuf,
        /// Its tokens.
        cached: usize,
        /// The tokens that both begin with.
        shared: usize,
    },
    /// The session's state could not be taken out.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// The model's files could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// MLX failed, or the file could not be written.
    #[error(transparent)]
    Mlx(#[from] zmlx_mlx::Error),
}

/// A state without its arrays.
#[derive(Debug, Serialize, Deserialize)]
struct StateRecord {
    position: i32,
    slots: Vec<Option<SlotRecord>>,
}

/// A slot without its arrays.
#[derive(Debug, Serialize, Deserialize)]
struct SlotRecord {
    /// Path of the module.
    path: String,
    /// Name of its kind.
    kind: String,
    /// First position of keys and values.
    first: i32,
    /// Names of its arrays.
    arrays: Vec<String>,
}

/// The state, and earlier ones.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    state: StateRecord,
    checkpoints: Vec<StateRecord>,
}

/// Names that arrays of slots have.
const NAMES: &[&str] = zmlx_graph::saved::ARRAY_NAMES;

impl Model {
    /// What a prompt cache must say to be of this model: key, and value. `model` tells trainings apart.
    fn cache_identity(&self) -> Result<[(&'static str, String); 4], LoadError> {
        let stored =
            self.info().quantization.iter().map(|q| format!("{} {}/{}", q.mode, q.bits, q.group_size));
        Ok([
            ("family", self.info().family.clone()),
            ("quantization", stored.collect::<Vec<_>>().join(", ")),
            ("model", self.fingerprint()?),
            ("dtype", self.dtype_name().to_owned()),
        ])
    }
}

impl Session<'_> {
    /// Writes what the session has seen, with its checkpoints, under a temporary name, and gives the file its name once it
    /// is whole.
    ///
    /// # Errors
    /// [`PromptCacheError::Empty`], or what failed.
    pub fn save(&mut self, path: &Path) -> Result<(), PromptCacheError> {
        if self.seen.is_empty() {
            return Err(PromptCacheError::Empty);
        }
        let model = self.model;
        with_stream(model.stream(), || {
            let state = model.executor().save(&mut self.state, Keep::All)?;
            let mut arrays = BTreeMap::new();
            let length = self.seen.len() as i32;
            arrays.insert("tokens".to_owned(), Array::from_slice(&self.seen, &[length])?);
            let record = Record {
                state: record(model, &state, "state", &mut arrays),
                checkpoints: self
                    .checkpoints
                    .kept()
                    .iter()
                    .enumerate()
                    .map(|(i, c)| record(model, c, &format!("checkpoint.{i}"), &mut arrays))
                    .collect(),
            };
            let mut metadata: BTreeMap<String, String> =
                model.cache_identity()?.map(|(key, value)| (key.to_owned(), value)).into();
            metadata.insert("format".to_owned(), FORMAT.to_owned());
            metadata.insert("version".to_owned(), VERSION.to_owned());
            metadata.insert("saved_by".to_owned(), saved_by(model).to_owned());
            // Strings and numbers: it cannot fail.
            metadata.insert("state".to_owned(), serde_json::to_string(&record).unwrap_or_default());
            Ok(io::save_safetensors(path, &arrays, &metadata)?)
        })
    }
}

impl Session<'_> {
    /// How many tokens of `prompt` need not be processed, of a session that came from the file `path`.
    ///
    /// # Errors
    /// [`PromptCacheError::Prompt`] if there are none.
    pub fn fits(&self, path: &Path, prompt: &[u32]) -> Result<usize, PromptCacheError> {
        match self.reusable(prompt) {
            0 => {
                let shared = prompt.iter().zip(self.seen()).take_while(|(a, b)| a == b).count();
                Err(PromptCacheError::Prompt { path: path.to_owned(), cached: self.seen().len(), shared })
            }
            reusable => Ok(reusable),
        }
    }
}

impl<'m> Session<'m> {
    /// A session that goes on where the one that wrote the file was. The model must be the same, in the same dtype; whether
    /// it is patched may differ as long as its caches have the same precision. `checkpoints`: as of
    /// [`Self::keep_checkpoints`].
    ///
    /// # Errors
    /// [`PromptCacheError`], which says what does not fit. Nothing the file says is believed without a check.
    pub fn load(model: &'m Model, path: &Path, checkpoints: usize) -> Result<Self, PromptCacheError> {
        with_stream(model.stream(), || Self::read(model, path, checkpoints))
    }

    fn read(model: &'m Model, path: &Path, checkpoints: usize) -> Result<Self, PromptCacheError> {
        let damaged = |problem: String| PromptCacheError::Damaged { path: path.to_owned(), problem };
        // Checks every claim of the header before MLX sees the file.
        let header = read_header(path).map_err(|error| match error {
            CheckpointError::Header { problem, .. } => damaged(problem.to_string()),
            other => PromptCacheError::Read(other),
        })?;
        let metadata = read_metadata(path).map_err(&damaged)?;
        let says = |key: &str| metadata.get(key).map_or("", String::as_str);
        if says("format") != FORMAT {
            return Err(damaged("it is not a prompt cache of zmlx".to_owned()));
        }
        if says("version") != VERSION {
            return Err(damaged(format!("it is of version {:?}, and {VERSION} is read", says("version"))));
        }
        for (what, expected) in model.cache_identity()? {
            if says(what) != expected {
                let found = says(what).to_owned();
                return Err(PromptCacheError::Other { path: path.to_owned(), what, found, expected });
            }
        }
        let Record { state, checkpoints: earlier } =
            serde_json::from_str(says("state")).map_err(|e| damaged(format!("state: {e}")))?;
        let mut arrays = io::load_safetensors(path)?;
        eval(&arrays.values().collect::<Vec<_>>())?;
        let tokens = arrays.remove("tokens").ok_or_else(|| damaged("it has no tokens".to_owned()))?;
        let seen: Vec<u32> = tokens.to_vec().map_err(|e| damaged(format!("tokens: {e}")))?;
        let vocabulary = model.vocab_size();
        if let Some(id) = seen.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(damaged(format!(
                "token {id} is outside the vocabulary (0 to {})",
                vocabulary.saturating_sub(1)
            )));
        }
        if seen.is_empty() || i64::from(state.position) != seen.len() as i64 {
            return Err(damaged(format!(
                "it has {} tokens, and its state {} positions",
                seen.len(),
                state.position
            )));
        }
        let mut whole = |record: &StateRecord, prefix: &str| {
            assemble(model, record, prefix, &mut arrays).map_err(&damaged)
        };
        let saved = whole(&state, "state")?;
        let mut kept = Vec::new();
        for (i, checkpoint) in earlier.iter().enumerate() {
            kept.push(whole(checkpoint, &format!("checkpoint.{i}"))?);
        }
        if let Some(name) = arrays.keys().next() {
            return Err(damaged(format!("tensor {name} (of {}) belongs to nothing", header.len())));
        }
        let slot = |source| PromptCacheError::Slot { path: path.to_owned(), source: Box::new(source) };
        let executor = model.executor();
        let state = executor.load(&saved).map_err(slot)?;
        let mut before = 0;
        for checkpoint in &kept {
            if checkpoint.position <= before || checkpoint.position > saved.position {
                return Err(damaged(format!(
                    "a checkpoint at position {} is out of order",
                    checkpoint.position
                )));
            }
            before = checkpoint.position;
            // So that one that does not fit is found now and not in the middle of a conversation.
            executor.check_checkpoint(checkpoint).map_err(slot)?;
        }
        let checkpoints = Checkpoints::limited(checkpoints, kept);
        Ok(Self { model, state, seen, checkpoints, expected: None })
    }
}

/// Who held the state, for people.
fn saved_by(model: &Model) -> &'static str {
    match (model.is_patched(), model.executor().is_native()) {
        (false, _) => "stock, on MLX",
        (true, true) => "patched, on the CPU engine",
        (true, false) => "patched, on the CPU engine and MLX",
    }
}

/// What is written of a state, and its arrays to `arrays`.
fn record(
    model: &Model,
    state: &SavedState,
    prefix: &str,
    arrays: &mut BTreeMap<String, Array>,
) -> StateRecord {
    let slots = state.slots.iter().zip(&model.stock_graph().slots).enumerate();
    let slots = slots.map(|(index, (slot, declared))| {
        let slot = slot.as_ref()?;
        for (name, array) in &slot.arrays {
            arrays.insert(format!("{prefix}.{index}.{name}"), array.clone());
        }
        Some(SlotRecord {
            path: declared.path.clone(),
            kind: declared.kind.word().to_owned(),
            first: slot.first,
            arrays: slot.arrays.iter().map(|(name, _)| (*name).to_owned()).collect(),
        })
    });
    StateRecord { position: state.position, slots: slots.collect() }
}

/// The other way round. Takes its arrays out of `arrays`.
fn assemble(
    model: &Model,
    record: &StateRecord,
    prefix: &str,
    arrays: &mut BTreeMap<String, Array>,
) -> Result<SavedState, String> {
    let declared = &model.stock_graph().slots;
    if record.slots.len() != declared.len() {
        return Err(format!("it has {} slots, and the model {}", record.slots.len(), declared.len()));
    }
    let mut slots = Vec::with_capacity(declared.len());
    for (index, (slot, declared)) in record.slots.iter().zip(declared).enumerate() {
        let Some(slot) = slot else {
            slots.push(None);
            continue;
        };
        if slot.path != declared.path || slot.kind != declared.kind.word() {
            return Err(format!(
                "slot {index} is the {} of {}, and the model's is the {} of {}",
                slot.kind,
                slot.path,
                declared.kind.word(),
                declared.path
            ));
        }
        let mut held = Vec::new();
        for name in &slot.arrays {
            let known = NAMES.iter().find(|known| *known == name);
            let array = arrays.remove(&format!("{prefix}.{index}.{name}"));
            let (known, array) =
                known.zip(array).ok_or_else(|| format!("{prefix}.{index}.{name} is not there"))?;
            held.push((*known, array));
        }
        slots.push(Some(SavedSlot { first: slot.first, arrays: held }));
    }
    Ok(SavedState { position: record.position, slots })
}

/// The metadata of a safetensors file whose header was checked.
fn read_metadata(path: &Path) -> Result<BTreeMap<String, String>, String> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__", default)]
        metadata: BTreeMap<String, String>,
    }
    let read = |path: &Path| -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let mut header = Vec::new();
        file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = read(path).map_err(|e| e.to_string())?;
    let header: Header = serde_json::from_slice(&header).map_err(|e| format!("metadata: {e}"))?;
    Ok(header.metadata)
}
