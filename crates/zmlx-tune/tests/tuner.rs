//! The tuner with a dummy backend: scripted times, noise, failing, lying and impossibly fast candidates.

use std::time::Duration;
use zmlx_tune::{Backend, Candidate, Decision, Ended, Key, Outcome, Sample, Settings, TuneError, tune};

/// Seconds a run, from the candidate's `id` and how many timed calls it has had before.
type Script = Box<dyn FnMut(i64, usize) -> Result<f64, String>>;

struct Dummy {
    script: Script,
    /// `id` and iterations of every call, in order.
    calls: Vec<(i64, u32)>,
    /// Candidates whose output is wrong, and whose check fails.
    wrong: Vec<i64>,
    check_fails: Vec<i64>,
    checked: Vec<i64>,
    /// Asks to stop once this many calls were made.
    stop_after: usize,
}

impl Dummy {
    fn new(script: impl FnMut(i64, usize) -> Result<f64, String> + 'static) -> Self {
        let none = Vec::new;
        Self {
            script: Box::new(script),
            calls: Vec::new(),
            wrong: none(),
            check_fails: none(),
            checked: none(),
            stop_after: usize::MAX,
        }
    }

    /// Each candidate always takes `times[id]` seconds.
    fn constant(times: &'static [f64]) -> Self {
        Self::new(|id, _| Ok(times[id as usize]))
    }

    fn calls_of(&self, id: i64) -> usize {
        self.calls.iter().filter(|call| call.0 == id).count()
    }
}

impl Backend for Dummy {
    type Error = String;

    fn run(&mut self, c: &Candidate, iterations: u32) -> Result<Sample, String> {
        let id = c.get("id").ok_or("no id")?;
        let before = self.calls_of(id);
        self.calls.push((id, iterations));
        (self.script)(id, before).map(|each| Sample { seconds: each * f64::from(iterations) })
    }

    fn check(&mut self, c: &Candidate) -> Result<bool, String> {
        let id = c.get("id").ok_or("no id")?;
        self.checked.push(id);
        if self.check_fails.contains(&id) {
            return Err("check broke".into());
        }
        Ok(!self.wrong.contains(&id))
    }

    fn stop(&mut self) -> bool {
        self.calls.len() >= self.stop_after
    }
}

fn id(n: i64) -> Candidate {
    Candidate::from([("id", n)])
}

fn key() -> Key {
    Key::new("dummy", "test 1", "mish", "abc", "f32 n=1024")
}

/// Tunes candidate 0 as the default against 1 to `others`.
fn race(
    others: i64,
    bound: Option<f64>,
    settings: &Settings,
    dummy: &mut Dummy,
) -> Result<Decision, TuneError> {
    let candidates: Vec<Candidate> = (1..=others).map(id).collect();
    tune(&key(), &id(0), &candidates, bound, settings, dummy)
}

fn outcomes(decision: &Decision) -> Vec<Outcome> {
    decision.evidence.iter().map(|trial| trial.outcome.clone()).collect()
}

/// Uniform in 0 to 1, the same on every run.
fn noise(seed: &mut u64) -> f64 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*seed >> 11) as f64 / (1u64 << 53) as f64
}

#[test]
fn the_fastest_wins_and_evidence_says_why() {
    let mut dummy = Dummy::constant(&[1e-5, 0.8e-5, 0.5e-5, 1.5e-5, 0.99e-5, 9e-5]);
    let decision = race(5, None, &Settings::default(), &mut dummy).unwrap();
    assert_eq!(decision.choice, id(2));
    assert_eq!(decision.default, id(0));
    assert_eq!(decision.gain, 2.0);
    use Outcome::{Chosen, Eliminated, Slower, WithinNoise};
    assert_eq!(outcomes(&decision), [Slower, Slower, Chosen, Eliminated, WithinNoise, Eliminated]);
    assert_eq!((decision.rounds, decision.ended), (25, Ended::AllRounds));
    assert_eq!(decision.evidence[2].samples, 25);
    assert_eq!(decision.evidence[3].samples, 5, "dropped after min_samples");
    assert_eq!(decision.evidence[5].samples, 2, "dropped before the rounds");
    assert_eq!(decision.validate(), Ok(()));
    assert_eq!(dummy.checked, [1, 2, 3, 4, 5], "all but the default");
}

#[test]
fn same_samples_same_runs_whatever_the_wall_clock() {
    let script = || {
        let mut seed = 11;
        Dummy::new(move |id, _| Ok((1.0 + id as f64 / 10.0) * 1e-5 * (1.0 + 0.1 * noise(&mut seed))))
    };
    let (mut first, mut second) = (script(), script());
    let one = race(6, None, &Settings::default(), &mut first).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let two = race(6, None, &Settings::default(), &mut second).unwrap();
    assert_eq!(first.calls, second.calls);
    assert_eq!(one, Decision { when: one.when, ..two });
    let mut other_seed = script();
    race(6, None, &Settings { seed: 1, ..Settings::default() }, &mut other_seed).unwrap();
    assert_ne!(first.calls, other_seed.calls, "the seed sets the order");
}

#[test]
fn every_round_holds_all_that_are_left_in_changing_order() {
    let settings = Settings { max_samples: 8, ..Settings::default() };
    let mut dummy = Dummy::constant(&[1e-5, 0.9e-5, 1.1e-5, 1.2e-5]);
    let decision = race(3, None, &settings, &mut dummy).unwrap();
    let rounds = &dummy.calls[dummy.calls.len() - 32..];
    let mut orders = std::collections::BTreeSet::new();
    for round in rounds.chunks(4) {
        let order: Vec<i64> = round.iter().map(|call| call.0).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3]);
        assert!(round.iter().all(|call| call.1 == decision.iterations));
        orders.insert(order);
    }
    assert!(orders.len() > 3, "{orders:?}");
}

#[test]
fn samples_are_made_long_enough() {
    // 500 us wanted: (seconds a run, runs in a sample)
    for (each, expected) in [(1e-3, 1), (5e-4, 1), (1e-4, 5), (1e-9, 65536)] {
        let decision = race(0, None, &Settings::default(), &mut Dummy::new(move |_, _| Ok(each))).unwrap();
        assert_eq!(decision.iterations, expected, "{each}");
        assert_eq!(decision.evidence[0].median, Some(each), "seconds of one run");
    }
    // A hiccup in one of the first samples does not pass for a long sample.
    let mut dummy = Dummy::new(|_, call| Ok(if call == 1 { 1.0 } else { 1e-4 }));
    assert_eq!(race(0, None, &Settings::default(), &mut dummy).unwrap().iterations, 5);
}

#[test]
fn noise_alone_hardly_ever_moves_the_choice() {
    let mut moved = 0;
    for start in 0..200 {
        let mut seed = start;
        let mut dummy = Dummy::new(move |_, _| Ok(1e-4 * (1.0 + 0.3 * noise(&mut seed))));
        let settings = Settings { seed: start, noise: 0.0, ..Settings::default() };
        let decision = race(8, None, &settings, &mut dummy).unwrap();
        moved += u32::from(decision.choice != id(0));
    }
    // Without the rule of standard errors 168 of the 200 move: the best of eight equal ones looks fast.
    assert!(moved <= 4, "{moved} of 200 moved");
}

#[test]
fn a_real_gain_is_found_under_noise() {
    let mut found = 0;
    for start in 0..100 {
        let mut seed = start;
        let mut dummy =
            Dummy::new(move |id, _| Ok(if id == 3 { 0.8e-4 } else { 1e-4 } * (1.0 + 0.3 * noise(&mut seed))));
        let decision = race(5, None, &Settings { seed: start, ..Settings::default() }, &mut dummy).unwrap();
        found += u32::from(decision.choice == id(3));
    }
    assert!(found >= 95, "{found} of 100");
}

#[test]
fn drift_does_not_pick_a_winner() {
    // The device gets 1 % slower with every call: whoever ran first in a fixed order would look best.
    for seed in 0..50 {
        let mut calls = 0;
        let mut dummy = Dummy::new(move |_, _| {
            calls += 1;
            Ok(1e-3 * 1.01_f64.powi(calls))
        });
        let settings = Settings { seed, budget: Duration::from_secs(3600), ..Settings::default() };
        let decision = race(4, None, &settings, &mut dummy).unwrap();
        assert_eq!(decision.choice, id(0), "seed {seed}\n{decision}");
    }
}

#[test]
fn a_gain_below_the_noise_setting_leaves_the_default() {
    for (noise, expected) in [(0.05, 0), (0.03, 1)] {
        let settings = Settings { noise, ..Settings::default() };
        let decision = race(1, None, &settings, &mut Dummy::constant(&[1.04e-4, 1e-4])).unwrap();
        assert_eq!(decision.choice, id(expected), "noise {noise}");
        if expected == 0 {
            assert_eq!(decision.gain, 1.0);
            assert_eq!(outcomes(&decision), [Outcome::Chosen, Outcome::WithinNoise]);
        }
    }
}

#[test]
fn failures_are_kept_with_their_message() {
    let mut dummy = Dummy::new(|id, call| match (id, call) {
        (1, _) => Err("asked 2048 threads, the device has 1024".into()),
        (2, 6..) => Err("lost the device".into()),
        (3, _) => Err("x".repeat(100_000) + "é"),
        (6, 1..) => Ok(f64::NAN),
        (7, 1..) => Ok(-1.0),
        (8, 1..) => Ok(0.0),
        _ => Ok(1e-4 / (1.0 + id as f64)),
    });
    dummy.wrong = vec![4];
    dummy.check_fails = vec![5];
    let decision = race(9, None, &Settings::default(), &mut dummy).unwrap();
    let found = outcomes(&decision);
    assert_eq!(found[1], Outcome::Failed("asked 2048 threads, the device has 1024".into()));
    assert_eq!(found[2], Outcome::Failed("lost the device".into()));
    assert_eq!(decision.evidence[2].samples, 3, "what was measured before the failure stays");
    assert!(
        matches!(&found[3], Outcome::Failed(m) if m.len() < 2100 && m.ends_with("(100002 bytes in all)"))
    );
    assert_eq!(found[4], Outcome::WrongResult);
    assert_eq!(found[5], Outcome::Failed("check broke".into()));
    assert!(matches!(&found[6], Outcome::Failed(m) if m.contains("NaN")), "{:?}", found[6]);
    assert!(matches!(&found[7], Outcome::Failed(m) if m.contains("-")), "{:?}", found[7]);
    assert!(matches!(&found[8], Outcome::Failed(m) if m.contains("took 0 s")), "{:?}", found[8]);
    assert_eq!(decision.choice, id(9), "the fastest that works");
    assert_eq!(dummy.calls_of(4) + dummy.calls_of(5), 0, "what is wrong is not timed");
    assert!(decision.to_string().contains("asked 2048 threads"), "{decision}");
}

#[test]
fn too_fast_to_be_true() {
    let times = &[1e-4, 0.5e-4, 1e-6];
    let decision = race(2, Some(2e-5), &Settings::default(), &mut Dummy::constant(times)).unwrap();
    assert_eq!(decision.choice, id(1));
    assert_eq!(outcomes(&decision)[2], Outcome::Unbelievable(1e-6));
    // A single impossible sample is enough: no noise is faster than the hardware.
    let mut once =
        Dummy::new(|id, call| Ok(if (id, call) == (2, 9) { 1e-6 } else { 1e-4 / (id + 1) as f64 }));
    let decision = race(2, Some(2e-5), &Settings::default(), &mut once).unwrap();
    assert_eq!((decision.choice.clone(), &outcomes(&decision)[2]), (id(1), &Outcome::Unbelievable(1e-6)));
    // The default cannot be unbelievable: then the bound is wrong.
    let wrong = race(1, Some(2e-4), &Settings::default(), &mut Dummy::constant(times));
    assert_eq!(wrong, Err(TuneError::DefaultUnbelievable { seconds: 1e-4, bound: 2e-4 }));
    for bound in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let refused = race(1, Some(bound), &Settings::default(), &mut Dummy::constant(times));
        assert!(matches!(refused, Err(TuneError::Bound(_))), "{bound}");
    }
}

#[test]
fn a_failing_default_is_an_error() {
    let stages: [(usize, &str); 3] = [(0, "warm-up"), (1, "calibration"), (5, "rounds")];
    for (fails_at, expected) in stages {
        let mut dummy =
            Dummy::new(move |id, call| if (id, call) == (0, fails_at) { Err("no".into()) } else { Ok(1e-3) });
        let result = race(2, None, &Settings::default(), &mut dummy);
        let Err(TuneError::Default { candidate, stage, message }) = result else { panic!("{result:?}") };
        assert_eq!((candidate, stage, message.as_str()), (id(0), expected, "no"));
    }
    let zero = race(1, None, &Settings::default(), &mut Dummy::new(|_, _| Ok(0.0)));
    assert!(matches!(zero, Err(TuneError::Default { stage: "rounds", .. })), "{zero:?}");
}

#[test]
fn hopeless_candidates_cost_little() {
    // A sample of the default is 50 runs of 10 us; 50 runs of the other would take 50 s.
    let mut dummy = Dummy::constant(&[1e-5, 1.0]);
    let decision = race(1, None, &Settings::default(), &mut dummy).unwrap();
    assert_eq!(outcomes(&decision), [Outcome::Chosen, Outcome::Eliminated]);
    assert_eq!((decision.rounds, decision.ended), (5, Ended::OnlyDefault));
    let runs: u32 = dummy.calls.iter().filter(|call| call.0 == 1).map(|call| call.1).sum();
    assert_eq!(runs, 3, "one warm-up, two to be sure");
    // One hiccup while screening does not drop a good candidate.
    let mut hiccup =
        Dummy::new(|id, call| Ok(if (id, call) == (1, 1) { 1.0 } else { 1e-5 / (id + 1) as f64 }));
    assert_eq!(race(1, None, &Settings::default(), &mut hiccup).unwrap().choice, id(1));
}

#[test]
fn budget_and_stop_end_after_whole_rounds() {
    // 3 candidates of 10 ms; the default's two calibrating and the others' screening samples cost 40 ms.
    let times = &[10e-3, 9e-3, 11e-3];
    let settings = |ms| Settings { budget: Duration::from_millis(ms), ..Settings::default() };
    let mut dummy = Dummy::constant(times);
    let decision = race(2, None, &settings(215), &mut dummy).unwrap();
    assert_eq!((decision.rounds, decision.ended), (6, Ended::Budget));
    assert!(decision.evidence.iter().all(|trial| trial.samples == 6));
    assert_eq!(decision.choice, id(1));

    let short = race(2, None, &settings(95), &mut Dummy::constant(times));
    let Err(TuneError::TooFewRounds { rounds: 2, needed: 5, .. }) = short else { panic!("{short:?}") };
    let none = race(2, None, &settings(15), &mut Dummy::constant(times));
    let Err(TuneError::TooFewRounds { rounds: 0, .. }) = none else { panic!("{none:?}") };

    let mut dummy = Dummy::constant(times);
    dummy.stop_after = 7 + 3 * 7;
    let decision = race(2, None, &Settings::default(), &mut dummy).unwrap();
    assert_eq!((decision.rounds, decision.ended), (7, Ended::Stopped));
    let mut dummy = Dummy::constant(times);
    dummy.stop_after = 0;
    let stopped = race(2, None, &Settings::default(), &mut dummy);
    assert!(matches!(stopped, Err(TuneError::TooFewRounds { rounds: 0, .. })), "{stopped:?}");
}

#[test]
fn a_slow_warm_up_is_not_counted() {
    let mut dummy = Dummy::new(|_, call| Ok(if call == 0 { 3600.0 } else { 1e-3 }));
    let decision = race(3, None, &Settings::default(), &mut dummy).unwrap();
    assert!(decision.evidence.iter().all(|trial| trial.median == Some(1e-3)), "{decision}");
}

#[test]
fn repeats_and_ties() {
    let mut dummy = Dummy::new(|id, _| Ok(if id == 0 { 2e-3 } else { 1e-3 }));
    let list = [id(3), id(0), id(1), id(3)];
    let decision = tune(&key(), &id(0), &list, None, &Settings::default(), &mut dummy).unwrap();
    let tried: Vec<Candidate> = decision.evidence.iter().map(|trial| trial.candidate.clone()).collect();
    assert_eq!(tried, [id(0), id(3), id(1)]);
    assert_eq!(decision.choice, id(3), "equal medians: the earlier");
    assert!(decision.untried(&list).is_empty());
}

#[test]
fn bad_keys_and_settings_are_refused_before_any_run() {
    let mut dummy = Dummy::constant(&[1e-3]);
    let bad_key = Key { hash: String::new(), ..key() };
    let result = tune(&bad_key, &id(0), &[], None, &Settings::default(), &mut dummy);
    assert!(matches!(result, Err(TuneError::Key(_))), "{result:?}");
    let settings = Settings { min_samples: 0, ..Settings::default() };
    let result = race(0, None, &settings, &mut dummy);
    assert!(matches!(result, Err(TuneError::Settings(_))), "{result:?}");
    assert!(dummy.calls.is_empty());
}
