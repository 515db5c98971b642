//! A kernel: named inputs, expressions, outputs.

use serde::{Deserialize, Serialize};

use crate::error::{LangError, Result};
use crate::graph::{Const, Graph, Id, Node};
use crate::{Dtype, Op, ReduceOp};

/// How an input meets the domain.
///
/// The domain of a kernel is the shape its expressions run over: the numpy broadcast of its element inputs' shapes
/// (with row inputs' leading axes), or a shape given at the call. Its last axis is the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// One value an element; broadcasts like numpy.
    Element,
    /// One value a row: the last axis is 1 (or the array is 0-d). The same for the whole row, also in types.
    Row,
    /// One value in all, with a default or without: `eps`, `scale`, `seed`.
    Scalar(Option<Const>),
    /// Read only at computed places, with this many axes; does not take part in the domain's broadcast.
    Indexed(u32),
}

/// An input's declaration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputDecl {
    /// Name in expressions, an identifier.
    pub name: String,
    /// How it meets the domain.
    pub role: Role,
    /// The dtype it must have; any dtype when `None`. Scalars are `f32` when `None`.
    pub dtype: Option<Dtype>,
}

/// Where a scattered output takes its additions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scatter {
    /// Integer coordinates in the output, outermost axis first; one outside is an error on the CPU (`Checked`) or
    /// skipped (`Zero`), or moved to the edge (`Clamp`). GPUs skip where the CPU reports.
    pub at: Vec<Id>,
    /// What happens outside.
    pub bounds: crate::graph::Bounds,
    /// The input whose shape the output has; `None`: the shape is given at the call.
    pub like: Option<u32>,
}

/// An output's declaration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputDecl {
    /// Name, an identifier.
    pub name: String,
    /// The value of each element, or of each row.
    pub value: Id,
    /// The dtype it is rounded to. `None`: booleans and integers as computed; floats in the promoted dtype of the
    /// float inputs (`f16` with `bf16` gives `f32`; `f32` without float inputs).
    pub dtype: Option<Dtype>,
    /// For a value that is the same along the row: keeps the last axis as 1, instead of dropping it.
    pub keep_dims: bool,
    /// Adds the values to computed places of a zeroed output, instead of writing them in order.
    pub scatter: Option<Scatter>,
}

/// A kernel of any kind that is an expression: elementwise, row reduction, several-pass row map, scan, gather, scatter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Name, an identifier.
    pub name: String,
    /// The inputs.
    pub inputs: Vec<InputDecl>,
    /// The outputs, at least one.
    pub outputs: Vec<OutputDecl>,
    /// The expressions.
    pub graph: Graph,
    /// Every operation rounds on its own: nothing is contracted into a fused multiply-add nor rewritten.
    pub strict: bool,
}

/// Words of the language that are values, so that nothing else can have them as its name.
pub const LITERALS: [&str; 5] = ["inf", "nan", "pi", "true", "false"];

/// Inputs, outputs and nodes of one kernel at most; far above anything useful, below what would exhaust memory.
pub const MAX_NODES: usize = 50_000;

impl Kernel {
    /// Looks at everything that later steps rely on: names, arities, order of nodes, numbers of inputs. Kernels from
    /// this crate's own functions hold; this is for kernels that come from outside (JSON).
    pub fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(LangError::Kernel { kernel: self.name.clone(), what });
        let mut names: Vec<&str> = vec![&self.name];
        names.extend(self.inputs.iter().map(|i| i.name.as_str()));
        names.extend(self.outputs.iter().map(|o| o.name.as_str()));
        if let Some(n) = names.iter().find(|n| !is_identifier(n)) {
            return bad(format!(
                "{n:?} is not an identifier (letters, digits and _, not starting with a digit)"
            ));
        }
        if let Some(n) = names.iter().find(|n| LITERALS.contains(n)) {
            return bad(format!("{n} is a literal of the language and can't be a name"));
        }
        let mut parameters = names[1..].to_vec();
        parameters.sort_unstable();
        if let Some(w) = parameters.windows(2).find(|w| w[0] == w[1]) {
            return bad(format!("two inputs or outputs are named {}", w[0]));
        }
        if self.outputs.is_empty() {
            return bad("it has no output".to_owned());
        }
        if self.graph.nodes().len() > MAX_NODES {
            return bad(format!("{} nodes are more than {MAX_NODES}", self.graph.nodes().len()));
        }
        for (i, node) in self.graph.nodes().iter().enumerate() {
            self.validate_node(i, node)?;
        }
        for o in &self.outputs {
            let at = o.scatter.iter().flat_map(|s| &s.at);
            if at.chain([&o.value]).any(|v| v.index() >= self.graph.nodes().len()) {
                return bad(format!("output {} refers to a node that is not there", o.name));
            }
            if let Some(like) = o.scatter.as_ref().and_then(|s| s.like)
                && like as usize >= self.inputs.len()
            {
                return bad(format!("output {} has the shape of input {like}, which is not there", o.name));
            }
        }
        Ok(())
    }

    fn validate_node(&self, i: usize, node: &Node) -> Result<()> {
        let bad = |what: String| Err(LangError::Kernel { kernel: self.name.clone(), what });
        if node.args().iter().any(|a| a.index() >= i) {
            return bad(format!("node {i} uses a node that does not come before it"));
        }
        match node {
            Node::Op(op, args) if args.len() != op.arity() => {
                bad(format!("node {i}: {} takes {} operands, not {}", op.name(), op.arity(), args.len()))
            }
            Node::Input(n) => match self.inputs.get(*n as usize).map(|d| d.role) {
                None => bad(format!("node {i} reads input {n}, which is not there")),
                Some(Role::Indexed(_)) => bad(format!(
                    "node {i}: {} is read at computed places only",
                    self.inputs[*n as usize].name
                )),
                Some(_) => Ok(()),
            },
            Node::Load { input, at, .. } => match self.inputs.get(*input as usize).map(|d| d.role) {
                Some(Role::Indexed(rank)) if rank as usize == at.len() => Ok(()),
                _ => bad(format!("node {i} loads from input {input} with {} coordinates", at.len())),
            },
            Node::Index(axis) | Node::Len(axis) if *axis > 31 => {
                bad(format!("node {i}: axis {axis} is too large"))
            }
            _ => Ok(()),
        }
    }

    /// The number of an input.
    pub fn input(&self, name: &str) -> Option<usize> {
        self.inputs.iter().position(|i| i.name == name)
    }

    /// Whether any output needs a reduction or a scan along the row.
    pub fn has_rows(&self) -> bool {
        let roots = self.roots();
        let needed = self.graph.reachable(&roots);
        let row = |n: &Node| matches!(n, Node::Reduce(..) | Node::Scan { .. });
        self.graph.nodes().iter().zip(needed).any(|(n, needed)| needed && row(n))
    }

    /// The values and coordinates of all outputs.
    pub fn roots(&self) -> Vec<Id> {
        let at = |o: &OutputDecl| o.scatter.iter().flat_map(|s| s.at.clone()).collect::<Vec<_>>();
        self.outputs.iter().flat_map(|o| [vec![o.value], at(o)].concat()).collect()
    }

    /// For each node, whether it is the same along the whole row: made of literals, lengths, row and scalar inputs,
    /// outer coordinates and reductions.
    pub fn row_uniform(&self) -> Vec<bool> {
        let mut uniform: Vec<bool> = Vec::with_capacity(self.graph.nodes().len());
        for node in self.graph.nodes() {
            uniform.push(match node {
                Node::Input(n) => !matches!(self.inputs[*n as usize].role, Role::Element),
                Node::Index(axis) => *axis != 0,
                Node::Random(_) | Node::Scan { .. } => false,
                Node::Reduce(..) => true,
                _ => node.args().iter().all(|a| uniform[a.index()]),
            });
        }
        uniform
    }

    /// The IR as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// A kernel from its JSON, validated.
    pub fn from_json(json: &str) -> Result<Self> {
        let kernel: Self = serde_json::from_str(json).map_err(|e| LangError::Json(e.to_string()))?;
        kernel.validate()?;
        Ok(kernel)
    }

    /// A 64-bit hash of everything that decides what the kernel computes, stable between runs and machines.
    pub fn content_hash(&self) -> u64 {
        fnv1a(self.to_json().as_bytes())
    }
}

/// FNV-1a, 64 bits: a stable hash for names of kernels and keys of stored choices.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// Whether a name can stand in the language and in all generated source.
pub fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
        && name.len() <= 128
}

/// Helpers that several parts build expressions with.
impl Graph {
    /// The mean over the row: `row_sum(x) / len`.
    pub fn row_mean(&mut self, x: Id) -> Id {
        let sum = self.reduce(ReduceOp::Sum, x);
        let len = self.add(Node::Len(0));
        let len = self.cast(Dtype::F32, len);
        self.op(Op::Div, &[sum, len])
    }
}
