//! Source text of a kernel for GPUs: bodies for MLX's `metal_kernel` and `cuda_kernel`.
//!
//! [`emit`] writes the text of a [`Program`] for a [`Plan`]. What changes the code (dtypes, how each input is laid
//! out, threads, vector width, elements a thread holds) is in the plan and so in the text; sizes are in an array,
//! [`meta`], which the kernel takes as its last input. One text therefore serves every shape that its plan covers.

mod access;
mod describe;
mod elementwise;
mod emitter;
mod expr;
mod helpers;
mod passes;
mod plan;
mod rows;
mod sizes;
mod spell;
mod store;
mod team;
mod writer;

use crate::error::{LangError, Result};
use crate::kernel::fnv1a;
use crate::program::Program;

pub use plan::{Params, candidates};
pub use sizes::{GridRule, meta, needs_index64};

/// A GPU language.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dialect {
    /// Metal Shading Language, version 3.1 or later.
    Metal,
    /// CUDA C++, as NVRTC compiles it.
    Cuda,
}

impl Dialect {
    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Metal => "Metal",
            Self::Cuda => "CUDA",
        }
    }
}

/// Where the element of an input for a place of the domain lies. The cheapest that is true is the best: in this order
/// `Scalar`, `Full`, `Col`, `Row`, `Strided`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layout {
    /// One element in all.
    Scalar,
    /// The input has the domain's shape.
    Full,
    /// Element `col`: one row that repeats.
    Col,
    /// Element `row`: one value a row.
    Row,
    /// Anything else that broadcasts: a stride along each axis, from [`meta`].
    Strided,
    /// Read at computed places only, for inputs of [`crate::Role::Indexed`].
    Indexed,
}

/// How a kernel is written, apart from what it computes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Plan {
    /// For each of the program's inputs, used or not.
    pub layouts: Vec<Layout>,
    /// Axes of the domain.
    pub ndim: usize,
    /// Whether sizes and offsets take 64 bits; see [`needs_index64`].
    pub index64: bool,
    /// Threads a group: a power of two from 32 to 1024.
    pub threads: u32,
    /// Consecutive elements a thread handles together: 1, 2, 4 or 8.
    pub vec: u32,
    /// Rows a group works on at a time, each by `threads / rows_per_group` threads: a power of two. 1 for elementwise
    /// kernels.
    pub rows_per_group: u32,
    /// Times `vec` elements that a thread holds in registers, at most 64 elements in all. A row kernel then covers
    /// rows of at most [`Plan::row_capacity`] elements. 0: a row kernel that reads the row anew in each pass, of any
    /// length; an elementwise kernel takes 0 as 1.
    pub items: u32,
}

/// The text of a kernel and what a launch must know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// `<kernel>_<16 hexadecimal digits>`: equal for equal text, on every machine.
    pub name: String,
    /// Helpers that go before the kernel function.
    pub header: String,
    /// The kernel function's body.
    pub body: String,
    /// Parameter names of the inputs that the kernel takes: the program's used inputs in their order, then the sizes
    /// of [`meta`]. Inputs of rank 0 are passed as shape `[1]`.
    pub inputs: Vec<String>,
    /// Parameter names of the outputs.
    pub outputs: Vec<String>,
    /// Metal: whether outputs are declared atomic. The outputs must then be filled with 0 first, on CUDA too if
    /// any of them is scattered to.
    pub atomic_outputs: bool,
    /// Bytes of dynamic shared memory; 0, as the texts declare what they need.
    pub shared_memory: u32,
    /// How many groups to launch.
    pub grid: GridRule,
}

/// Writes a program as source text.
///
/// Floats are computed in `f32`, 8- and 16-bit integers in 32 bits; storing rounds to the output's dtype. Reductions
/// and scans accumulate floats in `f32`, in an order that depends on the plan.
///
/// # Errors
/// [`LangError::Kernel`] for a plan that does not fit the program. [`LangError::Unsupported`] for scans of both
/// directions in one pass, for scatters into dtypes without atomic addition (all but `f32`, `i32`, `u32`; on Metal all
/// outputs of a scattering kernel must be of these), and for kernels that need more shared memory than 32 KiB.
pub fn emit(program: &Program, dialect: Dialect, plan: &Plan) -> Result<Source> {
    plan.check(program)?;
    let mut e = emitter::Emitter::new(program, dialect, plan)?;
    if program.has_rows {
        rows::write(&mut e)?;
    } else {
        elementwise::write(&mut e)?;
    }
    let comment = describe::describe(program);
    let header = format!("// {comment}\n{}", helpers::write(&e.helpers, dialect));
    let body = e.text.finish();
    let hash = fnv1a(format!("{}\0{header}\0{body}", dialect.name()).as_bytes());
    let mut inputs: Vec<String> = e.used_inputs().map(|n| e.inputs[n].clone()).collect();
    inputs.push(emitter::META.to_owned());
    Ok(Source {
        name: format!("{}_{hash:016x}", program.name),
        header,
        body,
        inputs,
        outputs: e.outputs.clone(),
        atomic_outputs: e.atomics && dialect == Dialect::Metal,
        shared_memory: 0,
        grid: GridRule::new(program, plan),
    })
}

pub(super) fn unsupported(program: &Program, dialect: Dialect, why: impl Into<String>) -> LangError {
    LangError::Unsupported { kernel: program.name.clone(), backend: dialect.name(), why: why.into() }
}
