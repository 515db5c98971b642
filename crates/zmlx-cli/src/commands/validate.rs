//! `zmlx validate`: a patched model against stock; the exit code is the gate.

use zmlx_lab::{BisectOptions, LabError, Progress, Subject, bisect, validate};
use zmlx_models::Model;

use crate::args::ValidateArgs;
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::model;
use crate::output::{self, Console};
use crate::request::{ModelSource, ValidateRequest};

/// Measures, prints, writes the capsule, and gives the verdict.
pub(crate) fn run(args: ValidateArgs, console: &Console) -> Result<(), Failure> {
    let ValidateRequest { target, options, bisect } = args.try_into()?;
    let silent = console.without_progress();
    let console = if target.json { &silent } else { console };
    let _interrupt = Interrupt::install(SecondPress::Exits)?;
    let path = model::locate(&target.model, console)?;
    let mut model = model::load(&path, &target.load, console)?;
    if let Some(options) = bisect {
        return op_by_op(&model, &options, target.json, console);
    }
    let name = name_of(&target.model);
    let mut subject = Subject { path: &path, name: &name, load: &target.load, model: &mut model };
    let done = validate(&mut subject, &options, &mut |p| tell(&p, console)).map_err(Failure::lab)?;
    super::bench::put_out(&done.capsule, target.json, target.capsule.as_deref())?;
    let failures = done.capsule.fidelity.iter().flat_map(|f| &f.gate.failures).count();
    match (failures, done.above_roofline) {
        (0, None) => Ok(()),
        (0, Some(above)) => Err(Failure::lab(LabError::AboveRoofline(above))),
        (n, _) => {
            let what = if n == 1 { "1 failure" } else { &format!("{n} failures") };
            Err(Failure::Fidelity(anyhow::anyhow!(
                "the fidelity gate failed: {what}, listed in the report; docs/validation.md says how to find the cause"
            )))
        }
    }
}

/// Names the first op that leaves its class.
fn op_by_op(model: &Model, options: &BisectOptions, json: bool, console: &Console) -> Result<(), Failure> {
    let found = bisect(model, options, &mut |p| tell(&p, console)).map_err(Failure::lab)?;
    found.notes.iter().for_each(|note| console.note(note));
    match json {
        true => output::write_json(&found)?,
        false => output::write_stdout(format!("{found}\n").as_bytes())?,
    }
    match found.first() {
        None => Ok(()),
        Some(op) => Err(Failure::Fidelity(anyhow::anyhow!("an op leaves its class: {op}"))),
    }
}

/// The model as it was asked for.
pub(super) fn name_of(model: &ModelSource) -> String {
    match model {
        ModelSource::Embedded => "embedded".to_owned(),
        ModelSource::Named(name) => name.clone(),
    }
}

/// A step begins.
pub(super) fn tell(progress: &Progress, console: &Console) {
    console.step(&format!("[{}/{}] {}", progress.done + 1, progress.total, progress.step));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_keep_the_name_they_were_asked_for_by() {
        assert_eq!(name_of(&ModelSource::Embedded), "embedded");
        assert_eq!(name_of(&ModelSource::Named("org/name".into())), "org/name");
    }
}
