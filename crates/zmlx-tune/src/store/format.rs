//! The text of a store's file.
//!
//! ```json
//! {"format": "zmlx-tune", "version": 1, "decisions": [{"key": {...}, "choice": {...}, ...}]}
//! ```

use crate::{Decision, InvalidDecision, Key};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Version of the files that this crate reads and writes; it is part of their names, so that programs with
/// different versions can share a directory.
pub const FORMAT_VERSION: u64 = 1;

/// What the `format` field holds.
const FORMAT: &str = "zmlx-tune";

/// The decisions of a file. Ordered, so that a file's text depends only on what it holds.
pub(super) type Decisions = BTreeMap<Key, Arc<Decision>>;

/// Why text is not a store's file.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    #[error("its format is `{}`, not `{FORMAT}`", .0.escape_debug())]
    Format(String),
    #[error("it has format version {0}, this program reads {FORMAT_VERSION}")]
    Version(u64),
    #[error("decision {index}: {fault}")]
    Decision { index: usize, fault: InvalidDecision },
    #[error("decision {0} repeats the key of an earlier one")]
    Repeated(usize),
    #[error("it is longer than {} MiB", super::disk::MAX_BYTES >> 20)]
    Long,
}

/// Read first: another version may differ in everything else.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
}

#[derive(Deserialize)]
struct Body {
    decisions: Vec<Decision>,
}

/// Parses and checks a file's text.
pub(super) fn parse(bytes: &[u8]) -> Result<Decisions, Fault> {
    if bytes.len() as u64 > super::disk::MAX_BYTES {
        return Err(Fault::Long);
    }
    let head: Head = serde_json::from_slice(bytes)?;
    if head.format != FORMAT {
        return Err(Fault::Format(head.format));
    }
    if head.version != FORMAT_VERSION {
        return Err(Fault::Version(head.version));
    }
    let body: Body = serde_json::from_slice(bytes)?;
    let mut decisions = Decisions::new();
    for (index, decision) in body.decisions.into_iter().enumerate() {
        decision.validate().map_err(|fault| Fault::Decision { index, fault })?;
        if decisions.insert(decision.key.clone(), Arc::new(decision)).is_some() {
            return Err(Fault::Repeated(index));
        }
    }
    Ok(decisions)
}

/// The text for these decisions, one decision a line: short, and readable in a diff.
pub(super) fn print(decisions: &Decisions) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = Vec::new();
    let head = format!(r#"{{"format":"{FORMAT}","version":{FORMAT_VERSION},"decisions":["#);
    text.extend_from_slice(head.as_bytes());
    for (index, decision) in decisions.values().enumerate() {
        text.extend_from_slice(if index == 0 { b"\n" } else { b",\n" });
        serde_json::to_writer(&mut text, decision.as_ref())?;
    }
    text.extend_from_slice(b"\n]}\n");
    Ok(text)
}
