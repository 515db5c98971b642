//! Stop strings over a stream of text pieces.
//!
//! [`StopMatcher`] passes text on as soon as it cannot be the beginning of a stop string, and keeps back
//! the rest. What it gives does not depend on how the text was cut into pieces.

use thiserror::Error;

/// Why a set of stop strings was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StopError {
    /// An empty stop string would stop before the first character.
    #[error("stop string {index} is empty; leave it out or give at least one character")]
    Empty {
        /// Position of the empty string in the list given.
        index: usize,
    },
}

/// What one [`StopMatcher::push`] gives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that is now safe to show; never part of a stop string.
    pub text: String,
    /// Index of the stop string that was found, if one was. Nothing after it is ever given.
    pub matched: Option<usize>,
}

/// Finds the first of several stop strings in text that comes in pieces.
///
/// "First" is the stop string that is complete first, that is, whose last byte comes earliest: generation
/// can end there without looking further. Of several that end at the same byte the longest wins, as it
/// leaves nothing of itself behind.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    longest: usize,
    held: String,
    matched: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`; with an empty list it passes everything on at once.
    ///
    /// # Errors
    /// [`StopError::Empty`] if one of the strings is empty.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<StopMatcher, StopError> {
        let stops: Vec<String> = stops.iter().map(|stop| stop.as_ref().to_owned()).collect();
        if let Some(index) = stops.iter().position(String::is_empty) {
            return Err(StopError::Empty { index });
        }
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Ok(StopMatcher { stops, longest, held: String::new(), matched: None })
    }

    /// Takes the next piece and gives the text that is now safe to show. After a match it gives nothing
    /// more.
    pub fn push(&mut self, piece: &str) -> StopStep {
        if self.matched.is_some() {
            return StopStep { text: String::new(), matched: self.matched };
        }
        self.held.push_str(piece);
        if let Some((start, index)) = self.find() {
            self.matched = Some(index);
            self.held.truncate(start);
            return StopStep { text: std::mem::take(&mut self.held), matched: self.matched };
        }
        let keep_from = self.first_possible_start();
        let rest = self.held.split_off(keep_from);
        StopStep { text: std::mem::replace(&mut self.held, rest), matched: None }
    }

    /// The text kept back, once it is known that no more comes; empty after a match.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Index of the stop string found so far.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Start and index of the stop string that ends first in the text kept back.
    fn find(&self) -> Option<(usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter_map(|(index, stop)| {
                self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, index))
            })
            .min()
            .map(|(_, start, index)| (start, index))
    }

    /// Where the longest suffix begins that could still grow into a stop string.
    fn first_possible_start(&self) -> usize {
        let earliest = self.held.len().saturating_sub(self.longest.saturating_sub(1));
        (earliest..self.held.len())
            .filter(|&start| self.held.is_char_boundary(start))
            .find(|&start| self.stops.iter().any(|stop| stop.starts_with(&self.held[start..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Everything shown and the match, for text cut into the given pieces.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops).unwrap();
        let mut shown = String::new();
        for piece in pieces {
            shown.push_str(&matcher.push(piece).text);
        }
        shown.push_str(&matcher.finish());
        (shown, matcher.matched())
    }

    struct Case {
        name: &'static str,
        stops: &'static [&'static str],
        pieces: &'static [&'static str],
        shown: &'static str,
        matched: Option<usize>,
    }

    #[test]
    fn cases() {
        let cases = [
            Case { name: "no stops", stops: &[], pieces: &["a", "b"], shown: "ab", matched: None },
            Case {
                name: "in one piece",
                stops: &["END"],
                pieces: &["one END two"],
                shown: "one ",
                matched: Some(0),
            },
            Case {
                name: "across pieces",
                stops: &["END"],
                pieces: &["one E", "N", "D two"],
                shown: "one ",
                matched: Some(0),
            },
            Case {
                name: "false start",
                stops: &["END"],
                pieces: &["E", "N", "ENX"],
                shown: "ENENX",
                matched: None,
            },
            Case {
                name: "unfinished at the end",
                stops: &["END"],
                pieces: &["one EN"],
                shown: "one EN",
                matched: None,
            },
            Case {
                name: "self-overlapping",
                stops: &["aab"],
                pieces: &["a", "a", "a", "b"],
                shown: "a",
                matched: Some(0),
            },
            Case {
                name: "earliest of two",
                stops: &["zz", "b"],
                pieces: &["abzz"],
                shown: "a",
                matched: Some(1),
            },
            Case {
                name: "complete first wins",
                stops: &["bcd", "c"],
                pieces: &["abcd"],
                shown: "ab",
                matched: Some(1),
            },
            Case {
                name: "prefix of another",
                stops: &["abc", "ab"],
                pieces: &["xabc"],
                shown: "x",
                matched: Some(1),
            },
            Case {
                name: "same end, longest",
                stops: &["c", "bc"],
                pieces: &["abc"],
                shown: "a",
                matched: Some(1),
            },
            Case {
                name: "whole characters",
                stops: &["€€"],
                pieces: &["a€", "ü"],
                shown: "a€ü",
                matched: None,
            },
            Case {
                name: "unicode match",
                stops: &["\n\nüß"],
                pieces: &["hi\n", "\nü", "ß!"],
                shown: "hi",
                matched: Some(0),
            },
            Case {
                name: "nothing after a match",
                stops: &["."],
                pieces: &["a.", "b", "c."],
                shown: "a",
                matched: Some(0),
            },
            Case {
                name: "empty pieces",
                stops: &["ab"],
                pieces: &["", "a", "", "b"],
                shown: "",
                matched: Some(0),
            },
        ];
        for case in cases {
            assert_eq!(run(case.stops, case.pieces), (case.shown.to_owned(), case.matched), "{}", case.name);
        }
    }

    #[test]
    fn shows_early_what_it_can() {
        let mut matcher = StopMatcher::new(&["END"]).unwrap();
        assert_eq!(matcher.push("hello E").text, "hello ");
        assert_eq!(matcher.push("x").text, "Ex");
    }

    #[test]
    fn empty_stop_is_refused() {
        let error = StopMatcher::new(&["a", ""]).unwrap_err();
        assert_eq!(error, StopError::Empty { index: 1 });
        assert!(error.to_string().contains("stop string 1 is empty"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Any cut of the text into pieces gives what one character at a time gives, and nothing shown
        /// holds a stop string.
        #[test]
        fn cuts_do_not_matter(
            stops in prop::collection::vec("[abü]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcü]{0,5}", 0..8),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let text = pieces.concat();
            let characters: Vec<String> = text.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            let (shown, matched) = run(&stops, &pieces);
            prop_assert_eq!((&shown, matched), (&run(&stops, &characters).0, run(&stops, &characters).1));
            prop_assert!(text.starts_with(&shown));
            match matched {
                Some(index) => prop_assert!(text[shown.len()..].starts_with(stops[index])),
                None => prop_assert_eq!(&shown, &text),
            }
            prop_assert!(stops.iter().all(|stop| !shown.contains(stop)));
        }
    }
}
