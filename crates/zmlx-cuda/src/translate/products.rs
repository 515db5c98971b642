//! Products: alone, as gated pairs, and with experts.

use zmlx_engine::stages::{self, Activation as StageActivation};

use super::{TOKENS, Translator, made};
use crate::error::{CudaError, Result};
use crate::kernels::{
    Activation, ExpertsDown, ExpertsDownOperands, ExpertsUp, ExpertsUpOperands, Qmv, QmvOperands,
};

pub(super) fn activation(activation: StageActivation) -> Activation {
    match activation {
        StageActivation::Silu => Activation::Silu,
        StageActivation::GeluTanh => Activation::GeluTanh,
        StageActivation::GeluErf => Activation::GeluErf,
        StageActivation::ClampedSwiGlu { alpha, limit } => Activation::ClampedSwiGlu { alpha, limit },
    }
}

impl Translator<'_> {
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
        // The head: what it makes decides on the next token.
        let next = (stage.out == self.request.logits && self.next_at().is_none()).then(|| self.next_token());
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
            next: next.map(|(_, operands)| operands),
            out: self.written(stage.out)?,
        };
        let kernel = Qmv {
            next: next.map(|(next, _)| next),
            norm,
            bias: [operands.bias[0].is_some(), false],
            gate: operands.gate.is_some(),
            residual: operands.residual.is_some(),
            ..Qmv::new(stage.matrix.rows(), stage.matrix.columns(), format, TOKENS)
        };
        let name = if next.is_some() { "head + argmax" } else { "linear" };
        self.push(name, made(kernel.source(), kernel.launch(&operands))?);
        self.chosen |= next.is_some();
        Ok(())
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
        let plain = Qmv::new(stage.gate.rows(), stage.gate.columns(), format, TOKENS);
        let kernel = Qmv {
            norm,
            bias: operands.bias.map(|b| b.is_some()),
            ..plain.gated(activation(stage.activation))
        };
        self.push("gate + up + activation", made(kernel.source(), kernel.launch(&operands))?);
        Ok(())
    }

    pub(super) fn experts_up(&mut self, stage: &stages::ExpertsUp) -> Result<()> {
        let (format, gate) = self.matrix(&stage.gate)?;
        let (other, up) = self.matrix(&stage.up)?;
        alike("experts gate + up + activation", format == other)?;
        let (norm, norm_weight) = self.norm(stage.source.norm.as_ref())?;
        let [gate_bias, up_bias] = &stage.biases;
        let operands = ExpertsUpOperands {
            x: self.buffer(stage.source.buffer)?,
            norm: norm_weight,
            indices: self.buffer(stage.choice.indices)?,
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
            ..ExpertsUp::new(sizes, shape, format, TOKENS, activation(stage.activation))
        };
        self.push("experts gate + up + activation", made(kernel.source(), kernel.launch(&operands))?);
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
            ..ExpertsDown::new(sizes, shape, format, TOKENS)
        };
        self.push("experts down + combine + residual", made(kernel.source(), kernel.launch(&operands))?);
        Ok(())
    }
}

/// Two matrices that are read in one go must be coded alike.
pub(super) fn alike(stage: &'static str, same: bool) -> Result<()> {
    if same {
        return Ok(());
    }
    Err(CudaError::Untranslated { stage, reason: "its matrices are coded differently".to_owned() })
}
