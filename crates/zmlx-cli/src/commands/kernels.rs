//! `zmlx kernels`: the catalogue of kernels, their texts and sources, their speed, their tuning.

mod bench;
mod inputs;
mod list;
mod show;
mod timing;
mod tune;

use zmlx_kernels::catalogue::{self, Entry};
use zmlx_kernels::lang::LangError;
use zmlx_kernels::lang::kernel::is_identifier;
use zmlx_kernels::{Error, Kernel};
use zmlx_mlx::stream;

use crate::args::{Device, KernelsArgs, KernelsCommand};
use crate::failure::Failure;
use crate::output::{self, Console};

/// Lists the catalogue, or runs the command that was typed behind `kernels`.
pub(crate) fn run(args: &KernelsArgs, console: &Console) -> Result<(), Failure> {
    let Some(command) = &args.command else { return list::run(args.family.as_deref(), args.json) };
    if args.family.is_some() || args.json {
        return Err(Failure::usage(
            "--family and --json before a command are for the list of the catalogue: leave the command out, or write \
             the option behind it",
        ));
    }
    match command {
        KernelsCommand::Show(args) => show::run(args),
        KernelsCommand::Bench(args) => bench::run(args, console),
        KernelsCommand::Tune(args) => tune::run(args),
    }
}

/// What a user means by a name or an expression.
enum Target {
    /// An entry of the catalogue.
    Entry(&'static Entry),
    /// A kernel of the user's own.
    Expression(Kernel),
}

impl Target {
    /// The catalogue's entry of this name; any text that can't be a name is an expression.
    fn new(text: &str) -> Result<Self, Failure> {
        let text = text.trim();
        if is_identifier(text) {
            return entry(text).map(Self::Entry);
        }
        match Kernel::new(text) {
            Ok(kernel) => Ok(Self::Expression(kernel)),
            // The report has several lines, with a caret under the place.
            Err(Error::Lang(LangError::Syntax { message, .. })) => {
                message.lines().for_each(output::stderr_line);
                Err(Failure::usage(
                    "the kernel language can't read this expression; the report above shows the place",
                ))
            }
            Err(error) => Err(Failure::bad_input(error)),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Entry(entry) => &entry.name,
            Self::Expression(kernel) => kernel.name(),
        }
    }

    /// The kernel of an expression; none for bodies written by hand.
    fn kernel(&self) -> Result<Option<&Kernel>, Failure> {
        match self {
            Self::Entry(entry) if entry.raw_kernel().is_some() => Ok(None),
            Self::Entry(entry) => entry.kernel().map(Some).map_err(Failure::runtime),
            Self::Expression(kernel) => Ok(Some(kernel)),
        }
    }
}

/// The catalogue's entry of a name, or an error with the nearest one.
fn entry(name: &str) -> Result<&'static Entry, Failure> {
    catalogue::get(name).ok_or_else(|| {
        let known = catalogue::entries().iter();
        let known = known.flat_map(|e| std::iter::once(e.name.as_ref()).chain(e.aliases.iter().copied()));
        let tip = match nearest(name, known) {
            Some(near) => format!("did you mean {near}? "),
            None => String::new(),
        };
        Failure::usage(format_args!(
            "the catalogue has no kernel {name}: {tip}`zmlx kernels` lists them, and an expression such as \
             'x * sigmoid(x)' needs an operator or a call"
        ))
    })
}

/// The likeliest spelling, unless nothing is close.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = known.map(|k| (strsim::jaro_winkler(name, k), k));
    scored.filter(|(score, _)| *score > 0.75).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, k)| k)
}

/// Makes the chosen device the one that everything runs on.
fn set_device(device: Device) -> Result<(), Failure> {
    let device = match device {
        Device::Auto => return Ok(()),
        Device::Cpu => stream::Device::Cpu,
        Device::Gpu => {
            if !stream::gpu_available().map_err(Failure::runtime)? {
                return Err(Failure::runtime(anyhow::anyhow!(
                    "there is no GPU that MLX can use: `zmlx doctor` says why; --device cpu runs here"
                )));
            }
            stream::Device::Gpu
        }
    };
    stream::set_default_device(device).map_err(Failure::runtime)
}

/// The current device in a word.
fn device_word() -> Result<&'static str, Failure> {
    Ok(match stream::current_device().map_err(Failure::runtime)? {
        stream::Device::Cpu => "cpu",
        stream::Device::Gpu => "gpu",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_expressions_are_told_apart() {
        let cases = [("softmax", true), (" rms_norm ", true), ("x * sigmoid(x)", false), ("-x", false)];
        for (text, is_entry) in cases {
            match Target::new(text) {
                Ok(target) => assert_eq!(matches!(target, Target::Entry(_)), is_entry, "{text}"),
                Err(failure) => panic!("{text}: {failure:?}"),
            }
        }
    }

    #[test]
    fn unknown_names_get_the_nearest() {
        let cases = [
            ("sofmax", "did you mean softmax?"),
            ("rmsnorm", "did you mean rms_norm"),
            ("geluu_tanh", "gelu_tanh?"),
        ];
        for (typed, expected) in cases {
            let failure = entry(typed).err().expect("unknown");
            assert_eq!(failure.code(), 2);
            let line = failure.error().expect("shown").to_string();
            assert!(line.contains(expected), "{line}");
        }
        let line = entry("qqqqq").err().expect("unknown").error().expect("shown").to_string();
        assert!(!line.contains("did you mean"), "{line}");
    }
}
