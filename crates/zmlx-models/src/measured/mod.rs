//! Measured decode on a GPU: where two forms of a model part.

mod divergence;

pub use divergence::{Divergence, likeliest};
