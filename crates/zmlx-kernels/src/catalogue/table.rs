//! The catalogue as a table, for `docs/kernels.md`.

use std::fmt::Write;

use super::{Body, Domain, Entry, Gradient, entries};

const HEAD: &str = "# Kernels\n
This table is written by the catalogue itself (`catalogue::table()`); a test compares the two. Each kernel is a function
of `zmlx_kernels::catalogue`, and `catalogue::get(name)` gives its entry: its text, its reference in MLX ops, and the
cases it is tested with. Floats are computed in `f32` whatever they are stored in. A *row* is the last axis.\n";

/// All entries as Markdown, a table for each domain.
pub fn table() -> String {
    let mut out = HEAD.to_owned();
    let mut domains: Vec<Domain> = entries().iter().map(|e| e.domain).collect();
    domains.sort_unstable();
    domains.dedup();
    for domain in domains {
        let name = domain.name();
        let _ = write!(out, "\n## {}{}\n", name[..1].to_uppercase(), &name[1..]);
        out.push_str("| kernel | computes | dtypes | gradient | notes |\n|---|---|---|---|---|\n");
        for entry in entries().iter().filter(|e| e.domain == domain) {
            let cells =
                [signature(entry), cell(&entry.formula), cell(entry.dtypes), gradient(entry), notes(entry)];
            let _ = writeln!(out, "| {} |", cells.join(" | "));
        }
    }
    out
}

fn signature(entry: &Entry) -> String {
    let inputs = match entry.kernel() {
        Ok(kernel) => kernel.ir().inputs.iter().map(|i| i.name.as_str()).collect::<Vec<_>>().join(", "),
        Err(_) => "...".to_owned(),
    };
    format!("`{}({inputs})`", entry.name)
}

/// Markdown ends a cell at a bar.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn gradient(entry: &Entry) -> String {
    match (&entry.gradient, &entry.body) {
        (Gradient::None(because), _) => format!("none: {because}"),
        (Gradient::Derived, Body::WithGradient(..) | Body::Raw(_)) => "given".to_owned(),
        (Gradient::Derived, _) => "derived".to_owned(),
    }
}

fn notes(entry: &Entry) -> String {
    let aliases = match entry.aliases {
        [] => String::new(),
        names => format!("Also `{}`. ", names.join("`, `")),
    };
    cell((aliases + entry.notes).trim_end())
}
