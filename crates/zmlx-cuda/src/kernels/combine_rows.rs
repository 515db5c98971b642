//! What experts gave for many tokens, weighted and added.

use super::{Float, KernelError, Launch, Operands, Prelude, Source, Type, aligned, size};

const NAME: &str = "zmlx_combine_rows";
const TEXT: &str = include_str!("combine_rows.cu");

/// `out[t] = sum over c of scores[t, c] * rows[order[t, c]]`.
///
/// `rows` is `[tokens * choices, columns]` in a float of 16 bits, `order` and `scores` are `[tokens, choices]`, `out` is
/// `[tokens, columns]`. Scores and result are float32 or have the rows' float. Sums are float32, in the order of choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CombineRows {
    /// Rows of a token.
    pub choices: usize,
    /// Elements of a row.
    pub columns: usize,
    /// Floats of the rows.
    pub rows: Float,
    /// Whether scores are float32.
    pub wide_scores: bool,
    /// Whether the result is float32.
    pub wide_out: bool,
}

/// Addresses for [`CombineRows`], those of rows and result aligned to 16 bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct CombineRowsOperands {
    /// What the experts gave.
    pub rows: u64,
    /// Where a token's rows are, 32-bit unsigned.
    pub order: u64,
    /// Their weights.
    pub scores: u64,
    /// The result.
    pub out: u64,
    /// How many tokens.
    pub tokens: usize,
}

impl CombineRows {
    /// Threads of a block.
    pub fn threads(&self) -> usize {
        (self.columns / 8).next_multiple_of(32).clamp(32, 256)
    }

    fn check(&self) -> Result<(), KernelError> {
        size(NAME, "choices", self.choices, (1..=16).contains(&self.choices), "1 to 16")?;
        let good = self.columns > 0 && self.columns.is_multiple_of(8) && self.columns < 1 << 24;
        size(NAME, "columns", self.columns, good, "a multiple of 8 below 2^24")?;
        size(NAME, "bytes of a row's float", self.rows.size(), self.rows != Float::F32, "2")
    }

    fn operands(&self, o: &CombineRowsOperands) -> Operands {
        let ty = |wide: bool| if wide { Type::F32 } else { Type::U16 };
        let mut to = Operands::default();
        to.read("rows", Type::U16, o.rows).read("order", Type::U32, o.order);
        to.read("scores", ty(self.wide_scores), o.scores).write("out", ty(self.wide_out), o.out);
        to
    }

    /// The text.
    ///
    /// # Errors
    /// [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        prelude.int("CHOICES", self.choices).int("COLUMNS", self.columns).int("THREADS", self.threads());
        prelude.int("ROW_FLOAT", self.rows.kind());
        let ty = |wide: bool| if wide { "float" } else { "u16" };
        // Floats of 16 bits have another type where MLX writes the signature.
        let body = format!(
            "combine_rows(reinterpret_cast<const u16*>(rows), order, reinterpret_cast<const {}*>(scores), \
             reinterpret_cast<{}*>(out));",
            ty(self.wide_scores),
            ty(self.wide_out)
        );
        let params = self.operands(&CombineRowsOperands::default()).params;
        Ok(Source {
            name: NAME,
            params,
            device: prelude.with(&[TEXT]),
            body,
            bounds: [self.threads() as u32, 1],
        })
    }

    /// A launch.
    ///
    /// # Errors
    /// [`KernelError`] for operands that are misaligned, and more tokens than there can be blocks.
    pub fn launch(&self, o: &CombineRowsOperands) -> Result<Launch, KernelError> {
        self.check()?;
        size(NAME, "tokens", o.tokens, (1..1 << 23).contains(&o.tokens), "1 to 2^23 - 1")?;
        aligned(NAME, "rows", o.rows, 16)?;
        aligned(NAME, "the result", o.out, 16)?;
        Ok(Launch {
            grid: [o.tokens as u32, 1, 1],
            block: [self.threads() as u32, 1, 1],
            shared: 0,
            args: self.operands(o).args,
            bytes: 0,
        })
    }
}
