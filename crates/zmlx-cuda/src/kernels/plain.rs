//! Stages without a product.

use super::{
    FORMAT, Format, KernelError, Launch, Norm, Operands, Prelude, Source, Type, Weights, finite, given, size,
};

const EMBED_TEXT: &str = include_str!("embed.cu");
const EMBED: &str = "zmlx_embed";
const TEXT: &str = include_str!("plain.cu");

/// Rows of a matrix, one a token: `out[t] = scale * m[tokens[t]]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Embed {
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// How it lies in memory.
    pub format: Format,
    /// Tokens.
    pub tokens: usize,
    /// Multiplies the rows.
    pub scale: f32,
    /// Whether scaled rows are rounded to bfloat16, and the scale.
    pub rounded: bool,
}

impl Embed {
    fn check(&self) -> Result<(), KernelError> {
        self.format.check(EMBED, self.columns)?;
        size(EMBED, "rows", self.rows, (1..1 << 31).contains(&self.rows), "1 to 2^31")?;
        size(EMBED, "tokens", self.tokens, (1..=65535).contains(&self.tokens), "1 to 65535")?;
        finite(EMBED, "the scale", self.scale)
    }

    fn operands(&self, tokens: u64, matrix: &Weights, out: u64) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("tokens", Type::U32, tokens);
        let matrix = self.format.operands(&mut to, ["codes", "scales", "biases"], matrix);
        to.write("out", Type::F32, out);
        (to, format!("embed(tokens, {matrix}, out);"))
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.format.constants(&mut prelude);
        prelude.int("ROWS", self.rows).int("COLUMNS", self.columns).float("ROW_SCALE", self.scale);
        prelude.flag("ROUNDED", self.rounded && self.scale != 1.0);
        let (operands, body) = self.operands(0, &Weights::default(), 0);
        let device = prelude.with(&[FORMAT, EMBED_TEXT]);
        Ok(Source { name: EMBED, params: operands.params, device, body, bounds: [128, 1] })
    }

    /// A launch: `tokens` are 32-bit ids.
    ///
    /// Errors: [`KernelError`] for a matrix that is misaligned.
    pub fn launch(&self, tokens: u64, matrix: &Weights, out: u64) -> Result<Launch, KernelError> {
        self.check()?;
        Ok(Launch {
            grid: [self.columns.div_ceil(128) as u32, self.tokens as u32, 1],
            block: [128, 1, 1],
            shared: 0,
            args: self.operands(tokens, matrix, out).0.args,
            bytes: (self.tokens * self.format.row_bytes(self.columns)) as u64,
        })
    }
}

/// What [`Plain`] computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PlainOp {
    /// `x / sqrt(mean(x^2) + eps) * weight`
    RmsNorm(Norm),
    /// `(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias`
    LayerNorm {
        /// Added under the root.
        eps: f32,
        /// Whether there are weights.
        weight: bool,
        /// Whether there is a bias.
        bias: bool,
    },
    /// Softmax of each row.
    Softmax,
    /// `x + other`
    Add,
    /// `out = out * sigmoid(x)`, in place.
    SigmoidGate,
}

/// A stage over rows `[rows, width]` of float32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plain {
    /// What it computes.
    pub op: PlainOp,
    /// Rows.
    pub rows: usize,
    /// Width of a row.
    pub width: usize,
}

/// Addresses for [`Plain`]. `out` may be `x` or `other`.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlainOperands {
    /// What is computed with.
    pub x: u64,
    /// The other summand.
    pub other: Option<u64>,
    /// Weights of a norm.
    pub weight: Option<u64>,
    /// Bias of a norm.
    pub bias: Option<u64>,
    /// The result.
    pub out: u64,
}

/// Warps of a row's block.
const WARPS: usize = 8;

impl Plain {
    fn name(&self) -> &'static str {
        match self.op {
            PlainOp::RmsNorm(_) => "zmlx_rms_norm",
            PlainOp::LayerNorm { .. } => "zmlx_layer_norm",
            PlainOp::Softmax => "zmlx_softmax",
            PlainOp::Add => "zmlx_add",
            PlainOp::SigmoidGate => "zmlx_sigmoid_gate",
        }
    }

    /// Whether there are weights, a bias, another summand.
    fn takes(&self) -> [bool; 3] {
        match self.op {
            PlainOp::RmsNorm(norm) => [norm.weight, false, false],
            PlainOp::LayerNorm { weight, bias, .. } => [weight, bias, false],
            PlainOp::Softmax | PlainOp::SigmoidGate => [false; 3],
            PlainOp::Add => [false, false, true],
        }
    }

    fn eps(&self) -> f32 {
        match self.op {
            PlainOp::RmsNorm(Norm { eps, .. }) | PlainOp::LayerNorm { eps, .. } => eps,
            _ => 0.0,
        }
    }

    /// Whether elements are independent.
    fn is_flat(&self) -> bool {
        matches!(self.op, PlainOp::Add | PlainOp::SigmoidGate)
    }

    fn check(&self) -> Result<(), KernelError> {
        let (name, most) = (self.name(), 1 << 24);
        size(name, "width", self.width, (1..=most).contains(&self.width), "1 to 2^24")?;
        size(name, "rows", self.rows, (1..=65535).contains(&self.rows), "1 to 65535")?;
        finite(name, "eps", self.eps())
    }

    fn operands(&self, o: &PlainOperands) -> (Operands, String) {
        let mut to = Operands::default();
        let [weight, bias, other] = self.takes();
        to.read("x", Type::F32, o.x);
        for (name, on, address) in
            [("weight", weight, o.weight), ("bias", bias, o.bias), ("other", other, o.other)]
        {
            if on {
                to.read(name, Type::F32, address.unwrap_or(0));
            }
        }
        to.write("out", Type::F32, o.out);
        let (weight, bias) = (to.name("weight"), to.name("bias"));
        let body = match self.op {
            PlainOp::RmsNorm(_) => format!("rms_norm(x, {weight}, out);"),
            PlainOp::LayerNorm { .. } => format!("layer_norm(x, {weight}, {bias}, out);"),
            PlainOp::Softmax => "softmax(x, out);".to_owned(),
            PlainOp::Add => "add(x, other, out);".to_owned(),
            PlainOp::SigmoidGate => "sigmoid_gate(out, x);".to_owned(),
        };
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        let [weight, bias, _] = self.takes();
        let width = if self.is_flat() { self.rows * self.width } else { self.width };
        prelude.int("WIDTH", width).int("WARPS", WARPS).flag("WEIGHT", weight).flag("BIAS", bias);
        prelude.float("EPS", self.eps());
        let (operands, body) = self.operands(&PlainOperands::default());
        let device = prelude.with(&[TEXT]);
        let bounds = [32 * WARPS as u32, 1];
        Ok(Source { name: self.name(), params: operands.params, device, body, bounds })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing or too many.
    pub fn launch(&self, o: &PlainOperands) -> Result<Launch, KernelError> {
        self.check()?;
        let [weight, bias, other] = self.takes();
        given(self.name(), "the weights", weight, &o.weight)?;
        given(self.name(), "the bias", bias, &o.bias)?;
        given(self.name(), "the other summand", other, &o.other)?;
        let blocks = if self.is_flat() { (self.rows * self.width).div_ceil(32 * WARPS) } else { self.rows };
        Ok(Launch {
            grid: [blocks as u32, 1, 1],
            block: [32 * WARPS as u32, 1, 1],
            shared: 0,
            args: self.operands(o).0.args,
            bytes: 0,
        })
    }
}
