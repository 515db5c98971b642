//! Writing model folders: safetensors in shards of at most 5 GiB with an index, and JSON files. A folder appears under its
//! name when it is whole.

use std::fs::File;
use std::io::{BufWriter, IntoInnerError, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json, json};
use thiserror::Error;

use crate::generate::Flow;

/// Most bytes of tensors in one file, mlx-lm's own limit; a larger tensor has a file to itself.
const LARGEST: u64 = 5 << 30;
/// Where the data of a file begins, a multiple of this: a cache line, so that mapped tensors are aligned.
const ALIGNMENT: usize = 64;
/// Besides its weights a folder takes a few small files.
const SMALL_FILES: u64 = 8 << 20;

/// Why a model folder was not written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FolderError {
    /// The folder is there already.
    #[error("{} is there already: remove it, or choose another folder", path.display())]
    AlreadyThere {
        /// The folder.
        path: PathBuf,
    },
    /// The disk is too full.
    #[error("{} has room for {available} bytes, and the model takes {needed}: free some, or choose another disk", path.display())]
    NoRoom {
        /// The folder that would hold the model.
        path: PathBuf,
        /// Bytes that are free.
        available: u64,
        /// Bytes that the model takes.
        needed: u64,
    },
    /// A file could not be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The caller stopped it; nothing is left behind.
    #[error("stopped")]
    Stopped,
}

impl FolderError {
    /// A failure to write `path`.
    pub(crate) fn write(path: &Path) -> impl Fn(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Write { path: path.clone(), source }
    }
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry<T> {
    /// Name in the checkpoint.
    pub(crate) name: String,
    /// dtype as safetensors names it.
    pub(crate) dtype: &'static str,
    /// Sizes of its axes.
    pub(crate) shape: Vec<i32>,
    /// Bytes of its data.
    pub(crate) bytes: u64,
    /// What its data is made of.
    pub(crate) content: T,
}

/// A file and the tensors in it.
pub(crate) struct Shard<T> {
    /// Its name.
    pub(crate) name: String,
    /// The tensors, in the order of their data.
    pub(crate) entries: Vec<Entry<T>>,
}

/// Deals tensors to files.
pub(crate) fn shards<T>(entries: Vec<Entry<T>>) -> Vec<Shard<T>> {
    let mut groups: Vec<(u64, Vec<Entry<T>>)> = Vec::new();
    for entry in entries {
        match groups.last_mut() {
            Some((bytes, group)) if *bytes + entry.bytes <= LARGEST => {
                *bytes += entry.bytes;
                group.push(entry);
            }
            _ => groups.push((entry.bytes, vec![entry])),
        }
    }
    let count = groups.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    groups.into_iter().enumerate().map(|(i, (_, entries))| Shard { name: name(i), entries }).collect()
}

/// `model.safetensors.index.json`.
pub(crate) fn index<T>(shards: &[Shard<T>], bytes: u64, parameters: u64) -> Json {
    let mut map = Map::new();
    for shard in shards {
        map.extend(shard.entries.iter().map(|t| (t.name.clone(), json!(shard.name))));
    }
    json!({ "metadata": { "total_size": bytes, "total_parameters": parameters }, "weight_map": map })
}

impl<T> Shard<T> {
    /// Bytes of its tensors.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.iter().map(|t| t.bytes).sum()
    }

    /// The length and the JSON, padded with blanks.
    fn header(&self) -> Vec<u8> {
        let mut entries = Map::new();
        entries.insert("__metadata__".to_owned(), json!({ "format": "mlx" }));
        let mut begin = 0;
        for tensor in &self.entries {
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
}

/// A folder that is being written, under another name beside its own; removed if it is dropped unfinished.
pub(crate) struct NewFolder {
    dir: PathBuf,
    temporary: tempfile::TempDir,
}

impl NewFolder {
    /// Begins a folder `dir` for so many bytes of weights.
    pub(crate) fn begin(dir: &Path, bytes: u64) -> Result<Self, FolderError> {
        if dir.symlink_metadata().is_ok() {
            return Err(FolderError::AlreadyThere { path: dir.to_owned() });
        }
        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(parent).map_err(FolderError::write(parent))?;
        check_room(parent, bytes)?;
        // Beside the folder, so that renaming moves no bytes.
        let temporary = temporary_folder(parent).map_err(FolderError::write(parent))?;
        Ok(Self { dir: dir.to_owned(), temporary })
    }

    /// Where a file of that name is written.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.temporary.path().join(name)
    }

    /// Writes a weight file; `fill` writes the data of one tensor, all of its bytes.
    pub(crate) fn write_shard<T, E: From<FolderError>>(
        &self,
        shard: &Shard<T>,
        mut fill: impl FnMut(&Entry<T>, &mut dyn Write) -> Result<(), E>,
    ) -> Result<(), E> {
        let path = self.path(&shard.name);
        let failed = FolderError::write(&path);
        let mut file = BufWriter::new(File::create_new(&path).map_err(&failed)?);
        file.write_all(&shard.header()).map_err(&failed)?;
        for entry in &shard.entries {
            fill(entry, &mut file)?;
        }
        file.into_inner().map_err(IntoInnerError::into_error).map_err(failed)?;
        Ok(())
    }

    /// Writes a JSON file.
    pub(crate) fn write_json(&self, name: &str, json: &Json) -> Result<(), FolderError> {
        let path = self.path(name);
        std::fs::write(&path, format!("{json:#}\n")).map_err(FolderError::write(&path))
    }

    /// Gives the folder its name.
    pub(crate) fn finish(self) -> Result<(), FolderError> {
        std::fs::rename(self.temporary.path(), &self.dir).map_err(FolderError::write(&self.dir))
    }
}

/// What a progress callback's answer means for the writer.
pub(crate) fn go_on(flow: Flow) -> Result<(), FolderError> {
    match flow {
        Flow::Continue => Ok(()),
        Flow::Stop => Err(FolderError::Stopped),
    }
}

pub(crate) fn check_room(parent: &Path, bytes: u64) -> Result<(), FolderError> {
    let needed = bytes + SMALL_FILES;
    let failed = FolderError::write(parent);
    let disk = rustix::fs::statvfs(parent).map_err(|e| failed(e.into()))?;
    let available = disk.f_bavail.saturating_mul(disk.f_frsize);
    if available < needed {
        return Err(FolderError::NoRoom { path: parent.to_owned(), available, needed });
    }
    Ok(())
}

fn temporary_folder(parent: &Path) -> std::io::Result<tempfile::TempDir> {
    use std::os::unix::fs::PermissionsExt;
    let mut builder = tempfile::Builder::new();
    // A model is no secret: the usual permissions, which the umask narrows.
    builder.prefix(".new-model-").permissions(std::fs::Permissions::from_mode(0o777));
    builder.tempdir_in(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_models_are_sharded() {
        let entry = |name: &str, gib: u64| Entry {
            name: name.to_owned(),
            dtype: "BF16",
            shape: vec![1 << 19, gib as i32, 1 << 10],
            bytes: gib << 30,
            content: (),
        };
        let sizes = [("a", 2), ("b", 2), ("c", 2), ("d", 8), ("e", 1)];
        let shards = shards(sizes.iter().map(|&(name, gib)| entry(name, gib)).collect());
        let sums: Vec<u64> = shards.iter().map(|s| s.bytes() >> 30).collect();
        assert_eq!(sums, [4, 2, 8, 1]);
        assert_eq!(shards[1].name, "model-00002-of-00004.safetensors");
        let index = index(&shards, 15 << 30, 1);
        assert_eq!(index["weight_map"]["d"], "model-00003-of-00004.safetensors");
    }

    #[test]
    fn what_is_not_finished_leaves_nothing_behind() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("new").join("model");
        let folder = NewFolder::begin(&dir, 1).unwrap();
        folder.write_json("config.json", &json!({ "a": 1 })).unwrap();
        drop(folder);
        assert_eq!(std::fs::read_dir(dir.parent().unwrap()).unwrap().count(), 0);
        let folder = NewFolder::begin(&dir, 1).unwrap();
        folder.write_json("config.json", &json!({ "a": 1 })).unwrap();
        folder.finish().unwrap();
        assert!(dir.join("config.json").exists());
        assert!(matches!(NewFolder::begin(&dir, 1), Err(FolderError::AlreadyThere { .. })));
        assert!(matches!(check_room(parent.path(), 1 << 60), Err(FolderError::NoRoom { .. })));
        let file = parent.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(NewFolder::begin(&file.join("model"), 1), Err(FolderError::Write { .. })));
    }
}
