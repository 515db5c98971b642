//! What each pass over the row computes, in which order, and what threads keep between passes.

use super::access::Chunk;
use super::emitter::Emitter;
use super::unsupported;
use crate::error::Result;
use crate::graph::{Id, Node};
use crate::{Op, ReduceOp};

/// A value this dear is kept rather than computed again in the next pass.
const DEAR: u32 = 8;

/// One pass over a row, or over a thread's elements of the domain.
pub(super) struct Pass {
    pub reductions: Vec<Id>,
    /// Numbers of the outputs written.
    pub outputs: Vec<usize>,
    pub segments: Vec<Segment>,
    /// Whether the pass walks from the row's end.
    pub reverse: bool,
    /// Inputs read.
    pub inputs: Vec<usize>,
}

/// Values computed together for each element; then scans of some of them.
pub(super) struct Segment {
    /// Values defined, by position.
    pub define: Vec<bool>,
    /// Values taken from what an earlier pass kept.
    pub kept: Vec<bool>,
    /// Scans that run once this segment's elements are known.
    pub scans: Vec<Id>,
}

/// The passes of a kernel and what is kept between them.
pub(super) struct Passes {
    pub passes: Vec<Pass>,
    /// Values held in registers from one pass to another.
    pub keep: Vec<bool>,
}

impl Emitter<'_> {
    /// Splits the work into passes; `registers`: threads hold their elements all along.
    pub fn plan_passes(&self, registers: bool) -> Result<Passes> {
        let program = self.program;
        let count = program.values.len();
        let roots: Vec<Vec<Id>> = (0..program.passes).map(|p| self.roots(p)).collect();
        let mut keep = vec![false; count];
        if registers {
            let plain: Vec<Vec<bool>> =
                roots.iter().map(|r| self.closure(r, &vec![false; count]).0).collect();
            for (i, k) in keep.iter_mut().enumerate() {
                *k = self.dear(i) && plain.iter().filter(|needed| needed[i]).count() > 1;
            }
            // Drops what later passes do not reach any more, for another kept value covers it.
            let mut reached = vec![false; count];
            let mut known = vec![false; count];
            for r in &roots {
                let (define, leaf) = self.closure(r, &known);
                for i in 0..count {
                    reached[i] |= leaf[i];
                    known[i] |= define[i] && keep[i];
                }
            }
            keep.iter_mut().zip(&reached).for_each(|(k, r)| *k &= *r);
        }
        let mut known = vec![false; count];
        let mut passes = Vec::new();
        for (p, r) in roots.iter().enumerate() {
            let pass = self.plan_pass(p as u32, r, &known)?;
            for segment in &pass.segments {
                for i in 0..count {
                    known[i] |= segment.define[i] && keep[i];
                }
            }
            passes.push(pass);
        }
        if registers {
            // Threads hold the same elements in every pass.
            let reverse = passes.iter().any(|p| p.reverse);
            passes.iter_mut().for_each(|p| p.reverse = reverse);
        }
        Ok(Passes { passes, keep })
    }

    /// What a pass must give: operands of its reductions, its outputs' values and places.
    fn roots(&self, pass: u32) -> Vec<Id> {
        let program = self.program;
        let mut roots = Vec::new();
        for v in &program.values {
            if let Node::Reduce(_, x) = v.node
                && program.value(x).stage == pass
            {
                roots.push(x);
            }
        }
        for n in self.outputs_of(pass) {
            let output = &program.outputs[n];
            roots.push(output.value);
            roots.extend(output.scatter.iter().flat_map(|s| s.at.iter().copied()));
        }
        roots
    }

    fn outputs_of(&self, pass: u32) -> Vec<usize> {
        let program = self.program;
        let mine = |n: &usize| {
            let o = &program.outputs[*n];
            !o.per_row && program.output_stage(o) == pass
        };
        (0..program.outputs.len()).filter(mine).collect()
    }

    /// Values that must be computed for each element to have `roots`, and those of `known` among them, behind which
    /// nothing more is needed. What is hoisted is neither.
    fn closure(&self, roots: &[Id], known: &[bool]) -> (Vec<bool>, Vec<bool>) {
        let count = self.program.values.len();
        let (mut define, mut leaf) = (vec![false; count], vec![false; count]);
        for r in roots {
            define[r.index()] = true;
        }
        for i in (0..count).rev() {
            if !define[i] || self.hoisted[i] {
                define[i] = false;
            } else if known[i] {
                (define[i], leaf[i]) = (false, true);
            } else {
                for a in self.program.values[i].node.args() {
                    define[a.index()] = true;
                }
            }
        }
        (define, leaf)
    }

    fn dear(&self, i: usize) -> bool {
        match &self.program.values[i].node {
            Node::Op(op, _) => op.cost() >= DEAR || *op == Op::Rsqrt,
            Node::Random(_) | Node::Scan { .. } | Node::Load { .. } => true,
            _ => false,
        }
    }

    fn plan_pass(&self, p: u32, roots: &[Id], known: &[bool]) -> Result<Pass> {
        let program = self.program;
        let count = program.values.len();
        let (needed, kept) = self.closure(roots, known);
        // How many scans lie on the way to a value.
        let mut depth = vec![0; count];
        for i in (0..count).filter(|i| needed[*i]) {
            let node = &program.values[i].node;
            let before = node.args().iter().filter(|a| needed[a.index()]).map(|a| depth[a.index()]).max();
            depth[i] = before.unwrap_or(0) + u32::from(matches!(node, Node::Scan { .. }));
        }
        let scans: Vec<usize> = (0..count)
            .filter(|i| needed[*i] && matches!(program.values[*i].node, Node::Scan { .. }))
            .collect();
        let direction = |want: bool| {
            let is = |i: &&usize| matches!(program.values[**i].node, Node::Scan { reverse, .. } if reverse == want);
            scans.iter().any(|i| is(&i))
        };
        if direction(true) && direction(false) {
            let why = "scans from both ends of the row meet in one pass; split the kernel in two";
            return Err(unsupported(program, self.dialect, why));
        }
        let last = scans.iter().map(|i| depth[*i]).max().unwrap_or(0);
        let mut segments = Vec::new();
        for d in 0..=last {
            let here: Vec<Id> = scans.iter().filter(|i| depth[**i] == d + 1).map(|i| Id(*i as u32)).collect();
            let roots: Vec<Id> = if d == last {
                roots.to_vec()
            } else {
                here.iter().flat_map(|s| program.value(*s).node.args().to_vec()).collect()
            };
            // Results of earlier segments' scans are there already; their operands are not needed again.
            let done: Vec<bool> =
                (0..count).map(|i| known[i] || scans.contains(&i) && depth[i] <= d).collect();
            let (mut define, mut kept) = self.closure(&roots, &done);
            for &s in &scans {
                if kept[s] && !known[s] {
                    (define[s], kept[s]) = (true, false);
                }
            }
            segments.push(Segment { define, kept, scans: here });
        }
        let reductions = (0..count)
            .filter(|i| matches!(program.values[*i].node, Node::Reduce(_, x) if program.value(x).stage == p))
            .map(|i| Id(i as u32))
            .collect();
        let mut read = needed.clone();
        read.iter_mut().zip(&kept).for_each(|(r, k)| *r &= !k);
        Ok(Pass {
            reductions,
            outputs: self.outputs_of(p),
            segments,
            reverse: direction(true),
            inputs: self.streamed(&read),
        })
    }

    /// Writes one pass over the elements of a chunk whose inputs are loaded.
    pub fn write_chunk(&mut self, pass: &Pass, number: usize, keep: &[bool], chunk: &Chunk) {
        for segment in &pass.segments {
            let last = segment.scans.is_empty();
            for s in &segment.scans {
                self.declare_scan(*s);
            }
            if last {
                self.declare_results(&pass.outputs);
            }
            let places = !chunk.rows && self.needs_place(&[], &segment.define);
            let j = self.open_places(places);
            self.define_elements(segment, keep, chunk, j);
            self.feed_scans(&segment.scans, j);
            if last {
                self.accumulate(&pass.reductions, chunk, j);
                for &n in &pass.outputs {
                    self.keep_result(n, chunk);
                }
            }
            self.close_places(places);
            self.write_scans(&segment.scans, number, chunk);
            if last {
                self.store_chunk(&pass.outputs, chunk);
            }
        }
    }

    fn define_elements(&mut self, segment: &Segment, keep: &[bool], chunk: &Chunk, j: &str) {
        let program = self.program;
        if !chunk.rows {
            let axes: Vec<usize> = (0..program.values.len())
                .filter(|i| segment.define[*i])
                .filter_map(|i| match program.values[i].node {
                    Node::Index(axis) if axis > 0 => Some(axis as usize),
                    _ => None,
                })
                .collect();
            self.coordinates(&axes, "row");
        }
        for (i, &hold) in keep.iter().enumerate() {
            let id = Id(i as u32);
            if segment.kept[i] {
                let text = format!("k{i}[{}]", chunk.index(j));
                self.declare(id, &text);
            } else if segment.define[i] {
                self.define_element(id, chunk, j);
                if hold {
                    self.text.line(format!("k{i}[{}] = v{i};", chunk.index(j)));
                }
            }
        }
    }

    fn define_element(&mut self, id: Id, chunk: &Chunk, j: &str) {
        match self.program.value(id).node {
            Node::Input(n) => {
                let text = self.computed(n as usize, &format!("r{n}[{}]", chunk.index(j)));
                self.declare(id, &text);
            }
            Node::Index(axis) => {
                let text = match axis {
                    0 if chunk.rows => format!("int({})", chunk.offset(j)),
                    0 => "int(col)".to_owned(),
                    a if (a as usize) < self.plan.ndim => format!("int(p{a})"),
                    _ => "0".to_owned(),
                };
                self.declare(id, &text);
            }
            Node::Random(seed) => {
                self.need(super::helpers::Helper::Philox);
                let base = if chunk.rows { "base + " } else { "" };
                let seed = self.operand(seed);
                let text = format!("zk_random(uint64_t({base}{}), uint64_t({seed}))", chunk.offset(j));
                self.declare(id, &text);
            }
            Node::Scan { .. } => self.declare(id, &format!("s{}[{j}]", id.0)),
            _ => self.define(id),
        }
    }

    fn accumulate(&mut self, reductions: &[Id], chunk: &Chunk, j: &str) {
        if reductions.is_empty() {
            return;
        }
        let inside = format!("if ({} < {})", Chunk::position(j), chunk.bound());
        self.text.open(inside);
        for &r in reductions {
            let Node::Reduce(op, x) = self.program.value(r).node else { continue };
            let (x, n) = (self.operand(x), r.0);
            if matches!(op, ReduceOp::ArgMax | ReduceOp::ArgMin) {
                let better = self.goes_before(op);
                let at = chunk.offset(j);
                self.text.line(format!(
                    "if ({better}({x}, uint32_t({at}), a{n}, i{n})) {{ a{n} = {x}; i{n} = uint32_t({at}); }}"
                ));
            } else {
                let text = self.combine(op.into(), self.ty(r), &format!("a{n}"), &x);
                self.text.line(format!("a{n} = {text};"));
            }
        }
        self.text.close();
    }
}
