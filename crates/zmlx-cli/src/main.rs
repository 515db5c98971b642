//! The `zmlx` command line: arguments and printing around the `zmlx-models`, `zmlx-kernels` and `zmlx-lab` libraries.
//!
//! What was typed ([`args`]) and what it means ([`request`]) are two types; each command has one
//! file under [`commands`]. Results go to stdout; errors, statistics and progress go to stderr.
//!
//! # Exit codes
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done (also when the reader of stdout went away, as in `zmlx demo \| head -1`) |
//! | 1 | failed while running; `zmlx doctor`: no backend is usable |
//! | 2 | bad usage: an option, a prompt or a combination that cannot be meant |
//! | 3 | the model could not be found or loaded |
//! | 4 | `zmlx validate`: the fidelity gate failed |
//! | 5 | `zmlx validate`, `zmlx bench`: a speed was above the roofline, so it is withheld |
//! | 130 | interrupted by ctrl-C |
#![forbid(unsafe_code)]

mod args;
mod caches;
mod commands;
mod failure;
mod input;
mod interrupt;
mod model;
mod output;
mod reply;
mod request;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // A panic that the library turns into an error is reported as that.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !zmlx_models::panic_is_caught() {
            print(info);
        }
    }));
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::report_parse_error(&error),
    };
    let console = output::Console::new(cli.verbose, cli.quiet);
    match commands::run(cli.command, &console) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(&console),
    }
}
