//! From fused nodes to a program of the CPU's engine.

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use zmlx_engine::matrix::{Coding, Data, Float, Matrix, MatrixError, ScaleFormat};
use zmlx_engine::memory::OutOfMemory;
use zmlx_engine::program::{Buffer, Program, Slot, Stage};
use zmlx_engine::stages::{Norm, Rope};
use zmlx_mlx::{Array, Dtype};

use crate::graph::{Graph, Node, Value};
use crate::held::Held;
use crate::state::SlotId;
use crate::weights::{BoundWeight, Format, TensorSpec, Weight, WeightId};

/// Why a fused node cannot be lowered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LoweringError {
    /// A weight was not given.
    #[error("weight {0} is missing")]
    Missing(String),
    /// A weight is not what it was taken for.
    #[error("{path}: {message}")]
    Weight {
        /// Its path.
        path: String,
        /// What is wrong.
        message: String,
    },
    /// No memory.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// A body asks for what is not there: a fault of its pattern.
    #[error("fault of a pattern: {0}")]
    Pattern(String),
}

/// Writes a tensor's bytes as they are stored into a buffer, and says what they are; `None` if there is no such tensor.
pub type Tensors<'a> = dyn FnMut(&TensorSpec, &mut Vec<u8>) -> Option<Dtype> + 'a;

/// How a value of the graph lies in a buffer of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `[B, L, width]`
    Flat {
        /// Floats a token.
        width: usize,
    },
    /// `[B, heads, L, width]`, in the buffer `[B, L, heads, width]`.
    Heads {
        /// Heads.
        heads: usize,
        /// Width of a head.
        width: usize,
    },
    /// `[B, L, width]` of numbers that MLX has as uint32.
    Indices {
        /// Numbers a token.
        width: usize,
    },
}

impl Form {
    /// Floats a token.
    pub fn width(self) -> usize {
        match self {
            Self::Flat { width } | Self::Indices { width } => width,
            Self::Heads { heads, width } => heads * width,
        }
    }
}

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Buffer(Buffer, Form),
    /// Keys (or values) of all positions in a slot of the engine.
    Cache {
        slot: usize,
        values: bool,
    },
}

/// Where the weights of a lowering come from.
pub(crate) enum WeightSource<'a> {
    /// Bytes as a checkpoint has them: matrices are arranged for the CPU.
    Stored(&'a mut Tensors<'a>),
    /// Arrays of MLX, which stay where they are: matrices are outlines with the weight's number.
    Bound(&'a [Option<BoundWeight>]),
    /// Nothing: matrices are outlines, floats of this dtype, and vectors zeros. To count what a program takes.
    Declared(Dtype),
}

/// What is lowered so far; handed to each fused node's body in turn.
pub struct Lowering<'a> {
    graph: &'a Graph,
    source: WeightSource<'a>,
    pub(crate) program: Program,
    pub(crate) places: HashMap<Value, Place>,
    /// Values that come from outside of the program, in the order in which they were first asked for.
    pub(crate) inputs: Vec<(Value, Buffer, Form)>,
    pub(crate) slots: HashMap<SlotId, usize>,
    pub(crate) templates: Vec<Slot>,
    half_caches: bool,
    /// Weights that need not be loaded.
    held: Option<&'a Held>,
    pub(crate) matrices: HashMap<WeightId, Matrix>,
    pub(crate) vectors: HashMap<WeightId, Vec<f32>>,
    /// Room for the parts of one weight, kept: fresh pages cost more than reading into them.
    staging: [Vec<u8>; 3],
    ropes: HashMap<String, Arc<Rope>>,
    /// Buffers that nobody will read again, by width.
    free: Vec<(usize, Buffer)>,
    widths: HashMap<Buffer, usize>,
    node: usize,
    given: Vec<Value>,
    /// Buffers of the current node alone.
    temporary: Vec<Buffer>,
}

impl<'a> Lowering<'a> {
    pub(crate) fn new(graph: &'a Graph, held: Option<&'a Held>, source: WeightSource<'a>) -> Self {
        Self {
            graph,
            source,
            program: Program::new(),
            places: HashMap::new(),
            inputs: Vec::new(),
            slots: HashMap::new(),
            templates: Vec::new(),
            half_caches: false,
            held,
            matrices: HashMap::new(),
            vectors: HashMap::new(),
            staging: Default::default(),
            ropes: HashMap::new(),
            free: Vec::new(),
            widths: HashMap::new(),
            node: 0,
            given: Vec::new(),
            temporary: Vec::new(),
        }
    }

    /// Begins a new program; weights and slots stay.
    pub(crate) fn begin(&mut self) {
        self.program = Program::new();
        self.places.retain(|_, place| matches!(place, Place::Cache { .. }));
        self.inputs.clear();
        self.free.clear();
        self.widths.clear();
    }

    /// Lowers a fused node; `dead` are the values that nobody reads after it.
    pub(crate) fn node(&mut self, index: usize, node: &Node, dead: &[Value]) -> Result<(), LoweringError> {
        let fused =
            node.op.fused().ok_or_else(|| LoweringError::Pattern(format!("{} is not fused", node.path)))?;
        self.node = index;
        self.given.clone_from(&node.inputs);
        fused.body.clone().lower(self)?;
        for buffer in std::mem::take(&mut self.temporary) {
            self.release(buffer);
        }
        for value in dead {
            if let Some(Place::Buffer(buffer, _)) = self.places.get(value) {
                self.release(*buffer);
            }
        }
        Ok(())
    }

    fn release(&mut self, buffer: Buffer) {
        if let Some(&width) = self.widths.get(&buffer) {
            self.free.push((width, buffer));
        }
    }

    fn take_buffer(&mut self, width: usize) -> Buffer {
        if let Some(at) = self.free.iter().position(|(w, _)| *w == width) {
            return self.free.swap_remove(at).1;
        }
        let buffer = self.program.buffer(width);
        self.widths.insert(buffer, width);
        buffer
    }

    /// The buffer of input `index`, which the body takes in this form.
    ///
    /// # Errors
    /// [`LoweringError::Pattern`] if the node has no such input, or it lies in another form.
    pub fn input(&mut self, index: usize, form: Form) -> Result<Buffer, LoweringError> {
        let wrong = || LoweringError::Pattern(format!("input {index} of node {} in another form", self.node));
        let value = *self.given.get(index).ok_or_else(wrong)?;
        match self.places.get(&value) {
            Some(Place::Buffer(buffer, found)) if *found == form => Ok(*buffer),
            Some(_) => Err(wrong()),
            None => {
                // Never given back: it is filled before the program starts.
                let buffer = self.program.buffer(form.width());
                self.places.insert(value, Place::Buffer(buffer, form));
                self.inputs.push((value, buffer, form));
                Ok(buffer)
            }
        }
    }

    /// The slot whose keys and values input `index` is.
    ///
    /// # Errors
    /// [`LoweringError::Pattern`] if it is none.
    pub fn cache(&self, index: usize) -> Result<usize, LoweringError> {
        match self.given.get(index).and_then(|v| self.places.get(v)) {
            Some(Place::Cache { slot, .. }) => Ok(*slot),
            _ => Err(LoweringError::Pattern(format!("input {index} of node {} is no cache", self.node))),
        }
    }

    /// A buffer for output `output`.
    pub fn output(&mut self, output: usize, form: Form) -> Buffer {
        let buffer = self.take_buffer(form.width());
        self.places.insert(Value { node: self.node, output }, Place::Buffer(buffer, form));
        buffer
    }

    /// Says that output `output` is a cache: its keys, or its values.
    pub fn output_cache(&mut self, output: usize, slot: usize, values: bool) {
        self.places.insert(Value { node: self.node, output }, Place::Cache { slot, values });
    }

    /// A buffer for this node alone.
    pub fn temporary(&mut self, width: usize) -> Buffer {
        let buffer = self.take_buffer(width);
        self.temporary.push(buffer);
        buffer
    }

    /// The engine's slot for a slot of the graph.
    pub fn slot(&mut self, id: SlotId, template: Slot) -> usize {
        let template = if self.half_caches { template.half() } else { template };
        let next = self.templates.len();
        let slot = *self.slots.entry(id).or_insert(next);
        if slot == next {
            self.templates.push(template);
        }
        slot
    }

    /// Lowers something with key/value slots in half precision.
    ///
    /// # Errors
    /// As `lower`.
    pub fn with_half_caches(
        &mut self,
        lower: impl FnOnce(&mut Self) -> Result<(), LoweringError>,
    ) -> Result<(), LoweringError> {
        let before = std::mem::replace(&mut self.half_caches, true);
        let done = lower(self);
        self.half_caches = before;
        done
    }

    /// Adds a stage.
    pub fn push(&mut self, stage: impl Stage + 'static) {
        self.program.push(self.node, stage);
    }

    /// A matrix, arranged for products.
    ///
    /// # Errors
    /// [`LoweringError`] if it is missing or not what it should be.
    pub fn matrix(&mut self, id: WeightId) -> Result<Matrix, LoweringError> {
        if let Some(matrix) = self.matrices.get(&id) {
            return Ok(matrix.clone());
        }
        if let Some(matrix) = self.held.and_then(|h| h.matrices.get(&id)) {
            self.matrices.insert(id, matrix.clone());
            return Ok(matrix.clone());
        }
        let weight = &self.graph.weights[id.0];
        let fail = |message: String| LoweringError::Weight { path: weight.path.clone(), message };
        let size = |i: usize| weight.shape.get(i).map_or(1, |d| *d as usize);
        let (experts, rows, columns) = match weight.shape.len() {
            2 => (1, size(0), size(1)),
            3 => (size(0), size(1), size(2)),
            n => return Err(fail(format!("a matrix of {n} dimensions"))),
        };
        let unknown = || fail("stored in a way that has no product".into());
        let made = match &mut self.source {
            WeightSource::Stored(tensors) => {
                let mut dtypes = Vec::new();
                for (spec, buffer) in weight.tensors().iter().zip(&mut self.staging) {
                    let dtype = tensors(spec, buffer);
                    dtypes.push(dtype.ok_or_else(|| LoweringError::Missing(spec.name.clone()))?);
                }
                let parts = self.staging.iter().map(Vec::as_slice).zip(dtypes);
                let data = data(&weight.format, parts).ok_or_else(unknown)?;
                Matrix::copied(&data, experts, rows, columns, weight.exact)
            }
            WeightSource::Bound(bound) => {
                let bound = bound.get(id.0).and_then(Option::as_ref);
                let bound = bound.ok_or_else(|| LoweringError::Missing(weight.path.clone()))?;
                let empty: &[u8] = &[];
                let parts = bound.arrays().into_iter().map(|a| (empty, a.dtype()));
                let coding = data(&weight.format, parts).ok_or_else(unknown)?.coding();
                Matrix::outlined(coding, id.0, experts, rows, columns)
            }
            WeightSource::Declared(dtype) => {
                let (empty, dtype): (&[u8], _) = (&[], *dtype);
                let dtypes = weight.tensors().into_iter().map(|s| if s.float { dtype } else { Dtype::Uint8 });
                let coding = data(&weight.format, dtypes.map(|d| (empty, d))).ok_or_else(unknown)?.coding();
                Matrix::outlined(coding, id.0, experts, rows, columns)
            }
        };
        let matrix = made.map_err(|e: MatrixError| fail(e.to_string()))?;
        self.matrices.insert(id, matrix.clone());
        Ok(matrix)
    }

    /// A weight in float32, as MLX has it when the model runs in float32.
    ///
    /// # Errors
    /// [`LoweringError`] if it is missing or quantised.
    pub fn vector(&mut self, id: WeightId) -> Result<Vec<f32>, LoweringError> {
        if let Some(vector) = self.vectors.get(&id) {
            return Ok(vector.clone());
        }
        if let Some(vector) = self.held.and_then(|h| h.vectors.get(&id)) {
            self.vectors.insert(id, vector.clone());
            return Ok(vector.clone());
        }
        let weight = &self.graph.weights[id.0];
        let made = match &self.source {
            WeightSource::Stored(_) => None,
            WeightSource::Bound(bound) => {
                Some(bound_vector(weight, bound.get(id.0).and_then(Option::as_ref))?)
            }
            WeightSource::Declared(_) => Some(vec![0.0; weight.parameters() as usize]),
        };
        if let Some(vector) = made {
            self.vectors.insert(id, vector.clone());
            return Ok(vector);
        }
        let specs = weight.tensors();
        let [spec] = specs.as_slice() else {
            let message = "a quantised weight where a vector is needed".to_owned();
            return Err(LoweringError::Weight { path: weight.path.clone(), message });
        };
        let buffer = &mut self.staging[0];
        let missing = || LoweringError::Missing(spec.name.clone());
        let WeightSource::Stored(tensors) = &mut self.source else { return Err(missing()) };
        let dtype = tensors(spec, buffer).ok_or_else(missing)?;
        let mut vector: Vec<f32> = match dtype {
            Dtype::Float32 => {
                buffer.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Dtype::Float16 => {
                buffer.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            Dtype::Bfloat16 => {
                buffer.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            other => {
                let message = format!("{other} where floats are needed");
                return Err(LoweringError::Weight { path: weight.path.clone(), message });
            }
        };
        if weight.offset != 0.0 {
            vector.iter_mut().for_each(|v| *v += weight.offset);
        }
        self.vectors.insert(id, vector.clone());
        Ok(vector)
    }

    /// The parameters of an RMS norm.
    ///
    /// # Errors
    /// As [`Self::vector`].
    pub fn norm(&mut self, norm: Option<(WeightId, f32)>) -> Result<Option<Norm>, LoweringError> {
        let Some((weight, eps)) = norm else { return Ok(None) };
        Ok(Some(Norm { weight: Some(self.vector(weight)?), eps }))
    }

    /// The table of a rotary embedding; one for all layers that turn alike.
    pub fn rope(&mut self, rope: &Turn) -> Arc<Rope> {
        let key = format!("{rope:?}");
        let made = self.ropes.entry(key).or_insert_with(|| Arc::new(rope.table()));
        Arc::clone(made)
    }

    /// A bias, if there is one.
    ///
    /// # Errors
    /// As [`Self::vector`].
    pub fn bias(&mut self, id: Option<WeightId>) -> Result<Option<Vec<f32>>, LoweringError> {
        id.map(|id| self.vector(id)).transpose()
    }
}

/// A weight that MLX has, in float32.
fn bound_vector(weight: &Weight, bound: Option<&BoundWeight>) -> Result<Vec<f32>, LoweringError> {
    let fail = |message: String| LoweringError::Weight { path: weight.path.clone(), message };
    match bound {
        None => Err(LoweringError::Missing(weight.path.clone())),
        Some(BoundWeight::Quantized { .. }) => {
            Err(fail("a quantised weight where a vector is needed".to_owned()))
        }
        Some(BoundWeight::Dense(array)) => {
            let floats = array.astype(Dtype::Float32).and_then(|a| a.to_vec::<f32>());
            floats.map_err(|e| fail(e.to_string()))
        }
    }
}

/// A rotary embedding, as the graph has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Leading part of a head that is turned.
    pub dims: i32,
    /// Neighbours instead of halves.
    pub traditional: bool,
    /// Base of the frequencies, unless they are given.
    pub base: Option<f32>,
    /// Scale of the positions.
    pub scale: f32,
    /// The frequencies, as MLX takes them.
    pub frequencies: Option<Vec<f32>>,
    /// Multiplies what is turned, first.
    pub magnitude: f32,
}

impl Turn {
    /// Cosines and sines come from MLX's own rope, which turns (1, 0) into them, so that they are the same bits.
    fn table(&self) -> Rope {
        let (turn, half) = (self.clone(), self.dims.max(2) as usize / 2);
        let angles = move |first: usize, count: usize| {
            let made = turn.angles(first, count, half);
            // Plain ops on small arrays: they fail only if memory does, and NaN then shows in every logit.
            made.unwrap_or_else(|_| vec![f32::NAN; count * 2 * half])
        };
        Rope::new(half, self.traditional, Box::new(angles)).magnified(self.magnitude)
    }

    fn angles(&self, first: usize, count: usize, half: usize) -> zmlx_mlx::Result<Vec<f32>> {
        // [1, 1, count, dims] of (1, 0) pairs, as neighbours: then the result is (cos, sin) pairs.
        let pairs: Vec<f32> = (0..count * half).flat_map(|_| [1.0, 0.0]).collect();
        let x = Array::from_vec(pairs, &[1, 1, count as i32, 2 * half as i32])?;
        let frequencies = match &self.frequencies {
            Some(f) => Some(Array::from_slice(f, &[f.len() as i32])?),
            None => None,
        };
        let offset = first as i32;
        let y =
            zmlx_mlx::fast::rope(&x, self.dims, true, self.base, self.scale, offset, frequencies.as_ref())?;
        let y = y.to_vec::<f32>()?;
        let position = |p: &[f32]| -> Vec<f32> {
            let (cos, sin) = (p.iter().step_by(2), p.iter().skip(1).step_by(2));
            cos.chain(sin).copied().collect()
        };
        Ok(y.chunks_exact(2 * half).flat_map(position).collect())
    }
}

/// The parts of a weight as the engine takes them.
fn data<'b>(format: &Format, mut parts: impl Iterator<Item = (&'b [u8], Dtype)>) -> Option<Data<&'b [u8]>> {
    let (first, dtype) = parts.next()?;
    let float = |dtype| {
        Some(match dtype {
            Dtype::Float32 => Float::F32,
            Dtype::Float16 => Float::F16,
            Dtype::Bfloat16 => Float::Bf16,
            _ => return None,
        })
    };
    let Format::Quantized(q) = format else {
        return Some(Data::Dense { elements: first, float: float(dtype)? });
    };
    let (scales, scale_dtype) = parts.next()?;
    let (coding, scale) = match q.mode.as_str() {
        "affine" => {
            let scale = match float(scale_dtype)? {
                Float::F32 => ScaleFormat::F32,
                Float::F16 => ScaleFormat::F16,
                Float::Bf16 => ScaleFormat::Bf16,
            };
            (Coding::Affine(q.bits as u32), scale)
        }
        "mxfp4" => (Coding::E2m1, ScaleFormat::E8m0),
        "mxfp8" => (Coding::E4m3, ScaleFormat::E8m0),
        "nvfp4" => (Coding::E2m1, ScaleFormat::E4m3),
        _ => return None,
    };
    let biases = parts.next().map(|(bytes, _)| bytes);
    Some(Data::Quantized { codes: first, scales, biases, coding, scale, group: q.group_size as usize })
}

/// Writes an array's bytes into a buffer, and says what they are: how [`Tensors`] are made of arrays.
///
/// # Errors
/// Those of MLX, when it computes the array.
pub fn write_bytes(array: &Array, buffer: &mut Vec<u8>) -> zmlx_mlx::Result<Dtype> {
    let dense = zmlx_mlx::ops::contiguous(array)?;
    let bytes = zmlx_mlx::ops::contiguous(&dense.reshape(&[-1])?.view(Dtype::Uint8)?)?;
    buffer.clear();
    buffer.extend_from_slice(bytes.as_slice::<u8>()?);
    Ok(array.dtype())
}
