//! Inputs that are hard on purpose.

use zmlx_graph::{Fidelity, Wanted, patterns};
use zmlx_mlx::Array;

use super::cases::{Draft, cases, draft, formats, grouped, route, router, softmax_route};
use super::compare::{Both, Case, Kind, bound, close, close_but_for, report, rewritten, same_choice};
use super::setup::{HUGE, NOT_A_NUMBER, OUTLIERS, Storage, TINY, Tensors, ZEROS};

fn some() -> impl Iterator<Item = Storage> {
    let wanted = |f: &Storage| ["affine 4/64", "affine 8/32", "mxfp8 8/32", "f32"].contains(&&*f.label);
    formats().into_iter().filter(wanted)
}

/// The case run both ways, an output at a time.
fn both(case: &Case, names: &[&str], tensors: &Tensors) -> Vec<Both> {
    let outputs = match case.kind {
        Kind::Numbers => vec![case.graph.output],
        Kind::Choice { indices, weights } => vec![indices, weights],
    };
    let run = |output| {
        let stock = zmlx_graph::Graph { output, ..case.graph.clone() };
        let fused = rewritten(&stock, names);
        let last = report(&fused, names[names.len() - 1]);
        assert!(last.matched > 0, "{}: {:?}", case.label, last.refused);
        Both::new(&stock, fused.graph, tensors)
    };
    outputs.into_iter().map(run).collect()
}

#[test]
fn zeros_outliers_and_what_is_not_a_number_come_out_as_they_should() {
    // NaN last and alone: it may poison what a state keeps, and MLX's masked attention multiplies it by zero before.
    for pattern in patterns::ALL {
        // Half precision ends at 65,504: see below.
        let huge = if pattern.name == "kv_f16" { OUTLIERS } else { HUGE };
        let calls: [&[u32]; 3] = [&[ZEROS, 3, TINY, OUTLIERS, huge, 5], &[ZEROS, 1], &[NOT_A_NUMBER]];
        for storage in some() {
            for variant in 0..2 {
                for case in cases(pattern.name, &storage, variant) {
                    let names: Vec<&str> = case.before.iter().copied().chain([pattern.name]).collect();
                    let tensors = Tensors::new(&case.graph, &storage);
                    let mut all = both(&case, &names, &tensors);
                    all.iter_mut().for_each(Both::begin);
                    for ids in calls {
                        let made: Vec<_> = all.iter_mut().map(|b| b.call(1, ids)).collect();
                        let label = format!("{}, {}, ids {ids:?}", case.label, storage.label);
                        if case.kind != Kind::Numbers {
                            // Which experts NaN chooses says nothing; that its weights are NaN does.
                            if !ids.contains(&NOT_A_NUMBER) {
                                same_choice(&label, &made[0], &made[1]);
                            }
                        } else {
                            close(&label, &made[0].0, &made[0].1, bound(pattern.class));
                        }
                        if ids.contains(&NOT_A_NUMBER) && pattern.name != "embedding" {
                            let nan = made
                                .last()
                                .unwrap()
                                .1
                                .isnan()
                                .unwrap()
                                .any_all()
                                .unwrap()
                                .item::<bool>()
                                .unwrap();
                            assert!(nan, "{label}: NaN is hidden");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_half_precision_cannot_hold_is_not_hidden() {
    for storage in some() {
        // Without a norm, which would make it small.
        for case in cases("kv_f16", &storage, 0) {
            let names: Vec<&str> = case.before.iter().copied().chain(["kv_f16"]).collect();
            let mut both = both(&case, &names, &Tensors::new(&case.graph, &storage)).remove(0);
            both.begin();
            let (_, found) = both.call(1, &[1, HUGE]);
            let values = super::compare::floats(&found);
            let last = &values[values.len() / 2..];
            let label = format!("{}, {}", case.label, storage.label);
            assert!(!last.iter().all(|v| v.is_finite()), "{label}: what became infinite is hidden");
        }
    }
}

/// A router case whose matrix has equal rows.
fn tied(storage: &Storage, variant: usize, experts: i32, k: i32) -> Case {
    draft("router", storage, variant, &[], |d: &mut Draft<'_>| {
        let (n, width) = (d.input(), d.width);
        let logits = d.b.linear("tied", n, experts, width);
        route(d, n, logits, experts, k)
    })
}

/// The same, weighed by a softmax.
fn tied_softmax(storage: &Storage, variant: usize, experts: i32, k: i32) -> Case {
    draft("router", storage, variant, &[], |d: &mut Draft<'_>| {
        let (n, width) = (d.input(), d.width);
        let logits = d.b.linear("tied", n, experts, width);
        softmax_route(d, logits, k)
    })
}

fn choices(pattern: &str, case: &Case, tensors: &Tensors, batch: i32, ids: &[u32]) {
    let mut all = both(case, &[pattern], tensors);
    all.iter_mut().for_each(Both::begin);
    let made: Vec<_> = all.iter_mut().map(|b| b.call(batch, ids)).collect();
    same_choice(&format!("{}, {}", case.label, case.storage.label), &made[0], &made[1]);
}

#[test]
fn ties_go_to_the_experts_that_argpartition_takes() {
    // Zeros make all logits equal.
    let ids = [ZEROS, 0, 1, 2, 3, 4, 5, 6, 7, 8, ZEROS, 9, 10, 11];
    for storage in some() {
        for variant in 0..8 {
            for (experts, k) in [(8, 1), (8, 2), (8, 3), (12, 4), (16, 5), (7, 7), (40, 8)] {
                let case = tied(&storage, variant, experts, k);
                let mut tensors = Tensors::new(&case.graph, &storage);
                if variant >> 1 & 3 == 0 {
                    // A correction that keeps them tied.
                    let flat = Array::from_vec(vec![0.25f32; experts as usize], &[experts]).unwrap();
                    tensors.replace("router.correction", flat);
                }
                choices("router", &case, &tensors, 1, &ids);
                choices("router", &case, &tensors, 2, &ids);
                let case = tied_softmax(&storage, variant, experts, k);
                choices("router", &case, &Tensors::new(&case.graph, &storage), 1, &ids);
            }
        }
    }
}

#[test]
fn groups_and_their_experts_are_chosen_as_mlx_does() {
    let ids = [ZEROS, 0, 1, 2, 3, 4, 5, 6, 7, ZEROS, 9, OUTLIERS];
    for storage in some() {
        for variant in 0..8 {
            for (experts, groups, k) in [
                (8, [1, 1], 2),
                (8, [4, 1], 2),
                (8, [4, 3], 7),
                (16, [2, 2], 5),
                (16, [8, 3], 6),
                (1, [1, 1], 1),
            ] {
                // A correction that keeps ties, one that does not, and one that pushes kept groups below dropped ones.
                for correction in [0.25, f32::NAN, -5.0] {
                    let case = draft("deepseek_router", &storage, variant, &[], |d: &mut Draft<'_>| {
                        let (n, width) = (d.input(), d.width);
                        let logits = d.b.linear("tied", n, experts, width);
                        grouped(d, logits, experts, groups, k)
                    });
                    let mut tensors = Tensors::new(&case.graph, &storage);
                    if !correction.is_nan() {
                        let flat = Array::from_vec(vec![correction; experts as usize], &[experts]).unwrap();
                        tensors.replace("router.correction", flat);
                    }
                    choices("deepseek_router", &case, &tensors, 2, &ids);
                }
            }
        }
    }
}

#[test]
fn one_expert_all_experts_and_logits_at_the_ends_are_chosen_as_mlx_does() {
    for storage in some() {
        for variant in [0, 1, 2, 4, 6] {
            for (experts, k) in [(1, 1), (2, 2), (5, 5), (5, 1)] {
                let case = draft("router", &storage, variant, &[], |d| router(d, experts, k));
                let tensors = Tensors::new(&case.graph, &storage);
                choices("router", &case, &tensors, 1, &[1, ZEROS, 2, TINY, OUTLIERS]);
            }
            // Logits of minus infinity, or so far apart that scores are 0 and 1.
            for ends in [[f32::NEG_INFINITY; 2], [1e6, -1e6], [f32::NEG_INFINITY, 200.0]] {
                let case = draft("router", &storage, variant, &[], |d| {
                    let (n, width) = (d.input(), d.width);
                    let logits = d.b.linear_bias("router", n, 8, width);
                    route(d, n, logits, 8, 3)
                });
                let mut tensors = Tensors::new(&case.graph, &storage);
                let mut bias = vec![0.0f32; 8];
                bias[2..4].copy_from_slice(&ends);
                bias[5..7].copy_from_slice(&ends);
                tensors.replace("router.bias", Array::from_vec(bias, &[8]).unwrap());
                choices("router", &case, &tensors, 1, &[1, ZEROS, 2, 3, OUTLIERS]);
            }
        }
    }
}

#[test]
fn only_wanted_positions_come_out() {
    for pattern in patterns::ALL.iter().filter(|p| p.class <= Fidelity::TokenIdentical) {
        for storage in some() {
            for case in cases(pattern.name, &storage, 1).iter().filter(|c| c.kind == Kind::Numbers) {
                let names: Vec<&str> = case.before.iter().copied().chain([pattern.name]).collect();
                let tensors = Tensors::new(&case.graph, &storage);
                let mut all = both(case, &names, &tensors);
                let both = &mut all[0];
                for (batch, ids) in [(1, vec![1u32]), (1, vec![1, 2, 3, 4]), (2, vec![1, 2, 3, 4, 5, 6])] {
                    for wanted in [Wanted::Last, Wanted::None] {
                        both.begin();
                        let (expected, found) = both.wanted(batch, &ids, wanted);
                        let label = format!("{}, {}, {wanted:?}", case.label, storage.label);
                        match (expected, found) {
                            (Some(e), Some(f)) if wanted == Wanted::Last => {
                                close(&label, &e, &f, (1e-4, 4e-4));
                            }
                            (None, None) if wanted == Wanted::None => {}
                            (e, f) => panic!("{label}: {:?} and {:?}", e.is_some(), f.is_some()),
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn two_layers_of_everything_agree() {
    let all = |class| patterns::ALL.iter().filter(move |p| p.class <= class).map(|p| p.name).collect();
    let (strict, every): (Vec<&str>, Vec<&str>) = (all(Fidelity::TokenIdentical), all(Fidelity::Bounded));
    assert!(every.len() > strict.len());
    for (names, bound, others) in [(strict, (5e-4, 2e-3), 0), (every, bound(Fidelity::Bounded), 8)] {
        for storage in some() {
            layers(&storage, &names, bound, others);
        }
    }
}

/// `others`: how many rows of a sequence a router's near-tie may have changed: one in the first layer, and after it those
/// that it reaches through a convolution and a window of 4.
fn layers(storage: &Storage, names: &[&str], bound: (f64, f64), others: usize) {
    let case = draft("layers", storage, 1, &[], |d| {
        for _ in 0..2 {
            d.x = super::cases::layer(d);
        }
        let (x, width) = (d.x, d.width);
        let n = d.b.rms_norm("last.norm", x, width, 1e-5);
        (d.b.linear("head", n, 24, width), Kind::Numbers)
    });
    let fused = rewritten(&case.graph, names);
    let left: Vec<&str> =
        fused.graph.nodes.iter().filter(|n| n.op.fused().is_none()).map(|n| n.op.name()).collect();
    assert!(left.iter().all(|l| *l == "tokens"), "not fused: {left:?}");
    let tensors = Tensors::new(&case.graph, storage);
    let mut both = Both::new(&case.graph, fused.graph, &tensors);
    for batch in [1, 3] {
        both.begin();
        for length in [1usize, 4, 1, 70, 1] {
            let ids: Vec<u32> = (0..batch as usize * length).map(|i| (i * 7 % 40) as u32).collect();
            let (expected, found) = both.call(batch, &ids);
            let label = format!("layers, {}, {length} tokens", storage.label);
            close_but_for(others * batch as usize, &label, &expected, &found, bound);
        }
    }
}
