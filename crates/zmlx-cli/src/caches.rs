//! Sessions with the caches of earlier ones.

use zmlx_models::{Model, Session};

use crate::failure::Failure;
use crate::output::Console;
use crate::request::CacheRequest;

/// Most bytes of the copies that a conversation keeps of states that cannot go back.
const CHECKPOINT_BYTES: usize = 1 << 30;

/// A session with the caches that were asked for. `goes_back`: whether other prompts may part from what it has seen, so
/// that checkpoints are of use.
pub(crate) fn open<'m>(
    model: &'m Model,
    request: &CacheRequest,
    goes_back: bool,
    console: &Console,
) -> Result<Session<'m>, Failure> {
    let checkpoints = if goes_back { CHECKPOINT_BYTES } else { 0 };
    if let (Some(path), false) = (&request.load, request.first_time()) {
        // Those of the file serve whoever comes next, whether or not this one keeps more.
        return Session::load(model, path, CHECKPOINT_BYTES).map_err(Failure::prompt_cache);
    }
    if let Some(path) = &request.load {
        console.note(&format!("{} is not there yet", path.display()));
    }
    let mut session = Session::new(model);
    session.keep_checkpoints(checkpoints);
    Ok(session)
}

/// Whether caches that came from a file are of use for the prompt; says how much of it need not be processed.
pub(crate) fn check(
    session: &Session<'_>,
    request: &CacheRequest,
    prompt: &[u32],
    console: &Console,
) -> Result<(), Failure> {
    let (Some(path), false) = (&request.load, session.seen().is_empty()) else { return Ok(()) };
    let reused = session.fits(path, prompt).map_err(Failure::prompt_cache)?;
    let (cached, prompt) = (session.seen().len(), prompt.len());
    console.note(&format!("{}: {reused} of {cached} tokens serve the prompt of {prompt}", path.display()));
    Ok(())
}

/// Writes the caches if that was asked for.
pub(crate) fn save(session: &mut Session<'_>, request: &CacheRequest) -> Result<(), Failure> {
    match &request.save {
        Some(path) => session.save(path).map_err(Failure::prompt_cache),
        None => Ok(()),
    }
}
