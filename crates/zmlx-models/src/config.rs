//! `config.json` and `generation_config.json`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::LoadError;
use crate::files;

/// Largest value of a dimension or count: MLX's shapes are 32-bit, and products of two must not overflow.
const LARGEST: i64 = 1 << 24;

/// The configuration of a model: the parsed `config.json`, with typed access to its keys.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    root: Map<String, Value>,
    /// Ids that end a sequence, from generation_config.json, else config.json.
    eos: Vec<u32>,
    /// What stands before its keys in messages: the section that they are in.
    section: String,
}

impl ModelConfig {
    /// Reads the configuration of a model folder.
    pub fn read(dir: &Path) -> Result<Self, LoadError> {
        let path = dir.join("config.json");
        let root = read_object(&path)?.ok_or_else(|| {
            let message = "not found: give the folder that holds config.json and the weights".to_owned();
            LoadError::ConfigFile { path: path.clone(), message }
        })?;
        if !root.get("model_type").is_some_and(Value::is_string) {
            return Err(LoadError::NoModelType { path });
        }
        let generation = read_object(&dir.join("generation_config.json"))?.unwrap_or_default();
        let eos = match ids(generation.get("eos_token_id")) {
            ids if ids.is_empty() => ids_of_config(&root),
            ids => ids,
        };
        Ok(Self { root, eos, section: String::new() })
    }

    /// A configuration from parsed JSON.
    pub fn from_json(root: Map<String, Value>) -> Self {
        let eos = ids_of_config(&root);
        Self { root, eos, section: String::new() }
    }

    /// The parsed file.
    pub(crate) fn root(&self) -> &Map<String, Value> {
        &self.root
    }

    /// `model_type`.
    pub fn model_type(&self) -> &str {
        self.root.get("model_type").and_then(Value::as_str).unwrap_or_default()
    }

    /// Ids that end a sequence.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The section `key`, as a configuration of its own whose messages name the section too; `None` if there is no such key.
    ///
    /// # Errors
    /// [`LoadError::Config`] if the value is not an object.
    pub fn section(&self, key: &str) -> Result<Option<Self>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let root = value.as_object().ok_or_else(|| self.wrong(key, value, "an object"))?.clone();
        let section = format!("{}{key}.", self.section);
        Ok(Some(Self { root, eos: self.eos.clone(), section }))
    }

    /// The error of a key that is needed and not there.
    pub(crate) fn missing(&self, key: &str) -> LoadError {
        missing(&format!("{}{key}", self.section))
    }

    /// The error of a key whose value cannot be.
    pub(crate) fn wrong(&self, key: &str, value: &Value, allowed: &str) -> LoadError {
        wrong(&format!("{}{key}", self.section), value, allowed)
    }

    /// The error of a key that contradicts others.
    pub(crate) fn contradiction(&self, key: &str, message: String) -> LoadError {
        LoadError::Config { key: format!("{}{key}", self.section), message }
    }

    /// The value of a key; absent and null are the same.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.root.get(key).filter(|v| !v.is_null())
    }

    /// A required count or size, 1 to 2^24.
    pub fn size(&self, key: &str) -> Result<i32, LoadError> {
        self.size_opt(key)?.ok_or_else(|| self.missing(key))
    }

    /// A count or size, 1 to 2^24, if the key is there.
    pub fn size_opt(&self, key: &str) -> Result<Option<i32>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_i64() {
            Some(n) if (1..=LARGEST).contains(&n) => Ok(Some(n as i32)),
            _ => Err(self.wrong(key, value, "a whole number from 1 to 16777216")),
        }
    }

    /// A count or size, 1 to 2^24, or `null` for what the model does not have; the key must be there.
    pub fn size_or_null(&self, key: &str) -> Result<Option<i32>, LoadError> {
        if self.root.contains_key(key) { self.size_opt(key) } else { Err(self.missing(key)) }
    }

    /// A count that may be 0.
    pub fn count(&self, key: &str) -> Result<i32, LoadError> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        match value.as_i64() {
            Some(n) if (0..=LARGEST).contains(&n) => Ok(n as i32),
            _ => Err(self.wrong(key, value, "a whole number from 0 to 16777216")),
        }
    }

    /// A required finite number above 0.
    pub fn positive(&self, key: &str) -> Result<f64, LoadError> {
        self.positive_or(key, None)
    }

    /// A finite number above 0, or `default`.
    pub fn positive_or(&self, key: &str, default: Option<f64>) -> Result<f64, LoadError> {
        match (self.get(key), default) {
            (Some(value), _) => positive(&format!("{}{key}", self.section), value),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.missing(key)),
        }
    }

    /// A boolean, or `default`.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, LoadError> {
        if self.get(key).is_none() { Ok(default) } else { self.flag(key) }
    }

    /// A required boolean.
    pub fn flag(&self, key: &str) -> Result<bool, LoadError> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false"))
    }
}

/// A number above 0 at `key` that stays so in float32.
pub(crate) fn positive(key: &str, value: &Value) -> Result<f64, LoadError> {
    match value.as_f64() {
        Some(x) if (x as f32).is_finite() && (x as f32) > 0.0 => Ok(x),
        _ => Err(wrong(key, value, "a number above 0 within the range of float32")),
    }
}

pub(crate) fn missing(key: &str) -> LoadError {
    LoadError::MissingKey { key: key.to_owned() }
}

pub(crate) fn wrong(key: &str, value: &Value, allowed: &str) -> LoadError {
    let mut shown = value.to_string();
    if let Some((cut, _)) = shown.char_indices().nth(60) {
        shown.truncate(cut);
        shown.push_str("...");
    }
    LoadError::Config { key: key.to_owned(), message: format!("{shown}: must be {allowed}") }
}

fn ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Some(Value::Array(items)) => items.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

fn ids_of_config(root: &Map<String, Value>) -> Vec<u32> {
    let text = root.get("text_config").and_then(|t| t.get("eos_token_id"));
    ids(root.get("eos_token_id").or(text))
}

/// The JSON object in a file; `None` when there is no such file.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, LoadError> {
    let fail = |message: String| LoadError::ConfigFile { path: PathBuf::from(path), message };
    let Some(bytes) = files::read_if_there(path).map_err(|e| fail(e.to_string()))? else { return Ok(None) };
    let text =
        String::from_utf8(bytes).map_err(|e| fail(format!("is not UTF-8 text: {}", e.utf8_error())))?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(fail("is not a JSON object".to_owned())),
        Err(e) => Err(fail(format!("is not valid JSON: {e}"))),
    }
}
