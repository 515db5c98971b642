use std::path::Path;
use std::sync::Arc;

use zmlx_graph::pattern::{Backend, PatternReport, Rewritten, rewrite};
use zmlx_graph::weights::{Format, TensorSpec};
use zmlx_graph::{Executor, Graph, Held, State, Wanted, quantize_caches};
use zmlx_mlx::runtime::{self, backend_available};
use zmlx_mlx::stream::{self, Device, Stream, with_stream};
use zmlx_mlx::{Array, Dtype};

use crate::blueprint::stored_bytes;
use crate::error::LoadError;
use crate::families::Built;
use crate::fingerprint::fingerprint;
use crate::info::{ModelInfo, describe};
use crate::options::{DeviceChoice, DtypeChoice, LoadOptions};
use crate::patch::{PatchError, PatchOptions, PatchReport};
use crate::quantize::Recode;
use crate::reading::{WeightReader, read_weights};
use crate::source::Source;
use crate::tokenizer::Tokenizer;

/// How far loading is.
#[derive(Debug, Clone, Copy)]
pub struct LoadProgress {
    /// Bytes of weights read.
    pub done_bytes: u64,
    /// Bytes of weights in all.
    pub total_bytes: u64,
}

/// A model ready to run.
pub struct Model {
    source: Source,
    built: Built,
    stock: Arc<Graph>,
    active: Form,
    /// The other form, if both are kept.
    kept: Option<Form>,
    keep_both: bool,
    /// All weights that any form had, if they are to stay.
    pool: Option<Held>,
    tokenizer: Option<Tokenizer>,
    eos_token_ids: Vec<u32>,
    info: ModelInfo,
    /// The dtype asked for; `None` is the checkpoint's.
    wanted: Option<Dtype>,
    dtype: Dtype,
    stream: Stream,
}

/// A graph with its weights: stock, or patched in some way.
struct Form {
    executor: Executor,
    patch: Option<(PatchOptions, Vec<PatternReport>)>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (family, patched) = (&self.info.family, self.is_patched());
        f.debug_struct("Model").field("family", family).field("patched", &patched).finish_non_exhaustive()
    }
}

impl Model {
    /// Loads a model folder (`config.json`, safetensors, and if there the tokenizer's files) or a GGUF file, which has all
    /// of that in one. `progress` is told about the weights read so far. With `options.patch` it is patched at once, and
    /// only the weights that the patched graph needs are read; else it runs on stock MLX.
    pub fn load(
        path: &Path,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let source = Source::open(path)?;
        let recode = options.quantize.clone().map_or(Recode::Keep, Recode::Quantize);
        let built = source.build_as(&recode)?;
        let info = describe(&built, &stored_bytes(&built, &source), source.file_bytes());
        let stream = stream_for(options.device)?;
        let wanted = match (options.dtype, stream.device()) {
            (DtypeChoice::F32, _) | (DtypeChoice::Auto, Device::Cpu) => Some(Dtype::Float32),
            (DtypeChoice::Bf16, _) => Some(Dtype::Bfloat16),
            (DtypeChoice::F16, _) => Some(Dtype::Float16),
            (DtypeChoice::Auto, Device::Gpu) => None,
        };
        // Before the weights, so that a bad one does not cost their time.
        let tokenizer = source.tokenizer()?;
        let stock = Arc::new(match options.kv_quantization {
            Some(with) => quantize_caches(&built.graph, with)?,
            None => built.graph.clone(),
        });
        let held = Held::none();
        let weights = Weights { built: &built, source: &source, wanted, stream, held };
        let active = match &options.patch {
            Some(patch) => weights.patched(&stock, patch, progress).map_err(|e| match e {
                PatchError::Load(error) => error,
                error => LoadError::Patch(error.to_string()),
            })?,
            None => Form { executor: weights.stock(&stock, progress)?, patch: None },
        };
        let mut eos_token_ids = source.config().eos_token_ids().to_vec();
        if let Some(id) = tokenizer.as_ref().and_then(|t| t.token_to_id(t.eos_token()?))
            && !eos_token_ids.contains(&id)
        {
            eos_token_ids.push(id);
        }
        let dtype = Dtype::Float32;
        let mut model = Self {
            source,
            built,
            stock,
            active,
            kept: None,
            keep_both: false,
            pool: None,
            tokenizer,
            eos_token_ids,
            info,
            wanted,
            dtype,
            stream,
        };
        model.dtype = match wanted {
            Some(dtype) => dtype,
            None => model.active.executor.activation(),
        };
        Ok(model)
    }

    /// Replaces what patterns match in the model's graph by fused ops, and loads their weights in the order in which these
    /// read them fastest. A model that is patched already is patched anew from its stock graph; what both forms need is
    /// shared and not loaded again. States made before are of no use after. While it loads, old and new weights are both in
    /// memory; `LoadOptions::patch` avoids that.
    ///
    /// # Errors
    /// [`PatchError`]; the model stays as it was.
    pub fn patch(&mut self, options: &PatchOptions) -> Result<PatchReport, PatchError> {
        let wanted = |form: &Form| form.patch.as_ref().is_some_and(|(with, _)| with == options);
        if !wanted(&self.active) {
            let next = match self.kept.take_if(|form| wanted(form)) {
                Some(form) => form,
                None => self.weights().patched(&self.stock, options, &mut |_| {})?,
            };
            self.activate(next);
        }
        Ok(self.report())
    }

    /// Goes back to the stock graph.
    ///
    /// # Errors
    /// [`LoadError`], if the weights cannot be read again; the model stays as it was.
    pub fn unpatch(&mut self) -> Result<(), LoadError> {
        if self.is_patched() {
            let next = match self.kept.take_if(|form| form.patch.is_none()) {
                Some(form) => form,
                None => Form { executor: self.weights().stock(&self.stock, &mut |_| {})?, patch: None },
            };
            self.activate(next);
        }
        Ok(())
    }

    /// From now on keeps the stock form in memory when it is patched, and the patched form when it is not, so that going
    /// back and forth costs nothing.
    pub fn keep_both(&mut self, on: bool) {
        self.keep_both = on;
        if !on {
            self.kept = None;
        }
    }

    /// From now on keeps every weight that it has loaded, as the engine holds it and as MLX does, so that patching in other
    /// ways reads nothing twice. In the end all weights may be in memory in both forms.
    pub fn keep_weights(&mut self, on: bool) {
        self.pool = on.then(|| self.held());
    }

    /// The weights in memory, by reference.
    fn held(&self) -> Held {
        let mut held = self.active.executor.held();
        let others = self.kept.iter().map(|form| form.executor.held()).chain(self.pool.clone());
        others.for_each(|other| held.join(other));
        held
    }

    /// What [`Self::patch`] would find with these options. No weights are read.
    ///
    /// # Errors
    /// [`PatchError`] for options that mean nothing.
    pub fn would_patch(&self, options: &PatchOptions) -> Result<Vec<PatternReport>, PatchError> {
        Ok(self.weights().rewritten(&self.stock, options)?.0.patterns)
    }

    /// The patched graph twice, to [hold each fused op against what it replaces](zmlx_graph::bisect): on MLX, where it is
    /// that, and on the engine, where each is a program of its own. The model stays as it is and shares its weights with
    /// them, so that these are in memory twice: as MLX has them, and as the engine has.
    ///
    /// # Errors
    /// As [`Self::patch`].
    pub fn both_ways(&self, options: &PatchOptions) -> Result<(Executor, Executor), PatchError> {
        let weights = self.weights();
        let (rewritten, threads) = weights.rewritten(&self.stock, options)?;
        let graph = Arc::new(rewritten.graph);
        let reference = weights.stock(&graph, &mut |_| {})?;
        let engine = with_stream(self.stream, || weights.native(graph, threads, true, &mut |_| {}))?;
        Ok((reference, engine))
    }

    fn activate(&mut self, next: Form) {
        let before = std::mem::replace(&mut self.active, next);
        // One of each kind: a stock form is kept beside a patched one and the other way round.
        if self.keep_both && before.patch.is_some() != self.active.patch.is_some() {
            self.kept = Some(before);
        }
        if let Some(pool) = &mut self.pool {
            pool.join(self.active.executor.held());
        }
    }

    fn weights(&self) -> Weights<'_> {
        let held = self.held();
        Weights { built: &self.built, source: &self.source, wanted: self.wanted, stream: self.stream, held }
    }

    /// Whether it is patched.
    pub fn is_patched(&self) -> bool {
        self.active.patch.is_some()
    }

    /// What the patch did, and how often its ops have run since.
    pub fn patch_report(&self) -> Option<PatchReport> {
        self.is_patched().then(|| self.report())
    }

    fn report(&self) -> PatchReport {
        let executor = &self.active.executor;
        let runs = executor.runs();
        let with_counts =
            |p: &PatternReport| PatternReport { executed: p.matched as u64 * runs, ..p.clone() };
        let patterns = self.active.patch.iter().flat_map(|(_, patterns)| patterns);
        PatchReport {
            patterns: patterns.map(with_counts).collect(),
            launches_per_token: executor.launches_per_token(),
            native: executor.is_native(),
            threads: executor.threads(),
            cuda: executor.cuda_device().map(|device| device.name.clone()),
        }
    }

    /// The graph that runs.
    pub fn graph(&self) -> &Graph {
        self.active.executor.graph()
    }

    /// The family's graph, as mlx-lm would run it; with caches in few bits if it was loaded so.
    pub fn stock_graph(&self) -> &Graph {
        &self.stock
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
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Name of the dtype of the activations.
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

    /// Tells this model from others: a hash of its configuration, of how its weights are stored, and of samples of them.
    ///
    /// # Errors
    /// [`LoadError`], if the weights cannot be read any more.
    pub fn fingerprint(&self) -> Result<String, LoadError> {
        fingerprint(&self.source, &self.stock)
    }

    /// What it is.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The executor, for those who run the graph themselves.
    pub fn executor(&self) -> &Executor {
        &self.active.executor
    }

    /// The stream it runs on.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// An empty state.
    pub fn new_state(&self) -> State {
        self.active.executor.new_state()
    }

    /// The logits `[1, length, vocabulary]` of some tokens, which continue what `state` has seen. Lazy. Ids must be within
    /// the vocabulary.
    pub fn run(&self, tokens: &[u32], state: &mut State) -> Result<Array, zmlx_graph::GraphError> {
        with_stream(self.stream, || {
            let tokens = Array::from_slice(tokens, &[1, tokens.len() as i32]).map_err(|source| {
                zmlx_graph::GraphError::Node { path: "input".to_owned(), op: "tokens", source }
            })?;
            self.active.executor.run(&tokens, state)
        })
    }

    /// The logits of some positions of `tokens` (`[batch, length]`).
    pub(crate) fn run_for(
        &self,
        tokens: &Array,
        state: &mut State,
        wanted: Wanted,
    ) -> Result<Option<Array>, zmlx_graph::GraphError> {
        self.active.executor.run_for(tokens, state, wanted)
    }
}

/// The stream of a device.
pub(crate) fn stream_for(device: DeviceChoice) -> Result<Stream, LoadError> {
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

/// What patterns matched does not run, all for one reason.
fn refuse_all(patterns: &mut [PatternReport], reason: &str) {
    for pattern in patterns.iter_mut().filter(|p| p.matched > 0) {
        pattern.matched = 0;
        pattern.refused.push(reason.to_owned());
    }
}

/// Where weights come from and what they become.
struct Weights<'a> {
    built: &'a Built,
    source: &'a Source,
    wanted: Option<Dtype>,
    stream: Stream,
    /// What need not be read.
    held: Held,
}

impl Weights<'_> {
    /// The stock graph with its weights.
    fn stock(
        &self,
        graph: &Arc<Graph>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Executor, LoadError> {
        check_device(self.built, self.stream.device(), self.wanted)?;
        let held = self.held.on_mlx(graph);
        let read = || read_weights(self.built, self.source, self.wanted, &held, progress);
        let mut arrays = with_stream(self.stream, read)?;
        Ok(self.held.stock(Arc::clone(graph), |spec| arrays.remove(&spec.name))?)
    }

    /// The patched graph and the engine's threads.
    fn rewritten(&self, graph: &Graph, options: &PatchOptions) -> Result<(Rewritten, usize), PatchError> {
        let backend = match (self.stream.device(), self.wanted) {
            (Device::Cpu, Some(Dtype::Float32)) => Backend::Cpu,
            (Device::Cpu, _) => Backend::Other("16-bit activations on the CPU (load with dtype f32)"),
            (Device::Gpu, _) if backend_available(runtime::Backend::Cuda).unwrap_or(false) => Backend::Cuda,
            (Device::Gpu, _) => Backend::Other("the GPU"),
        };
        let choice = options.choose(backend)?;
        let threads = options.thread_count()?;
        Ok((rewrite(graph, &choice)?, threads))
    }

    /// The patched graph with its weights; the stock graph if nothing is to be patched, or nothing matched.
    fn patched(
        &self,
        graph: &Arc<Graph>,
        options: &PatchOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Form, PatchError> {
        let (rewritten, threads) = self.rewritten(graph, options)?;
        let mut patterns = rewritten.patterns;
        let executor = if patterns.iter().all(|p| p.matched == 0) {
            self.stock(graph, progress)?
        } else if self.stream.device() == Device::Gpu {
            let (executor, refusal) = self.cuda(graph, rewritten.graph, progress)?;
            if let Some(reason) = refusal {
                refuse_all(&mut patterns, &reason);
            }
            executor
        } else {
            with_stream(self.stream, || self.native(Arc::new(rewritten.graph), threads, false, progress))?
        };
        Ok(Form { executor, patch: Some((options.clone(), patterns)) })
    }

    /// The patched graph, which decodes past MLX on an NVIDIA GPU; where it cannot, the stock graph and the reason.
    fn cuda(
        &self,
        stock: &Arc<Graph>,
        patched: Graph,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(Executor, Option<String>), PatchError> {
        let graph = Arc::new(patched);
        let held = self.held.on_mlx(&graph);
        let read = || -> Result<_, PatchError> {
            let mut arrays = read_weights(self.built, self.source, self.wanted, &held, progress)?;
            Ok(self.held.cuda(graph, |spec| arrays.remove(&spec.name))?)
        };
        let (executor, refusal) = with_stream(self.stream, read)?;
        match refusal {
            None => Ok((executor, None)),
            // All weights are there already.
            Some(reason) => Ok((executor.held().stock(Arc::clone(stock), |_| None)?, Some(reason))),
        }
    }

    /// `separate`: each fused node as a program of its own.
    fn native(
        &self,
        graph: Arc<Graph>,
        threads: usize,
        separate: bool,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Executor, PatchError> {
        // Two readers, since a tensor that both MLX and the engine need is read in two forms.
        let mut files = WeightReader::open(self.built, self.source)?;
        let mut again = WeightReader::open(self.built, self.source)?;
        let failure = std::cell::RefCell::new(None);
        let fail = |error: LoadError| {
            failure.borrow_mut().get_or_insert(error);
        };
        let total_bytes = self.source.file_bytes();
        let stored = |spec: &TensorSpec, buffer: &mut Vec<u8>| {
            let dtype = files.bytes(spec, buffer).map_err(fail).ok()?;
            progress(LoadProgress { done_bytes: files.done_bytes.min(total_bytes), total_bytes });
            Some(dtype)
        };
        let converted = |spec: &TensorSpec| {
            let array = again.array(spec).map_err(fail).ok()?;
            let array = if spec.float { array.astype(Dtype::Float32) } else { Ok(array) };
            array.map_err(|error| fail(error.into())).ok()
        };
        let executor = match separate {
            true => self.held.separate(graph, threads, stored, converted),
            false => self.held.native(graph, threads, stored, converted),
        };
        match (executor, failure.into_inner()) {
            (Err(_), Some(error)) => Err(error.into()),
            (executor, _) => Ok(executor?),
        }
    }
}
