//! The prompts of the gate: built-in ones, those of a file, and token ids for models without a tokenizer.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use zmlx_models::{ChatMessage, Model};

use crate::capsule::PromptRecord;
use crate::error::LabError;

/// Largest file of prompts that is read, in bytes.
const LARGEST: u64 = 16 << 20;

/// Most prompts.
const MOST: usize = 1000;

/// Tokens of the prompts that are made for a model without a tokenizer.
const MADE: [(&str, usize); 2] = [("ids-short", 8), ("ids-long", 256)];

/// A prompt, not yet tokenised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// A short name for reports.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Whether it goes through the model's chat template, if it has one.
    pub chat: bool,
}

/// A prompt as a model sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tokenised {
    pub(crate) record: PromptRecord,
    pub(crate) ids: Vec<u32>,
}

/// The built-in prompts: short, long, code, another language, and chat. All begin something that even a model of
/// children's stories can go on with.
pub fn built_in() -> Vec<Prompt> {
    let prompt = |name: &str, text: &str, chat| Prompt { name: name.into(), text: text.into(), chat };
    vec![
        prompt("short", "Once upon a time", false),
        prompt("long", LONG, false),
        prompt("code", CODE, false),
        prompt("german", GERMAN, false),
        prompt("chat", "Please tell a story about a little fox and a lost key.", true),
    ]
}

const LONG: &str = "\
Mia and her grandfather lived in a small house at the edge of the forest. Every morning they went to the well, and every \
evening they sat by the window and counted the stars. One day a storm came. The wind took the red roof of the barn, the \
rain filled the garden, and the old bridge over the river broke in two. In the morning Mia found a wet and tired bird under \
the apple tree. Its wing was hurt. \"Can we help it, Grandpa?\" she asked. He smiled and brought a box, a soft towel and a \
cup of warm water. For seven days they fed the bird with seeds and bread. It ate, it slept, and on the eighth day it sang. \
Mia was happy and a little sad, because she knew that the bird wanted to fly home. She carried the box to the river, where \
the men of the village were building a new bridge. She opened the lid and";

const CODE: &str = "\
def count_words(text):
    \"\"\"Return how often each word of the text occurs.\"\"\"
    counts = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return counts


def most_common(text, n):
    counts = count_words(text)
";

const GERMAN: &str = "\
Es war einmal ein kleines M\u{e4}dchen, das wohnte mit seiner Mutter am Rande eines gro\u{df}en Waldes. Eines Tages fand es \
unter einem Baum";

#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Text(String),
    Full(FullEntry),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FullEntry {
    name: Option<String>,
    text: String,
    #[serde(default)]
    chat: bool,
}

/// Reads prompts from a file. One ending in `.json` holds an array of texts or of `{"name", "text", "chat"}`; any other
/// holds one prompt a line, empty lines left out.
pub fn from_file(path: &Path) -> Result<Vec<Prompt>, LabError> {
    let wrong = |message: String| LabError::Prompts { path: path.to_owned(), message };
    let metadata = fs::metadata(path).map_err(|e| wrong(e.to_string()))?;
    if !metadata.is_file() || metadata.len() > LARGEST {
        return Err(wrong(format!("not a regular file of up to {LARGEST} bytes")));
    }
    let bytes = fs::read(path).map_err(|e| wrong(e.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        wrong(format!("is not UTF-8 at byte {}: convert it first", e.utf8_error().valid_up_to()))
    })?;
    let json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    let prompts = if json { entries(&text).map_err(&wrong)? } else { lines(&text) };
    if prompts.is_empty() || prompts.len() > MOST {
        return Err(wrong(format!("holds {} prompts: give 1 to {MOST}", prompts.len())));
    }
    if let Some(prompt) = prompts.iter().find(|p| p.text.trim().is_empty()) {
        return Err(wrong(format!("prompt {} is empty: give it a text", prompt.name)));
    }
    let mut names: Vec<&str> = prompts.iter().map(|p| p.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(wrong(format!("two prompts are named {}: give each its own name", pair[0])));
    }
    Ok(prompts)
}

fn lines(text: &str) -> Vec<Prompt> {
    let filled = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    filled
        .map(|(n, line)| Prompt { name: format!("line-{}", n + 1), text: line.to_owned(), chat: false })
        .collect()
}

fn entries(text: &str) -> Result<Vec<Prompt>, String> {
    let entries: Vec<Entry> = serde_json::from_str(text).map_err(|e| {
        format!(
            "{e}: write an array of texts or of {{\"name\": \"...\", \"text\": \"...\", \"chat\": false}}"
        )
    })?;
    let named = entries.into_iter().enumerate().map(|(n, entry)| {
        let number = format!("prompt-{}", n + 1);
        match entry {
            Entry::Text(text) => Prompt { name: number, text, chat: false },
            Entry::Full(e) => Prompt { name: e.name.unwrap_or(number), text: e.text, chat: e.chat },
        }
    });
    Ok(named.collect())
}

/// Tokenises. Without a tokenizer the prompts are seeded token ids, and the notes say so; the texts then serve nobody.
pub(crate) fn tokenise(
    model: &Model,
    prompts: &[Prompt],
    notes: &mut Vec<String>,
) -> Result<Vec<Tokenised>, LabError> {
    let Some(tokenizer) = model.tokenizer() else {
        notes.push("the model has no tokenizer: the prompts are pseudo-random token ids".to_owned());
        return Ok(MADE.iter().map(|&(name, tokens)| made(model, name, tokens)).collect());
    };
    let mut tokenised = Vec::new();
    for prompt in prompts {
        let ids = if prompt.chat && tokenizer.has_chat_template() {
            let message = ChatMessage::new("user", prompt.text.clone());
            tokenizer.encode(&tokenizer.apply_chat_template(&[message], true)?, false)?
        } else {
            if prompt.chat {
                notes.push(format!(
                    "{}: the model has no chat template, so the text is given as it is",
                    prompt.name
                ));
            }
            tokenizer.encode(&prompt.text, true)?
        };
        let (name, text) = (prompt.name.clone(), Some(prompt.text.clone()));
        tokenised.push(Tokenised { record: PromptRecord { name, tokens: ids.len() as u64, text }, ids });
    }
    Ok(tokenised)
}

/// A prompt of pseudo-random ids, the same for every model of this vocabulary.
pub(crate) fn made(model: &Model, name: &str, tokens: usize) -> Tokenised {
    let ids = made_ids(model.vocab_size(), tokens);
    Tokenised { record: PromptRecord { name: name.into(), tokens: ids.len() as u64, text: None }, ids }
}

/// SplitMix64 (Steele, Lea, Flood 2014) from seed 1, modulo the vocabulary.
fn made_ids(vocabulary: usize, tokens: usize) -> Vec<u32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..tokens).map(|_| (next() % vocabulary.max(1) as u64) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn files_of_lines_and_of_json() {
        let (_folder, path) = file("p.txt", b"One fish\n\n  two fish \n");
        let prompts = from_file(&path).unwrap();
        assert_eq!(prompts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["line-1", "line-3"]);
        assert_eq!(prompts[1].text, "  two fish ");
        let text = br#"["a b", {"text": "c", "chat": true}, {"name": "z", "text": "d"}]"#;
        let (_folder, path) = file("p.JSON", text);
        let prompts = from_file(&path).unwrap();
        assert_eq!(
            prompts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(),
            ["prompt-1", "prompt-2", "z"]
        );
        assert!(prompts[1].chat && !prompts[2].chat);
    }

    #[test]
    fn bad_files_are_named_with_what_to_do() {
        let cases: [(&str, &[u8], &str); 8] = [
            ("p.txt", b"", "0 prompts"),
            ("p.txt", b" \n\t\n", "0 prompts"),
            ("p.txt", b"ab\xff", "UTF-8 at byte 2"),
            ("p.json", b"[\"a\"", "write an array"),
            ("p.json", b"{\"a\": 1}", "write an array"),
            ("p.json", b"[{\"text\": \"a\", \"chatt\": true}]", "write an array"),
            ("p.json", b"[\"a\", \" \"]", "prompt-2 is empty"),
            ("p.json", br#"[{"name": "x", "text": "a"}, {"name": "x", "text": "b"}]"#, "own name"),
        ];
        for (name, text, word) in cases {
            let (_folder, path) = file(name, text);
            let error = from_file(&path).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(name), "{error}");
        }
        assert!(from_file(Path::new("/nowhere/p.txt")).is_err());
        assert!(from_file(Path::new("/")).is_err());
    }

    #[test]
    fn built_in_prompts_have_names_of_their_own() {
        let prompts = built_in();
        let mut names: Vec<&str> = prompts.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["short", "long", "code", "german", "chat"]);
        names.dedup();
        assert_eq!(names.len(), prompts.len());
    }

    #[test]
    fn made_ids_stay_in_the_vocabulary_and_repeat() {
        let ids = made_ids(10, 1000);
        assert!(ids.iter().all(|&id| id < 10) && (0..10).all(|id| ids.contains(&id)));
        assert_eq!(ids[..64], made_ids(10, 64)[..]);
        assert_eq!(made_ids(0, 2), [0, 0]);
    }
}
