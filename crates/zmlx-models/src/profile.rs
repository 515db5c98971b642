use std::time::Instant;

use serde::Serialize;
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
    /// Bytes a second that memory moves.
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
    /// Seconds of each node.
    #[serde(skip)]
    pub profile: Profile,
    /// The picture, as SVG.
    #[serde(skip)]
    pub svg: String,
}

impl Model {
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
        for step in 0..=options.steps {
            let token = likeliest(&logits, &state)?;
            let (out, profile) = self.executor().profile(&token, &mut state)?;
            let token = likeliest(&out, &state)?;
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
        Ok(ModelProfile {
            report: ProfileReport::new(graph, &cost, &profile, options.bandwidth),
            step_seconds: median(&mut whole),
            position,
            dtype: self.dtype_name(),
            device: self.device_name(),
            svg: profile.svg(graph, &cost),
            profile,
        })
    }
}

/// The likeliest token after the last position, `[1, 1]`, computed. The state is computed with it.
fn likeliest(logits: &Array, state: &State) -> Result<Array, GraphError> {
    let at = |source| GraphError::Node { path: "output".to_owned(), op: "argmax", source };
    let length = logits.dim(1).map_err(at)?;
    let token =
        logits.slice_axis(1, length - 1, length).and_then(|last| last.argmax(-1, false)).map_err(at)?;
    let token = token.astype(Dtype::Uint32).map_err(at)?;
    zmlx_mlx::eval(&[&token].into_iter().chain(state.arrays()).collect::<Vec<_>>()).map_err(at)?;
    Ok(token)
}
