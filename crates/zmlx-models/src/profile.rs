use std::time::Instant;

use serde::Serialize;
use zmlx_graph::cuda::Timeline;
use zmlx_graph::profile::median;
use zmlx_graph::{Cost, CostContext, GraphError, Profile, ProfileReport, State};
use zmlx_mlx::stream::with_stream;
use zmlx_mlx::{Array, Dtype};

use crate::error::GenerateError;
use crate::load::Model;

/// What is profiled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProfileOptions {
    /// Tokens that come before the steps, made up.
    pub prompt_tokens: usize,
    /// Steps of one token that are timed node by node, and as many that are not cut up. The medians count.
    pub steps: usize,
    /// Bytes a second that memory moves: of a GPU that decodes past MLX, see [`Model::device_bandwidth`].
    pub bandwidth: f64,
}

/// Where the time of a decode step goes.
#[derive(Debug, Clone, Serialize)]
pub struct ModelProfile {
    /// Times, bytes and rates by op and by module.
    pub report: ProfileReport,
    /// Seconds of a step that is not cut up into nodes: what a step really takes.
    pub step_seconds: f64,
    /// Positions before the last step.
    pub position: u32,
    /// Dtype of the activations.
    pub dtype: &'static str,
    /// `cpu` or `gpu`.
    pub device: String,
    /// The launches of a step that runs on a GPU past MLX; absent where it runs on MLX or the engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launches: Option<LaunchProfile>,
    /// Seconds of each node.
    #[serde(skip)]
    pub profile: Profile,
    /// The picture, as SVG.
    #[serde(skip)]
    pub svg: String,
}

/// Where the time of a decode step goes that runs on a GPU past MLX.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LaunchProfile {
    /// Its launches, timed while they overlap.
    pub timeline: Timeline,
    /// Mean seconds a token of undisturbed greedy decode, nothing noted.
    pub token_seconds: f64,
    /// The least time that memory allows a token, at the bandwidth of [`ProfileOptions`]; absent where the driver does not
    /// say how fast the GPU's memory is, as that bandwidth is another's then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<DecodeBound>,
}

/// The least time of a token: weights and state once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DecodeBound {
    /// Bytes of weights and state.
    pub bytes: u64,
    /// Bytes a second that memory moves.
    pub bandwidth: f64,
    /// Seconds.
    pub seconds: f64,
    /// The part of it in the time that a token takes.
    pub share: f64,
}

impl DecodeBound {
    /// Of a token that moves these bytes and takes that long.
    pub fn new(bytes: u64, bandwidth: f64, token_seconds: f64) -> Self {
        let seconds = bytes as f64 / bandwidth;
        let share = if token_seconds > 0.0 { seconds / token_seconds } else { 0.0 };
        Self { bytes, bandwidth, seconds, share }
    }
}

impl Model {
    /// Bytes a second that the memory of the GPU moves which decodes past MLX; `None` where MLX or the engine decodes, or the
    /// driver does not say.
    pub fn device_bandwidth(&self) -> Option<f64> {
        let stated = self.executor().cuda_device()?.bandwidth;
        (stated > 0).then_some(stated as f64)
    }

    /// What a token costs after `position` others in the graph that is in use, with weights as they are held in memory.
    ///
    /// # Errors
    /// As [`zmlx_graph::Graph::cost`].
    pub fn decode_cost(&self, position: u32) -> Result<Cost, GraphError> {
        let weight_bytes = self.executor().weight_bytes();
        self.graph().cost(&CostContext::decode(position, self.dtype(), weight_bytes))
    }

    /// Runs decode steps and times each node of the graph that is in use. The tokens after the made-up prompt are the
    /// likeliest ones, so that experts are chosen as they are in use. One step of each kind warms up and is not counted.
    ///
    /// Where calls of one token run on a GPU past MLX, the same tokens are fed after the same prompt once more, with the
    /// launches noted while they overlap, and then as many are decoded undisturbed.
    ///
    /// # Errors
    /// [`GenerateError::Option`] for no steps, no prompt, or a bandwidth that is no positive number;
    /// [`GenerateError::PromptTooLong`] where prompt and steps do not fit into the model's context; [`GenerateError::Graph`] for
    /// a node that fails.
    pub fn profile(&self, options: &ProfileOptions) -> Result<ModelProfile, GenerateError> {
        self.check(options)?;
        with_stream(self.stream(), || self.profile_here(options))
    }

    fn check(&self, options: &ProfileOptions) -> Result<(), GenerateError> {
        let wrong = |name, value: String, allowed| Err(GenerateError::Option { name, value, allowed });
        if options.steps == 0 {
            return wrong("steps", "0".to_owned(), "1 or more");
        }
        if options.prompt_tokens == 0 {
            return wrong("prompt_tokens", "0".to_owned(), "1 or more");
        }
        if !(options.bandwidth.is_finite() && options.bandwidth > 0.0) {
            return wrong("bandwidth", options.bandwidth.to_string(), "bytes a second, above 0");
        }
        let positions =
            options.prompt_tokens.saturating_add(options.steps.saturating_add(1).saturating_mul(2));
        // MLX counts positions with 32 bits.
        let context = self.context_length().unwrap_or(i32::MAX as usize);
        if positions > context {
            return Err(GenerateError::PromptTooLong { length: positions, context });
        }
        Ok(())
    }

    fn profile_here(&self, options: &ProfileOptions) -> Result<ModelProfile, GenerateError> {
        let mut state = self.new_state();
        let vocabulary = self.vocab_size().max(1) as u64;
        // A multiplicative hash spreads the ids over the vocabulary.
        let ids =
            (0..options.prompt_tokens as u64).map(|i| (i.wrapping_mul(2_654_435_761) % vocabulary) as u32);
        let mut logits = self.run(&ids.collect::<Vec<_>>(), &mut state)?;
        let (mut cut, mut whole) = (Vec::new(), Vec::new());
        // A state of its own for the timeline: the positions are the same.
        let mut noted = self.executor().cuda_device().is_some().then(|| (state.clone(), Vec::new()));
        for step in 0..=options.steps {
            let token = likeliest(&logits, &state)?;
            if let Some((_, tokens)) = &mut noted {
                tokens.extend(token.to_vec::<u32>().map_err(choosing)?);
            }
            let (out, profile) = self.executor().profile(&token, &mut state)?;
            let token = likeliest(&out, &state)?;
            if let Some((_, tokens)) = &mut noted {
                tokens.extend(token.to_vec::<u32>().map_err(choosing)?);
            }
            let start = Instant::now();
            logits = self.executor().run(&token, &mut state)?;
            logits.eval()?;
            let seconds = start.elapsed().as_secs_f64();
            if step > 0 {
                cut.push(profile);
                whole.push(seconds);
            }
        }
        let graph = self.executor().graph();
        let position = u32::try_from(state.position() - 1).unwrap_or(0);
        let cost = self.decode_cost(position)?;
        let profile = Profile::median(&cut);
        let bytes = cost.total.memory_bytes();
        let launches = match noted {
            Some((state, tokens)) => self.launches(state, &tokens, bytes, options)?,
            None => None,
        };
        Ok(ModelProfile {
            report: ProfileReport::new(graph, &cost, &profile, options.bandwidth),
            step_seconds: median(&mut whole),
            position,
            dtype: self.dtype_name(),
            device: self.device_name(),
            svg: profile.svg(graph, &cost),
            launches,
            profile,
        })
    }

    /// The launches of the steps that `tokens` are fed to, two for each that is timed, and undisturbed decode of the same
    /// length.
    fn launches(
        &self,
        mut state: State,
        tokens: &[u32],
        bytes: u64,
        options: &ProfileOptions,
    ) -> Result<Option<LaunchProfile>, GraphError> {
        let noted = tokens.get(..=options.steps).unwrap_or(tokens);
        let Some(&first) = noted.first() else { return Ok(None) };
        let mut undisturbed = state.clone();
        let timeline = self.executor().timeline(noted, &mut state)?;
        let time = self.executor().decode_time(first, &mut undisturbed, options.steps)?;
        Ok(timeline.zip(time).map(|(timeline, time)| LaunchProfile {
            timeline,
            token_seconds: time.seconds,
            bound: self.device_bandwidth().map(|_| DecodeBound::new(bytes, options.bandwidth, time.seconds)),
        }))
    }
}

fn choosing(source: zmlx_mlx::Error) -> GraphError {
    GraphError::Node { path: "output".to_owned(), op: "argmax", source }
}

/// The likeliest token after the last position, `[1, 1]`, computed. The state is computed with it.
fn likeliest(logits: &Array, state: &State) -> Result<Array, GraphError> {
    let length = logits.dim(1).map_err(choosing)?;
    let token =
        logits.slice_axis(1, length - 1, length).and_then(|last| last.argmax(-1, false)).map_err(choosing)?;
    let token = token.astype(Dtype::Uint32).map_err(choosing)?;
    zmlx_mlx::eval(&[&token].into_iter().chain(state.arrays()).collect::<Vec<_>>()).map_err(choosing)?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_the_time_of_the_bytes() {
        // 0.5 GB at 2 TB/s are 0.25 ms, a quarter of a token of 1 ms.
        let bound = DecodeBound::new(500_000_000, 2e12, 1e-3);
        assert!((bound.seconds - 0.25e-3).abs() < 1e-12 && (bound.share - 0.25).abs() < 1e-9, "{bound:?}");
        assert_eq!(DecodeBound::new(1, 2e12, 0.0).share, 0.0);
    }
}
