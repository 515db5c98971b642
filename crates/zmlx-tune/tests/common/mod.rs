//! Decisions to store, for the store's tests.

use zmlx_tune::{Candidate, Decision, Ended, Key, Outcome, Trial};

/// A key on one device and library; `n` tells kernels apart.
pub fn key(n: usize) -> Key {
    Key::new("NVIDIA H100", "mlx 0.32.4 cuda", format!("kernel_{n}"), "9f3c", "f32 rows=4096 cols=4096")
}

/// A decision for `key` that chooses `threads`; `when` is `threads` too.
pub fn decision(key: &Key, threads: i64) -> Decision {
    let (default, choice) = (Candidate::from([("threads", 1)]), Candidate::from([("threads", threads)]));
    let trial = |candidate: &Candidate, outcome, median| Trial {
        candidate: candidate.clone(),
        outcome,
        samples: 25,
        median: Some(median),
        mad: Some(1.5e-7),
    };
    Decision {
        key: key.clone(),
        evidence: vec![
            trial(&default, Outcome::Slower, 2.0e-5),
            trial(&choice, Outcome::Chosen, 1.6e-5),
            Trial {
                candidate: Candidate::from([("threads", 4096)]),
                outcome: Outcome::Failed("asked 4096, \"1024\" allowed\n".into()),
                samples: 0,
                median: None,
                mad: None,
            },
        ],
        choice,
        default,
        gain: 1.25,
        iterations: 32,
        rounds: 25,
        ended: Ended::AllRounds,
        when: threads as u64,
        tool_version: "0.1.0".into(),
    }
}
