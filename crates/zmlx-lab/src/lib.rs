//! The lab: does a patched model still say what the stock model says, and how fast is it?
//!
//! * [`validate`](validate()) runs stock and patched on the same prompts and compares tokens and logits. The
//!   [gate](fidelity::Gate) is the verdict.
//! * [`bisect`](bisect()) holds each fused op against what it replaces, and names the first that leaves its class.
//! * [`bench`](bench()) times prefill and decode, the arms taken in turn, beside the read bandwidth measured in the same
//!   run. A figure above that [roofline] is refused.
//! * [`smart_patch`] measures which patterns pay on this machine, and remembers it.
//! * `validate` and `bench` give a [`Capsule`]: one JSON record with a published schema, of which the [reports](report) are made and which
//!   [`compare`](compare()) sets against another.
//!
//! ```no_run
//! use zmlx_lab::{BenchOptions, Subject, bench, report};
//! use zmlx_models::{LoadOptions, Model};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = zmlx_models::embedded_model_dir()?;
//! let load = LoadOptions::default();
//! let mut model = Model::load(&dir, &load, &mut |_| {})?;
//! let mut subject = Subject { path: &dir, name: "embedded", load: &load, model: &mut model };
//! let capsule = bench(&mut subject, &BenchOptions::default(), &mut |_| {})?;
//! print!("{}", report::text(&capsule));
//! # Ok(()) }
//! ```

#![forbid(unsafe_code)]

mod arms;
mod bandwidth;
mod bench;
mod bisect;
pub mod capsule;
mod compare;
mod error;
pub mod fidelity;
mod hash;
pub mod logits;
pub mod machine;
mod measure;
pub mod prompts;
pub mod report;
pub mod roofline;
mod smart;
pub mod stats;
mod time;
mod validate;

pub use arms::Arm;
pub use bandwidth::{Probe, read_bandwidth};
pub use bench::{BenchOptions, bench};
pub use bisect::{BisectOptions, Bisection, OpRecord, bisect};
pub use capsule::Capsule;
pub use compare::{Comparison, Row, compare};
pub use error::{CapsuleError, LabError};
pub use hash::model_hash;
pub use measure::{Progress, Subject};
pub use prompts::Prompt;
pub use smart::{SmartOptions, SmartReport, SmartRow, smart_choice, smart_patch};
pub use validate::{Reference, ValidateOptions, Validated, validate};
