use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::pool::{Pool, Tensor};
use crate::generate::Flow;

/// Most bytes of tensors in one file, mlx-lm's own limit; a larger tensor has a file to itself.
const LARGEST: u64 = 5 << 30;
/// Where the data of a file begins, a multiple of this: a cache line, so that mapped tensors are aligned.
const ALIGNMENT: usize = 64;

/// A file and the tensors in it.
pub(super) struct Shard {
    /// Its name.
    pub(super) name: String,
    tensors: Vec<Tensor>,
}

/// Deals tensors to files.
pub(super) fn shards(tensors: Vec<Tensor>) -> Vec<Shard> {
    let mut groups: Vec<(u64, Vec<Tensor>)> = Vec::new();
    for tensor in tensors {
        match groups.last_mut() {
            Some((bytes, group)) if *bytes + tensor.bytes <= LARGEST => {
                *bytes += tensor.bytes;
                group.push(tensor);
            }
            _ => groups.push((tensor.bytes, vec![tensor])),
        }
    }
    let count = groups.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    groups.into_iter().enumerate().map(|(i, (_, tensors))| Shard { name: name(i), tensors }).collect()
}

/// `model.safetensors.index.json`.
pub(super) fn index(shards: &[Shard], bytes: u64, parameters: u64) -> Json {
    let mut map = Map::new();
    for shard in shards {
        map.extend(shard.tensors.iter().map(|t| (t.name.clone(), json!(shard.name))));
    }
    json!({ "metadata": { "total_size": bytes, "total_parameters": parameters }, "weight_map": map })
}

impl Shard {
    /// Bytes of its tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// The length and the JSON, padded with blanks.
    fn header(&self) -> Vec<u8> {
        let mut entries = Map::new();
        entries.insert("__metadata__".to_owned(), json!({ "format": "mlx" }));
        let mut begin = 0;
        for tensor in &self.tensors {
            let end = begin + tensor.bytes;
            let entry = json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end] });
            entries.insert(tensor.name.clone(), entry);
            begin = end;
        }
        let mut text = Json::Object(entries).to_string().into_bytes();
        text.resize((text.len() + 8).next_multiple_of(ALIGNMENT) - 8, b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        header
    }

    /// Writes the file.
    pub(super) fn write(
        &self,
        path: &Path,
        pool: &Pool,
        progress: &mut dyn FnMut(u64) -> Flow,
    ) -> io::Result<Flow> {
        let mut file = BufWriter::new(File::create_new(path)?);
        file.write_all(&self.header())?;
        for tensor in &self.tensors {
            if pool.write(tensor, &mut file, progress)? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        file.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(Flow::Continue)
    }
}
