//! Kernels to text.

use std::collections::HashSet;
use std::fmt::Write;

use super::functions::scan_name;
use super::parse::{ATOM, EQUAL, ORDER, POWER, PREFIX, infix};
use crate::graph::{Bounds, Const, Id, Node};
use crate::{Kernel, Op, Role};

/// Operations inside each other on one line at most: far below what the parser takes, and readable.
const MAX_INLINE_DEPTH: usize = 16;
/// Bytes of a part that are not worth a name of their own.
const MAX_INLINE_LENGTH: usize = 120;

/// How loosely `condition ? a : b` binds.
const CHOICE: u8 = 0;

impl Kernel {
    /// The kernel in the language. [`parse_kernel`](crate::text::parse_kernel) gives back a kernel that is equal but
    /// for the order of nodes, for nodes that nothing uses and for the payload of NaN literals. A value that is used
    /// more than once becomes a `let`.
    ///
    /// The kernel must be one that [`validate`](Kernel::validate) accepts. The text of a very large one can be longer
    /// than the parser takes ([`MAX_TEXT`](crate::text::MAX_TEXT)): JSON has no such limit.
    pub fn to_text(&self) -> String {
        let printer = Printer::new(self);
        let mut text = self.header();
        let (lets, values) = printer.run();
        let separator = if lets.is_empty() { " " } else { "\n  " };
        for (name, value) in lets {
            let _ = write!(text, "{separator}let {name} = {value};");
        }
        text.push_str(separator);
        text.push_str(&values.join(&format!(",{separator}")));
        text
    }

    fn header(&self) -> String {
        let mut text = String::new();
        if self.strict {
            text.push_str("strict ");
        }
        let params: Vec<String> = self.inputs.iter().map(param).collect();
        let _ = write!(text, "{}({})", self.name, params.join(", "));
        let usual = |n: usize| if self.outputs.len() == 1 { "out".to_owned() } else { format!("out{n}") };
        let plain =
            |(n, o): (usize, &crate::OutputDecl)| o.name == usual(n) && o.dtype.is_none() && !o.keep_dims;
        if self.outputs.len() > 16 || !self.outputs.iter().enumerate().all(plain) {
            let out = |o: &crate::OutputDecl| {
                let dtype = o.dtype.map(|d| format!(": {d}")).unwrap_or_default();
                format!("{}{dtype}{}", o.name, if o.keep_dims { " keep" } else { "" })
            };
            let outs: Vec<String> = self.outputs.iter().map(out).collect();
            let _ = write!(text, " -> ({})", outs.join(", "));
        }
        text.push_str(" =");
        text
    }
}

fn param(input: &crate::InputDecl) -> String {
    let role = match input.role {
        Role::Element => String::new(),
        Role::Row => "row".to_owned(),
        Role::Scalar(_) => "scalar".to_owned(),
        Role::Indexed(rank) => format!("array[{rank}]"),
    };
    let kind = [Some(role).filter(|r| !r.is_empty()), input.dtype.map(|d| d.to_string())];
    let kind = kind.into_iter().flatten().collect::<Vec<_>>().join(" ");
    let colon = if kind.is_empty() { "" } else { ": " };
    match input.role {
        Role::Scalar(Some(default)) => format!("{}{colon}{kind} = {}", input.name, literal(default)),
        _ => format!("{}{colon}{kind}", input.name),
    }
}

fn literal(c: Const) -> String {
    match c {
        Const::Int(v) => v.to_string(),
        Const::Bool(v) => v.to_string(),
        Const::Float(bits) => match f64::from_bits(bits) {
            v if v.is_nan() => "nan".to_owned(),
            v => format!("{v:?}"),
        },
    }
}

/// The operator of an operation of two, and how tightly it binds.
fn operator(op: Op) -> Option<(&'static str, u8)> {
    const SYMBOLS: [&str; 20] = [
        "||", "&&", "|", "^", "&", "==", "!=", "<", "<=", ">", ">=", "<<", ">>", "+", "-", "*", "/", "//",
        "%", "**",
    ];
    SYMBOLS.into_iter().find_map(|s| infix(s).filter(|(_, o)| *o == op).map(|(power, _)| (s, power)))
}

/// The text of a value, how tightly its outermost operator binds, and how deep it is.
#[derive(Clone, Default)]
struct Part {
    text: String,
    binds: u8,
    depth: usize,
}

struct Printer<'k> {
    kernel: &'k Kernel,
    /// How often each node is used.
    uses: Vec<u32>,
    parts: Vec<Part>,
    lets: Vec<(String, String)>,
}

impl<'k> Printer<'k> {
    fn new(kernel: &'k Kernel) -> Self {
        let roots = kernel.roots();
        let needed = kernel.graph.reachable(&roots);
        let mut uses = vec![0_u32; needed.len()];
        for root in &roots {
            uses[root.index()] += 1;
        }
        for (node, _) in kernel.graph.nodes().iter().zip(&needed).filter(|(_, needed)| **needed) {
            for a in node.args() {
                uses[a.index()] += 1;
            }
        }
        Self { kernel, uses, parts: vec![Part::default(); needed.len()], lets: Vec::new() }
    }

    /// The lets in order, and the outputs' values.
    fn run(mut self) -> (Vec<(String, String)>, Vec<String>) {
        let roots: HashSet<Id> = self.kernel.roots().into_iter().collect();
        for (n, node) in self.kernel.graph.nodes().iter().enumerate() {
            if self.uses[n] == 0 {
                continue;
            }
            let mut part = self.part(node);
            let leaf = matches!(node, Node::Input(_) | Node::Const(_) | Node::Index(_) | Node::Len(_));
            let large = part.depth > MAX_INLINE_DEPTH || part.text.len() > MAX_INLINE_LENGTH;
            let last = self.uses[n] == 1 && roots.contains(&Id(n as u32));
            if !leaf && (self.uses[n] > 1 || large && !last) {
                let name = self.new_name();
                self.lets.push((name.clone(), part.text));
                part = Part { text: name, binds: ATOM, depth: 0 };
            }
            self.parts[n] = part;
        }
        let values = self.kernel.outputs.iter().map(|o| self.output(o)).collect();
        (self.lets, values)
    }

    fn new_name(&self) -> String {
        let taken = |name: &str| self.kernel.inputs.iter().any(|i| i.name == name);
        let mut name = format!("t{}", self.lets.len());
        while taken(&name) {
            name.push('_');
        }
        name
    }

    fn output(&self, o: &crate::OutputDecl) -> String {
        let value = &self.parts[o.value.index()].text;
        let Some(s) = &o.scatter else { return value.clone() };
        let like =
            s.like.map(|n| format!(" like {}", self.kernel.inputs[n as usize].name)).unwrap_or_default();
        format!("{}{} += {value}{like}", o.name, self.places(&s.at, s.bounds))
    }

    fn places(&self, at: &[Id], bounds: Bounds) -> String {
        let bounds = match bounds {
            Bounds::Checked => "",
            Bounds::Clamp => "; clamp",
            Bounds::Zero => "; zero",
        };
        format!("[{}{bounds}]", self.list(at))
    }

    fn list(&self, args: &[Id]) -> String {
        args.iter().map(|a| self.parts[a.index()].text.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// An operand, bracketed when it binds looser than it must.
    fn operand(&self, id: Id, least: u8) -> String {
        let part = &self.parts[id.index()];
        if part.binds < least { format!("({})", part.text) } else { part.text.clone() }
    }

    fn part(&self, node: &Node) -> Part {
        let depth = 1 + node.args().iter().map(|a| self.parts[a.index()].depth).max().unwrap_or(0);
        let atom = |text: String| Part { text, binds: ATOM, depth };
        let call = |name: &str, args: &[Id]| atom(format!("{name}({})", self.list(args)));
        match node {
            Node::Input(n) => atom(self.kernel.inputs[*n as usize].name.clone()),
            Node::Const(c) => {
                let text = literal(*c);
                let binds = if text.starts_with('-') { PREFIX } else { ATOM };
                Part { text, binds, depth }
            }
            Node::Index(axis) => atom(format!("index({axis})")),
            Node::Len(axis) => atom(format!("len({axis})")),
            Node::Random(seed) => call("random", &[*seed]),
            Node::Op(op, args) => self.op(*op, args, depth),
            Node::Cast(dtype, x) => call(dtype.name(), &[*x]),
            Node::Bitcast(dtype, x) => call(&format!("bitcast_{dtype}"), &[*x]),
            Node::Reduce(op, x) => call(op.name(), &[*x]),
            Node::Scan { op, reverse, exclusive, arg } => {
                call(&scan_name(*op, *reverse, *exclusive), &[*arg])
            }
            Node::Load { input, at, bounds } => {
                atom(format!("{}{}", self.kernel.inputs[*input as usize].name, self.places(at, *bounds)))
            }
        }
    }

    fn op(&self, op: Op, args: &[Id], depth: usize) -> Part {
        let number =
            |id: Id| matches!(self.kernel.graph.node(id), Node::Const(Const::Int(_) | Const::Float(_)));
        let (text, binds) = match (op, args) {
            // `-5` is a literal, not this operation.
            (Op::Neg, [x]) if !number(*x) => (format!("-{}", self.operand(*x, PREFIX)), PREFIX),
            (Op::Not, [x]) => (format!("!{}", self.operand(*x, PREFIX)), PREFIX),
            (Op::BitNot, [x]) => (format!("~{}", self.operand(*x, PREFIX)), PREFIX),
            (Op::Select, [c, a, b]) => {
                let (c, a, b) =
                    (self.operand(*c, CHOICE + 1), self.operand(*a, CHOICE + 1), self.operand(*b, CHOICE));
                (format!("{c} ? {a} : {b}"), CHOICE)
            }
            (_, [a, b]) => match operator(op) {
                Some((symbol, power)) => {
                    let (left, right) = match power {
                        POWER => (POWER + 1, PREFIX),
                        EQUAL | ORDER => (power + 1, power + 1),
                        _ => (power, power + 1),
                    };
                    // `a & b == c` means `a & (b == c)`, as in C; few readers expect it without brackets.
                    let bits = matches!(op, Op::BitAnd | Op::BitOr | Op::BitXor);
                    let compares = |id: Id| matches!(self.parts[id.index()].binds, EQUAL | ORDER);
                    let least = |id: Id, least: u8| if bits && compares(id) { ATOM } else { least };
                    let (left, right) =
                        (self.operand(*a, least(*a, left)), self.operand(*b, least(*b, right)));
                    (format!("{left} {symbol} {right}"), power)
                }
                None => (format!("{}({})", op.name(), self.list(args)), ATOM),
            },
            _ => (format!("{}({})", op.name(), self.list(args)), ATOM),
        };
        Part { text, binds, depth }
    }
}
