//! The largest logit, and what follows a decoded token.

use super::{KernelError, Launch, MULTIPROCESSORS, Operands, Prelude, Source, Type, size};

pub(super) const ARGMAX: &str = include_str!("argmax.cuh");
const TEXT: &str = include_str!("argmax.cu");
const NAME: &str = "zmlx_argmax";

/// What follows a decoded token, on the device: it is stored where the next step's embedding reads it, appended to a ring
/// that the host reads, and the position goes on by one.
///
/// The largest logit decides, the lowest index of equals; NaN ranks below all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    /// Steps that the ring has room for.
    pub ring: usize,
}

/// Addresses for [`Next`].
#[derive(Debug, Clone, Copy, Default)]
pub struct NextOperands {
    /// `[tokens]` 64-bit integers that are zero before the first launch; each launch leaves them so.
    pub best: u64,
    /// A 32-bit counter of the same kind.
    pub arrived: u64,
    /// `[tokens]`, 32-bit: the tokens.
    pub tokens: u64,
    /// The position, int32.
    pub position: u64,
    /// `[ring, tokens]`, 32-bit, in memory that the host reads: step `n` is in row `n % ring`.
    pub ring: u64,
    /// Steps so far, 32-bit, in device memory.
    pub count: u64,
    /// The same in memory that the host reads, stored after the step's row of the ring.
    pub published: u64,
}

impl Next {
    pub(super) fn check(&self, kernel: &'static str, tokens: usize) -> Result<(), KernelError> {
        size(kernel, "steps of the ring", self.ring, (1..=1 << 20).contains(&self.ring), "1 to 2^20")?;
        size(kernel, "rows", tokens, (1..=8).contains(&tokens), "1 to 8")
    }

    pub(super) fn operands(to: &mut Operands, o: &NextOperands) -> &'static str {
        to.write("best", Type::U64, o.best).write("arrived", Type::U32, o.arrived);
        to.write("tokens", Type::U32, o.tokens).write("position", Type::I32, o.position);
        to.write("ring", Type::U32, o.ring).write("count", Type::U32, o.count);
        to.write("published_count", Type::U32, o.published);
        "Next{reinterpret_cast<u64*>(best), arrived, tokens, position, ring, count, published_count}"
    }
}

/// [`Next`] from logits `[tokens, width]` that are there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argmax {
    /// Logits a row.
    pub width: usize,
    /// Rows: sequences.
    pub tokens: usize,
    /// What follows.
    pub next: Next,
}

impl Argmax {
    fn check(&self) -> Result<(), KernelError> {
        size(NAME, "logits", self.width, (1..1 << 30).contains(&self.width), "1 to 2^30")?;
        self.next.check(NAME, self.tokens)
    }

    fn operands(&self, logits: u64, o: &NextOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("logits", Type::F32, logits);
        let next = Next::operands(&mut to, o);
        (to, format!("argmax(logits, {next});"))
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        prelude.int("WIDTH", self.width).int("TOKENS", self.tokens).int("RING", self.next.ring);
        let (operands, body) = self.operands(0, &NextOperands::default());
        let device = prelude.with(&[ARGMAX, TEXT]);
        Ok(Source { name: NAME, params: operands.params, device, body, bounds: [256, 2] })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn launch(&self, logits: u64, o: &NextOperands) -> Result<Launch, KernelError> {
        self.check()?;
        Ok(Launch {
            grid: [(self.width.div_ceil(1024) as u32).min(MULTIPROCESSORS), 1, 1],
            block: [256, 1, 1],
            shared: 0,
            args: self.operands(logits, o).0.args,
            bytes: (4 * self.width * self.tokens) as u64,
        })
    }
}
