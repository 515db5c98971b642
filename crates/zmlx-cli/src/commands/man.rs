//! `zmlx man`: man pages made from the arguments' definition.

use std::path::Path;

use clap::CommandFactory;

use crate::args::{Cli, ManArgs};
use crate::failure::Failure;
use crate::output;

/// Prints zmlx(1), or writes one page a command into a folder.
pub(crate) fn run(args: &ManArgs) -> Result<(), Failure> {
    match &args.dir {
        Some(dir) => write_all(dir).map_err(|error| {
            let place = format!("cannot write man pages into {}: {error}", dir.display());
            Failure::runtime(anyhow::Error::new(error).context(place))
        }),
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page).map_err(Failure::runtime)?;
            output::write_stdout(&page)
        }
    }
}

fn write_all(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    clap_mangen::generate_to(Cli::command(), dir)
}
