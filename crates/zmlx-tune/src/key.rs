//! What a decision is valid for.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest accepted part of a [`Key`], in bytes.
const MAX_PART: usize = 1024;

/// What a [`Decision`](crate::Decision) is valid for. Two launches share a decision exactly when all parts are equal.
///
/// The list of candidates is no part of the key, so a longer list does not throw away what is known:
/// see [`Decision::untried`](crate::Decision::untried).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The device's full name, for example `NVIDIA H100 80GB HBM3`.
    pub device: String,
    /// What runs the kernel, with its version, for example `mlx 0.32.4 cuda`.
    pub library: String,
    /// The kernel's stable name.
    pub kernel: String,
    /// Hash of all that decides the kernel's code: source, dtypes, specialisation, compiler options.
    pub hash: String,
    /// Sizes and dtypes that matter for speed, bucketed by the caller, for example `f32 rows=4096 cols=4096`.
    pub shape_class: String,
}

/// A [`Key`] part is empty or too long.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("key: `{part}` has {len} bytes; 1 to {MAX_PART} are allowed")]
pub struct InvalidKey {
    /// Name of the part.
    pub part: &'static str,
    /// Its length in bytes.
    pub len: usize,
}

impl Key {
    /// A key of these parts, unchecked; [`Key::validate`] runs before a key is used.
    pub fn new(
        device: impl Into<String>,
        library: impl Into<String>,
        kernel: impl Into<String>,
        hash: impl Into<String>,
        shape_class: impl Into<String>,
    ) -> Self {
        Self {
            device: device.into(),
            library: library.into(),
            kernel: kernel.into(),
            hash: hash.into(),
            shape_class: shape_class.into(),
        }
    }

    /// Checks that every part has 1 to 1024 bytes. An empty part is a caller's slip that would let
    /// unlike kernels share a decision.
    pub fn validate(&self) -> Result<(), InvalidKey> {
        let parts = [
            ("device", &self.device),
            ("library", &self.library),
            ("kernel", &self.kernel),
            ("hash", &self.hash),
            ("shape_class", &self.shape_class),
        ];
        match parts.into_iter().find(|(_, text)| text.is_empty() || text.len() > MAX_PART) {
            Some((part, text)) => Err(InvalidKey { part, len: text.len() }),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, library, kernel, hash, shape_class } = self;
        let [device, library, kernel, hash, shape_class] =
            [device, library, kernel, hash, shape_class].map(|part| part.escape_debug());
        write!(f, "{kernel} [{hash}] {shape_class} on {device}, {library}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_bad_part() {
        let good = Key::new("cpu", "zmlx", "softmax", "1f", "f32");
        assert_eq!(good.validate(), Ok(()));
        assert_eq!(good.to_string(), "softmax [1f] f32 on cpu, zmlx");
        let bad = Key { hash: String::new(), ..good.clone() };
        assert_eq!(bad.validate(), Err(InvalidKey { part: "hash", len: 0 }));
        let bad = Key { device: "x".repeat(1025), ..good };
        assert_eq!(bad.validate(), Err(InvalidKey { part: "device", len: 1025 }));
    }
}
