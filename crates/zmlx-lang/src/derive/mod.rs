//! Derivatives of kernels, as kernels.

mod build;
mod custom;
mod finish;
mod forward;
mod local;
mod plan;
mod reverse;
mod rows;

pub use custom::custom_vjp;
pub use forward::{Jvp, jvp};
pub use reverse::{Vjp, VjpOptions, vjp};
