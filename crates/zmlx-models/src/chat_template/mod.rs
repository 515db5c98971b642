//! Chat templates: a checkpoint's Jinja program that turns messages into the text the model was trained on.
//!
//! The environment repeats the one of transformers' `apply_chat_template`: blocks are trimmed
//! (`trim_blocks`, `lstrip_blocks`), nothing is escaped, `tools` and `documents` are none,
//! `raise_exception` and `strftime_now` exist, `tojson` writes what Python's `json.dumps` writes, Python's
//! methods on strings, lists and dicts work, and `break` and `continue` are allowed. A template comes with
//! the checkpoint, so it is not trusted: it can reach nothing outside the messages, and a budget of steps
//! bounds its time, its memory and its output.

mod python;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
pub(crate) use python::strftime;
use python::{python_method, to_json};
use serde_json::Value as Json;
use thiserror::Error as ThisError;

use crate::files;
use crate::message::ChatMessage;

/// Steps a template may take before the size of the messages is added; one pays for one instruction or 64
/// bytes.
const BASE_FUEL: u64 = 2_000_000;

/// Why a chat template gave no text.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum ChatTemplateError {
    /// The template itself refused the messages by calling `raise_exception`.
    #[error("the model's chat template refused the messages{}: {message}", at(.line))]
    Raised {
        /// Line of the template, from 1, where it is known.
        line: Option<usize>,
        /// The template's own words.
        message: String,
    },
    /// The template is not valid Jinja, or failed while it ran.
    #[error("the model's chat template failed{}: {message}; a raw prompt does without it", at(.line))]
    Failed {
        /// Line of the template, from 1, where it is known.
        line: Option<usize>,
        /// What went wrong.
        message: String,
    },
    /// The template ran longer, or made more data, than its budget allows.
    #[error(
        "the model's chat template was stopped{} after {budget} steps: it loops without end or makes too much text; \
         a raw prompt does without it",
        at(.line)
    )]
    OverBudget {
        /// Line of the template, from 1, where it is known.
        line: Option<usize>,
        /// Steps it was allowed; one pays for one instruction or 64 bytes.
        budget: u64,
    },
}

fn at(line: &Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(" at line {line}"))
}

/// Why a folder's chat template could not be read.
#[derive(Debug, ThisError)]
pub enum ChatTemplateFileError {
    /// A file could not be read, or is not UTF-8.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        message: String,
    },
}

/// A chat template and the special tokens it may name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    variables: BTreeMap<String, Value>,
}

impl ChatTemplate {
    /// A template from its source; `special_tokens` become variables (`bos_token`, `eos_token`, ...).
    pub fn new(source: impl Into<String>, special_tokens: &BTreeMap<String, String>) -> ChatTemplate {
        let variables =
            special_tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str())));
        ChatTemplate { source: source.into(), variables: variables.collect() }
    }

    /// Its source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The template of a model folder: `chat_template.jinja`, else the `chat_template` of
    /// `tokenizer_config.json` (given parsed), else `chat_template.json`. Of several named templates the
    /// one called `default` is taken, or the only one.
    ///
    /// # Errors
    /// [`ChatTemplateFileError`] if a file is there and cannot be read.
    pub fn load(
        dir: &Path,
        tokenizer_config: &Json,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Option<ChatTemplate>, ChatTemplateFileError> {
        let jinja = read_if_there(&dir.join("chat_template.jinja"))?;
        let source = match jinja.or_else(|| pick(tokenizer_config.get("chat_template")?)) {
            Some(source) => Some(source),
            None => Self::from_json_file(&dir.join("chat_template.json"))?,
        };
        Ok(source.map(|source| ChatTemplate::new(source, special_tokens)))
    }

    fn from_json_file(path: &Path) -> Result<Option<String>, ChatTemplateFileError> {
        let Some(text) = read_if_there(path)? else { return Ok(None) };
        let parse = |message| ChatTemplateFileError::Parse { path: path.to_owned(), message };
        let json: Json = serde_json::from_str(&text).map_err(|error| parse(error.to_string()))?;
        let source = json.get("chat_template").and_then(pick);
        source.map(Some).ok_or_else(|| parse("has no text under \"chat_template\"".to_owned()))
    }

    /// Renders `messages`; with `add_generation_prompt` the text ends where the assistant's reply begins.
    ///
    /// # Errors
    /// [`ChatTemplateError`], naming the template's line.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, ChatTemplateError> {
        let size: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        let budget = BASE_FUEL.saturating_add(size as u64);
        let mut environment = environment();
        environment.set_fuel(Some(budget));
        let source = without_generation_marks(&self.source);
        let explain = |error: Error| explain(&error, budget);
        let template = environment.template_from_named_str("chat_template", &source).map_err(explain)?;
        let mut context = self.variables.clone();
        context.insert("messages".to_owned(), messages.iter().map(message_value).collect());
        context.insert("add_generation_prompt".to_owned(), Value::from(add_generation_prompt));
        for absent in ["tools", "documents"] {
            context.insert(absent.to_owned(), Value::from(()));
        }
        template.render(Value::from(context)).map_err(explain)
    }
}

fn message_value(message: &ChatMessage) -> Value {
    let thinking = message.thinking.as_deref().map(|text| ("thinking", text));
    let pairs = [("role", message.role.as_str()), ("content", message.content.as_str())];
    Value::from_pairs(pairs.into_iter().chain(thinking))
}

fn read_if_there(path: &Path) -> Result<Option<String>, ChatTemplateFileError> {
    let read = |source| ChatTemplateFileError::Read { path: path.to_owned(), source };
    let Some(bytes) = files::read_if_there(path).map_err(read)? else { return Ok(None) };
    let text = String::from_utf8(bytes);
    text.map(Some).map_err(|e| read(std::io::Error::new(std::io::ErrorKind::InvalidData, e.utf8_error())))
}

/// A template given as text, or as a list or map of named templates.
fn pick(json: &Json) -> Option<String> {
    let named: Vec<(&str, &str)> = match json {
        Json::String(source) => return Some(source.clone()),
        Json::Array(list) => list
            .iter()
            .filter_map(|entry| Some((entry.get("name")?.as_str()?, entry.get("template")?.as_str()?)))
            .collect(),
        Json::Object(map) => {
            map.iter().filter_map(|(name, source)| Some((name.as_str(), source.as_str()?))).collect()
        }
        _ => return None,
    };
    let default = named.iter().find(|(name, _)| *name == "default");
    let only = if named.len() == 1 { named.first() } else { None };
    default.or(only).map(|(_, source)| (*source).to_owned())
}

/// transformers lets a template mark the assistant's part by `{% generation %}`, which prints nothing
/// itself. Here the marks become an `if` that is always true, on the same line and with the same trimming.
fn without_generation_marks(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((start, end)) =
        rest.find("{%").and_then(|start| Some((start, start + rest[start..].find("%}")?)))
    {
        let tag = &rest[start + 2..end];
        out.push_str(&rest[..start + 2]);
        match tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => out.push_str(&tag.replace("generation", " if true ")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", " endif ")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    Cow::Owned(out)
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(jinja_syntax());
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_debug(true);
    environment.set_unknown_method_callback(python_method);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| strftime(format, SystemTime::now()));
    environment
}

fn jinja_syntax() -> SyntaxConfig {
    let mut builder = SyntaxConfig::builder();
    builder.trim_blocks(true).lstrip_blocks(true);
    // Only custom delimiters can be refused, and these are the standard ones.
    builder.build().unwrap_or_default()
}

/// Marks an error as the template's own, so that its words survive whatever wraps it.
#[derive(Debug, ThisError)]
#[error("{0}")]
struct RaisedByTemplate(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(RaisedByTemplate(message)))
}

fn explain(error: &Error, budget: u64) -> ChatTemplateError {
    let line = error.line();
    let mut message = error.kind().to_string();
    if let Some(detail) = error.detail() {
        message = format!("{message}: {detail}");
    }
    let mut out_of_fuel = error.kind() == ErrorKind::OutOfFuel;
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(raised) = inner.downcast_ref::<RaisedByTemplate>() {
            return ChatTemplateError::Raised { line, message: raised.0.clone() };
        }
        out_of_fuel |=
            inner.downcast_ref::<Error>().is_some_and(|inner| inner.kind() == ErrorKind::OutOfFuel);
        message = format!("{message}: {inner}");
        cause = inner.source();
    }
    if out_of_fuel {
        return ChatTemplateError::OverBudget { line, budget };
    }
    ChatTemplateError::Failed { line, message: message.split_whitespace().collect::<Vec<_>>().join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Files = &'static [(&'static str, &'static str)];

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage::new(role, content)
    }

    fn render(source: &str) -> Result<String, ChatTemplateError> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let tokens = tokens.map(|(name, token)| (name.to_owned(), token.to_owned())).into();
        let messages = [message("system", "Be <kind> & brief."), message("user", "Hi \"ü\"")];
        ChatTemplate::new(source, &tokens).render(&messages, true)
    }

    #[test]
    fn renders() {
        let cases = [
            ("trim and lstrip blocks", "{% if true %}\n  {% set x = 1 %}\nA\n  {% endif %}\nB\n", "A\nB"),
            ("tokens", "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}", "<s>|</s>|"),
            ("nothing is escaped", "{{ messages[0]['content'] }}", "Be <kind> & brief."),
            ("attribute access", "{{ messages[1].role }} {{ messages | length }}", "user 2"),
            (
                "absent tools are none",
                "{{ tools is none }} {{ documents is not none }} {{ x is defined }}",
                "True False False",
            ),
            (
                "loop",
                "{% for m in messages %}{{ loop.index0 }}{{ m.role }}{% if not loop.last %},{% endif %}{% endfor %}",
                "0system,1user",
            ),
            ("break", "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "system"),
            (
                "namespace",
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("slices", "{{ messages[1:][0].role }}{{ 'abc'[::-1] }}{{ messages[-1].role }}", "usercbauser"),
            (
                "string methods",
                "{{ ' a,b '.strip().split(',')[1].upper() }}{{ 'ab'.startswith('a') }}{{ 'ab'.removeprefix('a') }}",
                "BTrueb",
            ),
            (
                "dict methods",
                "{{ messages[0].get('x', 'none') }}{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}",
                "noneb1a2",
            ),
            (
                "tojson",
                "{{ {'b': [1, 2.0, none, true], 'a': messages[1].content} | tojson }}",
                r#"{"b": [1, 2.0, null, true], "a": "Hi \"ü\""}"#,
            ),
            ("tojson escapes no html", "{{ '<a> & \\'b\\'' | tojson }}", r#""<a> & 'b'""#),
            (
                "tojson indent",
                "{{ {'a': [1], 'b': {}} | tojson(indent=2) }}",
                "{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}",
            ),
            (
                "tojson arguments",
                "{{ {'b': 'ü😀', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
                r#"{"a":1,"b":"\u00fc\ud83d\ude00"}"#,
            ),
            (
                "generation marks",
                "a{%- generation -%} b {%- endgeneration %}{{ add_generation_prompt }}",
                "abTrue",
            ),
            ("macro", "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}", "[1]"),
            ("python words", "{{ true }} {{ none }} {{ 1.0 }} {{ ['a'] }}", "True None 1.0 ['a']"),
        ];
        for (name, source, expected) in cases {
            assert_eq!(render(source).as_deref(), Ok(expected), "{name}");
        }
    }

    #[test]
    fn errors_name_the_line() {
        let cases = [
            (
                "raised",
                "a\nb\n{{ raise_exception('only user and assistant') }}",
                "refused the messages at line 3: only user and assistant",
            ),
            (
                "raised in a macro",
                "{% macro f() %}\n{{ raise_exception('no') }}{% endmacro %}\n{{ f() }}",
                ": no",
            ),
            ("syntax", "a\n{% if %}", "at line 2: syntax error"),
            ("unclosed", "a\n{% for m in messages %}", "at line 2: syntax error"),
            ("undefined", "a\n\n{{ nothing.here }}", "at line 3: undefined value"),
            ("unknown filter", "a\n{{ 1 | nope }}", "at line 2: unknown filter"),
            ("unknown method", "{{ 'a'.nope() }}", "at line 1: unknown method"),
            ("no include", "a\n{% include '/etc/passwd' %}", "at line 2: syntax error"),
            ("endless macro", "{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", "failed at line"),
            (
                "endless loop",
                "{% for i in range(100000) %}\n{% for j in range(100000) %}{% endfor %}{% endfor %}",
                "was stopped at line 2 after",
            ),
            (
                "huge output",
                "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
                "was stopped at line 1 after",
            ),
            ("huge string", "{{ 'x' * 99000000000 }}", "line 1"),
            (
                "doubling",
                "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
                "was stopped at line 1",
            ),
            ("huge lazy list", "{{ ([1] * 90000000) | tojson }}", "line 1"),
            (
                "nested",
                "{% set ns = namespace(s=[]) %}{% for i in range(900) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s | tojson }}",
                "nested too deeply",
            ),
        ];
        for (name, source, expected) in cases {
            let error = render(source).expect_err(name).to_string();
            assert!(error.contains(expected), "{name}: {error}");
            assert!(!error.contains('\n'), "{name}: more than one line: {error}");
        }
    }

    #[test]
    fn long_messages_fit_the_budget() {
        let messages = vec![message("user", &"word ".repeat(2_000_000)); 3];
        let source = "{% for m in messages %}{{ m.role + ': ' + m.content | trim }}\n{% endfor %}";
        let text = ChatTemplate::new(source, &BTreeMap::new()).render(&messages, false).unwrap();
        assert!(text.len() > 29_000_000);
    }

    #[test]
    fn is_found_where_checkpoints_keep_it() {
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
        // files beside tokenizer_config.json, tokenizer_config.json, the template's text
        let cases: [(Files, &str, Option<&str>); 7] = [
            (&[], "{}", None),
            (&[], r#"{"chat_template": "C"}"#, Some("C")),
            (&[], list, Some("D")),
            (&[], r#"{"chat_template": [{"name": "rag", "template": "R"}]}"#, Some("R")),
            (&[("chat_template.jinja", "J")], r#"{"chat_template": "C"}"#, Some("J")),
            (&[("chat_template.json", r#"{"chat_template": "S"}"#)], "{}", Some("S")),
            (&[("chat_template.json", r#"{"chat_template": "S"}"#)], r#"{"chat_template": "C"}"#, Some("C")),
        ];
        for (files, config, expected) in cases {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                std::fs::write(dir.path().join(name), text).unwrap();
            }
            let config = serde_json::from_str(config).unwrap();
            let template = ChatTemplate::load(dir.path(), &config, &BTreeMap::new()).unwrap();
            assert_eq!(template.map(|template| template.source).as_deref(), expected, "{files:?} {config}");
        }
        for (name, bytes) in [
            ("chat_template.json", &b"{"[..]),
            ("chat_template.json", b"{}"),
            ("chat_template.jinja", b"\xff"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(name), bytes).unwrap();
            let error =
                ChatTemplate::load(dir.path(), &Json::Null, &BTreeMap::new()).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
