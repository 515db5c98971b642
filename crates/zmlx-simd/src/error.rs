//! What can go wrong.

/// Errors of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SimdError {
    /// The instruction set asked for (by `ZMLX_SIMD` or by name) is not one this build or this CPU has.
    #[error("instruction set \"{asked}\" cannot be used here; this machine offers: {}", .allowed.join(", "))]
    UnknownIsa {
        /// What was asked for.
        asked: String,
        /// The names that would work on this machine, best first.
        allowed: Vec<&'static str>,
    },
    /// Slices that must have one length do not.
    #[error("{what}: the destination holds {dst} elements, the source {src}")]
    Length {
        /// The function that was called.
        what: &'static str,
        /// Destination length, in elements.
        dst: usize,
        /// Source length, in elements.
        src: usize,
    },
}

/// Checks that two lengths agree.
pub(crate) fn same_length(what: &'static str, dst: usize, src: usize) -> Result<(), SimdError> {
    if dst == src { Ok(()) } else { Err(SimdError::Length { what, dst, src }) }
}
