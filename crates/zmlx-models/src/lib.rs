//! Models: reading Hugging Face style folders and GGUF files, building family graphs, patching them with fused ops,
//! generating text.
//!
//! ```no_run
//! use zmlx_models::{GenerateOptions, LoadOptions, Model, Session, Flow};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = zmlx_models::embedded_model_dir()?;
//! let model = Model::load(&folder, &LoadOptions::default(), &mut |_| {})?;
//! let prompt = model.tokenizer().ok_or("no tokenizer")?.encode("Once upon a time", true)?;
//! let done = Session::new(&model).generate(&prompt, &GenerateOptions::default(), &mut |_| Flow::Continue)?;
//! println!("{}", done.text);
//! # Ok(()) }
//! ```
//!
//! A new family is one file in `families/` and one line in its registry.

#![forbid(unsafe_code)]

mod blueprint;
pub mod chat_template;
pub mod checkpoint;
mod config;
mod convert;
pub mod detokenizer;
mod embedded;
mod error;
pub mod families;
mod files;
mod fingerprint;
mod folder;
mod generate;
pub mod gguf;
pub mod hub;
mod info;
mod load;
pub mod measured;
pub mod memory;
mod message;
mod options;
pub mod patch;
mod profile;
pub mod prompt_cache;
mod quantize;
pub mod random;
mod reading;
mod recipe;
mod reuse;
mod sampling;
mod source;
pub mod stop;
pub mod survey;
mod tensors;
pub mod tipped;
pub mod tokenizer;

pub use blueprint::{Blueprint, CudaBlueprint, CudaLaunches, PatchedBlueprint, SizesFrom};
pub use config::ModelConfig;
pub use convert::{ConvertError, ConvertOptions, Converted, convert};
pub use embedded::embedded_model_dir;
pub use error::{GenerateError, LoadError};
pub use files::panic_is_caught;
pub use folder::FolderError;
pub use generate::{Completion, Event, FinishReason, Flow, Session};
pub use hub::HubProgress;
pub use info::{LayerInfo, ModelInfo, QuantizationInfo, inspect};
pub use load::{LoadProgress, Model};
pub use message::ChatMessage;
pub use options::{DeviceChoice, DtypeChoice, GenerateOptions, LoadOptions, SamplerOptions};
pub use patch::{PatchError, PatchOptions, PatchReport, Preset};
pub use profile::{DecodeBound, LaunchProfile, ModelProfile, ProfileOptions};
pub use prompt_cache::PromptCacheError;
pub use quantize::{Recode, quantization};
pub use zmlx_graph::{KvQuantization, KvQuantizationError};
