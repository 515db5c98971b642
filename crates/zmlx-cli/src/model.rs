//! Finding and loading a model, with progress.

use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use zmlx_models::{LoadOptions, Model, PatchOptions};

use crate::failure::Failure;
use crate::output::{Console, Unit};
use crate::request::{ModelSource, Smart};

/// The folder of a model; downloads what is missing for a Hugging Face id.
pub(crate) fn locate(source: &ModelSource, console: &Console) -> Result<PathBuf, Failure> {
    let name = match source {
        ModelSource::Embedded => {
            return zmlx_models::embedded_model_dir().map_err(Failure::load);
        }
        ModelSource::Named(name) => name,
    };
    let mut current: Option<(String, ProgressBar)> = None;
    let found = zmlx_models::hub::resolve(name, &mut |progress| {
        let same_file = current.as_ref().is_some_and(|(file, _)| *file == progress.file);
        if !same_file {
            clear(current.take());
            let bar = console.bar(&progress.file, Unit::Bytes, progress.total_bytes);
            current = Some((progress.file, bar));
        }
        if let Some((_, bar)) = &current {
            bar.set_position(progress.done_bytes);
        }
    });
    clear(current);
    found.map_err(Failure::load)
}

fn clear(bar: Option<(String, ProgressBar)>) {
    if let Some((_, bar)) = bar {
        bar.finish_and_clear();
    }
}

/// Finds and loads a model, patched with what was measured to pay for it if `smart` says so.
pub(crate) fn open_smart(
    source: &ModelSource,
    options: &LoadOptions,
    smart: Smart,
    console: &Console,
) -> Result<Model, Failure> {
    let path = locate(source, console)?;
    let mut options = options.clone();
    if let (Smart::Remembered, Some(patch)) = (smart, &mut options.patch) {
        let found = zmlx_lab::smart_choice(&path, patch.threads, None).map_err(Failure::lab)?;
        *patch = PatchOptions { exclude: patch.exclude.clone(), ..found };
    }
    load(&path, &options, console)
}

/// Finds and loads a model.
pub(crate) fn open(source: &ModelSource, options: &LoadOptions, console: &Console) -> Result<Model, Failure> {
    load(&locate(source, console)?, options, console)
}

/// Loads the model of a folder or file.
pub(crate) fn load(path: &Path, options: &LoadOptions, console: &Console) -> Result<Model, Failure> {
    let mut bar: Option<ProgressBar> = None;
    let loaded = Model::load(path, options, &mut |progress| {
        bar.get_or_insert_with(|| console.bar("loading", Unit::Bytes, progress.total_bytes))
            .set_position(progress.done_bytes);
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    loaded.map_err(Failure::load)
}
