//! The tables of measured decode in `docs/performance.md` are those of `docs/measured/`.

use std::path::Path;

use zmlx_models::measured::{Measured, with_tables};

/// Set `ZMLX_UPDATE_DOCS` to write them.
#[test]
fn the_documentation_has_these_tables() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let lines = Measured::read(&docs.join("measured/h100.jsonl")).unwrap_or_else(|error| panic!("{error}"));
    let path = docs.join("performance.md");
    let found = std::fs::read_to_string(&path).unwrap();
    let text = with_tables(&found, &lines).unwrap_or_else(|error| panic!("docs/performance.md: {error}"));
    if found != text && std::env::var_os("ZMLX_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
        return;
    }
    assert!(
        found == text,
        "docs/performance.md has not the tables of docs/measured/h100.jsonl: run \
         ZMLX_UPDATE_DOCS=1 cargo test -p zmlx-models --release --test measured"
    );
}
