use super::fetch::INDEX;
use super::*;
use serde_json::Value as Json;
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
    let head =
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n", body.len());
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
        assert!(fail(&settings, "org/name@other").contains("model org/name@other is not in the cache at"));
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
    let expected =
        ["chat_template.jinja", "config.json", "model-1-of-1.safetensors", INDEX, "tokenizer_config.json"];
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
        error.contains(&format!("model org/name is not in the cache at {place} and HF_HUB_OFFLINE is set")),
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
