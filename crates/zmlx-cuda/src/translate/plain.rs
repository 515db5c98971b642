//! Embedding, convolution, router, stages without a product, and the choice of the next token.

use zmlx_engine::stages;

use super::{Translator, made};
use crate::error::{CudaError, Result};
use crate::kernels::{
    Argmax, Embed, Groups, Next, NextOperands, Plain, PlainOp, PlainOperands, Qmv, QmvOperands, Route,
    Router, RouterOperands, Scores, Select, SelectOperands, ShortConv, ShortConvOperands,
};
use crate::plan::SlotAddress;

pub(super) fn select(stage: &stages::Route) -> Select {
    Select {
        experts: stage.experts,
        k: stage.k,
        scores: match stage.scores {
            stages::Scores::Sigmoid => Scores::Sigmoid,
            stages::Scores::Softmax => Scores::Softmax,
            stages::Scores::SoftmaxOfChosen => Scores::SoftmaxOfChosen,
        },
        bias: stage.bias.is_some(),
        ties_higher: stage.ties == stages::Ties::Higher,
        groups: stage.groups.map(|g| Groups { count: g.count, keep: g.keep }),
        renormalise: stage.renormalise,
        scale: stage.scale,
    }
}

impl<'a> Translator<'a> {
    pub(super) fn embed(&mut self, stage: &stages::Embed) -> Result<()> {
        let (format, matrix) = self.matrix(&stage.matrix)?;
        let kernel = Embed {
            rows: stage.matrix.rows(),
            columns: stage.matrix.columns(),
            format,
            tokens: self.sequences(),
            scale: stage.scale,
            rounded: stage.rounded,
        };
        let out = self.buffer(stage.out)?;
        let launch = kernel.launch(self.request.control.tokens, &matrix, out);
        self.push("embedding", made(kernel.source(), launch)?);
        Ok(())
    }

    pub(super) fn short_conv(&mut self, stage: &stages::ShortConv) -> Result<()> {
        let SlotAddress::Rows { values: state, .. } = self.slot(stage.slot)? else {
            return Err(CudaError::Argument(format!("slot {} holds no rows", stage.slot)));
        };
        let (format, matrix) = self.matrix(&stage.matrix)?;
        let (norm, norm_weight) = self.norm(stage.source.norm.as_ref())?;
        let operands = ShortConvOperands {
            x: self.buffer(stage.source.buffer)?,
            norm: norm_weight,
            matrix,
            bias: self.optional_constant(stage.bias.as_ref())?,
            kernel: self.constant(&stage.kernel)?,
            conv_bias: self.optional_constant(stage.conv_bias.as_ref())?,
            state,
            out: self.buffer(stage.out)?,
        };
        let (channels, columns) = (stage.matrix.rows() / 3, stage.matrix.columns());
        let kernel = ShortConv {
            norm,
            bias: operands.bias.is_some(),
            conv_bias: operands.conv_bias.is_some(),
            ..ShortConv::new(channels, columns, format, [self.sequences(), 1], stage.taps)
        };
        self.push("short_conv", self.product(kernel, |k| (k.source(), k.launch(&operands)))?);
        Ok(())
    }

    /// A router's product and its choice as one launch.
    /// A router's product and choice. Where experts of the choice follow, they choose for themselves: to meet once more in
    /// this launch would take longer.
    pub(super) fn router(&mut self, linear: &stages::Linear, route: &'a stages::Route) -> Result<()> {
        let (format, matrix) = self.matrix(&linear.matrix)?;
        let (norm, norm_weight) = self.norm(linear.source.norm.as_ref())?;
        if self.chosen_by_experts(route) {
            // Of its own: nobody else knows that it is read so late.
            let [logits, _] = self.shared_room([self.sequences() * linear.matrix.rows(), 1])?;
            let operands = QmvOperands {
                x: self.buffer(linear.source.buffer)?,
                norm: norm_weight,
                weights: matrix,
                bias: [self.optional_constant(linear.bias.as_ref())?, None],
                out: logits,
                ..QmvOperands::default()
            };
            let columns = linear.matrix.columns();
            let kernel = |tokens| Qmv {
                norm,
                bias: [operands.bias[0].is_some(), false],
                plan: Router::new(select(route), columns, format, tokens).plan,
                ..Qmv::new(linear.matrix.rows(), columns, format, tokens)
            };
            self.rows_product("router", kernel, operands)?;
            self.choice = Some((route, logits));
            return Ok(());
        }
        let [arrived, _] = self.shared_counters(1)?;
        let operands = RouterOperands {
            x: self.buffer(linear.source.buffer)?,
            norm: norm_weight,
            matrix,
            bias: self.optional_constant(linear.bias.as_ref())?,
            logits: self.buffer(route.logits)?,
            arrived,
            select: self.select_operands(route)?,
        };
        let kernel = Router {
            norm,
            bias: operands.bias.is_some(),
            ..Router::new(select(route), linear.matrix.columns(), format, self.sequences())
        };
        self.push("router", self.product(kernel, |k| (k.source(), k.launch(&operands)))?);
        Ok(())
    }

    /// Whether the first products with experts after that choice are of its experts.
    fn chosen_by_experts(&self, route: &stages::Route) -> bool {
        let mut at = self.next_at();
        while let Some(here) = at {
            if let Some(up) = self.stage_at::<stages::ExpertsUp>(here) {
                return up.choice.indices == route.indices;
            }
            if self.stage_at::<stages::ExpertsDown>(here).is_some() {
                return false;
            }
            at = self.next_after(here);
        }
        false
    }

    pub(super) fn route(&mut self, stage: &stages::Route) -> Result<()> {
        let operands = self.select_operands(stage)?;
        let logits = self.buffer(stage.logits)?;
        let kernel = Route { select: select(stage), tokens: self.sequences() };
        self.push("router", made(kernel.source(), kernel.launch(logits, &operands))?);
        Ok(())
    }

    pub(super) fn select_operands(&mut self, stage: &stages::Route) -> Result<SelectOperands> {
        Ok(SelectOperands {
            bias: self.optional_constant(stage.bias.as_ref())?,
            indices: self.buffer(stage.indices)?,
            weights: self.buffer(stage.weights)?,
        })
    }

    pub(super) fn rms_norm(&mut self, stage: &stages::RmsNorm) -> Result<()> {
        let (norm, weight) = self.norm(Some(&stage.norm))?;
        let Some(norm) = norm else { return Ok(()) };
        let (x, out) = (self.buffer(stage.x)?, self.buffer(stage.out)?);
        let operands = PlainOperands { x, weight, out, ..PlainOperands::default() };
        self.plain("rms_norm", PlainOp::RmsNorm(norm), stage.width, &operands)
    }

    pub(super) fn layer_norm(&mut self, stage: &stages::LayerNorm) -> Result<()> {
        let weight = self.optional_constant(stage.weight.as_ref())?;
        let bias = self.optional_constant(stage.bias.as_ref())?;
        let (x, out) = (self.buffer(stage.x)?, self.buffer(stage.out)?);
        let op = PlainOp::LayerNorm { eps: stage.eps, weight: weight.is_some(), bias: bias.is_some() };
        let operands = PlainOperands { x, weight, bias, out, other: None };
        self.plain("layer_norm", op, stage.width, &operands)
    }

    pub(super) fn softmax(&mut self, stage: &stages::Softmax) -> Result<()> {
        let (x, out) = (self.buffer(stage.x)?, self.buffer(stage.out)?);
        let operands = PlainOperands { x, out, ..PlainOperands::default() };
        self.plain("softmax", PlainOp::Softmax, stage.width, &operands)
    }

    pub(super) fn add(&mut self, stage: &stages::Add) -> Result<()> {
        let (x, other) = (self.buffer(stage.a)?, Some(self.buffer(stage.b)?));
        let operands = PlainOperands { x, other, out: self.buffer(stage.out)?, ..PlainOperands::default() };
        self.plain("add", PlainOp::Add, stage.width, &operands)
    }

    pub(super) fn sigmoid_gate(&mut self, stage: &stages::SigmoidGate) -> Result<()> {
        let (x, out) = (self.buffer(stage.gate)?, self.buffer(stage.x)?);
        let operands = PlainOperands { x, out, ..PlainOperands::default() };
        self.plain("gate", PlainOp::SigmoidGate, stage.width, &operands)
    }

    fn plain(
        &mut self,
        name: &'static str,
        op: PlainOp,
        width: usize,
        operands: &PlainOperands,
    ) -> Result<()> {
        let kernel = Plain { op, rows: self.sequences(), width };
        self.push(name, made(kernel.source(), kernel.launch(operands))?);
        Ok(())
    }

    /// The likeliest token as a launch of its own, where the product of the head has not chosen it on its way.
    pub(super) fn choose(&mut self) -> Result<()> {
        if self.chosen {
            return Ok(());
        }
        let logits = self.buffer(self.request.logits)?;
        let (next, operands) = self.next_token();
        let kernel = Argmax { width: self.request.vocabulary, tokens: self.sequences(), next };
        self.at = self.request.program.stages().len().saturating_sub(1);
        self.push("argmax", made(kernel.source(), kernel.launch(logits, &operands))?);
        Ok(())
    }

    /// What follows a token: the one chosen is told to the host and fed to the next replay.
    pub(super) fn next_token(&self) -> (Next, NextOperands) {
        let control = self.request.control;
        let operands = NextOperands {
            best: control.best,
            arrived: control.arrived,
            tokens: control.tokens,
            position: control.position,
            ring: control.ring,
            count: control.count,
            published: control.published,
        };
        (Next { ring: control.ring_len }, operands)
    }
}
