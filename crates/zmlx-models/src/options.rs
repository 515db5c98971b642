use std::fmt;
use std::str::FromStr;

use zmlx_graph::KvQuantization;
use zmlx_graph::weights::Quantization;

use crate::error::GenerateError;
use crate::patch::PatchOptions;

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub enum $name {
            $($(#[$vdoc])* $variant),*
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                match s {
                    $($text => Ok(Self::$variant),)*
                    other => Err(format!("{other:?} is none of {}", [$($text),*].join(", "))),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text),* })
            }
        }
    };
}

choice! {
    /// Dtype of activations and of the floats among the weights.
    DtypeChoice {
        /// float32 on the CPU (where MLX's quantised products accumulate in the activation's dtype), the checkpoint's
        /// own on a GPU.
        #[default]
        Auto = "auto",
        /// float32
        F32 = "f32",
        /// bfloat16
        Bf16 = "bf16",
        /// float16
        F16 = "f16",
    }
}

choice! {
    /// Where a model runs.
    DeviceChoice {
        /// The GPU if there is one.
        #[default]
        Auto = "auto",
        /// The CPU.
        Cpu = "cpu",
        /// The GPU; an error if there is none.
        Gpu = "gpu",
    }
}

/// How a model is loaded.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Dtype of activations.
    pub dtype: DtypeChoice,
    /// Where it runs.
    pub device: DeviceChoice,
    /// Patch it while loading; `None` loads the stock graph.
    pub patch: Option<PatchOptions>,
    /// Quantise the matrices that are not, as mlx-lm's converter would ([`crate::quantization`] makes one); `None` leaves
    /// them as they are stored.
    pub quantize: Option<Quantization>,
    /// Hold keys and values in few bits. Their attention then runs on MLX, patched or not.
    pub kv_quantization: Option<KvQuantization>,
}

/// How the next token is chosen from the logits. Applied in this order: logit bias, repetition penalty, then (unless
/// greedy) top-p, min-p, top-k on log-probabilities, temperature, and a categorical draw.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f64,
    /// Only the `k` most likely tokens; 0 is off.
    pub top_k: u32,
    /// Only the most likely tokens that together reach this probability; 1 is off.
    pub top_p: f64,
    /// Only tokens at least this likely relative to the most likely one; 0 is off.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of recent tokens; 1 is off.
    pub repetition_penalty: f32,
    /// How many recent tokens the penalty looks at.
    pub repetition_context: usize,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draw; from the clock when absent.
    pub seed: Option<u64>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_context: 20,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl SamplerOptions {
    /// Checks that every value is in its range.
    pub fn validate(&self) -> Result<(), GenerateError> {
        let check = |ok: bool, name, value: f64, allowed| {
            if ok { Ok(()) } else { Err(GenerateError::Option { name, value: value.to_string(), allowed }) }
        };
        let t = self.temperature;
        check(t.is_finite() && t >= 0.0, "temperature", t, "a finite number of at least 0")?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "between 0 and 1")?;
        let r = f64::from(self.repetition_penalty);
        check(r.is_finite() && r > 0.0, "repetition_penalty", r, "a finite number above 0")?;
        for (_, bias) in &self.logit_bias {
            check(
                !bias.is_nan() && *bias < f32::INFINITY,
                "logit_bias",
                f64::from(*bias),
                "a number below infinity",
            )?;
        }
        Ok(())
    }
}

/// How text is generated.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Strings that end the text; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Most prompt tokens processed at once.
    pub prefill_chunk: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            sampler: SamplerOptions::default(),
            stop: Vec::new(),
            ignore_eos: false,
            prefill_chunk: 2048,
        }
    }
}

impl GenerateOptions {
    /// Checks that every value is in its range.
    pub fn validate(&self) -> Result<(), GenerateError> {
        for (name, value) in [("max_tokens", self.max_tokens), ("prefill_chunk", self.prefill_chunk)] {
            if value == 0 {
                return Err(GenerateError::Option { name, value: "0".to_owned(), allowed: "at least 1" });
            }
        }
        self.sampler.validate()
    }
}
