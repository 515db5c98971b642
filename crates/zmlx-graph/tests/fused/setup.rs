//! Weights of small graphs: random, stored as checkpoints store them.

use std::collections::HashMap;

use zmlx_graph::Graph;
use zmlx_graph::weights::{Format, TensorSpec};
use zmlx_mlx::{Array, Dtype, ops};

/// How matrices are stored in a case.
#[derive(Debug, Clone)]
pub struct Storage {
    pub label: String,
    pub format: Format,
    /// Of floats: whole matrices, scales, norms.
    pub dtype: Dtype,
    /// A width that the format allows and that is no multiple of 64 where it can be helped.
    pub width: i32,
}

/// Ids with activations of their own.
pub const VOCABULARY: i32 = 48;
pub const ZEROS: u32 = 40;
pub const NOT_A_NUMBER: u32 = 41;
pub const HUGE: u32 = 42;
pub const TINY: u32 = 43;
pub const OUTLIERS: u32 = 44;

/// Numbers in -1..1 that look random and follow from a name.
pub fn noise(name: &str, len: usize) -> Vec<f32> {
    let seed =
        name.bytes().fold(0xcbf29ce484222325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100000001b3));
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 29 ^ state) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The tensors of a graph by name, as a checkpoint would store them, and in float32.
pub struct Tensors {
    stored: HashMap<String, Array>,
}

impl Tensors {
    pub fn new(graph: &Graph, storage: &Storage) -> Self {
        let mut stored = HashMap::new();
        for weight in &graph.weights {
            let len: i32 = weight.shape.iter().product();
            let (path, last) = (&weight.path, *weight.shape.last().unwrap());
            let mut floats = noise(path, len as usize);
            if path == "embed" {
                special(&mut floats, last as usize);
            } else if path.contains("norm") && !path.ends_with("bias") {
                floats.iter_mut().for_each(|v| *v = 1.0 + 0.3 * *v);
            } else if weight.shape.len() > 1 {
                let scale = (3.0 / last as f32).sqrt();
                floats.iter_mut().for_each(|v| *v *= scale);
            }
            if path.contains("tied") {
                // Rows 0 to 3 alike, 5 and 6 alike.
                let (row, rows) = (last as usize, weight.shape[0] as usize);
                for (from, to) in [(0, 1), (0, 2), (0, 3), (5, 6)].into_iter().filter(|p| p.1 < rows) {
                    floats.copy_within(from * row..(from + 1) * row, to * row);
                }
            }
            let dtype = if weight.keep_f32 || path == "embed" { Dtype::Float32 } else { storage.dtype };
            let array = Array::from_vec(floats, &weight.shape).unwrap().astype(dtype).unwrap();
            let specs = weight.tensors();
            let arrays = match &weight.format {
                Format::Dense => vec![array],
                Format::Quantized(q) => {
                    ops::quantize(&array, Some(q.group_size), Some(q.bits), &q.mode, None).unwrap()
                }
            };
            assert_eq!(specs.len(), arrays.len(), "{path}");
            for (spec, array) in specs.into_iter().zip(arrays) {
                array.eval().unwrap();
                stored.insert(spec.name, array);
            }
        }
        Self { stored }
    }

    pub fn replace(&mut self, name: &str, array: Array) {
        assert!(self.stored.insert(name.to_owned(), array).is_some(), "no {name}");
    }

    pub fn stored(&self, spec: &TensorSpec) -> Option<Array> {
        self.stored.get(&spec.name).cloned()
    }

    /// The bytes of a tensor as it is stored, and its dtype.
    pub fn write(&self, spec: &TensorSpec, bytes: &mut Vec<u8>) -> Option<Dtype> {
        let array = self.stored(spec)?;
        let view = ops::contiguous(&array.view(Dtype::Uint8).ok()?).ok()?;
        bytes.clear();
        bytes.extend_from_slice(view.as_slice::<u8>().ok()?);
        Some(array.dtype())
    }

    pub fn converted(&self, spec: &TensorSpec) -> Option<Array> {
        let array = self.stored(spec)?;
        if spec.float { array.astype(Dtype::Float32).ok() } else { Some(array) }
    }
}

/// Gives some ids of an embedding rows that are hard to multiply with.
fn special(rows: &mut [f32], width: usize) {
    let mut row = |id: u32, value: &dyn Fn(usize, f32) -> f32| {
        let row = &mut rows[id as usize * width..][..width];
        row.iter_mut().enumerate().for_each(|(i, v)| *v = value(i, *v));
    };
    row(ZEROS, &|_, _| 0.0);
    row(NOT_A_NUMBER, &|i, v| if i == 3 { f32::NAN } else { v });
    row(HUGE, &|_, v| 1e12 * v);
    row(TINY, &|_, v| 1e-12 * v);
    row(OUTLIERS, &|i, v| if i % 23 == 5 { 8.0 * v } else { v });
}
