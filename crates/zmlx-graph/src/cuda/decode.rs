//! What an executor decodes past MLX without logits coming back, and how its launches are watched.

use std::sync::atomic::Ordering;

use super::{Decoded, LaunchMoments, LaunchTime};
use crate::error::{GraphError, Result};
use crate::exec::Executor;
use crate::state::State;

impl Executor {
    /// The GPU that calls of one token run on past MLX, if they do.
    pub fn cuda_device(&self) -> Option<&zmlx_cuda::DeviceInfo> {
        self.gpu.as_ref().map(|gpu| gpu.decoder.device().info())
    }

    /// Goes on from `token` with the likeliest tokens, `count` at most, without logits leaving the GPU: each is told to
    /// `tell` while the next is under way, and `tell` says whether to go on. `None` if calls of one token run on MLX or the
    /// engine.
    ///
    /// # Errors
    /// Those of `tell`; [`GraphError::Cuda`]. The state is of no use after one.
    pub fn decode<E: From<GraphError>>(
        &self,
        token: u32,
        state: &mut State,
        count: usize,
        mut tell: impl FnMut(u32) -> std::result::Result<bool, E>,
    ) -> std::result::Result<Option<Decoded>, E> {
        if state.batch.is_some_and(|batch| batch != 1) {
            return Ok(None);
        }
        self.decode_batch(&[token], state, count, |tokens| tokens.iter().try_fold(true, |_, &id| tell(id)))
    }

    /// The same of a batch of equally long sequences, from a token of each: those chosen in a step are told together. `None`
    /// also if so many sequences run on MLX. The first step of as many compiles their kernels.
    ///
    /// # Errors
    /// As [`Self::decode`]; [`GraphError::WrongBatch`] for a state of another number of sequences.
    pub fn decode_batch<E: From<GraphError>>(
        &self,
        tokens: &[u32],
        state: &mut State,
        count: usize,
        tell: impl FnMut(&[u32]) -> std::result::Result<bool, E>,
    ) -> std::result::Result<Option<Decoded>, E> {
        let Some(gpu) = self.gpu.as_ref().filter(|gpu| gpu.decoder.takes(tokens.len())) else {
            return Ok(None);
        };
        self.check_state(state)?;
        self.check_batch(tokens.len() as i32, state)?;
        let decoded = gpu.decode(tokens, state, count, tell)?;
        self.runs.fetch_add(decoded.fed as u64, Ordering::Relaxed);
        Ok(Some(decoded))
    }

    /// The launches that `token` takes on a GPU past MLX, one after another and each timed; none if calls of one token run
    /// on MLX or the engine. The state has seen the token after it.
    ///
    /// # Errors
    /// [`GraphError::Cuda`]; [`GraphError::WrongBatch`] for a state of several sequences.
    pub fn launch_times(&self, token: u32, state: &mut State) -> Result<Vec<LaunchTime>> {
        self.check_state(state)?;
        self.check_batch(1, state)?;
        match &self.gpu {
            Some(gpu) => Ok(gpu.timed_step(&[token], state)?.1),
            None => Ok(Vec::new()),
        }
    }

    /// When the launches that `token` takes on a GPU past MLX began, waited and ended, in the step as it always runs; none
    /// if calls of one token run on MLX or the engine. The state has seen the token after it.
    ///
    /// # Errors
    /// As [`Self::launch_times`].
    pub fn launch_moments(&self, token: u32, state: &mut State) -> Result<Vec<LaunchMoments>> {
        self.check_state(state)?;
        self.check_batch(1, state)?;
        match &self.gpu {
            Some(gpu) => gpu.noted_step(&[token], state),
            None => Ok(Vec::new()),
        }
    }

    /// Brings a state that a GPU's decoder holds back to arrays, as a call of several tokens would.
    ///
    /// # Errors
    /// [`GraphError::Cuda`], [`GraphError::WrongState`] for a state of another executor.
    pub fn settle(&self, state: &mut State) -> Result<()> {
        match &self.gpu {
            Some(gpu) => gpu.settle(state),
            None if state.device.is_some() => Err(GraphError::WrongState),
            None => Ok(()),
        }
    }
}
