//! Running fused nodes on the CPU's engine.
//!
//! A rewritten graph falls into regions: runs of fused nodes, and what lies between them. A region is one program of the
//! engine; what lies between runs on MLX. Values that cross from one to the other are copied.

mod lower;
mod region;

pub use lower::{Form, Lowering, LoweringError, Tensors, Turn, write_bytes};
pub(crate) use lower::{Place, WeightSource};
pub(crate) use region::{Cut, Plan, Region, Step};
