//! Products of a few rows with a matrix, alone or as a gated pair.

use super::product::{Work, activation_constants, check_norm};
use super::{
    ARGMAX, Activation, FORMAT, Format, KernelError, Launch, Next, NextOperands, Norm, Operands, PRODUCT,
    Plan, Planned, Prelude, Source, Type, Weights, aligned, given, size,
};

const NAME: &str = "zmlx_qmv";
const TEXT: &str = include_str!("qmv.cu");

/// `out = sigmoid(gate) * (norm(x) @ w.T + bias) + residual`, or `out = act(norm(x) @ w.T + bias, norm(x) @ w2.T + bias2)`.
///
/// `x` is `[tokens, columns]`, `out` and `residual` `[tokens, rows]` (they may be the same memory), `gate` `[tokens, 1]`,
/// all float32. With `stacked` rows, `w` is several matrices of one format, one after another; `bias` is for all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Qmv {
    /// Rows of a matrix, or of all where several follow one another.
    pub rows: usize,
    /// Rows of a second and a third matrix among them, whose rows come after the first one's: queries, keys and values.
    pub stacked: [usize; 2],
    /// Columns of a matrix.
    pub columns: usize,
    /// How the matrices lie in memory.
    pub format: Format,
    /// Rows of x, 1 to 8.
    pub tokens: usize,
    /// Norm of the rows of x.
    pub norm: Option<Norm>,
    /// With it there is a second matrix of the same shape: the first is the gate, the second goes up.
    pub activation: Option<Activation>,
    /// Whether the products have biases.
    pub bias: [bool; 2],
    /// Whether rows are multiplied by the sigmoid of a gate.
    pub gate: bool,
    /// Whether there is a residual.
    pub residual: bool,
    /// Whether the largest element of each row is the next token (a head), where [`Self::chooses`] so many.
    pub next: Option<Next>,
    /// How it is cut.
    pub plan: Plan,
}

/// Addresses for [`Qmv`].
#[derive(Debug, Clone, Copy, Default)]
pub struct QmvOperands {
    /// Activations, aligned to 16 bytes.
    pub x: u64,
    /// Weights of the norm, aligned to 16 bytes.
    pub norm: Option<u64>,
    /// The matrix.
    pub weights: Weights,
    /// The second matrix, where there is one.
    pub second: Option<Weights>,
    /// The third.
    pub third: Option<Weights>,
    /// Added to the products.
    pub bias: [Option<u64>; 2],
    /// Gates of the rows.
    pub gate: Option<u64>,
    /// Added to the result.
    pub residual: Option<u64>,
    /// The result.
    pub out: u64,
    /// What follows a decoded token.
    pub next: Option<NextOperands>,
}

impl QmvOperands {
    /// For rows from number `first` on of all that these are for.
    pub fn from_row(self, kernel: &Qmv, first: usize) -> Self {
        let after = |floats: usize| (first * floats * size_of::<f32>()) as u64;
        Self {
            x: self.x + after(kernel.columns),
            gate: self.gate.map(|at| at + after(1)),
            residual: self.residual.map(|at| at + after(kernel.rows)),
            out: self.out + after(kernel.rows),
            ..self
        }
    }
}

impl Planned for Qmv {
    fn plan_mut(&mut self) -> &mut Plan {
        &mut self.plan
    }
}

impl Qmv {
    /// A plain product of `tokens` rows.
    pub fn new(rows: usize, columns: usize, format: Format, tokens: usize) -> Self {
        let plan = Plan::new(Work {
            rows,
            columns,
            parts: 1,
            tokens,
            paired: false,
            late: false,
            odd: false,
            format,
        });
        Self {
            rows,
            stacked: [0; 2],
            columns,
            format,
            tokens,
            norm: None,
            activation: None,
            bias: [false; 2],
            gate: false,
            residual: false,
            next: None,
            plan,
        }
    }

    /// The same with two matrices and an activation, planned for them.
    pub fn gated(self, activation: Activation) -> Self {
        let plan = Plan::new(Work { paired: true, ..self.work() });
        Self { activation: Some(activation), plan, ..self }
    }

    /// Whether it can have [`Self::next`] with so many rows of x: a thread keeps the largest element of one row.
    pub fn chooses(tokens: usize) -> bool {
        tokens.is_power_of_two() && tokens <= 8
    }

    /// Whether so many bytes of shared memory have room for the rows of x and a step of weights.
    pub fn fits(&self, shared_memory: usize) -> bool {
        Plan { depth: 1, ..self.plan }.shared(self.work(), NAME).is_ok_and(|b| b as usize <= shared_memory)
    }

    /// Whether there is a second and a third matrix.
    fn further(&self) -> [bool; 2] {
        [self.activation.is_some() || self.stacked[0] > 0, self.stacked[1] > 0]
    }

    fn work(&self) -> Work {
        let Self { rows, columns, format, tokens, stacked: [second, third], .. } = *self;
        let each = [rows.saturating_sub(second + third), second, third];
        let odd = each.into_iter().any(|rows| format.odd(rows, columns));
        Work { rows, columns, parts: 1, tokens, paired: self.activation.is_some(), late: false, odd, format }
    }

    fn check(&self) -> Result<(), KernelError> {
        self.format.check(NAME, self.columns)?;
        size(NAME, "columns", self.columns, self.columns.is_multiple_of(4), "a multiple of 4")?;
        size(NAME, "rows", self.rows, (1..1 << 24).contains(&self.rows), "1 to 2^24")?;
        size(NAME, "rows of x", self.tokens, (1..=8).contains(&self.tokens), "1 to 8")?;
        let more: usize = self.stacked.iter().sum();
        let good = more < self.rows
            && (self.stacked[0] > 0 || more == 0)
            && !(more > 0 && self.activation.is_some());
        size(NAME, "rows of further matrices", more, good, "less than all, and 0 for gated pairs")?;
        let second = usize::from(self.bias[1]);
        size(NAME, "biases of a second matrix", second, second == 0 || self.activation.is_some(), "0")?;
        check_norm(NAME, self.norm)?;
        if let Some(next) = self.next {
            next.check(NAME, self.tokens)?;
            size(NAME, "rows of a head", self.tokens, Self::chooses(self.tokens), "1, 2, 4 or 8")?;
        }
        self.plan.check(NAME, self.activation.is_some())
    }

    fn operands(&self, o: &QmvOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("x", Type::F32, o.x);
        if self.norm.is_some_and(|n| n.weight) {
            to.read("norm", Type::F32, o.norm.unwrap_or(0));
        }
        let first = self.format.operands(&mut to, ["codes", "scales", "biases"], &o.weights);
        let mut further = |on: bool, names, weights: Option<Weights>| match on {
            true => self.format.operands(&mut to, names, &weights.unwrap_or_default()),
            false => first.clone(),
        };
        let [second, third] = self.further();
        let second = further(second, ["codes2", "scales2", "biases2"], o.second);
        let third = further(third, ["codes3", "scales3", "biases3"], o.third);
        let optional = [
            ("bias", self.bias[0], o.bias[0]),
            ("bias2", self.bias[1], o.bias[1]),
            ("gate", self.gate, o.gate),
            ("residual", self.residual, o.residual),
        ];
        for (name, wanted, address) in optional {
            if wanted {
                to.read(name, Type::F32, address.unwrap_or(0));
            }
        }
        to.write("out", Type::F32, o.out);
        let next = match self.next {
            Some(_) => Next::operands(&mut to, &o.next.unwrap_or_default()),
            None => "Next{}",
        };
        let n = |name| to.name(name);
        let body = format!(
            "qmv(x, {}, Rows{{{first}, {second}, {third}}}, {}, {}, {}, {}, out, {next});",
            n("norm"),
            n("bias"),
            n("bias2"),
            n("gate"),
            n("residual")
        );
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.plan.constants(self.work(), self.norm, &mut prelude);
        activation_constants(self.activation, NAME, &mut prelude)?;
        let [second, third] = self.stacked;
        prelude.int("ROWS_0", self.rows - second - third).int("ROWS_1", second);
        prelude.int("ROWS", self.rows).flag("BIAS", self.bias[0]).flag("BIAS2", self.bias[1]);
        prelude.flag("GATE", self.gate).flag("RESIDUAL", self.residual);
        prelude.flag("ARGMAX", self.next.is_some()).int("RING", self.next.map_or(1, |n| n.ring));
        let (operands, body) = self.operands(&QmvOperands::default());
        Ok(Source {
            name: NAME,
            params: operands.params,
            device: prelude.with(&[FORMAT, PRODUCT, ARGMAX, TEXT]),
            body,
            bounds: self.plan.bounds(self.tokens),
        })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing, too many or misaligned.
    pub fn launch(&self, o: &QmvOperands) -> Result<Launch, KernelError> {
        self.check()?;
        given(NAME, "the norm's weights", self.norm.is_some_and(|n| n.weight), &o.norm)?;
        let [second, third] = self.further();
        given(NAME, "the second matrix", second, &o.second)?;
        given(NAME, "the third matrix", third, &o.third)?;
        given(NAME, "the bias", self.bias[0], &o.bias[0])?;
        given(NAME, "the second bias", self.bias[1], &o.bias[1])?;
        given(NAME, "the gate", self.gate, &o.gate)?;
        given(NAME, "the residual", self.residual, &o.residual)?;
        given(NAME, "what follows a token", self.next.is_some(), &o.next)?;
        aligned(NAME, "x", o.x, 16)?;
        aligned(NAME, "the norm's weights", o.norm.unwrap_or(0), 16)?;
        o.weights.check(NAME, self.work())?;
        o.second.unwrap_or_default().check(NAME, self.work())?;
        o.third.unwrap_or_default().check(NAME, self.work())?;
        let matrices = if self.activation.is_some() { 2 } else { 1 };
        Ok(Launch {
            grid: [self.plan.blocks(self.rows.div_ceil(self.plan.tile(matrices == 2))), 1, 1],
            block: [32 * self.plan.warps as u32, 1, 1],
            shared: self.plan.shared(self.work(), NAME)?,
            args: self.operands(o).0.args,
            bytes: (matrices * self.rows * self.format.row_bytes(self.columns)) as u64,
        })
    }
}
