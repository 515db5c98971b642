//! From expressions of derivatives to a kernel: levels of outputs, saved values, only the inputs that are read.

use super::build::Build;
use super::plan::{Level, Plan};
use crate::simplify;
use crate::{Graph, Id, InputDecl, Kernel, Node, Op, OutputDecl, Role};

/// An output and the level it must have.
pub(super) type Derived = (OutputDecl, Level);

/// Numbers of the inputs that a derivative has besides the kernel's own.
pub(super) struct Extra {
    /// Cotangents of each output (or tangents of each input, in forward mode).
    pub(super) given: Vec<u32>,
    /// The value of each output, saved.
    pub(super) saved: Vec<u32>,
}

impl Extra {
    /// Declares a cotangent and a saved value for each output.
    pub(super) fn declare(b: &mut Build, plan: &Plan) -> Self {
        let roles: Vec<(String, Role)> = plan
            .kernel
            .outputs
            .iter()
            .zip(&plan.outputs)
            .map(|(o, level)| (o.name.clone(), level.unwrap_or(Level::Element).role()))
            .collect();
        let declare =
            |b: &mut Build, prefix: &str| roles.iter().map(|(n, r)| input(b, prefix, n, *r)).collect();
        Self { given: declare(b, "g_"), saved: declare(b, "") }
    }

    /// Declares a tangent for each input.
    pub(super) fn tangents(b: &mut Build, plan: &Plan) -> Self {
        let inputs = &plan.kernel.inputs;
        let role = |role| if let Role::Scalar(_) = role { Role::Row } else { role };
        Self {
            given: inputs.iter().map(|i| input(b, "t_", &i.name, role(i.role))).collect(),
            saved: Vec::new(),
        }
    }
}

fn input(b: &mut Build, prefix: &str, name: &str, role: Role) -> u32 {
    let taken = |n: &str| b.inputs.iter().any(|i| i.name == n);
    let name = unique(format!("{prefix}{name}"), taken);
    b.inputs.push(InputDecl { name, role, dtype: None });
    b.inputs.len() as u32 - 1
}

/// A value of the row that stands for itself.
pub(super) fn row_symbol(b: &mut Build) -> Id {
    let n = input(b, "t_", "symbol", Role::Row);
    b.add(Node::Input(n))
}

/// A name that is not taken and not longer than identifiers may be.
fn unique(name: String, taken: impl Fn(&str) -> bool) -> String {
    let name: String = name.chars().take(100).collect();
    if !taken(&name) {
        return name;
    }
    let numbered = (2usize..).map(|i| format!("{name}_{i}"));
    numbered.into_iter().find(|n| !taken(n)).unwrap_or(name)
}

/// The kernel of a derivative and where its inputs come from.
pub(super) struct Finished {
    pub(super) kernel: Kernel,
    pub(super) primals: Vec<usize>,
    pub(super) given: Vec<usize>,
    pub(super) saved: Vec<usize>,
}

pub(super) fn kernel(
    plan: &Plan,
    b: Build,
    outputs: Vec<Derived>,
    suffix: &str,
    extra: &Extra,
    allow_saved: &[bool],
) -> Finished {
    let name: String = plan.kernel.name.chars().take(100).collect();
    let outputs = name_outputs(&b.inputs, outputs);
    let (decls, levels): (Vec<OutputDecl>, Vec<Level>) = outputs.into_iter().unzip();
    let mut kernel = Kernel {
        name: format!("{name}_{suffix}"),
        inputs: b.inputs,
        outputs: decls,
        graph: b.graph,
        strict: plan.kernel.strict,
    };
    for (j, allowed) in allow_saved.iter().enumerate().take(extra.saved.len()) {
        if *allowed {
            read_saved(&mut kernel, plan, j, extra.saved[j]);
        }
    }
    set_levels(&mut kernel, &levels);
    let own = plan.smooth_inputs.iter().enumerate().filter(|(_, s)| **s).map(|(n, _)| n);
    let floats: Vec<usize> = own.chain(plan.kernel.inputs.len()..kernel.inputs.len()).collect();
    select_inputs(simplify::with_floats(&kernel, &floats, true), plan.kernel.inputs.len(), extra)
}

fn name_outputs(inputs: &[InputDecl], outputs: Vec<Derived>) -> Vec<Derived> {
    let mut names: Vec<String> = inputs.iter().map(|i| i.name.clone()).collect();
    let named = outputs.into_iter().map(|(mut o, level)| {
        o.name = unique(o.name, |n| names.iter().any(|m| m == n));
        names.push(o.name.clone());
        (o, level)
    });
    named.collect()
}

/// Makes outputs come out at their level: a kernel without reductions gives one value an element, one with them gives
/// one value a row where the value is the same along it.
fn set_levels(kernel: &mut Kernel, levels: &[Level]) {
    if levels.contains(&Level::Row) && !kernel.has_rows() {
        for n in (0..levels.len()).filter(|n| levels[*n] == Level::Row) {
            let g = &mut kernel.graph;
            // The first element alone: adding zeros changes nothing.
            let (place, first, zero) = (g.add(Node::Index(0)), g.int(0), g.float(0.0));
            let is_first = g.op(Op::Eq, &[place, first]);
            let alone = g.op(Op::Select, &[is_first, kernel.outputs[n].value, zero]);
            kernel.outputs[n].value = g.reduce(crate::ReduceOp::Sum, alone);
        }
    }
    if !kernel.has_rows() {
        return;
    }
    let uniform = kernel.row_uniform();
    for (output, level) in kernel.outputs.iter_mut().zip(levels) {
        let value = output.value;
        if *level == Level::Element && uniform[value.index()] {
            let g = &mut kernel.graph;
            // Always true, but not the same value along the row by its form.
            let (place, first, zero) = (g.add(Node::Index(0)), g.int(0), g.float(0.0));
            let always = g.op(Op::Ge, &[place, first]);
            output.value = g.op(Op::Select, &[always, value, zero]);
        }
    }
}

/// Reads an output's saved value where that costs less than computing it again.
fn read_saved(kernel: &mut Kernel, plan: &Plan, j: usize, input: u32) {
    let value = plan.kernel.outputs[j].value;
    let level_holds = match plan.outputs[j] {
        Some(Level::Element) => !plan.kernel.row_uniform()[value.index()],
        Some(Level::Row) => true,
        _ => false,
    };
    let roots = kernel.roots();
    let trivial = matches!(kernel.graph.node(value), Node::Input(_) | Node::Const(_));
    if !level_holds || trivial || !kernel.graph.reachable(&roots)[value.index()] {
        return;
    }
    // Nodes keep their numbers, so that several outputs can be replaced one after another.
    let mut nodes = kernel.graph.nodes().to_vec();
    nodes[value.index()] = Node::Input(input);
    let mut cut = kernel.clone();
    cut.graph = Graph::from(nodes);
    if cost(&cut) < cost(kernel) {
        *kernel = cut;
    }
}

/// What an element costs, in multiplications; reading one from memory counts as 8.
fn cost(kernel: &Kernel) -> u32 {
    let (needed, uniform) = (kernel.graph.reachable(&kernel.roots()), kernel.row_uniform());
    let nodes = kernel.graph.nodes().iter().enumerate();
    let one = |(i, node): (usize, &Node)| match node {
        Node::Reduce(..) => 4,
        _ if uniform[i] => 0,
        Node::Op(op, _) => op.cost(),
        Node::Input(_) | Node::Load { .. } | Node::Scan { .. } => 8,
        Node::Random(_) => 40,
        Node::Cast(..) | Node::Bitcast(..) => 1,
        _ => 0,
    };
    nodes.filter(|(i, _)| needed[*i]).map(one).sum()
}

/// Keeps the inputs that are read, in their order.
fn select_inputs(mut kernel: Kernel, primals: usize, extra: &Extra) -> Finished {
    let needed = kernel.graph.reachable(&kernel.roots());
    let mut used = vec![false; kernel.inputs.len()];
    for (node, _) in kernel.graph.nodes().iter().zip(&needed).filter(|(_, n)| **n) {
        if let Node::Input(n) | Node::Load { input: n, .. } = node {
            used[*n as usize] = true;
        }
    }
    let likes = kernel.outputs.iter().filter_map(|o| o.scatter.as_ref()?.like);
    likes.for_each(|n| used[n as usize] = true);
    let kept: Vec<usize> = (0..used.len()).filter(|n| used[*n]).collect();
    let new = |n: u32| kept.iter().position(|k| *k == n as usize).unwrap_or(0) as u32;
    let mut graph = Graph::default();
    let roots = graph.import(&kernel.graph, &kernel.roots(), |g, _, node| match node {
        Node::Input(n) => Some(g.add(Node::Input(new(*n)))),
        Node::Load { input, at, bounds } => {
            Some(g.add(Node::Load { input: new(*input), at: at.clone(), bounds: *bounds }))
        }
        _ => None,
    });
    kernel.graph = graph;
    simplify::set_roots(&mut kernel.outputs, &roots);
    for s in kernel.outputs.iter_mut().filter_map(|o| o.scatter.as_mut()) {
        s.like = s.like.map(new);
    }
    let of = |numbers: &[u32]| {
        let is_used = |(_, n): &(usize, &u32)| used[**n as usize];
        numbers.iter().enumerate().filter(is_used).map(|(j, _)| j).collect()
    };
    let (given, saved) = (of(&extra.given), of(&extra.saved));
    let own = kept.iter().copied().filter(|n| *n < primals).collect();
    kernel.inputs = kept.iter().map(|n| kernel.inputs[*n].clone()).collect();
    Finished { kernel, primals: own, given, saved }
}
