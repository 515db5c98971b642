//! `zmlx demo`: a story from the embedded model.

use zmlx_models::{FinishReason, LoadOptions, Session};

use crate::args::DemoArgs;
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::model;
use crate::output::{self, Console};
use crate::reply::{self, Show};
use crate::request::{DemoRequest, ModelSource};

/// Streams one story to stdout, then a line of statistics to stderr.
pub(crate) fn run(args: DemoArgs, console: &Console) -> Result<(), Failure> {
    let request = DemoRequest::try_from(args)?;
    let interrupt = Interrupt::install(SecondPress::Exits)?;
    let model = model::open(&ModelSource::Embedded, &LoadOptions::default(), console)?;
    let tokenizer = model
        .tokenizer()
        .ok_or_else(|| Failure::load(anyhow::anyhow!("the embedded model has no tokenizer")))?;
    let rendered = tokenizer
        .apply_chat_template(&[reply::message("user", request.prompt.as_str())], true)
        .map_err(Failure::runtime)?;
    let prompt = tokenizer.encode(&rendered, false).map_err(Failure::runtime)?;
    console.note(&format!("prompt: {}\n", request.prompt));
    let guard = interrupt.during_reply();
    let completion =
        reply::write(&mut Session::new(&model), &prompt, &request.options, Show::Text, console, &guard)?;
    if request.stats {
        output::stderr_line(&format!("\n{}", output::stats_line(&completion)));
    } else {
        console.note(&format!(
            "\n{} tokens at {:.1} tok/s, {} on {}",
            completion.tokens.len(),
            completion.decode_tps,
            completion.dtype,
            completion.device
        ));
    }
    match completion.finish_reason {
        FinishReason::Cancelled => Err(Failure::Interrupted),
        FinishReason::Stop | FinishReason::Length => Ok(()),
    }
}
