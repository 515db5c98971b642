//! Evidence-based tuning of kernel launch parameters, with choices kept on disk.
//!
//! * [`tune`] times [`Candidate`]s through a [`Backend`] and returns a [`Decision`] with the evidence for it.
//! * [`Store`] keeps decisions in JSON files, one for each device and library version, safe under concurrent
//!   processes, with shipped defaults behind the user's own.
//!
//! The crate knows nothing of kernels, GPUs or environment variables: the launch layer brings those.
//!
//! ```
//! use zmlx_tune::{Backend, Candidate, Key, Sample, Settings, tune};
//!
//! /// A kernel whose time falls with the vector width.
//! struct Pretend;
//! impl Backend for Pretend {
//!     type Error = String;
//!     fn run(&mut self, c: &Candidate, iterations: u32) -> Result<Sample, String> {
//!         let vec = c.get("vec").ok_or("no vector width")?;
//!         Ok(Sample { seconds: 1e-3 / vec as f64 * f64::from(iterations) })
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let key = Key::new("cpu avx2", "zmlx 0.1.0", "softmax", "9f3c", "f32 rows=4096 cols=4096");
//! let default = Candidate::from([("vec", 1)]);
//! let others = [Candidate::from([("vec", 2)]), Candidate::from([("vec", 4)])];
//! let decision = tune(&key, &default, &others, None, &Settings::default(), &mut Pretend)?;
//! assert_eq!(decision.choice, others[1]);
//! assert_eq!(decision.gain, 4.0);
//! println!("{decision}");
//! # Ok(()) }
//! ```

#![forbid(unsafe_code)]

mod candidate;
mod decision;
mod key;
mod settings;
mod stats;
mod store;
mod tuner;

pub use candidate::Candidate;
pub use decision::{Decision, Ended, InvalidDecision, Outcome, Trial};
pub use key::{InvalidKey, Key};
pub use settings::{InvalidSetting, Settings};
pub use store::{FORMAT_VERSION, Found, Saved, Source, Store, StoreError};
pub use tuner::{Backend, Sample, TuneError, tune};
