//! Choosing experts.

use super::product::{Work, check_norm};
use super::{
    FORMAT, Format, KernelError, Launch, Norm, Operands, PRODUCT, Plan, Planned, Prelude, Source, Type,
    Weights, aligned, finite, given, size,
};

const ROUTER: &str = "zmlx_router";
const ROUTE: &str = "zmlx_route";
pub(super) const SELECT: &str = include_str!("select.cuh");
const ROUTER_TEXT: &str = include_str!("router.cu");
const ROUTE_TEXT: &str = include_str!("route.cu");

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// Softmax over all experts.
    Softmax,
    /// Softmax over the chosen ones only; logits choose.
    SoftmaxOfChosen,
}

/// Experts in groups of equal size, of which some are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// How many groups, up to 32.
    pub count: usize,
    /// How many are kept: those with the largest `(sum of the two largest ranks, index)`.
    pub keep: usize,
}

/// Logits to the chosen experts of a token and their weights.
///
/// Experts are ranked by `score + bias`; in groups that are not kept that is 0. The `k` that rank highest are chosen. They
/// come in ascending order of rank, the one that a tie prefers after the other. NaN ranks highest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Select {
    /// Experts, up to 1,024.
    pub experts: usize,
    /// How many a token uses, up to 16.
    pub k: usize,
    /// How logits become scores.
    pub scores: Scores,
    /// Whether there is a bias (float32, one an expert) that counts for the choice only.
    pub bias: bool,
    /// Of equal experts the one of the higher index is chosen, else that of the lower.
    pub ties_higher: bool,
    /// Groups, of which only some take part.
    pub groups: Option<Groups>,
    /// Divide the weights by their sum plus this.
    pub renormalise: Option<f32>,
    /// Multiplies the weights.
    pub scale: f32,
}

impl Select {
    pub(super) fn check(&self, kernel: &'static str) -> Result<(), KernelError> {
        size(kernel, "experts", self.experts, (1..=1024).contains(&self.experts), "1 to 1024")?;
        let most = self.experts.min(16);
        size(kernel, "experts a token", self.k, (1..=most).contains(&self.k), format!("1 to {most}"))?;
        if let Some(Groups { count, keep }) = self.groups {
            let good = (1..=32).contains(&count)
                && self.experts.is_multiple_of(count)
                && self.experts >= 2 * count
                && (1..=count).contains(&keep);
            size(
                kernel,
                "groups",
                count,
                good,
                "up to 32 of two experts or more each, of which some are kept",
            )?;
        }
        finite(kernel, "what is added to the sum of the weights", self.renormalise.unwrap_or(0.0))?;
        finite(kernel, "the scale", self.scale)
    }

    pub(super) fn constants(&self, to: &mut Prelude) {
        let scores = match self.scores {
            Scores::Sigmoid => "0",
            Scores::Softmax => "1",
            Scores::SoftmaxOfChosen => "2",
        };
        to.int("EXPERTS", self.experts).int("K", self.k).int("SCORES", scores).flag("CHOICE_BIAS", self.bias);
        to.flag("TIES_HIGHER", self.ties_higher).int("GROUPS", self.groups.map_or(0, |g| g.count));
        to.int("KEEP", self.groups.map_or(0, |g| g.keep)).flag("RENORMALISE", self.renormalise.is_some());
        to.float("RENORMALISE_EPS", self.renormalise.unwrap_or(0.0)).float("WEIGHT_SCALE", self.scale);
    }
}

/// Where a choice goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct SelectOperands {
    /// The bias of the choice.
    pub bias: Option<u64>,
    /// The chosen experts `[tokens, k]`, int32.
    pub indices: u64,
    /// Their weights `[tokens, k]`, float32.
    pub weights: u64,
}

/// A choice from logits `[tokens, experts]` that are there already; a warp a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Route {
    /// The choice.
    pub select: Select,
    /// Tokens.
    pub tokens: usize,
}

impl Route {
    fn operands(&self, logits: u64, o: &SelectOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("logits", Type::F32, logits);
        if self.select.bias {
            to.read("choice_bias", Type::F32, o.bias.unwrap_or(0));
        }
        to.write("indices", Type::I32, o.indices).write("weights", Type::F32, o.weights);
        let body = format!("route(logits, {}, indices, weights);", to.name("choice_bias"));
        (to, body)
    }

    fn check(&self) -> Result<(), KernelError> {
        self.select.check(ROUTE)?;
        size(ROUTE, "rows", self.tokens, (1..=65535).contains(&self.tokens), "1 to 65535")
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.select.constants(&mut prelude);
        let (operands, body) = self.operands(0, &SelectOperands::default());
        let device = prelude.with(&[SELECT, ROUTE_TEXT]);
        Ok(Source { name: ROUTE, params: operands.params, device, body, bounds: [32, 1] })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing or too many.
    pub fn launch(&self, logits: u64, o: &SelectOperands) -> Result<Launch, KernelError> {
        self.check()?;
        given(ROUTE, "the bias of the choice", self.select.bias, &o.bias)?;
        let args = self.operands(logits, o).0.args;
        Ok(Launch { grid: [self.tokens as u32, 1, 1], block: [32, 1, 1], shared: 0, args, bytes: 0 })
    }
}

/// `norm(x) @ w.T + bias` to the choice, in one launch: logits are spread over blocks, the last to arrive chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    /// The choice.
    pub select: Select,
    /// Columns of the matrix `[experts, columns]`.
    pub columns: usize,
    /// How it lies in memory.
    pub format: Format,
    /// Rows of x, 1 to 8.
    pub tokens: usize,
    /// Norm of the rows of x.
    pub norm: Option<Norm>,
    /// Whether the product has a bias.
    pub bias: bool,
    /// How it is cut.
    pub plan: Plan,
}

/// Addresses for [`Router`].
#[derive(Debug, Clone, Copy, Default)]
pub struct RouterOperands {
    /// Activations, aligned to 16 bytes.
    pub x: u64,
    /// Weights of the norm, aligned to 16 bytes.
    pub norm: Option<u64>,
    /// The matrix.
    pub matrix: Weights,
    /// Added to the product.
    pub bias: Option<u64>,
    /// The logits, `[tokens, experts]`.
    pub logits: u64,
    /// A 32-bit counter that is zero before the first launch; each launch leaves it so.
    pub arrived: u64,
    /// The choice.
    pub select: SelectOperands,
}

impl Planned for Router {
    fn plan_mut(&mut self) -> &mut Plan {
        &mut self.plan
    }
}

impl Router {
    /// Without norm and bias.
    pub fn new(select: Select, columns: usize, format: Format, tokens: usize) -> Self {
        // Few rows: one a block where possible, and all warps on it.
        let units = columns / format.codes();
        let split = units.div_ceil(32).clamp(1, 8);
        let groups = select.experts.div_ceil(128).max(4usize.div_ceil(split)).min(16 / split).max(1);
        let plan = Plan {
            lanes: 32,
            rows: 1,
            split,
            warps: split * groups,
            depth: 4,
            resident: 1,
            rehearsed: false,
        };
        Self { select, columns, format, tokens, norm: None, bias: false, plan }
    }

    fn work(&self) -> Work {
        let Self { columns, format, tokens, .. } = *self;
        let rows = self.select.experts;
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
        self.select.check(ROUTER)?;
        self.format.check(ROUTER, self.columns)?;
        size(ROUTER, "rows of x", self.tokens, (1..=8).contains(&self.tokens), "1 to 8")?;
        check_norm(ROUTER, self.norm)?;
        self.plan.check(ROUTER, false)
    }

    fn operands(&self, o: &RouterOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("x", Type::F32, o.x);
        if self.norm.is_some_and(|n| n.weight) {
            to.read("norm", Type::F32, o.norm.unwrap_or(0));
        }
        let matrix = self.format.operands(&mut to, ["codes", "scales", "biases"], &o.matrix);
        for (name, wanted, address) in
            [("bias", self.bias, o.bias), ("choice_bias", self.select.bias, o.select.bias)]
        {
            if wanted {
                to.read(name, Type::F32, address.unwrap_or(0));
            }
        }
        to.write("logits", Type::F32, o.logits).write("arrived", Type::U32, o.arrived);
        to.write("indices", Type::I32, o.select.indices).write("weights", Type::F32, o.select.weights);
        let (norm, bias, choice) = (to.name("norm"), to.name("bias"), to.name("choice_bias"));
        let body =
            format!("router(x, {norm}, {matrix}, {bias}, {choice}, logits, arrived, indices, weights);");
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.plan.constants(self.work(), self.norm, &mut prelude);
        self.select.constants(&mut prelude);
        prelude.flag("BIAS", self.bias);
        let (operands, body) = self.operands(&RouterOperands::default());
        let device = prelude.with(&[FORMAT, PRODUCT, SELECT, ROUTER_TEXT]);
        let bounds = self.plan.bounds(self.tokens);
        Ok(Source { name: ROUTER, params: operands.params, device, body, bounds })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing, too many or misaligned.
    pub fn launch(&self, o: &RouterOperands) -> Result<Launch, KernelError> {
        self.check()?;
        given(ROUTER, "the norm's weights", self.norm.is_some_and(|n| n.weight), &o.norm)?;
        given(ROUTER, "the bias", self.bias, &o.bias)?;
        given(ROUTER, "the bias of the choice", self.select.bias, &o.select.bias)?;
        aligned(ROUTER, "x", o.x, 16)?;
        aligned(ROUTER, "the norm's weights", o.norm.unwrap_or(0), 16)?;
        o.matrix.check(ROUTER, self.work())?;
        // The last block ranks in what held x before.
        let ranks = if self.select.groups.is_some() { 4 * self.plan.warps * self.select.experts } else { 0 };
        Ok(Launch {
            grid: [self.plan.blocks(self.select.experts.div_ceil(self.plan.tile(false))), 1, 1],
            block: [32 * self.plan.warps as u32, 1, 1],
            shared: self.plan.shared(self.work(), ROUTER)?.max(ranks as u32),
            args: self.operands(o).0.args,
            bytes: (self.select.experts * self.format.row_bytes(self.columns)) as u64,
        })
    }
}
