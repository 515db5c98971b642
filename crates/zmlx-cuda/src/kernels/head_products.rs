//! Products of heads, each of which has a matrix of its own.

use super::product::Work;
use super::{
    FORMAT, Format, KernelError, LatentAttend, Launch, MULTIPROCESSORS, Operands, PRODUCT, Plan, Planned,
    Prelude, SHARED_MOST, Source, Type, Weights, aligned, given, size,
};

const NAME: &str = "zmlx_head_products";
const TEXT: &str = include_str!("head_products.cu");

/// Where the rows of heads are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadRows {
    /// Rows that lie so many floats from token to token and from head to head.
    Rows([usize; 2]),
    /// Parts of attention over latents, so many a row.
    Parts(usize),
}

/// `out[t, h] = w[h] @ x[t, h]`, all float32 but the matrices `[heads, rows, columns]`; `out` is `[tokens, heads * rows]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadProducts {
    /// Heads.
    pub heads: usize,
    /// Rows of a head's matrix.
    pub rows: usize,
    /// Columns of it.
    pub columns: usize,
    /// How the matrices lie in memory.
    pub format: Format,
    /// Tokens, 1 to 8.
    pub tokens: usize,
    /// Where x is.
    pub x: HeadRows,
    /// How a head's product is cut.
    pub plan: Plan,
}

/// Addresses for [`HeadProducts`].
#[derive(Debug, Clone, Copy, Default)]
pub struct HeadProductsOperands {
    /// Rows, or parts; aligned to 16 bytes.
    pub x: u64,
    /// What the parts count, where they are parts.
    pub stats: Option<u64>,
    /// The matrices.
    pub weights: Weights,
    /// The result.
    pub out: u64,
}

impl Planned for HeadProducts {
    fn plan_mut(&mut self) -> &mut Plan {
        &mut self.plan
    }
}

impl HeadProducts {
    /// Of rows `[tokens, heads, columns]`.
    pub fn new(heads: usize, [rows, columns]: [usize; 2], format: Format, tokens: usize) -> Self {
        let odd = format.odd(heads * rows, columns);
        let all =
            Work { rows: heads * rows, columns, parts: 1, tokens, paired: false, late: false, odd, format };
        let mut plan = Plan::new(all);
        // As many blocks a head as there are multiprocessors for it, with alike many rows.
        let blocks = (MULTIPROCESSORS as usize / heads.max(1)).max(1);
        let made = 32 / plan.lanes * plan.rows;
        let groups = rows.div_ceil(blocks).div_ceil(made).clamp(1, (16 / plan.split).max(1));
        plan.warps = plan.split * groups;
        let tiles = heads * rows.div_ceil(plan.tile(false));
        plan.resident = tiles.div_ceil(MULTIPROCESSORS as usize).clamp(1, (32 / plan.warps).max(1));
        let plan = plan.as_deep_as_fits(Work { rows, ..all });
        Self { heads, rows, columns, format, tokens, x: HeadRows::Rows([heads * columns, columns]), plan }
    }

    /// The same of what attention leaves, put together on the way.
    pub fn of_parts(self, attention: &LatentAttend) -> Self {
        Self { x: HeadRows::Parts(attention.splits), ..self }
    }

    fn work(&self) -> Work {
        let Self { heads, rows, columns, format, tokens, .. } = *self;
        let odd = format.odd(heads * rows, columns);
        Work { rows, columns, parts: 1, tokens, paired: false, late: false, odd, format }
    }

    fn splits(&self) -> usize {
        if let HeadRows::Parts(splits) = self.x { splits } else { 0 }
    }

    fn check(&self) -> Result<(), KernelError> {
        self.format.check(NAME, self.columns)?;
        size(NAME, "columns", self.columns, self.columns.is_multiple_of(4), "a multiple of 4")?;
        size(NAME, "rows", self.rows, (1..1 << 20).contains(&self.rows), "1 to 2^20")?;
        size(NAME, "heads", self.heads, (1..=65535).contains(&self.heads), "1 to 65535")?;
        size(NAME, "tokens", self.tokens, (1..=8).contains(&self.tokens), "1 to 8")?;
        match self.x {
            HeadRows::Rows(strides) => {
                for stride in strides {
                    size(
                        NAME,
                        "floats from row to row",
                        stride,
                        stride.is_multiple_of(4),
                        "a multiple of 4",
                    )?;
                }
            }
            HeadRows::Parts(splits) => {
                size(NAME, "parts", splits, (1..=256).contains(&splits), "1 to 256")?;
            }
        }
        self.plan.check(NAME, false)
    }

    /// Floats of shared memory of the product, and of all.
    fn shared(&self) -> Result<[usize; 2], KernelError> {
        let product = self.plan.shared(self.work(), NAME)?.next_multiple_of(16) as usize / 4;
        let quads = self.columns / 4;
        let groups = if self.splits() == 0 { 0 } else { (32 * self.plan.warps / quads).max(1) };
        let all = product + self.tokens * (groups * self.columns + self.splits());
        if 4 * all > SHARED_MOST {
            return Err(KernelError::Shared { kernel: NAME, got: 4 * all, most: SHARED_MOST });
        }
        Ok([product, all])
    }

    fn operands(&self, o: &HeadProductsOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("x", Type::F32, o.x);
        if self.splits() > 0 {
            to.read("stats", Type::F32, o.stats.unwrap_or(0));
        }
        let matrix = self.format.operands(&mut to, ["codes", "scales", "biases"], &o.weights);
        to.write("out", Type::F32, o.out);
        let body = format!("head_products(x, {}, {matrix}, out);", to.name("stats"));
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.plan.constants(self.work(), None, &mut prelude);
        let [token, head] = if let HeadRows::Rows(strides) = self.x { strides } else { [0; 2] };
        prelude.int("HEADS", self.heads).int("ROWS", self.rows).int("SPLITS", self.splits());
        prelude.int("X_TOKEN", token).int("X_HEAD", head).int("MIXED_AT", self.shared()?[0]);
        let (operands, body) = self.operands(&HeadProductsOperands::default());
        let device = prelude.with(&[FORMAT, PRODUCT, TEXT]);
        let bounds = self.plan.bounds(self.tokens);
        Ok(Source { name: NAME, params: operands.params, device, body, bounds })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing, too many or misaligned.
    pub fn launch(&self, o: &HeadProductsOperands) -> Result<Launch, KernelError> {
        self.check()?;
        given(NAME, "what the parts count", self.splits() > 0, &o.stats)?;
        aligned(NAME, "x", o.x, 16)?;
        aligned(NAME, "what the parts count", o.stats.unwrap_or(0), 16)?;
        o.weights.check(NAME, self.work())?;
        let tiles = self.rows.div_ceil(self.plan.tile(false));
        let most = (MULTIPROCESSORS as usize * self.plan.resident / self.heads).max(1);
        Ok(Launch {
            grid: [tiles.div_ceil(tiles.div_ceil(most)) as u32, self.heads as u32, 1],
            block: [32 * self.plan.warps as u32, 1, 1],
            shared: 4 * self.shared()?[1] as u32,
            args: self.operands(o).0.args,
            bytes: (self.heads * self.rows * self.format.row_bytes(self.columns)) as u64,
        })
    }
}
