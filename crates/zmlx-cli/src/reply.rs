//! One generation: its tokens to stdout as they come, prefill progress, ctrl-C.

use indicatif::ProgressBar;
use zmlx_models::{ChatMessage, Completion, Event, Flow, GenerateOptions, Session};

use crate::failure::Failure;
use crate::interrupt::ReplyGuard;
use crate::output::{self, Console, Unit};

/// Prompts up to this many tokens show no prefill progress.
const QUIET_PREFILL: usize = 512;

/// What is written to stdout while tokens come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// Their text, then a line end.
    Text,
    /// Their ids separated by blanks, then a line end: for models without a tokenizer.
    Ids,
    /// Nothing.
    Nothing,
}

/// Generates and writes. Gives [`Failure::ClosedPipe`] when the reader of stdout went away;
/// a reply stopped by ctrl-C is a completion whose finish reason says so.
pub(crate) fn write(
    session: &mut Session<'_>,
    prompt: &[u32],
    options: &GenerateOptions,
    show: Show,
    console: &Console,
    guard: &ReplyGuard<'_>,
) -> Result<Completion, Failure> {
    let mut bar: Option<ProgressBar> = None;
    let mut failed = None;
    let mut first = true;
    let generated = session.generate(prompt, options, &mut |event| {
        match event {
            Event::Prefill { done, total } if total > QUIET_PREFILL => {
                bar.get_or_insert_with(|| console.bar("prompt", Unit::Tokens, total as u64))
                    .set_position(done as u64);
            }
            Event::Prefill { .. } => {}
            Event::Token { id, text } => {
                // The bar shares the terminal with the text.
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                }
                let written = match show {
                    Show::Nothing => Ok(()),
                    Show::Text if text.is_empty() => Ok(()),
                    Show::Text => output::write_stdout(text.as_bytes()),
                    Show::Ids if first => output::write_stdout(id.to_string().as_bytes()),
                    Show::Ids => output::write_stdout(format!(" {id}").as_bytes()),
                };
                first = false;
                if let Err(failure) = written {
                    failed = Some(failure);
                    return Flow::Stop;
                }
            }
        }
        if guard.stop_requested() { Flow::Stop } else { Flow::Continue }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    if let Some(failure) = failed {
        return Err(failure);
    }
    if show != Show::Nothing && (generated.is_ok() || !first) {
        output::write_stdout(b"\n")?;
    }
    generated.map_err(Failure::runtime)
}

/// A message of a conversation.
pub(crate) fn message(role: &str, content: impl Into<String>) -> ChatMessage {
    ChatMessage::new(role, content)
}

/// A conversation that starts with an optional system message.
pub(crate) fn conversation(system: Option<&str>) -> Vec<ChatMessage> {
    system.map(|text| message("system", text)).into_iter().collect()
}
