//! Custom GPU kernels written as Metal or CUDA source text.

use std::ffi::c_void;
use std::ptr;

use crate::api::{RawKernel, api, check, loaded_api};
use crate::array::{Array, List};
use crate::error::{Error, Result};
use crate::runtime::{self, Backend};
use crate::{Dtype, stream};

#[repr(C)]
struct Str {
    data: *const u8,
    len: usize,
}

impl Str {
    fn new(s: &str) -> Self {
        Self { data: s.as_ptr(), len: s.len() }
    }
}

#[repr(C)]
pub(crate) struct KernelSpec {
    metal: i32,
    name: Str,
    inputs: *const Str,
    inputs_n: usize,
    outputs: *const Str,
    outputs_n: usize,
    source: Str,
    header: Str,
    ensure_row_contiguous: i32,
    atomic_outputs: i32,
    shared_memory: i32,
}

#[repr(C)]
struct TemplateSlot {
    name: Str,
    kind: i32,
    value: i32,
}

#[repr(C)]
pub(crate) struct KernelCall {
    inputs: *const *const Array,
    inputs_n: usize,
    shapes: *const i32,
    ranks: *const i32,
    dtypes: *const i32,
    outputs_n: usize,
    grid: [i32; 3],
    threadgroup: [i32; 3],
    template_args: *const TemplateSlot,
    template_args_n: usize,
    init_value: *const f32,
    verbose: i32,
}

/// What a kernel is made of. The source is the body of the kernel function; MLX writes the signature from the names
/// of inputs and outputs (also `<input>_shape`, `<input>_strides` and `<input>_ndim` where the body names them).
#[derive(Debug, Clone, Default)]
pub struct Source<'a> {
    /// Name of the kernel, a valid identifier; compiled code is cached by it and the source.
    pub name: &'a str,
    /// Names of the inputs.
    pub inputs: &'a [&'a str],
    /// Names of the outputs.
    pub outputs: &'a [&'a str],
    /// Body of the kernel function.
    pub body: &'a str,
    /// Text before the kernel function: helpers, includes.
    pub header: &'a str,
    /// Metal only: outputs are atomics.
    pub atomic_outputs: bool,
    /// CUDA only: bytes of dynamic shared memory.
    pub shared_memory: i32,
}

/// A template argument of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TemplateArg {
    /// An integer constant.
    Int(i32),
    /// A boolean constant.
    Bool(bool),
    /// A type.
    Dtype(Dtype),
}

/// Shape and dtype of an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// The dimensions.
    pub shape: Vec<i32>,
    /// The element type.
    pub dtype: Dtype,
}

impl Spec {
    /// A spec of these parts.
    pub fn new(shape: &[i32], dtype: Dtype) -> Self {
        Self { shape: shape.to_vec(), dtype }
    }

    /// The spec of an array.
    pub fn of(a: &Array) -> Self {
        Self::new(a.shape(), a.dtype())
    }
}

/// One launch.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// Shapes and dtypes of the outputs.
    pub outputs: &'a [Spec],
    /// Threads in all, on each axis (CUDA rounds up to whole blocks: guard the body).
    pub grid: [i32; 3],
    /// Threads a group (block), on each axis.
    pub threadgroup: [i32; 3],
    /// Template arguments by name.
    pub template: &'a [(&'a str, TemplateArg)],
    /// Value that the outputs are filled with first.
    pub init_value: Option<f32>,
    /// Whether MLX prints the full source.
    pub verbose: bool,
}

/// A kernel of the GPU backend of the loaded library.
pub struct Kernel {
    raw: *mut RawKernel,
    inputs: usize,
    outputs: usize,
}

// SAFETY: calls and the final drop happen under the bridge's lock.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// A kernel in Metal's shading language. [`Error::Unavailable`] without Metal.
pub fn metal_kernel(source: &Source<'_>) -> Result<Kernel> {
    Kernel::new(source, Backend::Metal, "metal_kernel")
}

/// A kernel in CUDA C++. [`Error::Unavailable`] without CUDA.
pub fn cuda_kernel(source: &Source<'_>) -> Result<Kernel> {
    Kernel::new(source, Backend::Cuda, "cuda_kernel")
}

fn strings(names: &[&str]) -> Vec<Str> {
    names.iter().map(|n| Str::new(n)).collect()
}

impl Kernel {
    fn new(source: &Source<'_>, backend: Backend, what: &'static str) -> Result<Self> {
        let api = api()?;
        if !runtime::backend_available(backend)? {
            return Err(Error::Unavailable { what, needs: backend.needs() });
        }
        let (inputs, outputs) = (strings(source.inputs), strings(source.outputs));
        let spec = KernelSpec {
            metal: (backend == Backend::Metal).into(),
            name: Str::new(source.name),
            inputs: inputs.as_ptr(),
            inputs_n: inputs.len(),
            outputs: outputs.as_ptr(),
            outputs_n: outputs.len(),
            source: Str::new(source.body),
            header: Str::new(source.header),
            ensure_row_contiguous: 1,
            atomic_outputs: source.atomic_outputs.into(),
            shared_memory: source.shared_memory,
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the spec and everything it points to outlive the call.
        let status = unsafe { (api.kernel_new)(&spec, &mut raw) };
        check(api, status, what)?;
        Ok(Self { raw, inputs: inputs.len(), outputs: outputs.len() })
    }

    /// Puts a launch on the current stream, which must be on the GPU.
    pub fn call(&self, inputs: &[&Array], launch: &Launch<'_>) -> Result<Vec<Array>> {
        let api = api()?;
        if inputs.len() != self.inputs || launch.outputs.len() != self.outputs {
            return Err(Error::Argument(format!(
                "the kernel has {} inputs and {} outputs, the call {} and {}",
                self.inputs,
                self.outputs,
                inputs.len(),
                launch.outputs.len()
            )));
        }
        if launch.grid.iter().chain(&launch.threadgroup).any(|&n| n < 1) {
            let (grid, group) = (launch.grid, launch.threadgroup);
            return Err(Error::Argument(format!(
                "grid {grid:?} and threadgroup {group:?} must be at least 1"
            )));
        }
        let shapes: Vec<i32> = launch.outputs.iter().flat_map(|o| o.shape.iter().copied()).collect();
        let ranks: Vec<i32> = launch.outputs.iter().map(|o| o.shape.len() as i32).collect();
        let dtypes: Vec<i32> = launch.outputs.iter().map(|o| o.dtype.code()).collect();
        let slots: Vec<TemplateSlot> = launch
            .template
            .iter()
            .map(|(name, arg)| {
                let (kind, value) = match *arg {
                    TemplateArg::Int(v) => (0, v),
                    TemplateArg::Bool(v) => (1, v.into()),
                    TemplateArg::Dtype(d) => (2, d.code()),
                };
                TemplateSlot { name: Str::new(name), kind, value }
            })
            .collect();
        let call = KernelCall {
            inputs: inputs.as_ptr().cast(),
            inputs_n: inputs.len(),
            shapes: shapes.as_ptr(),
            ranks: ranks.as_ptr(),
            dtypes: dtypes.as_ptr(),
            outputs_n: launch.outputs.len(),
            grid: launch.grid,
            threadgroup: launch.threadgroup,
            template_args: slots.as_ptr(),
            template_args_n: slots.len(),
            init_value: launch.init_value.as_ref().map_or(ptr::null(), |v| v),
            verbose: launch.verbose.into(),
        };
        let mut out = ptr::null_mut();
        // SAFETY: a live kernel; the call and everything it points to outlive the call.
        let status = unsafe { (api.kernel_call)(self.raw, &call, stream::current(api)?, &mut out) };
        check(api, status, "kernel call")?;
        // SAFETY: on success the bridge wrote an owned list.
        unsafe { List::from_raw(out) }.into_arrays()
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Some(api) = loaded_api() {
            // SAFETY: an owned kernel, freed once.
            unsafe { (api.kernel_free)(self.raw as *mut c_void) };
        }
    }
}
