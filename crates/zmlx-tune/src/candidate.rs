//! A set of named launch parameters.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Named integer parameters of one way to launch a kernel, ordered by name.
///
/// Prints as `threads=256 vec=4`; as JSON it is the object `{"threads":256,"vec":4}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Candidate(BTreeMap<String, i64>);

impl Candidate {
    /// A candidate without parameters.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same candidate with `name` set to `value`; a value set before is replaced.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: i64) -> Self {
        self.0.insert(name.into(), value);
        self
    }

    /// The value of `name`, if the candidate has it.
    pub fn get(&self, name: &str) -> Option<i64> {
        self.0.get(name).copied()
    }

    /// Names and values, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<S: Into<String>, const N: usize> From<[(S, i64); N]> for Candidate {
    fn from(parameters: [(S, i64); N]) -> Self {
        parameters.into_iter().collect()
    }
}

impl<S: Into<String>> FromIterator<(S, i64)> for Candidate {
    fn from_iter<I: IntoIterator<Item = (S, i64)>>(parameters: I) -> Self {
        Self(parameters.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.pad("(no parameters)");
        }
        // Names may come from a file: escaping keeps control characters off the terminal.
        let parts: Vec<String> =
            self.iter().map(|(name, value)| format!("{}={value}", name.escape_debug())).collect();
        f.pad(&parts.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_by_name_and_round_trips() {
        let c = Candidate::from([("vec", 4), ("threads", 256)]);
        assert_eq!(c.to_string(), "threads=256 vec=4");
        let json = serde_json::to_string(&c).unwrap();
        assert_eq!(json, r#"{"threads":256,"vec":4}"#);
        assert_eq!(serde_json::from_str::<Candidate>(&json).unwrap(), c);
        assert_eq!(c.get("vec"), Some(4));
        assert_eq!(c.get("rows"), None);
        assert_eq!(c.clone().with("vec", 8).get("vec"), Some(8));
        assert_eq!(Candidate::new().to_string(), "(no parameters)");
        assert_eq!(Candidate::from([("\x1b[31m", 1)]).to_string(), "\\u{1b}[31m=1");
    }

    #[test]
    fn refuses_what_is_no_integer() {
        for json in [r#"{"threads":1.5}"#, r#"{"threads":"256"}"#, r#"{"threads":1e400}"#, "[1]", "null"] {
            assert!(serde_json::from_str::<Candidate>(json).is_err(), "{json}");
        }
    }
}
