//! The parser and printer of the language on tables of texts: `text/accept.txt` with the canonical form of each, and
//! `text/reject.txt` with the whole report.

use zmlx_lang::graph::{Bounds, Const, Id, Node};
use zmlx_lang::{Dtype, InputDecl, LangError, Op, Role, text};

/// The cases of a table: a text, a line `--`, and what is expected of it; a line `%%` between cases.
fn cases(table: &str) -> impl Iterator<Item = (&str, &str)> {
    let case = |c| str::split_once(c, "\n--\n").unwrap_or_else(|| panic!("a case without a -- line:\n{c}"));
    table.trim_end().split("\n%%\n").map(case)
}

fn check(table: &str, least: usize, run: impl Fn(&str) -> String) {
    let mut wrong = String::new();
    let mut count = 0;
    for (text, expected) in cases(table) {
        count += 1;
        let found = run(text);
        if found.trim_end() != expected.trim_end() {
            wrong += &format!("text:\n{text}\nexpected:\n{expected}\nfound:\n{found}\n\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(count >= least, "only {count} cases were read");
}

#[test]
fn accepted_texts_have_their_canonical_form() {
    check(include_str!("text/accept.txt"), 30, |text| match text::elementwise(None, text) {
        Ok(kernel) => kernel.to_text(),
        Err(e) => e.to_string(),
    });
}

#[test]
fn canonical_forms_are_fixed_points() {
    for (text, canonical) in cases(include_str!("text/accept.txt")) {
        let kernel = text::parse_kernel(canonical).unwrap();
        assert_eq!(kernel.to_text(), canonical.trim_end());
        let from_text = text::elementwise(None, text).unwrap();
        assert_eq!(kernel.inputs, from_text.inputs, "{text}");
        assert_eq!(kernel.name, from_text.name, "{text}");
        kernel.validate().unwrap();
    }
}

#[test]
fn rejected_texts_have_their_report() {
    check(include_str!("text/reject.txt"), 70, |text| match text::elementwise(None, text) {
        Ok(kernel) => format!("accepted: {}", kernel.to_text()),
        Err(e) => e.to_string(),
    });
}

#[test]
fn offsets_are_bytes_of_the_place() {
    let error = text::parse_kernel("f(x) = x * tahn(x)").unwrap_err();
    assert!(matches!(error, LangError::Syntax { offset: 11, .. }), "{error:?}");
    let error = text::parse_kernel("# é\nf(x) = y").unwrap_err();
    assert!(matches!(error, LangError::Syntax { offset: 12, .. }), "{error:?}");
}

#[test]
fn precedence_is_as_documented() {
    // Pairs of a text and the same with all its brackets.
    let pairs = [
        ("a || b && c", "a || (b && c)"),
        ("a && b | c", "a && (b | c)"),
        ("a | b ^ c", "a | (b ^ c)"),
        ("a ^ b & c", "a ^ (b & c)"),
        ("a & b == c", "a & (b == c)"),
        ("a == b < c", "a == (b < c)"),
        ("a < b << c", "a < (b << c)"),
        ("a << b + c", "a << (b + c)"),
        ("a + b * c", "a + (b * c)"),
        ("a - b - c", "(a - b) - c"),
        ("a / b * c // d % a", "(((a / b) * c) // d) % a"),
        ("-a ** b", "-(a ** b)"),
        ("a ** b ** c", "a ** (b ** c)"),
        ("a ** -b ** c", "a ** (-(b ** c))"),
        ("-a * b", "(-a) * b"),
        ("!a == b", "(!a) == b"),
        ("a ? b : c ? d : a", "a ? b : (c ? d : a)"),
        ("a ? b ? c : d : a", "a ? (b ? c : d) : a"),
        ("a || b ? c : d", "(a || b) ? c : d"),
        ("a * -b", "a * (-b)"),
        ("a << b >> c", "(a << b) >> c"),
    ];
    for (plain, bracketed) in pairs {
        let kernel = |t| text::parse_kernel(&format!("f(a, b, c, d) = {t}")).unwrap();
        assert_eq!(kernel(plain), kernel(bracketed), "{plain}");
    }
    let differ = ["(a - b) - c", "a - (b - c)", "(-a) ** b", "-(a ** b)", "(a ** b) ** c", "a ** b ** c"];
    for pair in differ.chunks(2) {
        let kernel = |t| text::parse_kernel(&format!("f(a, b, c) = {t}")).unwrap();
        assert_ne!(kernel(pair[0]), kernel(pair[1]), "{pair:?}");
    }
}

#[test]
fn declarations_become_roles_and_dtypes() {
    let text = "strict k(x, w: f16, t: row i32, eps: scalar = 1e-5, n: scalar i8 = -3, b: array[3] bf16, d = 2) \
                -> (y: bf16 keep, z) = b[t, 0, n; clamp] + x, w * eps * d";
    let k = text::parse_kernel(text).unwrap();
    let decl = |name: &str, role, dtype| InputDecl { name: name.to_owned(), role, dtype };
    let expected = [
        decl("x", Role::Element, None),
        decl("w", Role::Element, Some(Dtype::F16)),
        decl("t", Role::Row, Some(Dtype::I32)),
        decl("eps", Role::Scalar(Some(Const::float(1e-5))), None),
        decl("n", Role::Scalar(Some(Const::Int(-3))), Some(Dtype::I8)),
        decl("b", Role::Indexed(3), Some(Dtype::Bf16)),
        decl("d", Role::Scalar(Some(Const::Int(2))), None),
    ];
    assert_eq!(k.inputs, expected);
    assert!(k.strict);
    assert_eq!(
        (k.outputs[0].name.as_str(), k.outputs[0].dtype, k.outputs[0].keep_dims),
        ("y", Some(Dtype::Bf16), true)
    );
    assert_eq!((k.outputs[1].name.as_str(), k.outputs[1].dtype, k.outputs[1].keep_dims), ("z", None, false));
    let Node::Op(Op::Add, args) = k.graph.node(k.outputs[0].value) else { panic!("{}", k.to_text()) };
    assert!(matches!(k.graph.node(args[0]), Node::Load { input: 5, bounds: Bounds::Clamp, .. }));
}

#[test]
fn scatters_name_their_output_shape() {
    let k =
        text::parse_kernel("s(i: row i32, v, t: array[2]) -> (y, z) = y[i, index(0); zero] += v like t, v")
            .unwrap();
    let s = k.outputs[0].scatter.as_ref().unwrap();
    assert_eq!((s.at.len(), s.bounds, s.like), (2, Bounds::Zero, Some(2)));
    assert_eq!(*k.graph.node(s.at[1]), Node::Index(0));
    assert!(k.outputs[1].scatter.is_none());
}

#[test]
fn names_follow_content() {
    let name = |t| text::elementwise(None, t).unwrap().name;
    assert_eq!(name("x * x"), name("square(x) # the same"));
    assert_ne!(name("x * x"), name("x * y"));
    assert!(name("x * x").starts_with("ew_") && name("x * x").len() == 19);
    assert_eq!(text::elementwise(Some("mine"), "x * x").unwrap().name, "mine");
    assert_eq!(text::elementwise(Some("mine"), "f(x) = x * x").unwrap().name, "mine");
    assert_eq!(name("f(x) = x * x"), "f");
    assert!(matches!(text::elementwise(Some("not a name"), "x"), Err(LangError::Kernel { .. })));
    assert!(matches!(text::elementwise(Some("nan"), "x"), Err(LangError::Kernel { .. })));
}

#[test]
fn unused_lets_change_nothing() {
    let plain = text::parse_kernel("f(x) = x * 2").unwrap();
    assert_eq!(text::parse_kernel("f(x) = let y = exp(x); x * 2").unwrap(), plain);
}

#[test]
fn expressions_go_into_a_graph() {
    let inputs = [InputDecl { name: "x".to_owned(), role: Role::Element, dtype: None }];
    let (mut graph, values) = text::parse_expr("let y = x + 1; y * y, y", &inputs).unwrap();
    assert_eq!((graph.nodes().len(), values.len()), (4, 2));
    let more =
        text::parse_expr_into(&mut graph, "g * y", &inputs, &[("g", values[0]), ("y", values[1])]).unwrap();
    assert_eq!(*graph.node(more[0]), Node::Op(Op::Mul, vec![values[0], values[1]]));
    let outside = text::parse_expr_into(&mut graph, "g", &inputs, &[("g", Id(99))]);
    assert!(matches!(outside, Err(LangError::Kernel { .. })));
    assert!(matches!(text::parse_expr("y[0] += x", &inputs), Err(LangError::Syntax { .. })));
}

#[test]
fn functions_are_listed_and_work() {
    let all = text::functions();
    assert!(all.len() > 110, "{}", all.len());
    for f in &all {
        let (params, arguments) = match (f.name.as_str(), f.params.as_str()) {
            ("index" | "len", _) => (String::new(), "0".to_owned()),
            (_, "a, b, ...") => ("a, b".to_owned(), "a, b".to_owned()),
            (_, p) => (p.to_owned(), p.to_owned()),
        };
        let text = format!("f({params}) = {}({arguments})", f.name);
        let kernel = text::parse_kernel(&text).unwrap_or_else(|e| panic!("{e}"));
        kernel.validate().unwrap();
        assert!(!f.doc.is_empty(), "{}", f.name);
        let reserved = text::parse_kernel(&format!("f(x_) = let {} = x_; x_", f.name));
        assert!(reserved.is_err(), "a let can be named {}", f.name);
    }
    for op in Op::ALL {
        assert!(all.iter().any(|f| f.name == op.name()), "{}", op.name());
    }
}

#[test]
fn the_reference_names_every_function_and_its_examples_parse() {
    let docs = include_str!("../../../docs/language.md");
    for f in text::functions() {
        assert!(
            docs.contains(&format!("`{}(", f.name)) || docs.contains(&format!("`{}`", f.name)),
            "{}",
            f.name
        );
        let formula = f.doc.trim_matches('`');
        if f.doc.starts_with('`') && Op::from_name(&f.name).is_none() {
            assert!(docs.contains(formula), "docs/language.md lacks the formula of {}: {formula}", f.name);
        }
    }
    let mut blocks = 0;
    for block in docs.split("\n```kernel\n").skip(1) {
        let text = block.split("\n```").next().unwrap_or_default();
        for example in text.split("\n\n") {
            blocks += 1;
            text::elementwise(None, example).unwrap_or_else(|e| panic!("{e}\nin the example\n{example}"));
        }
    }
    assert!(blocks >= 15, "only {blocks} examples");
}
