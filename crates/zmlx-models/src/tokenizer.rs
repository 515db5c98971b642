//! Text to token ids and back: a checkpoint's `tokenizer.json` with its special tokens and chat template.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use thiserror::Error;

use crate::chat_template::{ChatTemplate, ChatTemplateError, ChatTemplateFileError};
use crate::detokenizer::{self, Special, StreamDecoder};
use crate::files;
use crate::message::ChatMessage;

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {message}; fetch the file again", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        message: String,
    },
    /// The chat template's file could not be read.
    #[error(transparent)]
    ChatTemplateFile(#[from] ChatTemplateFileError),
    /// The text could not be encoded.
    #[error("the tokenizer could not encode the text: {0}")]
    Encode(String),
    /// The token ids could not be decoded.
    #[error("the tokenizer could not decode the token ids: {0}")]
    Decode(String),
    /// The checkpoint has no chat template.
    #[error("{} has no chat template; give the prompt raw, or a model made for chat", dir.display())]
    NoChatTemplate {
        /// The model folder.
        dir: PathBuf,
    },
    /// The chat template gave no text.
    #[error(transparent)]
    ChatTemplate(#[from] ChatTemplateError),
}

/// A checkpoint's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    chat_template: Option<ChatTemplate>,
    special_tokens: BTreeMap<String, String>,
    /// Ids of special tokens that are never text.
    bounds: BTreeSet<u32>,
    dir: PathBuf,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a model folder, and what `tokenizer_config.json`,
    /// `special_tokens_map.json` and the chat template files beside it add. `None` when the folder has no
    /// `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Read`], [`TokenizerError::Parse`] or [`TokenizerError::ChatTemplateFile`], naming
    /// the file.
    pub fn load(dir: &Path) -> Result<Option<Tokenizer>, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let Some(bytes) = read_if_there(&path)? else { return Ok(None) };
        let mut inner = parse(&path, bytes)?;

        let config = read_object(&dir.join("tokenizer_config.json"))?;
        let mut special_tokens = named_tokens(&read_object(&dir.join("special_tokens_map.json"))?);
        special_tokens.extend(named_tokens(&config));
        add_special(&mut inner, &special_tokens, &path)?;

        let chat_template = ChatTemplate::load(dir, &config, &special_tokens)?;
        let bounds = bounds(&inner, &special_tokens);
        Ok(Some(Tokenizer { inner, chat_template, special_tokens, bounds, dir: dir.to_owned() }))
    }

    /// A tokenizer from a file of another kind: the `tokenizer.json` that says the same, special tokens by their names
    /// (`bos_token`, ...) and the source of the chat template. `path` is the file, for errors.
    pub(crate) fn from_json(
        path: &Path,
        json: &Json,
        special_tokens: BTreeMap<String, String>,
        chat_template: Option<String>,
    ) -> Result<Tokenizer, TokenizerError> {
        let mut inner = parse(path, json.to_string().into_bytes())?;
        add_special(&mut inner, &special_tokens, path)?;
        let chat_template = chat_template.map(|source| ChatTemplate::new(source, &special_tokens));
        let bounds = bounds(&inner, &special_tokens);
        Ok(Tokenizer { inner, chat_template, special_tokens, bounds, dir: path.to_owned() })
    }

    /// Token ids of `text`. Special tokens written out in the text become their ids in either case; with
    /// `add_special_tokens` the ones that the tokenizer puts around every text are added.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`], for instance for a character that a vocabulary without fallback lacks.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = files::catch_panic(|| self.inner.encode_fast(text, add_special_tokens));
        encoding
            .map_err(TokenizerError::Encode)?
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TokenizerError::Encode(one_line(&error)))
    }

    /// Text of `ids`. Bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary give nothing.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        detokenizer::decode(&self.inner, ids, Special::skip(skip_special_tokens))
    }

    /// A decoder for ids that come one at a time. Special tokens that begin, end or fill a text are left out, and the others,
    /// such as tags of tool calls and of reasoning, are text.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(&self.inner, Special::But(&self.bounds))
    }

    /// A decoder for ids that come one at a time; its text is that of [`Tokenizer::decode`] with the same
    /// choice.
    pub fn stream_with(&self, skip_special_tokens: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(&self.inner, Special::skip(skip_special_tokens))
    }

    /// Whether the checkpoint has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// The text the chat template makes of `messages`, to be encoded with `add_special_tokens = false`: the
    /// template writes out the special tokens itself. With `add_generation_prompt` it ends where the reply
    /// begins.
    ///
    /// # Errors
    /// [`TokenizerError::NoChatTemplate`], or [`TokenizerError::ChatTemplate`] naming the template's line.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let missing = || TokenizerError::NoChatTemplate { dir: self.dir.clone() };
        Ok(self.chat_template.as_ref().ok_or_else(missing)?.render(messages, add_generation_prompt)?)
    }

    /// Id of a token given as it stands in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token that ends a reply, where the checkpoint names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_token("eos_token")
    }

    /// A special token by its name in `tokenizer_config.json`: `bos_token`, `eos_token`, `pad_token`, ...
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name).map(String::as_str)
    }

    /// `tokenizer.json` and `tokenizer_config.json` that say what this tokenizer does, with their names.
    ///
    /// # Errors
    /// [`TokenizerError::Parse`] if the tokenizer cannot be written as JSON.
    pub(crate) fn files(&self) -> Result<[(&'static str, Json); 2], TokenizerError> {
        let failed = |message| TokenizerError::Parse { path: self.dir.clone(), message };
        let tokenizer = serde_json::to_value(&self.inner).map_err(|error| failed(error.to_string()))?;
        let mut config = serde_json::Map::new();
        config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
        config.insert("clean_up_tokenization_spaces".to_owned(), false.into());
        config.extend(self.special_tokens.iter().map(|(name, token)| (name.clone(), token.as_str().into())));
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".to_owned(), template.source().into());
        }
        Ok([("tokenizer.json", tokenizer), ("tokenizer_config.json", Json::Object(config))])
    }

    /// Number of tokens, added ones included. The model's own vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// The library's tokenizer of the bytes of a `tokenizer.json`.
fn parse(path: &Path, bytes: Vec<u8>) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let malformed = |message: String| TokenizerError::Parse { path: path.to_owned(), message };
    // The library panics on some files that are no JSON, or say what no tokenizer can do.
    serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).map_err(|error| malformed(error.to_string()))?;
    let loaded = files::catch_panic(|| tokenizers::Tokenizer::from_bytes(bytes));
    let mut inner = loaded.map_err(malformed)?.map_err(|error| malformed(one_line(&error)))?;
    // A file may carry the settings of the batches it was made with; a prompt is neither cut nor padded.
    inner.with_truncation(None).map_err(|error| malformed(one_line(&error)))?;
    inner.with_padding(None);
    Ok(inner)
}

/// Marks the named tokens that the vocabulary has as special.
fn add_special(
    inner: &mut tokenizers::Tokenizer,
    named: &BTreeMap<String, String>,
    path: &Path,
) -> Result<(), TokenizerError> {
    let known = named.values().filter(|token| inner.token_to_id(token).is_some());
    let known: Vec<_> = known.map(|token| tokenizers::AddedToken::from(token.as_str(), true)).collect();
    let added = inner.add_special_tokens(known);
    let malformed =
        |error: tokenizers::Error| TokenizerError::Parse { path: path.to_owned(), message: one_line(&error) };
    added.map(drop).map_err(malformed)
}

/// Ids of the special tokens that begin, end or fill a text.
fn bounds(inner: &tokenizers::Tokenizer, named: &BTreeMap<String, String>) -> BTreeSet<u32> {
    let names = ["bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"];
    names.iter().filter_map(|name| inner.token_to_id(named.get(*name)?)).collect()
}

/// The special tokens of a configuration: entries `*_token` that are text, or `{"content": text}`.
fn named_tokens(config: &Json) -> BTreeMap<String, String> {
    let entries = [config.as_object(), config.get("extra_special_tokens").and_then(Json::as_object)];
    let named = entries.into_iter().flatten().flatten().filter(|(name, _)| name.ends_with("_token"));
    let text = |value: &Json| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
    named.filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    files::read_if_there(path).map_err(|source| TokenizerError::Read { path: path.to_owned(), source })
}

/// A JSON object; an empty one if the file is not there.
fn read_object(path: &Path) -> Result<Json, TokenizerError> {
    let Some(bytes) = read_if_there(path)? else { return Ok(Json::Object(Default::default())) };
    let parse = |message| TokenizerError::Parse { path: path.to_owned(), message };
    let json: Json = serde_json::from_slice(&bytes).map_err(|error| parse(error.to_string()))?;
    if json.is_object() { Ok(json) } else { Err(parse("is not a JSON object".to_owned())) }
}

fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lfm2-moe");
    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-lfm2-moe.golden.json");

    fn embedded() -> Tokenizer {
        Tokenizer::load(Path::new(MODEL)).unwrap().unwrap()
    }

    fn golden_cases() -> Vec<Json> {
        let golden: Json = serde_json::from_slice(&std::fs::read(GOLDEN).unwrap()).unwrap();
        golden["cases"].as_array().unwrap().clone()
    }

    fn ids(json: &Json) -> Vec<u32> {
        serde_json::from_value(json.clone()).unwrap()
    }

    #[test]
    fn golden_prompts_encode_to_their_ids() {
        let tokenizer = embedded();
        let mut chats = 0;
        for case in golden_cases() {
            let text = match &case["prompt"] {
                Json::String(text) => text.clone(),
                chat => {
                    chats += 1;
                    let message: ChatMessage = serde_json::from_value(chat.clone()).unwrap();
                    tokenizer.apply_chat_template(&[message], true).unwrap()
                }
            };
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids(&case["prompt_ids"]), "{text:?}");
        }
        assert_eq!(chats, 1);
    }

    #[test]
    fn golden_tokens_decode_and_stream_to_their_text() {
        let tokenizer = embedded();
        for case in golden_cases() {
            let tokens = ids(&case["tokens"]);
            assert_eq!(tokenizer.decode(&tokens, false).unwrap(), case["text"].as_str().unwrap());
            for skip in [false, true] {
                let mut stream = tokenizer.stream_with(skip);
                let mut text: String = tokens.iter().map(|&id| stream.push(id).unwrap()).collect();
                text += &stream.finish().unwrap();
                assert_eq!(text, tokenizer.decode(&tokens, skip).unwrap());
            }
        }
    }

    #[test]
    fn embedded_facts() {
        let tokenizer = embedded();
        assert_eq!(tokenizer.vocab_size(), 4096);
        assert_eq!(tokenizer.eos_token(), Some("<|im_end|>"));
        assert_eq!(tokenizer.special_token("bos_token"), Some("<|startoftext|>"));
        assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(4));
        assert_eq!(tokenizer.token_to_id("<|nope|>"), None);
        assert!(tokenizer.has_chat_template());
        let text = "Naïve café: 日本語, 🦊! \t\n\u{0}";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, false).unwrap(), true).unwrap(), text);
        assert_eq!(tokenizer.decode(&[1, 4_000_000, 4], true).unwrap(), "");
    }

    /// A folder with the embedded model's tokenizer.json and the given files.
    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(Path::new(MODEL).join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn special_tokens_come_in_several_forms() {
        let dir = folder(&[
            ("special_tokens_map.json", r#"{"pad_token": "<|pad|>", "eos_token": "old"}"#),
            (
                "tokenizer_config.json",
                r#"{"eos_token": {"content": "<|im_end|>"}, "add_bos_token": false, "unk_token": null,
                    "extra_special_tokens": {"image_token": "!"}, "chat_template": "{{ eos_token }}{{ image_token }}"}"#,
            ),
        ]);
        let tokenizer = Tokenizer::load(dir.path()).unwrap().unwrap();
        assert_eq!(tokenizer.eos_token(), Some("<|im_end|>"));
        assert_eq!(tokenizer.special_token("pad_token"), Some("<|pad|>"));
        assert_eq!(tokenizer.special_token("unk_token"), None);
        assert_eq!(tokenizer.apply_chat_template(&[], false).unwrap(), "<|im_end|>!");
        let id = tokenizer.token_to_id("!").unwrap();
        assert_eq!(tokenizer.decode(&[id], true).unwrap(), "", "a named special token is skipped");
        assert_eq!(tokenizer.vocab_size(), 4096);
    }

    #[test]
    fn truncation_and_padding_settings_are_ignored() {
        let dir = folder(&[]);
        let path = dir.path().join("tokenizer.json");
        let mut json: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = serde_json::json!({"strategy": {"Fixed": 64}, "direction": "Right",
            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"});
        std::fs::write(&path, json.to_string()).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap().unwrap();
        let text = "Once upon a time there was a fox";
        assert_eq!(tokenizer.encode(text, true).unwrap(), embedded().encode(text, true).unwrap());
    }

    #[test]
    fn bad_folders() {
        let empty = tempfile::tempdir().unwrap();
        assert!(Tokenizer::load(empty.path()).unwrap().is_none());
        let plain = Tokenizer::load(folder(&[]).path()).unwrap().unwrap();
        assert!(!plain.has_chat_template() && plain.eos_token().is_none());
        let error = plain.apply_chat_template(&[], true).unwrap_err().to_string();
        assert!(error.contains("has no chat template"), "{error}");

        let cases = [
            ("tokenizer.json", ""),
            ("tokenizer.json", "{"),
            ("tokenizer.json", "{}"),
            ("tokenizer.json", "[1]"),
            ("tokenizer.json", r#"{"version": "1.0", "model": {"type": "Nope"}}"#),
            (
                "tokenizer.json",
                r#"{"version": "1.0", "added_tokens": [], "decoder": 3, "model": {"type": "BPE"}}"#,
            ),
            ("tokenizer_config.json", "{"),
            ("tokenizer_config.json", "[]"),
            ("special_tokens_map.json", "3"),
        ];
        for (file, text) in cases {
            let error = Tokenizer::load(folder(&[(file, text)]).path()).expect_err(text).to_string();
            assert!(error.contains(file) && !error.contains('\n'), "{file} {text}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(matches!(error, TokenizerError::Read { .. }), "{error}");
    }
}
