//! A kernel in one line, for the comment above its text.

use crate::graph::Node;
use crate::graph::{Const, Id};
use crate::program::Program;
use crate::{Op, Ty};

/// Longer texts are cut.
const LIMIT: usize = 200;

/// `softmax(x: f16) -> y: f16 = exp(x - row_max(x)) / ...`
pub(super) fn describe(program: &Program) -> String {
    let inputs: Vec<String> = program.inputs.iter().map(|i| format!("{}: {}", i.name, i.dtype)).collect();
    let mut text = format!("{}({})", program.name, inputs.join(", "));
    for (n, o) in program.outputs.iter().enumerate() {
        text.push_str(if n == 0 { " -> " } else { "; " });
        text.push_str(&format!("{}: {} = ", o.name, o.dtype));
        let room = text.len() + LIMIT;
        let from = text.len();
        value(program, o.value, room, &mut text);
        // The outermost operation needs no brackets.
        let bracketed = matches!(&program.value(o.value).node, Node::Op(op, _) if infix(*op).is_some());
        if bracketed && text.len() < room && text.ends_with(')') {
            text.remove(from);
            text.pop();
        }
        if text.len() >= room {
            text.push_str(" ...");
        }
    }
    text
}

/// Appends a value's expression, until the text is `room` long.
fn value(program: &Program, id: Id, room: usize, text: &mut String) {
    if text.len() >= room {
        return;
    }
    let call = |name: &str, args: &[Id], text: &mut String| {
        text.push_str(name);
        text.push('(');
        for (i, a) in args.iter().enumerate() {
            text.push_str(if i == 0 { "" } else { ", " });
            value(program, *a, room, text);
        }
        text.push(')');
    };
    let v = program.value(id);
    match &v.node {
        Node::Input(n) => text.push_str(&program.inputs[*n as usize].name),
        Node::Const(c) => text.push_str(&literal(*c, v.ty)),
        Node::Index(axis) => text.push_str(&format!("index({axis})")),
        Node::Len(axis) => text.push_str(&format!("len({axis})")),
        Node::Op(op, args) => match infix(*op) {
            Some(sign) if args.len() == 2 => {
                text.push('(');
                value(program, args[0], room, text);
                text.push_str(&format!(" {sign} "));
                value(program, args[1], room, text);
                text.push(')');
            }
            _ => call(op.name(), args, text),
        },
        Node::Cast(dtype, x) => call(dtype.name(), &[*x], text),
        Node::Bitcast(dtype, x) => call(&format!("bitcast_{dtype}"), &[*x], text),
        Node::Random(x) => call("random", &[*x], text),
        Node::Reduce(op, x) => call(op.name(), &[*x], text),
        Node::Scan { op, reverse, exclusive, arg } => {
            let exclusive = if *exclusive { "_exclusive" } else { "" };
            let reverse = if *reverse { "_reverse" } else { "" };
            call(&format!("{}{exclusive}{reverse}", op.name()), &[*arg], text);
        }
        Node::Load { input, at, .. } => call(&program.inputs[*input as usize].name, at, text),
    }
}

fn literal(c: Const, ty: Ty) -> String {
    match c {
        Const::Bool(b) => b.to_string(),
        Const::Int(v) => v.to_string(),
        Const::Float(_) if ty == Ty::F32 => format!("{:?}", c.as_f64() as f32),
        Const::Float(_) => format!("{:?}", c.as_f64()),
    }
}

fn infix(op: Op) -> Option<&'static str> {
    Some(match op {
        Op::Add => "+",
        Op::Sub => "-",
        Op::Mul => "*",
        Op::Div => "/",
        Op::Lt => "<",
        Op::Le => "<=",
        Op::Gt => ">",
        Op::Ge => ">=",
        Op::Eq => "==",
        Op::Ne => "!=",
        _ => return None,
    })
}
