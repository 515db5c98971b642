//! `zmlx generate`: continue one prompt.

use std::io::{self, IsTerminal};

use zmlx_models::{FinishReason, Model};

use crate::args::GenerateArgs;
use crate::caches;
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::output::{self, Console};
use crate::reply::{self, Show};
use crate::request::{self, Format, GenerateRequest, Prompt};
use crate::{input, model};

/// Generates once and prints.
pub(crate) fn run(args: GenerateArgs, console: &Console) -> Result<(), Failure> {
    let mut request = GenerateRequest::new(args, io::stdin().is_terminal())?;
    let silent = console.without_progress();
    let console = match request.format {
        Format::Stream => console,
        Format::Json => &silent,
    };
    let interrupt = Interrupt::install(SecondPress::Exits)?;
    // Before the load, so that a bad prompt does not cost one.
    if request.prompt == Prompt::Stdin {
        request.prompt = Prompt::Text(input::read_prompt(io::stdin().lock())?);
    }
    let model = model::open_smart(&request.model, &request.load, request.smart, console)?;
    let prompt = prompt_ids(&model, &request)?;
    check_against_model(&model, &request, &prompt)?;
    let show = match request.format {
        Format::Json => Show::Nothing,
        Format::Stream if model.tokenizer().is_some() => Show::Text,
        Format::Stream => Show::Ids,
    };
    let guard = interrupt.during_reply();
    let mut session = caches::open(&model, &request.caches, request.caches.save.is_some(), console)?;
    caches::check(&session, &request.caches, &prompt, console)?;
    let completion = reply::write(&mut session, &prompt, &request.options, show, console, &guard)?;
    caches::save(&mut session, &request.caches)?;
    if request.format == Format::Json {
        output::write_json(&completion)?;
    }
    if request.stats {
        output::stderr_line(&output::stats_line(&completion));
    }
    match completion.finish_reason {
        FinishReason::Cancelled => Err(Failure::Interrupted),
        FinishReason::Stop | FinishReason::Length => Ok(()),
    }
}

fn prompt_ids(model: &Model, request: &GenerateRequest) -> Result<Vec<u32>, Failure> {
    let text = match &request.prompt {
        Prompt::Ids(ids) => return Ok(ids.clone()),
        Prompt::Text(text) => text.as_str(),
        Prompt::Stdin => "",
    };
    let tokenizer = model.tokenizer().ok_or_else(|| {
        Failure::usage("the model has no tokenizer (tokenizer.json): give the prompt as --prompt-ids IDS")
    })?;
    let encoded = if !request.raw && tokenizer.has_chat_template() {
        let mut messages = reply::conversation(request.system.as_deref());
        messages.push(reply::message("user", text));
        let rendered = tokenizer.apply_chat_template(&messages, true).map_err(Failure::runtime)?;
        tokenizer.encode(&rendered, false)
    } else if request.system.is_some() {
        return Err(Failure::usage(
            "the model has no chat template, so --system has no place: put it into --prompt",
        ));
    } else {
        tokenizer.encode(text, true)
    };
    let ids = encoded.map_err(Failure::runtime)?;
    if ids.is_empty() {
        return Err(Failure::usage("the prompt is empty: give --prompt TEXT"));
    }
    Ok(ids)
}

fn check_against_model(model: &Model, request: &GenerateRequest, prompt: &[u32]) -> Result<(), Failure> {
    let options = &request.options;
    let vocab_size = model.vocab_size();
    // Only ids that were typed can be the user's mistake.
    if let Prompt::Ids(_) = request.prompt {
        request::check_vocabulary("--prompt-ids", prompt, vocab_size)?;
    }
    request::check_logit_bias(options, vocab_size)?;
    if model.tokenizer().is_none() && !options.stop.is_empty() {
        return Err(Failure::usage("--stop needs text, and the model has no tokenizer (tokenizer.json)"));
    }
    Ok(())
}
