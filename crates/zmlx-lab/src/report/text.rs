use std::fmt::Write;

use super::{bound_text, bytes, gain_text, plain, speed};
use crate::capsule::{ArmRecord, Capsule, Kind};
use crate::compare::Comparison;
use crate::fidelity::{EXCUSED_BELOW, Fidelity, PromptFidelity};
use crate::stats::Spread;

/// The report of a capsule, several lines.
pub fn text(capsule: &Capsule) -> String {
    let mut out = String::new();
    head(&mut out, capsule);
    speeds(&mut out, capsule);
    patterns(&mut out, capsule);
    if let Some(fidelity) = &capsule.fidelity {
        self::fidelity(&mut out, fidelity);
    }
    for note in capsule.notes.iter().chain(&capsule.conditions.notes) {
        line(&mut out, "note", &plain(note));
    }
    if let Some(fidelity) = &capsule.fidelity {
        verdict(&mut out, fidelity);
    }
    out
}

/// Two capsules side by side.
pub fn comparison(comparison: &Comparison) -> String {
    let mut out = String::new();
    if !comparison.rows.is_empty() {
        let _ = writeln!(out, "{:24} {:>10} {:>10}  change", "", "old", "new");
    }
    for row in &comparison.rows {
        let what = plain(&row.what);
        let _ = writeln!(
            out,
            "{what:24} {:>10} {:>10}  {}",
            speed(row.old),
            speed(row.new),
            gain_text(&row.gain)
        );
    }
    for warning in &comparison.warnings {
        line(&mut out, "note", &plain(warning));
    }
    out
}

/// Writing to a String cannot fail.
fn line(out: &mut String, name: &str, value: &str) {
    let _ = writeln!(out, "{name:<10}{value}");
}

fn head(out: &mut String, capsule: &Capsule) {
    let Capsule { model, machine, versions, settings, .. } = capsule;
    let kind = match capsule.kind {
        Kind::Bench => "bench",
        Kind::Validate => "validate",
    };
    line(
        out,
        kind,
        &plain(&format!("{} ({}, {} on {})", model.name, model.family, model.dtype, model.device)),
    );
    line(out, "when", &plain(&capsule.created));
    let cpu = machine.cpu.as_deref().unwrap_or("unknown processor");
    let memory = machine.memory_bytes.map_or_else(String::new, |n| format!(", {}", bytes(n)));
    line(out, "machine", &plain(&format!("{cpu}, {} cores{memory}, {}", machine.cores, machine.os)));
    let mlx = versions.mlx.as_deref().unwrap_or("none");
    line(out, "versions", &plain(&format!("zmlx {} ({}), mlx {mlx}", versions.zmlx, versions.commit)));
    let prompts: Vec<String> = capsule.prompts.iter().map(|p| format!("{} {}", p.name, p.tokens)).collect();
    let tokens = format!(
        "{} generated after each prompt (tokens: {}); {} runs, {}",
        settings.max_tokens,
        prompts.join(", "),
        settings.runs,
        settings.order
    );
    line(out, "tokens", &plain(&tokens));
    let before =
        capsule.conditions.load_before.map_or_else(|| "unknown".to_owned(), |l| format!("{:.2}", l[0]));
    let after =
        capsule.conditions.load_after.map_or_else(|| "unknown".to_owned(), |l| format!("{:.2}", l[0]));
    let mut state = format!("{before} before, {after} after, {:.0} s of timing", capsule.conditions.seconds);
    if let Some(foreign) = capsule.conditions.foreign_cores {
        let _ = write!(state, ", {foreign:.2} cores used by others");
    }
    line(out, "load", &state);
}

fn speeds(out: &mut String, capsule: &Capsule) {
    if capsule.arms.is_empty() {
        return;
    }
    let _ = writeln!(
        out,
        "\n{:10}{:>34} {:>34} {:>10} {:>10}",
        "tok/s", "prefill median (min..max, MAD)", "decode median (min..max, MAD)", "weights", "memory"
    );
    for arm in &capsule.arms {
        let ArmRecord { prefill, decode, .. } = arm;
        let _ = writeln!(
            out,
            "{:10}{:>34} {:>34} {:>10} {:>10}",
            arm.arm,
            spread(prefill),
            spread(decode),
            bytes(arm.bytes_per_token),
            bytes(arm.peak_memory_bytes)
        );
    }
    if let Some(peak) = capsule.arms.iter().filter_map(|arm| arm.resident_peak_bytes).max() {
        line(out, "resident", &format!("{} at most, the process with all that it measured", bytes(peak)));
    }
    if let Some(gains) = &capsule.gains {
        let gains = format!("prefill {}; decode {}", gain_text(&gains.prefill), gain_text(&gains.decode));
        line(out, "gain", &gains);
    }
    if let Some(roofline) = &capsule.roofline {
        let Spread { median, min, max, .. } = roofline.bandwidth;
        let text = format!(
            "{:.1} GB/s read by {} threads ({:.1}..{:.1}, {} probes in this run)",
            median / 1e9,
            roofline.threads,
            min / 1e9,
            max / 1e9,
            roofline.probes.len()
        );
        line(out, "memory", &text);
    }
    for arm in &capsule.arms {
        let bound = arm.bound.as_ref().map_or_else(|| "bandwidth not measured".to_owned(), bound_text);
        let launches = arm.launches_per_token.map_or_else(String::new, |n| format!(", {n} launches"));
        line(
            out,
            "roofline",
            &format!("{}: {bound}; {} graph nodes{launches} a token", arm.arm, arm.graph_nodes),
        );
    }
}

fn spread(s: &Spread) -> String {
    format!("{} ({}..{}, {})", speed(s.median), speed(s.min), speed(s.max), speed(s.mad))
}

fn patterns(out: &mut String, capsule: &Capsule) {
    if capsule.patterns.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{:24} {:16} {:>8} {:>10}  refused", "pattern", "class", "matched", "executed");
    for p in &capsule.patterns {
        let refused = match &p.refused[..] {
            [] => "-".to_owned(),
            [one] => plain(one),
            [first, rest @ ..] => format!("{} (and {} more)", plain(first), rest.len()),
        };
        let _ = writeln!(
            out,
            "{:24} {:16} {:>8} {:>10}  {refused}",
            plain(&p.name),
            p.class,
            p.matched,
            p.executed
        );
    }
}

fn fidelity(out: &mut String, found: &Fidelity) {
    let _ = writeln!(
        out,
        "\n{:16} {:>7} {:>7} {:>8} {:>10} {:>10} {:>10}  first difference",
        "prompt", "tokens", "equal", "top-1", "mean KL", "max |d|", "mean |d|"
    );
    for p in &found.prompts {
        let _ = writeln!(
            out,
            "{:16} {:>7} {:>7} {:>7.2}% {:>10} {:>10} {:>10}  {}",
            plain(&p.prompt),
            p.tokens,
            p.equal,
            100.0 * p.logits.top1_agreement,
            small(p.logits.kl_mean),
            small(p.logits.max_abs),
            small(p.logits.mean_abs),
            first_difference(p)
        );
    }
    let Some(reference) = &found.reference else { return };
    if reference.stock_is_reference {
        line(
            out,
            "float32",
            "stock computes in float32 already and is the reference; patched differs from it as above",
        );
        return;
    }
    for (arm, errors) in [("stock", &reference.stock), ("patched", &reference.patched)] {
        let text = format!(
            "{arm} is off by up to {}, {} on average, mean KL {}",
            small(errors.max_abs),
            small(errors.mean_abs),
            small(errors.kl_mean)
        );
        line(out, "float32", &text);
    }
}

pub(super) fn first_difference(p: &PromptFidelity) -> String {
    match (&p.divergence, p.length_differs) {
        (Some(flip), _) => flip.to_string(),
        (None, true) => "the lengths differ".to_owned(),
        (None, false) => "none".to_owned(),
    }
}

/// A difference: 0 as 0, small ones in powers of ten.
pub(super) fn small(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        v if v >= 0.01 => format!("{v:.3}"),
        v => format!("{v:.1e}"),
    }
}

fn verdict(out: &mut String, found: &Fidelity) {
    for remark in &found.gate.remarks {
        line(out, "remark", &plain(remark));
    }
    for failure in &found.gate.failures {
        line(out, "failure", &plain(failure));
    }
    let tokens: u64 = found.prompts.iter().map(|p| p.tokens).sum();
    let equal: u64 = found.prompts.iter().map(|p| p.equal).sum();
    let excused = found.logits.flips.iter().filter(|f| f.excused).count();
    let verdict = if found.gate.passed { "PASS" } else { "FAIL" };
    let text = format!(
        "{verdict} as {}: {equal} of {tokens} greedy tokens equal, {} flips under teacher forcing ({excused} excused, margin under {EXCUSED_BELOW:e})",
        found.class,
        found.logits.flips.len()
    );
    line(out, "gate", &text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capsule::tests::sample;
    use crate::compare::compare;

    #[test]
    fn a_report_says_what_matters() {
        let capsule = sample(&[10.0, 10.1, 9.9], &[20.0, 20.4, 19.8]);
        let text = text(&capsule);
        for word in [
            "validate  lfm2 (lfm2_moe, float32 on cpu)",
            "AMD EPYC, 2 cores",
            "10.0 (9.90..10.1, 0.10)",
            "decode 2.00x, faster",
            "26.0 GB/s read by 2 threads",
            "stock: 50.0 % of the read bandwidth",
            "swiglu_mlp",
            "token-identical",
            "gate      PASS as token-identical: 128 of 128 greedy tokens equal",
        ] {
            assert!(text.contains(word), "no '{word}' in:\n{text}");
        }
        assert!(!text.contains("FAIL"));
    }

    #[test]
    fn a_failure_is_the_last_thing_said() {
        let mut capsule = sample(&[1.0], &[1.0]);
        let found = capsule.fidelity.as_mut().unwrap();
        found.gate.passed = false;
        found.gate.failures = vec!["short:\x1b[31m tokens part".into()];
        capsule.arms.clear();
        let text = text(&capsule);
        assert!(text.contains("failure   short: [31m tokens part\n"), "{text}");
        assert!(text.trim_end().lines().last().unwrap().contains("FAIL"));
        assert!(!text.contains("tok/s"), "no speeds, no table");
    }

    #[test]
    fn comparisons_say_noise() {
        let capsule = sample(&[1.0, 1.0, 1.0], &[1.0, 1.0, 1.0]);
        let text = comparison(&compare(&capsule, &capsule));
        assert_eq!(text.matches("within noise").count(), 6, "{text}");
    }
}
