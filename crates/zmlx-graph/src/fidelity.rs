//! How close a fused op is to what it replaces.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How close a fused op is to its reference, strictest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fidelity {
    /// The same bits.
    BitExact,
    /// The same greedy tokens on the gate's prompts, near-ties apart.
    TokenIdentical,
    /// An error against float32 that is bounded and no larger than stock MLX's own.
    Bounded,
}

impl Fidelity {
    /// All of them, strictest first.
    pub const ALL: [Self; 3] = [Self::BitExact, Self::TokenIdentical, Self::Bounded];
}

impl fmt::Display for Fidelity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::BitExact => "bit-exact",
            Self::TokenIdentical => "token-identical",
            Self::Bounded => "bounded",
        })
    }
}

impl FromStr for Fidelity {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|f| f.to_string() == s);
        found.ok_or_else(|| format!("{s:?} is none of bit-exact, token-identical, bounded"))
    }
}
