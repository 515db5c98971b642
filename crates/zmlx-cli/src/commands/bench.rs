//! `zmlx bench`: speeds of a model beside the read bandwidth, and what to do with capsules.

use std::path::{Path, PathBuf};

use serde::Serialize;
use zmlx_lab::{Capsule, Comparison, Subject, bench, compare, report};

use super::validate::{name_of, tell};
use crate::args::{CapsuleCommand, CompareArgs, ModelBenchArgs, ReportArgs};
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::model;
use crate::output::{self, Console};
use crate::request::BenchRequest;

/// Measures a model, or runs the command that was typed behind `bench`.
pub(crate) fn run(args: ModelBenchArgs, console: &Console) -> Result<(), Failure> {
    match args.command {
        None => measure(args.try_into()?, console),
        Some(CapsuleCommand::Compare(args)) => compare_two(&args),
        Some(CapsuleCommand::Report(args)) => report_all(&args, console),
        Some(CapsuleCommand::Schema) => {
            let text = serde_json::to_string_pretty(&Capsule::json_schema()).map_err(Failure::runtime)?;
            output::write_stdout(format!("{text}\n").as_bytes())
        }
    }
}

fn measure(request: BenchRequest, console: &Console) -> Result<(), Failure> {
    let BenchRequest { target, options } = request;
    let silent = console.without_progress();
    let console = if target.json { &silent } else { console };
    let _interrupt = Interrupt::install(SecondPress::Exits)?;
    let path = model::locate(&target.model, console)?;
    let mut model = model::load(&path, &target.load, console)?;
    let name = name_of(&target.model);
    let mut subject = Subject { path: &path, name: &name, load: &target.load, model: &mut model };
    let capsule = bench(&mut subject, &options, &mut |p| tell(&p, console)).map_err(Failure::lab)?;
    put_out(&capsule, target.json, target.capsule.as_deref())
}

/// Writes the capsule where that was asked for, then prints the report or the JSON.
pub(super) fn put_out(capsule: &Capsule, json: bool, file: Option<&Path>) -> Result<(), Failure> {
    if let Some(file) = file {
        capsule.write(file).map_err(Failure::lab)?;
    }
    if json { output::write_json(capsule) } else { output::write_stdout(report::text(capsule).as_bytes()) }
}

fn read(path: &Path) -> Result<Capsule, Failure> {
    Capsule::read(path).map_err(|error| Failure::lab(error.into()))
}

#[derive(Serialize)]
struct CompareRecord<'a> {
    old: &'a Path,
    new: &'a Path,
    #[serde(flatten)]
    comparison: &'a Comparison,
}

fn compare_two(args: &CompareArgs) -> Result<(), Failure> {
    let comparison = compare(&read(&args.old)?, &read(&args.new)?);
    if args.json {
        return output::write_json(&CompareRecord {
            old: &args.old,
            new: &args.new,
            comparison: &comparison,
        });
    }
    output::write_stdout(report::comparison(&comparison).as_bytes())
}

fn report_all(args: &ReportArgs, console: &Console) -> Result<(), Failure> {
    let read = |path: &PathBuf| Ok((label(path), read(path)?));
    let capsules = args.capsules.iter().map(read).collect::<Result<Vec<_>, Failure>>()?;
    let reports: Vec<String> = capsules.iter().map(|(_, capsule)| report::text(capsule)).collect();
    output::write_stdout(reports.join("\n").as_bytes())?;
    if let Some(path) = &args.html {
        report::write_html(path, &report::html(&capsules)).map_err(Failure::lab)?;
        console.note(&format!("wrote {}", path.display()));
    }
    Ok(())
}

/// A capsule's name in a report: that of its file.
fn label(path: &Path) -> String {
    path.file_stem().map_or_else(|| path.display().to_string(), |stem| stem.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_file_names() {
        assert_eq!(label(Path::new("runs/today.json")), "today");
        assert_eq!(label(Path::new("/")), "/");
    }
}
