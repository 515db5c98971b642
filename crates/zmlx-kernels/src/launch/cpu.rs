//! Launches on the CPU.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use zmlx_mlx::cpu::{CpuInput, CpuKernel, CpuOutput, CpuPrimitive, Spec};
use zmlx_mlx::{Array, Error as MlxError};

use super::{Given, Prepared, Shapes};
use crate::cpu::{self, Buffers, Code, Options, OutputBuffer};
use crate::dtype::{shape_of, to_mlx, to_shape};
use crate::{Kernel, Result, tuning};

struct Launch {
    kernel: Kernel,
    prepared: Arc<Prepared>,
    keeping: Arc<Code>,
    lean: Arc<Code>,
    given: Given,
}

/// The outputs, and which of the kernel's inputs each of the node's inputs is.
pub(super) fn launch(
    kernel: &Kernel,
    prepared: &Arc<Prepared>,
    arrays: &[Array],
    given: &Given,
) -> Result<(Vec<Array>, Vec<Option<usize>>)> {
    let inputs: Vec<Vec<usize>> = arrays.iter().map(|a| shape_of(a.shape())).collect();
    let block = tuning::cpu_block(kernel, prepared, &inputs, given);
    let launch = Launch {
        kernel: kernel.clone(),
        prepared: Arc::clone(prepared),
        keeping: prepared.code(Options { block, keep: true }),
        lean: prepared.code(Options { block, keep: false }),
        given: given.clone(),
    };
    let arrays: Vec<&Array> = arrays.iter().collect();
    let order = (0..arrays.len()).map(Some).collect();
    Ok((CpuPrimitive::new(launch).apply(&arrays)?, order))
}

impl Launch {
    fn shapes(&self, inputs: Vec<Vec<usize>>) -> std::result::Result<Shapes, MlxError> {
        Ok(Shapes::new(&self.prepared.program, inputs, &self.given)?)
    }
}

impl CpuKernel for Launch {
    fn name(&self) -> &str {
        self.kernel.name()
    }

    fn outputs(&self, inputs: &[Spec]) -> std::result::Result<Vec<Spec>, MlxError> {
        let shapes = self.shapes(inputs.iter().map(|s| shape_of(&s.shape)).collect())?;
        let outputs = self.prepared.program.outputs.iter().zip(&shapes.outputs);
        Ok(outputs.map(|(o, shape)| Spec::new(&to_shape(shape), to_mlx(o.dtype))).collect())
    }

    fn eval(
        &self,
        inputs: &[CpuInput<'_>],
        outputs: &mut [CpuOutput<'_>],
    ) -> std::result::Result<(), MlxError> {
        let counters = &self.kernel.0.counters;
        let start = counters.timing.load(Relaxed).then(Instant::now);
        let bytes = inputs.iter().map(CpuInput::as_bytes).collect::<std::result::Result<Vec<_>, _>>()?;
        let shapes = self.shapes(inputs.iter().map(|i| shape_of(i.shape())).collect())?;
        let mut buffers = Vec::with_capacity(outputs.len());
        for (output, shape) in outputs.iter_mut().zip(&shapes.outputs) {
            buffers.push(OutputBuffer { bytes: output.as_mut_bytes()?, shape: shape.clone() });
        }
        let call =
            Buffers { domain: &shapes.domain, inputs: &bytes, shapes: &shapes.inputs, outputs: buffers };
        cpu::run(&self.keeping, &self.lean, call).map_err(MlxError::Custom)?;
        counters.add(&counters.cpu, 1);
        if let Some(start) = start {
            counters.add(&counters.nanoseconds, start.elapsed().as_nanos() as u64);
            counters.add(&counters.timed, 1);
        }
        Ok(())
    }
}
