use std::sync::Arc;

use zmlx_engine::matrix::Matrix;
use zmlx_engine::program::Slot;
use zmlx_engine::stages::{Finish, Growth, HeadRows, Heads, Qkv, QkvRows};

use super::{NormOf, alike, source, turn};
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError, Turn};
use crate::ops::{KvAppend, Linear, PositionScale, Split, SplitAt, SplitHeads, Transpose};
use crate::pattern::{Match, Pattern};
use crate::state::SlotId;

/// From rows of queries, keys and values to heads and the cache. Queries may come with gates.
macro_rules! heads {
    ($products:literal, $queries:literal, $with:literal, $outputs:literal) => {
        concat!(
            $products,
            $queries,
            "
        q3 = transpose(q2)
        q4 = rope|rope_frequencies?(q3)
        q5 = position_scale?(q4)
        k1 = split_heads(k0)
        k2 = rms_norm?(k1)
        k3 = transpose(k2)
        k4 = rope|rope_frequencies?(k3)
        v1 = split_heads(v0)
        v2 = transpose(v1)",
            $with,
            "
        keys, values = kv_append(k4, v2)
        return ",
            $outputs
        )
    };
    ($products:literal, $with:literal) => {
        heads!(
            $products,
            "
        q1 = split_heads(q0)
        q2 = rms_norm?(q1)",
            $with,
            "q5, keys, values"
        )
    };
}

/// Queries, keys and values of one token in one pass over their matrices, apart or one; or, where something comes between
/// (a norm over all heads) or the matrices are stored differently, from products that are ops of their own.
pub static PATTERN: Pattern = Pattern {
    name: "qkv_rope_append",
    summary: "norm, q/k/v products, norms of heads, rope and cache append as one op",
    class: Fidelity::TokenIdentical,
    templates: &[
        heads!(
            "
        n ~ rms_norm?(x)
        q0 = linear(n)
        k0 = linear(n)
        v0 = linear(n)",
            ""
        ),
        // Half of the columns of a query head are a gate of what attention gives.
        heads!(
            "
        n ~ rms_norm?(x)
        q0 = linear(n)
        k0 = linear(n)
        v0 = linear(n)",
            "
        q1 = split_heads(q0)
        qs, gs = split(q1)
        gate = flatten_heads(gs)
        q2 = rms_norm?(qs)",
            "",
            "q5, keys, values, gate"
        ),
        heads!(
            "
        n ~ rms_norm?(x)
        f = linear(n)
        q0, k0, v0 = split_at(f)",
            ""
        ),
        // Rows that meet in attention only.
        heads!(
            "",
            "
        with y = attention|window_attention(q5, keys, values)"
        ),
    ],
    build,
};

/// Heads of one kind.
#[derive(Debug)]
struct Part {
    heads: usize,
    width: usize,
    norm: NormOf,
    turn: Option<Turn>,
    growth: Option<Growth>,
}

impl Part {
    fn finish(&self, l: &mut Lowering<'_>) -> Result<Finish, LoweringError> {
        let rope = self.turn.as_ref().map(|t| l.rope(t));
        Ok(Finish { norm: l.norm(self.norm)?, rope, growth: self.growth })
    }
}

/// Where the rows of queries, keys and values come from.
#[derive(Debug)]
enum Products {
    Apart { input: usize, norm: NormOf, linears: [Linear; 3] },
    Fused { input: usize, norm: NormOf, linear: Linear },
    Given([usize; 3]),
}

#[derive(Debug)]
struct Fused {
    products: Products,
    parts: [Part; 3],
    /// Whether the product for the queries gives gates too.
    gated: bool,
    slot: SlotId,
    window: Option<usize>,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let products = if m.op::<Linear>("q0").is_some() {
        let linears = [
            m.need::<Linear>("q0")?.clone(),
            m.need::<Linear>("k0")?.clone(),
            m.need::<Linear>("v0")?.clone(),
        ];
        m.alike(&[linears[0].weight, linears[1].weight, linears[2].weight])?;
        for linear in &linears {
            m.matrix(linear.weight)?;
        }
        Products::Apart { input: m.rows("x")?, norm: m.norm("n"), linears }
    } else if m.op::<SplitAt>("q0").is_some() {
        let linear = m.need::<Linear>("f")?.clone();
        m.matrix(linear.weight)?;
        Products::Fused { input: m.rows("x")?, norm: m.norm("n"), linear }
    } else {
        Products::Given([m.rows("q0")?, m.rows("k0")?, m.rows("v0")?])
    };
    let gated = match m.op::<Split>("qs") {
        Some(split) if split.parts != 2 => return Err(format!("heads are split in {}", split.parts)),
        split => split.is_some(),
    };
    let part = |letter: &str| -> Result<Part, String> {
        let name = |n: u8| format!("{letter}{n}");
        let heads = m.need::<SplitHeads>(&name(1))?.heads.max(1) as usize;
        let rows = m.row_width(&name(0))?;
        let all = if gated && letter == "q" { 2 * heads } else { heads };
        if !rows.is_multiple_of(all) || !(rows / all).is_multiple_of(8) {
            return Err(format!("{heads} heads in {rows} rows: heads of a multiple of 8 are supported"));
        }
        let turned = if letter == "v" { name(2) } else { name(3) };
        if m.need::<Transpose>(&turned)?.0 != [0, 2, 1, 3] {
            return Err("heads are brought to another place than in front of the length".to_owned());
        }
        let growth = m.op::<PositionScale>(&name(5));
        let growth =
            growth.map(|g| Growth { beta: g.beta as f32, original_context: g.original_context as f32 });
        Ok(Part { heads, width: rows / all, norm: m.norm(&name(2)), turn: turn(m, &name(4))?, growth })
    };
    let parts = [part("q")?, part("k")?, part("v")?];
    if parts[1].heads != parts[2].heads {
        return Err("keys and values have different numbers of heads".to_owned());
    }
    let slot = m.need::<KvAppend>("keys")?.slot;
    let window = m.slot(slot)?.kind.window().map(|w| w.max(1) as usize);
    Ok(Arc::new(Fused { products, parts, gated, slot, window }))
}

/// Matrices of queries, keys and values with their biases.
type Matrices = [(Matrix, Option<Vec<f32>>); 3];

impl Fused {
    fn apart(&self, l: &mut Lowering<'_>, linears: &[Linear; 3]) -> Result<Matrices, LoweringError> {
        let mut one = |i: usize| -> Result<_, LoweringError> {
            Ok((l.matrix(linears[i].weight)?, l.bias(linears[i].bias)?))
        };
        let [q, k, v] = [one(0)?, one(1)?, one(2)?];
        if q.0.layout() != k.0.layout() || k.0.layout() != v.0.layout() {
            return Err(LoweringError::Pattern("q, k and v are stored differently".to_owned()));
        }
        if self.parts[1].width == self.parts[2].width {
            alike(&k.0, &v.0)?;
        }
        Ok([q, k, v])
    }

    /// The rows of one matrix, one part after the other.
    fn cut(&self, l: &mut Lowering<'_>, linear: &Linear) -> Result<Matrices, LoweringError> {
        let (all, bias) = (l.matrix(linear.weight)?, l.bias(linear.bias)?);
        let mut from = 0;
        let mut one = |i: usize| {
            let rows = from..from + self.parts[i].heads * self.parts[i].width;
            from = rows.end;
            let wrong = || LoweringError::Pattern(format!("rows {rows:?} cannot be read apart"));
            let bias = bias.as_ref().map(|b| b.get(rows.clone()).map(<[f32]>::to_vec).ok_or_else(wrong));
            Ok::<_, LoweringError>((all.part(rows.clone()).ok_or_else(wrong)?, bias.transpose()?))
        };
        Ok([one(0)?, one(1)?, one(2)?])
    }

    /// The graph's slot as the engine has it.
    fn slot(&self, l: &mut Lowering<'_>) -> usize {
        let [_, k, v] = &self.parts;
        let slot = l.slot(self.slot, Slot::kv(k.heads, k.width, v.width).windowed(self.window));
        l.output_cache(1, slot, false);
        l.output_cache(2, slot, true);
        slot
    }
}

impl Body for Fused {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let [q, k, v] = &self.parts;
        let finish = [q.finish(l)?, k.finish(l)?, v.finish(l)?];
        let (input, norm, matrices) = match &self.products {
            Products::Given(inputs) => {
                let mut parts = Vec::new();
                for ((input, part), finish) in inputs.iter().zip(&self.parts).zip(finish) {
                    let Part { heads, width, .. } = *part;
                    let buffer = l.input(*input, Form::Flat { width: heads * width })?;
                    parts.push(HeadRows { buffer, heads, width, finish });
                }
                let slot = self.slot(l);
                let out = l.output(0, Form::Heads { heads: q.heads, width: q.width });
                l.push(QkvRows { parts: three(parts)?, slot, out });
                return Ok(());
            }
            Products::Apart { input, norm, linears } => (*input, *norm, self.apart(l, linears)?),
            Products::Fused { input, norm, linear } => (*input, *norm, self.cut(l, linear)?),
        };
        let source = source(l, input, norm, &matrices[0].0)?;
        let slot = self.slot(l);
        let out = l.output(0, Form::Heads { heads: q.heads, width: q.width });
        let parts = matrices.into_iter().zip(&self.parts).zip(finish);
        let parts =
            parts.map(|(((matrix, bias), part), finish)| Heads { matrix, bias, heads: part.heads, finish });
        let gate_form = Form::Flat { width: q.heads * q.width };
        let gate = self.gated.then(|| l.output(3, gate_form));
        l.push(Qkv { source, parts: three(parts.collect())?, slot, out, gate });
        Ok(())
    }
}

fn three<T>(parts: Vec<T>) -> Result<[T; 3], LoweringError> {
    parts.try_into().map_err(|_| LoweringError::Pattern("three parts".to_owned()))
}
