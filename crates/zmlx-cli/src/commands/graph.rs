//! `zmlx graph`: a model's graph as text, JSON, DOT or a picture.

use zmlx_graph::Detail;
use zmlx_models::Blueprint;

use crate::args::GraphArgs;
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::output::{self, Console};
use crate::{model, request};

/// Prints the graph, or writes the files that were asked for.
pub(crate) fn run(args: GraphArgs, console: &Console) -> Result<(), Failure> {
    let source = request::model_source(args.model)?;
    let asked =
        args.patch.preset.is_some() || args.patch.patterns.is_some() || !args.patch.exclude.is_empty();
    let patch = match args.patched || asked {
        true => Some(request::patch_options(&args.patch)?),
        false => None,
    };
    // A download can be long.
    let _interrupt = Interrupt::install(SecondPress::Exits)?;
    let folder = if args.json {
        model::locate(&source, &console.without_progress())?
    } else {
        model::locate(&source, console)?
    };
    let blueprint = Blueprint::read(&folder).map_err(Failure::load)?;
    let graph = match patch {
        Some(options) => blueprint.patched(&options).map_err(Failure::patch)?.graph,
        None => blueprint.graph,
    };
    let mut written = Vec::new();
    if let Some(path) = &args.dot {
        output::write_file(path, graph.dot().map_err(Failure::load)?.as_bytes())?;
        written.push(path);
    }
    if let Some(path) = &args.svg {
        let detail = if args.all_layers { Detail::Every } else { Detail::Distinct };
        output::write_file(path, graph.svg(detail).map_err(Failure::load)?.as_bytes())?;
        written.push(path);
    }
    for path in &written {
        console.note(&format!("wrote {}", path.display()));
    }
    if args.json {
        output::write_json(&graph.record().map_err(Failure::load)?)
    } else if written.is_empty() {
        output::write_stdout(graph.describe().map_err(Failure::load)?.as_bytes())
    } else {
        Ok(())
    }
}
