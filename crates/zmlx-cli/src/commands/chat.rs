//! `zmlx chat`: a conversation in the terminal, or line by line through a pipe.

use std::io::{self, IsTerminal};

use zmlx_models::tokenizer::Tokenizer;
use zmlx_models::{ChatMessage, FinishReason, Model, Session};

use crate::args::ChatArgs;
use crate::caches;
use crate::failure::Failure;
use crate::input::{Line, Lines};
use crate::interrupt::{Interrupt, SecondPress};
use crate::model;
use crate::output::{self, Console};
use crate::reply::{self, Show};
use crate::request::{self, ChatRequest};

const HELP: &str = "\
/reset  forget the conversation
/help   show this
/exit   leave (ctrl-D does too)
ctrl-C  stop the reply that is being written";

/// What a typed line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Say(&'a str),
    Reset,
    Help,
    Exit,
    Unknown(&'a str),
    Nothing,
}

fn understand(line: &str) -> Input<'_> {
    match line.trim() {
        "" => Input::Nothing,
        "/reset" => Input::Reset,
        "/help" | "/?" => Input::Help,
        "/exit" | "/quit" => Input::Exit,
        command if is_command(command) => Input::Unknown(command),
        _ => Input::Say(line),
    }
}

/// One word after the slash: a path such as `/etc/hosts` or a sentence is a message.
fn is_command(line: &str) -> bool {
    line.strip_prefix('/')
        .is_some_and(|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphabetic()))
}

struct Chat<'m> {
    model: &'m Model,
    tokenizer: &'m Tokenizer,
    session: Session<'m>,
    messages: Vec<ChatMessage>,
    request: ChatRequest,
    /// Whether the caches come from a file that no prompt was held against yet.
    unchecked: bool,
}

/// Talks until the input ends.
pub(crate) fn run(args: ChatArgs, console: &Console) -> Result<(), Failure> {
    let request = ChatRequest::try_from(args)?;
    let interrupt = Interrupt::install(SecondPress::Ignored)?;
    let model = model::open_smart(&request.model, &request.load, request.smart, console)?;
    let mut chat = Chat::new(&model, request, console)?;
    let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
    let mut lines = Lines::open(interactive)?;
    if interactive {
        console.note("/help lists the commands, ctrl-D leaves");
    }
    loop {
        let line = match lines.next()? {
            Line::Text(line) => line,
            Line::Interrupted => {
                console.note("/exit or ctrl-D leaves");
                continue;
            }
            Line::End => return chat.finish(),
        };
        match understand(&line) {
            Input::Nothing => {}
            Input::Exit => return chat.finish(),
            Input::Help => output::stderr_line(HELP),
            Input::Reset => {
                chat.reset();
                console.note("the conversation is forgotten");
            }
            Input::Unknown(command) => {
                output::stderr_line(&format!("{command} is not a command; /help lists them"));
            }
            Input::Say(text) => match chat.say(text, console, &interrupt) {
                // In a terminal the user can go on, with /reset if need be.
                Err(failure @ Failure::Runtime(_)) if interactive => {
                    failure.report(console);
                }
                result => result?,
            },
        }
    }
}

impl<'m> Chat<'m> {
    fn new(model: &'m Model, request: ChatRequest, console: &Console) -> Result<Self, Failure> {
        let tokenizer = model.tokenizer().ok_or_else(|| {
            Failure::usage(
                "the model has no tokenizer (tokenizer.json), so it cannot chat: use zmlx generate --prompt-ids",
            )
        })?;
        if !tokenizer.has_chat_template() {
            return Err(Failure::usage(
                "the model has no chat template, so it cannot chat: use zmlx generate --raw",
            ));
        }
        request::check_logit_bias(&request.options, model.vocab_size())?;
        Ok(Self {
            model,
            tokenizer,
            session: caches::open(model, &request.caches, true, console)?,
            messages: reply::conversation(request.system.as_deref()),
            unchecked: request.caches.load.is_some(),
            request,
        })
    }

    /// The end of the conversation.
    fn finish(&mut self) -> Result<(), Failure> {
        match self.session.seen() {
            [] => Ok(()),
            _ => caches::save(&mut self.session, &self.request.caches),
        }
    }

    fn reset(&mut self) {
        self.session.reset();
        self.messages = reply::conversation(self.request.system.as_deref());
    }

    /// One turn. When it fails the conversation is as it was before.
    fn say(&mut self, text: &str, console: &Console, interrupt: &Interrupt) -> Result<(), Failure> {
        self.messages.push(reply::message("user", text));
        let replied = self.reply(console, interrupt);
        match replied {
            // Stopped before the first word: as if it had not been asked.
            Ok(reply) if reply.is_empty() => {
                self.messages.pop();
                Ok(())
            }
            Ok(reply) => {
                self.messages.push(ChatMessage::reply(&reply));
                Ok(())
            }
            Err(failure) => {
                self.messages.pop();
                Err(failure)
            }
        }
    }

    fn reply(&mut self, console: &Console, interrupt: &Interrupt) -> Result<String, Failure> {
        let rendered = self.tokenizer.apply_chat_template(&self.messages, true).map_err(Failure::runtime)?;
        let prompt = self.tokenizer.encode(&rendered, false).map_err(Failure::runtime)?;
        self.check_room(prompt.len())?;
        if std::mem::take(&mut self.unchecked) {
            caches::check(&self.session, &self.request.caches, &prompt, console)?;
        }
        if let Some(tokens) = self.settled(&prompt) {
            self.session.expect_prefix(tokens);
        }
        let guard = interrupt.during_reply();
        let completion =
            reply::write(&mut self.session, &prompt, &self.request.options, Show::Text, console, &guard)?;
        drop(guard);
        match completion.finish_reason {
            FinishReason::Length => console
                .note(&format!("(cut after {} tokens; --max-tokens N allows more)", completion.tokens.len())),
            FinishReason::Cancelled => console.note("(stopped)"),
            FinishReason::Stop => {}
        }
        if self.request.stats {
            output::stderr_line(&output::stats_line(&completion));
        }
        Ok(completion.text)
    }

    /// How many tokens of the prompt the next turn's will begin with, if that can be told: those of the messages, without
    /// what the template puts there to begin a reply and may not repeat.
    fn settled(&self, prompt: &[u32]) -> Option<usize> {
        let messages = self.tokenizer.apply_chat_template(&self.messages, false).ok()?;
        let ids = self.tokenizer.encode(&messages, false).ok()?;
        Some(ids.iter().zip(prompt).take_while(|(a, b)| a == b).count())
    }

    fn check_room(&self, prompt: usize) -> Result<(), Failure> {
        match self.model.context_length() {
            Some(context) if prompt >= context => Err(Failure::runtime(anyhow::anyhow!(
                "the conversation has {prompt} tokens and the model's context {context}: /reset starts a new one"
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_messages() {
        let cases = [
            ("  ", Input::Nothing),
            ("/reset ", Input::Reset),
            ("/help", Input::Help),
            ("/exit", Input::Exit),
            ("/quit", Input::Exit),
            ("/rest", Input::Unknown("/rest")),
            ("/etc/hosts is a file", Input::Say("/etc/hosts is a file")),
            ("/", Input::Say("/")),
            (" hello", Input::Say(" hello")),
        ];
        for (line, expected) in cases {
            assert_eq!(understand(line), expected, "{line:?}");
        }
    }
}
