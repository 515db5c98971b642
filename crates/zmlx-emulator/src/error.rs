//! What can go wrong with a kernel.

use std::fmt;
use std::path::PathBuf;

/// A thread of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Position in its group.
    pub thread: [u32; 3],
    /// Position of the group in the grid.
    pub group: [u32; 3],
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {:?} of group {:?}", self.thread, self.group)
    }
}

/// A read or a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A read.
    Read,
    /// A write, or an atomic operation that may write.
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Read { "read" } else { "write" })
    }
}

/// Why a kernel did not compile, load or run. `at` is the line in the kernel's text (`name.metal:3`), only the
/// kernel's name where `addr2line` (of the compiler's tools) is missing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No C++ compiler.
    #[error("no C++ compiler: `{0}` cannot be run; install one (g++ or clang++) or name it in CXX")]
    NoCompiler(String),
    /// The text did not compile.
    #[error("the kernel text does not compile:\n{log}")]
    Compile {
        /// The compiler's errors, cut to the first ones, each followed by the numbered lines of text around it.
        log: String,
    },
    /// A file could not be written, read or run.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The compiled library could not be loaded.
    #[error("loading {path}: {message}")]
    Load {
        /// Which.
        path: PathBuf,
        /// What the loader said.
        message: String,
    },
    /// The description of a kernel or a launch is wrong.
    #[error("launch of {kernel}: {message}")]
    Launch {
        /// Name of the kernel.
        kernel: String,
        /// What is wrong.
        message: String,
    },
    /// An access outside every buffer; the nearest is named.
    #[error("{at}: {access} of {buffer}[{index}] (length {len}) by {by}{note}")]
    OutOfBounds {
        /// Line of the text.
        at: String,
        /// Buffer or shared array; `array` for one private to a thread.
        buffer: String,
        /// Element.
        index: i64,
        /// Elements.
        len: u64,
        /// Who.
        by: Place,
        /// Read or write.
        access: Access,
        /// More, where known.
        note: String,
    },
    /// A read of shared memory or of an output that nobody has written.
    #[error("{at}: {buffer}[{index}] is read by {by} and was never written")]
    Uninitialised {
        /// Line of the text.
        at: String,
        /// Buffer or shared array.
        buffer: String,
        /// Element.
        index: i64,
        /// Who.
        by: Place,
    },
    /// Elements of an output that no thread wrote.
    #[error("{kernel}: {count} of {len} elements of {buffer} are never written, the first ones: {first:?}")]
    Unwritten {
        /// Name of the kernel.
        kernel: String,
        /// The output.
        buffer: String,
        /// The first of them.
        first: Vec<u64>,
        /// How many.
        count: u64,
        /// Elements in all.
        len: u64,
    },
    /// Two accesses, one of them a write, with nothing that orders them.
    #[error("{at}: {access} of {buffer}[{index}] by {by} races with the {other_access} by {other}")]
    Race {
        /// Line of the text of the later access.
        at: String,
        /// Buffer or shared array.
        buffer: String,
        /// Element.
        index: i64,
        /// Who came later.
        by: Place,
        /// What it did.
        access: Access,
        /// Who came first.
        other: Place,
        /// What it had done.
        other_access: Access,
    },
    /// A barrier or an operation across a simdgroup that not all threads reach.
    #[error("{kernel}: threads wait for each other at different places: {text}")]
    Divergence {
        /// Name of the kernel.
        kernel: String,
        /// Where threads wait, by line of the body.
        text: String,
        /// The first of them.
        by: Place,
    },
    /// The launch did not end within its limit of memory accesses.
    #[error("{kernel}: {text}; last {by}")]
    Deadlock {
        /// Name of the kernel.
        kernel: String,
        /// The limit.
        text: String,
        /// Who ran last.
        by: Place,
    },
    /// A vector access at an address that is not a multiple of the vector's size.
    #[error("{at}: misaligned access near {buffer}[{index}] by {by}: {text}")]
    Misaligned {
        /// Line of the text.
        at: String,
        /// Buffer or shared array.
        buffer: String,
        /// Element.
        index: i64,
        /// Who.
        by: Place,
        /// What alignment was needed.
        text: String,
    },
    /// Something whose result the language leaves undefined: a shuffle from a lane that takes no part, an integer
    /// division by zero, a write to an input.
    #[error("{at}: {text}, by {by}")]
    Undefined {
        /// Line of the text.
        at: String,
        /// What.
        text: String,
        /// Who.
        by: Place,
    },
    /// More memory than the device (or this machine) has.
    #[error("{kernel}: {text}")]
    Resource {
        /// Name of the kernel.
        kernel: String,
        /// What is short.
        text: String,
    },
    /// NVRTC or its headers are not there and could not be fetched.
    #[error("no NVRTC: {0}")]
    NoNvrtc(String),
    /// NVRTC refused to work (not: refused the text).
    #[error("NVRTC: {call} gave {code}")]
    Nvrtc {
        /// The function.
        call: &'static str,
        /// Its result.
        code: i32,
    },
}
