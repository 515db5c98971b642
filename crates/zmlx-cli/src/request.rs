//! What was meant: arguments checked against their ranges and turned into the library's options.

mod caches;
mod measure;

use std::fmt::Display;
use std::str::FromStr;

use zmlx_graph::weights::Quantization;
use zmlx_models::patch::MOST_THREADS;
use zmlx_models::{
    DeviceChoice, DtypeChoice, GenerateOptions, LoadOptions, PatchOptions, Preset, SamplerOptions,
};

use crate::args::{
    ChatArgs, DemoArgs, Device, Dtype, GenerateArgs, ModelArgs, PatchArgs, QuantizeArgs, SamplingArgs,
};
use crate::failure::Failure;

pub(crate) use caches::CacheRequest;
pub(crate) use measure::{BenchRequest, ValidateRequest};

/// Modes of quantisation.
const MODES: [&str; 4] = ["affine", "mxfp4", "mxfp8", "nvfp4"];
/// `--max-tokens` of `generate` and `demo` when it is not given.
const MAX_TOKENS: usize = 256;
/// `--max-tokens` of `chat` when it is not given.
const CHAT_MAX_TOKENS: usize = 512;
/// Prompt tokens in one step when `--prefill-chunk` is not given.
const PREFILL_CHUNK: usize = 2048;
/// How the demo samples: a model this small repeats itself without a penalty.
const DEMO_TEMPERATURE: f64 = 0.6;
const DEMO_MIN_P: f64 = 0.1;
const DEMO_REPETITION_PENALTY: f32 = 1.15;
const DEMO_REPETITION_CONTEXT: usize = 64;
/// Seed of the demo when none is given, so that its story is the same each time.
pub(crate) const DEMO_SEED: u64 = 12;

/// What the demo's story is about: `seed % len` picks one.
const DEMO_SUBJECTS: [&str; 8] = [
    "a shy dragon and a picnic",
    "a brave dragon and a red balloon",
    "a small robot and a shiny stone",
    "a little fox and a lost key",
    "a kind bear and a rainy day",
    "a curious cat and the moon",
    "a tiny mouse and a big boat",
    "a friendly turtle and a birthday party",
];

/// Which model to open.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ModelSource {
    /// The model that comes with the program.
    Embedded,
    /// A folder or a Hugging Face id.
    Named(String),
}

/// Where the prompt comes from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// Text from the command line.
    Text(String),
    /// Text still to be read from stdin.
    Stdin,
    /// Token ids.
    Ids(Vec<u32>),
}

/// How the result of `generate` is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Text (or ids, without a tokenizer) as it comes.
    Stream,
    /// One JSON record at the end.
    Json,
}

/// Whether patterns are those that were measured to pay (`--preset smart`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Smart {
    /// No: what the options say.
    No,
    /// What `zmlx lab smart-patch` remembered.
    Remembered,
}

/// A checked `zmlx generate`.
pub(crate) struct GenerateRequest {
    /// Which model.
    pub(crate) model: ModelSource,
    /// How to load it.
    pub(crate) load: LoadOptions,
    /// Which patterns.
    pub(crate) smart: Smart,
    /// What to continue.
    pub(crate) prompt: Prompt,
    /// System message.
    pub(crate) system: Option<String>,
    /// Leave the chat template out.
    pub(crate) raw: bool,
    /// Sampling and stopping.
    pub(crate) options: GenerateOptions,
    /// Files of caches.
    pub(crate) caches: CacheRequest,
    /// How to print.
    pub(crate) format: Format,
    /// Print the statistics line.
    pub(crate) stats: bool,
}

/// A checked `zmlx chat`.
pub(crate) struct ChatRequest {
    /// Which model.
    pub(crate) model: ModelSource,
    /// How to load it.
    pub(crate) load: LoadOptions,
    /// Which patterns.
    pub(crate) smart: Smart,
    /// System message.
    pub(crate) system: Option<String>,
    /// Sampling and stopping.
    pub(crate) options: GenerateOptions,
    /// Files of caches.
    pub(crate) caches: CacheRequest,
    /// Print the statistics line after each reply.
    pub(crate) stats: bool,
}

/// A checked `zmlx demo`.
pub(crate) struct DemoRequest {
    /// The user's message to the model.
    pub(crate) prompt: String,
    /// Sampling and stopping.
    pub(crate) options: GenerateOptions,
    /// Print the full statistics line.
    pub(crate) stats: bool,
}

impl GenerateRequest {
    /// `stdin_is_terminal` decides what a missing prompt means.
    pub(crate) fn new(args: GenerateArgs, stdin_is_terminal: bool) -> Result<Self, Failure> {
        let prompt = match (args.prompt_ids, args.prompt) {
            (Some(ids), _) => Prompt::Ids(token_ids(&ids)?),
            (None, Some(text)) if text == "-" => Prompt::Stdin,
            (None, Some(text)) => Prompt::Text(text),
            (None, None) if !stdin_is_terminal => Prompt::Stdin,
            (None, None) => {
                return Err(Failure::usage(
                    "no prompt: give --prompt TEXT or --prompt-ids IDS, or pipe text into stdin",
                ));
            }
        };
        let mut options = generate_options(args.sampling, MAX_TOKENS)?;
        options.ignore_eos = args.ignore_eos;
        let (mut load, smart) = load_options(&args.model)?;
        load.kv_quantization = caches::kv_quantization(&args.caches)?;
        Ok(Self {
            load,
            smart,
            model: model_source(args.model.model)?,
            prompt,
            system: args.system,
            raw: args.raw,
            options,
            caches: CacheRequest::from(&args.caches),
            format: if args.json { Format::Json } else { Format::Stream },
            stats: args.stats,
        })
    }
}

impl TryFrom<ChatArgs> for ChatRequest {
    type Error = Failure;

    fn try_from(args: ChatArgs) -> Result<Self, Failure> {
        let (mut load, smart) = load_options(&args.model)?;
        load.kv_quantization = caches::kv_quantization(&args.caches)?;
        Ok(Self {
            load,
            smart,
            model: model_source(args.model.model)?,
            system: args.system,
            options: generate_options(args.sampling, CHAT_MAX_TOKENS)?,
            caches: CacheRequest::from(&args.caches),
            stats: args.stats,
        })
    }
}

impl TryFrom<DemoArgs> for DemoRequest {
    type Error = Failure;

    fn try_from(args: DemoArgs) -> Result<Self, Failure> {
        let sampling =
            SamplingArgs { max_tokens: args.max_tokens, seed: args.seed, ..SamplingArgs::default() };
        let mut options = generate_options(sampling, MAX_TOKENS)?;
        let seed = *options.sampler.seed.get_or_insert(DEMO_SEED);
        options.sampler.temperature = DEMO_TEMPERATURE;
        options.sampler.min_p = DEMO_MIN_P;
        options.sampler.repetition_penalty = DEMO_REPETITION_PENALTY;
        options.sampler.repetition_context = DEMO_REPETITION_CONTEXT;
        let subject = DEMO_SUBJECTS[(seed % DEMO_SUBJECTS.len() as u64) as usize];
        Ok(Self { prompt: format!("Please tell a story about {subject}."), options, stats: args.stats })
    }
}

/// The model that was named, or the embedded one.
pub(crate) fn model_source(named: Option<String>) -> Result<ModelSource, Failure> {
    match named {
        None => Ok(ModelSource::Embedded),
        Some(name) if name.trim().is_empty() => Err(Failure::usage(
            "the model's name is empty: give a folder or a Hugging Face id such as org/name",
        )),
        Some(name) => Ok(ModelSource::Named(name)),
    }
}

fn load_options(args: &ModelArgs) -> Result<(LoadOptions, Smart), Failure> {
    let patch = &args.patch;
    let asked = patch.preset.as_deref() == Some("smart");
    if asked && args.quantize.quantize.is_some() {
        return Err(Failure::usage(
            "--preset smart was measured on the model as it is stored: write the quantised one with zmlx convert, and \
             run zmlx lab smart-patch on that",
        ));
    }
    let usual = PatchArgs {
        preset: patch.preset.clone().filter(|_| !asked),
        patterns: patch.patterns.clone(),
        exclude: patch.exclude.clone(),
        threads: patch.threads.clone(),
    };
    let unpatched = loading(args.dtype, args.device, &args.quantize)?;
    let load = LoadOptions { patch: Some(patch_options(&usual)?), ..unpatched };
    Ok((load, if asked { Smart::Remembered } else { Smart::No }))
}

/// How a model is loaded, unpatched.
pub(crate) fn loading(dtype: Dtype, device: Device, quantize: &QuantizeArgs) -> Result<LoadOptions, Failure> {
    let quantize = quantization(quantize, None)?;
    Ok(LoadOptions {
        dtype: dtype_choice(dtype),
        device: device_choice(device),
        quantize,
        ..LoadOptions::default()
    })
}

/// A type of floats.
pub(crate) fn dtype_choice(dtype: Dtype) -> DtypeChoice {
    match dtype {
        Dtype::Auto => DtypeChoice::Auto,
        Dtype::F32 => DtypeChoice::F32,
        Dtype::Bf16 => DtypeChoice::Bf16,
        Dtype::F16 => DtypeChoice::F16,
    }
}

/// A place to compute.
pub(crate) fn device_choice(device: Device) -> DeviceChoice {
    match device {
        Device::Auto => DeviceChoice::Auto,
        Device::Cpu => DeviceChoice::Cpu,
        Device::Gpu => DeviceChoice::Gpu,
    }
}

/// `--quantize`, which names bits or a mode, with `--group-size` and `--mode`.
pub(crate) fn quantization(args: &QuantizeArgs, mode: Option<&str>) -> Result<Option<Quantization>, Failure> {
    let Some(text) = args.quantize.as_deref().map(str::trim) else { return Ok(None) };
    let group_size = number("--group-size", args.group_size.as_deref(), "32, 64 or 128", |g: i32| g > 0)?;
    let (named, bits) = match text.parse::<i32>() {
        Ok(bits) => (None, Some(bits)),
        Err(_) if MODES.contains(&text) => (Some(text), None),
        Err(_) => {
            let allowed = "a number of bits (2, 3, 4, 5, 6 or 8), affine, mxfp4, mxfp8 or nvfp4";
            return Err(out_of_range("--quantize", allowed, text));
        }
    };
    if let (Some(named), Some(mode)) = (named, mode)
        && named != mode
    {
        return Err(Failure::usage(format_args!("--quantize says {named} and --mode says {mode}")));
    }
    let mode = named.or(mode).unwrap_or("affine");
    zmlx_models::quantization(mode, bits, group_size).map(Some).map_err(Failure::bad_input)
}

/// Which fused ops are asked for.
pub(crate) fn patch_options(args: &PatchArgs) -> Result<PatchOptions, Failure> {
    let preset = match args.preset.as_deref().map(str::parse) {
        None => Preset::Default,
        Some(Ok(preset)) => preset,
        Some(Err(message)) => return Err(Failure::usage(format!("--preset: {message}"))),
    };
    let threads =
        number("--threads", args.threads.as_deref(), "a whole number from 1 to 256", |n: usize| {
            (1..=MOST_THREADS).contains(&n)
        })?;
    let names = |flag: &str, typed: &[String]| -> Result<Vec<String>, Failure> {
        let names: Vec<String> = typed.iter().map(|name| name.trim().to_owned()).collect();
        match names.iter().any(String::is_empty) {
            true => Err(Failure::usage(format_args!("{flag}: a name between the commas is empty"))),
            false => Ok(names),
        }
    };
    let patterns = args.patterns.as_deref().map(|typed| names("--patterns", typed)).transpose()?;
    let exclude = names("--exclude", &args.exclude)?;
    Ok(PatchOptions { preset, patterns, exclude, threads, ..PatchOptions::default() })
}

fn generate_options(args: SamplingArgs, max_tokens: usize) -> Result<GenerateOptions, Failure> {
    let above_0 = |value: f32| value.is_finite() && value > 0.0;
    let sampler = SamplerOptions {
        temperature: number("--temp", args.temp.as_deref(), "a number of 0 or more", |v: f64| {
            v.is_finite() && v >= 0.0
        })?
        .unwrap_or(0.0),
        top_p: number("--top-p", args.top_p.as_deref(), "a number above 0 and up to 1", |v: f64| {
            v > 0.0 && v <= 1.0
        })?
        .unwrap_or(1.0),
        top_k: number("--top-k", args.top_k.as_deref(), "a whole number from 0 to 4294967295", |_| true)?
            .unwrap_or(0),
        min_p: number("--min-p", args.min_p.as_deref(), "a number from 0 to 1", |v: f64| {
            (0.0..=1.0).contains(&v)
        })?
        .unwrap_or(0.0),
        repetition_penalty: number(
            "--repetition-penalty",
            args.repetition_penalty.as_deref(),
            "a number above 0",
            above_0,
        )?
        .unwrap_or(1.0),
        logit_bias: args.logit_bias.iter().map(|text| logit_bias(text)).collect::<Result<_, _>>()?,
        seed: number(
            "--seed",
            args.seed.as_deref(),
            "a whole number from 0 to 18446744073709551615",
            |_| true,
        )?,
        ..SamplerOptions::default()
    };
    // The library has the last word on what it can sample with.
    sampler.validate().map_err(Failure::bad_input)?;
    if args.stop.iter().any(String::is_empty) {
        return Err(Failure::usage("--stop must not be an empty text"));
    }
    let one_or_more = "a whole number of 1 or more";
    Ok(GenerateOptions {
        max_tokens: number("--max-tokens", args.max_tokens.as_deref(), one_or_more, |v| v >= 1)?
            .unwrap_or(max_tokens),
        prefill_chunk: number("--prefill-chunk", args.prefill_chunk.as_deref(), one_or_more, |v| v >= 1)?
            .unwrap_or(PREFILL_CHUNK),
        sampler,
        stop: args.stop,
        ..GenerateOptions::default()
    })
}

/// `--bandwidth`, in bytes a second.
pub(crate) fn bandwidth(text: Option<&str>) -> Result<Option<f64>, Failure> {
    let fits = |v: f64| v.is_finite() && v > 0.0;
    Ok(number("--bandwidth", text, "a number of GB/s above 0", fits)?.map(|v: f64| v * 1e9))
}

/// `--context` of `plan`.
pub(crate) fn context(text: Option<&str>) -> Result<u32, Failure> {
    // MLX counts positions with 32 bits, sign included, and the token itself has one.
    let fits = |v: u32| v < i32::MAX as u32;
    Ok(number("--context", text, "a whole number from 0 to 2147483646", fits)?.unwrap_or(0))
}

/// A count of 1 or more.
pub(crate) fn count(flag: &str, text: Option<&str>, default: usize) -> Result<usize, Failure> {
    Ok(number(flag, text, "a whole number of 1 or more", |v| v >= 1)?.unwrap_or(default))
}

/// Reads a number that must satisfy `fits`; `allowed` says in words what that is.
pub(crate) fn number<T: FromStr + Copy>(
    flag: &str,
    text: Option<&str>,
    allowed: &str,
    fits: impl Fn(T) -> bool,
) -> Result<Option<T>, Failure> {
    let Some(text) = text else { return Ok(None) };
    match text.trim().parse::<T>() {
        Ok(value) if fits(value) => Ok(Some(value)),
        _ => Err(out_of_range(flag, allowed, text)),
    }
}

fn out_of_range(flag: &str, allowed: &str, text: impl Display) -> Failure {
    Failure::usage(format_args!("{flag} must be {allowed}, not '{text}'"))
}

fn token_ids(text: &str) -> Result<Vec<u32>, Failure> {
    text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>().map_err(|_| {
        out_of_range(
            "--prompt-ids",
            "token ids (whole numbers from 0 to 4294967295) separated by commas, as in 1,17,5",
            text,
        )
    })
}

fn logit_bias(text: &str) -> Result<(u32, f32), Failure> {
    text.split_once('=')
        .and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse::<f32>().ok()?)))
        .filter(|(_, bias)| bias.is_finite())
        .ok_or_else(|| {
            out_of_range(
                "--logit-bias",
                "ID=F, a token id from 0 to 4294967295 and a finite number, as in 17=-2.5",
                text,
            )
        })
}

/// Checks what can be checked only once the vocabulary is known.
pub(crate) fn check_vocabulary(flag: &str, ids: &[u32], vocab_size: usize) -> Result<(), Failure> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(Failure::usage(format_args!(
            "{flag}: token id {id} is not in the vocabulary; ids go from 0 to {}",
            vocab_size.saturating_sub(1)
        ))),
    }
}

/// The same for the ids of `--logit-bias`.
pub(crate) fn check_logit_bias(options: &GenerateOptions, vocab_size: usize) -> Result<(), Failure> {
    let ids: Vec<u32> = options.sampler.logit_bias.iter().map(|&(id, _)| id).collect();
    check_vocabulary("--logit-bias", &ids, vocab_size)
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
