//! Which tensor of a checkpoint serves which weight of a graph, found out from headers alone.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde_json::Value;
use zmlx_graph::Graph;
use zmlx_graph::weights::{Format, Quantization, TensorSpec};
use zmlx_mlx::{Array, Dtype, ops};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::recipe::Recipe;

/// How many names an error lists.
const NAMED: usize = 5;

/// A tensor under the name that the graph knows it by.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its names in the checkpoint: one, or one an expert that are stacked.
    pub sources: Vec<String>,
    /// Permutation of its axes on loading.
    pub transpose: Option<Vec<i32>>,
    /// Whether its sources are bytes `[..., groups, n]` that are to be words `[..., groups * n / 4]`.
    pub words: bool,
    /// The part of its sources that it is, if they are shared.
    pub part: Option<Part>,
    /// Added to each element on loading, in the dtype that it is stored in.
    pub offset: Option<f64>,
    /// How it is computed from its sources, if it is; the fields above then say nothing.
    pub recipe: Option<Recipe>,
    /// Shape, after stacking and permuting.
    pub shape: Vec<i32>,
    /// Dtype as the header names it.
    pub dtype: String,
}

/// A part of an array that several tensors share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The axis that is cut.
    pub axis: i32,
    /// Where the part begins on it.
    pub start: i32,
    /// Where it ends.
    pub end: i32,
    /// From one element to the next.
    pub step: i32,
    /// How many parts the array has.
    pub of: usize,
}

impl Tensor {
    /// A tensor as a file has it.
    pub(crate) fn stored(name: &str, shape: Vec<i32>, dtype: String) -> Self {
        Self::made(vec![name.to_owned()], None, shape, dtype)
    }

    /// A tensor that a recipe makes of its sources.
    pub(crate) fn made(sources: Vec<String>, recipe: Option<Recipe>, shape: Vec<i32>, dtype: String) -> Self {
        let (transpose, words, part, offset) = (None, false, None, None);
        Self { sources, transpose, words, part, offset, recipe, shape, dtype }
    }

    /// Whether it is the bytes of its source and nothing else.
    pub(crate) fn is_plain(&self) -> bool {
        let cut = self.transpose.is_some() || self.part.is_some();
        let changed = cut || self.words || self.offset.is_some() || self.recipe.is_some();
        self.sources.len() == 1 && !changed
    }

    /// How many tensors are made of its sources.
    pub(crate) fn readers(&self) -> usize {
        self.recipe.as_ref().map_or_else(|| self.part.map_or(1, |part| part.of), Recipe::readers)
    }
}

/// The tensors of a checkpoint by the names that a graph uses.
#[derive(Debug, Clone, Default)]
pub struct Tensors {
    by_name: BTreeMap<String, Tensor>,
    /// Whether a foreign way of quantising was translated, so that the configuration's word for it counts no more.
    translated: bool,
}

impl Tensors {
    /// The tensors as the checkpoint has them.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        let mut by_name = BTreeMap::new();
        for (name, info) in &checkpoint.tensors {
            let shape = info.shape.iter().map(|&d| i32::try_from(d)).collect::<Result<Vec<_>, _>>();
            let shape = shape.map_err(|_| LoadError::Dtype {
                name: name.clone(),
                expected: "dimensions below 2^31",
                found: format!("of shape {:?}", info.shape),
            })?;
            by_name.insert(name.clone(), Tensor::stored(name, shape, info.dtype.clone()));
        }
        Ok(Self { by_name, translated: false })
    }

    /// Renames tensors; names for which `new_name` gives `None` stay.
    pub fn rename(&mut self, new_name: impl Fn(&str) -> Option<String>) {
        let old = std::mem::take(&mut self.by_name);
        self.by_name = old.into_iter().map(|(n, t)| (new_name(&n).unwrap_or(n), t)).collect();
    }

    /// Renames one tensor, if it is there.
    pub fn rename_one(&mut self, old: &str, new: &str) {
        if let Some(tensor) = self.by_name.remove(old) {
            self.by_name.insert(new.to_owned(), tensor);
        }
    }

    /// The tensors of another kind of file.
    pub(crate) fn from_list(tensors: impl Iterator<Item = (String, Tensor)>) -> Self {
        Self { by_name: tensors.collect(), translated: false }
    }

    /// Leaves out tensors that the graph has no use for.
    pub fn remove(&mut self, unused: impl Fn(&str) -> bool) {
        self.by_name.retain(|name, _| !unused(name));
    }

    /// Permutes the axes of a tensor if `when` holds for its shape.
    pub fn transpose(&mut self, suffix: &str, axes: &[i32], when: impl Fn(&[i32]) -> bool) {
        for (_, tensor) in self.by_name.iter_mut().filter(|(name, _)| name.ends_with(suffix)) {
            if tensor.shape.len() == axes.len() && when(&tensor.shape) {
                tensor.shape = axes.iter().map(|&a| tensor.shape[a as usize]).collect();
                tensor.transpose = Some(axes.to_vec());
            }
        }
    }

    /// Makes one tensor `stacked` of those that `part` names for each expert, if the first of them is there.
    pub fn stack(
        &mut self,
        stacked: &str,
        experts: i32,
        part: impl Fn(i32) -> String,
    ) -> Result<(), LoadError> {
        if !self.by_name.contains_key(&part(0)) {
            return Ok(());
        }
        let mut parts = Vec::new();
        for expert in 0..experts {
            let name = part(expert);
            let tensor = self.by_name.remove(&name);
            parts.push(tensor.ok_or(LoadError::MissingTensors { count: 1, names: name })?);
        }
        let first = parts[0].clone();
        if let Some(odd) = parts.iter().find(|p| p.shape != first.shape || p.dtype != first.dtype) {
            let (name, expected, found) = (odd.sources.join(", "), first.shape, odd.shape.clone());
            return Err(LoadError::Shape { name, expected, found });
        }
        let mut shape = first.shape;
        shape.insert(0, experts);
        let sources = parts.iter().flat_map(|p| p.sources.clone()).collect();
        let tensor = match parts.iter().all(Tensor::is_plain) {
            true => Tensor { sources, shape, ..first },
            false => Tensor::made(sources, Some(Recipe::stacked(parts)), shape, first.dtype),
        };
        self.by_name.insert(stacked.to_owned(), tensor);
        Ok(())
    }

    /// Makes of the tensor `name`, if it is there, the tensors `parts`: equal pieces of `axis` (counted from the end if
    /// negative), in this order.
    ///
    /// # Errors
    /// [`LoadError::Dtype`], if it has no such axis or that cannot be cut so.
    pub fn split(&mut self, name: &str, axis: i32, parts: &[&str]) -> Result<(), LoadError> {
        self.cut(name, axis, parts, |part, parts, size| (part * size / parts, (part + 1) * size / parts, 1))
    }

    /// As [`Self::split`], but the parts take turns on the axis.
    ///
    /// # Errors
    /// As [`Self::split`].
    pub fn split_in_turns(&mut self, name: &str, axis: i32, parts: &[&str]) -> Result<(), LoadError> {
        self.cut(name, axis, parts, |part, parts, size| (part, size, parts))
    }

    /// `range` says of a part, how many parts there are and the size of the axis: where it begins and ends, and its step.
    fn cut(
        &mut self,
        name: &str,
        axis: i32,
        parts: &[&str],
        range: impl Fn(i32, i32, i32) -> (i32, i32, i32),
    ) -> Result<(), LoadError> {
        let Some(whole) = self.by_name.remove(name) else { return Ok(()) };
        let count = parts.len() as i32;
        let at = if axis < 0 { axis + whole.shape.len() as i32 } else { axis };
        let size = usize::try_from(at).ok().and_then(|at| whole.shape.get(at)).copied().unwrap_or(0);
        if size < count || size % count.max(1) != 0 || whole.part.is_some() {
            return Err(LoadError::Dtype {
                name: name.to_owned(),
                expected: "an axis that can be cut into equal parts",
                found: format!("of shape {:?}, to be cut in {count} along axis {axis}", whole.shape),
            });
        }
        for (i, new) in (0..count).zip(parts) {
            let (start, end, step) = range(i, count, size);
            let mut shape = whole.shape.clone();
            shape[at as usize] = size / count;
            let part = Some(Part { axis: at, start, end, step, of: parts.len() });
            self.by_name.insert((*new).to_owned(), Tensor { part, shape, ..whole.clone() });
        }
        Ok(())
    }

    /// Makes of bytes `[..., groups, n]` packed words `[..., groups * n / 4]`, under a new name. A tensor that is not there
    /// or no such bytes stays as it is.
    pub fn pack(&mut self, name: &str, packed: &str) {
        let fits = |t: &Tensor| {
            let bytes = t.shape.last().is_some_and(|n| n % 4 == 0);
            t.dtype == "U8" && t.shape.len() > 2 && bytes && t.is_plain()
        };
        if !self.by_name.get(name).is_some_and(fits) {
            return;
        }
        if let Some(mut tensor) = self.by_name.remove(name) {
            let bytes = tensor.shape.pop().unwrap_or(0);
            if let Some(groups) = tensor.shape.last_mut() {
                *groups = groups.saturating_mul(bytes / 4);
            }
            (tensor.words, tensor.dtype) = (true, "U32".to_owned());
            self.by_name.insert(packed.to_owned(), tensor);
        }
    }

    /// Adds `value` to the vectors whose names `which` picks.
    pub fn offset(&mut self, value: f64, which: impl Fn(&str) -> bool) {
        for (_, tensor) in self.by_name.iter_mut().filter(|(name, t)| t.shape.len() == 1 && which(name)) {
            tensor.offset = Some(value + tensor.offset.unwrap_or(0.0));
        }
    }

    /// Puts a tensor in, or in the place of one of that name.
    pub(crate) fn insert(&mut self, name: String, tensor: Tensor) {
        self.by_name.insert(name, tensor);
    }

    /// Takes a tensor out.
    pub(crate) fn take(&mut self, name: &str) -> Option<Tensor> {
        self.by_name.remove(name)
    }

    /// Says that a foreign way of quantising was translated.
    pub(crate) fn set_translated(&mut self) {
        self.translated = true;
    }

    /// Whether there are none, as where a graph is made from a configuration alone.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// A tensor by its graph name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name)
    }

    /// Checks that the graph's weights are all there with the right shapes and dtypes, and that nothing is left over.
    pub fn check(&self, graph: &Graph) -> Result<(), LoadError> {
        let specs: Vec<TensorSpec> = graph.weights.iter().flat_map(|w| w.tensors()).collect();
        let missing: Vec<&str> =
            specs.iter().map(|s| s.name.as_str()).filter(|n| !self.by_name.contains_key(*n)).collect();
        if !missing.is_empty() {
            return Err(LoadError::MissingTensors { count: missing.len(), names: list(&missing) });
        }
        let wanted: HashMap<&str, &TensorSpec> = specs.iter().map(|s| (s.name.as_str(), s)).collect();
        let extra: Vec<&str> =
            self.by_name.keys().map(String::as_str).filter(|n| !wanted.contains_key(n)).collect();
        if !extra.is_empty() {
            return Err(LoadError::ExtraTensors { count: extra.len(), names: list(&extra) });
        }
        for spec in &specs {
            let Some(tensor) = self.by_name.get(&spec.name) else { continue };
            if tensor.shape != spec.shape {
                return Err(LoadError::Shape {
                    name: spec.name.clone(),
                    expected: spec.shape.clone(),
                    found: tensor.shape.clone(),
                });
            }
            let float = matches!(tensor.dtype.as_str(), "F32" | "F16" | "BF16");
            let integer = matches!(tensor.dtype.as_str(), "U32" | "U8");
            if if spec.float { !float } else { !integer } {
                let expected =
                    if spec.float { "float32, float16 or bfloat16" } else { "packed uint32 or uint8" };
                return Err(LoadError::Dtype {
                    name: spec.name.clone(),
                    expected,
                    found: tensor.dtype.clone(),
                });
            }
        }
        Ok(())
    }

    /// How the matrix at `path` with that many columns is stored, by the rules of mlx-lm: an override of `config.json`,
    /// else inferred from the shapes of weight and scales, else not quantised.
    pub fn format(&self, config: &ModelConfig, path: &str, columns: i32) -> Result<Format, LoadError> {
        let Some(section) = quantization_section(config, self.translated)? else { return Ok(Format::Dense) };
        match section.get(path) {
            Some(Value::Bool(false)) => return Ok(Format::Dense),
            Some(value @ Value::Object(_)) => {
                // An override without a mode is affine, whatever the top level says.
                return quantization(path, value, columns).map(Format::Quantized);
            }
            // As in mlx-lm, `true` is the setting of the top level.
            Some(Value::Bool(true)) => {
                return quantization(path, &Value::Object(section.as_ref().clone()), columns)
                    .map(Format::Quantized);
            }
            Some(value) => return Err(quantization_error(path, format!("{value} is no quantization"))),
            None => {}
        }
        let Some(scales) = self.get(&format!("{path}.scales")) else { return Ok(Format::Dense) };
        let Some(weight) = self.get(&format!("{path}.weight")) else { return Ok(Format::Dense) };
        let last = |t: &Tensor| t.shape.last().copied().unwrap_or(0);
        let (groups, words) = (last(scales), last(weight));
        if groups < 1 || columns % groups != 0 || (i64::from(words) * 32) % i64::from(columns.max(1)) != 0 {
            return Err(quantization_error(
                path,
                format!("{groups} groups and {words} words a row do not fit {columns} columns"),
            ));
        }
        let (group_size, bits) = (columns / groups, (i64::from(words) * 32 / i64::from(columns)) as i32);
        let mode = match (scales.dtype.as_str(), bits, group_size) {
            ("U8", 4, 16) => "nvfp4",
            ("U8", 4, 32) => "mxfp4",
            ("U8", 8, 32) => "mxfp8",
            ("U8", ..) => {
                let message =
                    format!("{bits} bits with groups of {group_size} and 8-bit scales is no known mode");
                return Err(quantization_error(path, message));
            }
            _ => "affine",
        };
        checked(path, Quantization { group_size, bits, mode: mode.to_owned() }, columns)
            .map(Format::Quantized)
    }
}

/// How the matrix at `path` is stored if the section on quantization is all that is known: its override, else the
/// setting for all, as mlx-lm quantises; matrices that the groups do not fit stay as they are.
pub(crate) fn format_alone(config: &ModelConfig, path: &str, columns: i32) -> Result<Format, LoadError> {
    let Some(section) = quantization_section(config, false)? else { return Ok(Format::Dense) };
    if experts_only(config) && !path.contains(".experts.") {
        return Ok(Format::Dense);
    }
    let all = || Value::Object(section.as_ref().clone());
    match section.get(path) {
        Some(Value::Bool(false)) => Ok(Format::Dense),
        Some(value @ Value::Object(_)) => quantization(path, value, columns).map(Format::Quantized),
        Some(Value::Bool(true)) => quantization(path, &all(), columns).map(Format::Quantized),
        Some(value) => Err(quantization_error(path, format!("{value} is no quantization"))),
        None => {
            let group_size = section.get("group_size").and_then(Value::as_i64).unwrap_or(64);
            if group_size > 0 && i64::from(columns) % group_size != 0 {
                return Ok(Format::Dense);
            }
            quantization(path, &all(), columns).map(Format::Quantized)
        }
    }
}

fn list(names: &[&str]) -> String {
    let more = if names.len() > NAMED { ", ..." } else { "" };
    names.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ") + more
}

fn quantization_error(path: &str, message: String) -> LoadError {
    LoadError::Quantization { path: path.to_owned(), message }
}

/// Whether the checkpoint is one as published in MXFP4, which has nothing but the experts in it.
fn experts_only(config: &ModelConfig) -> bool {
    let method = || config.get("quantization_config")?.get("quant_method");
    config.get("quantization").is_none() && method().is_some_and(|m| m == "mxfp4")
}

/// A section on quantization: as it stands, or what another program's means.
type Section<'a> = Cow<'a, serde_json::Map<String, Value>>;

/// The `quantization` section of `config.json`. One of a foreign method is an error unless it was `translated`.
fn quantization_section(config: &ModelConfig, translated: bool) -> Result<Option<Section<'_>>, LoadError> {
    let of_text = || config.get("text_config").and_then(|text| text.get("quantization_config"));
    let section = config.get("quantization").or_else(|| config.get("quantization_config")).or_else(of_text);
    let Some(section) = section.filter(|section| !section.is_null()) else { return Ok(None) };
    let object = section
        .as_object()
        .ok_or_else(|| quantization_error("config.json", "the section is not an object".to_owned()))?;
    if experts_only(config) {
        let mxfp4 = [("group_size", 32.into()), ("bits", 4.into()), ("mode", "mxfp4".into())];
        let mxfp4 = mxfp4.map(|(key, value): (&str, Value)| (key.to_owned(), value));
        return Ok(Some(Cow::Owned(mxfp4.into_iter().collect())));
    }
    if let Some(method) = object.get("quant_method").filter(|_| !translated) {
        let message = format!("quant_method {method} is not supported: convert the model with mlx-lm first");
        return Err(quantization_error("config.json", message));
    }
    Ok(Some(Cow::Borrowed(object)))
}

fn quantization(path: &str, value: &Value, columns: i32) -> Result<Quantization, LoadError> {
    let mode = value.get("mode").and_then(Value::as_str).unwrap_or("affine").to_owned();
    let (group_size, bits) = match mode.as_str() {
        "mxfp4" => (32, 4),
        "mxfp8" => (32, 8),
        "nvfp4" => (16, 4),
        _ => (64, 4),
    };
    let number = |key: &str, default: i32| match value.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(n) => n
            .as_i64()
            .and_then(|n| i32::try_from(n).ok())
            .ok_or_else(|| quantization_error(path, format!("{key} is no whole number"))),
    };
    let (group_size, bits) = (number("group_size", group_size)?, number("bits", bits)?);
    checked(path, Quantization { group_size, bits, mode }, columns)
}

/// Checks against what MLX can do.
fn checked(path: &str, q: Quantization, columns: i32) -> Result<Quantization, LoadError> {
    let known = match q.mode.as_str() {
        "affine" => matches!(q.group_size, 32 | 64 | 128) && matches!(q.bits, 1 | 2 | 3 | 4 | 5 | 6 | 8),
        "mxfp4" => (q.group_size, q.bits) == (32, 4),
        "mxfp8" => (q.group_size, q.bits) == (32, 8),
        "nvfp4" => (q.group_size, q.bits) == (16, 4),
        other => return Err(quantization_error(path, format!("mode {other:?} is unknown"))),
    };
    if !known || columns % q.group_size != 0 {
        let Quantization { group_size, bits, mode } = q;
        let message = format!(
            "{mode} with {bits} bits and groups of {group_size} is not possible for {columns} columns"
        );
        return Err(quantization_error(path, message));
    }
    Ok(q)
}

/// Puts a tensor together from the arrays of its sources.
pub(crate) fn assemble(tensor: &Tensor, parts: &[Array]) -> zmlx_mlx::Result<Array> {
    if let Some(recipe) = &tensor.recipe {
        return recipe.make(parts);
    }
    let whole = match parts {
        [one] => one.clone(),
        many => ops::stack(&many.iter().collect::<Vec<_>>(), 0)?,
    };
    let whole = if tensor.words { whole.view(Dtype::Uint32)?.flatten(-2, -1)? } else { whole };
    let whole = match &tensor.transpose {
        Some(axes) => whole.transpose(axes)?.contiguous()?,
        None => whole,
    };
    let whole = match tensor.part {
        Some(Part { axis, start, end, step: 1, .. }) => whole.slice_axis(axis, start, end)?.contiguous()?,
        Some(Part { axis, start, end, step, .. }) => {
            let places = ops::arange(start.into(), end.into(), step.into(), Dtype::Int32)?;
            whole.take(&places, axis)?
        }
        None => whole,
    };
    match tensor.offset {
        Some(offset) => whole.add_scalar(offset),
        None => Ok(whole),
    }
}
