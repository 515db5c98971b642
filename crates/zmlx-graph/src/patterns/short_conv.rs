use std::sync::Arc;

use zmlx_engine::program::Slot;
use zmlx_engine::stages::ShortConv;

use super::{NormOf, source};
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::{ConvStep, DepthwiseConv1d, Linear, Split};
use crate::pattern::{Match, Pattern};
use crate::state::SlotId;

/// The gated short convolution of LFM2.
pub static PATTERN: Pattern = Pattern {
    name: "short_conv",
    summary: "norm, input product, gate, convolution step and gate as one op",
    class: Fidelity::TokenIdentical,
    templates: &["
        n ~ rms_norm?(x)
        bcx = linear(n)
        b, c, v = split(bcx)
        bv = multiply(b, v)
        s = conv_step(bv)
        k = depthwise_conv1d(s)
        y = multiply(c, k)
        return y
    "],
    build,
};

#[derive(Debug)]
struct Fused {
    input: usize,
    norm: NormOf,
    linear: Linear,
    conv: DepthwiseConv1d,
    slot: SlotId,
    keep: usize,
    taps: usize,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let linear = m.need::<Linear>("bcx")?.clone();
    let (rows, _) = m.matrix(linear.weight)?;
    if m.need::<Split>("b")?.parts != 3 || rows % 3 != 0 {
        return Err("its product is not split in three".to_owned());
    }
    if (rows / 3) % 8 != 0 {
        return Err(format!("{} channels: a multiple of 8 is supported", rows / 3));
    }
    let step = m.need::<ConvStep>("s")?;
    let conv = m.need::<DepthwiseConv1d>("k")?.clone();
    let taps = m.weight(conv.weight)?.shape.get(1).copied().unwrap_or(0);
    if step.keep != taps - 1 {
        return Err(format!("{taps} taps with {} kept inputs", step.keep));
    }
    let (slot, keep, taps) = (step.slot, step.keep as usize, taps as usize);
    let input = m.rows("x")?;
    Ok(Arc::new(Fused { input, norm: m.norm("n"), linear, conv, slot, keep, taps }))
}

impl Body for Fused {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let matrix = l.matrix(self.linear.weight)?;
        let channels = matrix.rows() / 3;
        let source = source(l, self.input, self.norm, &matrix)?;
        let bias = l.bias(self.linear.bias)?;
        let kernel = l.vector(self.conv.weight)?;
        let conv_bias = l.bias(self.conv.bias)?;
        let slot = l.slot(self.slot, Slot::rows(self.keep, channels));
        let out = l.output(0, Form::Flat { width: channels });
        l.push(ShortConv { source, matrix, bias, kernel, taps: self.taps, conv_bias, slot, out });
        Ok(())
    }
}
