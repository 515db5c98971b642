//! Writing to the terminal: human units, one-line errors, the statistics line, progress bars.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use zmlx_models::{Completion, FinishReason};

use crate::failure::Failure;

/// How talkative the program is, and whether stderr can show progress.
pub(crate) struct Console {
    verbose: bool,
    quiet: bool,
    progress: bool,
}

/// What a progress bar counts.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    /// Bytes read or received.
    Bytes,
    /// Prompt tokens.
    Tokens,
}

impl Console {
    /// Progress is shown only when stderr is a terminal and `quiet` is off.
    pub(crate) fn new(verbose: bool, quiet: bool) -> Self {
        let progress = !quiet && io::stderr().is_terminal();
        Self { verbose, quiet, progress }
    }

    /// The same without progress bars, for machine-readable output.
    pub(crate) fn without_progress(&self) -> Self {
        Self { progress: false, ..*self }
    }

    /// `-v`: print causes of errors.
    pub(crate) fn verbose(&self) -> bool {
        self.verbose
    }

    /// A remark on stderr, left out under `-q`.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            stderr_line(text);
        }
    }

    /// A step of something long, shown where progress is.
    pub(crate) fn step(&self, text: &str) {
        if self.progress {
            stderr_line(text);
        }
    }

    /// A bar labelled `label`, or one that draws nothing. A total of 0 means that it is unknown.
    pub(crate) fn bar(&self, label: &str, unit: Unit, total: u64) -> ProgressBar {
        if !self.progress {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
        let template = match (unit, total) {
            (Unit::Bytes, 0) => "{msg} {decimal_bytes} {decimal_bytes_per_sec}",
            (Unit::Tokens, 0) => "{msg} {pos} tokens",
            (Unit::Bytes, _) => {
                "{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}"
            }
            (Unit::Tokens, _) => "{msg} {bar:30} {pos}/{len} tokens {eta}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(one_line(label));
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

/// Writes all of `bytes` to stdout and flushes.
pub(crate) fn write_stdout(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(Failure::stdout)
}

/// Writes a file under a temporary name beside it and gives it its name once it is whole.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        let line = format!("cannot write {}: {error}", path.display());
        Failure::runtime(anyhow::Error::new(error).context(line))
    };
    let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::IsADirectory.into()))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| {
        // It may not be there.
        let _ = fs::remove_file(&temporary);
        failed(error)
    })
}

/// Writes `value` to stdout as one line of JSON.
pub(crate) fn write_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(value).map_err(Failure::runtime)?;
    line.push(b'\n');
    write_stdout(&line)
}

/// One line on stderr; a closed stderr is not worth failing for.
pub(crate) fn stderr_line(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// `text` on one line: runs of white space and control characters become one space. File
/// contents can reach error messages, so escape sequences must not get to the terminal.
pub(crate) fn one_line(text: &str) -> String {
    // Besides control characters, those that turn the direction of text around.
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut line = text
        .split(|c: char| c.is_whitespace() || odd(c))
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    // Names and values from files can be of any length.
    if let Some((cut, _)) = line.char_indices().nth(LONGEST_LINE) {
        line.truncate(cut);
        line.push_str("...");
    }
    line
}

/// Longest line of an error, in characters.
const LONGEST_LINE: usize = 1000;

/// A byte count in decimal units: `10.7 MB`, `17.18 GB`.
pub(crate) fn bytes(n: u64) -> String {
    scaled(n, &[" B", " kB", " MB", " GB", " TB"])
}

/// A count in short form: `19.0 M`, `30.53 B`.
pub(crate) fn count(n: u64) -> String {
    scaled(n, &["", " k", " M", " B", " T"])
}

/// One decimal, from the third unit on two: published sizes are told so.
fn scaled(n: u64, units: &[&str]) -> String {
    if n < 1000 {
        return format!("{n}{}", units[0]);
    }
    let mut value = n as f64 / 1000.0;
    let mut unit = 1;
    let decimals = |unit: usize| if unit < 3 { 1 } else { 2 };
    // 999.95 would be printed as 1000.0.
    while value >= 1000.0 - 0.5 * 0.1f64.powi(decimals(unit)) && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.*}{}", decimals(unit) as usize, units[unit])
}

/// `n` with thousands separated: `2,048`.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The word for a finish reason, as it is in the JSON record.
pub(crate) fn finish_word(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
    }
}

/// The `--stats` line.
pub(crate) fn stats_line(completion: &Completion) -> String {
    let checkpoints = match completion.checkpoint_bytes {
        0 => String::new(),
        kept => format!(" | checkpoints: {}", bytes(kept)),
    };
    format!(
        "prompt: {} tokens ({} reused), {:.1} tok/s | decode: {} tokens, {:.1} tok/s | peak memory: {}{checkpoints} | {} on {} | finish: {}",
        completion.prompt_ids.len(),
        completion.reused_tokens,
        completion.prompt_tps,
        completion.tokens.len(),
        completion.decode_tps,
        bytes(completion.peak_memory_bytes),
        completion.dtype,
        completion.device,
        finish_word(&completion.finish_reason),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        let cases = [
            (0, "0 B", "0", "0"),
            (999, "999 B", "999", "999"),
            (1_000, "1.0 kB", "1.0 k", "1,000"),
            (2_048, "2.0 kB", "2.0 k", "2,048"),
            (999_949, "999.9 kB", "999.9 k", "999,949"),
            (999_950, "1.0 MB", "1.0 M", "999,950"),
            (19_034_112, "19.0 MB", "19.0 M", "19,034,112"),
            (999_950_000, "1.00 GB", "1.00 B", "999,950,000"),
            (30_532_122_624, "30.53 GB", "30.53 B", "30,532,122,624"),
            (999_995_000_000, "1.00 TB", "1.00 T", "999,995,000,000"),
            (u64::MAX, "18446744.07 TB", "18446744.07 T", "18,446,744,073,709,551,615"),
        ];
        for (n, as_bytes, as_count, as_grouped) in cases {
            assert_eq!(bytes(n), as_bytes, "bytes({n})");
            assert_eq!(count(n), as_count, "count({n})");
            assert_eq!(grouped(n), as_grouped, "grouped({n})");
        }
    }

    #[test]
    fn one_line_has_no_breaks_and_no_escapes() {
        assert_eq!(one_line("a\n  b\t\x1b[2Jc\r\n"), "a b [2Jc");
        assert_eq!(one_line(""), "");
    }
}
