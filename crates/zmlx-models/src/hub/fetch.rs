//! Fetching a model into the cache.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hf_hub::Cache;
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use serde_json::Value as Json;

use super::{HubError, HubProgress, ModelId, Settings};

pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Progress is told each time so many bytes have come.
const PROGRESS_STEP: u64 = 1 << 20;

/// One model on its way into the cache.
pub(super) struct Fetch<'a> {
    pub(super) settings: &'a Settings,
    pub(super) id: &'a ModelId,
    /// Whether some of it is in the cache.
    pub(super) partly: bool,
}

impl Fetch<'_> {
    pub(super) fn run(&self, progress: &mut dyn FnMut(HubProgress)) -> Result<PathBuf, HubError> {
        if self.settings.offline {
            return Err(self.not_cached("HF_HUB_OFFLINE is set".to_owned()));
        }
        self.probe_cache().map_err(|source| self.not_writable(source))?;
        let repo = self.api()?.repo(self.id.repo());
        let info = repo.info().map_err(|error| self.unreachable(&error))?;
        let snapshot = self.settings.repo_folder(self.id).join("snapshots").join(&info.sha);
        let names: BTreeSet<&str> = info.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        let missing = |missing| HubError::Unusable { model: self.id.shown(), missing };
        if !names.contains("config.json") {
            return Err(missing("config.json"));
        }
        // The weights come last, so that a model whose weights are there is a whole one.
        for name in names.iter().filter(|name| is_small_file(name)) {
            self.file(&repo, &snapshot, name, progress)?;
        }
        let weights = wanted_weights(&names, &snapshot);
        if weights.is_empty() {
            return Err(missing("model*.safetensors"));
        }
        for name in weights {
            self.file(&repo, &snapshot, name, progress)?;
        }
        let cache = Cache::new(self.settings.cache.clone());
        cache.repo(self.id.repo()).create_ref(&info.sha).map_err(|source| self.not_writable(source))?;
        Ok(snapshot)
    }

    /// Writes and removes a file where the model will be, so that a cache that cannot be written is told at
    /// once.
    fn probe_cache(&self) -> std::io::Result<()> {
        let folder = self.settings.repo_folder(self.id);
        std::fs::create_dir_all(&folder)?;
        let probe = folder.join(format!(".probe-{}", std::process::id()));
        std::fs::write(&probe, b"")?;
        std::fs::remove_file(&probe)
    }

    fn api(&self) -> Result<Api, HubError> {
        let builder = ApiBuilder::from_cache(Cache::new(self.settings.cache.clone()));
        let builder =
            builder.with_endpoint(self.settings.endpoint.clone()).with_token(self.settings.token.clone());
        builder.with_progress(false).with_retries(2).build().map_err(|error| self.unreachable(&error))
    }

    /// Fetches one file, unless the snapshot has it.
    fn file(
        &self,
        repo: &ApiRepo,
        snapshot: &Path,
        name: &str,
        progress: &mut dyn FnMut(HubProgress),
    ) -> Result<(), HubError> {
        if snapshot.join(name).exists() {
            return Ok(());
        }
        let fail = |reason| HubError::Download { model: self.id.shown(), file: name.to_owned(), reason };
        let (mut done, mut total) = (0, 0);
        let report = Report { file: name, done: &mut done, total: &mut total, told: 0, progress };
        let path = repo.download_with_progress(name, report).map_err(|error| match error {
            ApiError::IoError(error) if is_about_writing(&error) => self.not_writable(error),
            error => fail(one_line(&error)),
        })?;
        let length = std::fs::metadata(&path).map_err(|error| fail(error.to_string()))?.len();
        if length != total {
            // Not to be taken for whole by the next run.
            std::fs::remove_file(&path).ok();
            return Err(fail(format!("{length} of {total} bytes came")));
        }
        if path != snapshot.join(name) {
            return Err(fail("the model changed on the hub meanwhile".to_owned()));
        }
        Ok(())
    }

    fn not_writable(&self, source: std::io::Error) -> HubError {
        HubError::CacheNotWritable { model: self.id.shown(), cache: self.settings.cache.clone(), source }
    }

    fn not_cached(&self, reason: String) -> HubError {
        let state = if self.partly { "only partly in" } else { "not in" };
        HubError::NotCached { model: self.id.shown(), state, cache: self.settings.cache.clone(), reason }
    }

    fn unreachable(&self, error: &ApiError) -> HubError {
        if let ApiError::RequestError(request) = error
            && let ureq::Error::StatusCode(status @ (401 | 403 | 404)) = **request
        {
            return HubError::Refused { model: self.id.shown(), status };
        }
        self.not_cached(format!("the hub could not be reached: {}", one_line(error)))
    }
}

fn is_small_file(name: &str) -> bool {
    let tokenizer = name.starts_with("tokenizer") && name.ends_with(".json");
    let known = ["config.json", "generation_config.json", "special_tokens_map.json", INDEX].contains(&name);
    !name.contains('/') && (known || tokenizer || name.starts_with("chat_template."))
}

/// The weights to fetch: what [`weight_files`] will open. Other safetensors of a repository repeat the
/// model in another layout or hold adapters.
fn wanted_weights<'n>(names: &BTreeSet<&'n str>, snapshot: &Path) -> Vec<&'n str> {
    if let Some(single) = names.get("model.safetensors") {
        return vec![single];
    }
    let index: Option<Json> =
        std::fs::read(snapshot.join(INDEX)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let map = index.as_ref().and_then(|index| index.get("weight_map")?.as_object());
    let listed: Option<BTreeSet<&str>> = map.map(|map| map.values().filter_map(Json::as_str).collect());
    let wanted = |name: &str| match &listed {
        Some(listed) => listed.contains(name),
        None => name.starts_with("model"),
    };
    names
        .iter()
        .copied()
        .filter(|name| name.ends_with(".safetensors") && !name.contains('/') && wanted(name))
        .collect()
}

fn is_about_writing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem | StorageFull | QuotaExceeded)
}

fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Passes the client's progress on, in steps.
struct Report<'a> {
    file: &'a str,
    done: &'a mut u64,
    total: &'a mut u64,
    told: u64,
    progress: &'a mut dyn FnMut(HubProgress),
}

impl Report<'_> {
    fn tell(&mut self) {
        self.told = *self.done;
        (self.progress)(HubProgress {
            file: self.file.to_owned(),
            done_bytes: *self.done,
            total_bytes: *self.total,
        });
    }
}

impl Progress for Report<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        (*self.done, *self.total, self.told) = (0, size as u64, 0);
    }

    fn update(&mut self, size: usize) {
        *self.done += size as u64;
        if *self.done >= self.told + PROGRESS_STEP {
            self.tell();
        }
    }

    fn finish(&mut self) {
        self.tell();
    }
}
