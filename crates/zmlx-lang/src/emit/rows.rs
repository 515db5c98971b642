//! Row kernels: teams of threads reduce and scan rows, in registers or in loops that read the row anew.

use super::access::Chunk;
use super::emitter::Emitter;
use super::passes::{Pass, Passes};
use super::plan::mixed_directions;
use super::unsupported;
use crate::error::Result;
use crate::graph::{Id, Node};

/// Shared memory that every device gives a group.
const SHARED_LIMIT: usize = 32 * 1024;

pub(super) fn write(e: &mut Emitter<'_>) -> Result<()> {
    let registers = e.plan.items > 0;
    if registers && mixed_directions(e.program) {
        let why = "scans from both ends of the row need the looped text: a plan of 0 items";
        return Err(unsupported(e.program, e.dialect, why));
    }
    let Passes { passes, keep } = e.plan_passes(registers)?;
    e.prologue();
    places(e);
    let mut inputs: Vec<usize> = passes.iter().flat_map(|p| p.inputs.clone()).collect();
    inputs.sort_unstable();
    inputs.dedup();
    e.declare_wide(&inputs, true);
    e.declare_even(true);
    hoisted(e, 0);
    if registers {
        load_all(e, &inputs, passes.iter().any(|p| p.reverse));
        for (i, _) in keep.iter().enumerate().filter(|(_, k)| **k) {
            let ty = e.dialect.ty(e.program.values[i].ty);
            e.text.line(format!("{ty} k{i}[{}];", e.plan.held()));
        }
    }
    for (p, pass) in passes.iter().enumerate() {
        write_pass(e, pass, p, &keep, registers);
        e.reduce_team(&pass.reductions);
        hoisted(e, p as u32 + 1);
    }
    e.store_rows();
    if e.shared > SHARED_LIMIT {
        let why =
            format!("it needs {} bytes of shared memory, groups have {SHARED_LIMIT}: split it", e.shared);
        return Err(unsupported(e.program, e.dialect, why));
    }
    Ok(())
}

/// Which row this thread works on, and where it is. Teams beyond the last row redo it and write nothing, so that all
/// threads reach every barrier.
fn places(e: &mut Emitter<'_>) {
    let (size, team) = (e.size(), e.plan.team());
    match e.plan.rows_per_group {
        1 => {
            e.text.line("const int lane = thread_index;");
            e.text.line(format!("const {size} place = group;"));
        }
        n => {
            e.text.line(format!("const int lane = thread_index % {team};"));
            e.text.line(format!("const {size} place = group * {n} + thread_index / {team};"));
        }
    }
    e.text.line("const bool live = place < rows;");
    e.text.line(format!("const {size} row = live ? place : rows - 1;"));
    e.text.line(format!("const {size} base = row * cols;"));
    e.text.line(format!("const {size} end = live ? cols : 0;"));
    let strided = e.strided_inputs();
    let mut axes: Vec<usize> = Vec::new();
    for v in &e.program.values {
        if let Node::Index(axis) = v.node
            && axis > 0
        {
            axes.push(axis as usize);
        }
    }
    if !strided.is_empty() {
        axes.extend(1..e.plan.ndim);
    }
    e.coordinates(&axes, "row");
    for n in strided {
        e.declare_strided(n);
    }
}

/// Values of the row that are known before pass `stage`.
fn hoisted(e: &mut Emitter<'_>, stage: u32) {
    for i in 0..e.program.values.len() {
        let value = &e.program.values[i];
        if !e.hoisted[i] || value.stage != stage {
            continue;
        }
        let id = Id(i as u32);
        match value.node {
            Node::Reduce(..) => {}
            Node::Input(n) => e.define_hoisted_input(id, n as usize),
            Node::Index(axis) if (axis as usize) < e.plan.ndim => e.declare(id, &format!("int(p{axis})")),
            Node::Index(_) => e.declare(id, "0"),
            _ => e.define(id),
        }
    }
}

/// Loads the thread's elements of every input once, all of them before any is used.
fn load_all(e: &mut Emitter<'_>, inputs: &[usize], reverse: bool) {
    if inputs.is_empty() {
        return;
    }
    e.declare_held(inputs, e.plan.held());
    let chunk = open_registers(e, reverse);
    e.load_chunk(inputs, &chunk);
    e.text.close();
}

fn open_registers(e: &mut Emitter<'_>, reverse: bool) -> Chunk {
    let (size, team, vec) = (e.size(), e.plan.team(), e.plan.vec);
    let (step, slot) = match vec {
        1 => (format!("k * {team} + lane"), "k".to_owned()),
        v => (format!("(k * {team} + lane) * {v}"), format!("k * {v}")),
    };
    e.unroll();
    e.text.open(format!("for (int k = 0; k < {}; ++k)", e.plan.items));
    e.text.line(format!("const {size} c = {step};"));
    Chunk { rows: true, reverse, slot: Some(slot) }
}

fn open_loop(e: &mut Emitter<'_>, reverse: bool) -> Chunk {
    let (size, vec) = (e.size(), e.plan.vec);
    let step = e.plan.team() * vec;
    e.text.open(format!("for ({size} start = 0; start < cols; start += {step})"));
    let lane = if vec == 1 { "lane".to_owned() } else { format!("lane * {vec}") };
    e.text.line(format!("const {size} c = start + {lane};"));
    Chunk { rows: true, reverse, slot: None }
}

fn write_pass(e: &mut Emitter<'_>, pass: &Pass, number: usize, keep: &[bool], registers: bool) {
    if pass.reductions.is_empty() && pass.outputs.is_empty() {
        return;
    }
    e.declare_accumulators(&pass.reductions);
    let scans: Vec<Id> = pass.segments.iter().flat_map(|s| s.scans.clone()).collect();
    e.declare_carries(&scans, number);
    let chunk = if registers { open_registers(e, pass.reverse) } else { open_loop(e, pass.reverse) };
    if !registers {
        e.declare_held(&pass.inputs, e.plan.vec);
        e.load_chunk(&pass.inputs, &chunk);
    }
    e.write_chunk(pass, number, keep, &chunk);
    e.text.close();
}
