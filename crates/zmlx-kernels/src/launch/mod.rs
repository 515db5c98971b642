//! From arrays to a node of MLX's graph: checks, the device's way of running, transforms.

mod cpu;
pub(crate) mod gpu;
mod rules;
pub(crate) mod slices;
mod split;

use std::sync::{Arc, OnceLock};

use zmlx_lang::emit::Dialect;
use zmlx_lang::shape::{self, Domain};
use zmlx_lang::{Dtype, Program};
use zmlx_mlx::runtime::{Backend, backend_available};
use zmlx_mlx::stream::{Device, current_device, with_device};
use zmlx_mlx::{Array, transforms};

use crate::cache::Cache;
use crate::cpu::{Code, Options};
use crate::dtype::shape_of;
use crate::{Error, Kernel, Result};

/// Shapes that the caller decides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Given {
    pub domain: Option<Vec<usize>>,
    pub outputs: Vec<Option<Vec<usize>>>,
}

/// A typed program with what backends make of it.
pub(crate) struct Prepared {
    pub program: Program,
    codes: Cache<Options, Arc<Code>>,
    pub sources: Cache<(Dialect, zmlx_lang::emit::Plan), Arc<gpu::Compiled>>,
    pub sizes: Cache<(bool, Vec<i64>), Array>,
    /// The kernel in two launches, when a GPU can't do it in one.
    split: OnceLock<Option<split::Split>>,
    /// Choices of the tuner, by dialect and class of shapes.
    pub tuned: Cache<String, Option<zmlx_tune::Candidate>>,
}

/// GPU texts, size arrays and tuned choices that a program remembers.
const TEXTS: usize = 64;

impl Prepared {
    pub fn new(program: Program) -> Self {
        Self {
            program,
            codes: Cache::new(16),
            sources: Cache::new(TEXTS),
            sizes: Cache::new(TEXTS),
            split: OnceLock::new(),
            tuned: Cache::new(TEXTS),
        }
    }

    pub fn code(&self, options: Options) -> Arc<Code> {
        let made: std::result::Result<_, std::convert::Infallible> =
            self.codes.get(options, |o| Ok(Arc::new(Code::new(self.program.clone(), *o))));
        match made {
            Ok(code) => code,
            Err(never) => match never {},
        }
    }

    pub fn dtypes(&self) -> Vec<Dtype> {
        self.program.inputs.iter().map(|i| i.dtype).collect()
    }
}

/// A call with all shapes known.
pub(crate) struct Shapes {
    pub inputs: Vec<Vec<usize>>,
    pub domain: Domain,
    pub outputs: Vec<Vec<usize>>,
}

impl Shapes {
    pub fn new(program: &Program, inputs: Vec<Vec<usize>>, given: &Given) -> Result<Self> {
        let domain = shape::domain(program, &inputs, given.domain.as_deref())?;
        let outputs = shape::output_shapes(program, &domain, &inputs, &given.outputs)?;
        Ok(Self { inputs, domain, outputs })
    }

    /// Bytes that a launch must move: used inputs once, outputs once.
    pub fn bytes(&self, program: &Program) -> u64 {
        let size = |shape: &[usize], dtype: Dtype| {
            shape.iter().map(|d| *d as u64).product::<u64>() * dtype.size() as u64
        };
        let used = program.inputs.iter().zip(&self.inputs).filter(|(i, _)| i.used);
        let read: u64 = used.map(|(i, s)| size(s, i.dtype)).sum();
        let written: u64 = program.outputs.iter().zip(&self.outputs).map(|(o, s)| size(s, o.dtype)).sum();
        read + written
    }
}

/// The language of the loaded library's GPU, if it has one.
pub(crate) fn dialect() -> Result<Option<Dialect>> {
    static FOUND: OnceLock<Option<Dialect>> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let found = if backend_available(Backend::Metal)? {
        Some(Dialect::Metal)
    } else if backend_available(Backend::Cuda)? {
        Some(Dialect::Cuda)
    } else {
        None
    };
    Ok(*FOUND.get_or_init(|| found))
}

/// Puts a kernel into the graph, on the current stream's device.
pub(crate) fn launch(kernel: &Kernel, arrays: Vec<Array>, given: &Given) -> Result<Vec<Array>> {
    let prepared = kernel.prepare(kernel.dtypes(&arrays)?)?;
    let inputs = arrays.iter().map(|a| shape_of(a.shape())).collect();
    let shapes = Shapes::new(&prepared.program, inputs, given)?;
    let counters = &kernel.0.counters;
    counters.add(&counters.bytes, shapes.bytes(&prepared.program));
    let on_gpu = current_device()? == Device::Gpu && !shapes.domain.is_empty();
    let dialect = if on_gpu { dialect()? } else { None };
    let (outputs, order) = match dialect {
        Some(dialect) => on_gpu_whole_or_split(kernel, &prepared, dialect, &arrays, &shapes, given)?,
        // Nothing to compute on a GPU: the few identities of empty rows are written on the CPU.
        None if current_device()? == Device::Gpu => {
            with_device(Device::Cpu, || Ok(cpu::launch(kernel, &prepared, &arrays, given)?))?
        }
        None => cpu::launch(kernel, &prepared, &arrays, given)?,
    };
    let rules = rules::Rules::new(kernel, &prepared, given, shapes, order);
    let outputs: Vec<&Array> = outputs.iter().collect();
    Ok(transforms::with_transforms(&outputs, rules)?)
}

/// One launch, or two when the kernel scans in both directions.
fn on_gpu_whole_or_split(
    kernel: &Kernel,
    prepared: &Arc<Prepared>,
    dialect: Dialect,
    arrays: &[Array],
    shapes: &Shapes,
    given: &Given,
) -> Result<(Vec<Array>, Vec<Option<usize>>)> {
    let known = prepared.split.get();
    if let Some(None) | None = known {
        match gpu::launch(kernel, prepared, dialect, arrays, shapes) {
            Err(Error::Lang(zmlx_lang::LangError::Unsupported { .. })) if known.is_none() => {}
            other => return other,
        }
    }
    let halves = match known {
        Some(halves) => halves,
        None => {
            let halves = split::split(kernel, &prepared.dtypes())?;
            prepared.split.get_or_init(|| halves)
        }
    };
    let Some(halves) = halves else { return gpu::launch(kernel, prepared, dialect, arrays, shapes) };
    let domain = Given { domain: Some(shapes.domain.shape.clone()), outputs: Vec::new() };
    let scans = launch(&halves.first, arrays.to_vec(), &domain)?;
    let own = arrays.len();
    let all: Vec<Array> = arrays.iter().cloned().chain(scans).collect();
    let second = halves.second.prepare(halves.second.dtypes(&all)?)?;
    let inputs = all.iter().map(|a| shape_of(a.shape())).collect();
    let given = Given { outputs: given.outputs.clone(), ..domain };
    let shapes = Shapes::new(&second.program, inputs, &given)?;
    let (outputs, order) = on_gpu_whole_or_split(&halves.second, &second, dialect, &all, &shapes, &given)?;
    // Scans are no inputs of the whole kernel: its rules are in terms of its own inputs alone.
    Ok((outputs, order.into_iter().map(|n| n.filter(|n| *n < own)).collect()))
}
