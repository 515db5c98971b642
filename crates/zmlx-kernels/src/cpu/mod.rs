//! The CPU engine: evaluates a [`Program`](zmlx_lang::Program) over cache-sized blocks.
//!
//! [`code`] decides once per program what each pass over a row computes and where values live; [`layout`] turns a
//! call's shapes into rows, columns and strides; [`run`] walks rows and blocks on all threads; [`exec`] computes one
//! block, one operation after another, with vector instructions chosen at run time; [`reduce`] and [`scan`] hold what runs
//! along the row, [`table`] reads at computed places, [`bits`] goes from lanes to storage.
//! There is no compiler at run time: an operation costs one pass over a block that lies in the first-level cache.

mod bits;
mod code;
mod exec;
mod layout;
mod reduce;
mod run;
mod scan;
mod table;

pub(crate) use code::{Code, Options};
pub(crate) use run::{Buffers, OutputBuffer, run};
