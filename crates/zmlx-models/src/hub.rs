//! From what a user names to a model folder: a folder, or a model of the Hugging Face hub through its usual
//! cache.
//!
//! The cache is the one other tools use (`<cache>/models--org--name/{blobs,refs,snapshots}`). A model that
//! is complete in it is taken without asking the hub. Environment: `HF_HUB_CACHE`, `HF_HOME`,
//! `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value as Json;
use thiserror::Error;

use crate::checkpoint::weight_files;

const INDEX: &str = "model.safetensors.index.json";
/// Progress is told each time so many bytes have come.
const PROGRESS_STEP: u64 = 1 << 20;

/// Why a model folder could not be found or fetched.
#[derive(Debug, Error)]
pub enum HubError {
    /// What was given is a file.
    #[error("{} is a file; give the folder that holds config.json and the weights, or a .gguf file", path.display())]
    IsFile {
        /// The file.
        path: PathBuf,
    },
    /// What was given is neither a folder nor a hub id.
    #[error("{spec:?} is neither an existing folder nor a hub id such as org/name or org/name@revision")]
    NeitherFolderNorId {
        /// What was given.
        spec: String,
    },
    /// The model is not (wholly) in the cache and could not be fetched.
    #[error("model {model} is {state} the cache at {} and {reason}; no folder has that name either", cache.display())]
    NotCached {
        /// The model, with its revision if one was given.
        model: String,
        /// "not in" or "only partly in".
        state: &'static str,
        /// The cache folder.
        cache: PathBuf,
        /// Why it was not fetched.
        reason: String,
    },
    /// The hub has no such model, or does not show it.
    #[error("no folder {model} is here, and the hub answers {status}: {}", advice(*.status))]
    Refused {
        /// The model, with its revision if one was given.
        model: String,
        /// HTTP status.
        status: u16,
    },
    /// The cache folder cannot be written.
    #[error("cannot write model {model} to the cache at {}: {source}; set HF_HOME to a folder that can be written", cache.display())]
    CacheNotWritable {
        /// The model, with its revision if one was given.
        model: String,
        /// The cache folder.
        cache: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file could not be fetched.
    #[error("could not fetch {file} of model {model}: {reason}; run again to go on where it stopped")]
    Download {
        /// The model, with its revision if one was given.
        model: String,
        /// The file.
        file: String,
        /// The cause.
        reason: String,
    },
    /// The hub's model has no files that could be run.
    #[error("model {model} has no {missing} on the hub; choose one in the safetensors format")]
    Unusable {
        /// The model, with its revision if one was given.
        model: String,
        /// What is missing.
        missing: &'static str,
    },
}

fn advice(status: u16) -> &'static str {
    match status {
        404 => "it has no such model or revision",
        _ => "it has no such model or does not let you read it (gated or private models need HF_TOKEN)",
    }
}

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

/// One model on its way into the cache.
struct Fetch<'a> {
    settings: &'a Settings,
    id: &'a ModelId,
    /// Whether some of it is in the cache.
    partly: bool,
}

impl Fetch<'_> {
    fn run(&self, progress: &mut dyn FnMut(HubProgress)) -> Result<PathBuf, HubError> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// A hub on this machine's loopback that serves the given files of org/name, for so many requests.
    struct FakeHub {
        endpoint: String,
        asked: std::sync::Arc<std::sync::Mutex<Vec<String>>>,
    }

    impl FakeHub {
        fn start(files: Vec<(&'static str, Vec<u8>)>) -> FakeHub {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
            let log = asked.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().take(200) {
                    answer(stream.unwrap(), &files, &log);
                }
            });
            FakeHub { endpoint, asked }
        }

        fn asked(&self) -> Vec<String> {
            self.asked.lock().unwrap().clone()
        }
    }

    /// One request, one answer, as the hub gives it for files it serves itself.
    fn answer(stream: std::net::TcpStream, files: &[(&str, Vec<u8>)], log: &std::sync::Mutex<Vec<String>>) {
        let mut reader = BufReader::new(&stream);
        let (mut request, mut from, mut to) = (String::new(), 0, usize::MAX);
        reader.read_line(&mut request).unwrap();
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).unwrap() <= 2 {
                break;
            }
            if let Some(range) = header.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (begin, end) = range.trim().split_once('-').unwrap();
                (from, to) = (begin.parse().unwrap(), end.parse().unwrap_or(usize::MAX));
            }
        }
        let path = request.split(' ').nth(1).unwrap().to_owned();
        log.lock().unwrap().push(path.clone());
        let file = path.strip_prefix("/org/name/resolve/main/");
        let (status, headers, body) = if path == "/api/models/org/name/revision/main" {
            let siblings: Vec<Json> =
                files.iter().map(|(name, _)| serde_json::json!({"rfilename": name})).collect();
            (
                "200 OK",
                String::new(),
                serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes(),
            )
        } else if let Some((name, bytes)) = files.iter().find(|(name, _)| Some(*name) == file) {
            let range = format!("bytes {from}-{}/{}", to.min(bytes.len()), bytes.len());
            let headers =
                format!("etag: \"e{}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: {range}\r\n", name.len());
            ("206 Partial Content", headers, bytes[from..bytes.len().min(to.saturating_add(1))].to_vec())
        } else {
            ("404 Not Found", String::new(), Vec::new())
        };
        let head = format!(
            "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        (&stream).write_all(&[head.as_bytes(), &body].concat()).unwrap();
    }

    fn settings(cache: &Path, endpoint: &str) -> Settings {
        Settings { cache: cache.to_owned(), endpoint: endpoint.to_owned(), token: None, offline: false }
    }

    fn offline(cache: &Path) -> Settings {
        Settings { offline: true, ..settings(cache, "http://127.0.0.1:9") }
    }

    fn fail(settings: &Settings, spec: &str) -> String {
        let error = settings.resolve(spec, &mut |_| {}).expect_err(spec).to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    }

    /// A cache that holds the given files of org/name at main.
    fn cache_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("models--org--name");
        let snapshot = repo.join("snapshots").join(COMMIT);
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
        for (name, text) in files {
            std::fs::write(snapshot.join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn ids() {
        let cases = [
            ("org/name", Some(("org/name", "main"))),
            ("mlx-community/LFM2-8B-A1B-4bit@v1.0", Some(("mlx-community/LFM2-8B-A1B-4bit", "v1.0"))),
            ("org/name@refs/pr/3", Some(("org/name", "refs/pr/3"))),
            ("name", None),
            ("", None),
            ("a/b/c", None),
            ("/abs", None),
            ("./name", None),
            ("../name", None),
            ("org/", None),
            ("org/na me", None),
            ("org/..", None),
            ("org/name@", None),
            ("org/name@../../x", None),
            ("org/name@/x", None),
            ("https://huggingface.co/org/name", None),
        ];
        for (spec, expected) in cases {
            let expected =
                expected.map(|(name, revision)| ModelId { name: name.into(), revision: revision.into() });
            assert_eq!(ModelId::parse(spec), expected, "{spec}");
        }
    }

    #[test]
    fn environment() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "from-file\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let read = |variables: &[(&str, &str)]| {
            Settings::from_lookup(|name| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
            })
        };
        let cache = |variables: &[(&str, &str)]| read(variables).cache;
        assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/hf")]), Path::new("/h/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "")]), Path::new("/hf/hub"));
        assert!(cache(&[("HF_HOME", "relative")]).is_absolute());
        let plain = read(&[("HF_HOME", "/nowhere")]);
        assert_eq!(
            (plain.endpoint.as_str(), plain.token, plain.offline),
            ("https://huggingface.co", None, false)
        );
        assert_eq!(read(&[("HF_HOME", home)]).token.as_deref(), Some("from-file"));
        assert_eq!(read(&[("HF_HOME", home), ("HF_TOKEN", "t")]).token.as_deref(), Some("t"));
        assert_eq!(read(&[("HF_ENDPOINT", "https://mirror/")]).endpoint, "https://mirror");
        for (value, expected) in [("1", true), ("true", true), ("YES", true), ("0", false), ("", false)] {
            assert_eq!(read(&[("HF_HUB_OFFLINE", value)]).offline, expected, "{value}");
        }
    }

    #[test]
    fn folders_and_what_is_neither() {
        let dir = tempfile::tempdir().unwrap();
        let settings = offline(dir.path());
        let spec = dir.path().to_str().unwrap();
        assert_eq!(settings.resolve(spec, &mut |_| {}).unwrap(), dir.path());
        let file = dir.path().join("f");
        std::fs::write(&file, "").unwrap();
        assert!(fail(&settings, file.to_str().unwrap()).contains("is a file; give the folder"));
        let error = fail(&settings, "no-such-folder");
        assert!(error.contains("neither an existing folder nor a hub id such as org/name"), "{error}");
    }

    #[test]
    fn complete_snapshots_need_no_network() {
        let weights = ("model.safetensors", "");
        let index = (INDEX, r#"{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#);
        let cases: [(&[(&str, &str)], bool); 7] = [
            (&[("config.json", "{}"), weights], true),
            (&[weights], false),
            (&[("config.json", "{}")], false),
            (&[("config.json", "{}"), index, ("x.safetensors", "")], false),
            (&[("config.json", "{}"), index, ("x.safetensors", ""), ("y.safetensors", "")], true),
            (&[("config.json", "{}"), ("model-00001-of-00002.safetensors", "")], false),
            (&[("config.json", "{}"), ("model-00001-of-00001.safetensors", "")], true),
        ];
        for (files, complete) in cases {
            let cache = cache_with(files);
            let settings = offline(cache.path());
            for spec in ["org/name", &format!("org/name@{COMMIT}")] {
                let found = settings.resolve(spec, &mut |_| {});
                match found {
                    Ok(folder) => assert!(complete && folder.ends_with(COMMIT), "{files:?}"),
                    Err(error) => {
                        let text = error.to_string();
                        assert!(!complete && text.contains("only partly in the cache"), "{files:?}: {text}");
                    }
                }
            }
            assert!(
                fail(&settings, "org/name@other").contains("model org/name@other is not in the cache at")
            );
        }
    }

    #[test]
    fn fetches_what_a_model_needs_and_no_more() {
        let shard = vec![7; 3_000_000];
        let hub = FakeHub::start(vec![
            ("README.md", b"#".to_vec()),
            ("config.json", b"{}".to_vec()),
            ("tokenizer_config.json", b"{}".to_vec()),
            ("chat_template.jinja", b"x".to_vec()),
            (INDEX, br#"{"weight_map": {"a": "model-1-of-1.safetensors"}}"#.to_vec()),
            ("model-1-of-1.safetensors", shard.clone()),
            ("consolidated.safetensors", shard.clone()),
            ("onnx/config.json", b"{}".to_vec()),
            ("pytorch_model.bin", b"".to_vec()),
        ]);
        let cache = tempfile::tempdir().unwrap();
        let settings = settings(cache.path(), &hub.endpoint);
        let mut told = Vec::new();
        let folder = settings.resolve("org/name", &mut |progress| told.push(progress)).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected = [
            "chat_template.jinja",
            "config.json",
            "model-1-of-1.safetensors",
            INDEX,
            "tokenizer_config.json",
        ];
        assert_eq!(names, expected);
        assert_eq!(std::fs::read(folder.join("model-1-of-1.safetensors")).unwrap(), shard);
        let last = told.last().unwrap();
        assert_eq!(
            (last.file.as_str(), last.done_bytes, last.total_bytes),
            ("model-1-of-1.safetensors", 3_000_000, 3_000_000)
        );
        assert!(told.len() > 6 && told.iter().all(|progress| progress.done_bytes <= progress.total_bytes));

        let asked = hub.asked().len();
        assert_eq!(settings.resolve("org/name", &mut |_| {}).unwrap(), folder);
        assert_eq!(hub.asked().len(), asked, "a complete model is not asked for again");

        std::fs::remove_file(folder.join("model-1-of-1.safetensors")).unwrap();
        assert_eq!(settings.resolve("org/name", &mut |_| {}).unwrap(), folder);
        let again = &hub.asked()[asked..];
        assert!(
            again.iter().all(|path| path.contains("/api/") || path.ends_with("model-1-of-1.safetensors")),
            "{again:?}"
        );
    }

    #[test]
    fn failures_are_one_clear_line() {
        let cache = tempfile::tempdir().unwrap();
        let place = cache.path().display().to_string();
        let error = fail(&offline(cache.path()), "org/name");
        assert!(
            error.contains(&format!(
                "model org/name is not in the cache at {place} and HF_HUB_OFFLINE is set"
            )),
            "{error}"
        );

        // A port that was free a moment ago: nothing answers there.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = fail(&settings(cache.path(), &format!("http://127.0.0.1:{port}")), "org/name");
        assert!(error.contains("and the hub could not be reached: "), "{error}");

        let hub = FakeHub::start(vec![("config.json", b"{}".to_vec()), ("pytorch_model.bin", vec![])]);
        let settings_here = settings(cache.path(), &hub.endpoint);
        let error = fail(&settings_here, "org/other");
        assert!(
            error.contains("no folder org/other is here, and the hub answers 404: it has no such model"),
            "{error}"
        );
        let error = fail(&settings_here, "org/name");
        assert!(error.contains("model org/name has no model*.safetensors on the hub"), "{error}");
    }

    #[test]
    fn a_cache_that_cannot_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = fail(&settings(&file.join("hub"), "http://127.0.0.1:9"), "org/name");
        assert!(
            error.contains("cannot write model org/name to the cache at") && error.contains("set HF_HOME"),
            "{error}"
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_read_only_cache() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o555)).unwrap();
        if std::fs::write(dir.path().join("probe"), "").is_ok() {
            return; // the superuser may write everywhere
        }
        let error = fail(&settings(dir.path(), "http://127.0.0.1:9"), "org/name");
        assert!(error.contains("cannot write model org/name to the cache at"), "{error}");
    }
}
