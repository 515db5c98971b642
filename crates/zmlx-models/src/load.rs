use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use zmlx_graph::weights::{Format, TensorSpec};
use zmlx_graph::{Executor, State};
use zmlx_mlx::stream::{self, Device, Stream, with_stream};
use zmlx_mlx::{Array, Dtype};

use crate::error::LoadError;
use crate::families::Built;
use crate::info::{ModelInfo, describe};
use crate::options::{DeviceChoice, DtypeChoice, LoadOptions};
use crate::source::{Reader, Source};
use crate::tensors::assemble;
use crate::tokenizer::Tokenizer;

/// Bytes of tensors that are read and converted at a time.
const BATCH_BYTES: usize = 256 << 20;

/// How far loading is.
#[derive(Debug, Clone, Copy)]
pub struct LoadProgress {
    /// Bytes of weights read.
    pub done_bytes: u64,
    /// Bytes of weights in all.
    pub total_bytes: u64,
}

/// A model ready to run.
#[derive(Debug)]
pub struct Model {
    executor: Executor,
    tokenizer: Option<Tokenizer>,
    eos_token_ids: Vec<u32>,
    info: ModelInfo,
    dtype: Dtype,
    stream: Stream,
}

impl Model {
    /// Loads a model folder (`config.json`, safetensors, and if there the tokenizer's files) or a GGUF file, which has all
    /// of that in one. `progress` is told about the weights read so far.
    pub fn load(
        path: &Path,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let source = Source::open(path)?;
        let built = source.build()?;
        let info = describe(&built, &source);
        let stream = stream_for(options.device)?;
        let dtype = match (options.dtype, stream.device()) {
            (DtypeChoice::F32, _) | (DtypeChoice::Auto, Device::Cpu) => Some(Dtype::Float32),
            (DtypeChoice::Bf16, _) => Some(Dtype::Bfloat16),
            (DtypeChoice::F16, _) => Some(Dtype::Float16),
            (DtypeChoice::Auto, Device::Gpu) => None,
        };
        check_device(&built, stream.device(), dtype)?;
        let mut arrays = with_stream(stream, || read_weights(&built, &source, dtype, progress))?;
        let graph = Arc::new(built.graph);
        let executor = Executor::new(graph, |spec| arrays.remove(&spec.name))?;
        let tokenizer = source.tokenizer()?;
        let mut eos_token_ids = source.config().eos_token_ids().to_vec();
        if let Some(id) = tokenizer.as_ref().and_then(|t| t.token_to_id(t.eos_token()?))
            && !eos_token_ids.contains(&id)
        {
            eos_token_ids.push(id);
        }
        let mut model = Self { executor, tokenizer, eos_token_ids, info, dtype: Dtype::Float32, stream };
        model.dtype = match dtype {
            Some(dtype) => dtype,
            // The dtype that logits come in.
            None => model.run(&[0], &mut model.new_state())?.dtype(),
        };
        Ok(model)
    }

    /// The tokenizer, if the folder has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Ids that end a sequence.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Most positions.
    pub fn context_length(&self) -> Option<usize> {
        self.info.context_length
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.info.vocab_size
    }

    /// Dtype of the activations.
    pub fn dtype_name(&self) -> &'static str {
        self.dtype.name()
    }

    /// `cpu` or `gpu`.
    pub fn device_name(&self) -> String {
        match self.stream.device() {
            Device::Cpu => "cpu".to_owned(),
            Device::Gpu => "gpu".to_owned(),
        }
    }

    /// What it is.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The executor, for those who run the graph themselves.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// The stream it runs on.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// An empty state.
    pub fn new_state(&self) -> State {
        self.executor.graph().new_state()
    }

    /// The logits `[1, length, vocabulary]` of some tokens, which continue what `state` has seen. Lazy. Ids must be within
    /// the vocabulary.
    pub fn run(&self, tokens: &[u32], state: &mut State) -> Result<Array, zmlx_graph::GraphError> {
        with_stream(self.stream, || {
            let tokens = Array::from_slice(tokens, &[1, tokens.len() as i32]).map_err(|source| {
                zmlx_graph::GraphError::Node { path: "input".to_owned(), op: "tokens", source }
            })?;
            self.executor.run(&tokens, state)
        })
    }
}

fn stream_for(device: DeviceChoice) -> Result<Stream, LoadError> {
    let device = match device {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Gpu => Device::Gpu,
        DeviceChoice::Auto => stream::default_device()?,
    };
    Ok(Stream::default_of(device)?)
}

/// What MLX cannot run is said now and not in the first step.
fn check_device(built: &Built, device: Device, dtype: Option<Dtype>) -> Result<(), LoadError> {
    let dense_experts = built.graph.weights.iter().any(|w| w.experts.is_some() && w.format == Format::Dense);
    match dtype {
        Some(dtype) if device == Device::Cpu && dense_experts && dtype != Dtype::Float32 => {
            Err(LoadError::Unsupported(format!(
                "MLX multiplies unquantised experts on the CPU in float32 only, not in {dtype}: use --dtype f32"
            )))
        }
        _ => Ok(()),
    }
}

/// Reads every tensor that the graph needs, converted to the dtype it runs in.
fn read_weights(
    built: &Built,
    source: &Source,
    dtype: Option<Dtype>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<HashMap<String, Array>, LoadError> {
    let mut files = source.reader()?;
    let total_bytes = source.file_bytes();
    let mut done_bytes = 0;
    progress(LoadProgress { done_bytes, total_bytes });
    let mut arrays: HashMap<String, Array> = HashMap::new();
    let mut batch: Vec<Array> = Vec::new();
    let mut batch_bytes = 0;
    for weight in &built.graph.weights {
        for spec in weight.tensors() {
            let array = read_tensor(built, &spec, &mut files)?;
            batch_bytes += array.nbytes();
            let array = match dtype {
                Some(dtype) if spec.float && !weight.keep_f32 => array.astype(dtype)?,
                _ if weight.keep_f32 => array.astype(Dtype::Float32)?,
                _ => array,
            };
            batch.push(array.clone());
            arrays.insert(spec.name, array);
            if batch_bytes >= BATCH_BYTES {
                done_bytes += flush(&mut batch, &mut batch_bytes)?;
                progress(LoadProgress { done_bytes, total_bytes });
            }
        }
    }
    flush(&mut batch, &mut batch_bytes)?;
    progress(LoadProgress { done_bytes: total_bytes, total_bytes });
    Ok(arrays)
}

fn flush(batch: &mut Vec<Array>, bytes: &mut usize) -> Result<u64, LoadError> {
    zmlx_mlx::eval(&batch.iter().collect::<Vec<_>>())?;
    batch.clear();
    Ok(std::mem::take(bytes) as u64)
}

fn read_tensor(built: &Built, spec: &TensorSpec, files: &mut Reader<'_>) -> Result<Array, LoadError> {
    let missing = |name: &str| LoadError::MissingTensors { count: 1, names: name.to_owned() };
    let tensor = built.tensors.get(&spec.name).ok_or_else(|| missing(&spec.name))?;
    let parts: Result<Vec<Array>, LoadError> =
        tensor.sources.iter().map(|s| files.take(s)?.ok_or_else(|| missing(s))).collect();
    Ok(assemble(tensor, &parts?)?)
}
