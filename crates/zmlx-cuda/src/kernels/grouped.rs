//! Products of many rows with the matrices of their experts, on tensor cores.

use super::{
    Float, Format, KernelError, Launch, MULTIPROCESSORS, Operands, Prelude, SHARED_MOST, Source, Type,
    Weights, aligned, size,
};

const NAME: &str = "zmlx_grouped";
const TEXT: &str = include_str!("grouped.cu");
/// Columns of a step.
const STEP: usize = 64;
/// Registers of a multiprocessor, and those of a thread beside its sums.
const REGISTERS: usize = 1 << 16;
const BESIDE_SUMS: usize = 92;

/// How the work of [`Grouped`] is cut into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Warps side by side over the outputs, 32 outputs each.
    pub out_warps: usize,
    /// Warps side by side over the rows.
    pub token_warps: usize,
    /// Rows of a warp, a multiple of 32.
    pub tokens: usize,
    /// Steps of 64 columns that are in shared memory at once.
    pub stages: usize,
}

impl Tile {
    /// One that suits so many rows an expert.
    pub fn new(rows_an_expert: usize) -> Self {
        let tokens = if rows_an_expert > 48 { 128 } else { 64 };
        Self { out_warps: 4, token_warps: 1, tokens, stages: 4 }
    }

    /// Outputs of a block.
    pub fn outputs(&self) -> usize {
        32 * self.out_warps
    }

    /// Rows of a block.
    pub fn rows(&self) -> usize {
        self.tokens * self.token_warps
    }

    /// Threads of a block.
    pub fn threads(&self) -> usize {
        32 * self.out_warps * self.token_warps
    }
}

/// `out[r] = x[r] @ w[experts[r]].T` for rows in the order of their experts.
///
/// `x` is `[rows, columns]` and `out` `[rows, outputs]`, both in the float of 16 bits that scales and biases have;
/// `experts` is `[rows]`, ascending and below the number of experts; `w` is `[experts, outputs, columns]` as MLX packs it
/// (affine, 4 or 8 bits). Codes become floats of 16 bits, `scale * q + bias` rounded once; sums are float32, in one order.
///
/// The text has no number of rows in it: a launch says it, and blocks find the rows of each expert themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grouped {
    /// Matrices.
    pub experts: usize,
    /// Rows of a matrix.
    pub outputs: usize,
    /// Columns of a matrix.
    pub columns: usize,
    /// How the matrices lie in memory.
    pub format: Format,
    /// How it is cut.
    pub tile: Tile,
}

/// Addresses for [`Grouped`], each aligned to 16 bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct GroupedOperands {
    /// Activations.
    pub x: u64,
    /// The expert of each row, 32-bit unsigned.
    pub experts: u64,
    /// The matrices.
    pub weights: Weights,
    /// The result.
    pub out: u64,
    /// How many rows.
    pub rows: usize,
}

impl Grouped {
    /// Bits, group and float of a format that it is made for.
    fn affine(&self) -> Result<(u32, usize, Float), KernelError> {
        match self.format {
            Format::Affine {
                bits: bits @ (4 | 8),
                group: group @ (32 | 64 | 128),
                scales: scales @ (Float::Bf16 | Float::F16),
            } => Ok((bits, group, scales)),
            Format::Affine { bits, .. } => {
                let must = "4 or 8, in groups of 32, 64 or 128 with scales of 16 bits".to_owned();
                Err(KernelError::Size { kernel: NAME, what: "bits of a code", got: bits as usize, must })
            }
            _ => {
                let must = "1 or more: only affine codes are taken".to_owned();
                Err(KernelError::Size { kernel: NAME, what: "scales with biases", got: 0, must })
            }
        }
    }

    fn check(&self) -> Result<(u32, usize, Float), KernelError> {
        let (bits, group, float) = self.affine()?;
        let step = STEP.max(group);
        let good = self.columns > 0 && self.columns.is_multiple_of(step);
        size(NAME, "columns", self.columns, good, format!("a multiple of {step}"))?;
        let good = self.outputs.is_multiple_of(32) && (1..1 << 24).contains(&self.outputs);
        size(NAME, "outputs", self.outputs, good, "a multiple of 32 up to 2^24")?;
        size(NAME, "experts", self.experts, (1..=4096).contains(&self.experts), "1 to 4096")?;
        let t = self.tile;
        let warps = t.out_warps * t.token_warps;
        size(NAME, "warps of a block", warps, (1..=16).contains(&warps), "1 to 16")?;
        // 32 outputs of so many rows are as many sums a thread.
        let good = t.tokens > 0 && t.tokens.is_multiple_of(32) && t.tokens <= 128;
        size(NAME, "rows of a warp", t.tokens, good, "32, 64, 96 or 128")?;
        size(NAME, "stages", t.stages, (2..=8).contains(&t.stages), "2 to 8")?;
        let alike = (t.outputs() * bits as usize / 2).is_multiple_of(t.threads())
            && (t.rows() * 8).is_multiple_of(t.threads());
        size(NAME, "threads of a block", t.threads(), alike, "a divisor of the 16-byte pieces of a stage")?;
        Ok((bits, group, float))
    }

    /// Bytes of dynamic shared memory of a block.
    ///
    /// # Errors
    /// [`KernelError`] for shapes that it is not made for, and stages that are too many.
    pub fn shared(&self) -> Result<usize, KernelError> {
        let (bits, ..) = self.check()?;
        let stage = self.tile.outputs() * STEP * bits as usize / 8 + self.tile.rows() * STEP * 2;
        let got = self.tile.stages * stage + 2 * 4 * (self.experts + 1);
        if got > SHARED_MOST {
            return Err(KernelError::Shared { kernel: NAME, got, most: SHARED_MOST });
        }
        Ok(got)
    }

    /// Blocks that a launch of so many rows takes: as many as there are shares, or as run at once.
    ///
    /// # Errors
    /// As [`Self::shared`].
    pub fn blocks(&self, rows: usize) -> Result<usize, KernelError> {
        // A multiprocessor has 228 KiB, of which a block takes 1 for itself.
        let by_memory = (228 << 10) / (self.shared()? + 1024);
        let by_registers = REGISTERS / ((self.tile.tokens + BESIDE_SUMS) * self.tile.threads());
        let resident = by_memory.min(by_registers).max(1);
        let shares = rows.div_ceil(self.tile.rows()) + self.experts.min(rows);
        let shares = shares * self.outputs.div_ceil(self.tile.outputs());
        Ok(shares.clamp(1, resident * MULTIPROCESSORS as usize))
    }

    fn operands(&self, float: Float, o: &GroupedOperands) -> Operands {
        let mut to = Operands::default();
        to.read("x", float.ty(), o.x).read("experts", Type::U32, o.experts);
        to.read("codes", Type::U32, o.weights.codes);
        to.read("scales", float.ty(), o.weights.scales).read("biases", float.ty(), o.weights.biases);
        // How many rows: a launch of MLX has it from the shape of `experts`.
        to.number("rows", o.rows as i32).write("out", float.ty(), o.out);
        to
    }

    /// The text.
    ///
    /// # Errors
    /// [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        let (bits, group, float) = self.check()?;
        let mut prelude = Prelude::default();
        prelude.int("FLOAT", float.kind()).int("BITS", bits).int("GROUP", group);
        prelude.int("EXPERTS", self.experts).int("OUTPUTS", self.outputs).int("COLUMNS", self.columns);
        let t = self.tile;
        prelude.int("OUT_WARPS", t.out_warps).int("TOKEN_WARPS", t.token_warps);
        prelude.int("TOKENS", t.tokens).int("STAGES", t.stages);
        // Floats of 16 bits have another type where MLX writes the signature.
        let body = "auto u = [](const void* p) { return static_cast<const u16*>(p); }; grouped(u(x), experts, codes, \
                    u(scales), u(biases), reinterpret_cast<u16*>(out), rows);";
        Ok(Source {
            name: NAME,
            params: self.operands(float, &GroupedOperands::default()).params,
            device: prelude.with(&[TEXT]),
            body: body.to_owned(),
            bounds: [t.threads() as u32, 1],
        })
    }

    /// A launch.
    ///
    /// # Errors
    /// [`KernelError`] for operands that are misaligned, and more rows than 32 bits count.
    pub fn launch(&self, o: &GroupedOperands) -> Result<Launch, KernelError> {
        let (.., float) = self.check()?;
        size(NAME, "rows of x", o.rows, (1..1 << 31).contains(&o.rows), "1 to 2^31 - 1")?;
        for (what, address) in [("x", o.x), ("the codes", o.weights.codes), ("the result", o.out)] {
            aligned(NAME, what, address, 16)?;
        }
        Ok(Launch {
            grid: [self.blocks(o.rows)? as u32, 1, 1],
            block: [self.tile.threads() as u32, 1, 1],
            shared: self.shared()? as u32,
            args: self.operands(float, o).args,
            bytes: (self.experts * self.outputs * self.format.row_bytes(self.columns)) as u64,
        })
    }
}
