//! The catalogue as a table or as JSON.

use std::fmt::Write;

use serde::Serialize;
use zmlx_kernels::Error;
use zmlx_kernels::catalogue::{self, Body, Domain, Entry, Gradient};
use zmlx_kernels::lang::emit::Dialect;
use zmlx_mlx::stream::{self, Device};

use super::inputs::Inputs;
use super::nearest;
use crate::args::KernelDtype;
use crate::failure::Failure;
use crate::output;

#[derive(Serialize)]
struct Record {
    kernels: Vec<Row>,
}

/// An entry as it is printed.
#[derive(Serialize)]
pub(super) struct Row {
    name: &'static str,
    aliases: &'static [&'static str],
    family: &'static str,
    formula: &'static str,
    dtypes: &'static str,
    /// derived, given, or none
    gradient: &'static str,
    /// Why there is none.
    no_gradient_because: Option<&'static str>,
    backends: Vec<&'static str>,
    notes: &'static str,
}

impl Row {
    pub(super) fn new(entry: &'static Entry) -> Result<Self, Failure> {
        let (gradient, because) = gradient(entry);
        Ok(Self {
            name: &entry.name,
            aliases: entry.aliases,
            family: entry.domain.name(),
            formula: &entry.formula,
            dtypes: entry.dtypes,
            gradient,
            no_gradient_because: because,
            backends: backends(entry)?,
            notes: entry.notes,
        })
    }

    /// Name and value of each line about an entry.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let gradient = match self.no_gradient_because {
            Some(because) => format!("none: {because}"),
            None => self.gradient.to_owned(),
        };
        let mut lines = vec![
            ("kernel", self.name.to_owned()),
            ("also", self.aliases.join(", ")),
            ("family", self.family.to_owned()),
            ("formula", self.formula.to_owned()),
            ("dtypes", self.dtypes.to_owned()),
            ("gradient", gradient),
            ("backends", self.backends.join(", ")),
            ("notes", self.notes.to_owned()),
        ];
        lines.retain(|(_, value)| !value.is_empty());
        lines
    }
}

/// Prints all entries, or those of a family.
pub(super) fn run(family: Option<&str>, json: bool) -> Result<(), Failure> {
    let chosen = match family {
        None => None,
        Some(name) => Some(domain(name)?),
    };
    let entries = catalogue::entries().iter().filter(|e| chosen.is_none_or(|d| e.domain == d));
    let rows = entries.map(Row::new).collect::<Result<Vec<_>, _>>()?;
    if json {
        return output::write_json(&Record { kernels: rows });
    }
    output::write_stdout(table(&rows).as_bytes())
}

/// The families that have entries, in their order.
fn families() -> Vec<Domain> {
    let mut all: Vec<Domain> = Vec::new();
    for entry in catalogue::entries() {
        if !all.contains(&entry.domain) {
            all.push(entry.domain);
        }
    }
    all
}

fn domain(name: &str) -> Result<Domain, Failure> {
    let all = families();
    all.iter().copied().find(|d| d.name() == name).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|d| d.name()).collect();
        let tip =
            nearest(name, names.iter().copied()).map_or_else(String::new, |n| format!("did you mean {n}? "));
        Failure::usage(format_args!("no family '{name}': {tip}families are {}", names.join(", ")))
    })
}

fn gradient(entry: &Entry) -> (&'static str, Option<&'static str>) {
    match (&entry.gradient, &entry.body) {
        (Gradient::None(because), _) => ("none", Some(because)),
        (Gradient::Derived, Body::WithGradient(..) | Body::Raw(_)) => ("given", None),
        (Gradient::Derived, _) => ("derived", None),
    }
}

/// A text runs everywhere; bodies written by hand where there is one.
fn backends(entry: &'static Entry) -> Result<Vec<&'static str>, Failure> {
    let Some(raw) = entry.raw_kernel() else { return Ok(vec!["cpu", "metal", "cuda"]) };
    let mut all = Vec::new();
    if has_cpu_body(entry)? {
        all.push("cpu");
    }
    for (dialect, word) in [(Dialect::Metal, "metal"), (Dialect::Cuda, "cuda")] {
        all.extend(raw.text(dialect).map(|_| word));
    }
    Ok(all)
}

/// Asked by a call, which is not computed.
fn has_cpu_body(entry: &'static Entry) -> Result<bool, Failure> {
    let inputs = Inputs::of_entry(entry, None, KernelDtype::F32)?;
    let arrays = inputs.placeholders()?;
    let arrays: Vec<_> = arrays.iter().collect();
    let called = stream::with_device(Device::Cpu, || Ok(entry.call(&arrays, &inputs.setting)));
    match called.map_err(Failure::runtime)? {
        Ok(_) => Ok(true),
        Err(Error::NoBody { .. }) => Ok(false),
        Err(error) => Err(Failure::runtime(error)),
    }
}

/// Widest column, in characters.
const WIDEST: usize = 64;

fn table(rows: &[Row]) -> String {
    let cells: Vec<[String; 5]> = rows
        .iter()
        .map(|r| {
            let own = [r.name, r.formula, r.dtypes, r.gradient].map(output::one_line);
            let [name, formula, dtypes, gradient] = own;
            [name, formula, dtypes, gradient, r.backends.join(", ")]
        })
        .collect();
    let head = ["kernel", "formula", "dtypes", "gradient", "backends"].map(str::to_owned);
    let widest = |n: usize| cells.iter().chain([&head]).map(|c| c[n].chars().count()).max().unwrap_or(0);
    // The few cells that are longer stick out of their column.
    let width = |n: usize| widest(n).min(WIDEST);
    let widths: [usize; 5] = std::array::from_fn(width);
    let line = |cells: &[String; 5]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}", line(&head));
    let mut family = "";
    for (row, cells) in rows.iter().zip(&cells) {
        if row.family != family {
            family = row.family;
            let _ = writeln!(text, "\n[{family}]");
        }
        let _ = writeln!(text, "{}", line(cells));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_found_by_name() {
        assert_eq!(domain("softmax").ok(), Some(Domain::Softmax));
        let line = domain("softmx").expect_err("unknown").error().expect("shown").to_string();
        for word in ["did you mean softmax?", "activation", "optim"] {
            assert!(line.contains(word), "{line}");
        }
    }

    #[test]
    fn columns_are_aligned() {
        let row = |name, formula| Row {
            name,
            aliases: &[],
            family: "norm",
            formula,
            dtypes: "f32",
            gradient: "derived",
            no_gradient_because: None,
            backends: vec!["cpu"],
            notes: "",
        };
        let expected = "\
kernel   formula  dtypes  gradient  backends

[norm]
a        x        f32     derived   cpu
long_er  x + y    f32     derived   cpu
";
        assert_eq!(table(&[row("a", "x"), row("long_er", "x + y")]), expected);
    }
}
