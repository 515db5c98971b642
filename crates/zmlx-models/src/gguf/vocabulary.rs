//! The tokenizer of a GGUF file, as the `tokenizer.json` that its model was published with.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::GgufError;
use super::header::{Header, Value};
use crate::error::LoadError;
use crate::tokenizer::Tokenizer;

/// Kinds of tokens: `tokenizer.ggml.token_type`.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut before pairs are merged: `tokenizer.ggml.pre`.
struct Cut {
    names: &'static [&'static str],
    /// Expressions whose matches stand alone, one after another.
    expressions: &'static [&'static str],
    /// Unicode normal form C comes first.
    normalize: bool,
    /// A piece that is a token as a whole is not put together by merges.
    whole: bool,
    /// A beginning-of-text token comes first unless the file says otherwise.
    begins: bool,
}

const CUTS: [Cut; 5] = [
    Cut { names: &["gpt-2"], expressions: &[GPT2], normalize: false, whole: false, begins: false },
    Cut {
        names: &["smollm", "starcoder", "refact"],
        expressions: &[r"\p{N}", GPT2],
        normalize: false,
        whole: false,
        begins: false,
    },
    Cut { names: &["qwen2"], expressions: &[QWEN2], normalize: true, whole: false, begins: false },
    Cut {
        names: &["llama-bpe", "llama3", "llama-v3", "lfm2"],
        expressions: &[LLAMA3],
        normalize: false,
        whole: true,
        begins: true,
    },
    Cut {
        names: &["default"],
        expressions: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        normalize: false,
        whole: false,
        begins: false,
    },
];

/// The file's tokenizer, `None` if it has none.
pub(super) fn tokenizer(path: &Path, header: &Header) -> Result<Option<Tokenizer>, LoadError> {
    let v = Vocabulary { path, header };
    let Some(model) = v.text("model")? else { return Ok(None) };
    if model != "gpt2" {
        let message = format!("{model:?} is not supported: only gpt2, byte-level pair encoding, is");
        return Err(v.fail("model", message).into());
    }
    // As in llama.cpp, a file that does not say.
    let pre = v.text("pre")?.unwrap_or("default");
    let cut = CUTS.iter().find(|c| c.names.contains(&pre)).ok_or_else(|| {
        let known = CUTS.iter().flat_map(|c| c.names).copied().collect::<Vec<_>>().join(", ");
        v.fail("pre", format!("{pre:?} is not supported; known: {known}"))
    })?;
    let tokens = v.texts("tokens")?;
    let named = v.named_tokens(tokens)?;
    let json = v.json(cut, tokens, &named)?;
    let template = match header.metadata.get("tokenizer.chat_template") {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    Ok(Some(Tokenizer::from_json(path, &json, named, template)?))
}

struct Vocabulary<'a> {
    path: &'a Path,
    header: &'a Header,
}

impl Vocabulary<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(&format!("tokenizer.ggml.{key}"))
    }

    fn fail(&self, key: &str, message: impl Into<String>) -> GgufError {
        let (path, key) = (self.path.to_owned(), format!("tokenizer.ggml.{key}"));
        GgufError::Metadata { path, key, message: message.into() }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.fail(key, "must be a text")),
        }
    }

    fn texts(&self, key: &str) -> Result<&[String], GgufError> {
        match self.get(key) {
            Some(Value::Texts(list)) => Ok(list),
            Some(_) => Err(self.fail(key, "must be a list of texts")),
            None => Err(self.fail(key, "missing")),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, GgufError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.fail(key, "must be true or false")),
        }
    }

    /// `bos_token`, `eos_token` and so on, with the tokens that they stand for.
    fn named_tokens(&self, tokens: &[String]) -> Result<BTreeMap<String, String>, GgufError> {
        let names = [("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")];
        let mut named = BTreeMap::new();
        for (there, here) in names {
            let key = format!("{there}_token_id");
            match self.get(&key) {
                None => {}
                Some(Value::Integer(id)) => {
                    let token = usize::try_from(*id).ok().and_then(|id| tokens.get(id));
                    let token = token.ok_or_else(|| self.fail(&key, format!("{id} is no token")))?;
                    named.insert(format!("{here}_token"), token.clone());
                }
                Some(_) => return Err(self.fail(&key, "must be a whole number")),
            }
        }
        Ok(named)
    }

    fn json(
        &self,
        cut: &Cut,
        tokens: &[String],
        named: &BTreeMap<String, String>,
    ) -> Result<Json, GgufError> {
        let mut vocabulary = Map::new();
        for (id, token) in tokens.iter().enumerate() {
            if vocabulary.insert(token.clone(), json!(id)).is_some() {
                return Err(self.fail("tokens", format!("token {id} is there twice: {token:?}")));
            }
        }
        let split = |expression: &&str| json!({ "type": "Split", "pattern": { "Regex": expression }, "behavior": "Isolated", "invert": false });
        let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
        let mut steps: Vec<Json> = cut.expressions.iter().map(split).collect();
        steps.push(bytes(false));
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added(tokens)?,
            "normalizer": if cut.normalize { json!({ "type": "NFC" }) } else { Json::Null },
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": steps },
            "post_processor": self.template(cut, tokens, named)?,
            "decoder": bytes(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": cut.whole,
                "merges": self.merges(&vocabulary)?,
                "vocab": vocabulary,
            },
        }))
    }

    /// Pairs that are merged, the earlier the sooner. As in llama.cpp, a pair whose result is no token has no effect.
    fn merges(&self, vocabulary: &Map<String, Json>) -> Result<Vec<(&str, &str)>, GgufError> {
        let mut merges = Vec::new();
        for line in self.texts("merges")? {
            // A token may begin with a blank in no byte-level vocabulary.
            let (left, right) = line
                .split_once(' ')
                .ok_or_else(|| self.fail("merges", format!("{line:?} is no pair of tokens")))?;
            if vocabulary.contains_key(&[left, right].concat()) {
                merges.push((left, right));
            }
        }
        Ok(merges)
    }

    /// Tokens that are found in text before it is cut.
    fn added(&self, tokens: &[String]) -> Result<Json, GgufError> {
        let kinds = match self.get("token_type") {
            None => return Ok(json!([])),
            Some(Value::Integers(kinds)) if kinds.len() == tokens.len() => kinds,
            Some(_) => return Err(self.fail("token_type", "must have one number a token")),
        };
        let marked = kinds.iter().zip(tokens).enumerate();
        let marked =
            marked.filter(|(_, (kind, text))| matches!(**kind, CONTROL | USER_DEFINED) && !text.is_empty());
        let entry = |(id, (kind, text)): (usize, (&i64, &String))| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind == CONTROL,
            })
        };
        Ok(marked.map(entry).collect())
    }

    /// What is put around every text.
    fn template(
        &self,
        cut: &Cut,
        tokens: &[String],
        named: &BTreeMap<String, String>,
    ) -> Result<Json, GgufError> {
        let wanted = |key: &str, name: &str, default: bool| -> Result<Option<&String>, GgufError> {
            let wanted = self.flag(key, default)?;
            Ok(named.get(name).filter(|_| wanted))
        };
        let begin = wanted("add_bos_token", "bos_token", cut.begins)?;
        let end = wanted("add_eos_token", "eos_token", false)?;
        if begin.is_none() && end.is_none() {
            return Ok(Json::Null);
        }
        let special = |token: &&String| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let around = |inner: &[&str]| -> Vec<Json> {
            let sequence = |id: &&str| json!({ "Sequence": { "id": id, "type_id": 0 } });
            let begin = begin.iter().map(special);
            begin.chain(inner.iter().map(sequence)).chain(end.iter().map(special)).collect()
        };
        let mut specials = Map::new();
        for token in [begin, end].into_iter().flatten() {
            let id = tokens.iter().position(|t| t == token);
            specials.insert(token.clone(), json!({ "id": token, "ids": [id], "tokens": [token] }));
        }
        Ok(json!({
            "type": "TemplateProcessing",
            "single": around(&["A"]),
            "pair": around(&["A", "B"]),
            "special_tokens": specials,
        }))
    }
}
