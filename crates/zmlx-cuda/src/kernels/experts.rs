//! Products with the experts that a router has chosen.

use super::product::{Work, activation_constants, check_norm};
use super::router::SELECT;
use super::{
    Activation, FORMAT, Format, KernelError, Launch, Norm, Operands, PRODUCT, Plan, Planned, Prelude, Select,
    SelectOperands, Source, Type, Weights, aligned, given, size,
};

const UP: &str = "zmlx_experts_up";
const DOWN: &str = "zmlx_experts_down";
const TEXT: &str = include_str!("experts.cu");

/// `out[t * k + s] = act(norm(x[t]) @ gate[e].T + bg[e], norm(x[t]) @ up[e].T + bu[e])`, `e = indices[t, s]`.
///
/// `x` is `[tokens, columns]`, `indices` `[tokens, k]` (int32), matrices `[experts, rows, columns]`, `out`
/// `[tokens * k, rows]`.
///
/// With `select` the indices are chosen on the way, from logits `[tokens, experts]`: each block does that for itself while its
/// rows of x are placed, and the first tells the choice to launches after this one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsUp {
    /// Experts.
    pub experts: usize,
    /// How many a token uses.
    pub k: usize,
    /// Rows of an expert's matrix.
    pub rows: usize,
    /// Columns of it.
    pub columns: usize,
    /// How the matrices lie in memory.
    pub format: Format,
    /// Rows of x.
    pub tokens: usize,
    /// Norm of the rows of x.
    pub norm: Option<Norm>,
    /// The activation.
    pub activation: Activation,
    /// Whether there are biases `[experts, rows]`, of gate and up.
    pub bias: [bool; 2],
    /// The choice, if it is made here.
    pub select: Option<Select>,
    /// How it is cut.
    pub plan: Plan,
}

/// Addresses for [`ExpertsUp`].
#[derive(Debug, Clone, Copy, Default)]
pub struct ExpertsUpOperands {
    /// Activations, aligned to 16 bytes.
    pub x: u64,
    /// Weights of the norm, aligned to 16 bytes.
    pub norm: Option<u64>,
    /// The chosen experts, if they are chosen before.
    pub indices: u64,
    /// The logits to choose from, else.
    pub logits: u64,
    /// Their bias, and where the choice goes.
    pub choice: SelectOperands,
    /// The matrices that go through the activation.
    pub gate: Weights,
    /// The others.
    pub up: Weights,
    /// Biases of both.
    pub bias: [Option<u64>; 2],
    /// The result.
    pub out: u64,
}

fn check_choice(
    name: &'static str,
    experts: usize,
    k: usize,
    rows: usize,
    tokens: usize,
) -> Result<(), KernelError> {
    size(name, "experts", experts, (1..=4096).contains(&experts), "1 to 4096")?;
    size(
        name,
        "experts a token",
        k,
        (1..=experts.min(16)).contains(&k),
        "1 to 16, and no more than there are",
    )?;
    size(name, "rows", rows, (1..1 << 20).contains(&rows), "1 to 2^20")?;
    size(name, "rows of x", tokens, (1..=64).contains(&tokens), "1 to 64")
}

impl Planned for ExpertsUp {
    fn plan_mut(&mut self) -> &mut Plan {
        &mut self.plan
    }
}

impl ExpertsUp {
    /// Without norm and biases.
    pub fn new(
        [experts, k]: [usize; 2],
        [rows, columns]: [usize; 2],
        format: Format,
        tokens: usize,
        activation: Activation,
    ) -> Self {
        let odd = format.odd(experts * rows, columns);
        let work = Work {
            rows: rows * k * tokens,
            columns,
            parts: 1,
            tokens: 1,
            paired: true,
            late: true,
            odd,
            format,
        };
        let plan = Plan::new(work);
        let bias = [false; 2];
        Self { experts, k, rows, columns, format, tokens, norm: None, activation, bias, select: None, plan }
    }

    fn work(&self) -> Work {
        let Self { experts, rows, k, columns, format, tokens, .. } = *self;
        let odd = format.odd(experts * rows, columns);
        Work { rows: rows * k * tokens, columns, parts: 1, tokens: 1, paired: true, late: true, odd, format }
    }

    fn check(&self) -> Result<(), KernelError> {
        self.format.check(UP, self.columns)?;
        check_choice(UP, self.experts, self.k, self.rows, self.tokens)?;
        check_norm(UP, self.norm)?;
        if let Some(select) = self.select {
            select.check(UP)?;
            size(UP, "experts of the choice", select.experts, select.experts == self.experts, "the experts")?;
            size(UP, "experts of the choice a token", select.k, select.k == self.k, "those a token")?;
        }
        self.plan.check(UP, true)
    }

    fn operands(&self, o: &ExpertsUpOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("x", Type::F32, o.x);
        if self.norm.is_some_and(|n| n.weight) {
            to.read("norm", Type::F32, o.norm.unwrap_or(0));
        }
        let mut choice = "indices, Choice{}".to_owned();
        if let Some(select) = self.select {
            to.read("logits", Type::F32, o.logits);
            if select.bias {
                to.read("choice_bias", Type::F32, o.choice.bias.unwrap_or(0));
            }
            to.write("indices", Type::I32, o.choice.indices).write("weights", Type::F32, o.choice.weights);
            choice = format!("nullptr, Choice{{logits, {}, indices, weights}}", to.name("choice_bias"));
        } else {
            to.read("indices", Type::I32, o.indices);
        }
        let gate = self.format.operands(&mut to, ["codes", "scales", "biases"], &o.gate);
        let up = self.format.operands(&mut to, ["codes2", "scales2", "biases2"], &o.up);
        for (name, wanted, address) in [("bias", self.bias[0], o.bias[0]), ("bias2", self.bias[1], o.bias[1])]
        {
            if wanted {
                to.read(name, Type::F32, address.unwrap_or(0));
            }
        }
        to.write("out", Type::F32, o.out);
        let (norm, bias, bias2) = (to.name("norm"), to.name("bias"), to.name("bias2"));
        let body = format!("experts_up(x, {norm}, {choice}, {gate}, {up}, {bias}, {bias2}, out);");
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.plan.constants(self.work(), self.norm, &mut prelude);
        activation_constants(Some(self.activation), UP, &mut prelude)?;
        prelude.int("ROWS", self.rows).int("RESIDUALS", 0);
        prelude.flag("BIAS", self.bias[0]).flag("BIAS2", self.bias[1]);
        prelude.line(format_args!("#define SELECTS {}", u8::from(self.select.is_some())));
        let chooses = match self.select {
            Some(select) => {
                select.constants(&mut prelude);
                SELECT
            }
            None => {
                prelude.int("K", self.k);
                ""
            }
        };
        let (operands, body) = self.operands(&ExpertsUpOperands::default());
        let device = prelude.with(&[FORMAT, PRODUCT, chooses, TEXT]);
        Ok(Source { name: UP, params: operands.params, device, body, bounds: self.plan.bounds(1) })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing, too many or misaligned.
    pub fn launch(&self, o: &ExpertsUpOperands) -> Result<Launch, KernelError> {
        self.check()?;
        let wanted = self.select.is_some_and(|s| s.bias);
        given(UP, "the bias of the choice", wanted, &o.choice.bias)?;
        given(UP, "the norm's weights", self.norm.is_some_and(|n| n.weight), &o.norm)?;
        given(UP, "the gate's bias", self.bias[0], &o.bias[0])?;
        given(UP, "the bias of up", self.bias[1], &o.bias[1])?;
        aligned(UP, "x", o.x, 16)?;
        aligned(UP, "the norm's weights", o.norm.unwrap_or(0), 16)?;
        o.gate.check(UP, self.work())?;
        o.up.check(UP, self.work())?;
        let tiles = self.rows.div_ceil(self.plan.tile(true)) * self.k;
        let bytes = 2 * self.tokens * self.k * self.rows * self.format.row_bytes(self.columns);
        Ok(Launch {
            grid: [self.plan.blocks(tiles), self.tokens as u32, 1],
            block: [32 * self.plan.warps as u32, 1, 1],
            shared: self.plan.shared(self.work(), UP)?,
            args: self.operands(o).0.args,
            bytes: bytes as u64,
        })
    }
}

/// `out[t] = sum over s of scores[t, s] * (x[t * k + s] @ down[e].T + bias[e]) + residuals[t]`, `e = indices[t, s]`.
///
/// `x` is `[tokens * k, columns]`, `indices` (int32) and `scores` `[tokens, k]`, the matrices `[experts, rows, columns]`,
/// `out` and each residual `[tokens, rows]` (they may be the same memory).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsDown {
    /// Experts.
    pub experts: usize,
    /// How many a token uses.
    pub k: usize,
    /// Rows of an expert's matrix.
    pub rows: usize,
    /// Columns of it.
    pub columns: usize,
    /// How the matrices lie in memory.
    pub format: Format,
    /// Tokens.
    pub tokens: usize,
    /// Whether there are biases `[experts, rows]`.
    pub bias: bool,
    /// How many buffers are added, 3 at most.
    pub residuals: usize,
    /// How it is cut.
    pub plan: Plan,
}

/// Addresses for [`ExpertsDown`].
#[derive(Debug, Clone, Default)]
pub struct ExpertsDownOperands {
    /// Activations of all slots, aligned to 16 bytes.
    pub x: u64,
    /// The chosen experts.
    pub indices: u64,
    /// Their weights.
    pub scores: u64,
    /// The matrices.
    pub down: Weights,
    /// Biases.
    pub bias: Option<u64>,
    /// Added to the result, one after another.
    pub residuals: Vec<u64>,
    /// The result.
    pub out: u64,
}

impl Planned for ExpertsDown {
    fn plan_mut(&mut self) -> &mut Plan {
        &mut self.plan
    }
}

impl ExpertsDown {
    /// Without biases and residuals.
    pub fn new([experts, k]: [usize; 2], [rows, columns]: [usize; 2], format: Format, tokens: usize) -> Self {
        let plan = Plan::new(Work {
            rows: rows * tokens,
            columns,
            parts: k,
            tokens: 1,
            paired: false,
            late: true,
            odd: false,
            format,
        });
        Self { experts, k, rows, columns, format, tokens, bias: false, residuals: 0, plan }
    }

    fn work(&self) -> Work {
        let Self { experts, rows, k, columns, format, tokens, .. } = *self;
        let odd = format.odd(experts * rows, columns);
        Work { rows: rows * tokens, columns, parts: k, tokens: 1, paired: false, late: true, odd, format }
    }

    fn check(&self) -> Result<(), KernelError> {
        self.format.check(DOWN, self.columns)?;
        check_choice(DOWN, self.experts, self.k, self.rows, self.tokens)?;
        size(DOWN, "residuals", self.residuals, self.residuals <= 3, "3 at most")?;
        self.plan.check(DOWN, false)
    }

    fn operands(&self, o: &ExpertsDownOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("x", Type::F32, o.x).read("indices", Type::I32, o.indices).read(
            "scores",
            Type::F32,
            o.scores,
        );
        let down = self.format.operands(&mut to, ["codes", "scales", "biases"], &o.down);
        if self.bias {
            to.read("bias", Type::F32, o.bias.unwrap_or(0));
        }
        let names = ["residual", "residual2", "residual3"];
        for (i, name) in names.into_iter().enumerate().take(self.residuals) {
            to.read(name, Type::F32, o.residuals.get(i).copied().unwrap_or(0));
        }
        to.write("out", Type::F32, o.out);
        let [a, b, c] = names.map(|name| to.name(name));
        let bias = to.name("bias");
        let body = format!("experts_down(x, indices, scores, {down}, {bias}, {a}, {b}, {c}, out);");
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.plan.constants(self.work(), None, &mut prelude);
        activation_constants(None, DOWN, &mut prelude)?;
        prelude.line(format_args!("#define SELECTS 0"));
        prelude.int("ROWS", self.rows).int("K", self.k).int("RESIDUALS", self.residuals);
        prelude.flag("BIAS", self.bias).flag("BIAS2", false);
        let (operands, body) = self.operands(&ExpertsDownOperands::default());
        let device = prelude.with(&[FORMAT, PRODUCT, TEXT]);
        Ok(Source { name: DOWN, params: operands.params, device, body, bounds: self.plan.bounds(1) })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing, too many or misaligned.
    pub fn launch(&self, o: &ExpertsDownOperands) -> Result<Launch, KernelError> {
        self.check()?;
        given(DOWN, "the bias", self.bias, &o.bias)?;
        if o.residuals.len() != self.residuals {
            return Err(KernelError::Operand { kernel: DOWN, what: "each residual" });
        }
        aligned(DOWN, "x", o.x, 16)?;
        o.down.check(DOWN, self.work())?;
        let bytes = self.tokens * self.k * self.rows * self.format.row_bytes(self.columns);
        Ok(Launch {
            grid: [self.plan.blocks(self.rows.div_ceil(self.plan.tile(false))), self.tokens as u32, 1],
            block: [32 * self.plan.warps as u32, 1, 1],
            shared: self.plan.shared(self.work(), DOWN)?,
            args: self.operands(o).0.args,
            bytes: bytes as u64,
        })
    }
}
