use std::sync::Arc;

use zmlx_engine::matrix::Matrix;
use zmlx_engine::stages::{Activation, Gated, Linear as LinearStage, Source};

use super::{NormOf, activation, alike, residual, source};
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::{Linear, Split};
use crate::pattern::{Match, Pattern};

/// A feed-forward part gated by SiLU, also where gate and up are cut off.
pub static PATTERN: Pattern = Pattern {
    name: "swiglu_mlp",
    summary: "norm, gate and up products, SiLU, down product and residual as two stages",
    class: Fidelity::TokenIdentical,
    templates: &[
        // A shared expert, weighed by a sigmoid of its own: a third stage.
        "
        n ~ rms_norm?(x)
        g = linear(n)
        u = linear(n)
        a = swiglu(g, u)
        d = linear(a)
        wl = linear(n)
        ws = sigmoid(wl)
        w = multiply(ws, d)
        h = add?(w, r)
        return h
    ",
        "
        n ~ rms_norm?(x)
        g = linear(n)
        u = linear(n)
        a = swiglu|clamped_swiglu(g, u)
        d = linear(a)
        h = add?(d, r)
        return h
    ",
        // Gate and up as one matrix.
        "
        n ~ rms_norm?(x)
        f = linear(n)
        g, u = split(f)
        a = swiglu(g, u)
        d = linear(a)
        h = add?(d, r)
        return h
    ",
    ],
    build,
};

/// A feed-forward part gated by GELU: its own pattern, so that neither is ever taken for the other.
pub static GEGLU: Pattern = Pattern {
    name: "geglu_mlp",
    summary: "norm, gate and up products, GELU, down product and residual as two stages",
    class: Fidelity::TokenIdentical,
    templates: &["
        n ~ rms_norm?(x)
        g = linear(n)
        u = linear(n)
        a = geglu_tanh|geglu_erf(g, u)
        d = linear(a)
        h = add?(d, r)
        return h
    "],
    build,
};

#[derive(Debug)]
enum Products {
    Apart {
        gate: Linear,
        up: Linear,
    },
    /// The upper half of the rows is gate, the lower up.
    Fused(Linear),
}

#[derive(Debug)]
struct Fused {
    input: usize,
    norm: NormOf,
    products: Products,
    down: Linear,
    activation: Activation,
    /// Gives the weight of the result before its sigmoid.
    weight: Option<Linear>,
    residual: Option<usize>,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let linear = |name: &str| -> Result<Linear, String> {
        let linear = m.need::<Linear>(name)?.clone();
        m.matrix(linear.weight)?;
        Ok(linear)
    };
    let products = if let Some(split) = m.op::<Split>("g") {
        let both = linear("f")?;
        let (rows, _) = m.matrix(both.weight)?;
        if split.parts != 2 || rows % 16 != 0 {
            return Err(format!("{rows} rows of gate and up: two halves of a multiple of 8 are supported"));
        }
        Products::Fused(both)
    } else {
        let (gate, up) = (linear("g")?, linear("u")?);
        m.alike(&[gate.weight, up.weight])?;
        Products::Apart { gate, up }
    };
    let down = linear("d")?;
    let activation = activation(&m.node("a").ok_or("no activation")?.op)?;
    let weight = match m.node("wl") {
        Some(_) if m.row_width("wl")? != 1 => return Err("its weight is not one a token".to_owned()),
        Some(_) => Some(linear("wl")?),
        None => None,
    };
    let input = m.rows("x")?;
    let residual = m.residual("h", "d", "r")?;
    Ok(Arc::new(Fused { input, norm: m.norm("n"), products, down, activation, weight, residual }))
}

impl Fused {
    /// Gate and up, and their biases.
    #[allow(clippy::type_complexity)]
    fn pair(&self, l: &mut Lowering<'_>) -> Result<([Matrix; 2], [Option<Vec<f32>>; 2]), LoweringError> {
        match &self.products {
            Products::Apart { gate, up } => {
                let pair = [l.matrix(gate.weight)?, l.matrix(up.weight)?];
                alike(&pair[0], &pair[1])?;
                Ok((pair, [l.bias(gate.bias)?, l.bias(up.bias)?]))
            }
            Products::Fused(both) => {
                let (matrix, bias) = (l.matrix(both.weight)?, l.bias(both.bias)?);
                let half = matrix.rows() / 2;
                let part = |rows| {
                    let wrong = || LoweringError::Pattern("gate and up cannot be read apart".to_owned());
                    matrix.part(rows).ok_or_else(wrong)
                };
                let biases = bias.map(|b| [b[..half].to_vec(), b[half..].to_vec()].map(Some));
                Ok(([part(0..half)?, part(half..2 * half)?], biases.unwrap_or_default()))
            }
        }
    }
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        2 + u64::from(self.weight.is_some())
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let ([gate, up], biases) = self.pair(l)?;
        let down = l.matrix(self.down.weight)?;
        let weight = match &self.weight {
            Some(linear) => {
                let matrix = l.matrix(linear.weight)?;
                let source = source(l, self.input, self.norm, &matrix)?;
                let (bias, out) = (l.bias(linear.bias)?, l.temporary(1));
                l.push(LinearStage {
                    source,
                    matrix,
                    bias,
                    gate: None,
                    residual: None,
                    out,
                    wanted_only: false,
                });
                Some(out)
            }
            None => None,
        };
        let source = source(l, self.input, self.norm, &gate)?;
        let inner = l.temporary(gate.rows());
        l.push(Gated { source, gate, up, biases, activation: self.activation, out: inner });
        let source = Source::new(inner, None, &down);
        l.push(source.pack());
        let residual = residual(l, self.residual, down.rows())?;
        let bias = l.bias(self.down.bias)?;
        let out = l.output(0, Form::Flat { width: down.rows() });
        l.push(LinearStage { source, matrix: down, bias, gate: weight, residual, out, wanted_only: false });
        Ok(())
    }
}
