//! Reading a model's weights, in the form that its graph wants them.

use std::collections::HashMap;

use zmlx_graph::native::write_bytes;
use zmlx_graph::weights::{TensorSpec, Weight};
use zmlx_mlx::{Array, Dtype};

use crate::error::LoadError;
use crate::families::Built;
use crate::load::LoadProgress;
use crate::source::{Reader, Source};
use crate::tensors::assemble;

/// Bytes of tensors that are read and converted at a time.
const BATCH_BYTES: usize = 256 << 20;

/// Gives out the tensors of a graph's weights.
pub(crate) struct WeightReader<'a> {
    built: &'a Built,
    files: Reader<'a>,
    /// The weight that is held in another form than it is stored in, by the names of its tensors.
    recoded: HashMap<String, &'a Weight>,
    /// Tensors that came with one that was asked for.
    ready: HashMap<String, Array>,
    sizes: HashMap<String, u64>,
    /// Bytes that were taken from the files.
    pub(crate) done_bytes: u64,
}

impl<'a> WeightReader<'a> {
    /// Opens the files.
    pub(crate) fn open(built: &'a Built, source: &'a Source) -> Result<Self, LoadError> {
        let changed = built.graph.weights.iter().filter(|w| built.recoded.stored.contains_key(&w.path));
        let recoded = changed.flat_map(|w| w.tensors().into_iter().map(move |t| (t.name, w))).collect();
        let (files, sizes) = (source.reader()?, source.bytes());
        Ok(Self { built, files, recoded, ready: HashMap::new(), sizes, done_bytes: 0 })
    }

    /// A tensor, lazy where it can be; each can be taken once.
    pub(crate) fn array(&mut self, spec: &TensorSpec) -> Result<Array, LoadError> {
        if let Some(array) = self.ready.remove(&spec.name) {
            return Ok(array);
        }
        let Some(&wanted) = self.recoded.get(&spec.name) else { return self.stored(&spec.name) };
        let stored = &self.built.recoded.stored[&wanted.path];
        let arrays: Result<Vec<Array>, LoadError> =
            stored.tensors().iter().map(|t| self.stored(&t.name)).collect();
        let arrays = self.built.recoded.convert(stored, wanted, &arrays?)?;
        // At once, so that only one weight at a time is in memory as it is stored.
        zmlx_mlx::eval(&arrays.iter().collect::<Vec<_>>())?;
        let names = wanted.tensors().into_iter().map(|t| t.name);
        self.ready.extend(names.zip(arrays));
        self.ready.remove(&spec.name).ok_or_else(|| missing(&spec.name))
    }

    /// The bytes of a tensor: straight from the file where that is all there is to it.
    pub(crate) fn bytes(&mut self, spec: &TensorSpec, buffer: &mut Vec<u8>) -> Result<Dtype, LoadError> {
        if !self.recoded.contains_key(&spec.name)
            && let Some(tensor) = self.built.tensors.get(&spec.name)
            && let (true, [source]) = (tensor.is_plain(), tensor.sources.as_slice())
            && let Some(dtype) = self.files.bytes(source, buffer)?
        {
            self.done_bytes += buffer.len() as u64;
            return Ok(dtype);
        }
        Ok(write_bytes(&self.array(spec)?, buffer)?)
    }

    /// A tensor as it is stored.
    fn stored(&mut self, name: &str) -> Result<Array, LoadError> {
        let tensor = self.built.tensors.get(name).ok_or_else(|| missing(name))?;
        let readers = tensor.readers();
        let mut parts = Vec::with_capacity(tensor.sources.len());
        for source in &tensor.sources {
            parts.push(self.files.take(source, readers)?.ok_or_else(|| missing(source))?);
            self.done_bytes += self.sizes.get(source).copied().unwrap_or(0) / readers.max(1) as u64;
        }
        Ok(assemble(tensor, &parts)?)
    }
}

fn missing(name: &str) -> LoadError {
    LoadError::MissingTensors { count: 1, names: name.to_owned() }
}

/// Reads every tensor that the graph needs, but for weights that are held already, converted to the dtype it runs in.
pub(crate) fn read_weights(
    built: &Built,
    source: &Source,
    dtype: Option<Dtype>,
    held: &[bool],
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<HashMap<String, Array>, LoadError> {
    let mut reader = WeightReader::open(built, source)?;
    let total_bytes = source.file_bytes();
    progress(LoadProgress { done_bytes: 0, total_bytes });
    let mut arrays: HashMap<String, Array> = HashMap::new();
    let mut batch: Vec<Array> = Vec::new();
    let mut batch_bytes = 0;
    let lacking = built.graph.weights.iter().zip(held).filter(|(_, held)| !**held);
    for (weight, _) in lacking {
        for spec in weight.tensors() {
            let array = reader.array(&spec)?;
            batch_bytes += array.nbytes();
            let array = match dtype {
                Some(dtype) if spec.float && !weight.keep_f32 => array.astype(dtype)?,
                _ if weight.keep_f32 => array.astype(Dtype::Float32)?,
                _ => array,
            };
            batch.push(array.clone());
            arrays.insert(spec.name, array);
            if batch_bytes >= BATCH_BYTES {
                flush(&mut batch)?;
                batch_bytes = 0;
                progress(LoadProgress { done_bytes: reader.done_bytes.min(total_bytes), total_bytes });
            }
        }
    }
    flush(&mut batch)?;
    progress(LoadProgress { done_bytes: total_bytes, total_bytes });
    Ok(arrays)
}

fn flush(batch: &mut Vec<Array>) -> Result<(), LoadError> {
    zmlx_mlx::eval(&batch.iter().collect::<Vec<_>>())?;
    batch.clear();
    Ok(())
}
