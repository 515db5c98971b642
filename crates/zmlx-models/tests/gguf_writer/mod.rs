//! Writes GGUF files, from scratch and from model folders.
#![allow(dead_code)] // each test takes what it needs

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use serde_json::Value as Json;
use zmlx_mlx::{Array, Dtype, io, ops};

pub const F32: u32 = 0;
pub const Q4_1: u32 = 3;

/// A file in the making.
#[derive(Default, Clone)]
pub struct Writer {
    keys: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

impl Writer {
    pub fn raw(&mut self, key: &str, kind: u32, value: Vec<u8>) -> &mut Self {
        self.keys.retain(|(k, ..)| k != key);
        self.keys.push((key.to_owned(), kind, value));
        self
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.raw(key, 4, value.to_le_bytes().to_vec())
    }

    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.raw(key, 6, value.to_le_bytes().to_vec())
    }

    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.raw(key, 7, vec![value.into()])
    }

    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.raw(key, 8, text(value))
    }

    pub fn texts(&mut self, key: &str, values: &[String]) -> &mut Self {
        let mut bytes = [8u32.to_le_bytes().to_vec(), (values.len() as u64).to_le_bytes().to_vec()].concat();
        values.iter().for_each(|v| bytes.extend(text(v)));
        self.raw(key, 9, bytes)
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let mut bytes = [5u32.to_le_bytes().to_vec(), (values.len() as u64).to_le_bytes().to_vec()].concat();
        values.iter().for_each(|v| bytes.extend(v.to_le_bytes()));
        self.raw(key, 9, bytes)
    }

    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.keys.retain(|(k, ..)| k != key);
        self
    }

    /// `shape` is outermost first.
    pub fn tensor(&mut self, name: &str, shape: &[i32], kind: u32, data: Vec<u8>) -> &mut Self {
        self.tensors.push((name.to_owned(), shape.iter().map(|&d| d as u64).collect(), kind, data));
        self
    }

    pub fn floats(&mut self, name: &str, shape: &[i32], values: &[f32]) -> &mut Self {
        self.tensor(name, shape, F32, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// The tensors, to be spoilt.
    pub fn tensors(&mut self) -> &mut Vec<(String, Vec<u64>, u32, Vec<u8>)> {
        &mut self.tensors
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut offset = 0u64;
        for (name, shape, kind, data) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + data.len() as u64).next_multiple_of(32);
        }
        for (_, _, _, data) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(data);
        }
        out
    }
}

/// A model folder with 4-bit weights in groups of 64, as a GGUF file of `architecture`: two blocks of Q4_1 for each group,
/// all else float32.
pub fn from_folder(dir: &Path, architecture: &str, names: &dyn Fn(&str) -> String) -> Writer {
    let arrays: BTreeMap<String, Array> =
        io::load_safetensors(dir.join("model.safetensors")).unwrap().into_iter().collect();
    let config: Json = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let mut w = Writer::default();
    w.text("general.architecture", architecture);
    for (name, array) in &arrays {
        if name.ends_with(".scales") || name.ends_with(".biases") {
            continue;
        }
        // llama.cpp keeps rotary pairs side by side in these.
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") if architecture == "llama" => config["num_attention_heads"].as_i64(),
            Some("k_proj") if architecture == "llama" => config["num_key_value_heads"].as_i64(),
            _ => None,
        };
        let module = name.trim_end_matches(".weight");
        let mut shape = array.shape().to_vec();
        let Some(scales) = arrays.get(&format!("{module}.scales")) else {
            if name.ends_with("conv.conv.weight") {
                shape.pop();
            }
            w.floats(&names(name), &shape, &floats(array));
            continue;
        };
        let biases = &arrays[&format!("{module}.biases")];
        let last = shape.len() - 1;
        let bits = array.shape()[last] * 32 / (scales.shape()[last] * 64);
        shape[last] = scales.shape()[last] * 64;
        if bits == 4 {
            let blocks = q4_1(&array.to_vec::<u32>().unwrap(), &floats(scales), &floats(biases));
            let rows = blocks.chunks(shape[last] as usize / 32 * 20).map(<[u8]>::to_vec).collect();
            w.tensor(&names(name), &shape, Q4_1, paired(rows, heads).concat());
        } else {
            let dense =
                ops::dequantize(array, scales, Some(biases), Some(64), Some(bits), "affine", None, None);
            w.floats(&names(name), &shape, &floats(&dense.unwrap()));
        }
    }
    w
}

fn floats(array: &Array) -> Vec<f32> {
    array.astype(Dtype::Float32).unwrap().to_vec().unwrap()
}

/// Rows of heads whose halves are apart, brought together pair by pair.
fn paired(rows: Vec<Vec<u8>>, heads: Option<i64>) -> Vec<Vec<u8>> {
    let Some(heads) = heads else { return rows };
    let width = rows.len() / heads as usize;
    let from = |i: usize| {
        let (head, at) = (i / width, i % width);
        head * width + at / 2 + (at % 2) * (width / 2)
    };
    (0..rows.len()).map(|i| rows[from(i)].clone()).collect()
}

/// MLX's words of 4 bits, scales and biases of groups of 64, as blocks of 32.
fn q4_1(words: &[u32], scales: &[f32], biases: &[f32]) -> Vec<u8> {
    let half = |v: f32| {
        let half = f16::from_f32(v);
        assert_eq!(half.to_f32(), v, "float16 holds the checkpoint's scales exactly");
        half.to_le_bytes()
    };
    let mut out = Vec::new();
    for (block, words) in words.chunks(4).enumerate() {
        out.extend(half(scales[block / 2]));
        out.extend(half(biases[block / 2]));
        let code = |i: usize| (words[i / 8] >> (4 * (i % 8)) & 15) as u8;
        out.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
    }
    out
}
