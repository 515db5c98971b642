//! Kernels with every type decided: what backends read.

use std::collections::HashMap;

use crate::error::{LangError, Result};
use crate::graph::{Const, Id, Node};
use crate::kernel::{Kernel, Role, Scatter};
use crate::{Dtype, Op, ReduceOp, Signature, Ty};

/// A typed value. Operands of an operation have exactly the types it works on: conversions are nodes of their own.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// What it is. A literal is of this value's type: `Const::Int(2)` of type `f32` is 2.0.
    pub node: Node,
    /// Its type while computed.
    pub ty: Ty,
    /// Whether it is the same along the whole row.
    pub uniform: bool,
    /// The pass over the row in which it can be computed: one more than the pass of the reductions it needs.
    pub stage: u32,
}

/// An input with its dtype known.
#[derive(Debug, Clone, PartialEq)]
pub struct ProgramInput {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// How it meets the domain.
    pub role: Role,
    /// Whether any output needs it.
    pub used: bool,
}

/// An output with its dtype known.
#[derive(Debug, Clone, PartialEq)]
pub struct ProgramOutput {
    /// Name.
    pub name: String,
    /// The value, of the dtype's compute type; storing rounds it.
    pub value: Id,
    /// Element type.
    pub dtype: Dtype,
    /// One value a row instead of one an element.
    pub per_row: bool,
    /// For `per_row`: whether the last axis stays, as 1.
    pub keep_dims: bool,
    /// Coordinates (of type `i32`) that the value is added at.
    pub scatter: Option<Scatter>,
}

/// A kernel for inputs of known dtypes.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// The kernel's name.
    pub name: String,
    /// The inputs, all of the kernel's, used or not.
    pub inputs: Vec<ProgramInput>,
    /// The outputs.
    pub outputs: Vec<ProgramOutput>,
    /// The values that outputs need, operands first.
    pub values: Vec<Value>,
    /// No contraction, no rewriting.
    pub strict: bool,
    /// Passes over the row; 1 for an elementwise kernel.
    pub passes: u32,
    /// Whether there are reductions or scans.
    pub has_rows: bool,
}

impl Kernel {
    /// Decides all types for inputs of these dtypes.
    pub fn program(&self, dtypes: &[Dtype]) -> Result<Program> {
        if dtypes.len() != self.inputs.len() {
            let what = format!("it has {} inputs, {} dtypes were given", self.inputs.len(), dtypes.len());
            return Err(LangError::Kernel { kernel: self.name.clone(), what });
        }
        for (decl, &found) in self.inputs.iter().zip(dtypes) {
            if let Some(expected) = decl.dtype.filter(|d| *d != found) {
                let (kernel, input) = (self.name.clone(), decl.name.clone());
                return Err(LangError::InputDtype { kernel, input, expected, found });
            }
        }
        Lowering::new(self, dtypes).run()
    }

    /// The dtype floats are stored in when nothing else is said: the promotion of the float inputs' dtypes.
    pub fn float_dtype(&self, dtypes: &[Dtype]) -> Dtype {
        let stored = self
            .inputs
            .iter()
            .zip(dtypes)
            .filter(|(i, d)| !matches!(i.role, Role::Scalar(_)) && d.is_float());
        let mut floats = stored.map(|(_, d)| *d);
        match floats.next() {
            Some(first) if floats.all(|d| d == first) => first,
            _ => Dtype::F32,
        }
    }
}

struct Lowering<'a> {
    kernel: &'a Kernel,
    dtypes: &'a [Dtype],
    values: Vec<Value>,
    known: HashMap<(Node, Ty), Id>,
    /// Uses of each node of the kernel's graph, to contract only products that nothing else reads.
    uses: Vec<u32>,
}

/// A lowered node; a weak one is a literal (or made of literals) that adapts to what it meets.
#[derive(Clone, Copy)]
struct Lowered {
    id: Id,
    weak: bool,
}

impl<'a> Lowering<'a> {
    fn new(kernel: &'a Kernel, dtypes: &'a [Dtype]) -> Self {
        let mut uses = vec![0; kernel.graph.nodes().len()];
        for node in kernel.graph.nodes() {
            for a in node.args() {
                uses[a.index()] += 1;
            }
        }
        Self { kernel, dtypes, values: Vec::new(), known: HashMap::new(), uses }
    }

    fn run(mut self) -> Result<Program> {
        let kernel = self.kernel;
        let needed = kernel.graph.reachable(&kernel.roots());
        let mut lowered: Vec<Option<Lowered>> = Vec::with_capacity(needed.len());
        for (i, node) in kernel.graph.nodes().iter().enumerate() {
            lowered.push(if needed[i] { Some(self.node(node, &lowered)?) } else { None });
        }
        let outputs = self.outputs(&lowered)?;
        let mut program = Program {
            name: kernel.name.clone(),
            inputs: Vec::new(),
            outputs,
            values: self.values,
            strict: kernel.strict,
            passes: 1,
            has_rows: false,
        };
        program.drop_unused();
        program.passes = program.count_passes();
        program.has_rows =
            program.values.iter().any(|v| matches!(v.node, Node::Reduce(..) | Node::Scan { .. }));
        program.inputs = inputs(kernel, self.dtypes, &program.values);
        Ok(program)
    }

    fn outputs(&mut self, lowered: &[Option<Lowered>]) -> Result<Vec<ProgramOutput>> {
        let kernel = self.kernel;
        let get = |id: Id| lowered[id.index()].ok_or_else(|| missing(kernel));
        let has_rows = kernel.has_rows();
        let mut outputs = Vec::new();
        for decl in &kernel.outputs {
            let value = get(decl.value)?.id;
            let ty = self.ty(value);
            let dtype = decl.dtype.unwrap_or(match ty {
                Ty::F32 => kernel.float_dtype(self.dtypes),
                ty => ty.storage(),
            });
            let value = self.convert(value, dtype.compute());
            let scatter = match &decl.scatter {
                None => None,
                Some(s) => {
                    let at = s.at.iter().map(|&a| self.coordinate(get(a)?)).collect::<Result<Vec<_>>>()?;
                    Some(Scatter { at, ..s.clone() })
                }
            };
            let per_row = has_rows && scatter.is_none() && self.values[value.index()].uniform;
            let (name, keep_dims) = (decl.name.clone(), decl.keep_dims);
            outputs.push(ProgramOutput { name, value, dtype, per_row, keep_dims, scatter });
        }
        Ok(outputs)
    }

    fn ty(&self, id: Id) -> Ty {
        self.values[id.index()].ty
    }

    fn add(&mut self, node: Node, ty: Ty) -> Id {
        if let Some(&id) = self.known.get(&(node.clone(), ty)) {
            return id;
        }
        let args = node.args();
        let uniform = match &node {
            Node::Input(n) => !matches!(self.kernel.inputs[*n as usize].role, Role::Element),
            Node::Index(axis) => *axis != 0,
            Node::Random(_) | Node::Scan { .. } => false,
            Node::Reduce(..) => true,
            _ => args.iter().all(|a| self.values[a.index()].uniform),
        };
        let before = args.iter().map(|a| self.values[a.index()].stage).max().unwrap_or(0);
        let stage = before + u32::from(matches!(node, Node::Reduce(..)));
        let id = Id(self.values.len() as u32);
        self.values.push(Value { node: node.clone(), ty, uniform, stage });
        self.known.insert((node, ty), id);
        id
    }

    fn error(&self, op: &str, found: &[Ty], expected: &str) -> LangError {
        LangError::operands(&self.kernel.name, op, found, expected)
    }

    /// Gives a value in another type.
    fn convert(&mut self, id: Id, to: Ty) -> Id {
        let from = self.ty(id);
        if from == to {
            return id;
        }
        if let Node::Const(c) = self.values[id.index()].node {
            let exact = match (c, to) {
                (Const::Int(v), Ty::I32) => i32::try_from(v).is_ok(),
                (Const::Int(v), Ty::U32) => u32::try_from(v).is_ok(),
                (Const::Int(v), Ty::U64) => v >= 0,
                (Const::Int(_), Ty::I64 | Ty::F32) => true,
                (Const::Bool(_), _) => true,
                _ => false,
            };
            if exact {
                let c = if let Const::Bool(b) = c { Const::Int(b.into()) } else { c };
                return self.add(Node::Const(c), to);
            }
        }
        self.add(Node::Cast(to.storage(), id), to)
    }

    fn coordinate(&mut self, v: Lowered) -> Result<Id> {
        let ty = self.ty(v.id);
        if !ty.is_int() {
            return Err(self.error("a coordinate", &[ty], "it must be an integer; write i32(...)"));
        }
        // An unsigned or 64-bit coordinate beyond i32 is outside any array: saturate it there rather than wrap.
        if ty == Ty::I32 {
            return Ok(v.id);
        }
        let top = self.add(Node::Const(Const::Int(i64::from(i32::MAX))), ty);
        let mut id = self.add(Node::Op(Op::Min, vec![v.id, top]), ty);
        if ty == Ty::I64 {
            let bottom = self.add(Node::Const(Const::Int(i64::from(i32::MIN))), ty);
            id = self.add(Node::Op(Op::Max, vec![id, bottom]), ty);
        }
        Ok(self.convert(id, Ty::I32))
    }

    /// The type in which operands meet.
    fn meet(&self, op: Op, args: &[Lowered]) -> Result<Ty> {
        let types: Vec<Ty> = args.iter().map(|a| self.ty(a.id)).collect();
        let strong =
            |weak: bool| args.iter().zip(&types).filter(move |(a, _)| a.weak == weak).map(|(_, t)| *t);
        let no = |_: ()| self.error(op.name(), &types, "i64 and u64 have no common type; cast one of them");
        let mut meet: Option<Ty> = None;
        for t in strong(false) {
            meet = Some(match meet {
                None => t,
                Some(m) => m.promote(t).ok_or(()).map_err(no)?,
            });
        }
        for t in strong(true) {
            meet = Some(match (meet, t) {
                (None, t) => t,
                (Some(m), Ty::F32) => m.promote(Ty::F32).ok_or(()).map_err(no)?,
                // An integer literal takes the other's type; with a boolean it stays an integer.
                (Some(Ty::Bool), t) => t,
                (Some(Ty::I32), Ty::I64) => Ty::I64,
                (Some(m), _) => m,
            });
        }
        Ok(meet.unwrap_or(Ty::F32))
    }

    fn node(&mut self, node: &Node, lowered: &[Option<Lowered>]) -> Result<Lowered> {
        let kernel = self.kernel;
        let get = |id: Id| lowered[id.index()].ok_or_else(|| missing(kernel));
        let strong = |id| Lowered { id, weak: false };
        Ok(match node {
            Node::Input(n) => strong(self.add(node.clone(), self.dtypes[*n as usize].compute())),
            Node::Const(c) => {
                let ty = match c {
                    Const::Float(_) => Ty::F32,
                    Const::Bool(_) => Ty::Bool,
                    Const::Int(v) if i32::try_from(*v).is_ok() => Ty::I32,
                    Const::Int(_) => Ty::I64,
                };
                Lowered { id: self.add(node.clone(), ty), weak: ty != Ty::Bool }
            }
            Node::Index(_) | Node::Len(_) => strong(self.add(node.clone(), Ty::I32)),
            Node::Random(seed) => {
                let seed = get(*seed)?;
                let ty = self.ty(seed.id);
                if !ty.is_int() {
                    return Err(self.error("random", &[ty], "the seed must be an integer"));
                }
                let to = if matches!(ty, Ty::I64 | Ty::U64) { Ty::U64 } else { Ty::U32 };
                let seed = self.convert(seed.id, to);
                strong(self.add(Node::Random(seed), Ty::U32))
            }
            Node::Op(op, args) => {
                let lowered = args.iter().map(|&a| get(a)).collect::<Result<Vec<_>>>()?;
                let weak = lowered.iter().all(|l| l.weak) && !matches!(op.signature(), Signature::Compare);
                Lowered { id: self.op(*op, args, &lowered)?, weak }
            }
            Node::Cast(dtype, x) => strong(self.cast(*dtype, get(*x)?.id)),
            Node::Bitcast(dtype, x) => {
                let (x, to) = (get(*x)?.id, dtype.compute());
                let ty = self.ty(x);
                let wide = |t: Ty| matches!(t, Ty::F32 | Ty::I32 | Ty::U32);
                if !wide(ty) || !wide(to) || dtype.size() != 4 {
                    return Err(self.error("bitcast", &[ty, to], "it works between f32, i32 and u32"));
                }
                strong(if ty == to { x } else { self.add(Node::Bitcast(*dtype, x), to) })
            }
            Node::Reduce(op, x) => strong(self.reduce(*op, get(*x)?.id)),
            Node::Scan { op, reverse, exclusive, arg } => {
                let x = get(*arg)?.id;
                let x = if self.ty(x) == Ty::Bool { self.convert(x, Ty::I32) } else { x };
                let ty = self.ty(x);
                strong(self.add(Node::Scan { op: *op, reverse: *reverse, exclusive: *exclusive, arg: x }, ty))
            }
            Node::Load { input, at, bounds } => {
                let at = at.iter().map(|&a| self.coordinate(get(a)?)).collect::<Result<Vec<_>>>()?;
                let ty = self.dtypes[*input as usize].compute();
                strong(self.add(Node::Load { input: *input, at, bounds: *bounds }, ty))
            }
        })
    }

    fn cast(&mut self, dtype: Dtype, x: Id) -> Id {
        let to = dtype.compute();
        if to.storage() == dtype {
            return self.convert(x, to);
        }
        // A narrow type: to its compute type first, then rounded or wrapped inside it.
        let x = self.convert(x, to);
        self.add(Node::Cast(dtype, x), to)
    }

    fn reduce(&mut self, op: ReduceOp, x: Id) -> Id {
        let x = if self.ty(x) == Ty::Bool { self.convert(x, Ty::I32) } else { x };
        let ty = match op {
            ReduceOp::ArgMax | ReduceOp::ArgMin => Ty::U32,
            _ => self.ty(x),
        };
        self.add(Node::Reduce(op, x), ty)
    }

    fn op(&mut self, op: Op, args: &[Id], lowered: &[Lowered]) -> Result<Id> {
        let types: Vec<Ty> = lowered.iter().map(|l| self.ty(l.id)).collect();
        let (operand, result) = match op.signature() {
            Signature::Float => (Ty::F32, Ty::F32),
            Signature::FloatTest => (Ty::F32, Ty::Bool),
            Signature::Number => {
                let ty = match self.meet(op, lowered)? {
                    Ty::Bool => Ty::I32,
                    ty => ty,
                };
                (ty, ty)
            }
            Signature::Integer => {
                let ty = self.meet(op, lowered)?;
                let bits = matches!(op, Op::BitAnd | Op::BitOr | Op::BitXor | Op::BitNot);
                if !(ty.is_int() || ty == Ty::Bool && bits) {
                    return Err(self.error(
                        op.name(),
                        &types,
                        "it works on integers; cast with i32(...) or use bitcast_u32(...)",
                    ));
                }
                (ty, ty)
            }
            Signature::Compare => (self.meet(op, lowered)?, Ty::Bool),
            Signature::Logic => (Ty::Bool, Ty::Bool),
            Signature::Select => {
                let ty = self.meet(op, &lowered[1..])?;
                let condition = self.truth(lowered[0].id);
                let (a, b) = (self.convert(lowered[1].id, ty), self.convert(lowered[2].id, ty));
                return Ok(self.add(Node::Op(op, vec![condition, a, b]), ty));
            }
        };
        let converted: Vec<Id> = match op.signature() {
            Signature::Logic => lowered.iter().map(|l| self.truth(l.id)).collect(),
            _ => lowered.iter().map(|l| self.convert(l.id, operand)).collect(),
        };
        if !self.kernel.strict
            && result == Ty::F32
            && let Some(id) = self.relaxed(op, args, &converted)
        {
            return Ok(id);
        }
        Ok(self.add(Node::Op(op, converted), result))
    }

    /// `x` as a condition: numbers are true unless 0.
    fn truth(&mut self, x: Id) -> Id {
        match self.ty(x) {
            Ty::Bool => x,
            ty => {
                let zero = self.add(Node::Const(Const::Int(0)), ty);
                self.add(Node::Op(Op::Ne, vec![x, zero]), Ty::Bool)
            }
        }
    }

    /// What a kernel that is not strict may compute instead: a fused multiply-add for a product that only a sum reads,
    /// and a product with the reciprocal for the division of elements by a value of the row.
    fn relaxed(&mut self, op: Op, args: &[Id], converted: &[Id]) -> Option<Id> {
        let [a, b] = *converted else { return None };
        let product = |s: &Self, arg: Id, id: Id| match &s.values[id.index()].node {
            Node::Op(Op::Mul, f) if s.uses[arg.index()] == 1 && !s.values[id.index()].uniform => {
                Some((f[0], f[1]))
            }
            _ => None,
        };
        match op {
            Op::Add => {
                let (f, c) = product(self, args[0], a)
                    .map(|f| (f, b))
                    .or_else(|| product(self, args[1], b).map(|f| (f, a)))?;
                Some(self.add(Node::Op(Op::Fma, vec![f.0, f.1, c]), Ty::F32))
            }
            Op::Div if self.values[b.index()].uniform && !self.values[a.index()].uniform => {
                if matches!(self.values[b.index()].node, Node::Const(_)) {
                    return None;
                }
                let one = self.add(Node::Const(Const::Int(1)), Ty::F32);
                let inverse = self.add(Node::Op(Op::Div, vec![one, b]), Ty::F32);
                Some(self.add(Node::Op(Op::Mul, vec![a, inverse]), Ty::F32))
            }
            _ => None,
        }
    }
}

fn missing(kernel: &Kernel) -> LangError {
    LangError::Kernel {
        kernel: kernel.name.clone(),
        what: "a node refers to one that is not there".to_owned(),
    }
}

fn inputs(kernel: &Kernel, dtypes: &[Dtype], values: &[Value]) -> Vec<ProgramInput> {
    let used = |n: usize| {
        values.iter().any(|v| match v.node {
            Node::Input(i) | Node::Load { input: i, .. } => i as usize == n,
            _ => false,
        })
    };
    let one = |(n, (decl, &dtype)): (usize, (&crate::InputDecl, &Dtype))| ProgramInput {
        name: decl.name.clone(),
        dtype,
        role: decl.role,
        used: used(n),
    };
    kernel.inputs.iter().zip(dtypes).enumerate().map(one).collect()
}

impl Program {
    /// A value.
    pub fn value(&self, id: Id) -> &Value {
        &self.values[id.index()]
    }

    /// Keeps the values that outputs need.
    fn drop_unused(&mut self) {
        let mut needed = vec![false; self.values.len()];
        let roots = |o: &ProgramOutput| {
            o.scatter.iter().flat_map(|s| s.at.clone()).chain([o.value]).collect::<Vec<_>>()
        };
        for r in self.outputs.iter().flat_map(roots) {
            needed[r.index()] = true;
        }
        for i in (0..self.values.len()).rev() {
            if needed[i] {
                for a in self.values[i].node.args().to_vec() {
                    needed[a.index()] = true;
                }
            }
        }
        let mut new = vec![Id(0); self.values.len()];
        let mut kept = Vec::new();
        for (i, v) in std::mem::take(&mut self.values).into_iter().enumerate() {
            if needed[i] {
                new[i] = Id(kept.len() as u32);
                kept.push(Value { node: v.node.map_args(|a| new[a.index()]), ..v });
            }
        }
        self.values = kept;
        for o in &mut self.outputs {
            o.value = new[o.value.index()];
            for a in o.scatter.iter_mut().flat_map(|s| &mut s.at) {
                *a = new[a.index()];
            }
        }
    }

    /// One more than the last pass in which something is accumulated or an element is written.
    fn count_passes(&self) -> u32 {
        let reduced = |v: &Value| match v.node {
            Node::Reduce(_, x) => Some(self.value(x).stage),
            _ => None,
        };
        let last = self.values.iter().filter_map(reduced).max();
        let written = self.outputs.iter().filter(|o| !o.per_row).map(|o| self.output_stage(o)).max();
        last.max(written).unwrap_or(0) + 1
    }

    /// The pass in which an element output is written, or after which a row output is known.
    pub fn output_stage(&self, output: &ProgramOutput) -> u32 {
        let at = output.scatter.iter().flat_map(|s| &s.at);
        at.chain([&output.value]).map(|v| self.value(*v).stage).max().unwrap_or(0)
    }

    /// For each value, whether it must be computed in pass `pass` for elements: the operands of that pass's reductions
    /// and of the outputs written in it, without what is the same along the row.
    pub fn needed_in_pass(&self, pass: u32) -> Vec<bool> {
        let mut needed = vec![false; self.values.len()];
        for v in &self.values {
            if let Node::Reduce(_, x) = v.node
                && self.value(x).stage == pass
            {
                needed[x.index()] = true;
            }
        }
        for o in self.outputs.iter().filter(|o| !o.per_row && self.output_stage(o) == pass) {
            needed[o.value.index()] = true;
            for a in o.scatter.iter().flat_map(|s| &s.at) {
                needed[a.index()] = true;
            }
        }
        for i in (0..self.values.len()).rev() {
            if needed[i] && !self.values[i].uniform {
                for a in self.values[i].node.args() {
                    needed[a.index()] = true;
                }
            }
        }
        needed.iter().zip(&self.values).map(|(n, v)| *n && !v.uniform).collect()
    }

    /// Multiplication-like work of one element, all passes.
    pub fn flops_per_element(&self) -> u64 {
        let cost = |v: &Value| match &v.node {
            Node::Op(op, _) => u64::from(op.cost()),
            Node::Random(_) => 40,
            Node::Cast(..) | Node::Scan { .. } => 1,
            _ => 0,
        };
        let pass = |p| {
            let needed = self.needed_in_pass(p);
            let reduced = |v: &&Value| matches!(v.node, Node::Reduce(_, x) if self.value(x).stage == p);
            let sums = self.values.iter().filter(reduced).count() as u64;
            self.values.iter().zip(needed).filter(|(_, n)| *n).map(|(v, _)| cost(v)).sum::<u64>() + sums
        };
        (0..self.passes).map(pass).sum()
    }
}
