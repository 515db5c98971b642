use crate::{Dtype, Ty};

/// What went wrong with a kernel before it ran.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LangError {
    /// The text is not in the language. `message` shows the line, the column and what was expected.
    #[error("{message}")]
    Syntax {
        /// The whole report, with the line and a caret under the place.
        message: String,
        /// Byte offset of the place.
        offset: usize,
    },
    /// The IR is inconsistent.
    #[error("kernel {kernel}: {what}")]
    Kernel {
        /// The kernel's name.
        kernel: String,
        /// What is wrong.
        what: String,
    },
    /// An operation does not accept the types of its operands.
    #[error("kernel {kernel}: {op} of {found}: {expected}")]
    Type {
        /// The kernel's name.
        kernel: String,
        /// The operation.
        op: String,
        /// The operands' types.
        found: String,
        /// What it accepts, or what to do.
        expected: String,
    },
    /// An input has another dtype than declared.
    #[error("kernel {kernel}: input {input} must be {expected}, got {found}")]
    InputDtype {
        /// The kernel's name.
        kernel: String,
        /// The input's name.
        input: String,
        /// As declared.
        expected: Dtype,
        /// As given.
        found: Dtype,
    },
    /// Shapes of a call do not fit the kernel or each other.
    #[error("kernel {kernel}: {what}")]
    Shape {
        /// The kernel's name.
        kernel: String,
        /// The input or output, its shape and what it should be.
        what: String,
    },
    /// A checked coordinate is outside its array.
    #[error("kernel {kernel}: {array} of shape {shape:?} has no element {at:?}")]
    OutOfBounds {
        /// The kernel's name.
        kernel: String,
        /// The input or output.
        array: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The coordinates.
        at: Vec<i64>,
    },
    /// There is no derivative.
    #[error("kernel {kernel}: no derivative with respect to {input}: {why}")]
    NoDerivative {
        /// The kernel's name.
        kernel: String,
        /// The input's name.
        input: String,
        /// The reason.
        why: String,
    },
    /// A backend can't express the kernel.
    #[error("kernel {kernel} on {backend}: {why}")]
    Unsupported {
        /// The kernel's name.
        kernel: String,
        /// The backend.
        backend: &'static str,
        /// The reason, and what to do.
        why: String,
    },
    /// The JSON is not a kernel's.
    #[error("not a kernel: {0}")]
    Json(String),
}

impl LangError {
    pub(crate) fn operands(kernel: &str, op: &str, found: &[Ty], expected: &str) -> Self {
        let found = found.iter().map(Ty::to_string).collect::<Vec<_>>().join(", ");
        Self::Type { kernel: kernel.to_owned(), op: op.to_owned(), found, expected: expected.to_owned() }
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, LangError>;
