//! What each pass over a row computes, and where values live.

use zmlx_lang::{Id, Node, Op, Program, ReduceOp, Ty};

use super::exec::by_registers;

/// Where a value's lanes are during a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Not in memory during this pass.
    None,
    /// In a block-sized slot.
    Slot(u16),
    /// In a buffer as long as the row: later passes read it again.
    Row(u16),
}

/// One operation of a block, maybe with the one before it, whose value then never goes through memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// The value computed.
    pub id: Id,
    /// An operand that is computed on the way.
    pub inner: Option<Id>,
}

impl Step {
    fn one(id: Id) -> Self {
        Self { id, inner: None }
    }

    /// What the step reads.
    pub fn args(&self, program: &Program) -> Vec<Id> {
        let own = program.value(self.id).node.args();
        match self.inner {
            None => own.to_vec(),
            Some(inner) => {
                let read = program.value(inner).node.args().iter();
                read.chain(own.iter().filter(|a| **a != inner)).copied().collect()
            }
        }
    }
}

/// A scan along the row, run before the pass that reads it.
#[derive(Debug, Clone)]
pub(super) struct ScanStep {
    /// The scan's value.
    pub value: Id,
    /// What its operand needs, in order.
    pub code: Vec<Step>,
}

/// One walk over the columns of a row.
#[derive(Debug, Clone, Default)]
pub(super) struct Pass {
    /// Scans whose operands are known from this pass on.
    pub scans: Vec<ScanStep>,
    /// Values to compute for each block, in order; inputs among them are read.
    pub code: Vec<Step>,
    /// Reductions accumulated in this pass; the inner value of a sum is a product.
    pub reduces: Vec<Step>,
    /// Element outputs written in this pass.
    pub stores: Vec<usize>,
    /// Place of every value.
    pub places: Vec<Place>,
}

/// Choices of the code, made by the launch layer and the tuner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Options {
    /// Elements of a block; 0 chooses by how many slots there are.
    pub block: usize,
    /// Keep costly values of a row for later passes instead of computing them again.
    pub keep: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { block: 0, keep: true }
    }
}

/// A program made ready for the engine.
#[derive(Debug)]
pub(crate) struct Code {
    pub program: Program,
    pub options: Options,
    pub(super) passes: Vec<Pass>,
    /// Values that are the same along the row and are needed lane by lane: each has a slot of its own.
    pub(super) fills: Vec<(Id, u16)>,
    /// Whether a uniform value may change from row to row.
    pub(super) varies: Vec<bool>,
    /// Block-sized slots in all.
    pub(super) slots: usize,
    /// Row-sized buffers in all.
    pub(super) rows: usize,
    /// Bytes a lane needs: 8 with 64-bit integers, else 4.
    pub(super) lane: usize,
    /// Uniform values by the pass after which they are known (0: before the first), in order.
    pub(super) uniform: Vec<Vec<Id>>,
    /// Those of them that are computed: in a task's first row, and in later rows.
    pub(super) computed: [Vec<Vec<Step>>; 2],
}

/// Bytes of all slots together that leave room for inputs and outputs in the first-level cache.
const BLOCK_BYTES: usize = 24 << 10;

/// Cost from which a value is kept rather than computed again in a later pass.
const WORTH_KEEPING: u32 = 5;

impl Code {
    pub fn new(program: Program, options: Options) -> Self {
        let n = program.values.len();
        let wide = |ty: Ty| matches!(ty, Ty::I64 | Ty::U64);
        let lane = if program.values.iter().any(|v| wide(v.ty)) { 8 } else { 4 };
        let mut code = Self {
            options,
            passes: Vec::new(),
            fills: Vec::new(),
            varies: varies(&program),
            slots: 0,
            rows: 0,
            lane,
            uniform: vec![Vec::new(); program.passes as usize + 1],
            computed: [Vec::new(), Vec::new()],
            program,
        };
        code.place_uniform();
        code.computed = [code.computed(false), code.computed(true)];
        let mut kept = vec![Place::None; n];
        for pass in 0..code.program.passes {
            let built = code.pass(pass, &mut kept);
            code.passes.push(built);
        }
        if code.options.block == 0 {
            let fitting = BLOCK_BYTES / (code.slots.max(1) * code.lane);
            code.options.block = (fitting.max(1).next_power_of_two() / 2).clamp(256, 4096);
        }
        code
    }

    /// Uniform operations by stage; with `again`, only those that differ between rows.
    fn computed(&self, again: bool) -> Vec<Vec<Step>> {
        let program = &self.program;
        let one = |id: &&Id| {
            let op = !program.value(**id).node.args().is_empty();
            op && !matches!(program.value(**id).node, Node::Reduce(..)) && (!again || self.varies[id.index()])
        };
        self.uniform.iter().map(|stage| stage.iter().filter(one).copied().map(Step::one).collect()).collect()
    }

    /// Sorts uniform values by when they are known, and gives a slot to those that blocks read.
    fn place_uniform(&mut self) {
        let program = &self.program;
        let mut read = vec![false; program.values.len()];
        for (i, v) in program.values.iter().enumerate() {
            let lanes = !v.uniform && !by_registers(program, Id(i as u32));
            if lanes || matches!(v.node, Node::Reduce(..)) {
                v.node.args().iter().for_each(|a| read[a.index()] = true);
            }
        }
        for o in program.outputs.iter().filter(|o| !o.per_row) {
            read[o.value.index()] = true;
            o.scatter.iter().flat_map(|s| &s.at).for_each(|a| read[a.index()] = true);
        }
        for (i, v) in program.values.iter().enumerate().filter(|(_, v)| v.uniform) {
            let stage = (v.stage as usize).min(program.passes as usize);
            self.uniform[stage].push(Id(i as u32));
            if read[i] {
                self.fills.push((Id(i as u32), self.slots as u16));
                self.slots += 1;
            }
        }
    }

    fn pass(&mut self, pass: u32, kept: &mut [Place]) -> Pass {
        let program = &self.program;
        let mut out = Pass { places: kept.to_vec(), ..Pass::default() };
        for &(id, slot) in &self.fills {
            out.places[id.index()] = Place::Slot(slot);
        }
        for (i, v) in program.values.iter().enumerate() {
            if matches!(v.node, Node::Reduce(_, x) if program.value(x).stage == pass) {
                out.reduces.push(Step::one(Id(i as u32)));
            }
        }
        let written = |o: &zmlx_lang::program::ProgramOutput| !o.per_row && program.output_stage(o) == pass;
        out.stores = (0..program.outputs.len()).filter(|&o| written(&program.outputs[o])).collect();

        // Scans first, each into a row of its own.
        let mut rows = self.rows;
        let scans: Vec<Id> = (0..program.values.len() as u32)
            .map(Id)
            .filter(|&id| {
                matches!(program.value(id).node, Node::Scan { .. }) && program.value(id).stage == pass
            })
            .collect();
        let mut slots = self.fills.len();
        for value in scans {
            let Node::Scan { arg, .. } = program.value(value).node else { continue };
            let code = needed(program, &[arg], &out.places);
            let mut taken = self.fills.len();
            taken += code.len();
            slots = slots.max(taken);
            out.scans.push(ScanStep { value, code: code.iter().copied().map(Step::one).collect() });
            // The operand's places hold for this scan only: `scan_slot` numbers them.
            out.places[value.index()] = Place::Row(rows as u16);
            kept[value.index()] = Place::Row(rows as u16);
            rows += 1;
        }

        let mut roots: Vec<Id> =
            out.reduces.iter().flat_map(|r| program.value(r.id).node.args().to_vec()).collect();
        for &o in &out.stores {
            let output = &program.outputs[o];
            roots.push(output.value);
            roots.extend(output.scatter.iter().flat_map(|s| s.at.iter().copied()));
        }
        let code = needed(program, &roots, &out.places);

        // Costly values that a later pass reads stay in a row.
        if self.options.keep {
            for &id in &code {
                let later = (pass + 1..program.passes).any(|p| program.needed_in_pass(p)[id.index()]);
                if later && cost(&program.value(id).node) >= WORTH_KEEPING {
                    out.places[id.index()] = Place::Row(rows as u16);
                    kept[id.index()] = Place::Row(rows as u16);
                    rows += 1;
                }
            }
        }
        self.rows = rows;
        fuse(program, &mut out, &code, &mut roots);
        let taken = assign_slots(program, &mut out, &roots, self.fills.len());
        self.slots = self.slots.max(taken).max(slots);
        out
    }
}

/// Slots of a scan's operands: numbered in order after the fills.
pub(super) fn scan_slot(fills: usize, position: usize) -> u16 {
    (fills + position) as u16
}

fn cost(node: &Node) -> u32 {
    match node {
        Node::Op(op, _) if *op != Op::Select => op.cost(),
        Node::Random(_) | Node::Load { .. } => 20,
        _ => 1,
    }
}

/// Which uniform values depend on the row: on row inputs, outer coordinates or reductions.
fn varies(program: &Program) -> Vec<bool> {
    let mut varies: Vec<bool> = Vec::with_capacity(program.values.len());
    for v in &program.values {
        varies.push(match &v.node {
            Node::Input(n) => !matches!(program.inputs[*n as usize].role, zmlx_lang::Role::Scalar(_)),
            Node::Index(_) | Node::Reduce(..) | Node::Scan { .. } | Node::Random(_) => true,
            node => node.args().iter().any(|a| varies[a.index()]),
        });
    }
    varies
}

/// The values that `roots` need and that have no place yet, operands first.
fn needed(program: &Program, roots: &[Id], places: &[Place]) -> Vec<Id> {
    let mut marked = vec![false; program.values.len()];
    let wanted = |id: Id| !program.value(id).uniform && places[id.index()] == Place::None;
    for r in roots.iter().filter(|r| wanted(**r)) {
        marked[r.index()] = true;
    }
    for i in (0..marked.len()).rev() {
        if marked[i] {
            for a in program.values[i].node.args().iter().filter(|a| wanted(**a)) {
                marked[a.index()] = true;
            }
        }
    }
    (0..marked.len()).filter(|&i| marked[i]).map(|i| Id(i as u32)).collect()
}

/// Joins operations with a cheap one whose value nobody else reads. Results do not change: each still rounds on its own.
fn fuse(program: &Program, pass: &mut Pass, code: &[Id], roots: &mut Vec<Id>) {
    let mut uses = vec![0u32; program.values.len()];
    let reads = |id: &Id| program.value(*id).node.args().to_vec();
    for a in code.iter().flat_map(reads).chain(roots.iter().copied()) {
        uses[a.index()] += 1;
    }
    let fits = |id: Id| {
        uses[id.index()] == 1
            && pass.places[id.index()] == Place::None
            && code.contains(&id)
            && program.value(id).ty == Ty::F32
    };
    let op = |id: Id| match &program.value(id).node {
        Node::Op(op, args) => Some((*op, args.as_slice())),
        _ => None,
    };
    let mut absorbed = Vec::new();
    let mut inner = |id: Id, wanted: &dyn Fn(Op) -> bool| -> Option<Id> {
        let (o, _) = op(id)?;
        let yes = fits(id) && wanted(o) && !absorbed.contains(&id);
        if yes {
            absorbed.push(id);
        }
        yes.then_some(id)
    };
    let mut steps: Vec<Step> = Vec::new();
    for &id in code.iter().rev() {
        if steps.iter().any(|s| s.inner == Some(id)) {
            continue;
        }
        let found = match op(id) {
            Some((Op::Exp, [x])) => inner(*x, &|o| o == Op::Sub),
            Some((Op::Mul, [a, b])) if a != b => {
                let product = |o| o == Op::Mul || FUSED_UNARY.contains(&o);
                inner(*a, &product).or_else(|| inner(*b, &product))
            }
            _ => None,
        };
        steps.push(Step { id, inner: found });
    }
    steps.reverse();
    for r in &mut pass.reduces {
        if let Node::Reduce(ReduceOp::Sum, x) = program.value(r.id).node
            && fits(x)
            && op(x).is_some_and(|(o, args)| o == Op::Mul && !args.iter().any(|a| program.value(*a).uniform))
            && steps.iter().any(|s| s.id == x && s.inner.is_none())
        {
            r.inner = Some(x);
            steps.retain(|s| s.id != x);
            roots.extend(program.value(x).node.args());
        }
    }
    pass.code = steps;
}

/// Functions that a product takes in without a pass through memory.
pub(super) const FUSED_UNARY: [Op; 5] = [Op::Silu, Op::GeluTanh, Op::GeluErf, Op::Sigmoid, Op::Exp];

/// Gives block slots to the pass's values, reusing those whose value nobody reads any more. An operation never writes
/// where one of its operands is. Returns how many slots there are then.
fn assign_slots(program: &Program, pass: &mut Pass, roots: &[Id], fills: usize) -> usize {
    let mut last = vec![0usize; program.values.len()];
    for (at, step) in pass.code.iter().enumerate() {
        for a in step.args(program) {
            last[a.index()] = at;
        }
    }
    for r in roots {
        last[r.index()] = usize::MAX;
    }
    let (mut free, mut slots): (Vec<u16>, usize) = (Vec::new(), fills);
    // Inputs are all brought in before the first operation, so none may share a slot with a value computed earlier.
    for step in &pass.code {
        let id = step.id;
        if matches!(program.value(id).node, Node::Input(_)) && pass.places[id.index()] == Place::None {
            pass.places[id.index()] = Place::Slot(slots as u16);
            slots += 1;
        }
    }
    for at in 0..pass.code.len() {
        let step = pass.code[at];
        let id = step.id;
        if pass.places[id.index()] == Place::None {
            let slot = free.pop().unwrap_or_else(|| {
                slots += 1;
                (slots - 1) as u16
            });
            pass.places[id.index()] = Place::Slot(slot);
        }
        let mut args = step.args(program);
        args.sort_unstable();
        args.dedup();
        for a in args {
            if last[a.index()] == at
                && !program.value(a).uniform
                && let Place::Slot(s) = pass.places[a.index()]
                && pass.code.iter().any(|s| s.id == a)
            {
                free.push(s);
            }
        }
    }
    slots
}
