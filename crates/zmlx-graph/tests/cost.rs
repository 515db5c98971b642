//! Costs against sums done by hand, and times beside them.

use std::sync::Arc;

use zmlx_graph::weights::Format;
use zmlx_graph::{Cost, CostContext, Executor, Graph, Profile, ProfileReport, Sizes, Work};
use zmlx_mlx::{Array, Dtype};

mod support;
use support::{everything, tensor};

fn cost(graph: &Graph, sizes: Sizes, activation: Dtype) -> Cost {
    let weight_bytes = graph.weight_bytes(activation);
    graph.cost(&CostContext { sizes, activation, weight_bytes }).unwrap()
}

fn of(cost: &Cost, op: &str) -> Work {
    cost.by_op.iter().find(|r| r.name == op).unwrap_or_else(|| panic!("no {op}")).work
}

#[test]
fn a_token_costs_what_was_counted_by_hand() {
    let graph = everything().0;
    let found = cost(&graph, Sizes::decode(9), Dtype::Float32);
    // 64 and 32 columns of 4 bits, a scale and a bias of four bytes for each 32.
    let packed = |rows: u64, columns: u64| rows * (columns / 2 + columns / 32 * 8);
    // q, kv with its bias, the router, and the head, which is the embedding.
    let linear = packed(32, 32) + packed(32, 32) + 32 * 4 + packed(6, 32) + packed(64, 32);
    let flops = 2 * 32 * (32 + 32 + 6 + 64);
    assert_eq!((of(&found, "linear").weight_bytes, of(&found, "linear").flops), (linear, flops));
    assert_eq!(of(&found, "linear").launches, 5, "the bias is added by another kernel");
    // Three of six experts: up and gate are quantised, down is not.
    let experts = (2 * 6 * packed(64, 32) + 6 * 32 * 64 * 4) / 2;
    assert_eq!(of(&found, "expert_linear").weight_bytes, experts);
    assert_eq!(of(&found, "expert_linear").flops, 2 * 3 * (2 * 64 * 32 + 32 * 64));
    // Ten positions of keys and values of two heads of eight; four query heads.
    let attention = of(&found, "attention");
    assert_eq!((attention.state_read, attention.flops), (2 * 10 * 2 * 8 * 4, 4 * 10 * (2 * 8 + 5 + 2 * 8)));
    assert_eq!(of(&found, "kv_append").state_written, 2 * 2 * 8 * 4);
    let conv = of(&found, "conv_step");
    assert_eq!((conv.state_read, conv.state_written), (2 * 32 * 4, 2 * 32 * 4));
    // The head reads the matrix anyway.
    assert_eq!(of(&found, "embedding").weight_bytes, 0);
    for view in ["transpose", "split", "split_heads", "merge_heads", "expert_sort", "expert_unsort", "tokens"]
    {
        assert_eq!(of(&found, view), Work::default(), "{view}");
    }
    // Both casts: to float32, which it is already, and back.
    assert_eq!(of(&found, "cast").launches, 0);
    assert_eq!(of(&cost(&graph, Sizes::decode(9), Dtype::Bfloat16), "cast").launches, 1);
    assert_eq!(found.total, found.nodes.iter().copied().sum());
    assert_eq!(found.total, found.by_module.iter().map(|r| r.work).sum());
    let least = found.roofline_seconds(1e9);
    assert_eq!(least, found.total.memory_bytes() as f64 / 1e9);
}

#[test]
fn a_long_call_reads_all_experts_at_most_and_sorts_its_rows() {
    let graph = everything().0;
    let sizes = Sizes { batch: 2, length: 16, position: 4 };
    let found = cost(&graph, sizes, Dtype::Float32);
    let whole = Sizes { batch: 1, length: 2, position: 0 };
    let all = of(&cost(&graph, whole, Dtype::Float32), "expert_linear").weight_bytes;
    assert_eq!(of(&found, "expert_linear").weight_bytes, all, "six rows are enough to need six experts");
    assert_eq!((of(&found, "expert_sort").launches, of(&found, "expert_unsort").launches), (5, 1));
    assert_eq!(of(&found, "merge_heads").launches, 1);
    // Query i of 16 sees 4 + i + 1 keys.
    let pairs: u64 = (0..16).map(|i| 4 + i + 1).sum::<u64>() * 2 * 4;
    assert_eq!(of(&found, "attention").flops, pairs * (2 * 8 + 5 + 2 * 8));
}

#[test]
fn a_table_that_is_only_looked_up_costs_a_row() {
    let dense = |_: &str, _: i32| Format::Dense;
    let mut b = zmlx_graph::Builder::new(&dense);
    let ids = b.tokens();
    let x = b.embedding("embed", ids, 64, 8);
    let out = b.linear("head", x, 64, 8);
    let graph = b.finish(out);
    let token = cost(&graph, Sizes::decode(0), Dtype::Bfloat16);
    assert_eq!(of(&token, "embedding").weight_bytes, 8 * 2);
    assert_eq!(of(&token, "embedding").launches, 1, "one gather where nothing is packed");
    let sizes = Sizes { batch: 1, length: 1000, position: 0 };
    assert_eq!(
        of(&cost(&graph, sizes, Dtype::Bfloat16), "embedding").weight_bytes,
        64 * 8 * 2,
        "no more than all"
    );
}

#[test]
fn weights_are_as_large_as_the_executor_holds_them() {
    let graph = everything().0;
    let declared = graph.weight_bytes(Dtype::Float32);
    let executor = Executor::new(Arc::new(graph), tensor).unwrap();
    assert_eq!(executor.weight_bytes(), declared);
}

#[test]
fn a_profile_has_a_time_for_each_node_and_the_same_logits() -> zmlx_mlx::Result<()> {
    let executor = Executor::new(Arc::new(everything().0), tensor).unwrap();
    let (mut plain, mut timed) = (executor.graph().new_state(), executor.graph().new_state());
    for ids in [vec![3u32, 9, 4], vec![7]] {
        let ids = Array::from_slice(&ids, &[1, ids.len() as i32])?;
        let expected = executor.run(&ids, &mut plain).unwrap().to_vec::<f32>()?;
        let (logits, profile) = executor.profile(&ids, &mut timed).unwrap();
        assert_eq!(logits.to_vec::<f32>()?, expected);
        assert_eq!(profile.seconds.len(), executor.graph().nodes.len());
        assert!(profile.seconds.iter().all(|s| *s > 0.0), "{profile:?}");
    }
    assert_eq!((plain.position(), timed.position()), (4, 4));
    let mut other = zmlx_graph::State::clone(&timed);
    let wrong = Array::from_slice(&[0.5f32], &[1, 1])?;
    assert!(executor.profile(&wrong, &mut other).is_err(), "half a token");
    Ok(())
}

#[test]
fn reports_mark_what_is_faster_than_memory() {
    let graph = everything().0;
    let found = cost(&graph, Sizes::decode(9), Dtype::Float32);
    let seconds: Vec<f64> =
        graph.nodes.iter().map(|n| if n.op.name() == "linear" { 4e-6 } else { 1e-6 }).collect();
    let profile = Profile { seconds };
    let bytes = of(&found, "linear").memory_bytes();
    // Four linear nodes of 4 us move their bytes exactly as fast as memory with twice this bandwidth does in half.
    let rate = bytes as f64 / (4.0 * 4e-6);
    for (bandwidth, fraction) in [(2.0 * rate, 0.5), (rate / 2.0, 2.0)] {
        let report = ProfileReport::new(&graph, &found, &profile, bandwidth);
        let linear = &report.by_op[0];
        assert_eq!((linear.name.as_str(), linear.nodes, linear.bytes), ("linear", 4, bytes));
        assert!((linear.roofline.unwrap() - fraction).abs() < 1e-9, "{linear:?}");
        assert_eq!(linear.cache_resident, fraction > 1.0);
        let sigmoid = report.by_op.iter().find(|r| r.name == "sigmoid").unwrap();
        assert_eq!((sigmoid.bytes, sigmoid.roofline, sigmoid.cache_resident), (0, None, false));
        for rows in [&report.by_op, &report.by_module] {
            assert!((rows.iter().map(|r| r.share).sum::<f64>() - 1.0).abs() < 1e-9);
            assert_eq!(rows.iter().map(|r| r.bytes).sum::<u64>(), found.total.memory_bytes());
        }
        let picture = profile.svg(&graph, &found);
        assert!(
            picture.contains("linear") && picture.contains("GB/s") && !picture.contains("NaN"),
            "{picture}"
        );
        let page = report.html("a <model>", &picture);
        assert!(page.contains("a &lt;model&gt;") && page.contains(&picture));
        assert_eq!(page.contains("(cache)"), fraction > 1.0 || report.by_op.iter().any(|r| r.cache_resident));
    }
    let nothing = Profile { seconds: vec![0.0; graph.nodes.len()] };
    let report = ProfileReport::new(&graph, &found, &nothing, 1e9);
    assert_eq!((report.total.share, report.total.roofline), (0.0, None));
    assert!(!nothing.svg(&graph, &found).contains("NaN"));
}

#[test]
fn medians_are_taken_node_by_node() {
    let calls = [[1.0, 5.0], [9.0, 4.0], [2.0, 6.0]].map(|s| Profile { seconds: s.to_vec() });
    assert_eq!(Profile::median(&calls).seconds, [2.0, 5.0]);
    assert_eq!(Profile::median(&calls[..2]).seconds, [5.0, 4.5]);
    assert_eq!(Profile::median(&[]).seconds, [0.0; 0]);
}
