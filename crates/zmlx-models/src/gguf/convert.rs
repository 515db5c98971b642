//! From GGUF's blocks to MLX's affine layout, row by row on all threads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use zmlx_mlx::Array;

use super::GgufError;
use super::header::{GROUP, GgufTensor, Kind};

/// Bytes of the file that a thread reads at a time: they stay in its cache.
const CHUNK: usize = 256 << 10;

/// A quantised tensor: `w = scale * code + bias` for each group of 32, rows in order. Its buffers serve one tensor after
/// another, since fresh memory costs more than what is done with it.
#[derive(Debug, Default)]
pub(super) struct Affine {
    /// Codes, little-endian.
    pub(super) packed: Vec<u32>,
    /// One a group.
    pub(super) scales: Vec<f16>,
    /// One a group.
    pub(super) biases: Vec<f16>,
}

/// A tensor of floats.
pub(super) enum Floats {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Floats {
    pub(super) fn into_array(self, shape: &[i32]) -> zmlx_mlx::Result<Array> {
        match self {
            Self::F32(data) => Array::from_vec(data, shape),
            Self::F16(data) => Array::from_vec(data, shape),
            Self::BF16(data) => Array::from_vec(data, shape),
        }
    }

    /// The numbers in float32.
    pub(super) fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(data) => data.clone(),
            Self::F16(data) => data.iter().map(|v| v.to_f32()).collect(),
            Self::BF16(data) => data.iter().map(|v| v.to_f32()).collect(),
        }
    }
}

/// How a tensor's rows lie in the file.
struct Rows {
    /// Bytes of a row.
    bytes: usize,
    /// Rows that are read together.
    unit: usize,
    /// Rows of a head whose rotary pairs lie side by side; they come apart here, first halves first.
    paired: bool,
}

impl Rows {
    /// `columns` are those of one row; with `heads` the rows belong to that many heads in pairs.
    fn new(tensor: &GgufTensor, rows: usize, columns: usize, heads: Option<i32>) -> Self {
        let (block, size) = tensor.kind.block();
        let bytes = columns / block * size;
        match heads {
            Some(heads) => Self { bytes, unit: (rows / heads.max(1) as usize).max(1), paired: true },
            None => Self { bytes, unit: (CHUNK / bytes.max(1)).clamp(1, rows.max(1)), paired: false },
        }
    }

    /// Where row `row` of a unit of `rows` is in the file's unit.
    fn source(&self, row: usize, rows: usize) -> usize {
        if !self.paired {
            return row;
        }
        let half = rows / 2;
        if row < half { 2 * row } else { 2 * (row - half) + 1 }
    }

    /// Reads the bytes of unit `index`.
    fn read(
        &self,
        file: &File,
        tensor: &GgufTensor,
        index: usize,
        rows: usize,
        bytes: &mut Vec<u8>,
    ) -> io::Result<()> {
        bytes.resize(rows * self.bytes, 0);
        let at = tensor.offset + index as u64 * self.unit as u64 * self.bytes as u64;
        file.read_exact_at(bytes, at)
    }
}

/// Rows and columns of a tensor; a vector whose elements are reordered is a column.
fn extent(tensor: &GgufTensor, heads: Option<i32>) -> (usize, usize) {
    let elements: usize = tensor.shape.iter().map(|&d| d as usize).product();
    let columns = match (tensor.shape.as_slice(), heads) {
        ([_], Some(_)) => 1,
        (shape, _) => shape.last().map_or(1, |&d| d as usize),
    };
    (elements / columns.max(1), columns)
}

/// Reads a quantised tensor.
pub(super) fn affine(
    path: &Path,
    file: &File,
    tensor: &GgufTensor,
    bits: i32,
    heads: Option<i32>,
    out: &mut Affine,
) -> Result<(), GgufError> {
    let (rows, columns) = extent(tensor, heads);
    let layout = Rows::new(tensor, rows, columns, heads);
    let groups = columns / GROUP;
    let words = columns * bits as usize / 32;
    out.packed.resize(rows * words, 0);
    out.scales.resize(rows * groups, f16::ZERO);
    out.biases.resize(rows * groups, f16::ZERO);
    let units = out.packed.par_chunks_mut(layout.unit * words);
    let units = units.zip(out.scales.par_chunks_mut(layout.unit * groups));
    let units = units.zip(out.biases.par_chunks_mut(layout.unit * groups)).enumerate();
    let fine = units
        .map_init(Vec::new, |bytes, (index, ((packed, scales), biases))| {
            let rows = scales.len() / groups;
            layout.read(file, tensor, index, rows, bytes)?;
            let mut fine = true;
            for row in 0..rows {
                let from = layout.source(row, rows) * layout.bytes;
                fine &= decode_row(
                    tensor.kind,
                    &bytes[from..from + layout.bytes],
                    &mut packed[row * words..(row + 1) * words],
                    &mut scales[row * groups..(row + 1) * groups],
                    &mut biases[row * groups..(row + 1) * groups],
                );
            }
            Ok(fine)
        })
        .try_reduce(|| true, |a, b| Ok(a & b));
    match fine {
        Ok(true) => Ok(()),
        Ok(false) => Err(GgufError::Scale { path: path.to_owned(), tensor: tensor.name.clone() }),
        Err(source) => Err(GgufError::Read { path: path.to_owned(), source }),
    }
}

/// Decodes a row's blocks; says whether every scale and bias is finite.
fn decode_row(kind: Kind, row: &[u8], packed: &mut [u32], scales: &mut [f16], biases: &mut [f16]) -> bool {
    match kind {
        // Codes 0 to 15 stand for -8 to 7.
        Kind::Q4_0 => decode_blocks(row, packed, scales, biases, |block: &[u8; 18], words: &mut [u32; 4]| {
            nibbles(&block[2..], words);
            let scale = half(block, 0);
            (scale, times_minus_power_of_two(scale, 3))
        }),
        Kind::Q4_1 => decode_blocks(row, packed, scales, biases, |block: &[u8; 20], words: &mut [u32; 4]| {
            nibbles(&block[4..], words);
            (half(block, 0), half(block, 2))
        }),
        // Codes are -128 to 127 there and 0 to 255 here: the same bits but the highest.
        _ => decode_blocks(row, packed, scales, biases, |block: &[u8; 34], words: &mut [u32; 8]| {
            for (word, four) in words.iter_mut().zip(block[2..].as_chunks::<4>().0) {
                *word = u32::from_le_bytes(*four) ^ 0x8080_8080;
            }
            let scale = half(block, 0);
            (scale, times_minus_power_of_two(scale, 7))
        }),
    }
}

fn decode_blocks<const BYTES: usize, const WORDS: usize>(
    row: &[u8],
    packed: &mut [u32],
    scales: &mut [f16],
    biases: &mut [f16],
    decode: impl Fn(&[u8; BYTES], &mut [u32; WORDS]) -> (f16, f16),
) -> bool {
    let mut fine = true;
    let blocks = row.as_chunks::<BYTES>().0.iter().zip(packed.as_chunks_mut::<WORDS>().0);
    for ((block, words), (scale, bias)) in blocks.zip(scales.iter_mut().zip(biases.iter_mut())) {
        (*scale, *bias) = decode(block, words);
        fine &= scale.is_finite() & bias.is_finite();
    }
    fine
}

fn half(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// `-2^power * x`, which is exact unless it overflows.
fn times_minus_power_of_two(x: f16, power: u16) -> f16 {
    let (bits, exponent) = (x.to_bits(), x.to_bits() >> 10 & 31);
    if exponent == 0 || exponent + power >= 31 {
        return f16::from_f32(-f32::from(1u16 << power) * x.to_f32());
    }
    f16::from_bits((bits + (power << 10)) ^ 0x8000)
}

/// 16 bytes hold elements 0 to 15 in their low halves and 16 to 31 in their high halves; here element `i` is bits
/// `4 i` to `4 i + 3`.
fn nibbles(bytes: &[u8], words: &mut [u32; 4]) {
    for (i, eight) in bytes.as_chunks::<8>().0.iter().enumerate().take(2) {
        let all = u64::from_le_bytes(*eight);
        words[i] = squeeze(all);
        words[i + 2] = squeeze(all >> 4);
    }
}

/// The low halves of eight bytes, side by side.
fn squeeze(bytes: u64) -> u32 {
    let x = bytes & 0x0f0f_0f0f_0f0f_0f0f;
    let x = (x | x >> 4) & 0x00ff_00ff_00ff_00ff;
    let x = (x | x >> 8) & 0x0000_ffff_0000_ffff;
    (x | x >> 16) as u32
}

/// Reads a tensor of floats.
pub(super) fn floats(
    path: &Path,
    file: &File,
    tensor: &GgufTensor,
    heads: Option<i32>,
) -> Result<Floats, GgufError> {
    let read = match tensor.kind {
        Kind::F16 => numbers(file, tensor, heads, |b: [u8; 2]| f16::from_le_bytes(b)).map(Floats::F16),
        Kind::BF16 => numbers(file, tensor, heads, |b: [u8; 2]| bf16::from_le_bytes(b)).map(Floats::BF16),
        _ => numbers(file, tensor, heads, |b: [u8; 4]| f32::from_le_bytes(b)).map(Floats::F32),
    };
    read.map_err(|source| GgufError::Read { path: path.to_owned(), source })
}

fn numbers<T: Copy + Default + Send, const N: usize>(
    file: &File,
    tensor: &GgufTensor,
    heads: Option<i32>,
    decode: impl Fn([u8; N]) -> T + Sync,
) -> io::Result<Vec<T>> {
    let (rows, columns) = extent(tensor, heads);
    let layout = Rows::new(tensor, rows, columns, heads);
    let mut out = vec![T::default(); rows * columns];
    out.par_chunks_mut(layout.unit * columns).enumerate().try_for_each_init(
        Vec::new,
        |bytes, (index, unit)| {
            let rows = unit.len() / columns;
            layout.read(file, tensor, index, rows, bytes)?;
            for (row, to) in unit.chunks_exact_mut(columns).enumerate() {
                let from = layout.source(row, rows) * layout.bytes;
                for (to, number) in to.iter_mut().zip(bytes[from..from + layout.bytes].as_chunks::<N>().0) {
                    *to = decode(*number);
                }
            }
            io::Result::Ok(())
        },
    )?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A tensor of random blocks in a file behind some other bytes, and the numbers that llama.cpp's formulas give.
    fn random(kind: Kind, shape: &[i32]) -> (tempfile::NamedTempFile, GgufTensor, Vec<f32>) {
        let mut rng = fastrand::Rng::with_seed(3);
        let blocks: usize = shape.iter().map(|&d| d as usize).product::<usize>() / GROUP;
        let (mut bytes, mut numbers) = (vec![7; 96], Vec::new());
        for _ in 0..blocks {
            let number = |rng: &mut fastrand::Rng| f16::from_f32(rng.f32() - 0.5);
            let (d, m) = (number(&mut rng), number(&mut rng));
            let mut codes = vec![0; kind.block().1 - if kind == Kind::Q4_1 { 4 } else { 2 }];
            rng.fill(&mut codes);
            bytes.extend(d.to_le_bytes());
            if kind == Kind::Q4_1 {
                bytes.extend(m.to_le_bytes());
            }
            bytes.extend(&codes);
            let (d, m) = (d.to_f32(), m.to_f32());
            numbers.extend((0..GROUP).map(|i| {
                let nibble = f32::from(if i < 16 { codes[i % 16] & 15 } else { codes[i % 16] >> 4 });
                match kind {
                    Kind::Q4_0 => (nibble - 8.0) * d,
                    Kind::Q4_1 => nibble * d + m,
                    _ => f32::from(codes[i % codes.len()] as i8) * d,
                }
            }));
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let bytes = bytes.len() as u64 - 96;
        let tensor = GgufTensor { name: "t".to_owned(), shape: shape.to_vec(), kind, offset: 96, bytes };
        (file, tensor, numbers)
    }

    /// `scale * code + bias` of every element.
    fn decoded(a: &Affine, bits: usize) -> Vec<f32> {
        let per_word = 32 / bits;
        let code = |i: usize| a.packed[i / per_word] >> (bits * (i % per_word)) & ((1 << bits) - 1);
        let number = |i: usize| a.scales[i / GROUP].to_f32() * code(i) as f32 + a.biases[i / GROUP].to_f32();
        (0..a.scales.len() * GROUP).map(number).collect()
    }

    #[test]
    fn blocks_keep_their_values_exactly() {
        let mut out = Affine::default();
        for (kind, shape) in [
            (Kind::Q4_0, &[3, 64][..]),
            (Kind::Q4_1, &[2, 5, 96]),
            (Kind::Q8_0, &[7, 32]),
            // More than is read at a time.
            (Kind::Q4_0, &[40_000, 64]),
            (Kind::Q8_0, &[64]),
        ] {
            let (file, tensor, numbers) = random(kind, shape);
            let bits = kind.bits().unwrap();
            affine(file.path(), file.as_file(), &tensor, bits, None, &mut out).unwrap();
            assert!(decoded(&out, bits as usize) == numbers, "{kind:?} {shape:?}");
        }
    }

    #[test]
    fn rotary_pairs_come_apart() {
        let (file, tensor, numbers) = random(Kind::Q4_1, &[12, 64]);
        let mut out = Affine::default();
        affine(file.path(), file.as_file(), &tensor, 4, Some(2), &mut out).unwrap();
        let rows: Vec<&[f32]> = numbers.chunks(64).collect();
        let order = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11];
        assert!(decoded(&out, 4) == order.map(|r| rows[r]).concat());
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let values: Vec<u8> = (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect();
        file.write_all(&values).unwrap();
        let tensor =
            GgufTensor { name: "b".to_owned(), shape: vec![8], kind: Kind::F32, offset: 0, bytes: 32 };
        let biases = floats(file.path(), file.as_file(), &tensor, Some(2)).unwrap().to_f32();
        assert_eq!(biases, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }

    #[test]
    fn products_with_powers_of_two_are_exact() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            for power in [3, 7] {
                let (got, want) = (
                    times_minus_power_of_two(x, power),
                    f16::from_f32(-x.to_f32() * 2f32.powi(power.into())),
                );
                assert!(
                    got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
                    "{x} * -2^{power}: {got}"
                );
            }
        }
    }

    #[test]
    fn scales_that_leave_float16_are_refused() {
        for (kind, scale) in [(Kind::Q4_0, 9000.0), (Kind::Q8_0, 600.0), (Kind::Q4_1, f32::INFINITY)] {
            let (_, tensor, _) = random(kind, &[1, 32]);
            let mut file = tempfile::NamedTempFile::new().unwrap();
            let mut bytes = vec![0; 96 + tensor.bytes as usize];
            bytes[96..98].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            file.write_all(&bytes).unwrap();
            let bits = kind.bits().unwrap();
            let mut out = Affine::default();
            let error = affine(file.path(), file.as_file(), &tensor, bits, None, &mut out).err().unwrap();
            assert!(error.to_string().contains("tensor t has a scale"), "{error}");
        }
    }
}
