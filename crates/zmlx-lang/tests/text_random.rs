//! The parser and printer on random kernels and on random and damaged texts.

#[path = "text/check.rs"]
mod check;

use proptest::prelude::*;
use zmlx_lang::graph::{Bounds, Const, Graph, Id, Node};
use zmlx_lang::kernel::Scatter;
use zmlx_lang::{Dtype, InputDecl, Kernel, Op, OutputDecl, ReduceOp, Role, ScanOp, text};

/// A generator's choices, used up from the front; zeros when they run out.
struct Choices<'a>(&'a [u32]);

impl Choices<'_> {
    fn below(&mut self, n: usize) -> usize {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first as usize % n.max(1)
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

const BOUNDS: [Bounds; 3] = [Bounds::Checked, Bounds::Clamp, Bounds::Zero];
const FLOATS: [f64; 10] =
    [0.0, -0.0, 1.0, -2.5, 1e-300, 1.797e308, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 5e-324];
const INTS: [i64; 7] = [0, 1, -1, 255, i64::MAX, i64::MIN, 1 << 40];

fn inputs(c: &mut Choices<'_>) -> Vec<InputDecl> {
    // Names that are words of the grammar elsewhere.
    const NAMES: [&str; 10] = ["x", "let", "row", "exp", "t0", "like", "f16", "strict", "keep", "t1_"];
    let count = 1 + c.below(NAMES.len());
    let input = |n: usize, c: &mut Choices<'_>| InputDecl {
        name: NAMES[n].to_owned(),
        role: match c.below(6) {
            0 => Role::Row,
            1 => Role::Scalar(None),
            2 => Role::Scalar(Some(Const::float(c.one(&FLOATS)))),
            3 => Role::Indexed(c.below(4) as u32),
            _ => Role::Element,
        },
        dtype: None,
    };
    (0..count).map(|n| input(n, c)).collect()
}

fn node(c: &mut Choices<'_>, inputs: &[InputDecl], so_far: usize) -> Node {
    let n = c.below(inputs.len());
    let arg = |c: &mut Choices<'_>| Id(c.below(so_far) as u32);
    let kind = if so_far == 0 { c.below(3) } else { c.below(16) };
    match kind {
        0 => Node::Const(match c.below(3) {
            0 => Const::float(c.one(&FLOATS)),
            1 => Const::Int(c.one(&INTS)),
            _ => Const::Bool(c.below(2) == 0),
        }),
        1 => Node::Index(c.below(32) as u32),
        2 => Node::Len(c.below(32) as u32),
        3 => Node::Random(arg(c)),
        4 => Node::Cast(c.one(&Dtype::ALL), arg(c)),
        5 => Node::Bitcast(c.one(&[Dtype::F32, Dtype::I32, Dtype::U32]), arg(c)),
        6 => Node::Reduce(c.one(&ReduceOp::ALL), arg(c)),
        7 => {
            let (op, reverse, exclusive) = (c.one(&ScanOp::ALL), c.below(2) == 0, c.below(2) == 0);
            Node::Scan { op, reverse, exclusive, arg: arg(c) }
        }
        8 | 9 => match inputs[n].role {
            Role::Indexed(rank) => Node::Load {
                input: n as u32,
                at: (0..rank).map(|_| arg(c)).collect(),
                bounds: c.one(&BOUNDS),
            },
            _ => Node::Input(n as u32),
        },
        _ => {
            let op = c.one(Op::ALL);
            Node::Op(op, (0..op.arity()).map(|_| arg(c)).collect())
        }
    }
}

fn kernel(choices: &[u32]) -> Kernel {
    let mut c = Choices(choices);
    let inputs = inputs(&mut c);
    let mut graph = Graph::default();
    for _ in 0..1 + c.below(80) {
        let node = node(&mut c, &inputs, graph.nodes().len());
        graph.add(node);
    }
    let value = |c: &mut Choices<'_>| Id(c.below(graph.nodes().len()) as u32);
    let output = |n: usize, c: &mut Choices<'_>| OutputDecl {
        name: if c.below(2) == 0 { format!("out{n}") } else { format!("y{n}") },
        value: value(c),
        dtype: Some(c.one(&Dtype::ALL)).filter(|_| c.below(3) == 0),
        keep_dims: c.below(4) == 0,
        scatter: (c.below(4) == 0).then(|| Scatter {
            at: (0..c.below(3)).map(|_| value(c)).collect(),
            bounds: c.one(&BOUNDS),
            like: Some(c.below(inputs.len()) as u32).filter(|_| c.below(2) == 0),
        }),
    };
    let outputs = (0..1 + c.below(3)).map(|n| output(n, &mut c)).collect();
    Kernel { name: "k".to_owned(), outputs, graph, strict: c.below(2) == 0, inputs }
}

/// The same kernel with its nodes in the order in which outputs reach them, and one NaN.
fn ordered(kernel: &Kernel) -> Kernel {
    fn visit(from: &Graph, id: Id, to: &mut Graph, done: &mut Vec<Option<Id>>) -> Id {
        if let Some(id) = done[id.index()] {
            return id;
        }
        let node = from.node(id).clone();
        for &a in node.args() {
            visit(from, a, to, done);
        }
        let node = match node.map_args(|a| done[a.index()].unwrap()) {
            Node::Const(c @ Const::Float(_)) if c.as_f64().is_nan() => Node::Const(Const::float(f64::NAN)),
            node => node,
        };
        let new = to.add(node);
        done[id.index()] = Some(new);
        new
    }
    let (mut graph, mut done) = (Graph::default(), vec![None; kernel.graph.nodes().len()]);
    let mut outputs = kernel.outputs.clone();
    for o in &mut outputs {
        o.value = visit(&kernel.graph, o.value, &mut graph, &mut done);
        for a in o.scatter.iter_mut().flat_map(|s| &mut s.at) {
            *a = visit(&kernel.graph, *a, &mut graph, &mut done);
        }
    }
    Kernel { graph, outputs, ..kernel.clone() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn printing_and_parsing_gives_the_kernel_back(choices in proptest::collection::vec(any::<u32>(), 0..400)) {
        let kernel = kernel(&choices);
        kernel.validate().unwrap();
        let text = kernel.to_text();
        let again = text::parse_kernel(&text).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?;
        let (found, expected) = (ordered(&again), ordered(&kernel));
        let nan = |k: &Kernel| k.to_json().replace(&f64::NAN.to_bits().to_string(), "nan");
        prop_assert_eq!(nan(&found), nan(&expected), "{}", text);
        prop_assert_eq!(again.to_text().len(), text.len());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        check::every_entry_point(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn no_sequence_of_words_makes_it_panic(words in proptest::collection::vec(0..WORDS.len(), 0..60)) {
        let text: Vec<&str> = words.iter().map(|w| WORDS[*w]).collect();
        check::every_entry_point(&text.join(""));
        check::every_entry_point(&text.join(" "));
        check::every_entry_point(&format!("f(x, t: array[2]) = {}", text.join(" ")));
    }

    #[test]
    fn no_damage_to_a_text_makes_it_panic(
        which in any::<usize>(),
        edits in proptest::collection::vec((any::<usize>(), 0..4_u8, 0..WORDS.len()), 1..6),
    ) {
        let mut text = CORPUS[which % CORPUS.len()].to_owned();
        for (at, kind, word) in edits {
            let boundaries: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
            let at = boundaries[at % boundaries.len()];
            match kind {
                0 => text.insert_str(at, WORDS[word]),
                1 => text.truncate(at),
                2 if at < text.len() => drop(text.remove(at)),
                _ => text = format!("{}{}", &text[at..], &text[..at]),
            }
        }
        check::every_entry_point(&text);
    }
}

const WORDS: [&str; 60] = [
    "x", "y", "t", "f", "let", "like", "keep", "strict", "row", "scalar", "array", "f16", "i32", "exp",
    "max", "clamp", "index", "len", "row_sum", "cumsum", "random", "inf", "nan", "pi", "true", "0", "1",
    "2.5", "1e9", "0xff", "(", ")", "[", "]", ",", ";", ":", "?", "=", "==", "<", "<<", "+", "-", "*", "**",
    "/", "//", "%", "&", "&&", "|", "^", "~", "!", "+=", "->", "#", "\n", "é",
];

const CORPUS: [&str; 6] = [
    "x * tanh(log(1 + exp(x)))",
    "softmax(x) = let m = row_max(x); let e = exp(x - m); e / row_sum(e)",
    "strict f(a: f16, c: row i32, eps: scalar = 1e-5, t: array[2]) -> (y: f16 keep, z) = t[c, 0; clamp] + a, eps ** -2",
    "s(i: row i32, v, t: array[2]) -> (out: f32) = out[i, index(0); zero] += v like t",
    "f(a, b) = a < b && !(a == b) ? a // b % 3 : (a & 0xff) << 2 # comment",
    "where(x > 0, x, 1e-5) + cumsum_exclusive_reverse(y) * row_logsumexp(x - 2.)",
];

/// Runs on a stack of the size that threads of the standard library have by default.
fn on_a_small_stack(run: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}

#[test]
fn depth_and_length_are_limited() {
    on_a_small_stack(|| {
        let nested = |open: &str, close: &str, n: usize| format!("{}x{}", open.repeat(n), close.repeat(n));
        let pairs = [
            ("(", ")"),
            ("exp(", ")"),
            ("x ? ", " : x"),
            ("t[", "]"),
            ("1 + 2 * (", ")"),
            ("x && y | ~(-", ")"),
        ];
        for (open, close) in pairs {
            let too_deep = text::elementwise(None, &nested(open, close, 4000)).unwrap_err();
            let known = too_deep.to_string().contains("brackets inside each other") || open == "x ? ";
            assert!(known, "{open}: {}", &too_deep.to_string()[..200]);
            if open != "t[" {
                let fine = text::elementwise(None, &nested(open, close, 150)).unwrap();
                assert_eq!(text::parse_kernel(&fine.to_text()).unwrap().to_text(), fine.to_text());
            }
        }
        let long = text::elementwise(None, &" ".repeat(text::MAX_TEXT + 1)).unwrap_err();
        assert!(long.to_string().contains("expected at most 65536"), "{long}");
        let many = text::elementwise(None, &format!("{}x", "-".repeat(60_000))).unwrap_err();
        assert!(many.to_string().contains("more than 50000 operations"), "{many}");
    });
}

#[test]
fn long_chains_take_no_depth() {
    on_a_small_stack(|| {
        let chains = [
            format!("x{}", " + x * y".repeat(6000)),
            format!("{}x", "-".repeat(40_000)),
            format!("{}x", "!~".repeat(20_000)),
            format!("{}x", "x ** ".repeat(10_000)),
            format!("{}x", "x < y ? y : ".repeat(5_000)),
            (0..3000).map(|n| format!("let a{n} = x + {n}; ")).collect::<String>() + "x",
        ];
        for chain in chains {
            let kernel = text::elementwise(None, &chain).unwrap();
            let printed = kernel.to_text();
            if printed.len() <= text::MAX_TEXT {
                assert_eq!(text::parse_kernel(&printed).unwrap().to_text(), printed);
            }
        }
    });
}
