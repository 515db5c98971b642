//! Telling one model from another without reading all of it.

use std::fmt::Write;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest, Sha256};
use zmlx_graph::Graph;

use crate::checkpoint::CheckpointError;
use crate::error::LoadError;
use crate::source::Source;

/// Samples of a file, evenly spread.
const SAMPLES: u64 = 64;
/// Bytes of a sample.
const SAMPLE: u64 = 4096;

/// SHA-256 of the configuration, of the names, shapes and formats of the weights, and of samples of the files that hold
/// them. Training moves nearly every weight, so that two trainings of one model differ in the samples.
pub(crate) fn fingerprint(source: &Source, graph: &Graph) -> Result<String, LoadError> {
    let mut hash = Sha256::new();
    hash.update(serde_json::Value::Object(source.config().root().clone()).to_string());
    for weight in &graph.weights {
        hash.update(format!("{} {:?} {:?}\n", weight.path, weight.shape, weight.format));
    }
    for path in source.files() {
        let fail = |source| LoadError::Checkpoint(CheckpointError::Read { path: path.to_owned(), source });
        sample(path, &mut hash).map_err(fail)?;
    }
    let mut text = String::new();
    for byte in hash.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

fn sample(path: &Path, hash: &mut Sha256) -> io::Result<()> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    hash.update(length.to_le_bytes());
    let last = length.saturating_sub(SAMPLE);
    let mut buffer = vec![0; SAMPLE.min(length) as usize];
    for n in 0..SAMPLES {
        let at = u128::from(last) * u128::from(n) / u128::from(SAMPLES - 1);
        file.read_exact_at(&mut buffer, at as u64)?;
        hash.update(&buffer);
    }
    Ok(())
}
