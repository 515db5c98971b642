use std::fmt::Write;

use super::svg::{Bar, bars};
use super::text::{first_difference, small};
use super::{bound_text, bytes, gain_text, speed};
use crate::arms::Arm;
use crate::capsule::{ArmRecord, Capsule, Kind};
use crate::fidelity::Fidelity;
use crate::stats::Spread;

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2433;--soft:#5a6478;--paper:#fff;--line:#dfe3ea;--stock:#8d99ae;--patched:#1f7a8c;\
--good:#1b7f4b;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa4b5;--paper:#14171d;--line:#2d333f;--stock:#6b778c;\
--patched:#4db3c6;--good:#5cc98d;--bad:#f0837a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:1rem;margin:1.5rem 0 .3rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
.wide{overflow-x:auto}th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right}
svg{width:100%;height:auto;font-size:12px}svg text{fill:var(--ink)}svg .label{text-anchor:end}
svg .tick{fill:var(--soft);text-anchor:middle;font-size:11px}svg .grid{stroke:var(--line)}
svg .stock{fill:var(--stock)}svg .patched{fill:var(--patched)}svg .whisker{stroke:var(--ink);fill:none}
svg .mad{stroke:var(--ink);stroke-width:4;opacity:.55}svg .value{font-weight:600}
.pass{color:var(--good);font-weight:600}.fail{color:var(--bad);font-weight:600}.soft{color:var(--soft)}
.key span{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 1em}
";

/// A page about some capsules, each with a label: charts, then what each holds. Nothing is loaded from elsewhere.
pub fn html(capsules: &[(String, Capsule)]) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>ZMLX measurements</title>\n<style>{STYLE}</style></head><body>\n\
         <h1>ZMLX measurements</h1>\n"
    );
    charts(&mut out, capsules);
    for (label, capsule) in capsules {
        section(&mut out, label, capsule);
    }
    out.push_str("</body></html>\n");
    out
}

/// Text made safe for HTML, between tags and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

fn charts(out: &mut String, capsules: &[(String, Capsule)]) {
    let bars_of = |of: fn(&ArmRecord) -> Spread| -> Vec<Bar> {
        let arms = capsules.iter().flat_map(|(label, c)| c.arms.iter().map(move |a| (label, a)));
        arms.map(|(label, arm)| Bar {
            label: if capsules.len() == 1 { arm.arm.to_string() } else { format!("{label} {}", arm.arm) },
            class: match arm.arm {
                Arm::Stock => "stock",
                Arm::Patched => "patched",
            },
            spread: of(arm),
        })
        .collect()
    };
    if capsules.iter().all(|(_, c)| c.arms.is_empty()) {
        out.push_str("<p class=\"soft\">No speeds are in these capsules.</p>\n");
        return;
    }
    out.push_str(
        "<p class=\"key\">Median of the runs; thin line: least to greatest, thick: median absolute deviation.\
         <span style=\"background:var(--stock)\"></span>stock<span style=\"background:var(--patched)\"></span>patched</p>\n",
    );
    for (title, of) in [("Decode", (|a| a.decode) as fn(&ArmRecord) -> Spread), ("Prefill", |a| a.prefill)] {
        let _ = writeln!(out, "<h2>{title}</h2>\n{}", bars(title, "tokens a second", &bars_of(of)));
    }
}

fn section(out: &mut String, label: &str, capsule: &Capsule) {
    let Capsule { model, machine, versions, settings, conditions, .. } = capsule;
    let _ = writeln!(out, "<h2>{}</h2>", escape(label));
    if let Some(fidelity) = &capsule.fidelity {
        let (class, word) = if fidelity.gate.passed { ("pass", "passed") } else { ("fail", "failed") };
        let _ = writeln!(out, "<p class=\"{class}\">Gate {word} as {}</p>", fidelity.class);
    }
    let kind = match capsule.kind {
        Kind::Bench => "bench",
        Kind::Validate => "validate",
    };
    let formats = model.quantization.iter().map(|q| match q.group_size {
        0 => format!("{} {}-bit", q.mode, q.bits),
        group => format!("{} {}-bit group {group}", q.mode, q.bits),
    });
    let prompts = capsule.prompts.iter().map(|p| format!("{} ({})", p.name, p.tokens));
    let load = |l: Option<[f64; 3]>| l.map_or_else(|| "unknown".to_owned(), |l| format!("{:.2}", l[0]));
    let unknown = || "unknown".to_owned();
    let facts = [
        ("Measured", format!("{kind}, {}", capsule.created)),
        ("Model", format!("{} ({}), {} on {}", model.name, model.family, model.dtype, model.device)),
        ("Weights", format!("{}, {}", bytes(model.file_bytes), formats.collect::<Vec<_>>().join(", "))),
        ("Content hash", model.hash.clone()),
        (
            "Machine",
            format!(
                "{}, {} cores, {}",
                machine.cpu.clone().unwrap_or_else(unknown),
                machine.cores,
                machine.os
            ),
        ),
        (
            "Versions",
            format!(
                "zmlx {}, commit {}, mlx {}",
                versions.zmlx,
                versions.commit,
                versions.mlx.clone().unwrap_or_else(unknown)
            ),
        ),
        ("Prompts (tokens)", prompts.collect::<Vec<_>>().join(", ")),
        (
            "Asked for",
            format!(
                "{} tokens, {} runs {}, preset {}",
                settings.max_tokens, settings.runs, settings.order, settings.preset
            ),
        ),
        ("Load", format!("{} before, {} after", load(conditions.load_before), load(conditions.load_after))),
    ];
    out.push_str("<div class=\"wide\"><table>\n");
    for (name, value) in facts {
        let _ = writeln!(out, "<tr><th>{name}</th><td>{}</td></tr>", escape(&value));
    }
    out.push_str("</table></div>\n");
    speeds(out, capsule);
    patterns(out, capsule);
    if let Some(found) = &capsule.fidelity {
        fidelity(out, found);
    }
    list(out, "Notes", capsule.notes.iter().chain(&conditions.notes));
}

fn speeds(out: &mut String, capsule: &Capsule) {
    if capsule.arms.is_empty() {
        return;
    }
    let head = [
        "arm",
        "prefill tok/s",
        "decode tok/s",
        "weights a token",
        "graph nodes",
        "launches",
        "peak memory",
        "bound",
    ];
    table_head(out, "Speeds", &head, 1..7);
    for arm in &capsule.arms {
        let spread = |s: &Spread| format!("{} ({}\u{2013}{})", speed(s.median), speed(s.min), speed(s.max));
        let cells = [
            arm.arm.to_string(),
            spread(&arm.prefill),
            spread(&arm.decode),
            bytes(arm.bytes_per_token),
            arm.graph_nodes.to_string(),
            arm.launches_per_token.map_or_else(|| "not counted".to_owned(), |n| n.to_string()),
            bytes(arm.peak_memory_bytes),
            arm.bound.as_ref().map_or_else(|| "not measured".to_owned(), bound_text),
        ];
        row(out, &cells, 1..7);
    }
    out.push_str("</table></div>\n");
    if let Some(gains) = &capsule.gains {
        let _ = writeln!(
            out,
            "<p>Patched over stock: prefill {}; decode {}.</p>",
            gain_text(&gains.prefill),
            gain_text(&gains.decode)
        );
    }
    if let Some(r) = &capsule.roofline {
        let _ = writeln!(
            out,
            "<p class=\"soft\">{} threads read {:.1} GB/s in this run ({:.1} to {:.1}).</p>",
            r.threads,
            r.bandwidth.median / 1e9,
            r.bandwidth.min / 1e9,
            r.bandwidth.max / 1e9
        );
    }
}

fn patterns(out: &mut String, capsule: &Capsule) {
    if capsule.patterns.is_empty() {
        return;
    }
    table_head(out, "Patterns", &["pattern", "class", "matched", "executed", "refused"], 2..4);
    for p in &capsule.patterns {
        let cells = [
            p.name.clone(),
            p.class.to_string(),
            p.matched.to_string(),
            p.executed.to_string(),
            p.refused.join("; "),
        ];
        row(out, &cells, 2..4);
    }
    out.push_str("</table></div>\n");
}

fn fidelity(out: &mut String, found: &Fidelity) {
    let head = ["prompt", "tokens", "equal", "top-1", "mean KL", "max |d|", "mean |d|", "first difference"];
    table_head(out, "Fidelity: patched from stock", &head, 1..7);
    for p in &found.prompts {
        let cells = [
            p.prompt.clone(),
            p.tokens.to_string(),
            p.equal.to_string(),
            format!("{:.2} %", 100.0 * p.logits.top1_agreement),
            small(p.logits.kl_mean),
            small(p.logits.max_abs),
            small(p.logits.mean_abs),
            first_difference(p),
        ];
        row(out, &cells, 1..7);
    }
    out.push_str("</table></div>\n");
    match &found.reference {
        Some(r) if r.stock_is_reference => {
            out.push_str("<p>Stock computes in float32 and is the reference.</p>\n");
        }
        Some(r) => {
            table_head(
                out,
                "Errors against float32",
                &["arm", "max |d|", "mean |d|", "mean KL", "top-1"],
                1..5,
            );
            for (arm, e) in [("stock", &r.stock), ("patched", &r.patched)] {
                let agreement = format!("{:.2} %", 100.0 * e.top1_agreement);
                row(
                    out,
                    &[arm.to_owned(), small(e.max_abs), small(e.mean_abs), small(e.kl_mean), agreement],
                    1..5,
                );
            }
            out.push_str("</table></div>\n");
        }
        None => {}
    }
    list(out, "Failures", found.gate.failures.iter());
    list(out, "Remarks", found.gate.remarks.iter());
}

/// Opens a table; the columns `numbers` are aligned as such.
fn table_head(out: &mut String, title: &str, head: &[&str], numbers: std::ops::Range<usize>) {
    let _ = write!(out, "<h3>{title}</h3>\n<div class=\"wide\"><table>\n<tr>");
    for (index, name) in head.iter().enumerate() {
        let class = if numbers.contains(&index) { " class=\"n\"" } else { "" };
        let _ = write!(out, "<th{class}>{name}</th>");
    }
    out.push_str("</tr>\n");
}

fn row(out: &mut String, cells: &[String], numbers: std::ops::Range<usize>) {
    out.push_str("<tr>");
    for (index, cell) in cells.iter().enumerate() {
        let class = if numbers.contains(&index) { " class=\"n\"" } else { "" };
        let _ = write!(out, "<td{class}>{}</td>", escape(cell));
    }
    out.push_str("</tr>\n");
}

fn list<'a>(out: &mut String, title: &str, items: impl Iterator<Item = &'a String>) {
    let items: String = items.map(|item| format!("<li>{}</li>\n", escape(item))).collect();
    if !items.is_empty() {
        let _ = write!(out, "<h3>{title}</h3>\n<ul>\n{items}</ul>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capsule::tests::sample;

    fn page() -> String {
        let mut bad = sample(&[3.0, 3.0, 3.0], &[5.0, 5.0, 5.0]);
        bad.model.name = "<script>alert(1)</script>".into();
        bad.notes.push("\" onload='x' <img src=x>".into());
        html(&[("a&b.json".into(), sample(&[10.0], &[20.0])), ("<b>".into(), bad)])
    }

    #[test]
    fn a_page_is_whole_and_loads_nothing() {
        let page = page();
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</body></html>\n"));
        for word in ["http", "src=", "@import", "url("] {
            assert!(!page.replace("src=x", "").contains(word), "{word}");
        }
        assert_eq!(page.matches("<svg").count(), 2);
        for tag in ["svg", "table", "tr", "td", "th", "ul", "li", "h2", "h3", "div", "p", "g", "text"] {
            let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
            let with = format!("<{tag} ");
            let opened = page.matches(&open).count() + page.matches(&with).count();
            assert_eq!(opened, page.matches(&close).count(), "{tag}");
        }
    }

    #[test]
    fn text_from_capsules_cannot_become_markup() {
        let page = page();
        assert!(!page.contains("<script") && !page.contains("<img") && !page.contains("<b>"));
        assert!(page.contains("&lt;script&gt;") && page.contains("a&amp;b.json"));
    }

    #[test]
    fn capsules_without_speeds_have_no_charts() {
        let mut capsule = sample(&[1.0], &[1.0]);
        capsule.arms.clear();
        capsule.gains = None;
        let page = html(&[("a".into(), capsule)]);
        assert!(!page.contains("<svg") && page.contains("No speeds") && page.contains("Gate passed"));
    }
}
