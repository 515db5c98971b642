//! The store on one machine's disk: round trips, limits, damage, hostile files, bad directories.

mod common;

use common::{decision, key};
use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;
use zmlx_tune::{Candidate, Decision, InvalidDecision, Key, Outcome, Source, Store, StoreError};

fn choice(store: &Store, key: &Key) -> Option<i64> {
    store.get(key).unwrap().map(|found| found.decision.choice.get("threads").unwrap())
}

/// A file's text with one decision in it.
fn good_text() -> String {
    let dir = tempfile::tempdir().unwrap();
    let saved = Store::open(dir.path()).put(&decision(&key(1), 256)).unwrap();
    fs::read_to_string(saved.path).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_put_comes_back_in_another_store() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("made/on/demand");
    let store = Store::open(&dir);
    assert_eq!(store.get(&key(1)).unwrap(), None);
    assert!(!dir.exists(), "reading makes nothing");
    let first = decision(&key(1), 256);
    let saved = store.put(&first).unwrap();
    assert_eq!((&saved.path, &saved.moved_aside, saved.dropped), (&store.path(&key(1)), &None, 0));
    store.put(&decision(&key(2), 64)).unwrap();
    for store in [store, Store::open(&dir)] {
        let found = store.get(&key(1)).unwrap().unwrap();
        assert_eq!((found.decision.as_ref(), found.source), (&first, Source::User));
        assert_eq!(choice(&store, &key(2)), Some(64));
        assert_eq!(choice(&store, &key(3)), None);
        assert_eq!(store.list(&key(1)).unwrap().len(), 2);
    }
    // Each part of the key counts.
    let store = Store::open(&dir);
    for other in [
        Key { device: "other".into(), ..key(1) },
        Key { library: "other".into(), ..key(1) },
        Key { kernel: "other".into(), ..key(1) },
        Key { hash: "other".into(), ..key(1) },
        Key { shape_class: "other".into(), ..key(1) },
    ] {
        assert_eq!(choice(&store, &other), None, "{other}");
    }
}

#[test]
fn a_newer_decision_replaces_and_bytes_do_not_drift() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    let path = store.put(&decision(&key(1), 256)).unwrap().path;
    let before = fs::read(&path).unwrap();
    store.put(&decision(&key(1), 512)).unwrap();
    assert_eq!(choice(&store, &key(1)), Some(512));
    store.put(&decision(&key(1), 256)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), before);
    let base = path.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(names(dir.path()), [base.clone(), format!("{base}.lock")], "no temporary file stays");
}

#[test]
fn another_store_sees_new_decisions() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (Store::open(dir.path()), Store::open(dir.path()));
    for n in 0..20 {
        assert_eq!(choice(&two, &key(n)), None);
        one.put(&decision(&key(n), 7)).unwrap();
        assert_eq!(choice(&two, &key(n)), Some(7), "{n}");
    }
}

#[test]
fn memory_is_bounded_and_answers_without_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    let on = |n: usize| Key { device: format!("device {n}"), ..key(1) };
    for n in 0..5 {
        store.put(&decision(&on(n), 7)).unwrap();
    }
    for n in 0..5 {
        fs::remove_file(store.path(&on(n))).unwrap();
    }
    // Four files stay in memory; the first has made room for the fifth.
    let known: Vec<Option<i64>> = [4, 3, 2, 1, 0].map(|n| choice(&store, &on(n))).to_vec();
    assert_eq!(known, [Some(7), Some(7), Some(7), Some(7), None]);
}

#[test]
fn old_decisions_make_room() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).with_max_decisions(3);
    for n in 1..=3 {
        assert_eq!(store.put(&decision(&key(n), 10 * n as i64)).unwrap().dropped, 0);
    }
    // The oldest by its own date, yet just saved: it stays, and kernel_1 goes.
    assert_eq!(store.put(&decision(&key(4), 5)).unwrap().dropped, 1);
    let store = Store::open(dir.path());
    let left: Vec<bool> = (1..=4).map(|n| choice(&store, &key(n)).is_some()).collect();
    assert_eq!(left, [false, true, true, true]);
}

#[test]
fn a_file_never_grows_past_what_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    let heavy = |n: usize, mib: usize| {
        let mut decision = decision(&key(n), 10 + n as i64);
        decision.evidence[2].outcome = Outcome::Failed("x".repeat(mib << 20));
        decision
    };
    for n in 0..3 {
        assert_eq!(store.put(&heavy(n, 5)).unwrap().dropped, 0);
    }
    assert_eq!(store.put(&heavy(3, 5)).unwrap().dropped, 1);
    let fresh = Store::open(dir.path());
    assert_eq!((choice(&fresh, &key(0)), choice(&fresh, &key(3))), (None, Some(13)));
    let result = store.put(&heavy(4, 17));
    assert!(matches!(result, Err(StoreError::TooLong { bytes }) if bytes > 17 << 20), "{result:?}");
    assert_eq!(Store::open(dir.path()).list(&key(0)).unwrap().len(), 3, "a refused one changes nothing");
}

#[test]
fn shipped_defaults_come_second() {
    let json = good_text();
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).with_defaults(&json).unwrap();
    let found = store.get(&key(1)).unwrap().unwrap();
    assert_eq!((found.source, found.decision.choice.get("threads")), (Source::Shipped, Some(256)));
    assert_eq!(store.get(&key(2)).unwrap(), None);
    store.put(&decision(&key(1), 64)).unwrap();
    let found = store.get(&key(1)).unwrap().unwrap();
    assert_eq!((found.source, found.decision.choice.get("threads")), (Source::User, Some(64)));
    // A damaged user file is reported, and the shipped choice can still be asked for.
    fs::write(store.path(&key(1)), "{").unwrap();
    let store = Store::open(dir.path()).with_defaults(&json).unwrap();
    assert!(matches!(store.get(&key(1)), Err(StoreError::Corrupt { .. })));
    assert_eq!(store.shipped(&key(1)).unwrap().decision.choice.get("threads"), Some(256));
    assert!(matches!(Store::open(dir.path()).with_defaults("[]"), Err(StoreError::Defaults(_))));
}

#[test]
fn damaged_files_are_reported_then_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    for (n, damage) in ["", "not json", "{\"format\":\"zmlx-tune\",\"version\":1}"].into_iter().enumerate() {
        let store = Store::open(dir.path());
        let path = store.path(&key(1));
        fs::write(&path, damage).unwrap();
        let refused = store.get(&key(1));
        assert!(matches!(refused, Err(StoreError::Corrupt { .. })), "{refused:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), damage, "get leaves it");
        let moved = store.put(&decision(&key(1), 256)).unwrap().moved_aside.unwrap();
        assert!(moved.to_str().unwrap().ends_with(&format!(".v1.json.corrupt-{}", n + 1)), "{moved:?}");
        assert_eq!(fs::read_to_string(moved).unwrap(), damage, "nothing is deleted");
        assert_eq!(choice(&store, &key(1)), Some(256));
    }
}

#[test]
fn damaged_copies_are_limited() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    let path = store.path(&key(1));
    for n in 1..=100 {
        fs::write(format!("{}.corrupt-{n}", path.display()), "kept").unwrap();
    }
    fs::write(&path, "{").unwrap();
    let refused = store.put(&decision(&key(1), 256));
    assert!(matches!(refused, Err(StoreError::TooManyDamaged { count: 100, .. })), "{refused:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "{");
}

#[test]
fn another_version_is_never_touched() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    let path = store.path(&key(1));
    let text = r#"{"format":"zmlx-tune","version":2,"all":"different"}"#;
    fs::write(&path, text).unwrap();
    assert!(matches!(store.get(&key(1)), Err(StoreError::Version { found: 2, .. })));
    assert!(matches!(store.put(&decision(&key(1), 256)), Err(StoreError::Version { found: 2, .. })));
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_file_cut_anywhere_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    let path = store.path(&key(1));
    let text = good_text();
    let whole = text.trim_end().len();
    for len in 0..whole {
        fs::write(&path, &text[..len]).unwrap();
        let result = store.get(&key(1));
        assert!(matches!(result, Err(StoreError::Corrupt { .. })), "{len}: {result:?}");
    }
    fs::write(&path, &text[..whole]).unwrap();
    assert_eq!(choice(&store, &key(1)), Some(256));
}

#[test]
fn changed_bytes_never_panic_nor_pass_as_nonsense() {
    let text = good_text().into_bytes();
    let (mut read, mut refused) = (0, 0);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    for at in 0..text.len() {
        for byte in [0, b'"', b'9', b'{', b'-', 0xff] {
            let mut bytes = text.clone();
            bytes[at] = byte;
            fs::write(store.path(&key(1)), &bytes).unwrap();
            match store.list(&key(1)) {
                Ok(decisions) => {
                    read += 1;
                    assert!(decisions.iter().all(|d| d.validate().is_ok()));
                }
                Err(StoreError::Corrupt { .. } | StoreError::Version { .. }) => refused += 1,
                Err(other) => panic!("{at} {byte}: {other:?}"),
            }
        }
    }
    assert!(read > 100 && refused > 1000, "{read} read, {refused} refused");
}

#[test]
fn hostile_json_is_refused() {
    let text = good_text();
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(200_000), close.repeat(200_000));
    let cases = [
        ("deep array", deep("[", "]")),
        ("deep object", deep("{\"a\":", "}")),
        (
            "deep candidate",
            text.replacen("\"choice\":{", &format!("\"choice\":{{\"x\":{},", deep("[", "]")), 1),
        ),
        ("NaN", text.replacen("1.25", "NaN", 1)),
        ("infinity", text.replacen("1.25", "1e999", 1)),
        ("negative", text.replacen("1.25", "-1.25", 1)),
        ("null gain", text.replacen("1.25", "null", 1)),
        ("too large an integer", text.replacen("\"threads\":256", "\"threads\":9223372036854775808", 1)),
        ("fraction", text.replacen("\"threads\":256", "\"threads\":256.5", 1)),
        ("choice without evidence", text.replacen("\"threads\":256", "\"threads\":257", 1)),
        ("another device", text.replace("NVIDIA H100", "NVIDIA A100")),
        ("empty hash", text.replace("9f3c", "")),
        ("not UTF-8 in a name", text.replace("9f3c", "\\ud800")),
        ("version as text", text.replace("\"version\":1", "\"version\":\"1\"")),
        ("another format", text.replace("\"zmlx-tune\"", "\"other\"")),
        ("twice the same", text.replacen("\n{", &format!("\n{},\n{{", line_of(&text)), 1)),
        ("no text", "\0".repeat(1000)),
        ("too long", format!("{text}{}", " ".repeat(17 << 20))),
    ];
    for (name, json) in cases {
        assert_ne!(json, text, "{name} changes nothing");
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path());
        fs::write(store.path(&key(1)), json).unwrap();
        let result = store.get(&key(1));
        assert!(matches!(result, Err(StoreError::Corrupt { .. })), "{name}: {result:?}");
        assert!(store.put(&decision(&key(1), 64)).unwrap().moved_aside.is_some(), "{name}");
        assert_eq!(choice(&Store::open(dir.path()), &key(1)), Some(64), "{name}");
    }
}

#[test]
fn unknown_fields_are_skipped_however_deep() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    let deep = format!("{{\"x\":{}{},\"key\"", "[".repeat(200_000), "]".repeat(200_000));
    fs::write(store.path(&key(1)), good_text().replacen("{\"key\"", &deep, 1)).unwrap();
    assert_eq!(choice(&store, &key(1)), Some(256));
}

/// The line that holds the decision.
fn line_of(text: &str) -> &str {
    text.lines().nth(1).unwrap()
}

#[test]
fn nonsense_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    let good = decision(&key(1), 256);
    let cases = [
        Decision { gain: f64::NAN, ..good.clone() },
        Decision { choice: Candidate::new(), ..good.clone() },
        Decision { evidence: Vec::new(), ..good.clone() },
        Decision { key: Key { kernel: String::new(), ..key(1) }, ..good },
    ];
    for bad in cases {
        let refused = store.put(&bad);
        assert!(matches!(refused, Err(StoreError::Decision(_))), "{refused:?}");
    }
    let text = StoreError::Decision(InvalidDecision::Figure { name: "gain", value: f64::NAN }).to_string();
    assert_eq!(text, "cannot save the decision: `gain` is NaN");
    assert!(names(dir.path()).is_empty());
}

#[test]
fn bad_directories_are_typed_errors() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    // A file where a directory should be, and one above it.
    for dir in [file.clone(), file.join("below")] {
        let store = Store::open(&dir);
        let refused = store.put(&decision(&key(1), 256));
        assert!(matches!(refused, Err(StoreError::Io { action: "make the directory", .. })), "{refused:?}");
        let refused = store.get(&key(1));
        assert!(matches!(refused, Err(StoreError::Io { action: "look at", .. })), "{refused:?}");
    }
    // Directories in the way of each file.
    for (suffix, expected) in [("", "read"), (".lock", "open"), (".tmp", "remove")] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path());
        fs::create_dir(format!("{}{suffix}", store.path(&key(1)).display())).unwrap();
        let refused = store.put(&decision(&key(1), 256));
        let Err(StoreError::Io { action, .. }) = &refused else { panic!("{suffix}: {refused:?}") };
        assert_eq!(action, &expected, "{suffix}");
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("nvidia-h100") && text.contains("os error"), "{text}");
    }
}

#[cfg(unix)]
#[test]
fn a_read_only_directory_can_be_read_and_not_written() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    Store::open(dir.path()).put(&decision(&key(1), 256)).unwrap();
    let set = |mode| fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
    set(0o555);
    let may_write_anyway = File::create(dir.path().join("probe")).is_ok();
    let store = Store::open(dir.path());
    let result = store.put(&decision(&key(2), 64));
    let kept = choice(&Store::open(dir.path()), &key(1));
    set(0o755);
    assert_eq!(kept, Some(256));
    // The superuser may write anywhere.
    match may_write_anyway {
        true => assert!(result.is_ok(), "{result:?}"),
        false => assert!(matches!(result, Err(StoreError::Io { .. })), "{result:?}"),
    }
}

#[test]
fn a_held_lock_times_out_and_a_left_temporary_file_is_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).with_lock_timeout(Duration::from_millis(30));
    let path = store.put(&decision(&key(1), 256)).unwrap().path;
    let held = File::open(format!("{}.lock", path.display())).unwrap();
    held.lock().unwrap();
    let refused = store.put(&decision(&key(2), 64));
    assert!(matches!(refused, Err(StoreError::Locked { .. })), "{refused:?}");
    assert_eq!(choice(&Store::open(dir.path()), &key(1)), Some(256), "reading needs no lock");
    held.unlock().unwrap();
    fs::write(format!("{}.tmp", path.display()), "half a wri").unwrap();
    store.put(&decision(&key(2), 64)).unwrap();
    assert_eq!(choice(&Store::open(dir.path()), &key(2)), Some(64));
}
