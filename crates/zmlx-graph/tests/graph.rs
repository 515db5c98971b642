//! Building, printing, checking and running a small graph.

use std::sync::Arc;

use zmlx_graph::ops::{ConvStep, KvAppend, SplitHeads, Transpose};
use zmlx_graph::state::{KV_STEP, SlotKind};
use zmlx_graph::weights::Format;
use zmlx_graph::{Builder, Executor, Graph, GraphError};
use zmlx_mlx::{Array, Result};

fn tied() -> Graph {
    let dense = |_: &str, _: i32| Format::Dense;
    let mut b = Builder::new(&dense);
    let ids = b.tokens();
    let h = b.embedding("embed", ids, 3, 2);
    let twice = b.add("sum", h, h);
    let out = b.linear("embed", twice, 3, 2);
    b.finish(out)
}

#[test]
fn a_tied_head_is_one_weight_and_the_graph_reads_like_its_formula() -> Result<()> {
    let graph = tied();
    assert_eq!(graph.weights.len(), 1);
    assert!(!graph.weights[0].lookup, "the head reads the whole matrix");
    let lines = [
        "%0 = tokens() [input]",
        "%1 = embedding(%0) [embed]",
        "%2 = add(%1, %1) [sum]",
        "%3 = linear(%2) [embed]",
        "return %3",
    ];
    assert_eq!(graph.to_string(), lines.join("\n"));

    let matrix = Array::from_slice(&[1.0f32, 0.0, 0.0, 1.0, 2.0, 3.0], &[3, 2])?;
    let executor = Executor::new(Arc::new(graph), |_| Some(matrix.clone())).unwrap();
    let mut state = executor.graph().new_state();
    let ids = Array::from_slice(&[2u32, 0], &[1, 2])?;
    let logits = executor.run(&ids, &mut state).unwrap();
    assert_eq!(logits.to_vec::<f32>()?, [4.0, 6.0, 26.0, 2.0, 0.0, 4.0]);
    assert_eq!(state.position(), 2);
    Ok(())
}

#[test]
fn wrong_graphs_weights_and_states_are_named() -> Result<()> {
    let missing = Executor::new(Arc::new(tied()), |_| None).unwrap_err();
    assert_eq!(missing, GraphError::MissingWeight("embed.weight".to_owned()));
    let mut early = tied();
    early.nodes.swap(1, 2);
    assert!(matches!(early.check(), Err(GraphError::Malformed(what)) if what.contains("too early")));

    let dense = |_: &str, _: i32| Format::Dense;
    let mut b = Builder::new(&dense);
    let ids = b.tokens();
    let slot = b.slot("layer", SlotKind::KvCache);
    let out = b.node("layer", ConvStep { slot, keep: 2 }, &[ids]);
    let executor = Executor::new(Arc::new(b.finish(out)), |_| None).unwrap();
    let ids = Array::from_slice(&[0u32], &[1, 1])?;
    let mut other = tied().new_state();
    assert!(matches!(executor.run(&ids, &mut other), Err(GraphError::WrongState)));
    let error = executor.run(&ids, &mut executor.graph().new_state()).unwrap_err().to_string();
    assert!(error.starts_with("layer: conv_step"), "{error}");
    Ok(())
}

#[test]
fn calls_that_a_state_cannot_take_are_refused() -> Result<()> {
    let executor = Executor::new(Arc::new(tied()), |spec| {
        Array::from_vec(vec![1.0f32; spec.shape.iter().product::<i32>() as usize], &spec.shape).ok()
    });
    let executor = executor.unwrap();
    let ids =
        |batch: i32, length: i32| Array::from_vec(vec![0u32; (batch * length) as usize], &[batch, length]);
    let mut state = executor.new_state();
    for (batch, length) in [(1, 0), (0, 1)] {
        let error = executor.run(&ids(batch, length)?, &mut state).unwrap_err();
        assert_eq!(error, GraphError::Empty { batch, length });
    }
    executor.run(&ids(2, 3)?, &mut state).unwrap();
    let error = executor.run(&ids(3, 1)?, &mut state).unwrap_err();
    assert_eq!(error, GraphError::WrongBatch { expected: 2, found: 3 });
    assert_eq!(state.position(), 3);
    executor.run(&ids(2, 1)?, &mut state).unwrap();
    Ok(())
}

#[test]
fn caches_grow_in_steps_and_keep_their_order() -> Result<()> {
    let dense = |_: &str, _: i32| Format::Dense;
    let mut b = Builder::new(&dense);
    let ids = b.tokens();
    let slot = b.slot("layer", SlotKind::KvCache);
    // Ids as [1, 1, length, 1] stand for keys and values.
    let x = b.node("layer", SplitHeads { heads: 1 }, &[ids]);
    let x = b.node("layer", Transpose(vec![0, 2, 1, 3]), &[x]);
    let [keys, _values] = b.node_n("layer", KvAppend { slot }, &[x, x]);
    let executor = Executor::new(Arc::new(b.finish(keys)), |_| None).unwrap();
    let mut state = executor.graph().new_state();
    let mut seen = Vec::new();
    for length in [1, 255, 1, 300, 2] {
        let next: Vec<f32> = (0..length).map(|i| (seen.len() + i) as f32).collect();
        seen.extend(&next);
        let ids = Array::from_slice(&next, &[1, length as i32])?;
        assert_eq!(executor.run(&ids, &mut state).unwrap().to_vec::<f32>()?, seen);
    }
    // As mlx-lm grows it: what is used (257), and whole steps for what comes (300 positions take two).
    assert_eq!((state.position(), state.arrays()[0].dim(2)?), (559, 257 + 2 * KV_STEP));
    Ok(())
}
