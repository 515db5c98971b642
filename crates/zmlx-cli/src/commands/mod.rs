//! The commands, one a file.

mod bench;
mod chat;
mod completions;
mod convert;
mod demo;
mod doctor;
mod generate;
mod graph;
mod info;
mod kernels;
mod lab;
mod man;
mod models;
mod plan;
mod profile;
mod validate;

use crate::args::Command;
use crate::failure::Failure;
use crate::output::Console;

/// Runs the command that was typed.
pub(crate) fn run(command: Command, console: &Console) -> Result<(), Failure> {
    match command {
        Command::Generate(args) => generate::run(args, console),
        Command::Chat(args) => chat::run(args, console),
        Command::Convert(args) => convert::run(args, console),
        Command::Models(args) => models::run(&args),
        Command::Info(args) => info::run(args, console),
        Command::Graph(args) => graph::run(args, console),
        Command::Plan(args) => plan::run(args, console),
        Command::Profile(args) => profile::run(args, console),
        Command::Demo(args) => demo::run(args, console),
        Command::Doctor(args) => doctor::run(&args, console),
        Command::Validate(args) => validate::run(args, console),
        Command::Bench(args) => bench::run(args, console),
        Command::Kernels(args) => kernels::run(&args, console),
        Command::Lab(args) => lab::run(&args, console),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}
