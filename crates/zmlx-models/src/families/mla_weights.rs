//! Published layouts of weights of families with latent attention.
//!
//! Arithmetic and rounding are those of `sanitize` in `mlx_lm.models.deepseek_v3` 0.32.2.

use zmlx_mlx::stream::{Device, with_device};
use zmlx_mlx::{Array, Dtype, ops};

use crate::error::LoadError;
use crate::recipe::Recipe;
use crate::tensors::{Tensor, Tensors, assemble};

/// Rows and columns that share a scale in checkpoints of 8-bit floats.
const BLOCK: i32 = 128;

/// Makes bfloat16 of 8-bit floats with a scale a block, and MLX's affine layout of 4-bit words as compressed-tensors packs
/// them.
pub(super) fn translate(tensors: &mut Tensors) -> Result<(), LoadError> {
    let names: Vec<String> = tensors.names().map(str::to_owned).collect();
    for name in names {
        if let Some(base) = name.strip_suffix(".weight_scale_inv") {
            unpack_fp8(tensors, base)?;
            tensors.set_translated();
        } else if let Some(base) = name.strip_suffix(".weight_packed") {
            unpack_int4(tensors, base)?;
            tensors.set_translated();
        }
    }
    Ok(())
}

fn need(tensors: &mut Tensors, name: &str) -> Result<Tensor, LoadError> {
    tensors.take(name).ok_or_else(|| LoadError::MissingTensors { count: 1, names: name.to_owned() })
}

/// `weight` times its block's scale, rounded to bfloat16.
fn unpack_fp8(tensors: &mut Tensors, base: &str) -> Result<(), LoadError> {
    let name = format!("{base}.weight");
    let (weight, scales) = (need(tensors, &name)?, need(tensors, &format!("{base}.weight_scale_inv"))?);
    // MLX has no dtype for them and writes bytes.
    if !matches!(weight.dtype.as_str(), "F8_E4M3" | "U8") {
        let (expected, found) = ("8-bit floats (F8_E4M3), since it has a scale", weight.dtype);
        return Err(LoadError::Dtype { name, expected, found });
    }
    let blocks: Vec<i32> = weight.shape.iter().map(|&d| d / BLOCK + i32::from(d % BLOCK != 0)).collect();
    if weight.shape.len() != 2 || scales.shape != blocks {
        let name = format!("{name}_scale_inv");
        return Err(LoadError::Shape { name, expected: blocks, found: scales.shape });
    }
    let (rows, columns) = (weight.shape[0], weight.shape[1]);
    let recipe = Recipe::new("bfloat16 of 8-bit floats", 1, move |parts| {
        let [weight, scales] = two(parts)?;
        let weight = weight.from_fp8(Dtype::Bfloat16)?;
        let (more_rows, more_columns) = ((-rows).rem_euclid(BLOCK), (-columns).rem_euclid(BLOCK));
        let (down, across) = ((rows + more_rows) / BLOCK, (columns + more_columns) / BLOCK);
        let zero = Array::scalar_as(0.0, Dtype::Bfloat16)?;
        let padded = weight.pad(&[0, 1], &[0, 0], &[more_rows, more_columns], &zero, "constant")?;
        let blocks = padded.reshape(&[down, BLOCK, across, BLOCK])?;
        let scaled = blocks.multiply(&scales.expand_dims(&[1, 3])?)?;
        let whole = scaled.reshape(&[down * BLOCK, across * BLOCK])?;
        whole.slice_axis(0, 0, rows)?.slice_axis(1, 0, columns)?.astype(Dtype::Bfloat16)
    });
    let sources = [weight.sources, scales.sources].concat();
    tensors.insert(name, Tensor::made(sources, Some(recipe), weight.shape, "BF16".to_owned()));
    Ok(())
}

/// 4-bit numbers with an offset of 8: `scale * q - 8 * scale`.
fn unpack_int4(tensors: &mut Tensors, base: &str) -> Result<(), LoadError> {
    let packed = need(tensors, &format!("{base}.weight_packed"))?;
    let scales = need(tensors, &format!("{base}.weight_scale"))?;
    tensors.take(&format!("{base}.weight_shape"));
    if packed.dtype != "I32" {
        let (name, expected, found) = (format!("{base}.weight_packed"), "packed int32", packed.dtype);
        return Err(LoadError::Dtype { name, expected, found });
    }
    let words = Recipe::new("words", 1, |parts| one(parts)?.view(Dtype::Uint32));
    let words = Tensor::made(packed.sources, Some(words), packed.shape, "U32".to_owned());
    tensors.insert(format!("{base}.weight"), words);
    let of_scales = |recipe: Recipe| {
        Tensor::made(scales.sources.clone(), Some(recipe), scales.shape.clone(), scales.dtype.clone())
    };
    let same = Recipe::new("scales", 2, |parts| one(parts).cloned());
    let biases = Recipe::new("biases", 2, |parts| one(parts)?.multiply_scalar(-8.0));
    tensors.insert(format!("{base}.scales"), of_scales(same));
    tensors.insert(format!("{base}.biases"), of_scales(biases));
    Ok(())
}

fn one(parts: &[Array]) -> zmlx_mlx::Result<&Array> {
    match parts {
        [one] => Ok(one),
        _ => Err(zmlx_mlx::Error::Argument(format!("{} arrays in place of one", parts.len()))),
    }
}

fn two(parts: &[Array]) -> zmlx_mlx::Result<[&Array; 2]> {
    match parts {
        [a, b] => Ok([a, b]),
        _ => Err(zmlx_mlx::Error::Argument(format!("{} arrays in place of two", parts.len()))),
    }
}

/// Sizes of the product `kv_b_proj`, whose rows are, head by head, those that make keys and those that make values.
#[derive(Debug, Clone, Copy)]
pub(super) struct SplitLatent {
    pub(super) heads: i32,
    /// Rows of a head that make the part of keys without a rotary embedding.
    pub(super) nope: i32,
    /// Rows of a head that make values.
    pub(super) value: i32,
    /// Columns.
    pub(super) kv_rank: i32,
}

/// How `kv_b_proj` is quantised.
#[derive(Debug, Clone, Copy)]
struct Packing {
    bits: i32,
    group_size: i32,
}

impl SplitLatent {
    /// Makes `embed_q` and `unembed_out` of `kv_b_proj`, if that is there: keys' rows transposed, so that they bring queries
    /// to the latents' space. A quantised one is unpacked, cut and quantised again as it was.
    pub(super) fn apply(self, tensors: &mut Tensors, path: &str) -> Result<(), LoadError> {
        let base = format!("{path}.kv_b_proj");
        let Some(weight) = tensors.take(&format!("{base}.weight")) else { return Ok(()) };
        let rows = self.heads * (self.nope + self.value);
        let fits = |shape: &[i32], columns: i32| match shape == [rows, columns] {
            true => Ok(()),
            false => {
                let (name, expected) = (format!("{base}.weight"), vec![rows, columns]);
                Err(LoadError::Shape { name, expected, found: shape.to_vec() })
            }
        };
        let Some(scales) = tensors.take(&format!("{base}.scales")) else {
            fits(&weight.shape, self.kv_rank)?;
            for keys in [true, false] {
                let (source, (name, shape)) = (weight.clone(), self.part(path, keys));
                let recipe = Recipe::new("a part of kv_b_proj", 2, move |parts| {
                    self.cut(&assemble(&source, parts)?, keys)
                });
                let (sources, dtype) = (weight.sources.clone(), weight.dtype.clone());
                tensors.insert(
                    format!("{name}.weight"),
                    Tensor::made(sources, Some(recipe), shape.into(), dtype),
                );
            }
            return Ok(());
        };
        let biases = need(tensors, &format!("{base}.biases"))?;
        let (words, groups) = (weight.shape.last().copied(), scales.shape.last().copied());
        let packing = self.packing(&base, words.unwrap_or(0), groups.unwrap_or(0))?;
        fits(&weight.shape, self.kv_rank * packing.bits / 32)?;
        let stored = [weight, scales, biases];
        for keys in [true, false] {
            self.requantise(tensors, path, &stored, packing, keys)?;
        }
        Ok(())
    }

    /// As mlx-lm infers it from widths.
    fn packing(self, base: &str, words: i32, groups: i32) -> Result<Packing, LoadError> {
        let fail = || LoadError::Quantization {
            path: base.to_owned(),
            message: format!("{groups} groups and {words} words a row do not fit {} columns", self.kv_rank),
        };
        if groups < 1 || self.kv_rank % groups != 0 {
            return Err(fail());
        }
        let bits = i32::try_from(i64::from(words) * 32 / i64::from(self.kv_rank)).map_err(|_| fail())?;
        if bits * self.kv_rank != words * 32 || !matches!(bits, 1..=6 | 8) {
            return Err(fail());
        }
        let packing = Packing { bits, group_size: self.kv_rank / groups };
        for (name, width) in [("qk_nope_head_dim", self.nope), ("kv_lora_rank", self.kv_rank)] {
            if !matches!(packing.group_size, 32 | 64 | 128) || width % packing.group_size != 0 {
                let message = format!(
                    "groups of {} do not fit the {width} columns of {name} that it is quantised again in",
                    packing.group_size
                );
                return Err(LoadError::Quantization { path: base.to_owned(), message });
            }
        }
        Ok(packing)
    }

    fn requantise(
        self,
        tensors: &mut Tensors,
        path: &str,
        stored: &[Tensor; 3],
        packing: Packing,
        keys: bool,
    ) -> Result<(), LoadError> {
        let Packing { bits, group_size } = packing;
        let (name, [heads, rows, columns]) = self.part(path, keys);
        let sources: Vec<String> = stored.iter().flat_map(|t| t.sources.clone()).collect();
        let widths = [columns / 32 * bits, columns / group_size, columns / group_size];
        for (index, (part, width)) in ["weight", "scales", "biases"].into_iter().zip(widths).enumerate() {
            let recipe = Recipe::new("a part of kv_b_proj, quantised again", 6, move |parts| {
                let [packed, scales, biases] = parts else {
                    return Err(zmlx_mlx::Error::Argument(format!(
                        "{} arrays in place of three",
                        parts.len()
                    )));
                };
                let (bits, group) = (Some(bits), Some(group_size));
                // GPUs round scales in another way, and another scale gives other codes.
                let made = with_device(Device::Cpu, || {
                    let whole =
                        ops::dequantize(packed, scales, Some(biases), group, bits, "affine", None, None)?;
                    ops::quantize(&self.cut(&whole, keys)?, group, bits, "affine", None)
                })?;
                made.get(index).cloned().ok_or_else(|| zmlx_mlx::Error::Argument("no such part".to_owned()))
            });
            let dtype = stored[index].dtype.clone();
            let tensor = Tensor::made(sources.clone(), Some(recipe), vec![heads, rows, width], dtype);
            tensors.insert(format!("{name}.{part}"), tensor);
        }
        Ok(())
    }

    /// Path and shape of the matrices that make keys, or values.
    fn part(self, path: &str, keys: bool) -> (String, [i32; 3]) {
        match keys {
            true => (format!("{path}.embed_q"), [self.heads, self.kv_rank, self.nope]),
            false => (format!("{path}.unembed_out"), [self.heads, self.value, self.kv_rank]),
        }
    }

    fn cut(self, whole: &Array, keys: bool) -> zmlx_mlx::Result<Array> {
        let heads = whole.reshape(&[self.heads, self.nope + self.value, -1])?;
        match keys {
            true => heads.slice_axis(1, 0, self.nope)?.swapaxes(-1, -2)?.contiguous(),
            false => heads.slice_axis(1, self.nope, self.nope + self.value)?.contiguous(),
        }
    }
}
