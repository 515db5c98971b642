//! Tokens to expressions and bodies.

use winnow::combinator::{cut_err, separated};
use winnow::error::{ErrMode, ParserError};
use winnow::prelude::*;
use winnow::stream::{Stateful, Stream, TokenSlice};
use winnow::token::any;

use super::ast::{Body, Expr, ExprId, ExprKind, Let, ScatterAst, Span, ValueAst, Word};
use super::report::{Problem, suggest};
use super::token::{Kind, Token};
use crate::Op;
use crate::graph::Bounds;
use crate::kernel::LITERALS;

/// Brackets inside brackets at most: the parser calls itself for each.
pub(super) const MAX_DEPTH: usize = 200;

/// What has been read so far.
#[derive(Debug, Clone, Default)]
pub(super) struct State<'s> {
    pub body: Body<'s>,
    pub depth: usize,
}

/// The tokens left. The last is `End`, which nothing consumes, so that there always is a next one.
pub(super) type Input<'t, 's> = Stateful<TokenSlice<'t, Token<'s>>, State<'s>>;
/// What every parser gives: `Backtrack` before it took anything, `Cut` when the text is wrong.
pub(super) type Parsed<T> = Result<T, ErrMode<Problem>>;

impl<'t, 's> ParserError<Input<'t, 's>> for Problem {
    type Inner = Self;

    fn from_input(input: &Input<'t, 's>) -> Self {
        let token = next(input);
        Self::new(token.span, format!("unexpected {}", token.describe()), "")
    }

    fn into_inner(self) -> Result<Self, Self> {
        Ok(self)
    }
}

pub(super) fn next<'s>(i: &Input<'_, 's>) -> Token<'s> {
    let end = Token { kind: Kind::End, text: "", span: (usize::MAX, usize::MAX) };
    i.input.peek_token().copied().unwrap_or(end)
}

/// The token after the next.
pub(super) fn second<'s>(i: &Input<'_, 's>) -> Token<'s> {
    i.input.get(1).copied().unwrap_or(next(i))
}

pub(super) fn fail<T>(span: Span, title: impl Into<String>, label: impl Into<String>) -> Parsed<T> {
    Err(ErrMode::Cut(Problem::new(span, title, label)))
}

/// This operator or punctuation.
pub(super) fn symbol<'t, 's: 't>(s: &'static str) -> impl Parser<Input<'t, 's>, Token<'s>, ErrMode<Problem>> {
    any.verify(move |t: &&Token<'s>| t.is(s)).map(|t: &Token<'s>| *t).map_err(move |e: ErrMode<Problem>| {
        e.map(|p: Problem| Problem { label: format!("expected `{s}`"), ..p })
    })
}

/// This word, if it is next.
pub(super) fn take_word(i: &mut Input<'_, '_>, word: &str) -> bool {
    let found = next(i).is_word(word);
    if found {
        i.input.next_token();
    }
    found
}

/// An identifier that something is called by; `what` says what.
pub(super) fn new_name<'s>(i: &mut Input<'_, 's>, what: &str) -> Parsed<Word<'s>> {
    let token = next(i);
    if token.kind != Kind::Name {
        return fail(token.span, format!("unexpected {}", token.describe()), format!("expected {what}"));
    }
    if LITERALS.contains(&token.text) {
        return fail(token.span, format!("{} is a literal, not a name", token.text), "choose another name");
    }
    i.input.next_token();
    Ok(Word { text: token.text, span: token.span })
}

/// Whether the bracket that `tokens` starts with closes before a token that `then` accepts.
pub(super) fn bracket_then(tokens: &[Token<'_>], then: impl Fn(&Token<'_>) -> bool) -> bool {
    let mut depth = 0_usize;
    for (n, t) in tokens.iter().enumerate() {
        if t.is("(") || t.is("[") {
            depth += 1;
        } else if t.is(")") || t.is("]") {
            depth = depth.saturating_sub(1);
            if depth == 0 {
                return tokens.get(n + 1).is_some_and(&then);
            }
        }
    }
    false
}

/// `{ let name = expr; } value { , value }`, then the end of the text.
pub(super) fn body(i: &mut Input<'_, '_>) -> Parsed<()> {
    while next(i).is_word("let") && second(i).kind == Kind::Name {
        i.input.next_token();
        let name = new_name(i, "a name")?;
        cut_err(symbol("=")).parse_next(i)?;
        let value = expr(i)?;
        if !next(i).is(";") {
            return after_value(i, "`;` after the value of the let");
        }
        i.input.next_token();
        i.state.body.lets.push(Let { name, value });
    }
    let values: Vec<ValueAst> = separated(1.., value, symbol(",")).parse_next(i)?;
    i.state.body.values = values;
    match next(i).kind {
        Kind::End => Ok(()),
        _ => after_value(i, "an operator, `,` or the end"),
    }
}

fn value<'s>(i: &mut Input<'_, 's>) -> Parsed<ValueAst<'s>> {
    let token = next(i);
    let bracket = i.input.get(1..).unwrap_or_default();
    if token.kind != Kind::Name || !second(i).is("[") || !bracket_then(bracket, |t| t.is("+=")) {
        return Ok(ValueAst { value: expr(i)?, scatter: None });
    }
    let output = new_name(i, "an output")?;
    let (at, bounds) = places(i)?;
    cut_err(symbol("+=")).parse_next(i)?;
    let value = expr(i)?;
    let like = if take_word(i, "like") { Some(new_name(i, "an input")?) } else { None };
    Ok(ValueAst { value, scatter: Some(ScatterAst { output, at, bounds, like }) })
}

/// `[expr, ... ; bounds]`
fn places(i: &mut Input<'_, '_>) -> Parsed<(Vec<ExprId>, Bounds)> {
    cut_err(symbol("[")).parse_next(i)?;
    let empty = next(i).is("]") || next(i).is(";");
    let at = if empty { Vec::new() } else { separated(1.., expr, symbol(",")).parse_next(i)? };
    let mut bounds = Bounds::Checked;
    if next(i).is(";") {
        i.input.next_token();
        let word = next(i);
        bounds = match word.text {
            "checked" => Bounds::Checked,
            "clamp" => Bounds::Clamp,
            "zero" => Bounds::Zero,
            _ => {
                let title = format!("unexpected {}", word.describe());
                return fail(word.span, title, "expected checked, clamp or zero");
            }
        };
        i.input.next_token();
    }
    close(i, "]", "`,`, `;` or `]`")?;
    Ok((at, bounds))
}

/// The bracket that ends a list of values.
fn close(i: &mut Input<'_, '_>, bracket: &'static str, expected: &str) -> Parsed<()> {
    if next(i).is(bracket) {
        i.input.next_token();
        return Ok(());
    }
    after_value(i, expected)
}

/// The error for a token that can't follow a value.
fn after_value<T>(i: &Input<'_, '_>, expected: &str) -> Parsed<T> {
    let t = next(i);
    let hint = match t.text {
        "<" | "<=" | ">" | ">=" => "comparisons do not chain: write a < b && b < c".to_owned(),
        "==" | "!=" => "comparisons do not chain: write a == b && b == c".to_owned(),
        "=" => "write == to compare, or `let name = value;` before the value".to_owned(),
        "+=" => "only a place of an output is added to: out[i] += value".to_owned(),
        "and" => "write && for the logical and".to_owned(),
        "or" => "write || for the logical or".to_owned(),
        "if" => "write condition ? a : b".to_owned(),
        "(" => format!("expected {expected}; only names can be called"),
        "[" => format!("expected {expected}; only inputs can be indexed"),
        _ => format!("expected {expected}"),
    };
    fail(t.span, format!("unexpected {}", t.describe()), hint)
}

fn push<'s>(i: &mut Input<'_, 's>, kind: ExprKind<'s>, span: Span) -> ExprId {
    i.state.body.exprs.push(Expr { kind, span });
    i.state.body.exprs.len() - 1
}

fn push_op(i: &mut Input<'_, '_>, op: Op, args: Vec<ExprId>) -> ExprId {
    let span = |n: &ExprId| i.state.body.exprs[*n].span;
    let start = args.iter().map(|n| span(n).0).min().unwrap_or(0);
    let end = args.iter().map(|n| span(n).1).max().unwrap_or(0);
    push(i, ExprKind::Op(op, args), (start, end))
}

/// A whole expression: `condition ? a : b` chains, or a binary one.
pub(super) fn expr(i: &mut Input<'_, '_>) -> Parsed<ExprId> {
    i.state.depth += 1;
    if i.state.depth > MAX_DEPTH {
        let title = format!("more than {MAX_DEPTH} brackets inside each other");
        return fail(next(i).span, title, "name inner parts with `let name = value;`");
    }
    let mut choices = Vec::new();
    let mut last = binary(i)?;
    while next(i).is("?") {
        i.input.next_token();
        let yes = expr(i)?;
        if !next(i).is(":") {
            return after_value(i, "`:` and the value for when the condition is false");
        }
        i.input.next_token();
        choices.push((last, yes));
        last = binary(i)?;
    }
    for (condition, yes) in choices.into_iter().rev() {
        last = push_op(i, Op::Select, vec![condition, yes, last]);
    }
    i.state.depth -= 1;
    Ok(last)
}

/// How tightly operators bind, loosest first. Comparisons do not chain; `**` groups from the right.
pub(super) fn infix(symbol: &str) -> Option<(u8, Op)> {
    Some(match symbol {
        "||" => (1, Op::Or),
        "&&" => (2, Op::And),
        "|" => (3, Op::BitOr),
        "^" => (4, Op::BitXor),
        "&" => (5, Op::BitAnd),
        "==" => (EQUAL, Op::Eq),
        "!=" => (EQUAL, Op::Ne),
        "<" => (ORDER, Op::Lt),
        "<=" => (ORDER, Op::Le),
        ">" => (ORDER, Op::Gt),
        ">=" => (ORDER, Op::Ge),
        "<<" => (8, Op::Shl),
        ">>" => (8, Op::Shr),
        "+" => (9, Op::Add),
        "-" => (9, Op::Sub),
        "*" => (10, Op::Mul),
        "/" => (10, Op::Div),
        "//" => (10, Op::FloorDiv),
        "%" => (10, Op::Rem),
        "**" => (POWER, Op::Pow),
        _ => return None,
    })
}

pub(super) const EQUAL: u8 = 6;
pub(super) const ORDER: u8 = 7;
/// `- ! ~ +` before a value.
pub(super) const PREFIX: u8 = 11;
pub(super) const POWER: u8 = 12;
/// Names, literals, calls and brackets.
pub(super) const ATOM: u8 = 13;

/// An operator that waits for its right operand.
#[derive(Clone, Copy)]
enum Waiting {
    /// `None` is unary plus.
    Prefix(Option<Op>),
    Infix(u8, Op),
}

impl Waiting {
    fn binds(self) -> u8 {
        match self {
            Self::Prefix(_) => PREFIX,
            Self::Infix(power, _) => power,
        }
    }
}

/// Operands and operators by precedence, with a stack instead of recursion: a long chain takes no depth.
fn binary(i: &mut Input<'_, '_>) -> Parsed<ExprId> {
    let mut waiting: Vec<Waiting> = Vec::new();
    let mut operands: Vec<ExprId> = Vec::new();
    loop {
        while let Some(op) = prefix(next(i)) {
            i.input.next_token();
            waiting.push(Waiting::Prefix(op));
        }
        operands.push(operand(i)?);
        let token = next(i);
        let Some((power, op)) = infix(token.text).filter(|_| token.kind == Kind::Symbol) else { break };
        while let Some(&top) = waiting.last() {
            let chained = top.binds() == power && (power == EQUAL || power == ORDER);
            if chained {
                return after_value(i, "");
            }
            if top.binds() < power || top.binds() == power && power == POWER {
                break;
            }
            waiting.pop();
            apply(i, top, &mut operands);
        }
        i.input.next_token();
        waiting.push(Waiting::Infix(power, op));
    }
    while let Some(top) = waiting.pop() {
        apply(i, top, &mut operands);
    }
    match operands.pop() {
        Some(value) => Ok(value),
        None => fail(next(i).span, "no value", "expected a value"),
    }
}

fn prefix(t: Token<'_>) -> Option<Option<Op>> {
    match t.text {
        "-" => Some(Some(Op::Neg)),
        "!" => Some(Some(Op::Not)),
        "~" => Some(Some(Op::BitNot)),
        "+" => Some(None),
        _ => None,
    }
}

fn apply(i: &mut Input<'_, '_>, operator: Waiting, operands: &mut Vec<ExprId>) {
    let Some(right) = operands.pop() else { return };
    let value = match operator {
        Waiting::Prefix(None) => right,
        Waiting::Prefix(Some(op)) => match (op, &mut i.state.body.exprs[right].kind) {
            // A minus before a number is part of the literal; `neg(5)` is the operation.
            (Op::Neg, ExprKind::Int(v)) => {
                *v = -*v;
                right
            }
            (Op::Neg, ExprKind::Float(v)) => {
                *v = -*v;
                right
            }
            _ => push_op(i, op, vec![right]),
        },
        Waiting::Infix(_, op) => match operands.pop() {
            Some(left) => push_op(i, op, vec![left, right]),
            None => right,
        },
    };
    operands.push(value);
}

/// A literal, a name, a call, an indexed input or a bracketed expression.
fn operand(i: &mut Input<'_, '_>) -> Parsed<ExprId> {
    let token = next(i);
    let literal = match token.kind {
        Kind::Int(v) => Some(ExprKind::Int(i128::from(v))),
        Kind::Float(v) => Some(ExprKind::Float(v)),
        Kind::Name => named_literal(token.text),
        _ => None,
    };
    if let Some(literal) = literal {
        i.input.next_token();
        return Ok(push(i, literal, token.span));
    }
    if token.is("(") {
        i.input.next_token();
        let inner = expr(i)?;
        if next(i).is(",") {
            return fail(next(i).span, "unexpected `,`", "expected `)`: there are no tuples");
        }
        close(i, ")", "an operator or `)`")?;
        return Ok(inner);
    }
    if token.kind != Kind::Name {
        return fail(token.span, format!("unexpected {}", token.describe()), "expected a value");
    }
    if matches!(token.text, "if" | "not" | "lambda" | "return")
        && !second(i).is("(")
        && starts_value(second(i))
    {
        return word_of_another_language(token);
    }
    let name = new_name(i, "a value")?;
    if next(i).is("(") {
        i.input.next_token();
        let args =
            if next(i).is(")") { Vec::new() } else { separated(1.., expr, symbol(",")).parse_next(i)? };
        let end = next(i).span.1;
        close(i, ")", "an operator, `,` or `)`")?;
        Ok(push(i, ExprKind::Call(name, args), (name.span.0, end)))
    } else if next(i).is("[") {
        let (at, bounds) = places(i)?;
        let end = i.input.previous_tokens().next().map_or(name.span.1, |t| t.span.1);
        Ok(push(i, ExprKind::Index(name, at, bounds), (name.span.0, end)))
    } else {
        Ok(push(i, ExprKind::Name(name.text), name.span))
    }
}

fn starts_value(t: Token<'_>) -> bool {
    matches!(t.kind, Kind::Name | Kind::Int(_) | Kind::Float(_))
}

fn word_of_another_language<T>(t: Token<'_>) -> Parsed<T> {
    let label = match t.text {
        "if" => "write condition ? a : b",
        "not" => "write ! for the logical not",
        "return" => "the last expression is the value",
        _ => "there are no functions inside a kernel",
    };
    fail(t.span, format!("unexpected `{}`", t.text), label)
}

fn named_literal(name: &str) -> Option<ExprKind<'static>> {
    Some(match name {
        "inf" => ExprKind::Float(f64::INFINITY),
        "nan" => ExprKind::Float(f64::NAN),
        "pi" => ExprKind::Float(std::f64::consts::PI),
        "true" => ExprKind::Bool(true),
        "false" => ExprKind::Bool(false),
        _ => return None,
    })
}

/// "did you mean" for a word, or what was expected.
pub(super) fn meant<'n>(name: &str, known: impl Iterator<Item = &'n str>, otherwise: &str) -> String {
    suggest(name, known).map_or_else(|| otherwise.to_owned(), |s| format!("did you mean {s}?"))
}
