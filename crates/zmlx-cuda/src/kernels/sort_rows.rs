//! Rows sorted by expert.

use super::{KernelError, Launch, Operands, Prelude, Source, Type, size};

const NAME: &str = "zmlx_sort_rows";
const TEXT: &str = include_str!("sort_rows.cu");
const WARPS: usize = 32;

/// The choices of many tokens in the order of experts; what is equal stays in the order in which it was.
///
/// `chosen` is `[rows]`, `choices` of them a token, each below the number of experts. Of row `r` of the sorted ones `tokens[r]`
/// is the token and `experts[r]` the expert; `places[i]` is the row that choice `i` became. All are 32-bit unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SortRows {
    /// How many experts there are.
    pub experts: usize,
    /// Choices of a token.
    pub choices: usize,
}

/// Addresses for [`SortRows`].
#[derive(Debug, Clone, Copy, Default)]
pub struct SortRowsOperands {
    /// The experts of each token.
    pub chosen: u64,
    /// The token of each sorted row.
    pub tokens: u64,
    /// The expert of each sorted row.
    pub experts: u64,
    /// The sorted row of each choice.
    pub places: u64,
    /// How many choices.
    pub rows: usize,
}

impl SortRows {
    /// Threads of a block, of which there is one an expert.
    pub fn threads(&self) -> usize {
        32 * WARPS
    }

    fn check(&self) -> Result<(), KernelError> {
        size(NAME, "experts", self.experts, (1..=4096).contains(&self.experts), "1 to 4096")?;
        size(NAME, "choices", self.choices, (1..=4096).contains(&self.choices), "1 to 4096")
    }

    fn operands(o: &SortRowsOperands) -> Operands {
        let mut to = Operands::default();
        // How many rows: a launch of MLX has it from the shape of `chosen`.
        to.read("chosen", Type::U32, o.chosen).number("rows", o.rows as i32);
        to.write("tokens", Type::U32, o.tokens).write("experts", Type::U32, o.experts);
        to.write("places", Type::U32, o.places);
        to
    }

    /// The text.
    ///
    /// # Errors
    /// [`KernelError`] for sizes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        prelude.int("CHOICES", self.choices).int("WARPS", WARPS).int("THREADS", self.threads());
        Ok(Source {
            name: NAME,
            params: Self::operands(&SortRowsOperands::default()).params,
            device: prelude.with(&[TEXT]),
            body: "sort_rows(chosen, tokens, experts, places, rows);".to_owned(),
            bounds: [self.threads() as u32, 1],
        })
    }

    /// A launch.
    ///
    /// # Errors
    /// [`KernelError`] for sizes that it is not made for.
    pub fn launch(&self, o: &SortRowsOperands) -> Result<Launch, KernelError> {
        self.check()?;
        size(NAME, "rows", o.rows, (1..1 << 30).contains(&o.rows), "1 to 2^30 - 1")?;
        Ok(Launch {
            grid: [self.experts as u32, 1, 1],
            block: [self.threads() as u32, 1, 1],
            shared: 0,
            args: Self::operands(o).args,
            bytes: 0,
        })
    }
}
