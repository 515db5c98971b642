//! The gated delta net: a convolution with SiLU, then a recurrence a head.

use super::{KernelError, Launch, Norm, Operands, Prelude, Source, Type, finite, given, size};

const CONV: &str = "zmlx_conv_silu";
const RULE: &str = "zmlx_delta";
const NORM: &str = "zmlx_gated_norm";
const CONV_TEXT: &str = include_str!("conv_silu.cu");
const RULE_TEXT: &str = include_str!("delta.cu");
const NORM_TEXT: &str = include_str!("gated_norm.cu");

/// `out = silu(conv(x) + bias)`, a causal depthwise convolution whose last inputs are kept.
///
/// Rows of `x` are `x_width` floats; `columns` (int32, `[channels]`) says where each channel is in them. `kernel` is
/// `[taps, channels]`, `state` `[sequences, taps - 1, channels]`, `out` `[sequences * length, channels]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvSilu {
    /// Channels.
    pub channels: usize,
    /// Taps of a kernel, 2 to 8.
    pub taps: usize,
    /// Floats of a row of x.
    pub x_width: usize,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Whether there is a bias.
    pub bias: bool,
}

/// Addresses for [`ConvSilu`].
#[derive(Debug, Clone, Copy, Default)]
pub struct ConvSiluOperands {
    /// The inputs.
    pub x: u64,
    /// Where each channel is.
    pub columns: u64,
    /// The kernels.
    pub kernel: u64,
    /// Added to the convolution.
    pub bias: Option<u64>,
    /// The last inputs, replaced by the call's.
    pub state: u64,
    /// The result.
    pub out: u64,
}

impl ConvSilu {
    fn check(&self) -> Result<(), KernelError> {
        size(CONV, "channels", self.channels, (1..1 << 24).contains(&self.channels), "1 to 2^24")?;
        size(CONV, "taps", self.taps, (2..=8).contains(&self.taps), "2 to 8")?;
        check_rows(CONV, self.sequences, self.length)
    }

    fn operands(&self, o: &ConvSiluOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("x", Type::F32, o.x).read("columns", Type::I32, o.columns).read(
            "kernel",
            Type::F32,
            o.kernel,
        );
        if self.bias {
            to.read("bias", Type::F32, o.bias.unwrap_or(0));
        }
        to.write("state", Type::F32, o.state).write("out", Type::F32, o.out);
        let body = format!("conv_silu(x, columns, kernel, {}, state, out);", to.name("bias"));
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        prelude.int("CHANNELS", self.channels).int("TAPS", self.taps).int("X_WIDTH", self.x_width);
        prelude.int("LENGTH", self.length).flag("BIAS", self.bias);
        let (operands, body) = self.operands(&ConvSiluOperands::default());
        let device = prelude.with(&[CONV_TEXT]);
        Ok(Source { name: CONV, params: operands.params, device, body, bounds: [64, 1] })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing or too many.
    pub fn launch(&self, o: &ConvSiluOperands) -> Result<Launch, KernelError> {
        self.check()?;
        given(CONV, "the bias", self.bias, &o.bias)?;
        Ok(Launch {
            grid: [self.channels.div_ceil(64) as u32, self.sequences as u32, 1],
            block: [64, 1, 1],
            shared: 0,
            args: self.operands(o).0.args,
            bytes: (4 * self.sequences * (self.taps - 1) * self.channels) as u64,
        })
    }
}

fn check_rows(kernel: &'static str, sequences: usize, length: usize) -> Result<(), KernelError> {
    size(kernel, "sequences", sequences, (1..=256).contains(&sequences), "1 to 256")?;
    size(kernel, "tokens of a sequence", length, (1..=64).contains(&length), "1 to 64")
}

/// The gated delta rule of all heads and, as a second launch, the norm with a gate. With `S` the state of a head,
/// `[value, key]`: `S = g S; S = S + beta (v - S k) k^T; out = silu(z) * rms_norm(S q)`, where
/// `g = exp(-exp(a_log) softplus(a + dt_bias))` and `beta = sigmoid(b)`; queries and keys are `scale * x / sqrt(mean(x^2) +
/// eps)` of what comes in.
///
/// `mixed` is `[tokens, 2 * key_heads * key + heads * value]`: queries, keys, values. Rows of `a`, `b` and `z` are of
/// `widths` floats, `places` (int32, `[3, heads]`) says where each head's begin. `state` is `[sequences, heads, value,
/// key]`, `out` `[tokens, heads * value]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Delta {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of them.
    pub heads: usize,
    /// Width of a key.
    pub key: usize,
    /// Width of a value.
    pub value: usize,
    /// Scale and eps of queries and of keys.
    pub units: [[f32; 2]; 2],
    /// Floats of a row of `a`, `b` and `z`.
    pub widths: [usize; 3],
    /// Norm over a head's result.
    pub norm: Norm,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
}

/// Addresses for [`Delta`].
#[derive(Debug, Clone, Copy, Default)]
pub struct DeltaOperands {
    /// Queries, keys, values.
    pub mixed: u64,
    /// Rows of a.
    pub a: u64,
    /// Rows of b.
    pub b: u64,
    /// Rows of z.
    pub z: u64,
    /// Where each head's are.
    pub places: u64,
    /// One a head.
    pub a_log: u64,
    /// One a head.
    pub dt_bias: u64,
    /// Weights of the norm.
    pub norm: Option<u64>,
    /// The states.
    pub state: u64,
    /// The result.
    pub out: u64,
}

/// Warps of a block, and rows of a state that it has.
const WARPS: usize = 4;
const ROWS: usize = 16;

impl Delta {
    fn check(&self) -> Result<(), KernelError> {
        let Self { key_heads, heads, key, value, .. } = *self;
        let good = key_heads > 0 && heads > 0 && heads.is_multiple_of(key_heads) && heads <= 256;
        size(RULE, "heads", heads, good, format!("a multiple of {key_heads} key heads, 256 at most"))?;
        size(RULE, "width of a key", key, (1..=512).contains(&key), "1 to 512")?;
        size(RULE, "width of a value", value, (1..=4096).contains(&value), "1 to 4096")?;
        for v in self.units.into_iter().flatten().chain([self.norm.eps]) {
            finite(RULE, "scale or eps of a norm", v)?;
        }
        check_rows(RULE, self.sequences, self.length)
    }

    fn constants(&self) -> Prelude {
        let mut to = Prelude::default();
        let [[scale_q, eps_q], [scale_k, eps_k]] = self.units;
        to.int("KEY_HEADS", self.key_heads).int("HEADS", self.heads).int("KEY", self.key);
        to.int("VALUE", self.value).int("LENGTH", self.length).int("WARPS", WARPS).int("ROWS", ROWS);
        to.float("SCALE_Q", scale_q).float("EPS_Q", eps_q).float("SCALE_K", scale_k).float("EPS_K", eps_k);
        for (name, width) in ["A_WIDTH", "B_WIDTH", "Z_WIDTH"].into_iter().zip(self.widths) {
            to.int(name, width);
        }
        to.flag("WEIGHT", self.norm.weight).float("EPS", self.norm.eps);
        to
    }

    fn rule(&self, o: &DeltaOperands) -> Operands {
        let mut to = Operands::default();
        to.read("mixed", Type::F32, o.mixed).read("a", Type::F32, o.a).read("b", Type::F32, o.b);
        to.read("places", Type::I32, o.places).read("a_log", Type::F32, o.a_log);
        to.read("dt_bias", Type::F32, o.dt_bias).write("state", Type::F32, o.state);
        to.write("out", Type::F32, o.out);
        to
    }

    fn gated(&self, o: &DeltaOperands) -> Operands {
        let mut to = Operands::default();
        to.read("z", Type::F32, o.z).read("places", Type::I32, o.places);
        if self.norm.weight {
            to.read("weight", Type::F32, o.norm.unwrap_or(0));
        }
        to.write("out", Type::F32, o.out);
        to
    }

    /// The texts of the two launches.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn sources(&self) -> Result<[Source; 2], KernelError> {
        self.check()?;
        let none = DeltaOperands::default();
        let gated = self.gated(&none);
        let weight = gated.name("weight");
        Ok([
            Source {
                name: RULE,
                params: self.rule(&none).params,
                device: self.constants().with(&[RULE_TEXT]),
                body: "delta(mixed, a, b, places, a_log, dt_bias, state, out);".to_owned(),
                bounds: [32 * WARPS as u32, 4],
            },
            Source {
                name: NORM,
                body: format!("gated_norm(z, places, {weight}, out);"),
                params: gated.params,
                device: self.constants().with(&[NORM_TEXT]),
                bounds: [32, 1],
            },
        ])
    }

    /// The two launches, in order.
    ///
    /// Errors: [`KernelError`] for operands that are missing or too many.
    pub fn launches(&self, o: &DeltaOperands) -> Result<[Launch; 2], KernelError> {
        self.check()?;
        given(NORM, "the norm's weights", self.norm.weight, &o.norm)?;
        let (heads, sequences) = (self.heads as u32, self.sequences as u32);
        Ok([
            Launch {
                grid: [self.value.div_ceil(ROWS) as u32, heads * sequences, 1],
                block: [32 * WARPS as u32, 1, 1],
                shared: 0,
                args: self.rule(o).args,
                bytes: (4 * self.sequences * self.heads * self.key * self.value) as u64,
            },
            Launch {
                grid: [heads, sequences * self.length as u32, 1],
                block: [32, 1, 1],
                shared: 0,
                args: self.gated(o).args,
                bytes: 0,
            },
        ])
    }
}
