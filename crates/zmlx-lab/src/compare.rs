//! One capsule against another.

use serde::Serialize;

use crate::arms::Arm;
use crate::capsule::{ArmRecord, Capsule};
use crate::stats::Gain;

/// Two capsules side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// What was compared.
    pub rows: Vec<Row>,
    /// Why the two may not be comparable.
    pub warnings: Vec<String>,
}

/// A speed of both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Which one, such as `stock decode`.
    pub what: String,
    /// The old median: tokens a second, or a ratio.
    pub old: f64,
    /// The new one.
    pub new: f64,
    /// New over old, and whether that is more than noise.
    pub gain: Gain,
}

/// Compares arm by arm, and where both capsules have both arms, patched over stock: that ratio is the better measure, since
/// the machine's mood slows both arms of a capsule alike.
pub fn compare(old: &Capsule, new: &Capsule) -> Comparison {
    let mut rows = Vec::new();
    for arm in [Arm::Stock, Arm::Patched] {
        let Some((a, b)) = old.arm(arm).zip(new.arm(arm)) else { continue };
        rows.extend(row(arm, "prefill", a, b, ArmRecord::prefill_runs));
        rows.extend(row(arm, "decode", a, b, ArmRecord::decode_runs));
    }
    if let Some((a, b)) = old.gains.zip(new.gains) {
        let runs = old.settings.runs.min(new.settings.runs) as usize;
        for (what, a, b) in [("prefill", a.prefill, b.prefill), ("decode", a.decode, b.decode)] {
            let what = format!("patched / stock {what}");
            rows.push(Row { what, old: a.ratio, new: b.ratio, gain: b.over(a, runs) });
        }
    }
    Comparison { warnings: warnings(old, new, rows.is_empty()), rows }
}

fn row(arm: Arm, what: &str, a: &ArmRecord, b: &ArmRecord, of: fn(&ArmRecord) -> Vec<f64>) -> Option<Row> {
    let (a, b) = (of(a), of(b));
    let gain = Gain::unpaired(&a, &b)?;
    let (old, new) = (crate::stats::median(&a)?, crate::stats::median(&b)?);
    Some(Row { what: format!("{arm} {what}"), old, new, gain })
}

fn warnings(old: &Capsule, new: &Capsule, empty: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut differ = |what: &str, a: String, b: String| {
        if a != b {
            warnings.push(format!("{what} differs: {a} and {b}"));
        }
    };
    let cpu = |c: &Capsule| c.machine.cpu.clone().unwrap_or_else(|| "unknown".to_owned());
    differ("the processor", cpu(old), cpu(new));
    differ("the number of cores", old.machine.cores.to_string(), new.machine.cores.to_string());
    differ("the model", old.model.hash.clone(), new.model.hash.clone());
    differ("the device", old.model.device.clone(), new.model.device.clone());
    differ("the dtype", old.model.dtype.clone(), new.model.dtype.clone());
    let mlx = |c: &Capsule| c.versions.mlx.clone().unwrap_or_else(|| "unknown".to_owned());
    differ("the version of MLX", mlx(old), mlx(new));
    differ("the preset", old.settings.preset.clone(), new.settings.preset.clone());
    let tokens = |c: &Capsule| {
        let prompts: Vec<String> = c.prompts.iter().map(|p| p.tokens.to_string()).collect();
        format!("prompts of {} and {} generated", prompts.join("+"), c.settings.max_tokens)
    };
    differ("the number of tokens", tokens(old), tokens(new));
    let threads = |c: &Capsule| c.settings.threads.map_or_else(|| "default".to_owned(), |n| n.to_string());
    differ("the number of threads", threads(old), threads(new));
    for (which, capsule) in [("old", old), ("new", new)] {
        warnings.extend(capsule.conditions.notes.iter().map(|note| format!("the {which} one: {note}")));
    }
    if let Some((a, b)) = old.roofline.as_ref().zip(new.roofline.as_ref()) {
        let ratio = b.bandwidth.median / a.bandwidth.median;
        if !(0.9..=1.1).contains(&ratio) {
            warnings.push(format!(
                "the machine read {:.1} GB/s then and {:.1} GB/s now: speeds of one arm follow it, patched / stock does not",
                a.bandwidth.median / 1e9,
                b.bandwidth.median / 1e9
            ));
        }
    }
    if empty {
        warnings.push("they have no arm in common, so there is nothing to compare".to_owned());
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capsule::tests::sample;
    use crate::stats::GainKind;

    const STOCK: [f64; 5] = [10.0, 10.1, 9.9, 10.05, 9.95];

    fn times(factor: f64) -> [f64; 5] {
        STOCK.map(|v| v * factor)
    }

    fn kind(comparison: &Comparison, what: &str) -> GainKind {
        comparison.rows.iter().find(|r| r.what == what).unwrap().gain.kind
    }

    #[test]
    fn a_capsule_against_itself_is_noise() {
        let capsule = sample(&STOCK, &times(2.0));
        let comparison = compare(&capsule, &capsule);
        assert_eq!(comparison.rows.len(), 6);
        assert!(comparison.rows.iter().all(|r| r.gain.kind == GainKind::Noise && r.gain.ratio == 1.0));
        assert_eq!(comparison.warnings, Vec::<String>::new());
    }

    #[test]
    fn gains_beyond_noise_are_seen_and_those_within_are_not() {
        let old = sample(&STOCK, &times(2.0));
        let comparison = compare(&old, &sample(&STOCK, &times(2.4)));
        assert_eq!(kind(&comparison, "patched decode"), GainKind::Faster);
        assert_eq!(kind(&comparison, "patched / stock decode"), GainKind::Faster);
        assert_eq!(kind(&comparison, "stock decode"), GainKind::Noise);
        let comparison = compare(&old, &sample(&STOCK, &times(2.008)));
        assert_eq!(kind(&comparison, "patched decode"), GainKind::Noise);
    }

    #[test]
    fn a_slower_machine_shows_in_the_arms_and_not_in_the_ratio() {
        let comparison = compare(&sample(&STOCK, &times(2.0)), &sample(&times(0.7), &times(1.4)));
        assert_eq!(kind(&comparison, "patched decode"), GainKind::Slower);
        assert_eq!(kind(&comparison, "patched / stock decode"), GainKind::Noise);
    }

    #[test]
    fn two_runs_tell_nothing() {
        let comparison = compare(&sample(&[1.0, 1.0], &[1.0, 1.0]), &sample(&[1.0, 1.0], &[9.0, 9.0]));
        assert!(comparison.rows.iter().all(|r| r.gain.kind == GainKind::Noise));
    }

    #[test]
    fn what_makes_them_incomparable_is_said() {
        let old = sample(&STOCK, &STOCK);
        let mut new = old.clone();
        new.machine.cpu = Some("Apple M2".into());
        new.model.hash = "zmlx-sample-v1:11".into();
        new.settings.max_tokens = 9;
        new.conditions.notes.push("busy".into());
        if let Some(roofline) = &mut new.roofline {
            roofline.bandwidth.median *= 2.0;
        }
        let warnings = compare(&old, &new).warnings.join("\n");
        for word in ["Apple M2", "the model differs", "9 generated", "the new one: busy", "52.0 GB/s now"] {
            assert!(warnings.contains(word), "no '{word}' in:\n{warnings}");
        }
        let mut none = old.clone();
        none.arms.clear();
        none.gains = None;
        assert!(compare(&old, &none).warnings[0].contains("nothing to compare"));
    }
}
