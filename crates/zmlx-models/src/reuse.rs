//! What of a prompt a session need not process again.

use zmlx_graph::{Keep, SavedState};

use crate::error::GenerateError;
use crate::generate::Session;

/// Most checkpoints of a session.
const MOST: usize = 8;

/// Copies of the slots that cannot go back, at earlier positions; the oldest go first when there are too many.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    /// By position.
    kept: Vec<SavedState>,
    /// Most bytes of all of them; none are kept while it is 0.
    limit: usize,
}

impl Checkpoints {
    pub(crate) fn limited(limit: usize, kept: Vec<SavedState>) -> Self {
        let mut all = Self { kept: Vec::new(), limit };
        kept.into_iter().for_each(|checkpoint| all.push(checkpoint));
        all
    }

    pub(crate) fn clear(&mut self) {
        self.kept.clear();
    }

    pub(crate) fn kept(&self) -> &[SavedState] {
        &self.kept
    }

    pub(crate) fn bytes(&self) -> usize {
        self.kept.iter().map(SavedState::bytes).sum()
    }

    fn push(&mut self, checkpoint: SavedState) {
        // One of this position, or of positions that come after it, is of another continuation.
        self.kept.retain(|c| c.position < checkpoint.position);
        self.kept.push(checkpoint);
        while self.kept.len() > MOST || self.bytes() > self.limit {
            self.kept.remove(0);
        }
    }

    /// The last that is not beyond `position`.
    fn before(&self, position: usize) -> Option<&SavedState> {
        self.kept.iter().rfind(|c| c.position as usize <= position)
    }

    fn forget_after(&mut self, position: usize) {
        self.kept.retain(|c| c.position as usize <= position);
    }
}

impl Session<'_> {
    /// From now on keeps copies of states of convolutions and delta nets and of sliding windows, at the end of each prompt
    /// and where [`Self::expect_prefix`] says, so that a prompt that parts from what was seen after such a place goes on
    /// from there. There are up to eight, of `bytes` bytes together at most; the oldest go first. With 0 bytes, none. Models
    /// whose caches are all keys and values need none.
    pub fn keep_checkpoints(&mut self, bytes: usize) {
        let kept = self.checkpoints.kept().to_vec();
        self.checkpoints = Checkpoints::limited(bytes, kept);
    }

    /// Says that the prompt after the next one is likely to share that many tokens with it, and no more: a checkpoint is
    /// kept there too. A chat template may begin a reply in a way that it does not repeat in the next turn.
    pub fn expect_prefix(&mut self, tokens: usize) {
        self.expected = Some(tokens);
    }

    /// Bytes of the checkpoints kept.
    pub fn checkpoint_bytes(&self) -> usize {
        self.checkpoints.bytes()
    }

    /// The tokens that the caches hold.
    pub fn seen(&self) -> &[u32] {
        &self.seen
    }

    /// How many tokens of `prompt` [`Self::generate`] would not process again.
    pub fn reusable(&self, prompt: &[u32]) -> usize {
        let shared = self.shared(prompt);
        let executor = self.model.executor();
        if executor.rewinds_to(&self.state, shared as i32) {
            return shared;
        }
        self.checkpoints.before(shared).map_or(0, |c| c.position as usize)
    }

    /// Tokens that `prompt` begins with and that were seen, but for its last, whose logits are needed.
    fn shared(&self, prompt: &[u32]) -> usize {
        let same = prompt.iter().zip(&self.seen).take_while(|(a, b)| a == b).count();
        same.min(prompt.len().saturating_sub(1))
    }

    /// Brings the state to where `prompt` parts from what was seen, or to the last place before it that it can go back to;
    /// gives the number of tokens that are left.
    pub(crate) fn go_back(&mut self, prompt: &[u32]) -> Result<usize, GenerateError> {
        let shared = self.shared(prompt);
        let executor = self.model.executor();
        if !executor.rewind(&mut self.state, shared as i32)? {
            let Some(checkpoint) = self.checkpoints.before(shared) else {
                self.reset();
                return Ok(0);
            };
            executor.restore(&mut self.state, checkpoint)?;
        }
        let left = self.state.position() as usize;
        self.seen.truncate(left);
        self.checkpoints.forget_after(left);
        Ok(left)
    }

    /// Where prefill of a prompt that ends at `end` is to keep checkpoints: in order.
    pub(crate) fn stops(&mut self, end: usize) -> Vec<usize> {
        let expected = self.expected.take().filter(|&at| at > 0 && at < end);
        if self.checkpoints.limit == 0 || !self.model.executor().needs_checkpoints() {
            return Vec::new();
        }
        expected.into_iter().chain([end]).collect()
    }

    pub(crate) fn keep_checkpoint(&mut self) -> Result<(), GenerateError> {
        let checkpoint = self.model.executor().save(&mut self.state, Keep::Unrewindable)?;
        self.checkpoints.push(checkpoint);
        Ok(())
    }
}
