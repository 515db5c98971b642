//! Kernels with bodies of their own: text for a GPU, a closure for the CPU.

use std::sync::Arc;

use zmlx_lang::emit::Dialect;
use zmlx_mlx::cpu::{CpuInput, CpuKernel, CpuOutput, CpuPrimitive};
use zmlx_mlx::kernel::{self, Launch, Source};
pub use zmlx_mlx::kernel::{Spec, TemplateArg};
use zmlx_mlx::stream::{Device, current_device, with_device};
use zmlx_mlx::transforms::{Transforms, with_transforms};
use zmlx_mlx::{Array, Error as MlxError};

use crate::cache::Cache;
use crate::launch::{dialect, slices};
use crate::{Error, Result};

/// The text of a GPU body.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuText {
    /// Helpers before the kernel function.
    pub header: String,
    /// The kernel function's body.
    pub body: String,
}

/// How a GPU body is launched.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GpuLaunch {
    /// Threads in all, on each axis.
    pub grid: [i32; 3],
    /// Threads a group, on each axis.
    pub threadgroup: [i32; 3],
    /// Template arguments.
    pub template: Vec<(String, TemplateArg)>,
    /// What outputs are filled with first.
    pub init_value: Option<f32>,
}

type Specs = dyn Fn(&[Spec], &[i64]) -> Result<Vec<Spec>> + Send + Sync;
type Cpu =
    dyn Fn(&[CpuInput<'_>], &mut [CpuOutput<'_>], &[i64]) -> std::result::Result<(), MlxError> + Send + Sync;
type Shape = dyn Fn(&[Spec], &[i64]) -> Result<GpuLaunch> + Send + Sync;
type Gradient = dyn Fn(&[Array], &[Array], &[Array], &[usize], &[i64]) -> Result<Vec<Array>> + Send + Sync;

struct Inner {
    name: String,
    inputs: Vec<String>,
    outputs: Vec<String>,
    metal: Option<GpuText>,
    cuda: Option<GpuText>,
    atomic_outputs: bool,
    specs: Box<Specs>,
    cpu: Option<Box<Cpu>>,
    launch: Option<Box<Shape>>,
    gradient: Option<Box<Gradient>>,
    kernels: Cache<Dialect, Arc<kernel::Kernel>>,
}

/// A kernel whose bodies are written by hand. Numbers that decide shapes or code (a `k`, a group size) are parameters of
/// the call.
#[derive(Clone)]
pub struct RawKernel(Arc<Inner>);

/// Parts of a [`RawKernel`].
pub struct RawBuilder(Inner);

/// Starts a kernel with bodies of its own. `specs` gives the outputs' shapes and dtypes, or says why inputs are wrong.
pub fn raw_kernel(
    name: &str,
    inputs: &[&str],
    outputs: &[&str],
    specs: impl Fn(&[Spec], &[i64]) -> Result<Vec<Spec>> + Send + Sync + 'static,
) -> RawBuilder {
    let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    RawBuilder(Inner {
        name: name.to_owned(),
        inputs: owned(inputs),
        outputs: owned(outputs),
        metal: None,
        cuda: None,
        atomic_outputs: false,
        specs: Box::new(specs),
        cpu: None,
        launch: None,
        gradient: None,
        kernels: Cache::new(2),
    })
}

impl RawBuilder {
    /// The CPU's body: reads inputs, writes every element of the outputs.
    pub fn cpu(
        mut self,
        body: impl Fn(&[CpuInput<'_>], &mut [CpuOutput<'_>], &[i64]) -> std::result::Result<(), MlxError>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        self.0.cpu = Some(Box::new(body));
        self
    }

    /// The body in Metal's shading language, as [`zmlx_mlx::kernel`] takes it.
    pub fn metal(mut self, header: &str, body: &str) -> Self {
        self.0.metal = Some(GpuText { header: header.to_owned(), body: body.to_owned() });
        self
    }

    /// The body in CUDA C++.
    pub fn cuda(mut self, header: &str, body: &str) -> Self {
        self.0.cuda = Some(GpuText { header: header.to_owned(), body: body.to_owned() });
        self
    }

    /// How GPU bodies are launched, from the inputs' specs and the parameters.
    pub fn launch(
        mut self,
        launch: impl Fn(&[Spec], &[i64]) -> Result<GpuLaunch> + Send + Sync + 'static,
    ) -> Self {
        self.0.launch = Some(Box::new(launch));
        self
    }

    /// Metal: outputs are declared atomic.
    pub fn atomic_outputs(mut self) -> Self {
        self.0.atomic_outputs = true;
        self
    }

    /// Gradients: of primals, cotangents, outputs, numbers of the inputs asked for, parameters.
    pub fn gradient(
        mut self,
        gradient: impl Fn(&[Array], &[Array], &[Array], &[usize], &[i64]) -> Result<Vec<Array>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        self.0.gradient = Some(Box::new(gradient));
        self
    }

    /// The kernel.
    ///
    /// # Errors
    /// [`Error::Argument`] when names are not identifiers, when there is no body, or GPU bodies without a launch.
    pub fn build(self) -> Result<RawKernel> {
        let inner = self.0;
        let bad = |what: String| Err(Error::Argument { kernel: inner.name.clone(), what });
        let names = inner.inputs.iter().chain(&inner.outputs).chain([&inner.name]);
        if let Some(name) = names.into_iter().find(|n| !zmlx_lang::kernel::is_identifier(n)) {
            return bad(format!("{name:?} is not an identifier"));
        }
        let gpu = inner.metal.is_some() || inner.cuda.is_some();
        if inner.cpu.is_none() && !gpu {
            return bad("it has no body for any backend".to_owned());
        }
        if gpu && inner.launch.is_none() {
            return bad("it has a GPU body but no launch".to_owned());
        }
        Ok(RawKernel(Arc::new(inner)))
    }
}

/// Threads a group that every GPU allows.
const MAX_THREADS: i64 = 1024;

impl RawKernel {
    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The text of a backend's body.
    pub fn text(&self, dialect: Dialect) -> Option<&GpuText> {
        match dialect {
            Dialect::Metal => self.0.metal.as_ref(),
            Dialect::Cuda => self.0.cuda.as_ref(),
        }
    }

    /// How the GPU body would be launched for these inputs.
    ///
    /// # Errors
    /// When the inputs are wrong, or the launch exceeds what every GPU allows.
    pub fn gpu_launch(&self, inputs: &[Spec], parameters: &[i64]) -> Result<GpuLaunch> {
        let no_body = Error::NoBody { kernel: self.0.name.clone(), backend: "GPU" };
        let launch = self.0.launch.as_ref().ok_or(no_body)?(inputs, parameters)?;
        let threads: i64 = launch.threadgroup.iter().map(|t| i64::from(*t)).product();
        if threads > MAX_THREADS || launch.grid.iter().chain(&launch.threadgroup).any(|n| *n < 1) {
            return Err(Error::Launch {
                kernel: self.0.name.clone(),
                what: "grid and threads of a group",
                requested: format!("{:?} in groups of {:?}", launch.grid, launch.threadgroup),
                allowed: format!("at least 1 on each axis, {MAX_THREADS} threads a group"),
            });
        }
        Ok(launch)
    }

    /// The outputs' shapes and dtypes for these inputs.
    ///
    /// # Errors
    /// When the inputs are wrong.
    pub fn outputs(&self, inputs: &[Spec], parameters: &[i64]) -> Result<Vec<Spec>> {
        if inputs.len() != self.0.inputs.len() {
            return Err(Error::Arity {
                kernel: self.0.name.clone(),
                expected: self.0.inputs.join(", "),
                found: inputs.len(),
            });
        }
        (self.0.specs)(inputs, parameters)
    }

    /// Puts the kernel into the graph, on the current stream's device.
    ///
    /// # Errors
    /// When the inputs are wrong; [`Error::NoBody`] without a body for the device.
    pub fn call(&self, inputs: &[&Array], parameters: &[i64]) -> Result<Vec<Array>> {
        let specs: Vec<Spec> = inputs.iter().map(|a| Spec::of(a)).collect();
        let outputs = self.outputs(&specs, parameters)?;
        let gpu = current_device()? == Device::Gpu && outputs.iter().any(|o| o.shape.iter().all(|d| *d > 0));
        let arrays = match if gpu { dialect()? } else { None } {
            Some(dialect) => self.call_gpu(dialect, inputs, &specs, &outputs, parameters)?,
            None => with_device(Device::Cpu, || Ok(self.call_cpu(inputs, parameters)?))?,
        };
        let arrays: Vec<&Array> = arrays.iter().collect();
        Ok(with_transforms(&arrays, Rules { kernel: self.clone(), parameters: parameters.to_vec() })?)
    }

    fn call_cpu(&self, inputs: &[&Array], parameters: &[i64]) -> Result<Vec<Array>> {
        if self.0.cpu.is_none() {
            return Err(Error::NoBody { kernel: self.0.name.clone(), backend: "CPU" });
        }
        let on_cpu = OnCpu { kernel: self.clone(), parameters: parameters.to_vec() };
        Ok(CpuPrimitive::new(on_cpu).apply(inputs)?)
    }

    fn call_gpu(
        &self,
        dialect: Dialect,
        inputs: &[&Array],
        specs: &[Spec],
        outputs: &[Spec],
        parameters: &[i64],
    ) -> Result<Vec<Array>> {
        let inner = &self.0;
        let made = inner.kernels.get(dialect, |dialect| {
            let no_body = || Error::NoBody { kernel: inner.name.clone(), backend: dialect.name() };
            let text = self.text(*dialect).ok_or_else(no_body)?;
            let inputs: Vec<&str> = inner.inputs.iter().map(String::as_str).collect();
            let outputs: Vec<&str> = inner.outputs.iter().map(String::as_str).collect();
            let source = Source {
                name: &inner.name,
                inputs: &inputs,
                outputs: &outputs,
                body: &text.body,
                header: &text.header,
                atomic_outputs: inner.atomic_outputs,
                shared_memory: 0,
            };
            let made = match dialect {
                Dialect::Metal => kernel::metal_kernel(&source),
                Dialect::Cuda => kernel::cuda_kernel(&source),
            };
            Ok::<_, Error>(Arc::new(made?))
        })?;
        let launch = self.gpu_launch(specs, parameters)?;
        let template: Vec<(&str, TemplateArg)> =
            launch.template.iter().map(|(n, a)| (n.as_str(), *a)).collect();
        Ok(made.call(
            inputs,
            &Launch {
                outputs,
                grid: launch.grid,
                threadgroup: launch.threadgroup,
                template: &template,
                init_value: launch.init_value,
                verbose: false,
            },
        )?)
    }
}

struct OnCpu {
    kernel: RawKernel,
    parameters: Vec<i64>,
}

impl CpuKernel for OnCpu {
    fn name(&self) -> &str {
        &self.kernel.0.name
    }

    fn outputs(&self, inputs: &[zmlx_mlx::cpu::Spec]) -> std::result::Result<Vec<Spec>, MlxError> {
        Ok(self.kernel.outputs(inputs, &self.parameters)?)
    }

    fn eval(
        &self,
        inputs: &[CpuInput<'_>],
        outputs: &mut [CpuOutput<'_>],
    ) -> std::result::Result<(), MlxError> {
        match &self.kernel.0.cpu {
            Some(body) => body(inputs, outputs, &self.parameters),
            None => Err(MlxError::custom("the kernel has no CPU body")),
        }
    }
}

struct Rules {
    kernel: RawKernel,
    parameters: Vec<i64>,
}

impl Transforms for Rules {
    fn vjp(
        &self,
        primals: &[Array],
        cotangents: &[Array],
        outputs: &[Array],
        argnums: &[usize],
    ) -> std::result::Result<Vec<Array>, MlxError> {
        match &self.kernel.0.gradient {
            Some(gradient) => Ok(gradient(primals, cotangents, outputs, argnums, &self.parameters)?),
            None => Err(MlxError::NoGradient(self.kernel.0.name.clone())),
        }
    }

    fn jvp(&self, _: &[Array], _: &[Array], _: &[usize]) -> std::result::Result<Vec<Array>, MlxError> {
        let name = self.kernel.name();
        Err(MlxError::Custom(format!(
            "kernel {name} is written by hand and has no forward-mode derivative (jvp)"
        )))
    }

    /// One call for each slice, stacked.
    fn vmap(
        &self,
        inputs: &[Array],
        axes: &[Option<usize>],
    ) -> std::result::Result<(Vec<Array>, Vec<usize>), MlxError> {
        let call = |slice: Vec<Array>| self.kernel.call(&slice.iter().collect::<Vec<_>>(), &self.parameters);
        let outputs = slices::each(inputs, axes, self.kernel.0.outputs.len(), call)?.ok_or_else(|| {
            MlxError::Custom(format!("kernel {} can't be mapped over an empty axis", self.kernel.name()))
        })?;
        let axes = vec![0; outputs.len()];
        Ok((outputs, axes))
    }
}
