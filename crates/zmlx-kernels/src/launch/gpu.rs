//! Launches on a GPU.

use std::sync::Arc;

use zmlx_lang::emit::{self, Dialect, Layout, Params, Plan};
use zmlx_lang::program::Program;
use zmlx_mlx::Array;
use zmlx_mlx::kernel::{self, Launch, Source as MlxSource, Spec};

use super::{Prepared, Shapes};
use crate::dtype::{to_mlx, to_shape};
use crate::{Error, Kernel, Result, tuning};

/// A text and the kernel that MLX made of it.
pub(crate) struct Compiled {
    pub source: emit::Source,
    kernel: kernel::Kernel,
}

/// The outputs, and which of the kernel's inputs each of the node's inputs is.
pub(super) fn launch(
    kernel: &Kernel,
    prepared: &Arc<Prepared>,
    dialect: Dialect,
    arrays: &[Array],
    shapes: &Shapes,
) -> Result<(Vec<Array>, Vec<Option<usize>>)> {
    let params = tuning::gpu_params(kernel, prepared, dialect, shapes)?;
    launch_with(kernel, prepared, dialect, arrays, shapes, params)
}

/// The same with given parameters.
pub(crate) fn launch_with(
    kernel: &Kernel,
    prepared: &Arc<Prepared>,
    dialect: Dialect,
    arrays: &[Array],
    shapes: &Shapes,
    params: Params,
) -> Result<(Vec<Array>, Vec<Option<usize>>)> {
    let program = &prepared.program;
    let plan = plan(program, shapes, params);
    let compiled = prepared
        .sources
        .get((dialect, plan.clone()), |(dialect, plan)| compile(kernel, program, *dialect, plan))?;
    let sizes = emit::meta(program, &plan, &shapes.domain.shape, &shapes.inputs, &shapes.outputs)?;
    let meta = prepared.sizes.get((plan.index64, sizes), |(wide, sizes)| size_array(*wide, sizes))?;
    let (rows, cols) = (shapes.domain.rows as u64, shapes.domain.cols as u64);
    let grid = compiled.source.grid.grid(rows, cols).ok_or_else(|| Error::Launch {
        kernel: kernel.name().to_owned(),
        what: "groups of threads",
        requested: compiled.source.grid.groups(rows, cols).to_string(),
        allowed: "65535 x 2^20".to_owned(),
    })?;
    let number = |n: [u32; 3]| n.map(|v| v as i32);
    let outputs: Vec<Spec> = program
        .outputs
        .iter()
        .zip(&shapes.outputs)
        .map(|(o, s)| Spec::new(&to_shape(s), to_mlx(o.dtype)))
        .collect();
    let mut order: Vec<Option<usize>> = Vec::new();
    let mut inputs: Vec<Array> = Vec::new();
    for (n, (_, array)) in program.inputs.iter().zip(arrays).enumerate().filter(|(_, (i, _))| i.used) {
        inputs.push(if array.ndim() == 0 { array.reshape(&[1])? } else { array.clone() });
        order.push(Some(n));
    }
    inputs.push(meta);
    order.push(None);
    let inputs: Vec<&Array> = inputs.iter().collect();
    let scatters = program.outputs.iter().any(|o| o.scatter.is_some());
    let launch = Launch {
        outputs: &outputs,
        grid: number(grid),
        threadgroup: number(compiled.source.grid.threadgroup()),
        template: &[],
        init_value: scatters.then_some(0.0),
        verbose: false,
    };
    let out = compiled.kernel.call(&inputs, &launch)?;
    kernel.0.counters.add(&kernel.0.counters.gpu, 1);
    Ok((out, order))
}

fn compile(kernel: &Kernel, program: &Program, dialect: Dialect, plan: &Plan) -> Result<Arc<Compiled>> {
    let source = emit::emit(program, dialect, plan)?;
    kernel.0.counters.add(&kernel.0.counters.sources, 1);
    let inputs: Vec<&str> = source.inputs.iter().map(String::as_str).collect();
    let outputs: Vec<&str> = source.outputs.iter().map(String::as_str).collect();
    let text = MlxSource {
        name: &source.name,
        inputs: &inputs,
        outputs: &outputs,
        body: &source.body,
        header: &source.header,
        atomic_outputs: source.atomic_outputs,
        shared_memory: source.shared_memory as i32,
    };
    let made = match dialect {
        Dialect::Metal => kernel::metal_kernel(&text)?,
        Dialect::Cuda => kernel::cuda_kernel(&text)?,
    };
    Ok(Arc::new(Compiled { source, kernel: made }))
}

fn size_array(wide: bool, sizes: &[i64]) -> Result<Array> {
    let n = [sizes.len() as i32];
    if wide {
        return Ok(Array::from_slice(sizes, &n)?);
    }
    let narrow: Vec<i32> = sizes.iter().map(|v| *v as i32).collect();
    Ok(Array::from_slice(&narrow, &n)?)
}

/// The plan that shapes and parameters make.
pub(crate) fn plan(program: &Program, shapes: &Shapes, params: Params) -> Plan {
    let domain = &shapes.domain.shape;
    let layouts =
        program.inputs.iter().zip(&shapes.inputs).map(|(i, s)| Layout::of(i.role, s, domain)).collect();
    let index64 = emit::needs_index64(domain, &shapes.inputs, &shapes.outputs);
    Plan::new(layouts, domain.len(), index64, params)
}
