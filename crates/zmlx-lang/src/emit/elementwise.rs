//! Elementwise kernels: each thread loads all its elements, then computes and stores them.

use super::access::Chunk;
use super::emitter::Emitter;
use super::passes::Passes;
use crate::error::Result;
use crate::graph::{Id, Node};

pub(super) fn write(e: &mut Emitter<'_>) -> Result<()> {
    let Passes { passes, keep } = e.plan_passes(false)?;
    let (size, vec, items, threads) = (e.size(), e.plan.vec, e.plan.items.max(1), e.plan.threads);
    e.prologue();
    e.text.line(format!("const {size} n = rows * cols;"));
    e.text.line(format!("const {size} first = group * {};", threads * vec * items));
    e.text.line("if (first >= n) return;");
    for i in (0..e.program.values.len()).filter(|i| e.hoisted[*i]).collect::<Vec<_>>() {
        let id = Id(i as u32);
        match e.program.values[i].node {
            Node::Input(n) => e.define_hoisted_input(id, n as usize),
            _ => e.define(id),
        }
    }
    for pass in &passes {
        e.declare_wide(&pass.inputs, false);
        e.declare_even(false);
        let all = pass.segments.iter().fold(vec![false; e.hoisted.len()], |mut all, s| {
            all.iter_mut().zip(&s.define).for_each(|(a, d)| *a |= d);
            all
        });
        let places = e.needs_place(&pass.inputs, &all);
        let slot = match (items, vec) {
            (1, _) => None,
            (_, 1) => Some("k".to_owned()),
            _ => Some(format!("k * {vec}")),
        };
        let chunk = Chunk { rows: false, reverse: false, slot };
        e.declare_held(&pass.inputs, vec * items);
        if items > 1 && !pass.inputs.is_empty() {
            open(e, items, places);
            e.load_chunk(&pass.inputs, &chunk);
            e.text.close();
        }
        open(e, items, places);
        if items == 1 {
            e.load_chunk(&pass.inputs, &chunk);
        }
        e.write_chunk(pass, 0, &keep, &chunk);
        if items > 1 {
            e.text.close();
        }
    }
    Ok(())
}

/// The loop over a thread's chunks, one after another a group's width apart so that neighbours read neighbours.
fn open(e: &mut Emitter<'_>, items: u32, places: bool) {
    let (size, unsigned, vec, threads) = (e.size(), e.unsigned_size(), e.plan.vec, e.plan.threads);
    let lane = if vec == 1 { "thread_index".to_owned() } else { format!("thread_index * {vec}") };
    if items > 1 {
        e.unroll();
        e.text.open(format!("for (int k = 0; k < {items}; ++k)"));
        e.text.line(format!("const {size} c = first + k * {} + {lane};", threads * vec));
    } else {
        e.text.line(format!("const {size} c = first + {lane};"));
    }
    if places {
        e.text.line(format!("const {size} row0 = {size}({unsigned}(c) / {unsigned}(cols));"));
        e.text.line(format!("const {size} col0 = c - row0 * cols;"));
    }
}
