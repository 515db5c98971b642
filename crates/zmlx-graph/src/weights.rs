//! Weights of a graph: how they are declared, named in a checkpoint, and applied.

use serde::Serialize;
use zmlx_mlx::runtime::{Backend, backend_available};
use zmlx_mlx::stream::{Device, current_device};
use zmlx_mlx::{Array, Dtype, Result, ops};

use crate::cuda::grouped_linear;
use crate::shape::DtypeSpec;

/// Number of a weight in its graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub(crate) usize);

/// How MLX packs a quantised matrix; see `quantize` for the modes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Quantization {
    /// Elements that share a scale.
    pub group_size: i32,
    /// Bits an element.
    pub bits: i32,
    /// `affine`, `mxfp4`, `mxfp8` or `nvfp4`.
    pub mode: String,
}

/// How a weight is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// One tensor of floats.
    Dense,
    /// Packed words, scales and, for affine, biases.
    Quantized(Quantization),
}

/// A declared weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Path of the module, or for a bare tensor its whole name.
    pub path: String,
    /// Shape before packing; `[..., out, in]` for matrices.
    pub shape: Vec<i32>,
    /// How it is stored.
    pub format: Format,
    /// The tensor is named by `path` itself and not `path.weight`.
    pub bare: bool,
    /// Whether it stays float32 whatever dtype the model runs in.
    pub keep_f32: bool,
    /// Number of experts on the first axis, of which a token uses some.
    pub experts: Option<i32>,
    /// Whether a token reads one row of it (an embedding that is not also the head).
    pub lookup: bool,
    /// Added to each element of a tensor that is not quantised, in the dtype of the computation.
    pub offset: f32,
    /// Whether its products may not round activations more than the dtype of the computation does: what they give is compared,
    /// and a difference in the last digits would choose something else.
    pub exact: bool,
}

/// A tensor that a weight is stored in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i32>,
    /// Whether it holds floats, whose dtype may be converted.
    pub float: bool,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| u64::try_from(d).unwrap_or(0)).fold(1, u64::saturating_mul)
    }

    /// Its bytes, with floats held in `dtype`: packed words have four, scales that are no floats one.
    pub fn bytes(&self, dtype: Dtype) -> u64 {
        let size = match (self.float, self.name.ends_with(".scales")) {
            (true, _) => dtype.size() as u64,
            (false, true) => 1,
            (false, false) => 4,
        };
        self.elements().saturating_mul(size)
    }
}

impl Weight {
    /// The tensors it is stored in, in the order that [`BoundWeight`] takes them.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let named = |suffix: &str| format!("{}.{suffix}", self.path);
        let name = if self.bare { self.path.clone() } else { named("weight") };
        let Format::Quantized(q) = &self.format else {
            return vec![TensorSpec { name, shape: self.shape.clone(), float: true }];
        };
        let with_last = |last: i32| {
            let mut shape = self.shape.clone();
            if let Some(dim) = shape.last_mut() {
                *dim = last;
            }
            shape
        };
        let columns = self.shape.last().copied().unwrap_or(0);
        // 64-bit in between: columns x bits can pass 2^31.
        let words = (i64::from(columns) * i64::from(q.bits) / 32) as i32;
        let groups = columns / q.group_size.max(1);
        let affine = q.mode == "affine";
        let mut tensors = vec![
            TensorSpec { name, shape: with_last(words), float: false },
            TensorSpec { name: named("scales"), shape: with_last(groups), float: affine },
        ];
        if affine {
            tensors.push(TensorSpec { name: named("biases"), shape: with_last(groups), float: true });
        }
        tensors
    }

    /// The dtype that its values have in a computation.
    pub fn dtype(&self) -> DtypeSpec {
        if self.keep_f32 { DtypeSpec::F32 } else { DtypeSpec::Activation }
    }

    /// Number of parameters, packed or not.
    pub fn parameters(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}

/// From this many rows on a matrix is unpacked for them. (H100: see docs/performance.md.)
const UNPACK_FROM: usize = 256;
/// From this many rows an expert on the rows of each are one product on tensor cores that reads packed codes: with 4 it takes
/// 0.3 to 0.7 of the time of MLX's product on an H100, with fewer it was not measured.
const GROUPED_FROM: usize = 4;
/// Where that product is not made for the format: from this many rows an expert on the matrices of all experts are unpacked.
/// With 16 and with 8 it was slower on an H100 than MLX's products with packed codes, with 32 and with 64 more than twice as
/// fast.
const EXPERT_ROWS_FROM: usize = 24;

/// A weight with its arrays.
#[derive(Debug, Clone)]
pub enum BoundWeight {
    /// One array.
    Dense(Array),
    /// Packed words, scales, biases.
    Quantized {
        /// Packed words.
        packed: Array,
        /// Scales.
        scales: Array,
        /// Biases (affine).
        biases: Option<Array>,
        /// How it is packed.
        quantization: Quantization,
    },
}

impl BoundWeight {
    /// Puts together the arrays of `weight.tensors()`.
    pub(crate) fn new(weight: &Weight, arrays: Vec<Array>) -> Result<Option<Self>> {
        let mut arrays = arrays.into_iter();
        let Some(first) = arrays.next() else { return Ok(None) };
        let Format::Quantized(q) = &weight.format else {
            let offset = f64::from(weight.offset);
            return Ok(Some(Self::Dense(if offset == 0.0 { first } else { first.add_scalar(offset)? })));
        };
        let Some(scales) = arrays.next() else { return Ok(None) };
        let (biases, quantization) = (arrays.next(), q.clone());
        Ok(Some(Self::Quantized { packed: first, scales, biases, quantization }))
    }

    /// Its arrays: one, or packed words, scales and, for affine, biases.
    pub fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Dense(a) => vec![a],
            Self::Quantized { packed, scales, biases, .. } => {
                [packed, scales].into_iter().chain(biases).collect()
            }
        }
    }

    /// Bytes of its arrays.
    pub fn bytes(&self) -> u64 {
        self.arrays().into_iter().map(|a| a.nbytes() as u64).sum()
    }

    /// The dtype of its floats; none if it has none.
    pub(crate) fn float(&self) -> Option<Dtype> {
        let dtype = match self {
            Self::Dense(a) => a.dtype(),
            Self::Quantized { scales, .. } => scales.dtype(),
        };
        matches!(dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16).then_some(dtype)
    }

    /// The array of a dense weight; of a quantised one, the dequantised matrix.
    pub fn dense(&self) -> Result<Array> {
        match self {
            Self::Dense(a) => Ok(a.clone()),
            Self::Quantized { packed, scales, biases, quantization } => {
                dequantize(packed, scales, biases.as_ref(), quantization)
            }
        }
    }

    /// `x @ w.T`.
    pub fn linear(&self, x: &Array) -> Result<Array> {
        self.product(x, true)
    }

    /// `x @ w`, against the direction of [`Self::linear`].
    pub fn linear_back(&self, x: &Array) -> Result<Array> {
        self.product(x, false)
    }

    fn product(&self, x: &Array, transposed: bool) -> Result<Array> {
        let unpacked = |w: &Array| x.matmul(&if transposed { w.swapaxes(-1, -2)? } else { w.clone() });
        let (packed, scales, biases, q) = match self {
            Self::Dense(w) => return unpacked(w),
            Self::Quantized { packed, scales, biases, quantization } => {
                (packed, scales, biases, quantization)
            }
        };
        // Of several matrices whose rows have one group each MLX has no product on CUDA that works: it refuses them where it
        // broadcasts them to the axes of x, and gives NaN where it need not.
        let one_group = packed.shape().len() > 2 && scales.dim(-1)? == 1;
        if one_group && current_device()? == Device::Gpu && backend_available(Backend::Cuda)? {
            return unpacked(&self.dense()?.astype(x.dtype())?);
        }
        let (group, bits) = (Some(q.group_size), Some(q.bits));
        ops::quantized_matmul(x, packed, scales, biases.as_ref(), transposed, group, bits, &q.mode)
    }

    /// `x @ w[experts].T`, the expert of each row given by `indices`.
    pub fn gather_linear(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array> {
        match self {
            Self::Dense(w) => ops::gather_mm(x, &w.swapaxes(-1, -2)?, None, Some(indices), sorted),
            Self::Quantized { packed, scales, biases, quantization: q } => ops::gather_qmm(
                x,
                packed,
                scales,
                biases.as_ref(),
                None,
                Some(indices),
                true,
                Some(q.group_size),
                Some(q.bits),
                &q.mode,
                None,
                sorted,
            ),
        }
    }

    /// Whether products of many rows may take it as floats: it is packed, and floats of `x`'s dtype hold what it stands for.
    fn unpacks_for(&self, x: &Array) -> bool {
        matches!(self, Self::Quantized { .. }) && x.dtype().size() == 2
    }

    /// [`Self::linear`] of many rows: from 256 on the matrix is unpacked first, once for all of them.
    pub fn linear_of_many(&self, x: &Array) -> Result<Array> {
        let rows = x.size() / x.shape().last().map_or(1, |&width| width.max(1) as usize);
        if rows < UNPACK_FROM || !self.unpacks_for(x) {
            return self.linear(x);
        }
        x.matmul(&self.dense()?.astype(x.dtype())?.swapaxes(-1, -2)?)
    }

    /// [`Self::gather_linear`] of many rows in the order of their experts. From 4 rows an expert on a kernel of its own takes the
    /// packed matrices ([`grouped_linear`]); where there is none for the format, from 24 on the matrices are unpacked first. Both
    /// ways the rows of each expert are one product.
    pub fn gather_linear_of_many(&self, x: &Array, indices: &Array) -> Result<Array> {
        let experts = match self {
            Self::Dense(w) => w.dim(0)?,
            Self::Quantized { packed, .. } => packed.dim(0)?,
        };
        let enough = |rows: usize| indices.size() >= rows * experts.max(1) as usize;
        if enough(GROUPED_FROM)
            && let Some(product) = grouped_linear(self, x, indices, None)?
        {
            return Ok(product);
        }
        if !enough(EXPERT_ROWS_FROM) || !self.unpacks_for(x) {
            return self.gather_linear(x, indices, true);
        }
        self.gather_linear_unpacked(x, indices)
    }

    /// [`Self::gather_linear`] of sorted rows with matrices that are unpacked to floats of `x`'s dtype first.
    pub fn gather_linear_unpacked(&self, x: &Array, indices: &Array) -> Result<Array> {
        let dense = self.dense()?.astype(x.dtype())?.swapaxes(-1, -2)?;
        ops::gather_mm(x, &dense, None, Some(indices), true)
    }

    /// Rows `ids`, dequantised.
    pub fn rows(&self, ids: &Array) -> Result<Array> {
        match self {
            Self::Dense(w) => w.take(ids, 0),
            Self::Quantized { packed, scales, biases, quantization } => {
                let biases = biases.as_ref().map(|b| b.take(ids, 0)).transpose()?;
                dequantize(&packed.take(ids, 0)?, &scales.take(ids, 0)?, biases.as_ref(), quantization)
            }
        }
    }
}

fn dequantize(packed: &Array, scales: &Array, biases: Option<&Array>, q: &Quantization) -> Result<Array> {
    ops::dequantize(packed, scales, biases, Some(q.group_size), Some(q.bits), &q.mode, None, None)
}
