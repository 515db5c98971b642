//! The choice with made-up times.

use super::*;

/// Speed is 100, times each pattern's factor, times a factor for pairs; a pattern may need another to match.
struct Pretend {
    factors: Vec<(&'static str, f64)>,
    needs: Vec<(&'static str, &'static str)>,
    /// Relative noise, alternating.
    noise: f64,
    calls: usize,
}

impl Pretend {
    fn new(factors: &[(&'static str, f64)]) -> Self {
        Self { factors: factors.to_vec(), needs: Vec::new(), noise: 0.0, calls: 0 }
    }

    fn names(&self) -> Vec<String> {
        self.factors.iter().map(|(name, _)| (*name).to_owned()).collect()
    }

    fn runs(&self, name: &str, patterns: &[String]) -> bool {
        let has = |name: &str| patterns.iter().any(|p| p == name);
        has(name) && self.needs.iter().all(|(user, needed)| *user != name || has(needed))
    }

    fn choose(mut self) -> SmartReport {
        let full = self.names();
        choose(&mut self, full, 5, &mut |_| {}).unwrap()
    }
}

impl Speed for Pretend {
    fn decode(&mut self, patterns: &[String]) -> Result<f64, LabError> {
        self.calls += 1;
        // A machine that slows down while it is measured, and a noise that no two neighbours share.
        let drift = 1.0 - 1e-4 * self.calls as f64;
        let noise = 1.0 + self.noise * [0.0, 1.0, -1.0, 0.5, -0.7][self.calls * 7 % 5];
        let active = self.factors.iter().filter(|(name, _)| self.runs(name, patterns));
        Ok(active.map(|(_, factor)| factor).product::<f64>() * 100.0 * drift * noise)
    }

    fn matched(&mut self, patterns: &[String]) -> Result<BTreeMap<String, usize>, LabError> {
        Ok(patterns.iter().map(|p| (p.clone(), usize::from(self.runs(p, patterns)) * 3)).collect())
    }
}

fn row<'a>(report: &'a SmartReport, name: &str) -> &'a SmartRow {
    report.rows.iter().find(|r| r.name == name).unwrap()
}

#[test]
fn what_helps_stays_and_what_hurts_or_does_nothing_goes() {
    let report = Pretend::new(&[("a", 1.3), ("b", 0.8), ("c", 1.001), ("d", 1.1)]).choose();
    assert_eq!(report.chosen, ["a", "d"]);
    assert!(report.over_full.ratio > 1.2 && report.over_stock.ratio > 1.4, "{report}");
    assert!((row(&report, "a").gain.ratio - 1.3).abs() < 0.01 && row(&report, "a").matched == 3);
    assert!(report.to_string().contains("2 of 4 patterns"), "{report}");
}

#[test]
fn gains_within_the_noise_do_not_count() {
    let noisy = |factor| {
        let mut speed = Pretend::new(&[("a", 2.0), ("b", factor)]);
        speed.noise = 0.05;
        speed.choose()
    };
    assert_eq!(noisy(1.02).chosen, ["a"]);
    assert_eq!(noisy(1.6).chosen, ["a", "b"]);
}

#[test]
fn patterns_that_need_each_other_stay_or_go_together() {
    // The router alone costs a little, the experts that need it gain much.
    let mut speed = Pretend::new(&[("router", 0.98), ("moe", 1.5), ("x", 0.9)]);
    speed.needs = vec![("moe", "router")];
    let report = speed.choose();
    assert_eq!(report.chosen, ["router", "moe"]);
    assert_eq!(row(&report, "router").needed_by, ["moe"]);

    let mut speed = Pretend::new(&[("router", 0.7), ("moe", 1.2), ("x", 1.4)]);
    speed.needs = vec![("moe", "router")];
    let report = speed.choose();
    // Together the two cost more than they gain, so that neither is worth having.
    assert!(row(&report, "router").gain.ratio < 0.85 && row(&report, "moe").gain.ratio > 1.15);
    assert_eq!(report.chosen, ["x"], "{report}");
    assert!(row(&report, "moe").why.contains("router"));
}

#[test]
fn where_nothing_helps_stock_is_taken() {
    let report = Pretend::new(&[("a", 0.9), ("b", 1.0)]).choose();
    assert!(report.chosen.is_empty(), "{report}");
    assert!(report.speed.median > 95.0);
}

#[test]
fn a_choice_is_kept_and_found_again_for_this_model_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (model, other, store_at) =
        (folder.path().join("m.gguf"), folder.path().join("n.gguf"), folder.path().join("store"));
    std::fs::write(&model, "one").unwrap();
    std::fs::write(&other, "two").unwrap();
    let report = Pretend::new(&[("router", 1.3), ("moe_mlp", 0.8)]).choose();
    let missing = smart_choice(&model, Some(2), Some(&store_at)).unwrap_err();
    assert!(matches!(missing, LabError::NotMeasured { .. }));
    assert!(missing.to_string().contains("zmlx lab smart-patch"), "{missing}");

    let decided = decision(key(&model, Some(2)).unwrap(), &report);
    decided.validate().unwrap();
    store(Some(&store_at)).unwrap().put(&decided).unwrap();
    let found = smart_choice(&model, Some(2), Some(&store_at)).unwrap();
    assert_eq!((found.patterns, found.threads), (Some(vec!["router".to_owned()]), Some(2)));
    for (path, threads) in [(&other, Some(2)), (&model, Some(1))] {
        assert!(smart_choice(path, threads, Some(&store_at)).is_err(), "{threads:?}");
    }
    // All kept, or none.
    for factors in [[("a", 1.3), ("b", 1.2)], [("a", 0.5), ("b", 0.9)]] {
        decision(key(&model, None).unwrap(), &Pretend::new(&factors).choose()).validate().unwrap();
    }
}
