//! The kernels: CUDA C++ that is specialised by constants, and what it takes to launch it. No CUDA library is needed here.
//!
//! Each kernel is a plain description (shapes, formats, what is done before and after) with two functions: `source()` gives
//! the text to compile ([`Source`]), `launch(..)` the grid and the arguments ([`Launch`]) for given device addresses. The
//! texts include no header and name no compute capability but in a few guarded instructions; compile them with NVRTC for
//! the device's own architecture (`sm_90`), without fast-math options.
//!
//! Common to all:
//! * Activations, norm weights and biases are float32. Weights stay as MLX stores them ([`Format`]).
//!   Rows that an affine matrix is multiplied with are to be below 2^50; what is larger becomes infinite or NaN.
//! * Every kernel first starts on what does not depend on launches before it, then waits (`griddepcontrol.wait`), so that it
//!   may be launched with or without the attribute for programmatic stream serialisation. Before that wait it reads only
//!   weights and what the step before has written: the position, caches before it, states. A step must not begin before
//!   the one before it has ended.
//! * Sums are taken in one order, whatever the order of threads and blocks: results repeat bit for bit. No float is added
//!   atomically.
//! * [`Launch::shared`] may exceed 48 KiB: then the function's limit of dynamic shared memory must be raised first.

mod attention;
mod combine_rows;
mod delta;
mod experts;
mod grouped;
mod head_products;
mod heads;
mod latent;
mod next;
mod plain;
mod product;
mod qmv;
mod router;
mod short_conv;
mod sort_rows;

pub use attention::{Attend, AttendOperands};
pub use combine_rows::{CombineRows, CombineRowsOperands};
pub use delta::{ConvSilu, ConvSiluOperands, Delta, DeltaOperands};
pub use experts::{ExpertsDown, ExpertsDownOperands, ExpertsUp, ExpertsUpOperands};
pub use grouped::{Grouped, GroupedOperands, Tile};
pub use head_products::{HeadProducts, HeadProductsOperands, HeadRows};
pub use heads::{Angles, CacheOperands, Finish, Growth, Heads, HeadsOperands, RawHeads};
pub use latent::{LatentAttend, LatentOperands};
pub use next::{Argmax, Next, NextOperands};
pub use plain::{Embed, Plain, PlainOp, PlainOperands};
pub use product::{Float, Format, Norm, Plan, Planned, Weights};
pub use qmv::{Qmv, QmvOperands};
pub use router::{Groups, Route, Router, RouterOperands, Scores, Select, SelectOperands};
pub use short_conv::{ShortConv, ShortConvOperands};
pub use sort_rows::{SortRows, SortRowsOperands};
pub use zmlx_engine::stages::Activation;

use std::fmt::{Display, Write};

use next::ARGMAX;
use product::{COMMON, FORMAT, PRODUCT};

/// Multiprocessors that grids are cut for, where a kernel's plan says nothing else.
pub const MULTIPROCESSORS: u32 = 132;

/// What a kernel's parameter points at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    /// 8-bit unsigned integers.
    U8,
    /// 16 bits: integers, or floats of 16 bits.
    U16,
    /// 32-bit unsigned integers.
    U32,
    /// 32-bit signed integers.
    I32,
    /// 64-bit unsigned integers.
    U64,
    /// float32.
    F32,
}

impl Type {
    fn cuda(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::I32 => "int",
            Self::U64 => "u64",
            Self::F32 => "float",
        }
    }
}

/// A parameter of a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Param {
    /// Its name.
    pub name: &'static str,
    /// What it points at, or what it is.
    pub ty: Type,
    /// Whether the kernel writes there.
    pub written: bool,
    /// Whether it is no pointer.
    pub by_value: bool,
}

/// The text of a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// The symbol of the function.
    pub name: &'static str,
    /// Its parameters, in order.
    pub params: Vec<Param>,
    /// Constants and device functions.
    pub device: String,
    /// What the function does: a call of a device function.
    pub body: String,
    /// Threads of a block at most, and blocks that a multiprocessor should hold at least (for the registers).
    pub bounds: [u32; 2],
}

impl Source {
    /// The same kernel noting the [`MOMENTS`] of each block; the launch's last argument is where.
    pub fn with_timeline(&self) -> Self {
        let mut params = self.params.clone();
        params.push(Param { name: "timeline", ty: Type::U64, written: true, by_value: false });
        Self {
            params,
            device: format!("#define TIMELINE\n{}", self.device),
            body: format!("timeline_begins(timeline); {} moment(MOMENT_DONE);", self.body),
            ..self.clone()
        }
    }

    /// The whole translation unit.
    pub fn text(&self) -> String {
        let params: Vec<String> = self
            .params
            .iter()
            .map(|p| {
                let (mark, star) = (if p.written { "" } else { "const " }, if p.by_value { "" } else { "*" });
                format!("{mark}{}{star} {}", p.ty.cuda(), p.name)
            })
            .collect();
        let [threads, blocks] = self.bounds;
        format!(
            "{}\nextern \"C\" __global__ void __launch_bounds__({threads}, {blocks}) {}({}) {{\n  {}\n}}\n",
            self.device,
            self.name,
            params.join(", "),
            self.body
        )
    }
}

/// An argument of a launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// An address in device memory.
    Ptr(u64),
    /// A number.
    I32(i32),
}

/// What a timeline has of a block, in nanoseconds of the GPU's clock (64 bits each): when it began, when the launches before
/// it were complete, when its activations were placed, when its sums were done, when it ended. 0 where a kernel has no such
/// moment.
pub const MOMENTS: usize = 5;

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// The arguments, in the order of [`Source::params`].
    pub args: Vec<Arg>,
    /// Bytes of weights and caches that the launch reads, for bandwidth figures.
    pub bytes: u64,
}

impl Launch {
    /// Blocks of the grid.
    pub fn blocks(&self) -> usize {
        self.grid.iter().map(|&n| n as usize).product()
    }
}

/// What a kernel cannot be made for.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum KernelError {
    /// A size that the kernel does not take.
    #[error("{kernel}: {what} is {got}; it must be {must}")]
    Size {
        /// The kernel.
        kernel: &'static str,
        /// What has this size.
        what: &'static str,
        /// The size.
        got: usize,
        /// What sizes are possible.
        must: String,
    },
    /// A parameter of a computation that is no finite number.
    #[error("{kernel}: {what} is {got}; it must be a finite number")]
    NotFinite {
        /// The kernel.
        kernel: &'static str,
        /// What it is.
        what: &'static str,
        /// Its value.
        got: f32,
    },
    /// An operand that is given but not described, or described but not given.
    #[error("{kernel}: {what} must be given at launch exactly where the kernel was made for it")]
    Operand {
        /// The kernel.
        kernel: &'static str,
        /// The operand.
        what: &'static str,
    },
    /// An address that is not aligned.
    #[error("{kernel}: {what} must be aligned to {to} bytes; copy it to an address that is")]
    Misaligned {
        /// The kernel.
        kernel: &'static str,
        /// The operand.
        what: &'static str,
        /// Bytes.
        to: u64,
    },
    /// More shared memory than a block can have.
    #[error("{kernel}: {got} bytes of shared memory, a block has {most}; use fewer rows or a smaller plan")]
    Shared {
        /// The kernel.
        kernel: &'static str,
        /// Bytes asked for.
        got: usize,
        /// Bytes that there are.
        most: usize,
    },
}

/// Bytes of shared memory that a block may have on `sm_90`, which plans are made for.
pub const SHARED_MOST: usize = 227 << 10;

/// The constants of a kernel, as text.
#[derive(Debug, Default)]
struct Prelude(String);

impl Prelude {
    fn int(&mut self, name: &str, value: impl Display) -> &mut Self {
        self.line(format_args!("constexpr int {name} = {value};"))
    }

    fn flag(&mut self, name: &str, value: bool) -> &mut Self {
        self.line(format_args!("constexpr bool {name} = {value};"))
    }

    fn float(&mut self, name: &str, value: f32) -> &mut Self {
        // Debug prints the shortest text that reads back as the same number.
        self.line(format_args!("constexpr float {name} = {value:?}f;"))
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) -> &mut Self {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{text}");
        self
    }

    /// The constants behind the common text, then the kernel's.
    fn with(&self, texts: &[&str]) -> String {
        let mut out = format!("{COMMON}\n{}", self.0);
        for text in texts {
            out.push('\n');
            out += text;
        }
        out
    }
}

/// Parameters and arguments, side by side.
#[derive(Debug, Default)]
struct Operands {
    params: Vec<Param>,
    args: Vec<Arg>,
}

impl Operands {
    fn read(&mut self, name: &'static str, ty: Type, address: u64) -> &mut Self {
        self.params.push(Param { name, ty, written: false, by_value: false });
        self.args.push(Arg::Ptr(address));
        self
    }

    fn number(&mut self, name: &'static str, value: i32) -> &mut Self {
        self.params.push(Param { name, ty: Type::I32, written: false, by_value: true });
        self.args.push(Arg::I32(value));
        self
    }

    fn write(&mut self, name: &'static str, ty: Type, address: u64) -> &mut Self {
        self.params.push(Param { name, ty, written: true, by_value: false });
        self.args.push(Arg::Ptr(address));
        self
    }

    /// The name, or a null pointer where it is no parameter.
    fn name(&self, name: &'static str) -> &'static str {
        if self.params.iter().any(|p| p.name == name) { name } else { "nullptr" }
    }
}

fn size(
    kernel: &'static str,
    what: &'static str,
    got: usize,
    good: bool,
    must: impl Into<String>,
) -> Result<(), KernelError> {
    if good { Ok(()) } else { Err(KernelError::Size { kernel, what, got, must: must.into() }) }
}

fn finite(kernel: &'static str, what: &'static str, got: f32) -> Result<(), KernelError> {
    if got.is_finite() { Ok(()) } else { Err(KernelError::NotFinite { kernel, what, got }) }
}

fn given<T>(
    kernel: &'static str,
    what: &'static str,
    wanted: bool,
    address: &Option<T>,
) -> Result<(), KernelError> {
    if wanted == address.is_some() { Ok(()) } else { Err(KernelError::Operand { kernel, what }) }
}

fn aligned(kernel: &'static str, what: &'static str, address: u64, to: u64) -> Result<(), KernelError> {
    if address.is_multiple_of(to) { Ok(()) } else { Err(KernelError::Misaligned { kernel, what, to }) }
}
