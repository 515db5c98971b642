//! Loads compiled kernels and launches them.

use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::process::Command;

use libloading::Library;

use crate::buffer::{Buffer, Dtype};
use crate::compile;
use crate::error::{Access, Error, Place};
use crate::kernel::{Dialect, KernelText};
use crate::source::{Slot, slots, translation_unit};

/// Threads that a group may have, on both kinds of devices.
const MAX_GROUP: u64 = 1024;
/// Memory accesses after which a launch counts as endless, where it does not say so itself.
const STEP_LIMIT: u64 = 1_000_000_000;
/// Dimensions that MLX passes to CUDA kernels.
const CUDA_NDIM: usize = 10;

#[repr(C)]
struct RawBuffer {
    name: *const c_char,
    data: *mut u8,
    bytes: u64,
    element: u32,
    kind: u32,
    offset: u32,
    filled: u32,
}

#[repr(C)]
struct RawLaunch {
    entry: *const c_void,
    buffers: *const RawBuffer,
    count: u64,
    grid: [u32; 3],
    group: [u32; 3],
    cuda: u32,
    dynamic_shared: u32,
    seed: u64,
    step_limit: u64,
}

#[repr(C)]
struct Report {
    code: u32,
    write: u32,
    other_write: u32,
    thread: [u32; 3],
    group: [u32; 3],
    other: [u32; 3],
    other_group: [u32; 3],
    pc: u64,
    index: i64,
    length: u64,
    missing: [u64; 8],
    missing_count: u64,
    name: [c_char; 64],
    text: [c_char; 768],
}

type Run = unsafe extern "C" fn(*const RawLaunch, *mut Report) -> u32;

/// Compiled kernels.
#[derive(Debug)]
pub struct Module {
    library: Library,
    path: PathBuf,
    dialect: Dialect,
    kernels: Vec<KernelText>,
}

/// One launch.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// Inputs, in the kernel's order.
    pub inputs: &'a [Buffer],
    /// Shapes of the outputs.
    pub output_shapes: &'a [Vec<usize>],
    /// Threads in all, on each axis. Metal cuts the groups at the edge, CUDA runs whole blocks.
    pub grid: [u32; 3],
    /// Threads a group, on each axis; 1,024 at most in all.
    pub threadgroup: [u32; 3],
    /// Value that the outputs are filled with first; without it each element must be written.
    pub init_value: Option<f32>,
    /// What outputs hold at first, where a kernel changes them in place; goes before `init_value`.
    pub initial: &'a [Option<Buffer>],
    /// Bytes of dynamic shared memory (CUDA).
    pub shared_memory: usize,
    /// Draws the order in which threads and groups run.
    pub seed: u64,
    /// Memory accesses, barriers and operations across simdgroups after which the launch counts as endless. A loop
    /// without any of them is not noticed.
    pub step_limit: u64,
}

impl<'a> Launch<'a> {
    /// A launch with seed 1, no initial value and no dynamic shared memory.
    pub fn new(
        inputs: &'a [Buffer],
        output_shapes: &'a [Vec<usize>],
        grid: [u32; 3],
        threadgroup: [u32; 3],
    ) -> Self {
        Self {
            inputs,
            output_shapes,
            grid,
            threadgroup,
            init_value: None,
            initial: &[],
            shared_memory: 0,
            seed: 1,
            step_limit: STEP_LIMIT,
        }
    }

    /// With outputs filled with this value.
    pub fn init_value(mut self, value: f32) -> Self {
        self.init_value = Some(value);
        self
    }

    /// With outputs that hold something at first: one entry an output.
    pub fn initial(mut self, buffers: &'a [Option<Buffer>]) -> Self {
        self.initial = buffers;
        self
    }

    /// With this many bytes of dynamic shared memory.
    pub fn shared_memory(mut self, bytes: usize) -> Self {
        self.shared_memory = bytes;
        self
    }

    /// With this limit of steps.
    pub fn step_limit(mut self, steps: u64) -> Self {
        self.step_limit = steps;
        self
    }

    /// With this order of threads.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
}

fn bytes_of<T: Copy, const N: usize>(values: &[T], bytes: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| bytes(v)).collect()
}

fn text_of(chars: &[c_char]) -> String {
    let bytes: Vec<u8> = chars.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// One argument of a kernel, with the memory that stands for it.
struct Argument {
    name: CString,
    data: Vec<u8>,
    element: usize,
    output: bool,
    filled: bool,
    offset: usize,
}

impl Module {
    /// Compiles kernels together, or loads what an earlier call has compiled.
    ///
    /// Errors: [`Error::Compile`], [`Error::NoCompiler`], [`Error::Launch`] for names that are no identifiers,
    /// [`Error::Io`], [`Error::Load`].
    pub fn build(dialect: Dialect, kernels: &[KernelText]) -> Result<Self, Error> {
        let unit = translation_unit(dialect, kernels)?;
        let path = compile::library(dialect, kernels, &unit)?;
        // SAFETY: the library is ours; loading it runs no code but that of kernel texts' constants.
        let library = unsafe { Library::new(&path) }
            .map_err(|e| Error::Load { path: path.clone(), message: e.to_string() })?;
        Ok(Self { library, path, dialect, kernels: kernels.to_vec() })
    }

    /// The kernels, in order.
    pub fn kernels(&self) -> &[KernelText] {
        &self.kernels
    }

    /// Runs kernel number `kernel` and gives its outputs. Launches of one module follow one another.
    ///
    /// Errors: [`Error::Launch`] for a launch that does not fit the kernel, else what the run found.
    pub fn run(&self, kernel: usize, launch: &Launch<'_>) -> Result<Vec<Buffer>, Error> {
        let Some(text) = self.kernels.get(kernel) else {
            let message = format!("there are {} kernels", self.kernels.len());
            return Err(Error::Launch { kernel: kernel.to_string(), message });
        };
        self.check(text, launch)?;
        let mut arguments: Vec<Argument> =
            slots(text).into_iter().map(|s| self.argument(text, launch, s)).collect();
        let buffers: Vec<RawBuffer> = arguments
            .iter_mut()
            .map(|a| RawBuffer {
                name: a.name.as_ptr(),
                data: a.data.as_mut_ptr(),
                bytes: a.data.len() as u64,
                element: a.element as u32,
                kind: a.output.into(),
                offset: a.offset as u32,
                filled: a.filled.into(),
            })
            .collect();
        let report = self.call(kernel, launch, &buffers)?;
        if report.code != 0 {
            return Err(self.explain(text, &report));
        }
        let outputs = arguments.into_iter().filter(|a| a.output);
        Ok(outputs
            .zip(text.outputs.iter().zip(launch.output_shapes))
            .map(|(a, (o, shape))| Buffer::from_bytes(o.dtype, a.data, shape))
            .collect())
    }

    fn call(&self, kernel: usize, launch: &Launch<'_>, buffers: &[RawBuffer]) -> Result<Report, Error> {
        let load = |e: libloading::Error| Error::Load { path: self.path.clone(), message: e.to_string() };
        let name = format!("zs_entry_{kernel}");
        // SAFETY: both symbols have the types that abi.h gives them; the entry is only handed on as an address.
        let (entry, run) = unsafe {
            let entry = self.library.get::<unsafe extern "C" fn()>(name.as_bytes()).map_err(load)?;
            (*entry as *const c_void, *self.library.get::<Run>(b"zs_run").map_err(load)?)
        };
        let raw = RawLaunch {
            entry,
            buffers: buffers.as_ptr(),
            count: buffers.len() as u64,
            grid: launch.grid,
            group: launch.threadgroup,
            cuda: (self.dialect == Dialect::Cuda).into(),
            dynamic_shared: launch.shared_memory as u32,
            seed: launch.seed,
            step_limit: launch.step_limit,
        };
        // SAFETY: all zeros are a value of every field.
        let mut report: Report = unsafe { std::mem::zeroed() };
        // SAFETY: the launch and the buffers, with lengths as stated, outlive the call; the runtime has a lock.
        unsafe { run(&raw, &mut report) };
        Ok(report)
    }

    fn check(&self, text: &KernelText, launch: &Launch<'_>) -> Result<(), Error> {
        let bad = |message: String| Err(Error::Launch { kernel: text.name.clone(), message });
        if launch.inputs.len() != text.inputs.len() || launch.output_shapes.len() != text.outputs.len() {
            return bad(format!(
                "{} inputs and {} outputs given, the kernel has {} and {}",
                launch.inputs.len(),
                launch.output_shapes.len(),
                text.inputs.len(),
                text.outputs.len()
            ));
        }
        for (p, b) in text.inputs.iter().zip(launch.inputs) {
            if b.dtype != p.dtype || b.shape.len() != p.ndim {
                return bad(format!(
                    "input {} is {:?} of {} dimensions, the kernel was built for {:?} of {}",
                    p.name,
                    b.dtype,
                    b.shape.len(),
                    p.dtype,
                    p.ndim
                ));
            }
            let size: usize = b.shape.iter().product();
            if b.strides.is_none() && b.len() != size || b.strides.as_ref().is_some_and(|s| s.len() != p.ndim)
            {
                return bad(format!("input {}: {} elements do not fit shape {:?}", p.name, b.len(), b.shape));
            }
            if self.dialect == Dialect::Cuda && p.ndim > CUDA_NDIM {
                return bad(format!("input {}: MLX passes at most {CUDA_NDIM} dimensions to CUDA", p.name));
            }
        }
        for ((o, shape), initial) in text.outputs.iter().zip(launch.output_shapes).zip(launch.initial) {
            let fits = |b: &Buffer| b.dtype == o.dtype && b.len() == shape.iter().product::<usize>();
            if initial.as_ref().is_some_and(|b| !fits(b)) {
                return bad(format!("what output {} holds at first is not {:?} {shape:?}", o.name, o.dtype));
            }
        }
        let threads: u64 = launch.threadgroup.iter().map(|&n| u64::from(n)).product();
        if launch.grid.contains(&0) || threads == 0 {
            return bad(format!(
                "grid {:?} and group {:?} must be at least 1",
                launch.grid, launch.threadgroup
            ));
        }
        if launch.threadgroup.iter().any(|&n| u64::from(n) > MAX_GROUP) || threads > MAX_GROUP {
            return bad(format!(
                "{:?} is {threads} threads a group, at most {MAX_GROUP} can be",
                launch.threadgroup
            ));
        }
        let groups: u64 =
            launch.grid.iter().zip(launch.threadgroup).map(|(&g, t)| u64::from(g.div_ceil(t))).product();
        if groups > u64::from(u32::MAX) {
            return bad(format!("{groups} groups are more than this emulator counts"));
        }
        Ok(())
    }

    fn argument(&self, text: &KernelText, launch: &Launch<'_>, slot: Slot) -> Argument {
        // Names were checked to be identifiers, so they hold no zero byte.
        let named = |name: String| CString::new(name).unwrap_or_default();
        let plain = |name: String, data: Vec<u8>, element: usize| Argument {
            name: named(name),
            data,
            element,
            output: false,
            filled: false,
            offset: 0,
        };
        let padded = |n: usize| if self.dialect == Dialect::Cuda { CUDA_NDIM } else { n };
        match slot {
            Slot::Input(i) => {
                let (p, b) = (&text.inputs[i], &launch.inputs[i]);
                let size = b.dtype.size();
                Argument { offset: b.offset * size % 256, ..plain(p.name.clone(), b.data.clone(), size) }
            }
            Slot::Shape(i) => {
                let mut shape: Vec<i32> = launch.inputs[i].shape.iter().map(|&n| n as i32).collect();
                shape.resize(padded(shape.len()), 0);
                plain(format!("{}_shape", text.inputs[i].name), bytes_of(&shape, i32::to_ne_bytes), 4)
            }
            Slot::Strides(i) => {
                let mut strides = launch.inputs[i].strides_or_row_major();
                strides.resize(padded(strides.len()), 0);
                plain(format!("{}_strides", text.inputs[i].name), bytes_of(&strides, i64::to_ne_bytes), 8)
            }
            Slot::Ndim(i) => {
                let n = text.inputs[i].ndim as i32;
                plain(format!("{}_ndim", text.inputs[i].name), n.to_ne_bytes().to_vec(), 4)
            }
            Slot::Output(i) => {
                let (o, count) = (&text.outputs[i], launch.output_shapes[i].iter().product::<usize>());
                // Bytes of no meaning, so that a test that compares outputs cannot pass by chance.
                let fresh = || vec![0xa5; count * o.dtype.size()];
                let initial = launch.initial.get(i).and_then(Option::as_ref);
                let data = match (initial, launch.init_value) {
                    (Some(buffer), _) => buffer.data.clone(),
                    (None, Some(value)) => fill(o.dtype, value, count),
                    (None, None) => fresh(),
                };
                let filled = initial.is_some() || launch.init_value.is_some();
                Argument { output: true, filled, ..plain(o.name.clone(), data, o.dtype.size()) }
            }
        }
    }

    /// The line of kernel text that holds an instruction; the kernel's name where the tools for it are missing.
    fn line(&self, text: &KernelText, pc: u64) -> String {
        if pc == 0 {
            return text.name.clone();
        }
        // The call's return address belongs to the next line at times: one byte back is inside the call.
        let address = format!("{:#x}", pc - 1);
        let Ok(out) = Command::new("addr2line").arg("-i").arg("-e").arg(&self.path).arg(address).output()
        else {
            return text.name.clone();
        };
        let prefix = format!("{}.", text.name);
        let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
        let names = stdout.lines().filter_map(|l| l.split_whitespace().next()?.rsplit('/').next());
        names.into_iter().find(|l| l.starts_with(&prefix)).unwrap_or(&text.name).to_owned()
    }

    fn explain(&self, kernel: &KernelText, r: &Report) -> Error {
        let by = Place { thread: r.thread, group: r.group };
        let side = |write: u32| if write != 0 { Access::Write } else { Access::Read };
        let (name, buffer, text) = (kernel.name.clone(), text_of(&r.name), text_of(&r.text));
        let (at, index) = (self.line(kernel, r.pc), r.index);
        match r.code {
            1 => {
                let note = if text.is_empty() { text } else { format!(": {text}") };
                Error::OutOfBounds { at, buffer, index, len: r.length, by, access: side(r.write), note }
            }
            2 => Error::Uninitialised { at, buffer, index, by },
            3 => Error::Race {
                at,
                buffer,
                index,
                by,
                access: side(r.write),
                other: Place { thread: r.other, group: r.other_group },
                other_access: side(r.other_write),
            },
            4 => Error::Divergence { kernel: name, text, by },
            5 => Error::Deadlock { kernel: name, text, by },
            6 => {
                let first = r.missing[..(r.missing_count as usize).min(8)].to_vec();
                Error::Unwritten { kernel: name, buffer, first, count: r.missing_count, len: r.length }
            }
            7 => Error::Misaligned { at, buffer, index, by, text },
            8 => Error::Undefined { at, text, by },
            _ => Error::Resource { kernel: name, text },
        }
    }
}

/// `count` elements of one value.
fn fill(dtype: Dtype, value: f32, count: usize) -> Vec<u8> {
    Buffer::from_f32(dtype, &[value], &[1]).data.repeat(count)
}

const _: () = assert!(size_of::<Report>() == 4 * 15 + 4 + 8 * 12 + 64 + 768);
