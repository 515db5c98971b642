//! The functions of the language: operations, and short names for expressions of them.

use crate::{Dtype, Graph, Id, Node, Op, ReduceOp, ScanOp};

/// A function for lists, completion and documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Its parameters, as written between the brackets.
    pub params: String,
    /// One line; for an expansion, the text it stands for.
    pub doc: String,
}

/// A function that stands for a text of the language.
pub(super) struct Expansion {
    pub name: &'static str,
    pub params: &'static [&'static str],
    pub text: &'static str,
}

/// What a name calls.
#[derive(Clone, Copy)]
pub(super) enum Callable {
    Op(Op),
    /// An operation of two that takes more by grouping from the left.
    Fold(Op),
    Cast(Dtype),
    Bitcast(Dtype),
    Reduce(ReduceOp),
    Scan {
        op: ScanOp,
        reverse: bool,
        exclusive: bool,
    },
    /// `index` and `len`, which take a literal.
    Index,
    Len,
    Random,
    Expansion(&'static Expansion),
}

macro_rules! expansions {
    ($($name:ident($($param:ident),*) = $text:literal;)*) => {
        pub(super) const EXPANSIONS: &[Expansion] = &[$(
            Expansion { name: stringify!($name), params: &[$(stringify!($param)),*], text: $text },
        )*];
    };
}

// Where a choice and a formula that overflows meet, the formula gets an argument at which it is tame, so that the
// derivative has no 0 * inf.
expansions! {
    where(c, a, b) = "select(c, a, b)";
    clamp(x, lo, hi) = "min(max(x, lo), hi)";
    recip(x) = "1 / x";
    square(x) = "x * x";
    isfinite(x) = "!(isnan(x) || isinf(x))";
    lerp(a, b, t) = "a + (b - a) * t";
    logaddexp(a, b) = "let m = max(a, b); isinf(m) ? m : m + log1p(exp(-abs(a - b)))";
    relu(x) = "max(x, 0)";
    relu2(x) = "square(relu(x))";
    relu6(x) = "min(max(x, 0), 6)";
    leaky_relu(x, a) = "max(a * x, x)";
    elu(x, a) = "let n = x > 0 ? 0 : x; x > 0 ? x : a * expm1(n)";
    selu(x) = "1.0507009873554805 * elu(x, 1.6732632423543772)";
    celu(x, a) = "max(x, 0) + a * expm1(min(x, 0) / a)";
    gelu_quick(x) = "x * sigmoid(1.702 * x)";
    log_sigmoid(x) = "-softplus(-x)";
    softsign(x) = "x / (1 + abs(x))";
    hard_sigmoid(x) = "clamp(x + 3, 0, 6) / 6";
    hard_swish(x) = "x * hard_sigmoid(x)";
    hard_tanh(x) = "clamp(x, -1, 1)";
    hard_shrink(x, l) = "abs(x) > l ? x : 0";
    soft_shrink(x, l) = "sign(x) * max(abs(x) - l, 0)";
    row_mean(x) = "row_sum(x) / f32(len(0))";
    row_var(x) = "let d = x - row_mean(x); row_mean(d * d)";
    row_std(x) = "sqrt(row_var(x))";
    row_logsumexp(x) = "let m = row_max(x); let s = isinf(m) ? 0 : m; s + log(row_sum(exp(x - s)))";
    row_any(x) = "row_max(x != 0) > 0";
    row_all(x) = "row_min(x != 0) > 0";
    uniform(seed) = "f32(random(seed) >> 8) * 5.960464477539063e-8";
    dropout(x, p, seed) = "uniform(seed) < p ? 0 : x / (1 - p)";
}

/// The three types of 32 bits between which bits can be reinterpreted.
const WORDS: [Dtype; 3] = [Dtype::F32, Dtype::I32, Dtype::U32];

/// What a function's name calls.
pub(super) fn find(name: &str) -> Option<Callable> {
    if let Some(op) = Op::from_name(name) {
        return Some(if matches!(op, Op::Min | Op::Max) { Callable::Fold(op) } else { Callable::Op(op) });
    }
    if let Some(dtype) = Dtype::from_name(name) {
        return Some(Callable::Cast(dtype));
    }
    if let Some(dtype) = name.strip_prefix("bitcast_").and_then(Dtype::from_name) {
        return WORDS.contains(&dtype).then_some(Callable::Bitcast(dtype));
    }
    if let Some(op) = ReduceOp::ALL.into_iter().find(|op| op.name() == name) {
        return Some(Callable::Reduce(op));
    }
    match name {
        "index" => return Some(Callable::Index),
        "len" => return Some(Callable::Len),
        "random" => return Some(Callable::Random),
        _ => {}
    }
    if let Some(e) = EXPANSIONS.iter().find(|e| e.name == name) {
        return Some(Callable::Expansion(e));
    }
    scan(name)
}

fn scan(name: &str) -> Option<Callable> {
    let (rest, reverse) = match name.strip_suffix("_reverse") {
        Some(rest) => (rest, true),
        None => (name, false),
    };
    let (rest, exclusive) = match rest.strip_suffix("_exclusive") {
        Some(rest) => (rest, true),
        None => (rest, false),
    };
    let op = ScanOp::ALL.into_iter().find(|op| op.name() == rest)?;
    Some(Callable::Scan { op, reverse, exclusive })
}

/// The name of a scan: `cumsum_exclusive_reverse`.
pub(super) fn scan_name(op: ScanOp, reverse: bool, exclusive: bool) -> String {
    let exclusive = if exclusive { "_exclusive" } else { "" };
    let reverse = if reverse { "_reverse" } else { "" };
    format!("{}{exclusive}{reverse}", op.name())
}

impl Callable {
    /// Its parameters' names.
    pub fn params(self) -> Vec<&'static str> {
        match self {
            Self::Op(Op::Fma) => vec!["a", "b", "c"],
            Self::Op(Op::Select) => vec!["condition", "a", "b"],
            Self::Op(op) if op.arity() == 2 => vec!["a", "b"],
            Self::Fold(_) => vec!["a", "b", "..."],
            Self::Index | Self::Len => vec!["axis"],
            Self::Random => vec!["seed"],
            Self::Expansion(e) => e.params.to_vec(),
            Self::Op(_) | Self::Cast(_) | Self::Bitcast(_) | Self::Reduce(_) | Self::Scan { .. } => vec!["x"],
        }
    }

    /// The value for arguments of the right number; `Index`, `Len` and `Expansion` are not built here.
    pub fn build(self, graph: &mut Graph, args: &[Id]) -> Option<Id> {
        let &first = args.first()?;
        Some(match self {
            Self::Op(op) => graph.op(op, args),
            Self::Fold(op) => args[1..].iter().fold(first, |a, &b| graph.op(op, &[a, b])),
            Self::Cast(dtype) => graph.cast(dtype, first),
            Self::Bitcast(dtype) => graph.add(Node::Bitcast(dtype, first)),
            Self::Reduce(op) => graph.reduce(op, first),
            Self::Scan { op, reverse, exclusive } => {
                graph.add(Node::Scan { op, reverse, exclusive, arg: first })
            }
            Self::Random => graph.add(Node::Random(first)),
            Self::Index | Self::Len | Self::Expansion(_) => return None,
        })
    }

    fn doc(self) -> String {
        match self {
            Self::Op(op) => op.doc().to_owned(),
            Self::Fold(op) => format!("{}; more than two group from the left", op.doc()),
            Self::Cast(dtype) => format!("conversion to {dtype}"),
            Self::Bitcast(dtype) => format!("the 32 bits of x as {dtype}"),
            Self::Reduce(op) => reduce_doc(op).to_owned(),
            Self::Scan { op, reverse, exclusive } => {
                let what = match op {
                    ScanOp::Sum => "running sum",
                    ScanOp::Prod => "running product",
                    ScanOp::Max => "running maximum",
                    ScanOp::Min => "running minimum",
                };
                let from = if reverse { " from the end of the row" } else { " along the row" };
                let without = if exclusive { ", without the element itself" } else { "" };
                format!("{what}{from}{without}")
            }
            Self::Index => {
                "the current place along an axis, i32; axes count from the last, which is 0".to_owned()
            }
            Self::Len => {
                "the length of an axis of the domain, i32; axes count from the last, which is 0".to_owned()
            }
            Self::Random => "32 random bits of the current element, u32".to_owned(),
            Self::Expansion(e) => format!("`{}`", e.text),
        }
    }
}

fn reduce_doc(op: ReduceOp) -> &'static str {
    match op {
        ReduceOp::Sum => "sum over the row; 0 for an empty row",
        ReduceOp::Prod => "product over the row; 1 for an empty row",
        ReduceOp::Max => "largest of the row; NaN if any is; -inf or the type's least value for an empty row",
        ReduceOp::Min => {
            "smallest of the row; NaN if any is; inf or the type's largest value for an empty row"
        }
        ReduceOp::ArgMax => {
            "position of the row's largest, u32; the first of equals; the first NaN; 0 for an empty row"
        }
        ReduceOp::ArgMin => "position of the row's smallest, u32; by the same rules",
    }
}

/// The names of all functions.
pub(super) fn names() -> Vec<String> {
    let mut names: Vec<String> = Op::ALL.iter().map(|op| op.name().to_owned()).collect();
    names.extend(EXPANSIONS.iter().map(|e| e.name.to_owned()));
    names.extend(["index", "len", "random"].map(str::to_owned));
    names.extend(ReduceOp::ALL.map(|op| op.name().to_owned()));
    for op in ScanOp::ALL {
        for (reverse, exclusive) in [(false, false), (false, true), (true, false), (true, true)] {
            names.push(scan_name(op, reverse, exclusive));
        }
    }
    names.extend(Dtype::ALL.map(|d| d.name().to_owned()));
    names.extend(WORDS.map(|d| format!("bitcast_{d}")));
    names
}

/// Every function of the language.
pub fn functions() -> Vec<Function> {
    let describe = |name: String| {
        let callable = find(&name)?;
        Some(Function { params: callable.params().join(", "), doc: callable.doc(), name })
    };
    names().into_iter().filter_map(describe).collect()
}
