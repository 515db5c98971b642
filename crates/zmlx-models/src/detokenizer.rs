//! Text from token ids that come one at a time.
//!
//! A token may end in the middle of a character, and some decoders look at a token's neighbours.
//! [`StreamDecoder`] gives text only when it is settled, so that the pieces together are exactly what
//! decoding all ids at once gives, and its cost per token does not grow with the length of the text.

use std::collections::BTreeSet;

use tokenizers::Tokenizer as Inner;
use tokenizers::decoders::DecoderWrapper;

use crate::files;
use crate::tokenizer::TokenizerError;

/// Ids kept before the new ones, so that decoders which look back see what they need.
const CONTEXT: usize = 8;
/// Ids kept at most while the text ends in an unfinished character.
const LONGEST_WINDOW: usize = 64;
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Which special tokens are text.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Special<'t> {
    /// None of them.
    Skipped,
    /// All of them.
    Shown,
    /// All but these ids.
    But(&'t BTreeSet<u32>),
}

impl Special<'_> {
    /// All or none.
    pub(crate) fn skip(skip: bool) -> Self {
        if skip { Self::Skipped } else { Self::Shown }
    }

    fn shows(self, tokenizer: &Inner, id: u32, token: &str) -> bool {
        match self {
            Self::Skipped => !tokenizer.get_added_vocabulary().is_special_token(token),
            Self::Shown => true,
            Self::But(hidden) => !hidden.contains(&id),
        }
    }
}

/// Decodes ids one at a time; made by [`Tokenizer::stream`](crate::tokenizer::Tokenizer::stream).
#[derive(Debug)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Inner,
    special: Special<'t>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Byte-level vocabularies: every token is a run of bytes, and the text is those bytes read as UTF-8.
    Bytes(Vec<u8>),
    /// Any other decoder, run over a window of the latest ids.
    Window(Window),
}

#[derive(Debug, Default)]
struct Window {
    /// Latest ids that take part in decoding: some that are shown, then the new ones.
    ids: Vec<u32>,
    /// What of `decode(ids)` is shown.
    shown: String,
    /// Whether the decoder turns tokens like `<0xE2>` into bytes.
    byte_fallback: bool,
}

impl<'t> StreamDecoder<'t> {
    pub(crate) fn new(tokenizer: &'t Inner, special: Special<'t>) -> Self {
        let state = match tokenizer.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => State::Bytes(Vec::new()),
            decoder => {
                let byte_fallback = decoder.is_some_and(has_byte_fallback);
                State::Window(Window { byte_fallback, ..Window::default() })
            }
        };
        StreamDecoder { tokenizer, special, state }
    }

    /// Takes the next id and gives the text that is settled by it; `""` while a character is unfinished.
    ///
    /// Runs of byte-fallback tokens (`<0xE2>`) are held until they end: such a run is read as a whole, and
    /// one bad byte turns every byte of it into U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`] if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        let Some(token) = shown_token(self.tokenizer, id, self.special) else {
            return Ok(String::new());
        };
        match &mut self.state {
            State::Bytes(pending) => {
                push_token_bytes(&token, pending);
                Ok(take_settled(pending))
            }
            State::Window(window) => {
                window.ids.push(id);
                if window.byte_fallback && is_byte_token(&token) {
                    return Ok(String::new());
                }
                window.advance(self.tokenizer, self.special)
            }
        }
    }

    /// The text still held, once it is known that no more ids come. Afterwards the decoder is as new.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`] if the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        match &mut self.state {
            State::Bytes(pending) => Ok(String::from_utf8_lossy(&std::mem::take(pending)).into_owned()),
            State::Window(window) => {
                let ids = std::mem::take(&mut window.ids);
                let shown = std::mem::take(&mut window.shown);
                let text = decode(self.tokenizer, &ids, self.special)?;
                Ok(text[common_prefix(&text, &shown)..].to_owned())
            }
        }
    }
}

impl Window {
    fn advance(&mut self, tokenizer: &Inner, special: Special<'_>) -> Result<String, TokenizerError> {
        let full = self.ids.len() >= LONGEST_WINDOW;
        let text = decode(tokenizer, &self.ids, special)?;
        // The last character may be one whose bytes are not all there yet.
        let settled = text.strip_suffix(REPLACEMENT).unwrap_or(&text);
        let Some(new) = settled.strip_prefix(self.shown.as_str()) else {
            if !full {
                return Ok(String::new());
            }
            let new = settled[common_prefix(settled, &self.shown)..].to_owned();
            self.forget(tokenizer, special)?;
            return Ok(new);
        };
        let new = new.to_owned();
        self.shown.push_str(&new);
        if full || (self.ids.len() >= 2 * CONTEXT && settled.len() == text.len()) {
            self.forget(tokenizer, special)?;
        }
        Ok(new)
    }

    /// Drops all but the latest ids.
    fn forget(&mut self, tokenizer: &Inner, special: Special<'_>) -> Result<(), TokenizerError> {
        self.ids.drain(..self.ids.len().saturating_sub(CONTEXT));
        self.shown = decode(tokenizer, &self.ids, special)?;
        if self.shown.ends_with(REPLACEMENT) {
            self.shown.pop();
        }
        Ok(())
    }
}

/// The token of an id, if it takes part in decoding.
fn shown_token(tokenizer: &Inner, id: u32, special: Special<'_>) -> Option<String> {
    tokenizer.id_to_token(id).filter(|token| special.shows(tokenizer, id, token))
}

/// Text of `ids`; unlike the tokenizer's own method it never gives a decoder an empty list, which not all
/// of them bear.
pub(crate) fn decode(tokenizer: &Inner, ids: &[u32], special: Special<'_>) -> Result<String, TokenizerError> {
    let shown: Vec<u32> =
        ids.iter().copied().filter(|&id| shown_token(tokenizer, id, special).is_some()).collect();
    if shown.is_empty() {
        return Ok(String::new());
    }
    let decoded = files::catch_panic(|| tokenizer.decode(&shown, false));
    decoded.map_err(TokenizerError::Decode)?.map_err(|error| TokenizerError::Decode(error.to_string()))
}

/// Bytes that both texts begin with, up to a character boundary.
fn common_prefix(left: &str, right: &str) -> usize {
    left.chars().zip(right.chars()).take_while(|(l, r)| l == r).map(|(c, _)| c.len_utf8()).sum()
}

fn has_byte_fallback(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(has_byte_fallback),
        _ => false,
    }
}

fn is_byte_token(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Appends a byte-level token's bytes; a token with a character outside the byte alphabet stands for its
/// own UTF-8.
fn push_token_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The byte a character of GPT-2's alphabet stands for: printable Latin-1 stands for itself, and the 68
/// other bytes are U+0100 onwards, in order.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Takes everything but an unfinished character off the front of `bytes`; bad bytes become U+FFFD as they
/// do in [`String::from_utf8_lossy`].
fn take_settled(bytes: &mut Vec<u8>) -> String {
    let unfinished =
        bytes.utf8_chunks().last().map_or(0, |chunk| match std::str::from_utf8(chunk.invalid()) {
            Err(error) if error.error_len().is_none() => chunk.invalid().len(),
            _ => 0,
        });
    let rest = bytes.split_off(bytes.len() - unfinished);
    let settled = std::mem::replace(bytes, rest);
    String::from_utf8_lossy(&settled).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value as Json, json};

    fn with_decoder(vocab: &[&str], added: &[(u32, &str, bool)], decoder: Json) -> Inner {
        let vocab: serde_json::Map<String, Json> =
            vocab.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
        let added: Vec<Json> = added
            .iter()
            .map(|(id, content, special)| {
                json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false})
            })
            .collect();
        let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"}});
        Inner::from_bytes(json.to_string()).unwrap()
    }

    /// A byte-level vocabulary: all 256 bytes, some longer tokens, an added token outside the alphabet, a
    /// special one.
    fn byte_level() -> Inner {
        let mut vocab: Vec<String> = (0..=255u8).map(|byte| char_of(byte).to_string()).collect();
        vocab.extend(["Ġhello", "âĤ", "ðŁ", "¦Ĭ"].map(str::to_owned));
        let vocab: Vec<&str> = vocab.iter().map(String::as_str).collect();
        let decoder =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        with_decoder(&vocab, &[(260, "日 本", false), (261, "<|end|>", true)], decoder)
    }

    fn char_of(byte: u8) -> char {
        (0..0x200).filter_map(char::from_u32).find(|&c| byte_of(c) == Some(byte)).unwrap()
    }

    const PIECES: [&str; 12] =
        ["▁Hello", "▁", "▁▁", "wor", "ld", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x41>", "?", "<0xZZ>"];

    /// SentencePiece-like, as Llama 2 has it: byte fallback, joined, one leading space stripped.
    fn byte_fallback() -> Inner {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        with_decoder(&PIECES, &[(12, "</s>", true)], decoder)
    }

    fn others() -> Vec<(&'static str, Inner)> {
        let words = ["un", "##do", "##able", "do", "n't", ".", ",", "?"];
        let metaspace =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        vec![
            ("metaspace", with_decoder(&PIECES, &[(12, "</s>", true)], metaspace)),
            (
                "wordpiece",
                with_decoder(&words, &[], json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
            ),
            (
                "bpe",
                with_decoder(
                    &["a</w>", "b", "c</w>", "?"],
                    &[],
                    json!({"type": "BPEDecoder", "suffix": "</w>"}),
                ),
            ),
            ("none", with_decoder(&words, &[], Json::Null)),
        ]
    }

    fn stream(tokenizer: &Inner, ids: &[u32], skip: bool) -> Vec<String> {
        let mut decoder = StreamDecoder::new(tokenizer, Special::skip(skip));
        let mut pieces: Vec<String> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
        pieces.push(decoder.finish().unwrap());
        pieces
    }

    #[test]
    fn byte_alphabet_has_every_byte_once() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((char_of(b' '), char_of(b'\n'), char_of(0xad)), ('Ġ', 'Ċ', 'Ń'));
    }

    #[test]
    fn holds_back_half_characters() {
        let bytes = byte_level();
        let id = |token: &str| bytes.token_to_id(token).unwrap();
        let fallback = byte_fallback();
        let cases: [(&str, &Inner, Vec<u32>, Vec<&str>); 7] = [
            ("euro in two tokens", &bytes, vec![id("âĤ"), 0xac], vec!["", "€", ""]),
            (
                "fox in three",
                &bytes,
                vec![0x41, id("ðŁ"), 0xa6, 0x8a, 0x42],
                vec!["A", "", "", "🦊", "B", ""],
            ),
            ("cut off", &bytes, vec![0x41, id("ðŁ")], vec!["A", "", "\u{fffd}"]),
            ("bad byte", &bytes, vec![0xff, 0x41], vec!["\u{fffd}", "A", ""]),
            ("half, then another", &bytes, vec![id("ðŁ"), 0x41], vec!["", "\u{fffd}A", ""]),
            ("fallback euro", &fallback, vec![0, 5, 6, 7, 3], vec!["Hello", "", "", "", "€wor", ""]),
            ("fallback at the end", &fallback, vec![0, 5, 6, 7], vec!["Hello", "", "", "", "€"]),
        ];
        for (name, tokenizer, ids, expected) in cases {
            assert_eq!(stream(tokenizer, &ids, true), expected, "{name}");
        }
    }

    #[test]
    fn special_tokens_are_skipped_or_shown() {
        let bytes = byte_level();
        assert_eq!(stream(&bytes, &[0x41, 261, 0x42], true).concat(), "AB");
        assert_eq!(stream(&bytes, &[0x41, 261, 260], false).concat(), "A<|end|>日 本");
        assert_eq!(stream(&bytes, &[0x41, 1_000_000, 0x42], false).concat(), "AB");
        let (hidden, ids) = (BTreeSet::from([260]), [0x41, 261, 260, 0x42]);
        let mut decoder = StreamDecoder::new(&bytes, Special::But(&hidden));
        let text: String = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
        assert_eq!(text, "A<|end|>B");
    }

    #[test]
    fn long_streams_of_bad_bytes_stay_bounded() {
        let sequence = with_decoder(
            &["Ã", "©", "ÿ", "?"],
            &[],
            json!({"type": "Sequence", "decoders": [{"type": "ByteLevel", "add_prefix_space": true,
                "trim_offsets": true, "use_regex": true}]}),
        );
        let mut decoder = StreamDecoder::new(&sequence, Special::Skipped);
        let mut text = String::new();
        let ids: Vec<u32> = std::iter::repeat_n(2, 1000).chain([0, 1]).collect();
        for &id in &ids {
            text.push_str(&decoder.push(id).unwrap());
            let State::Window(window) = &decoder.state else { panic!("not a window") };
            assert!(window.ids.len() <= LONGEST_WINDOW);
        }
        text.push_str(&decoder.finish().unwrap());
        assert_eq!(text, sequence.decode(&ids, true).unwrap());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn pieces_join_to_the_whole(ids in prop::collection::vec(0u32..300, 0..120), skip: bool) {
            let tokenizer = byte_level();
            let pieces = stream(&tokenizer, &ids, skip);
            prop_assert_eq!(pieces.concat(), decode(&tokenizer, &ids, Special::skip(skip)).unwrap());
        }

        #[test]
        fn pieces_join_to_the_whole_with_byte_fallback(ids in prop::collection::vec(0u32..14, 0..120), skip: bool) {
            let tokenizer = byte_fallback();
            let pieces = stream(&tokenizer, &ids, skip);
            prop_assert_eq!(pieces.concat(), decode(&tokenizer, &ids, Special::skip(skip)).unwrap());
        }

        #[test]
        fn pieces_join_to_the_whole_with_other_decoders(ids in prop::collection::vec(0u32..14, 0..120), skip: bool) {
            for (name, tokenizer) in others() {
                let pieces = stream(&tokenizer, &ids, skip);
                prop_assert_eq!(pieces.concat(), decode(&tokenizer, &ids, Special::skip(skip)).unwrap(), "{}", name);
            }
        }
    }
}
