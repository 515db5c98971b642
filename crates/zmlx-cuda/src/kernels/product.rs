//! What products with quantised matrices have in common: formats, how work is cut, constants.

use super::{Activation, KernelError, Operands, Prelude, SHARED_MOST, Type, aligned, finite, size};

pub(super) const COMMON: &str = include_str!("common.cuh");
pub(super) const FORMAT: &str = include_str!("format.cuh");
pub(super) const PRODUCT: &str = include_str!("product.cuh");

/// Types of floats in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Float {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl Float {
    /// Bytes of one.
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    pub(super) fn ty(self) -> Type {
        if self == Self::F32 { Type::F32 } else { Type::U16 }
    }

    /// Its name in the text.
    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::F32 => "KIND_F32",
            Self::F16 => "KIND_F16",
            Self::Bf16 => "KIND_BF16",
        }
    }
}

/// How a matrix `[rows, columns]` lies in memory, as MLX stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// `scale * code + bias`, codes of `bits` (4 or 8) in 32-bit words, scale and bias a group of `group` columns.
    Affine {
        /// Bits of a code.
        bits: u32,
        /// Columns that share scale and bias.
        group: usize,
        /// Type of scales and biases.
        scales: Float,
    },
    /// e2m1 codes with an e8m0 scale a group of 32.
    Mxfp4,
    /// Floats.
    Dense(Float),
}

impl Format {
    /// Codes in 16 bytes.
    pub(super) fn codes(self) -> usize {
        match self {
            Self::Affine { bits, .. } => 128 / bits as usize,
            Self::Mxfp4 => 32,
            Self::Dense(float) => 16 / float.size(),
        }
    }

    /// Whether the scales of so many rows end within a word of 32 bits.
    pub(super) fn odd(self, rows: usize, columns: usize) -> bool {
        self.groups(columns).is_some_and(|(bytes, _)| !(rows * bytes).is_multiple_of(4))
    }

    /// Bytes of a row's scales, and how many such rows there are beside the codes; nothing for floats.
    fn groups(self, columns: usize) -> Option<(usize, usize)> {
        match self {
            Self::Affine { group, scales, .. } => Some((columns / group * scales.size(), 2)),
            Self::Mxfp4 => Some((columns / 32, 1)),
            Self::Dense(_) => None,
        }
    }

    /// Bytes of a row with its scales.
    pub fn row_bytes(self, columns: usize) -> usize {
        match self {
            Self::Affine { bits, group, scales } => {
                columns * bits as usize / 8 + 2 * scales.size() * columns / group
            }
            Self::Mxfp4 => columns / 2 + columns / 32,
            Self::Dense(float) => columns * float.size(),
        }
    }

    /// Whether a row of so many columns can be read.
    pub(super) fn check(self, kernel: &'static str, columns: usize) -> Result<(), KernelError> {
        if let Self::Affine { bits, group, .. } = self {
            size(kernel, "bits a weight", bits as usize, bits == 4 || bits == 8, "4 or 8")?;
            size(kernel, "group size", group, group >= 32 && group.is_power_of_two(), "32, 64 or 128")?;
            size(
                kernel,
                "columns",
                columns,
                columns.is_multiple_of(group),
                format!("a multiple of {group}"),
            )?;
        }
        let step = self.codes();
        size(
            kernel,
            "columns",
            columns,
            columns > 0 && columns.is_multiple_of(step),
            format!("a multiple of {step}"),
        )
    }

    pub(super) fn constants(self, prelude: &mut Prelude) {
        let (format, group, scale, scale_kind, dense) = match self {
            Self::Affine { bits, group, scales } => {
                (if bits == 4 { 0 } else { 1 }, group, scales.ty(), scales.kind(), "KIND_F32")
            }
            Self::Mxfp4 => (2, 32, Type::U8, "KIND_F32", "KIND_F32"),
            Self::Dense(Float::F32) => (4, 1, Type::U8, "KIND_F32", "KIND_F32"),
            Self::Dense(float) => (3, 1, Type::U8, "KIND_F32", float.kind()),
        };
        prelude
            .int("FORMAT", format)
            .int("GROUP", group)
            .line(format_args!("using SCALE = {};", scale.cuda()));
        prelude.int("SCALE_KIND", scale_kind).int("DENSE_KIND", dense);
    }

    /// Adds a matrix's operands; the text that stands for it.
    pub(super) fn operands(self, to: &mut Operands, names: [&'static str; 3], weights: &Weights) -> String {
        to.read(names[0], Type::U32, weights.codes);
        let (mut scales, mut biases) = ("nullptr", "nullptr");
        match self {
            Self::Affine { scales: float, .. } => {
                to.read(names[1], float.ty(), weights.scales).read(names[2], float.ty(), weights.biases);
                (scales, biases) = (names[1], names[2]);
            }
            Self::Mxfp4 => {
                to.read(names[1], Type::U8, weights.scales);
                scales = names[1];
            }
            Self::Dense(_) => {}
        }
        format!("Matrix{{{}, {scales}, {biases}}}", names[0])
    }
}

/// Device addresses of a matrix. What its format does not have is not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Weights {
    /// Codes or floats, aligned to 16 bytes.
    pub codes: u64,
    /// Scales.
    pub scales: u64,
    /// Biases of groups.
    pub biases: u64,
}

impl Weights {
    pub(super) fn check(&self, kernel: &'static str, work: Work) -> Result<(), KernelError> {
        aligned(kernel, "a matrix", self.codes, 16)?;
        // Scales are copied by words of 32 bits; rows of whole words are taken to begin with one.
        let whole = work.format.groups(work.columns).is_some_and(|(bytes, _)| bytes.is_multiple_of(4));
        let to = if whole { 4 } else { 1 };
        aligned(kernel, "the scales of a matrix", self.scales, to)?;
        aligned(kernel, "the biases of a matrix", self.biases, to)
    }
}

/// RMS norm over a row of the activations: `x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Added under the root.
    pub eps: f32,
    /// Whether there are weights (float32, one a column).
    pub weight: bool,
}

/// Names the activation between two products, if there is one, for the text.
pub(super) fn activation_constants(
    activation: Option<Activation>,
    kernel: &'static str,
    to: &mut Prelude,
) -> Result<(), KernelError> {
    let (name, alpha, limit) = match activation {
        None => ("ACT_NONE", 0.0, 0.0),
        Some(Activation::Silu) => ("ACT_SILU", 0.0, 0.0),
        Some(Activation::GeluTanh) => ("ACT_GELU_TANH", 0.0, 0.0),
        Some(Activation::GeluErf) => ("ACT_GELU_ERF", 0.0, 0.0),
        Some(Activation::ClampedSwiGlu { alpha, limit }) => ("ACT_CLAMPED", alpha, limit),
    };
    finite(kernel, "alpha", alpha)?;
    finite(kernel, "limit", limit)?;
    to.int("ACTIVATION", name).float("ALPHA", alpha).float("LIMIT", limit);
    Ok(())
}

/// Bytes of shared memory that leave room for a block of the next launch.
const ROOM: usize = 104 << 10;
/// Weights from which on a matrix is worth all of the GPU.
const LARGE: usize = 64 << 20;

/// How a product is cut. The kernels' constructors choose; all fields may be changed to try others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Lanes that share a row: 8, 16 or 32.
    pub lanes: usize,
    /// Rows that a lane works on at once: 1, 2, 4 or 8 (rows of both matrices where there are two).
    pub rows: usize,
    /// Warps that share the columns of a row.
    pub split: usize,
    /// Warps of a block, a multiple of `split`.
    pub warps: usize,
    /// Chunks of columns that are on their way at once.
    pub depth: usize,
    /// Blocks that a multiprocessor holds.
    pub resident: usize,
    /// Whether a block places what x holds once before the launch before is complete, for the sake of the instructions, which are
    /// then at hand when the real rows are there. For blocks that begin early enough.
    pub rehearsed: bool,
}

/// Kernels that have a plan.
pub trait Planned {
    /// How the product is cut.
    fn plan_mut(&mut self) -> &mut Plan;
}

/// What a product is about, as far as its plan goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    /// Rows of the result, of all experts.
    pub rows: usize,
    /// Columns of a matrix.
    pub columns: usize,
    /// Rows of x that one row of the result takes.
    pub parts: usize,
    /// Rows of x that share a matrix.
    pub tokens: usize,
    /// Whether there are two matrices.
    pub paired: bool,
    /// Whether the launch before decides which weights these are.
    pub late: bool,
    /// Whether the scales of a matrix end within a word of 32 bits.
    pub odd: bool,
    pub format: Format,
}

impl Plan {
    /// Lanes by the least waste at the end of a row, then as many rows as there are for every multiprocessor.
    pub(super) fn new(work: Work) -> Self {
        let units = work.columns / work.format.codes();
        let padded = |lanes: usize| units.div_ceil(lanes) * lanes;
        // A row that 32 lanes read at once is worth that some of them idle.
        let least = if (17..=32).contains(&units) { Some(32) } else { None };
        let lanes = least.or([32, 16, 8].into_iter().min_by_key(|&l| padded(l))).unwrap_or(32);
        let rows = if lanes == 32 && work.tokens <= 4 { 4 } else { 2 };
        let chunks = units.div_ceil(lanes) * work.parts;
        let split = if chunks <= 8 {
            chunks
        } else {
            (1..=8).rev().max_by_key(|s| occupancy(chunks, *s)).unwrap_or(8)
        };
        let made = 32 / lanes * rows / if work.paired { 2 } else { 1 };
        // The least work of the busiest multiprocessor; of equals the largest block, which places x for more rows.
        let rounds =
            |groups: usize| work.rows.div_ceil(made * groups).div_ceil(super::MULTIPROCESSORS as usize);
        let most = (16 / split).max(1);
        let groups = (1..=most).rev().min_by_key(|&groups| rounds(groups) * groups).unwrap_or(1);
        let warps = split * groups;
        // One block a multiprocessor, and that with half of what it has: so blocks of the next launch are there early, with
        // their first weights on the way. Of large matrices the bytes matter more.
        let tiles = work.rows.div_ceil(made * groups);
        let large = work.rows * work.columns * work.parts >= LARGE;
        let resident = tiles.div_ceil(super::MULTIPROCESSORS as usize).clamp(1, if large { 2 } else { 1 });
        Self { lanes, rows, split, warps, depth: 0, resident, rehearsed: false }.as_deep_as_fits(work)
    }

    /// With as many chunks on their way as there are and shared memory has room for.
    pub(super) fn as_deep_as_fits(self, work: Work) -> Self {
        let mut plan = Self { depth: 0, ..self };
        // Where a multiprocessor has more to read than that, or cannot begin early, depth is worth more than the next launch's
        // early start.
        let matrices = if work.paired { 2 } else { 1 };
        let bytes = matrices * work.rows * work.parts * work.format.row_bytes(work.columns);
        let each = bytes / super::MULTIPROCESSORS as usize;
        let alone = plan.resident == 1 && (work.late || each > ROOM / 2);
        let left = if alone { 2 * ROOM } else { ROOM }.saturating_sub(plan.shared_bytes(work));
        let tiles = work.rows.div_ceil(plan.tile(work.paired));
        let chunks = (work.columns / work.format.codes()).div_ceil(plan.lanes) * work.parts;
        let steps = chunks.div_ceil(plan.split) * tiles.div_ceil(plan.blocks(tiles) as usize);
        plan.depth = (left / plan.step_bytes(work)).min(steps).clamp(1, 8);
        plan
    }

    /// Threads of a block and blocks a multiprocessor: fewer where many rows of x need registers.
    pub(super) fn bounds(&self, tokens: usize) -> [u32; 2] {
        let threads = 32 * self.warps;
        // Room for as many blocks of the next launch, which begins early, as long as 64 registers a thread are left.
        let least = (2 * self.resident).min(1024 / threads).max(1);
        [threads as u32, if tokens > 2 { 1 } else { least as u32 }]
    }

    /// Rows of the result a block and round.
    pub(super) fn tile(&self, paired: bool) -> usize {
        self.warps / self.split * (32 / self.lanes) * self.rows / if paired { 2 } else { 1 }
    }

    /// Blocks for so many tiles: all work on as many, or on one less.
    pub(super) fn blocks(&self, tiles: usize) -> u32 {
        let resident = super::MULTIPROCESSORS as usize * self.resident;
        tiles.div_ceil(tiles.div_ceil(resident)) as u32
    }

    pub(super) fn check(&self, kernel: &'static str, paired: bool) -> Result<(), KernelError> {
        let Self { lanes, rows, split, warps, depth, resident, rehearsed: _ } = *self;
        size(kernel, "lanes a row", lanes, [8, 16, 32].contains(&lanes), "8, 16 or 32")?;
        let least = if paired { 2 } else { 1 };
        let good = rows.is_power_of_two() && (least..=8).contains(&rows);
        size(kernel, "rows a lane", rows, good, "a power of two up to 8, two at least for two matrices")?;
        size(kernel, "warps", warps, (1..=32).contains(&warps), "1 to 32")?;
        size(
            kernel,
            "split",
            split,
            split > 0 && warps.is_multiple_of(split),
            format!("a divisor of {warps} warps"),
        )?;
        size(kernel, "depth", depth, (1..=8).contains(&depth), "1 to 8")?;
        size(kernel, "resident blocks", resident, (1..=16).contains(&resident), "1 to 16")
    }

    pub(super) fn constants(&self, work: Work, norm: Option<Norm>, to: &mut Prelude) {
        work.format.constants(to);
        to.int("COLUMNS", work.columns).int("LANES", self.lanes).int("ROWS_A_LANE", self.rows);
        to.int("SPLIT", self.split).int("WARPS", self.warps).int("DEPTH", self.depth);
        to.flag("REHEARSED", self.rehearsed);
        to.flag("WORDS", !work.odd)
            .int("PARTS", work.parts)
            .int("TOKENS", work.tokens)
            .flag("PAIRED", work.paired);
        to.flag("NORM", norm.is_some()).flag("NORM_WEIGHT", norm.is_some_and(|n| n.weight));
        to.float("EPS", norm.map_or(0.0, |n| n.eps));
    }

    /// Bytes of shared memory, as `room_of` in the text has it.
    pub(super) fn shared(&self, work: Work, kernel: &'static str) -> Result<u32, KernelError> {
        let bytes = self.shared_bytes(work);
        if bytes > SHARED_MOST {
            return Err(KernelError::Shared { kernel, got: bytes, most: SHARED_MOST });
        }
        Ok(bytes as u32)
    }

    /// Bytes of a block's copies of one step.
    fn step_bytes(&self, work: Work) -> usize {
        let words = work.format.groups(work.columns).map_or(0, |(_, rows)| 4 * rows);
        32 * self.warps * self.rows * (16 + words)
    }

    fn shared_bytes(&self, work: Work) -> usize {
        let codes = work.format.codes();
        let units = (work.columns / codes).div_ceil(self.lanes) * self.lanes;
        let rows = work.tokens * work.parts;
        let sums = if matches!(work.format, Format::Affine { .. }) { 4 * rows * units } else { 0 };
        let matrices = if work.paired { 2 } else { 1 };
        let parts = 4 * 2 * self.split * matrices * self.tile(work.paired) * work.tokens;
        let bytes = 4 * rows * units * codes + sums + parts + 4 * self.warps.max(rows);
        bytes + self.depth * self.step_bytes(work)
    }
}

/// Share of the steps of `split` warps that have work, in thousandths.
fn occupancy(chunks: usize, split: usize) -> usize {
    // A warp more is worth a little idleness: it has more in flight.
    1000 * chunks / (chunks.div_ceil(split) * split) + 10 * split
}

/// Checks a norm's parameters.
pub(super) fn check_norm(kernel: &'static str, norm: Option<Norm>) -> Result<(), KernelError> {
    norm.map_or(Ok(()), |norm| finite(kernel, "the norm's eps", norm.eps))
}
