//! Reading prompts: all of stdin for `generate`, line by line for `chat`.

use std::io::{self, BufRead, Read};
use std::path::PathBuf;

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use zmlx_mlx::platform::Platform;

use crate::failure::Failure;

/// Reads a whole prompt and drops one line end at its end, which `echo` and editors add.
pub(crate) fn read_prompt(mut source: impl Read) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes).map_err(unreadable)?;
    let mut text = utf8(bytes, 0)?;
    trim_line_end(&mut text);
    if text.is_empty() {
        return Err(Failure::usage("the prompt on stdin is empty: pipe text into it, or give --prompt TEXT"));
    }
    Ok(text)
}

fn unreadable(error: io::Error) -> Failure {
    let line = format!("cannot read stdin: {error}");
    Failure::runtime(anyhow::Error::new(error).context(line))
}

/// `offset` is the position of the first byte in the whole input.
fn utf8(bytes: Vec<u8>, offset: usize) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::usage(format_args!(
            "stdin is not UTF-8: byte 0x{:02x} at offset {}; convert the text to UTF-8 first",
            error.as_bytes()[at],
            offset + at
        ))
    })
}

fn trim_line_end(text: &mut String) {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
}

/// What the user did at the chat prompt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// Typed a line.
    Text(String),
    /// Pressed ctrl-C.
    Interrupted,
    /// Pressed ctrl-D, or the input ended.
    End,
}

/// Where chat lines come from.
pub(crate) enum Lines {
    /// A terminal, with line editing and history.
    Terminal(Box<Editor>),
    /// Anything else.
    Pipe(PipeLines<io::BufReader<io::Stdin>>),
}

impl Lines {
    /// A line editor when `terminal` is set, plain lines of stdin otherwise.
    pub(crate) fn open(terminal: bool) -> Result<Self, Failure> {
        Ok(if terminal {
            Self::Terminal(Box::new(Editor::new()?))
        } else {
            Self::Pipe(PipeLines::new(io::BufReader::new(io::stdin())))
        })
    }

    /// The next line, without its line end.
    pub(crate) fn next(&mut self) -> Result<Line, Failure> {
        match self {
            Self::Terminal(editor) => editor.next(),
            Self::Pipe(lines) => lines.next(),
        }
    }
}

/// A line editor with history.
pub(crate) struct Editor {
    editor: DefaultEditor,
    history: Option<PathBuf>,
}

impl Editor {
    fn new() -> Result<Self, Failure> {
        let mut editor = DefaultEditor::new().map_err(Failure::runtime)?;
        // A history that cannot be kept (read-only home) is no reason not to chat.
        let history = data_folder()
            .filter(|folder| std::fs::create_dir_all(folder).is_ok())
            .map(|folder| folder.join("chat_history.txt"));
        if let Some(path) = &history {
            let _ = editor.load_history(path);
        }
        Ok(Self { editor, history })
    }

    fn next(&mut self) -> Result<Line, Failure> {
        match self.editor.readline("> ") {
            Ok(text) => {
                if !text.trim().is_empty()
                    && self.editor.add_history_entry(text.as_str()).is_ok()
                    && let Some(path) = &self.history
                {
                    let _ = self.editor.append_history(path);
                }
                Ok(Line::Text(text))
            }
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(error) => Err(Failure::runtime(error)),
        }
    }
}

/// The user's data folder for this program, after the platform's custom.
fn data_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    Platform::HERE.data_folder(set)
}

/// Lines of a pipe or file.
pub(crate) struct PipeLines<R> {
    source: R,
    offset: usize,
}

impl<R: BufRead> PipeLines<R> {
    fn new(source: R) -> Self {
        Self { source, offset: 0 }
    }

    fn next(&mut self) -> Result<Line, Failure> {
        let mut bytes = Vec::new();
        let read = self.source.read_until(b'\n', &mut bytes).map_err(unreadable)?;
        if read == 0 {
            return Ok(Line::End);
        }
        let mut text = utf8(bytes, self.offset)?;
        self.offset += read;
        trim_line_end(&mut text);
        Ok(Line::Text(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_end_is_dropped() {
        let cases = [
            ("Once", "Once"),
            ("Once\n", "Once"),
            ("Once\r\n", "Once"),
            ("Once\n\n", "Once\n"),
            (" a\nb ", " a\nb "),
        ];
        for (given, expected) in cases {
            assert_eq!(read_prompt(given.as_bytes()).ok().as_deref(), Some(expected));
        }
    }

    #[test]
    fn bad_bytes_are_named_with_their_offset() {
        let failure = read_prompt(&b"h\xc3\xa9l\xffo"[..]).err().unwrap();
        assert_eq!(failure.code(), 2);
        let line = failure.error().unwrap().to_string();
        assert!(line.contains("not UTF-8: byte 0xff at offset 4"), "{line}");
        assert_eq!(read_prompt(&b"\n"[..]).err().unwrap().code(), 2);
    }

    #[test]
    fn pipe_lines_end_and_count_bytes_over_lines() {
        let mut lines = PipeLines::new(&b"one\r\ntwo"[..]);
        assert_eq!(lines.next().ok(), Some(Line::Text("one".into())));
        assert_eq!(lines.next().ok(), Some(Line::Text("two".into())));
        assert_eq!(lines.next().ok(), Some(Line::End));
        let mut lines = PipeLines::new(&b"one\n\x80"[..]);
        lines.next().ok();
        let failure = lines.next().err().unwrap();
        assert!(failure.error().unwrap().to_string().contains("offset 4"));
    }
}
