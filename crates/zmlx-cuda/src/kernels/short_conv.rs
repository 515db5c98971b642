//! The short convolution of LFM2 with the product before it.

use super::product::{Work, check_norm};
use super::{
    FORMAT, Format, KernelError, Launch, Norm, Operands, PRODUCT, Plan, Planned, Prelude, Source, Type,
    Weights, aligned, given, size,
};

const NAME: &str = "zmlx_short_conv";
const TEXT: &str = include_str!("short_conv.cu");

/// `[b, c, x] = norm(x) @ w.T + bias`, then `out = c * (conv(b * x) + conv_bias)`, a causal depthwise convolution whose last
/// inputs are kept.
///
/// `x` is `[sequences * length, columns]`, the matrix `[3 * channels, columns]`, `kernel` `[channels, taps]`, `state`
/// `[sequences, taps - 1, channels]`, `out` `[sequences * length, channels]`, float32 but for the matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ShortConv {
    /// Channels.
    pub channels: usize,
    /// Columns of the matrix.
    pub columns: usize,
    /// How it lies in memory.
    pub format: Format,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Taps of a kernel, 2 to 8.
    pub taps: usize,
    /// Norm of the rows of x.
    pub norm: Option<Norm>,
    /// Whether the product has a bias.
    pub bias: bool,
    /// Whether the convolution has one.
    pub conv_bias: bool,
    /// How it is cut; rows a block must be a multiple of 3.
    pub plan: Plan,
}

/// Addresses for [`ShortConv`].
#[derive(Debug, Clone, Copy, Default)]
pub struct ShortConvOperands {
    /// Activations, aligned to 16 bytes.
    pub x: u64,
    /// Weights of the norm, aligned to 16 bytes.
    pub norm: Option<u64>,
    /// The matrix.
    pub matrix: Weights,
    /// Added to the product.
    pub bias: Option<u64>,
    /// The kernels.
    pub kernel: u64,
    /// Added to the convolution.
    pub conv_bias: Option<u64>,
    /// The last inputs, replaced by the call's.
    pub state: u64,
    /// The result.
    pub out: u64,
}

impl Planned for ShortConv {
    fn plan_mut(&mut self) -> &mut Plan {
        &mut self.plan
    }
}

impl ShortConv {
    /// Without norm and biases.
    pub fn new(
        channels: usize,
        columns: usize,
        format: Format,
        [sequences, length]: [usize; 2],
        taps: usize,
    ) -> Self {
        let tokens = sequences * length;
        let rows = 3 * channels;
        let work = Work { rows, columns, parts: 1, tokens, paired: false, late: false, odd: false, format };
        let mut plan = Plan::new(work);
        let groups = |n: usize| {
            plan.split * n <= 16 && (3 * channels).div_ceil(n * 32 / plan.lanes * plan.rows) >= 120
        };
        plan.warps = plan.split * if groups(6) { 6 } else { 3 };
        let tiles = (3 * channels).div_ceil(plan.tile(false));
        plan.resident = tiles.div_ceil(super::MULTIPROCESSORS as usize).clamp(1, (32 / plan.warps).max(1));
        let plan = plan.as_deep_as_fits(work);
        Self {
            channels,
            columns,
            format,
            sequences,
            length,
            taps,
            norm: None,
            bias: false,
            conv_bias: false,
            plan,
        }
    }

    fn work(&self) -> Work {
        let Self { channels, columns, format, sequences, length, .. } = *self;
        let (rows, tokens) = (3 * channels, sequences * length);
        Work {
            rows,
            columns,
            parts: 1,
            tokens,
            paired: false,
            late: false,
            odd: format.odd(rows, columns),
            format,
        }
    }

    fn check(&self) -> Result<(), KernelError> {
        self.format.check(NAME, self.columns)?;
        size(NAME, "channels", self.channels, (1..1 << 20).contains(&self.channels), "1 to 2^20")?;
        let tokens = self.sequences * self.length;
        size(NAME, "rows of x", tokens, (1..=8).contains(&tokens), "1 to 8")?;
        size(NAME, "taps", self.taps, (2..=8).contains(&self.taps), "2 to 8")?;
        check_norm(NAME, self.norm)?;
        self.plan.check(NAME, false)?;
        let rows = self.plan.tile(false);
        size(NAME, "rows a block", rows, rows.is_multiple_of(3), "a multiple of 3")
    }

    fn operands(&self, o: &ShortConvOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("x", Type::F32, o.x);
        if self.norm.is_some_and(|n| n.weight) {
            to.read("norm", Type::F32, o.norm.unwrap_or(0));
        }
        let matrix = self.format.operands(&mut to, ["codes", "scales", "biases"], &o.matrix);
        if self.bias {
            to.read("bias", Type::F32, o.bias.unwrap_or(0));
        }
        to.read("kernel", Type::F32, o.kernel);
        if self.conv_bias {
            to.read("conv_bias", Type::F32, o.conv_bias.unwrap_or(0));
        }
        to.write("state", Type::F32, o.state).write("out", Type::F32, o.out);
        let (norm, bias, conv_bias) = (to.name("norm"), to.name("bias"), to.name("conv_bias"));
        let body = format!("short_conv(x, {norm}, {matrix}, {bias}, kernel, {conv_bias}, state, out);");
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.plan.constants(self.work(), self.norm, &mut prelude);
        prelude.int("CHANNELS", self.channels).int("TAPS", self.taps).int("SEQUENCES", self.sequences);
        prelude.int("LENGTH", self.length).flag("BIAS", self.bias).flag("CONV_BIAS", self.conv_bias);
        let (operands, body) = self.operands(&ShortConvOperands::default());
        let device = prelude.with(&[FORMAT, PRODUCT, TEXT]);
        let bounds = self.plan.bounds(self.sequences * self.length);
        Ok(Source { name: NAME, params: operands.params, device, body, bounds })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing, too many or misaligned.
    pub fn launch(&self, o: &ShortConvOperands) -> Result<Launch, KernelError> {
        self.check()?;
        given(NAME, "the norm's weights", self.norm.is_some_and(|n| n.weight), &o.norm)?;
        given(NAME, "the bias", self.bias, &o.bias)?;
        given(NAME, "the convolution's bias", self.conv_bias, &o.conv_bias)?;
        aligned(NAME, "x", o.x, 16)?;
        aligned(NAME, "the norm's weights", o.norm.unwrap_or(0), 16)?;
        o.matrix.check(NAME, self.work())?;
        Ok(Launch {
            grid: [self.plan.blocks(self.channels.div_ceil(self.plan.tile(false) / 3)), 1, 1],
            block: [32 * self.plan.warps as u32, 1, 1],
            shared: self.plan.shared(self.work(), NAME)?,
            args: self.operands(o).0.args,
            bytes: (3 * self.channels * self.format.row_bytes(self.columns)) as u64,
        })
    }
}
