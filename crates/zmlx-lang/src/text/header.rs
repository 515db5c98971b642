//! The head of a kernel: `strict name(inputs) -> (outputs) =`.

use winnow::combinator::{cut_err, separated};
use winnow::prelude::*;
use winnow::stream::Stream;

use super::ast::{Header, Out, Param};
use super::parse::{Input, Parsed, bracket_then, fail, meant, new_name, next, second, symbol, take_word};
use super::token::{Kind, Token};
use crate::{Const, Dtype, Role};

/// Axes of an indexed input at most.
const MAX_RANK: u64 = 32;

/// Whether the text has the form of a whole kernel rather than of an expression.
pub(super) fn is_kernel(tokens: &[Token<'_>]) -> bool {
    let name_at = |n: usize| tokens.get(n).is_some_and(|t| t.kind == Kind::Name);
    let skip = usize::from(name_at(0) && name_at(1) && tokens[0].text == "strict");
    let bracket = tokens.get(skip + 1..).unwrap_or_default();
    let then = |t: &Token<'_>| t.is("=") || t.is("->");
    name_at(skip) && bracket.first().is_some_and(|t| t.is("(")) && bracket_then(bracket, then)
}

/// The head, with the `=`.
pub(super) fn header<'s>(i: &mut Input<'_, 's>) -> Parsed<Header<'s>> {
    let strict = second(i).kind == Kind::Name && take_word(i, "strict");
    let name = new_name(i, "a kernel: name(inputs) = value")?;
    cut_err(symbol("(")).parse_next(i)?;
    let params =
        if next(i).is(")") { Vec::new() } else { separated(1.., param, symbol(",")).parse_next(i)? };
    end_of_list(i, "`:`, `=`, `,` or `)`")?;
    let mut outs = None;
    if next(i).is("->") {
        i.input.next_token();
        cut_err(symbol("(")).parse_next(i)?;
        outs = Some(separated(1.., out, symbol(",")).parse_next(i)?);
        end_of_list(i, "`:`, keep, `,` or `)`")?;
    }
    cut_err(symbol("=")).parse_next(i)?;
    Ok(Header { strict, name, params, outs })
}

fn end_of_list(i: &mut Input<'_, '_>, expected: &str) -> Parsed<()> {
    let t = next(i);
    if t.is(")") {
        i.input.next_token();
        return Ok(());
    }
    fail(t.span, format!("unexpected {}", t.describe()), format!("expected {expected}"))
}

fn param<'s>(i: &mut Input<'_, 's>) -> Parsed<Param<'s>> {
    let name = new_name(i, "the name of an input")?;
    let (mut role, mut dtype) = (None, None);
    if next(i).is(":") {
        i.input.next_token();
        role = role_word(i)?;
        dtype = match next(i).kind {
            Kind::Name => Some(dtype_word(i, role.is_some())?),
            _ if role.is_none() => {
                let t = next(i);
                return fail(
                    t.span,
                    format!("unexpected {}", t.describe()),
                    "expected row, scalar, array or a dtype",
                );
            }
            _ => None,
        };
    }
    if next(i).is("=") {
        i.input.next_token();
        if !matches!(role, None | Some(Role::Scalar(_))) {
            return fail(
                next(i).span,
                "only scalars have defaults",
                format!("write {}: scalar = ...", name.text),
            );
        }
        role = Some(Role::Scalar(Some(default(i, dtype)?)));
    }
    Ok(Param { name, role: role.unwrap_or(Role::Element), dtype })
}

fn role_word(i: &mut Input<'_, '_>) -> Parsed<Option<Role>> {
    if take_word(i, "row") {
        return Ok(Some(Role::Row));
    }
    if take_word(i, "scalar") {
        return Ok(Some(Role::Scalar(None)));
    }
    if !take_word(i, "array") {
        return Ok(None);
    }
    cut_err(symbol("[")).parse_next(i)?;
    let t = next(i);
    let rank = match t.kind {
        Kind::Int(rank) if rank <= MAX_RANK => rank as u32,
        _ => {
            let label = format!("expected the number of axes, 0 to {MAX_RANK}");
            return fail(t.span, format!("unexpected {}", t.describe()), label);
        }
    };
    i.input.next_token();
    cut_err(symbol("]")).parse_next(i)?;
    Ok(Some(Role::Indexed(rank)))
}

fn dtype_word(i: &mut Input<'_, '_>, after_role: bool) -> Parsed<Dtype> {
    let t = next(i);
    if let Some(dtype) = Dtype::from_name(t.text) {
        i.input.next_token();
        return Ok(dtype);
    }
    if matches!(t.text, "f64" | "double" | "float64") {
        return fail(t.span, "there is no f64 in kernels", "expected f32, f16 or bf16");
    }
    let dtypes = Dtype::ALL.iter().map(|d| d.name());
    if after_role {
        return fail(t.span, format!("unknown dtype {}", t.text), meant(t.text, dtypes, EXPECTED_DTYPE));
    }
    let known = dtypes.chain(["row", "scalar", "array"]);
    fail(
        t.span,
        format!("unknown type {}", t.text),
        meant(t.text, known, "expected row, scalar, array or a dtype"),
    )
}

const EXPECTED_DTYPE: &str = "expected bool, u8 to u64, i8 to i64, f16, bf16 or f32";

/// The default of a scalar: a literal that its dtype holds.
fn default(i: &mut Input<'_, '_>, dtype: Option<Dtype>) -> Parsed<Const> {
    let start = next(i).span.0;
    let value = super::parse::expr(i)?;
    let end = i.input.previous_tokens().next().map_or(start, |t| t.span.1);
    let kind = i.state.body.exprs[value].kind.clone();
    i.state.body.exprs.clear();
    let dtype = dtype.unwrap_or(Dtype::F32);
    let Some(literal) = kind.literal() else {
        return fail((start, end), "a default must be a literal", "expected a number, true or false");
    };
    if holds(dtype, literal) {
        return Ok(literal);
    }
    fail((start, end), format!("not a value of {dtype}"), format!("expected a literal that {dtype} holds"))
}

fn holds(dtype: Dtype, literal: Const) -> bool {
    let bits = 8 * dtype.size() as u32;
    match literal {
        Const::Bool(_) => dtype == Dtype::Bool,
        Const::Float(_) => dtype.is_float(),
        Const::Int(_) if dtype.is_float() => true,
        Const::Int(v) => match dtype {
            Dtype::Bool => false,
            Dtype::U64 => v >= 0,
            Dtype::I64 => true,
            Dtype::U8 | Dtype::U16 | Dtype::U32 => (0..1_i64 << bits).contains(&v),
            _ => (-(1_i64 << (bits - 1))..1_i64 << (bits - 1)).contains(&v),
        },
    }
}

fn out<'s>(i: &mut Input<'_, 's>) -> Parsed<Out<'s>> {
    let name = new_name(i, "the name of an output")?;
    let mut dtype = None;
    if next(i).is(":") {
        i.input.next_token();
        let t = next(i);
        if t.kind != Kind::Name {
            return fail(t.span, format!("unexpected {}", t.describe()), EXPECTED_DTYPE);
        }
        dtype = Some(dtype_word(i, true)?);
    }
    let keep = take_word(i, "keep");
    Ok(Out { name, dtype, keep })
}
