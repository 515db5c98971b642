//! Converting a model to a folder in MLX's format, which mlx-lm loads too.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json, json};
use thiserror::Error;
use zmlx_graph::native::write_bytes;
use zmlx_graph::weights::TensorSpec;
use zmlx_mlx::Dtype;
use zmlx_mlx::stream::with_stream;

use crate::error::LoadError;
use crate::families::{self, Built};
use crate::folder::{self, Entry, FolderError, NewFolder, Shard};
use crate::generate::Flow;
use crate::load::stream_for;
use crate::options::{DeviceChoice, DtypeChoice};
use crate::quantize::{self, Recode};
use crate::reading::WeightReader;
use crate::source::Source;
use crate::tokenizer::TokenizerError;

/// Files of a model folder, besides configuration and weights, that say how its text is made.
const TEXT_FILES: [&str; 13] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
];

/// Ends of the names of more such files: vocabularies, and the code of tokenizers that need some (it is copied, never run).
const TEXT_ENDINGS: [&str; 2] = [".tiktoken", ".py"];

/// Folder of the chat templates that have a name.
const NAMED_TEMPLATES: &str = "additional_chat_templates";

/// How a model is converted.
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions {
    /// What becomes of the matrices.
    pub matrices: Recode,
    /// Dtype of all floats, scales included, but for the few that stay float32 in every model (such as biases of experts).
    /// `Auto` is what the configuration calls `torch_dtype`, else that of the files, as in mlx-lm.
    pub dtype: DtypeChoice,
    /// Where it is computed.
    pub device: DeviceChoice,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Converted {
    /// The folder.
    pub dir: PathBuf,
    /// Its weight files.
    pub shards: Vec<String>,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl Converted {
    /// Bits that a parameter takes on average, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.parameters.max(1) as f64
    }
}

/// Why a model was not converted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The model cannot be read, or not brought to that form.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The folder could not be written.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// One of the small files could not be copied.
    #[error("cannot copy {}: {source}", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

impl From<zmlx_mlx::Error> for ConvertError {
    fn from(error: zmlx_mlx::Error) -> Self {
        Self::Load(error.into())
    }
}

impl From<TokenizerError> for ConvertError {
    fn from(error: TokenizerError) -> Self {
        Self::Load(error.into())
    }
}

/// Writes the model of a folder or GGUF file as a new folder `dir` in MLX's format: `config.json` with how each matrix is
/// stored, safetensors in shards with an index, and the files of tokenizer, chat template and generation. `progress` is
/// told the bytes written and their total, and may stop it. One weight at a time is in memory. The folder appears under its
/// name when it is whole.
///
/// # Errors
/// [`ConvertError`]; then there is no folder `dir`.
pub fn convert(
    path: &Path,
    dir: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(u64, u64) -> Flow,
) -> Result<Converted, ConvertError> {
    let source = Source::open(path)?;
    let mut built = source.build_as(&options.matrices)?;
    let float = match options.dtype {
        DtypeChoice::Auto => quantize::float_of_config(source.config()),
        DtypeChoice::F32 => Some(Dtype::Float32),
        DtypeChoice::F16 => Some(Dtype::Float16),
        DtypeChoice::Bf16 => Some(Dtype::Bfloat16),
    };
    built.recoded.float = float;
    let config = config_json(&source, &built, options, float)?;
    let shards = folder::shards(entries(&built, float));
    let bytes = shards.iter().map(Shard::bytes).sum();
    let parameters = built.graph.weights.iter().map(|w| w.parameters()).sum();

    let new = NewFolder::begin(dir, bytes)?;
    // Before the weights, so that a file that is missing does not cost their time.
    write_text_files(&source, &new)?;
    new.write_json("config.json", &config)?;
    new.write_json("model.safetensors.index.json", &folder::index(&shards, bytes, parameters))?;
    let stream = stream_for(options.device)?;
    with_stream(stream, || write_weights(&source, &built, &new, &shards, &mut |done| progress(done, bytes)))?;
    new.finish()?;
    let shards = shards.into_iter().map(|s| s.name).collect();
    Ok(Converted { dir: dir.to_owned(), shards, parameters, bytes })
}

/// A tensor of a weight, and the dtype that it is written in.
struct Content {
    spec: TensorSpec,
    dtype: Dtype,
}

fn entries(built: &Built, float: Option<Dtype>) -> Vec<Entry<Content>> {
    let mut entries = Vec::new();
    for weight in &built.graph.weights {
        for spec in weight.tensors() {
            let dtype = quantize::dtype_of(built, weight, &spec, float);
            let (name, shape) = (spec.name.clone(), spec.shape.clone());
            let bytes = spec.elements().saturating_mul(dtype.size() as u64);
            entries.push(Entry {
                name,
                dtype: header_name(dtype),
                shape,
                bytes,
                content: Content { spec, dtype },
            });
        }
    }
    entries
}

/// A dtype as safetensors headers name it, of those that weights come in.
fn header_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Float32 => "F32",
        Dtype::Float16 => "F16",
        Dtype::Bfloat16 => "BF16",
        Dtype::Uint8 => "U8",
        _ => "U32",
    }
}

fn write_weights(
    source: &Source,
    built: &Built,
    new: &NewFolder,
    shards: &[Shard<Content>],
    progress: &mut dyn FnMut(u64) -> Flow,
) -> Result<(), ConvertError> {
    let mut reader = WeightReader::open(built, source)?;
    let mut buffer = Vec::new();
    let mut done = 0;
    for shard in shards {
        let failed = FolderError::write(&new.path(&shard.name));
        new.write_shard(shard, |entry, to: &mut dyn Write| {
            let Content { spec, dtype } = &entry.content;
            let mut array = reader.array(spec)?;
            if spec.float {
                array = array.astype(*dtype)?;
            }
            let found = write_bytes(&array, &mut buffer)?;
            if found != *dtype || buffer.len() as u64 != entry.bytes {
                let (name, found) = (spec.name.clone(), found.to_string());
                return Err(ConvertError::Load(LoadError::Dtype { name, expected: entry.dtype, found }));
            }
            to.write_all(&buffer).map_err(&failed)?;
            done += entry.bytes;
            Ok(folder::go_on(progress(done))?)
        })?;
    }
    Ok(())
}

/// The configuration, its keys in order, with how the weights are stored now.
fn config_json(
    source: &Source,
    built: &Built,
    options: &ConvertOptions,
    float: Option<Dtype>,
) -> Result<Json, LoadError> {
    let config = source.config();
    // Factors that stand in a GGUF file as a tensor have no key that mlx-lm knows.
    if config.get("rope_scaling").and_then(|r| r.get("type")).is_some_and(|kind| kind == "factors") {
        return Err(LoadError::Unsupported(
            "this GGUF file has rotary factors of its own, which no config.json can say: convert the model's original \
             folder"
                .to_owned(),
        ));
    }
    let mut root = config.root().clone();
    for key in ["_name_or_path", "vision_config", "quantization", "quantization_config"] {
        root.remove(key);
    }
    if let Some(text) = root.get_mut("text_config").and_then(Json::as_object_mut) {
        text.remove("quantization_config");
    }
    let family = families::find(config)?;
    if let Some(section) = quantize::section(built, family, config, &options.matrices) {
        root.insert("quantization".to_owned(), section.clone());
        root.insert("quantization_config".to_owned(), section);
    }
    if let (Some(dtype), true) = (float, options.dtype != DtypeChoice::Auto) {
        root.insert("torch_dtype".to_owned(), json!(dtype.to_string()));
        if let Some(other) = root.get_mut("dtype") {
            *other = json!(dtype.to_string());
        }
    }
    let mut keys: Vec<(String, Json)> = root.into_iter().collect();
    keys.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(Json::Object(keys.into_iter().collect::<Map<_, _>>()))
}

/// Copies the files of tokenizer, chat template and generation, or writes those that say what a GGUF file says.
fn write_text_files(source: &Source, new: &NewFolder) -> Result<(), ConvertError> {
    let Source::Folder { dir, .. } = source else {
        if let Some(tokenizer) = source.tokenizer()? {
            for (name, json) in tokenizer.files()? {
                new.write_json(name, &json)?;
            }
        }
        let generation = json!({ "eos_token_id": source.config().eos_token_ids() });
        return Ok(new.write_json("generation_config.json", &generation)?);
    };
    copy_files(dir, new, "", &|name| {
        TEXT_FILES.contains(&name) || TEXT_ENDINGS.iter().any(|end| name.ends_with(end))
    })?;
    let templates = dir.join(NAMED_TEMPLATES);
    if templates.is_dir() {
        let path = new.path(NAMED_TEMPLATES);
        fs::create_dir(&path).map_err(FolderError::write(&path))?;
        copy_files(&templates, new, NAMED_TEMPLATES, &|name| name.ends_with(".jinja"))?;
    }
    Ok(())
}

/// Copies the files of `from` whose names serve into the folder `to` of the new folder.
fn copy_files(
    from: &Path,
    new: &NewFolder,
    to: &str,
    serves: &dyn Fn(&str) -> bool,
) -> Result<(), ConvertError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ConvertError::Copy { path, source }
    };
    for entry in fs::read_dir(from).map_err(failed(from))? {
        let path = entry.map_err(failed(from))?.path();
        // In the hub's cache they are links. A pipe would never end.
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name.filter(|name| serves(name) && path.is_file()) else { continue };
        fs::copy(&path, new.path(to).join(name)).map_err(failed(&path))?;
    }
    Ok(())
}
