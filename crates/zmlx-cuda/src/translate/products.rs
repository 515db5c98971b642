//! Products: alone, as gated pairs, and with experts.

use zmlx_engine::stages::{self, Norm as StageNorm};

use super::Translator;
use super::plain::select;
use crate::error::{CudaError, Result};
use crate::kernels::{ExpertsDown, ExpertsDownOperands, ExpertsUp, ExpertsUpOperands, Qmv, QmvOperands};

impl<'a> Translator<'a> {
    pub(super) fn linear(&mut self, stage: &stages::Linear) -> Result<()> {
        if self.latent_group()? {
            return Ok(());
        }
        let route: Option<&stages::Route> = self.next_stage();
        let plain = stage.gate.is_none() && stage.residual.is_none();
        if let Some(route) = route.filter(|r| plain && r.logits == stage.out) {
            self.router(stage, route)?;
            self.skip_to_next();
            return Ok(());
        }
        if self.stacked(stage)? {
            return Ok(());
        }
        let (format, weights) = self.matrix(&stage.matrix)?;
        let (norm, norm_weight) = self.norm(stage.source.norm.as_ref())?;
        let operands = QmvOperands {
            x: self.buffer(stage.source.buffer)?,
            norm: norm_weight,
            weights,
            second: None,
            third: None,
            bias: [self.optional_constant(stage.bias.as_ref())?, None],
            gate: self.optional_buffer(stage.gate)?,
            residual: self.optional_buffer(stage.residual)?,
            next: None,
            out: self.written(stage.out)?,
        };
        let kernel = |tokens| Qmv {
            norm,
            bias: [operands.bias[0].is_some(), false],
            gate: operands.gate.is_some(),
            residual: operands.residual.is_some(),
            ..Qmv::new(stage.matrix.rows(), stage.matrix.columns(), format, tokens)
        };
        let tokens = self.sequences();
        let is_head = stage.out == self.request.logits && self.next_at().is_none();
        if is_head && Qmv::chooses(tokens) && self.rows_at_once(kernel) == tokens {
            // What it makes decides on the next tokens.
            let (next, next_operands) = self.next_token();
            let operands = QmvOperands { next: Some(next_operands), ..operands };
            let kernel = Qmv { next: Some(next), ..kernel(tokens) };
            self.push("head + argmax", self.product(kernel, |k| (k.source(), k.launch(&operands)))?);
            self.chosen = true;
            return Ok(());
        }
        self.rows_product("linear", kernel, operands)
    }

    /// Rows of x that a product takes in one launch: all, or as many as a block's shared memory holds.
    fn rows_at_once(&self, kernel: impl Fn(usize) -> Qmv) -> usize {
        let all = self.sequences();
        let each = (1..=all).map(|launches| all.div_ceil(launches));
        each.into_iter().find(|&rows| kernel(rows).fits(self.request.shared_memory)).unwrap_or(1)
    }

    /// Products of the rows of all sequences: a launch, or some of as many rows as fit. `kernel`: of so many rows.
    pub(super) fn rows_product(
        &mut self,
        name: &'static str,
        kernel: impl Fn(usize) -> Qmv,
        operands: QmvOperands,
    ) -> Result<()> {
        let (all, each) = (self.sequences(), self.rows_at_once(&kernel));
        for first in (0..all).step_by(each) {
            let kernel = kernel(each.min(all - first));
            let operands = operands.from_row(&kernel, first);
            self.push(name, self.product(kernel, |k| (k.source(), k.launch(&operands)))?);
        }
        Ok(())
    }

    /// Products of the same rows that come one after another, three at most, as one launch: small ones, such as the gates of
    /// a delta net, would keep few multiprocessors busy. Whether there are any. Of one sequence: rows of several would lie
    /// apart, each with the other products' behind it.
    fn stacked(&mut self, first: &stages::Linear) -> Result<bool> {
        if self.sequences() > 1 {
            return Ok(false);
        }
        let all = self.alike_linears(first)?;
        if all.len() < 2 {
            return Ok(false);
        }
        let rows: Vec<usize> = all.iter().map(|(_, l)| l.matrix.rows()).collect();
        let total: usize = rows.iter().sum();
        let (format, weights) = self.matrix(&first.matrix)?;
        let further = |i: usize| all.get(i).map(|(_, l)| self.matrix(&l.matrix)).transpose();
        let (second, third) = (further(1)?, further(2)?);
        let (norm, norm_weight) = self.norm(first.source.norm.as_ref())?;
        let biases = all.iter().map(|(_, l)| (&l.bias, l.matrix.rows()));
        let bias = self.joined_bias(biases)?;
        let x = self.buffer(first.source.buffer)?;
        let out = self.memory.room(total * size_of::<f32>())?;
        let operands = QmvOperands {
            x,
            norm: norm_weight,
            weights,
            second: second.map(|(_, weights)| weights),
            third: third.map(|(_, weights)| weights),
            bias: [bias, None],
            out,
            ..QmvOperands::default()
        };
        let kernel = Qmv {
            stacked: [rows[1], rows.get(2).copied().unwrap_or(0)],
            norm,
            bias: [bias.is_some(), false],
            ..Qmv::new(total, first.matrix.columns(), format, 1)
        };
        self.push("linear", self.product(kernel, |k| (k.source(), k.launch(&operands)))?);
        // From here on their results are in that room, one after another: as wide as their buffers, which a token fills.
        let mut begin = 0;
        for ((at, linear), rows) in all.into_iter().zip(rows) {
            self.buffers.insert(linear.out, out + (begin * size_of::<f32>()) as u64);
            begin += rows;
            self.at = at;
        }
        Ok(true)
    }

    /// That product and those after it that take the same rows of a matrix that is coded alike, with where they are.
    fn alike_linears(&self, first: &stages::Linear) -> Result<Vec<(usize, &'a stages::Linear)>> {
        const MOST: usize = 3;
        let mut at = Some(self.at);
        let mut found: Vec<(usize, &'a stages::Linear)> = Vec::new();
        while let Some(here) = at.filter(|_| found.len() < MOST) {
            let Some(linear) = self.stage_at::<stages::Linear>(here) else { break };
            let next = self.next_after(here);
            // A router's product is one with its choice, and the head decides on the next token.
            let routes =
                next.and_then(|n| self.stage_at::<stages::Route>(n)).is_some_and(|r| r.logits == linear.out);
            let width = self.request.program.widths().get(linear.out.0);
            // Rows begin where 16 bytes do, for who reads them.
            let whole = width == Some(&linear.matrix.rows()) && linear.matrix.rows().is_multiple_of(4);
            let plain = linear.gate.is_none() && linear.residual.is_none() && !linear.wanted_only;
            let fits = plain && whole && !routes && linear.out != self.request.logits;
            let same = linear.source.buffer == first.source.buffer
                && linear.out != first.source.buffer
                && linear.matrix.columns() == first.matrix.columns()
                && same_norm(linear.source.norm.as_ref(), first.source.norm.as_ref())
                && self.matrix(&linear.matrix)?.0 == self.matrix(&first.matrix)?.0;
            if !(fits && same) || found.iter().any(|(_, l)| l.out == linear.out) {
                break;
            }
            found.push((here, linear));
            at = next;
        }
        Ok(found)
    }

    pub(super) fn gated(&mut self, stage: &stages::Gated) -> Result<()> {
        let (format, weights) = self.matrix(&stage.gate)?;
        let (other, second) = self.matrix(&stage.up)?;
        alike("gate + up + activation", format == other)?;
        let (norm, norm_weight) = self.norm(stage.source.norm.as_ref())?;
        let [gate_bias, up_bias] = &stage.biases;
        let operands = QmvOperands {
            x: self.buffer(stage.source.buffer)?,
            norm: norm_weight,
            weights,
            second: Some(second),
            third: None,
            bias: [self.optional_constant(gate_bias.as_ref())?, self.optional_constant(up_bias.as_ref())?],
            gate: None,
            residual: None,
            next: None,
            out: self.buffer(stage.out)?,
        };
        let kernel = |tokens| {
            let plain = Qmv::new(stage.gate.rows(), stage.gate.columns(), format, tokens);
            Qmv { norm, bias: operands.bias.map(|b| b.is_some()), ..plain.gated(stage.activation) }
        };
        self.rows_product("gate + up + activation", kernel, operands)
    }

    pub(super) fn experts_up(&mut self, stage: &stages::ExpertsUp) -> Result<()> {
        let (format, gate) = self.matrix(&stage.gate)?;
        let (other, up) = self.matrix(&stage.up)?;
        alike("experts gate + up + activation", format == other)?;
        let (norm, norm_weight) = self.norm(stage.source.norm.as_ref())?;
        let [gate_bias, up_bias] = &stage.biases;
        let choice = self.choice.take_if(|(route, _)| route.indices == stage.choice.indices);
        let operands = ExpertsUpOperands {
            x: self.buffer(stage.source.buffer)?,
            norm: norm_weight,
            indices: self.buffer(stage.choice.indices)?,
            logits: choice.map_or(0, |(_, logits)| logits),
            choice: choice.map(|(route, _)| self.select_operands(route)).transpose()?.unwrap_or_default(),
            gate,
            up,
            bias: [self.optional_constant(gate_bias.as_ref())?, self.optional_constant(up_bias.as_ref())?],
            out: self.buffer(stage.out)?,
        };
        let sizes = [stage.choice.experts, stage.choice.k];
        let shape = [stage.gate.rows(), stage.gate.columns()];
        let kernel = ExpertsUp {
            norm,
            bias: operands.bias.map(|b| b.is_some()),
            select: choice.map(|(route, _)| select(route)),
            ..ExpertsUp::new(sizes, shape, format, self.sequences(), stage.activation)
        };
        self.push(
            "experts gate + up + activation",
            self.product(kernel, |k| (k.source(), k.launch(&operands)))?,
        );
        Ok(())
    }

    pub(super) fn experts_down(&mut self, stage: &stages::ExpertsDown) -> Result<()> {
        let (format, down) = self.matrix(&stage.down)?;
        let residuals = stage.residuals.iter().map(|r| self.buffer(*r)).collect::<Result<Vec<_>>>()?;
        let operands = ExpertsDownOperands {
            x: self.buffer(stage.source.buffer)?,
            indices: self.buffer(stage.choice.indices)?,
            scores: self.buffer(stage.weights)?,
            down,
            bias: self.optional_constant(stage.bias.as_ref())?,
            residuals,
            out: self.buffer(stage.out)?,
        };
        let sizes = [stage.choice.experts, stage.choice.k];
        let shape = [stage.down.rows(), stage.down.columns()];
        let kernel = ExpertsDown {
            bias: operands.bias.is_some(),
            residuals: operands.residuals.len(),
            ..ExpertsDown::new(sizes, shape, format, self.sequences())
        };
        self.push(
            "experts down + combine + residual",
            self.product(kernel, |k| (k.source(), k.launch(&operands)))?,
        );
        Ok(())
    }
}

/// Whether rows go through the same norm.
fn same_norm(a: Option<&StageNorm>, b: Option<&StageNorm>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => a.eps == b.eps && a.weight == b.weight,
        _ => false,
    }
}

/// Two matrices that are read in one go must be coded alike.
pub(super) fn alike(stage: &'static str, same: bool) -> Result<()> {
    if same {
        return Ok(());
    }
    Err(CudaError::Untranslated { stage, reason: "its matrices are coded differently".to_owned() })
}
