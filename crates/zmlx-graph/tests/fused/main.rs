//! Every fused op against the subgraph that it replaces: the op on the engine, the stock graph on MLX in float32.

mod adversarial;
mod cases;
mod compare;
mod refusals;
mod setup;

use cases::{cases, formats};
use compare::{Calls, compare};
use zmlx_graph::patterns;

#[test]
fn every_pattern_has_cases() {
    for pattern in patterns::ALL {
        assert!(!cases(pattern.name, &formats()[0], 0).is_empty(), "{} has no case: add it", pattern.name);
    }
}

/// What changes a cache is tried after all that look for who keeps it.
#[test]
fn half_precision_leaves_attention_fused() {
    let all: Vec<&str> = patterns::ALL.iter().map(|p| p.name).collect();
    for attention in ["attention_out", "skv_mla", "sparse_mla"] {
        for case in cases(attention, &formats()[0], 0) {
            let done = compare::rewritten(&case.graph, &all);
            for name in [attention, "kv_f16"] {
                let found = compare::report(&done, name);
                assert!(found.matched > 0, "{}, {name}: {:?}\n{}", case.label, found.refused, done.graph);
            }
        }
    }
}

/// Calls in which a sequence is fed: short ones and single tokens in turn.
const SHORT: &[Calls] = &[(1, &[1, 2, 1, 3, 1, 5, 17, 1]), (3, &[2, 1, 5, 1])];

/// Calls that cross the steps in which caches grow and experts are grouped.
const LONG: &[Calls] = &[(1, &[255, 1, 1, 256]), (1, &[257, 2]), (2, &[256, 1])];

#[test]
fn fused_ops_agree_with_what_they_replace_in_every_format() {
    let mut compared = 0;
    for pattern in patterns::ALL {
        for format in formats() {
            for variant in 0..2 {
                for case in cases(pattern.name, &format, variant) {
                    compared += compare(pattern, &case, SHORT);
                }
            }
        }
    }
    assert!(compared > 40_000, "only {compared} rows compared");
}

#[test]
fn fused_ops_agree_with_what_they_replace_in_every_variant() {
    let some = |label: &str| ["affine 4/64", "affine 8/32", "f32"].contains(&label);
    for pattern in patterns::ALL {
        for format in formats().iter().filter(|f| some(&f.label)) {
            for variant in 2..8 {
                for case in cases(pattern.name, format, variant) {
                    compare(pattern, &case, SHORT);
                }
            }
        }
    }
}

#[test]
fn fused_ops_agree_with_what_they_replace_over_long_calls() {
    for pattern in patterns::ALL {
        for format in formats().iter().filter(|f| ["affine 4/64", "mxfp4 4/32", "bf16"].contains(&&*f.label))
        {
            // The second variant of attention looks through a window.
            let variants = if pattern.name == "attention_out" { 0..2 } else { 0..1 };
            for case in variants.flat_map(|variant| cases(pattern.name, format, variant)) {
                compare(pattern, &case, LONG);
            }
        }
    }
}

#[test]
fn every_value_of_the_cases_has_the_type_that_was_inferred() {
    for pattern in patterns::ALL {
        for variant in 0..2 {
            for case in cases(pattern.name, formats().last().unwrap(), variant) {
                compare::types(&case);
            }
        }
    }
}

/// What processors without a path of their own run, in a process of its own.
#[test]
fn two_layers_of_everything_agree_on_the_portable_path() {
    let program = std::env::current_exe().expect("the test program has a path");
    let test = "adversarial::two_layers_of_everything_agree";
    let output =
        std::process::Command::new(program).args(["--exact", test]).env("ZMLX_SIMD", "scalar").output();
    let output = output.expect("the test program starts");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
}
