//! The gated delta net.

use zmlx_engine::stages::{self, Columns};

use super::{Translator, made};
use crate::error::{CudaError, Result};
use crate::kernels::{ConvSilu, ConvSiluOperands, Delta, DeltaOperands, Norm};
use crate::plan::SlotAddress;

impl Translator<'_> {
    pub(super) fn conv_silu(&mut self, stage: &stages::ConvSilu) -> Result<()> {
        let state = self.rows(stage.slot, [stage.taps - 1, stage.channels])?;
        let columns: Vec<usize> =
            stage.x.pieces.iter().flat_map(|&(start, len)| start..start + len).collect();
        if columns.len() != stage.channels {
            let (found, channels) = (columns.len(), stage.channels);
            return Err(CudaError::Argument(format!("{found} columns for a convolution of {channels}")));
        }
        let operands = ConvSiluOperands {
            x: self.buffer(stage.x.buffer)?,
            columns: self.places(columns)?,
            kernel: self.constant(&stage.kernel)?,
            bias: self.optional_constant(stage.bias.as_ref())?,
            state,
            out: self.buffer(stage.out)?,
        };
        let kernel = ConvSilu {
            channels: stage.channels,
            taps: stage.taps,
            x_width: stage.x.width,
            sequences: self.sequences(),
            length: 1,
            bias: operands.bias.is_some(),
        };
        self.push("convolution + silu", made(kernel.source(), kernel.launch(&operands))?);
        Ok(())
    }

    /// The delta rule and the norm with a gate, two launches.
    pub(super) fn delta_heads(&mut self, stage: &stages::DeltaHeads) -> Result<()> {
        let stages::DeltaHeads { heads, key_heads, key, value, .. } = *stage;
        let state = self.rows(stage.slot, [heads * value, key])?;
        let parts = [(&stage.a, 1), (&stage.b, 1), (&stage.z, value)];
        for (columns, width) in parts {
            if columns.pieces.len() != heads || columns.pieces.iter().any(|&(_, len)| len != width) {
                let message = format!("a delta rule of {heads} heads needs a piece of {width} a head");
                return Err(CudaError::Argument(message));
            }
        }
        let begins = |columns: &Columns| columns.pieces.iter().map(|&(start, _)| start).collect::<Vec<_>>();
        let weight = self.optional_constant(stage.norm.weight.as_ref())?;
        let operands = DeltaOperands {
            mixed: self.buffer(stage.mixed)?,
            a: self.buffer(stage.a.buffer)?,
            b: self.buffer(stage.b.buffer)?,
            z: self.buffer(stage.z.buffer)?,
            places: self.places(parts.iter().flat_map(|(columns, _)| begins(columns)).collect())?,
            a_log: self.constant(&stage.a_log)?,
            dt_bias: self.constant(&stage.dt_bias)?,
            norm: weight,
            state,
            out: self.buffer(stage.out)?,
        };
        let kernel = Delta {
            key_heads,
            heads,
            key,
            value,
            units: stage.units.map(|unit| [unit.scale, unit.eps]),
            widths: parts.map(|(columns, _)| columns.width),
            norm: Norm { eps: stage.norm.eps, weight: weight.is_some() },
            sequences: self.sequences(),
            length: 1,
        };
        let launches = kernel.launches(&operands)?;
        for (name, made) in
            ["gated delta rule", "gated norm"].into_iter().zip(kernel.sources()?.into_iter().zip(launches))
        {
            self.push(name, made);
        }
        Ok(())
    }

    /// A slot of rows of this shape.
    fn rows(&self, slot: usize, shape: [usize; 2]) -> Result<u64> {
        match self.slot(slot)? {
            SlotAddress::Rows { values, keep, channels } if [keep, channels] == shape => Ok(values),
            _ => Err(CudaError::Argument(format!("slot {slot} does not hold rows {shape:?}"))),
        }
    }

    /// Numbers of 32 bits that say where things are in a row; one copy for all layers whose rows are alike.
    fn places(&mut self, places: Vec<usize>) -> Result<u64> {
        if let Some(&address) = self.places.get(&places) {
            return Ok(address);
        }
        let too_many = |_| CudaError::Argument("a row of more than 2^31 floats".to_owned());
        let bits = places.iter().map(|&at| i32::try_from(at).map(|at| f32::from_bits(at as u32)));
        // As floats of the same bits: constants are stored as they are.
        let bits = bits.collect::<std::result::Result<Vec<f32>, _>>().map_err(too_many)?;
        let address = self.memory.constant(&bits)?;
        self.places.insert(places, address);
        Ok(address)
    }
}
