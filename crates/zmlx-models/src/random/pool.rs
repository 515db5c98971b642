use std::io::{self, Write};

use fastrand::Rng;
use half::bf16;
use zmlx_graph::weights::{Format, TensorSpec, Weight};

use crate::folder::Entry;
use crate::generate::Flow;

/// Standard deviation of random weights, as a model has them before it is trained.
const STD: f64 = 0.02;
/// That of convolution kernels, whose sums have a handful of terms.
const CONV_STD: f64 = 0.3;
/// Bytes of random bits that packed words are taken from.
const WORDS: usize = 16 << 20;
/// Numbers in each of the other pools.
const NUMBERS: usize = 1 << 20;
/// Most bytes that are taken from one place.
const CHUNK: usize = 1 << 20;

/// A tensor to be written.
pub(super) type Tensor = Entry<Content>;

/// Where the values of a tensor come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    fill: Fill,
    /// Module whose tensors are read from the same places, so that a bias belongs to its scale.
    module: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fill {
    Words,
    Scales(i32),
    Biases(i32),
    Weights,
    ConvKernel,
    Ones,
    Zeros,
}

/// The tensors that a weight is stored in.
pub(super) fn tensors(weight: &Weight) -> Vec<Tensor> {
    let fills = match (&weight.format, weight.shape.len(), weight.experts) {
        (Format::Quantized(q), ..) => vec![Fill::Words, Fill::Scales(q.bits), Fill::Biases(q.bits)],
        (Format::Dense, ..) if weight.bare || weight.offset != 0.0 => vec![Fill::Zeros],
        (Format::Dense, 1, _) => vec![Fill::Ones],
        (Format::Dense, 3, None) => vec![Fill::ConvKernel],
        (Format::Dense, ..) => vec![Fill::Weights],
    };
    let one = |(spec, fill): (TensorSpec, Fill)| {
        let (dtype, size) = match fill {
            Fill::Words => ("U32", 4),
            _ if weight.keep_f32 => ("F32", 4),
            _ => ("BF16", 2),
        };
        let count: u64 = spec.shape.iter().map(|&d| d as u64).product();
        let content = Content { fill, module: weight.path.clone() };
        Tensor { name: spec.name, dtype, shape: spec.shape, bytes: count * size, content }
    };
    weight.tensors().into_iter().zip(fills).map(one).collect()
}

/// What random values are copied from.
pub(super) struct Pool {
    seed: u64,
    words: Vec<u8>,
    weights: Vec<u8>,
    kernels: Vec<u8>,
    /// For each number of bits, scales and the biases that belong to them.
    scales: Vec<(i32, Vec<u8>, Vec<u8>)>,
    ones: Vec<u8>,
    zeros: Vec<u8>,
}

impl Pool {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut words = vec![0; WORDS];
        rng.fill(&mut words);
        // Uniform between -sqrt(3) and sqrt(3) standard deviations.
        let mut uniform = |std: f64| bytes((0..NUMBERS).map(|_| (rng.f64() - 0.5) * 12f64.sqrt() * std));
        let (weights, kernels) = (uniform(STD), uniform(CONV_STD));
        let scales = [2, 3, 4, 5, 6, 8].map(|bits| {
            let largest = f64::from((1 << bits) - 1);
            // Codes are uniform over 0..=largest, whose variance is ((largest + 1)^2 - 1) / 12.
            let scale = STD / (((largest + 1.0).powi(2) - 1.0) / 12.0).sqrt();
            let scales: Vec<f64> = (0..NUMBERS).map(|_| scale * (0.8 + 0.4 * rng.f64())).collect();
            // Codes are centred by what the scale is once it is stored.
            let biases = scales.iter().map(|&s| -bf16::from_f64(s).to_f64() * largest / 2.0);
            (bits, bytes(scales.iter().copied()), bytes(biases))
        });
        let ones = bytes(std::iter::repeat_n(1.0, NUMBERS));
        Self { seed, words, weights, kernels, scales: scales.into(), ones, zeros: vec![0; CHUNK] }
    }

    fn of(&self, fill: Fill) -> &[u8] {
        let pair = |bits: i32| self.scales.iter().find(|(b, ..)| *b == bits);
        match fill {
            Fill::Words => &self.words,
            Fill::Scales(bits) => pair(bits).map_or(&[], |(_, scales, _)| scales),
            Fill::Biases(bits) => pair(bits).map_or(&[], |(_, _, biases)| biases),
            Fill::Weights => &self.weights,
            Fill::ConvKernel => &self.kernels,
            Fill::Ones => &self.ones,
            Fill::Zeros => &self.zeros,
        }
    }

    /// Writes a tensor's data, and tells `progress` of the bytes.
    pub(super) fn write(
        &self,
        tensor: &Tensor,
        to: &mut dyn Write,
        progress: &mut dyn FnMut(u64) -> Flow,
    ) -> io::Result<Flow> {
        let pool = self.of(tensor.content.fill);
        let mut rng = Rng::with_seed(self.seed ^ hash(&tensor.content.module));
        let mut left = tensor.bytes;
        while left > 0 {
            let n = left.min(CHUNK as u64) as usize;
            let most = pool.len().checked_sub(n).ok_or(io::ErrorKind::InvalidInput)?;
            // Whole words and whole numbers.
            let start = rng.usize(0..=most) & !3;
            to.write_all(&pool[start..start + n])?;
            left -= n as u64;
            if progress(n as u64) == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::Continue)
    }
}

fn bytes(values: impl Iterator<Item = f64>) -> Vec<u8> {
    values.flat_map(|v| bf16::from_f64(v).to_le_bytes()).collect()
}

/// FNV-1a, the same on every machine.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
