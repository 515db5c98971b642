//! From what a user names to a model folder: a folder, or a model of the Hugging Face hub through its usual
//! cache.
//!
//! The cache is the one other tools use (`<cache>/models--org--name/{blobs,refs,snapshots}`). A model that
//! is complete in it is taken without asking the hub. Environment: `HF_HUB_CACHE`, `HF_HOME`,
//! `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`.

mod error;
mod fetch;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use hf_hub::{Repo, RepoType};

use crate::checkpoint::weight_files;
use fetch::Fetch;

pub use error::HubError;

/// How far the download of one file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubProgress {
    /// The file's name.
    pub file: String,
    /// Bytes that are here.
    pub done_bytes: u64,
    /// Bytes of the file.
    pub total_bytes: u64,
}

/// The folder with `config.json`, the safetensors and the tokenizer files of the model that `spec` names:
/// an existing folder or `.gguf` file, or `org/name` or `org/name@revision` on the Hugging Face hub. Fetches only the files
/// a model needs to run, and nothing if the cache has them.
///
/// # Errors
/// [`HubError`], whose text is one line that says what was tried and what to do.
pub fn resolve(spec: &str, progress: &mut dyn FnMut(HubProgress)) -> Result<PathBuf, HubError> {
    Settings::from_lookup(|name| std::env::var_os(name)).resolve(spec, progress)
}

/// What the environment says about the hub.
#[derive(Debug, Clone)]
struct Settings {
    cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    offline: bool,
}

impl Settings {
    fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Settings {
        let get = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let text = |name: &str| get(name).and_then(|value| value.into_string().ok());
        let user = get("HOME").map(PathBuf::from).or_else(std::env::home_dir).unwrap_or_default();
        let path = |name: &str| {
            let path = PathBuf::from(get(name)?);
            Some(path.strip_prefix("~").map(|rest| user.join(rest)).unwrap_or(path))
        };
        let shared = path("XDG_CACHE_HOME").unwrap_or_else(|| user.join(".cache"));
        let home = path("HF_HOME").unwrap_or_else(|| shared.join("huggingface"));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        let token = token.or_else(|| std::fs::read_to_string(token_path).ok());
        let offline = |name| {
            text(name).is_some_and(|value| {
                matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
            })
        };
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Settings {
            cache: std::path::absolute(&cache).unwrap_or(cache),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: offline("HF_HUB_OFFLINE") || offline("TRANSFORMERS_OFFLINE"),
        }
    }

    fn resolve(&self, spec: &str, progress: &mut dyn FnMut(HubProgress)) -> Result<PathBuf, HubError> {
        let path = Path::new(spec);
        let gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if path.is_dir() || (gguf && path.exists()) {
            return Ok(path.to_owned());
        }
        if path.exists() {
            return Err(HubError::IsFile { path: path.to_owned() });
        }
        let id =
            ModelId::parse(spec).ok_or_else(|| HubError::NeitherFolderNorId { spec: spec.to_owned() })?;
        let cached = self.cached_snapshot(&id);
        match cached {
            Some(folder) if is_complete(&folder) => Ok(folder),
            cached => Fetch { settings: self, id: &id, partly: cached.is_some() }.run(progress),
        }
    }

    fn repo_folder(&self, id: &ModelId) -> PathBuf {
        self.cache.join(id.repo().folder_name())
    }

    /// The snapshot that the revision's reference names, or that the revision itself is the commit of.
    fn cached_snapshot(&self, id: &ModelId) -> Option<PathBuf> {
        let folder = self.repo_folder(id);
        let reference = std::fs::read_to_string(folder.join("refs").join(&id.revision)).ok();
        let commit = reference.map(|commit| commit.trim().to_owned()).unwrap_or_else(|| id.revision.clone());
        let plain = !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let snapshot = folder.join("snapshots").join(&commit);
        (plain && snapshot.is_dir()).then_some(snapshot)
    }
}

/// Whether a folder holds a model that can be loaded, as far as can be told without opening the weights.
fn is_complete(folder: &Path) -> bool {
    let Ok(files) = weight_files(folder) else { return false };
    // Shards without their index tell their number in their names: model-00001-of-00005.safetensors.
    let shards = files.iter().filter_map(|file| {
        let (_, count) = file.file_stem()?.to_str()?.rsplit_once("-of-")?;
        count.parse::<usize>().ok()
    });
    folder.join("config.json").exists() && shards.max().unwrap_or(0) <= files.len()
}

/// `org/name` and a branch, tag or commit.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ModelId {
    name: String,
    revision: String,
}

impl ModelId {
    fn parse(spec: &str) -> Option<ModelId> {
        let (name, revision) = spec.split_once('@').unwrap_or((spec, "main"));
        let (org, model) = name.split_once('/')?;
        let safe = |part: &str, extra: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c) || extra.contains(c))
                && !part.contains("..")
                && !part.ends_with(['.', '/'])
        };
        (safe(org, "") && safe(model, "") && safe(revision, "/"))
            .then(|| ModelId { name: name.to_owned(), revision: revision.to_owned() })
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.name.clone(), RepoType::Model, self.revision.clone())
    }

    fn shown(&self) -> String {
        if self.revision == "main" { self.name.clone() } else { format!("{}@{}", self.name, self.revision) }
    }
}
