//! How a command can fail, the exit code of each way, and the one line that is printed.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use zmlx_lab::LabError;
use zmlx_models::{FolderError, PatchError, PromptCacheError};

use crate::output::{self, Console};

/// Why a command ended without success.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What was typed cannot be meant: exit code 2.
    Usage(anyhow::Error),
    /// The model could not be found or loaded: exit code 3.
    Load(anyhow::Error),
    /// `validate`: the patched model is not what stock is: exit code 4.
    Fidelity(anyhow::Error),
    /// A speed that cannot be: exit code 5.
    Roofline(anyhow::Error),
    /// Anything that failed later: exit code 1.
    Runtime(anyhow::Error),
    /// ctrl-C ended a reply: exit code 130, nothing printed.
    Interrupted,
    /// Whoever read stdout went away: not an error, exit code 0.
    ClosedPipe,
}

impl Failure {
    /// A usage error with this text.
    pub(crate) fn usage(message: impl Display) -> Self {
        Self::Usage(anyhow::anyhow!("{message}"))
    }

    /// A usage error that keeps its cause.
    pub(crate) fn bad_input(error: impl Into<anyhow::Error>) -> Self {
        Self::Usage(error.into())
    }

    /// A model that could not be found or loaded.
    pub(crate) fn load(error: impl Into<anyhow::Error>) -> Self {
        Self::Load(error.into())
    }

    /// A failure while running.
    pub(crate) fn runtime(error: impl Into<anyhow::Error>) -> Self {
        Self::Runtime(error.into())
    }

    /// A model that could not be patched.
    pub(crate) fn patch(error: PatchError) -> Self {
        match error {
            PatchError::Graph(_) | PatchError::Load(_) => Self::Load(error.into()),
            _ => Self::Usage(error.into()),
        }
    }

    /// A model folder that could not be written.
    pub(crate) fn folder(error: FolderError) -> Self {
        match error {
            FolderError::Stopped => Self::Interrupted,
            FolderError::AlreadyThere { .. } => Self::Usage(error.into()),
            _ => Self::Runtime(error.into()),
        }
    }

    /// A file of caches that could not be used or written.
    pub(crate) fn prompt_cache(error: PromptCacheError) -> Self {
        match error {
            PromptCacheError::Saved(_) | PromptCacheError::Mlx(_) | PromptCacheError::Load(_) => {
                Self::Runtime(error.into())
            }
            _ => Self::Usage(error.into()),
        }
    }

    /// What the lab could not do.
    pub(crate) fn lab(error: LabError) -> Self {
        match error {
            LabError::PatchedNotANumber { .. } => Self::Fidelity(error.into()),
            LabError::AboveRoofline(_) => Self::Roofline(error.into()),
            LabError::Load(_) => Self::Load(error.into()),
            LabError::Option { .. }
            | LabError::Prompts { .. }
            | LabError::TooLong { .. }
            | LabError::Patch(_)
            | LabError::NotMeasured { .. }
            | LabError::NoSpeed
            | LabError::Capsule(_) => Self::Usage(error.into()),
            _ => Self::Runtime(error.into()),
        }
    }

    /// A failed write to stdout.
    pub(crate) fn stdout(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::ClosedPipe
        } else {
            let line = format!("cannot write to stdout: {error}");
            Self::Runtime(anyhow::Error::new(error).context(line))
        }
    }

    /// The process's exit code.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::ClosedPipe => 0,
            Self::Runtime(_) => 1,
            Self::Usage(_) => 2,
            Self::Load(_) => 3,
            Self::Fidelity(_) => 4,
            Self::Roofline(_) => 5,
            Self::Interrupted => 130,
        }
    }

    /// The error to show, if this failure shows one.
    pub(crate) fn error(&self) -> Option<&anyhow::Error> {
        match self {
            Self::Usage(error)
            | Self::Load(error)
            | Self::Fidelity(error)
            | Self::Roofline(error)
            | Self::Runtime(error) => Some(error),
            Self::Interrupted | Self::ClosedPipe => None,
        }
    }

    /// Prints `error: ...` on stderr, with `-v` one `caused by: ...` line for each cause, and
    /// gives the exit code.
    pub(crate) fn report(&self, console: &Console) -> ExitCode {
        if let Some(error) = self.error() {
            for line in error_lines(error, console.verbose()) {
                output::stderr_line(&line);
            }
        }
        ExitCode::from(self.code())
    }
}

fn error_lines(error: &anyhow::Error, verbose: bool) -> Vec<String> {
    let mut lines = vec![format!("error: {}", output::one_line(&error.to_string()))];
    if verbose {
        lines.extend(
            error
                .chain()
                .skip(1)
                .map(|cause| format!("  caused by: {}", output::one_line(&cause.to_string()))),
        );
    }
    lines
}

/// Prints what clap has to say: help and version as they are on stdout, errors as one line.
pub(crate) fn report_parse_error(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match output::write_stdout(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => ExitCode::from(failure.code()),
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = io::stderr().write_all(text.as_bytes());
            ExitCode::from(2)
        }
        _ => {
            output::stderr_line(&parse_error_line(&text));
            ExitCode::from(2)
        }
    }
}

/// Folds clap's several lines into one: the message and its tips, without the usage block.
fn parse_error_line(text: &str) -> String {
    let kept: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let mut line = output::one_line(&kept.join(" "));
    if !line.starts_with("error:") {
        line.insert_str(0, "error: ");
    }
    line.push_str(" (see --help)");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let cases = [
            (Failure::ClosedPipe, 0),
            (Failure::runtime(io::Error::other("x")), 1),
            (Failure::usage("x"), 2),
            (Failure::bad_input(io::Error::other("x")), 2),
            (Failure::load(io::Error::other("x")), 3),
            (Failure::lab(LabError::PatchedNotANumber { prompt: "p".into(), position: 1 }), 4),
            (Failure::Roofline(anyhow::anyhow!("x")), 5),
            (Failure::lab(LabError::Patch("no such pattern".into())), 2),
            (Failure::Interrupted, 130),
        ];
        for (failure, code) in cases {
            assert_eq!(failure.code(), code, "{failure:?}");
        }
    }

    #[test]
    fn a_closed_pipe_is_told_apart_from_other_write_errors() {
        let closed = Failure::stdout(io::ErrorKind::BrokenPipe.into());
        assert!(matches!(closed, Failure::ClosedPipe));
        let full = Failure::stdout(io::ErrorKind::StorageFull.into());
        assert_eq!(full.code(), 1);
    }

    #[test]
    fn errors_are_one_line_and_the_chain_needs_verbose() {
        let error = anyhow::anyhow!("inner\nsecond").context("outer\n  detail\x1b[31m");
        assert_eq!(error_lines(&error, false), ["error: outer detail [31m"]);
        assert_eq!(error_lines(&error, true), ["error: outer detail [31m", "  caused by: inner second"]);
    }

    #[test]
    fn clap_errors_are_folded_into_one_line() {
        let text = "error: the following required arguments were not provided:\n  <SHELL>\n\nUsage: zmlx completions <SHELL>\n\nFor more information, try '--help'.\n";
        assert_eq!(
            parse_error_line(text),
            "error: the following required arguments were not provided: <SHELL> (see --help)"
        );
    }
}
