use std::time::Instant;

use serde::Serialize;
use zmlx_graph::{GraphError, State, Wanted};
use zmlx_mlx::stream::with_stream;
use zmlx_mlx::{Array, async_eval, eval, memory};

use crate::detokenizer::StreamDecoder;
use crate::error::GenerateError;
use crate::load::Model;
use crate::options::GenerateOptions;
use crate::reuse::Checkpoints;
use crate::sampling::{Sampled, Sampler};
use crate::stop::StopMatcher;

/// What happens while text is generated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event<'a> {
    /// Prompt tokens processed so far.
    Prefill {
        /// Processed.
        done: usize,
        /// To process.
        total: usize,
    },
    /// A token.
    Token {
        /// Its id.
        id: u32,
        /// Text that is now certain: whole characters, and not the beginning of a stop string. May be empty.
        text: &'a str,
    },
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop here.
    Stop,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// The limit of tokens, or the end of the model's context.
    Length,
    /// The caller said so.
    Cancelled,
}

/// What was generated.
#[derive(Debug, Clone, Serialize)]
pub struct Completion {
    /// The prompt.
    pub prompt_ids: Vec<u32>,
    /// The tokens, an ending one included.
    pub tokens: Vec<u32>,
    /// Their text, as [`Tokenizer::stream`](crate::tokenizer::Tokenizer::stream) gives it and without the stop string; empty
    /// without a tokenizer.
    pub text: String,
    /// Tokens of the prompt that the session had seen before, and that were not processed again.
    pub reused_tokens: usize,
    /// Prompt tokens processed a second (those that were not cached), the first token's choice included.
    pub prompt_tps: f64,
    /// Tokens a second after the first; 0 when there was only one.
    pub decode_tps: f64,
    /// Bytes of the [checkpoints](Session::keep_checkpoints) that the session keeps.
    pub checkpoint_bytes: u64,
    /// [Peak memory](crate::memory::peak), weights included.
    pub peak_memory_bytes: u64,
    /// Dtype of the activations.
    pub dtype: String,
    /// `cpu` or `gpu`.
    pub device: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// A sequence with its caches. What a prompt shares with what the session has already seen is not processed again: the
/// caches go back to where the two part. States of convolutions and delta nets, and sliding windows, cannot go back; with
/// [`Self::keep_checkpoints`] copies of them are kept at the ends of prompts, and the last of these before that place is
/// where generation goes on.
pub struct Session<'m> {
    pub(crate) model: &'m Model,
    pub(crate) state: State,
    /// The tokens that `state` has seen.
    pub(crate) seen: Vec<u32>,
    pub(crate) checkpoints: Checkpoints,
    /// How many tokens of the next prompt are likely to come again in the one after it.
    pub(crate) expected: Option<usize>,
}

impl<'m> Session<'m> {
    /// An empty sequence.
    pub fn new(model: &'m Model) -> Self {
        Self {
            model,
            state: model.new_state(),
            seen: Vec::new(),
            checkpoints: Checkpoints::default(),
            expected: None,
        }
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.state = self.model.new_state();
        self.seen.clear();
        self.checkpoints.clear();
    }

    /// Generates tokens after `prompt`. `on_event` sees progress and tokens as they come, and can stop. After an error the
    /// session is empty.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_event: &mut dyn FnMut(Event<'_>) -> Flow,
    ) -> Result<Completion, GenerateError> {
        self.check(prompt, options)?;
        let result = with_stream(self.model.stream(), || self.run(prompt, options, on_event));
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn check(&self, prompt: &[u32], options: &GenerateOptions) -> Result<(), GenerateError> {
        options.validate()?;
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        let vocabulary = self.model.vocab_size();
        let biased = options.sampler.logit_bias.iter().map(|(id, _)| id);
        if let Some(&id) = prompt.iter().chain(biased).find(|&&id| id as usize >= vocabulary) {
            return Err(GenerateError::TokenOutOfRange { id, last: vocabulary.saturating_sub(1) });
        }
        match self.model.context_length() {
            Some(context) if prompt.len() >= context => {
                return Err(GenerateError::PromptTooLong { length: prompt.len(), context });
            }
            _ => {}
        }
        if self.model.tokenizer().is_none() && !options.stop.is_empty() {
            return Err(GenerateError::StopWithoutTokenizer);
        }
        Ok(())
    }

    fn run(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_event: &mut dyn FnMut(Event<'_>) -> Flow,
    ) -> Result<Completion, GenerateError> {
        let model = self.model;
        let reused = self.go_back(prompt)?;
        let mut sampler = Sampler::new(&options.sampler, prompt)?;
        let mut text = TextOut::new(model, options)?;
        let room = model.context_length().map_or(usize::MAX, |c| c - prompt.len());
        let limit = options.max_tokens.min(room);

        let start = Instant::now();
        let fresh = prompt.len() - reused;
        if self.prefill(prompt, options.prefill_chunk, on_event)? == Flow::Stop {
            return self.completion(prompt, reused, text, [0.0; 2], FinishReason::Cancelled);
        }
        if model.executor().cuda_device().is_some() && sampler.is_greedy() {
            return self.decode(prompt, text, limit, options.ignore_eos, (start, reused), on_event);
        }
        let last = Array::from_slice(&prompt[prompt.len() - 1..], &[1])?;
        let mut next = self.step(&last, &mut sampler)?;
        submit(&next)?;
        self.seen.push(prompt[prompt.len() - 1]);
        let mut prompt_seconds = 0.0;
        let mut first = Instant::now();
        let mut reason = FinishReason::Length;
        for n in 1..=limit {
            // On MLX the next step is submitted before this one's token is read, except after the last. The engine (and a
            // GPU past MLX that hands out logits) has computed a step when it returns, so there the token is told first.
            let computed = model.executor().is_native() || model.executor().cuda_device().is_some();
            let ahead = n < limit && !computed;
            let following = if ahead { Some(self.step(&next.token, &mut sampler)?) } else { None };
            if let Some(following) = &following {
                submit(following)?;
            }
            let id = next.token.item::<u32>()?;
            if next.not_a_number.item::<bool>()? {
                return Err(GenerateError::NotANumber { position: prompt.len() + n - 1 });
            }
            if n == 1 {
                prompt_seconds = start.elapsed().as_secs_f64();
                first = Instant::now();
                on_event(Event::Prefill { done: fresh, total: fresh });
            }
            let eos = !options.ignore_eos && model.eos_token_ids().contains(&id);
            let stopped = text.push(id)? || eos;
            if let Some(following) = following {
                self.seen.push(id);
                next = following;
            }
            if stopped || n == limit {
                text.finish()?;
            }
            let flow = on_event(Event::Token { id, text: text.fresh() });
            if stopped {
                reason = FinishReason::Stop;
                break;
            }
            if flow == Flow::Stop {
                text.finish()?;
                reason = FinishReason::Cancelled;
                break;
            }
            if n < limit && !ahead {
                next = self.step(&next.token, &mut sampler)?;
                self.seen.push(id);
            }
        }
        let decode_tps = rate(text.tokens.len().saturating_sub(1), first.elapsed().as_secs_f64());
        self.completion(prompt, reused, text, [rate(fresh, prompt_seconds), decode_tps], reason)
    }

    /// As the loop of [`Self::run`], for the likeliest tokens on a GPU past MLX: they stay there, and the host is told of
    /// each while the next is under way. `started`: when the prompt was begun, and how many of its tokens were known.
    fn decode(
        &mut self,
        prompt: &[u32],
        mut text: TextOut<'_>,
        limit: usize,
        ignore_eos: bool,
        (start, reused): (Instant, usize),
        on_event: &mut dyn FnMut(Event<'_>) -> Flow,
    ) -> Result<Completion, GenerateError> {
        let model = self.model;
        let fresh = prompt.len() - reused;
        let mut prompt_seconds = 0.0;
        let mut first = Instant::now();
        let mut reason = FinishReason::Length;
        let last = prompt[prompt.len() - 1];
        let decoded =
            model.executor().decode(last, &mut self.state, limit, |id| -> Result<bool, GenerateError> {
                let n = text.tokens.len() + 1;
                if n == 1 {
                    prompt_seconds = start.elapsed().as_secs_f64();
                    first = Instant::now();
                    on_event(Event::Prefill { done: fresh, total: fresh });
                }
                let eos = !ignore_eos && model.eos_token_ids().contains(&id);
                let stopped = text.push(id)? || eos;
                if stopped || n == limit {
                    text.finish()?;
                }
                let flow = on_event(Event::Token { id, text: text.fresh() });
                if stopped {
                    reason = FinishReason::Stop;
                } else if flow == Flow::Stop {
                    text.finish()?;
                    reason = FinishReason::Cancelled;
                }
                Ok(!stopped && flow == Flow::Continue)
            })?;
        let finite = decoded.is_none_or(|d| d.finite);
        // The prompt's last token, and of those told all but what no step was asked to go on from.
        let fed = decoded.map_or(0, |d| d.fed);
        if !finite {
            return Err(GenerateError::NotANumber { position: prompt.len() + fed - 1 });
        }
        self.seen.extend((fed > 0).then_some(last));
        self.seen.extend(text.tokens.iter().take(fed.saturating_sub(1)));
        let decode_tps = rate(text.tokens.len().saturating_sub(1), first.elapsed().as_secs_f64());
        self.completion(prompt, reused, text, [rate(fresh, prompt_seconds), decode_tps], reason)
    }

    /// Processes all of the prompt but its last token, in chunks, and keeps checkpoints on the way.
    fn prefill(
        &mut self,
        prompt: &[u32],
        chunk: usize,
        on_event: &mut dyn FnMut(Event<'_>) -> Flow,
    ) -> Result<Flow, GenerateError> {
        let cached = self.seen.len();
        let total = prompt.len() - cached;
        let mut flow = on_event(Event::Prefill { done: 0, total });
        let stops = self.stops(prompt.len() - 1);
        let mut rest = &prompt[cached..prompt.len() - 1];
        while !rest.is_empty() && flow != Flow::Stop {
            let place = self.seen.len();
            let stop = stops.iter().copied().find(|&s| s > place).unwrap_or(prompt.len() - 1);
            let (part, after) = rest.split_at(chunk.min(stop - place));
            rest = after;
            let tokens = Array::from_slice(part, &[1, part.len() as i32])?;
            self.model.run_for(&tokens, &mut self.state, Wanted::None)?;
            eval(&self.state.arrays())?;
            self.seen.extend_from_slice(part);
            if stops.contains(&self.seen.len()) {
                self.keep_checkpoint()?;
            }
            memory::clear_cache()?;
            flow = on_event(Event::Prefill { done: self.seen.len() - cached, total });
        }
        Ok(flow)
    }

    /// One decode step: token `[1]` to the next one, lazy.
    fn step(&mut self, token: &Array, sampler: &mut Sampler) -> Result<Sampled, GenerateError> {
        let tokens = token.reshape(&[1, 1])?;
        let logits = self.model.run_for(&tokens, &mut self.state, Wanted::Last)?;
        let logits = logits.ok_or_else(|| GraphError::Malformed("a call without logits".to_owned()))?;
        if self.model.executor().is_native()
            && let Some(sampled) = sampler.greedy(&logits)?
        {
            return Ok(sampled);
        }
        let last = logits.reshape(&[1, -1])?;
        Ok(sampler.sample(&last)?)
    }

    fn completion(
        &self,
        prompt: &[u32],
        reused_tokens: usize,
        text: TextOut<'_>,
        [prompt_tps, decode_tps]: [f64; 2],
        finish_reason: FinishReason,
    ) -> Result<Completion, GenerateError> {
        Ok(Completion {
            prompt_ids: prompt.to_vec(),
            tokens: text.tokens,
            text: text.text,
            reused_tokens,
            prompt_tps,
            decode_tps,
            checkpoint_bytes: self.checkpoint_bytes() as u64,
            peak_memory_bytes: crate::memory::peak()?,
            dtype: self.model.dtype_name().to_owned(),
            device: self.model.device_name(),
            finish_reason,
        })
    }
}

/// So many a second; 0 where there are none.
fn rate(count: usize, seconds: f64) -> f64 {
    if count > 0 && seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

fn submit(sampled: &Sampled) -> Result<(), GenerateError> {
    Ok(async_eval(&[&sampled.token, &sampled.not_a_number])?)
}

/// Tokens on their way to text: decoded, held back where a stop string may begin, collected.
struct TextOut<'m> {
    decoder: Option<StreamDecoder<'m>>,
    matcher: StopMatcher,
    tokens: Vec<u32>,
    text: String,
    /// Where the text that the last event has not shown begins.
    shown: usize,
}

impl<'m> TextOut<'m> {
    fn new(model: &'m Model, options: &GenerateOptions) -> Result<Self, GenerateError> {
        Ok(Self {
            decoder: model.tokenizer().map(|t| t.stream()),
            matcher: StopMatcher::new(&options.stop)?,
            tokens: Vec::new(),
            text: String::new(),
            shown: 0,
        })
    }

    /// Takes a token; true when a stop string is complete.
    fn push(&mut self, id: u32) -> Result<bool, GenerateError> {
        self.tokens.push(id);
        let Some(decoder) = &mut self.decoder else { return Ok(false) };
        let step = self.matcher.push(&decoder.push(id)?);
        self.text.push_str(&step.text);
        Ok(step.matched.is_some())
    }

    /// Lets out what was held back, unless a stop string ended the text.
    fn finish(&mut self) -> Result<(), GenerateError> {
        let Some(decoder) = &mut self.decoder else { return Ok(()) };
        let rest = decoder.finish()?;
        if self.matcher.matched().is_none() {
            let step = self.matcher.push(&rest);
            self.text.push_str(&step.text);
            if step.matched.is_none() {
                self.text.push_str(&self.matcher.finish());
            }
        }
        Ok(())
    }

    /// Text since the last call.
    fn fresh(&mut self) -> &str {
        let from = std::mem::replace(&mut self.shown, self.text.len());
        &self.text[from..]
    }
}
