use std::fs::File;

use super::*;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lfm2-moe");

type Files = Vec<(&'static str, Vec<u8>)>;

/// A file with the given header and so many bytes of data.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn one(name: &str) -> Vec<u8> {
    safetensors(&format!(r#"{{"{name}": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}}}"#), 8)
}

#[test]
fn embedded_model() {
    let checkpoint = Checkpoint::open(Path::new(MODEL)).unwrap();
    assert_eq!(checkpoint.files, [Path::new(MODEL).join(SINGLE)]);
    let embedding = &checkpoint.tensors["model.embed_tokens.weight"];
    assert_eq!(
        (embedding.dtype.as_str(), embedding.shape.as_slice(), embedding.bytes),
        ("U32", &[4096, 32][..], 524_288)
    );
    let file = std::fs::metadata(&checkpoint.files[0]).unwrap().len();
    assert!(checkpoint.total_bytes() < file && file - checkpoint.total_bytes() < 100_000);
}

#[test]
fn good_headers() {
    let cases = [
        ("empty", "{}", 0),
        ("padded", "{}      ", 0),
        ("metadata", r#"{"__metadata__": {"format": "mlx"}}"#, 0),
        ("scalar", r#"{"a": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}"#, 2),
        ("four bits", r#"{"a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}"#, 3),
        (
            "no elements, out of order",
            r#"{"b": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}, "z": {"dtype": "F32", "shape": [0, 5], "data_offsets": [3, 3]},
                "a": {"dtype": "F32", "shape": [7, 0], "data_offsets": [0, 0]}}"#,
            3,
        ),
    ];
    for (name, header, data) in cases {
        let dir = folder(&[(SINGLE, safetensors(header, data))]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(checkpoint.total_bytes(), data as u64, "{name}");
    }
}

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}"#)
}

#[test]
fn hostile_headers() {
    let a = |dtype: &str, shape: &str, offsets: &str| {
        safetensors(&format!(r#"{{"a": {}}}"#, entry(dtype, shape, offsets)), 8)
    };
    let ab = |first: &str, second: &str, data: usize| {
        let header =
            format!(r#"{{"a": {}, "b": {}}}"#, entry("U8", "[4]", first), entry("U8", "[4]", second));
        safetensors(&header, data)
    };
    let mut not_utf8 = safetensors("{\"..\": 1}", 0);
    not_utf8[10] = 0xff;
    let nested = "[".repeat(100_000);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty file", vec![], "has 0 bytes"),
        ("seven bytes", vec![1; 7], "has 7 bytes"),
        (
            "header longer than file",
            [&100u64.to_le_bytes()[..], b"{}"].concat(),
            "claims 100 bytes, and only 2 follow",
        ),
        ("largest length", vec![0xff; 64], "claims 18446744073709551615 bytes"),
        ("not utf-8", not_utf8, "not UTF-8"),
        ("not json", safetensors("{\"a\"", 0), "not a JSON object"),
        ("no header", safetensors("", 0), "not a JSON object"),
        ("a list", safetensors("[]", 0), "not a JSON object"),
        ("trailing text", safetensors("{} {}", 0), "not a JSON object"),
        ("deeply nested", safetensors(&format!(r#"{{"a": {nested}"#), 0), "not a JSON object"),
        ("entry is text", safetensors(r#"{"a": "b"}"#, 0), "tensor a: it has no dtype"),
        (
            "no shape",
            safetensors(r#"{"a": {"dtype": "F32", "data_offsets": [0, 0]}}"#, 0),
            "tensor a: its shape",
        ),
        ("negative shape", a("F32", "[-2]", "[0, 8]"), "tensor a: its shape"),
        ("fractional shape", a("F32", "[2.0]", "[0, 8]"), "tensor a: its shape"),
        ("negative offsets", a("F32", "[2]", "[-8, 0]"), "tensor a: its data_offsets are not"),
        ("huge offsets", a("F32", "[2]", "[0, 99999999999999999999]"), "tensor a: its data_offsets are not"),
        ("one offset", a("F32", "[2]", "[8]"), "tensor a: its data_offsets are not"),
        ("three offsets", a("F32", "[2]", "[0, 8, 8]"), "tensor a: its data_offsets are not"),
        ("backwards", a("F32", "[2]", "[8, 0]"), "run backwards, from 8 to 0"),
        ("unknown dtype", a("F33", "[2]", "[0, 8]"), "unknown dtype F33"),
        ("overflow", a("F32", "[4294967296, 4294967296]", "[0, 8]"), "more bytes than can be counted"),
        ("overflow by bits", a("F32", "[1152921504606846976]", "[0, 8]"), "more bytes than can be counted"),
        (
            "wrong size",
            a("F32", "[3]", "[0, 8]"),
            "shape [3] of F32 takes 12 bytes, its data_offsets give 8 bytes",
        ),
        ("half a byte", a("F4", "[3]", "[0, 1]"), "takes 12 bits"),
        ("out of range", a("U8", "[16]", "[0, 16]"), "ends at 16, and the file holds 8 bytes"),
        (
            "far out of range",
            a("U8", "[0]", "[18446744073709551615, 18446744073709551615]"),
            "the file holds 8 bytes",
        ),
        ("truncated", ab("[0, 4]", "[4, 8]", 7), "tensor b: its data ends at 8, and the file holds 7 bytes"),
        ("overlap", ab("[0, 4]", "[2, 6]", 6), "tensors a and b share bytes"),
        ("same bytes", ab("[0, 4]", "[0, 4]", 4), "tensors a and b share bytes"),
        ("hole", ab("[0, 4]", "[6, 10]", 10), "the 2 bytes before tensor b"),
        ("hole at the front", ab("[5, 9]", "[1, 5]", 9), "the 1 bytes before tensor b"),
        ("bytes left over", ab("[0, 4]", "[4, 8]", 11), "its last 3 bytes"),
        (
            "listed twice",
            safetensors(
                &format!(
                    r#"{{"a": {0}, "a": {1}}}"#,
                    entry("U8", "[4]", "[0, 4]"),
                    entry("U8", "[4]", "[4, 8]")
                ),
                8,
            ),
            "tensor a is listed twice",
        ),
    ];
    for (name, bytes, expected) in cases {
        let dir = folder(&[(SINGLE, bytes)]);
        let error = Checkpoint::open(dir.path()).expect_err(name);
        assert!(matches!(error, CheckpointError::Header { .. }), "{name}: {error:?}");
        let text = error.to_string();
        assert!(
            text.contains(expected) && text.contains(SINGLE) && text.contains("fetch the file again"),
            "{name}: {text}"
        );
    }
}

#[test]
fn header_over_the_limit_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(SINGLE);
    std::fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(200_000_000).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("claims 100000001 bytes, more than the 100000000 allowed"), "{error}");
}

#[test]
fn every_cut_of_the_embedded_model_is_refused() {
    let whole = std::fs::read(Path::new(MODEL).join(SINGLE)).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 7, 8, 9, header - 1, header, header + 1, whole.len() / 2, whole.len() - 1] {
        let dir = folder(&[(SINGLE, whole[..length].to_vec())]);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::Header { .. }), "{length}: {error}");
    }
}

#[test]
fn layouts() {
    let index = |map: &str| format!(r#"{{"metadata": {{}}, "weight_map": {map}}}"#).into_bytes();
    let (x, y) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let both = index(&format!(r#"{{"a": "{x}", "b": "{y}"}}"#));
    let files = |dir: &tempfile::TempDir| {
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let names: Vec<_> =
            checkpoint.tensors.iter().map(|(name, info)| (name.clone(), info.file.clone())).collect();
        names
            .into_iter()
            .map(|(name, file)| format!("{name} {}", file.strip_prefix(dir.path()).unwrap().display()))
            .collect::<Vec<_>>()
    };
    let expected = [format!("a {x}"), format!("b {y}")];
    assert_eq!(files(&folder(&[(x, one("a")), (y, one("b")), (INDEX, both.clone())])), expected);
    assert_eq!(files(&folder(&[(x, one("a")), (y, one("b")), ("adapter.safetensors", vec![])])), expected);
    assert_eq!(files(&folder(&[(SINGLE, one("c")), (x, one("a"))])), ["c model.safetensors"]);

    let errors: Vec<(&str, Files, &str)> = vec![
        ("empty folder", vec![], "has no model*.safetensors; give the folder"),
        ("another format", vec![("pytorch_model.bin", vec![])], "convert them to safetensors"),
        ("same tensor twice", vec![(x, one("a")), (y, one("a"))], "tensor a is in both"),
        (
            "missing shard",
            vec![(x, one("a")), (INDEX, both.clone())],
            "the file model-00002-of-00002.safetensors it names is missing",
        ),
        (
            "missing tensor",
            vec![(x, one("a")), (y, one("c")), (INDEX, both)],
            "tensor b is said to be in model-00002-of-00002",
        ),
        ("index not json", vec![(INDEX, b"{".to_vec())], "it is not JSON"),
        ("index not utf-8", vec![(INDEX, b"\xff".to_vec())], "it is not JSON"),
        ("no weight map", vec![(INDEX, b"{}".to_vec())], "no \"weight_map\""),
        ("empty weight map", vec![(INDEX, index("{}"))], "no \"weight_map\""),
        ("not a name", vec![(INDEX, index(r#"{"a": 3}"#))], "no \"weight_map\""),
        ("traversal", vec![(INDEX, index(r#"{"a": "../x.safetensors"}"#))], "not a plain file name"),
        ("hidden traversal", vec![(INDEX, index(r#"{"a": "x/../../y"}"#))], "not a plain file name"),
        ("absolute", vec![(INDEX, index(r#"{"a": "/etc/passwd"}"#))], "not a plain file name"),
        ("backslash", vec![(INDEX, index(r#"{"a": "..\\x"}"#))], "not a plain file name"),
        ("empty name", vec![(INDEX, index(r#"{"a": ""}"#))], "not a plain file name"),
    ];
    for (name, files, expected) in errors {
        let error = Checkpoint::open(folder(&files).path()).expect_err(name).to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
    let error = Checkpoint::open(Path::new("/no/such/folder")).unwrap_err();
    assert!(
        matches!(error, CheckpointError::MissingFolder { .. })
            && error.to_string().contains("/no/such/folder"),
        "{error}"
    );
}

#[test]
fn a_folder_in_place_of_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(SINGLE)).unwrap();
    assert!(matches!(Checkpoint::open(dir.path()).unwrap_err(), CheckpointError::Read { .. }));
}
