//! The tables of `docs/performance.md`.

use std::fmt::Write;

use zmlx_graph::profile::median;

use super::{Form, Measured, MeasuredError};

/// What is not said in a row: the form that most rows have.
const USUAL: Form = Form { context: 64, tokens: 128, beside_stock: true };

/// The document with its tables made anew, each between the lines `<!-- measured NAME -->` and `<!-- end of measured NAME -->`
/// (`decode`, `prompts`). Of a model, form and device the last line counts; models come in the order of their first lines.
///
/// # Errors
/// [`MeasuredError::NoMarkers`].
pub fn with_tables(document: &str, lines: &[Measured]) -> Result<String, MeasuredError> {
    let document = between(document, "decode", &decode(lines))?;
    between(&document, "prompts", &prompts(lines))
}

/// The document with `text` between the markers of that name.
fn between(document: &str, name: &str, text: &str) -> Result<String, MeasuredError> {
    let [begin, end] = ["", "end of "].map(|which| format!("<!-- {which}measured {name} -->"));
    let found = document.split_once(&format!("{begin}\n"));
    let parts = found.and_then(|(before, rest)| {
        // The table itself has no such line, nor has an empty place.
        let at = if rest.starts_with(&end) { 0 } else { rest.find(&format!("\n{end}"))? + 1 };
        Some((before, &rest[at..]))
    });
    match parts {
        Some((before, after)) => Ok(format!("{before}{begin}\n{text}{after}")),
        None => Err(MeasuredError::NoMarkers { begin, end }),
    }
}

fn decode(lines: &[Measured]) -> String {
    let mut text = String::from(
        "| model | bound tok/s | stock MLX tok/s | ours tok/s | share of the bound | launches a token | date | commit | \
         device |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    let same = |a: &Measured, b: &Measured| (&a.model, &a.form, &a.device) == (&b.model, &b.form, &b.device);
    for line in latest(lines, same) {
        let bound = line.bandwidth().map(|moved| moved / line.bytes_per_token as f64);
        let share =
            bound.map_or_else(none, |b| format!("{:.0} %", 100.0 * median(&mut line.ours.clone()) / b));
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {share} | {} | {} | {} | {} |",
            name(line),
            bound.map_or_else(none, thousands),
            runs(&line.stock),
            runs(&line.ours),
            line.launches_per_token,
            line.date,
            line.commit,
            line.device
        );
    }
    text
}

fn prompts(lines: &[Measured]) -> String {
    let mut text = String::from(
        "| model | prompt in one call | stock MLX tok/s | ours tok/s | date | commit | device |\n|---|---|---|---|---|---|---|\n",
    );
    let measured: Vec<Measured> = lines.iter().filter(|l| !l.prefill.is_empty()).cloned().collect();
    // A prompt is the same in each form of decode.
    let same = |a: &Measured, b: &Measured| (&a.model, &a.device) == (&b.model, &b.device);
    for line in latest(&measured, same) {
        for prompt in &line.prefill {
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "| `{}` | {} | {} | {} | {} | {} | {} |",
                line.model,
                thousands(prompt.length as f64),
                range(&prompt.stock),
                range(&prompt.ours),
                line.date,
                line.commit,
                line.device
            );
        }
    }
    text
}

/// The last of lines that say the same thing anew, by model.
fn latest(lines: &[Measured], same: impl Fn(&Measured, &Measured) -> bool) -> Vec<&Measured> {
    let mut kept: Vec<&Measured> = Vec::new();
    for line in lines {
        match kept.iter_mut().find(|known| same(known, line)) {
            Some(known) => *known = line,
            None => kept.push(line),
        }
    }
    let first = |line: &Measured| lines.iter().position(|other| other.model == line.model);
    kept.sort_by_key(|line| first(line));
    kept
}

/// The model, and how its form differs from the usual.
fn name(line: &Measured) -> String {
    let Form { context, tokens, beside_stock } = line.form;
    let mut text = format!("`{}`", line.model);
    if context != USUAL.context {
        text.push_str(&format!(", after {}", thousands(context as f64)));
    }
    if tokens != USUAL.tokens {
        text.push_str(&format!(", {} tokens", thousands(tokens as f64)));
    }
    if !beside_stock {
        text.push_str(", past MLX alone");
    }
    text
}

fn none() -> String {
    "-".to_owned()
}

fn runs(rates: &[f64]) -> String {
    let all: Vec<String> = rates.iter().copied().map(thousands).collect();
    if all.is_empty() { none() } else { all.join(", ") }
}

/// The least and the greatest.
fn range(rates: &[f64]) -> String {
    let (Some(least), Some(most)) =
        (rates.iter().copied().reduce(f64::min), rates.iter().copied().reduce(f64::max))
    else {
        return none();
    };
    let (least, most) = (thousands(least), thousands(most));
    if least == most { least } else { format!("{least} to {most}") }
}

/// Without decimals, with a comma after each three digits from the right.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
