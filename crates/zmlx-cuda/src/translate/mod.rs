//! From stages of the engine to launches. What a stage means is said where the stage is; here is which kernel does it.
//!
//! A call is a token of each of a few sequences, all at the same position. Activations are rows, one a sequence, and
//! kernels take all of them: products as rows that share weights, what has a cache or a state as so many sequences.
//!
//! A program of the CPU's engine has stages that so few tokens do not need (packing rows for all threads, grouping
//! tokens by expert): they are passed over. Where a kernel does what several stages do, they are taken together: a router's
//! product and choice, attention and the putting together of its parts.

mod delta;
mod heads;
mod latent;
mod plain;
mod products;

use std::any::Any;
use std::collections::HashMap;

use zmlx_engine::matrix::{Coding, Data, Float as EngineFloat, Matrix, ScaleFormat};
use zmlx_engine::program::{Buffer, Stage};
use zmlx_engine::stages::{self, Norm as StageNorm};

use crate::error::{CudaError, Result};
use crate::kernels::{Float, Format, KernelError, Launch, Norm, Planned, Source, Weights};
use crate::plan::{Memory, Plan, Request, SlotAddress, Step};

/// The launches of a step: a token of each sequence.
///
/// # Errors
/// [`CudaError::Untranslated`] for a stage without a kernel, [`CudaError::Kernel`] for one whose sizes its kernel does not
/// take, and those of `memory`.
pub fn translate(request: &Request<'_>, memory: &mut dyn Memory) -> Result<Plan> {
    let mut t = Translator {
        request,
        memory,
        buffers: HashMap::new(),
        constants: HashMap::new(),
        tables: HashMap::new(),
        places: HashMap::new(),
        shared: HashMap::new(),
        steps: Vec::new(),
        at: 0,
        chosen: false,
        choice: None,
        latent: latent::Latent::default(),
    };
    while t.at < request.program.stages().len() {
        t.stage()?;
    }
    t.choose()?;
    let logits = t.buffer(request.logits)?;
    Ok(Plan { steps: t.steps, control: request.control, logits })
}

/// What is translated so far.
struct Translator<'a> {
    request: &'a Request<'a>,
    memory: &'a mut dyn Memory,
    /// Where the program's buffers are.
    buffers: HashMap<Buffer, u64>,
    /// Where a stage's floats were put, by where they are on the host: layers may share them.
    constants: HashMap<(usize, usize), u64>,
    /// Where the tables of rotary embeddings are, by where they are on the host.
    tables: HashMap<usize, u64>,
    /// Where numbers of places in a row are, by what they are.
    places: HashMap<Vec<usize>, u64>,
    /// Room that launches share, by its words.
    shared: HashMap<[usize; 2], [u64; 2]>,
    steps: Vec<Step>,
    /// The stage that comes next.
    at: usize,
    /// Whether a launch chooses the next token.
    chosen: bool,
    /// A choice of experts that their products make, from these logits.
    choice: Option<(&'a stages::Route, u64)>,
    /// Stages of attention over latents that a later launch takes over.
    latent: latent::Latent<'a>,
}

/// A stage as what it is.
fn stage_as<T: 'static>(stage: &dyn Stage) -> Option<&T> {
    let any: &dyn Any = stage;
    any.downcast_ref()
}

impl<'a> Translator<'a> {
    /// Translates the next stage, and those that its kernel does too.
    fn stage(&mut self) -> Result<()> {
        let stage = &*self.request.program.stages()[self.at];
        macro_rules! translated {
            ($($ty:ident => $method:ident),* $(,)?) => {
                $(if let Some(stage) = stage_as::<stages::$ty>(stage) {
                    self.$method(stage)?;
                    self.at += 1;
                    return Ok(());
                })*
            };
        }
        translated!(
            Qkv => qkv,
            QkvRows => qkv_rows,
            Attend => attend,
            SplitRope => split_rope,
            LatentAppend => latent_append,
            LatentAttend => latent_attend,
            HeadProducts => head_products,
            Embed => embed,
            ShortConv => short_conv,
            ConvSilu => conv_silu,
            DeltaHeads => delta_heads,
            Route => route,
            RmsNorm => rms_norm,
            LayerNorm => layer_norm,
            Softmax => softmax,
            Add => add,
            SigmoidGate => sigmoid_gate,
            Linear => linear,
            Gated => gated,
            ExpertsUp => experts_up,
            ExpertsDown => experts_down,
        );
        if is_passed_over(stage) {
            self.at += 1;
            return Ok(());
        }
        Err(CudaError::Untranslated {
            stage: stage.name(),
            reason: "there is no CUDA kernel for it".to_owned(),
        })
    }

    /// Rows of activations: the sequences, a token of each.
    fn sequences(&self) -> usize {
        self.request.sequences
    }

    /// The stage after number `at` that a token does not pass over.
    fn next_after(&self, at: usize) -> Option<usize> {
        let stages = self.request.program.stages();
        (at + 1..stages.len()).find(|&at| !is_passed_over(&*stages[at]))
    }

    /// The stage after this one that a token does not pass over.
    fn next_at(&self) -> Option<usize> {
        self.next_after(self.at)
    }

    /// Stage number `at`, if it is a `T`.
    fn stage_at<T: 'static>(&self, at: usize) -> Option<&'a T> {
        stage_as(&**self.request.program.stages().get(at)?)
    }

    /// The stage after this one, if it is a `T`.
    fn next_stage<T: 'static>(&self) -> Option<&'a T> {
        self.stage_at(self.next_at()?)
    }

    /// Goes on with that stage.
    fn skip_to_next(&mut self) {
        self.at = self.next_at().unwrap_or(self.at);
    }

    /// Room for so many words of 32 bits each that mean nothing between launches; one for all launches that ask for as many.
    fn shared_room(&mut self, words: [usize; 2]) -> Result<[u64; 2]> {
        if let Some(&room) = self.shared.get(&words) {
            return Ok(room);
        }
        let room = [self.memory.room(4 * words[0])?, self.memory.room(4 * words[1])?];
        self.shared.insert(words, room);
        Ok(room)
    }

    /// Counters that are zero between launches, shared by all that ask for as many.
    fn shared_counters(&mut self, count: usize) -> Result<[u64; 2]> {
        self.shared_room([count, 1])
    }

    /// A product's kernel and launch. Plans are made for an H100: where a block has less shared memory, less is on its way. Its
    /// blocks rehearse if they begin early.
    fn product<K: Planned>(
        &self,
        mut kernel: K,
        make: impl Fn(&K) -> (std::result::Result<Source, KernelError>, std::result::Result<Launch, KernelError>),
    ) -> Result<(Source, Launch)> {
        loop {
            let (source, launch) = make(&kernel);
            let fits = match &launch {
                Ok(launch) => launch.shared as usize <= self.request.shared_memory,
                Err(error) => !matches!(error, KernelError::Shared { .. }),
            };
            let plan = kernel.plan_mut();
            if fits || plan.depth <= 1 {
                let made = made(source, launch)?;
                if plan.rehearsed || !self.begins_early(&made.1) {
                    return Ok(made);
                }
                // Blocks that begin late would be kept from their work by it.
                plan.rehearsed = true;
                continue;
            }
            plan.depth -= 1;
        }
    }

    /// Whether a multiprocessor has room for the blocks of a launch beside those of the launch before it.
    fn begins_early(&self, launch: &Launch) -> bool {
        let Some(before) = self.steps.last().map(|step| &step.launch) else { return false };
        let blocks = |l: &Launch| l.blocks().div_ceil(self.request.multiprocessors as usize);
        let threads = |l: &Launch| blocks(l) * l.block.iter().map(|&n| n as usize).product::<usize>();
        // A block takes 1 KiB more than it asks for, and threads have 64 registers of 65,536.
        let shared = |l: &Launch| blocks(l) * (l.shared as usize + 1024);
        shared(before) + shared(launch) <= self.request.shared_memory + 1024
            && threads(before) + threads(launch) <= 1024
    }

    /// Adds a launch.
    fn push(&mut self, name: &'static str, made: (Source, Launch)) {
        let (source, launch) = made;
        self.steps.push(Step { stage: self.at, name, source, launch });
    }

    /// Where a buffer is.
    fn buffer(&mut self, buffer: Buffer) -> Result<u64> {
        if let Some(&address) = self.buffers.get(&buffer) {
            return Ok(address);
        }
        let width = self.request.program.widths().get(buffer.0).copied();
        let width = width.ok_or_else(|| CudaError::Argument(format!("there is no buffer {}", buffer.0)))?;
        let address = self.memory.room(self.sequences() * width * size_of::<f32>())?;
        self.buffers.insert(buffer, address);
        Ok(address)
    }

    fn optional_buffer(&mut self, buffer: Option<Buffer>) -> Result<Option<u64>> {
        buffer.map(|b| self.buffer(b)).transpose()
    }

    /// Where constants of a stage are, which live as long as the program.
    fn constant(&mut self, floats: &[f32]) -> Result<u64> {
        let key = (floats.as_ptr() as usize, floats.len());
        if let Some(&address) = self.constants.get(&key) {
            return Ok(address);
        }
        let address = self.memory.constant(floats)?;
        self.constants.insert(key, address);
        Ok(address)
    }

    fn optional_constant(&mut self, floats: Option<&Vec<f32>>) -> Result<Option<u64>> {
        floats.map(|f| self.constant(f)).transpose()
    }

    /// A norm and its weights.
    fn norm(&mut self, norm: Option<&StageNorm>) -> Result<(Option<Norm>, Option<u64>)> {
        let Some(norm) = norm else { return Ok((None, None)) };
        let weight = self.optional_constant(norm.weight.as_ref())?;
        Ok((Some(Norm { eps: norm.eps, weight: weight.is_some() }), weight))
    }

    /// A matrix as kernels take it.
    fn matrix(&self, matrix: &Matrix) -> Result<(Format, Weights)> {
        let refuse = |reason: String| CudaError::Untranslated { stage: "product", reason };
        let outline = matrix.outline().ok_or_else(|| refuse("its matrix is on the CPU".to_owned()))?;
        let format = format(outline.coding).map_err(refuse)?;
        let all = self.memory.weight(outline.weight)?;
        let (first, columns) = (outline.first as u64, matrix.columns() as u64);
        let (codes, scales) = match format {
            Format::Affine { bits, group, scales } => {
                (columns * u64::from(bits) / 8, columns / group as u64 * scales.size() as u64)
            }
            Format::Mxfp4 => (columns / 2, columns / 32),
            Format::Dense(float) => (columns * float.size() as u64, 0),
        };
        let weights = Weights {
            codes: all.codes + first * codes,
            scales: all.scales + first * scales,
            biases: all.biases + first * scales,
        };
        Ok((format, weights))
    }

    /// A slot of keys and values.
    fn slot(&self, slot: usize) -> Result<SlotAddress> {
        let found = self.request.slots.get(slot).copied();
        found.ok_or_else(|| CudaError::Argument(format!("there is no slot {slot}")))
    }
}

/// What a kernel is and how it is launched.
fn made(
    source: std::result::Result<Source, KernelError>,
    launch: std::result::Result<Launch, KernelError>,
) -> Result<(Source, Launch)> {
    Ok((source?, launch?))
}

/// Stages that few tokens pass over.
fn is_passed_over(stage: &dyn Stage) -> bool {
    stage_as::<stages::Pack>(stage).is_some()
        || stage_as::<stages::Group>(stage).is_some()
        || stage_as::<stages::Combine>(stage).is_some()
        || stage_as::<stages::AttendMerge>(stage).is_some()
}

/// How a matrix lies in memory, if there are kernels for that.
fn format(coding: &Data<()>) -> std::result::Result<Format, String> {
    match coding {
        Data::Dense { float, .. } => Ok(Format::Dense(match float {
            EngineFloat::F32 => Float::F32,
            EngineFloat::F16 => Float::F16,
            EngineFloat::Bf16 => Float::Bf16,
        })),
        Data::Quantized { coding: Coding::Affine(bits @ (4 | 8)), scale, group, .. } => {
            let scales = match scale {
                ScaleFormat::F32 => Float::F32,
                ScaleFormat::F16 => Float::F16,
                ScaleFormat::Bf16 => Float::Bf16,
                other => return Err(format!("affine codes with {other:?} scales")),
            };
            Ok(Format::Affine { bits: *bits, group: *group, scales })
        }
        Data::Quantized { coding: Coding::E2m1, scale: ScaleFormat::E8m0, group: 32, .. } => {
            Ok(Format::Mxfp4)
        }
        Data::Quantized { coding, scale, group, .. } => {
            Err(format!("there is no CUDA product for {coding:?} with {scale:?} scales in groups of {group}"))
        }
    }
}
