use std::any::Any;
use std::sync::Arc;

use zmlx_engine::program::SHARE_FROM;
use zmlx_engine::stages::{Activation, Choice, Combine, ExpertsDown, ExpertsUp, Group, Source};
use zmlx_mlx::kernel::Spec;
use zmlx_mlx::{Array, Result};

use super::{NormOf, activation, alike, source};
use crate::cuda::{combine_rows, sort_rows};
use crate::fidelity::Fidelity;
use crate::fused::{Body, Reference};
use crate::native::{Form, Lowering, LoweringError};
use crate::op::Context;
use crate::ops::{ExpandLast, ExpertLinear, ExpertSort, ExpertUnsort, SORT_FROM, Sum};
use crate::pattern::{Match, Pattern};

/// The routed experts: two stages a token. What shared experts give is added to their sum, and then the residual.
pub static PATTERN: Pattern = Pattern {
    name: "moe_mlp",
    summary: "experts' gate, up and activation as one stage; down, weights, sum, shared experts' result and residual as another",
    class: Fidelity::TokenIdentical,
    templates: &["
        n ~ rms_norm?(x)
        rows, expert, order = expert_sort(n, indices)
        up = expert_linear(rows, expert)
        gate = expert_linear(rows, expert)
        a = swiglu|geglu_tanh|geglu_erf|clamped_swiglu(gate, up)
        down = expert_linear(a, expert)
        y = expert_unsort(down, order, indices)
        we = expand_last(weights)
        yw = multiply(y, we)
        s = sum(yw)
        c = cast?(s, y)
        e = add?(c, shared)
        h = add?(e, r)
        return h
    "],
    build,
};

#[derive(Debug)]
struct Fused {
    input: usize,
    indices: usize,
    weights: usize,
    /// What is added to the sum, in this order.
    residuals: Vec<usize>,
    norm: NormOf,
    k: usize,
    gate: ExpertLinear,
    up: ExpertLinear,
    down: ExpertLinear,
    activation: Activation,
}

/// Whether a pattern gives choices as this one takes them.
fn is_router(pattern: &str) -> bool {
    matches!(pattern, "router" | "deepseek_router")
}

fn build(m: &Match<'_>) -> std::result::Result<Arc<dyn Body>, String> {
    let expert = |name: &str| -> std::result::Result<ExpertLinear, String> {
        let linear = m.need::<ExpertLinear>(name)?.clone();
        m.matrix(linear.weight)?;
        Ok(linear)
    };
    let (gate, up, down) = (expert("gate")?, expert("up")?, expert("down")?);
    m.alike(&[gate.weight, up.weight])?;
    let Sum { axis: -2, keepdims: false } = m.need::<Sum>("s")? else {
        return Err("experts are summed over another axis".to_owned());
    };
    let router = m.producer("indices").and_then(|n| n.op.fused()).filter(|f| is_router(f.pattern));
    router.ok_or("its router is not fused (router is off or did not match)")?;
    let k = m.row_width("indices")?;
    let activation = activation(&m.node("a").ok_or("no activation")?.op)?;
    let input = m.rows("x")?;
    let added = [m.residual("e", "s", "shared")?, m.residual("h", "s", "r")?];
    let residuals = added.into_iter().flatten().collect();
    let (indices, weights) = (m.input("indices")?, m.input("weights")?);
    let norm = m.norm("n");
    Ok(Arc::new(Fused { input, indices, weights, residuals, norm, k, gate, up, down, activation }))
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        // The rows of many choices are packed once for all threads.
        2 + u64::from(self.k >= SHARE_FROM)
    }

    /// As the reference, but for what it does with rows between products: experts are counted and not sorted by comparing, and
    /// a token's rows are weighted and added where they are, not brought back to the tokens' order first.
    fn prompt(
        &self,
        context: &mut Context<'_>,
        reference: &Reference,
        inputs: &[Array],
    ) -> Result<Vec<Array>> {
        let (mut sorted, mut weights) = (None, None);
        reference.fold(inputs, |node, given| {
            let op: &dyn Any = node.op.as_ref();
            match given {
                [rows, order, _] if op.is::<ExpertUnsort>() => sorted = Some((rows.clone(), order.clone())),
                [scores] if op.is::<ExpandLast>() => weights = Some(scores.clone()),
                _ => {}
            }
            if let [x, chosen] = given
                && op.is::<ExpertSort>()
                && chosen.size() >= SORT_FROM
                && let Some(&experts) = context.weight(self.gate.weight).arrays()[0].shape().first()
                && let Some([tokens, experts, places]) = sort_rows(chosen, experts)?
            {
                let rows = x.flatten(0, -2)?.expand_dims(&[-2])?.take(&tokens, 0)?;
                return Ok(vec![rows, experts, places]);
            }
            // MLX is lazy: what the kernel takes the place of is never computed.
            let made = node.op.run(context, &given.iter().collect::<Vec<_>>())?;
            if op.is::<Sum>()
                && let (Some((rows, order)), Some(scores), [sum]) = (&sorted, &weights, made.as_slice())
                && let Some(sum) = combine_rows(rows, order, scores, Spec::of(sum))?
            {
                return Ok(vec![sum]);
            }
            Ok(made)
        })
    }

    fn lower(&self, l: &mut Lowering<'_>) -> std::result::Result<(), LoweringError> {
        let (gate, up, down) =
            (l.matrix(self.gate.weight)?, l.matrix(self.up.weight)?, l.matrix(self.down.weight)?);
        let (biases, bias) = ([l.bias(self.gate.bias)?, l.bias(self.up.bias)?], l.bias(self.down.bias)?);
        alike(&gate, &up)?;
        let indices = l.input(self.indices, Form::Indices { width: self.k })?;
        let weights = l.input(self.weights, Form::Flat { width: self.k })?;
        let mut choice = Choice { indices, k: self.k, experts: gate.experts(), lists: indices };
        choice.lists = l.temporary(choice.list_width());
        l.push(Group(choice));
        let source = source(l, self.input, self.norm, &gate)?;
        let inner = l.temporary(self.k * gate.rows());
        l.push(ExpertsUp { source, choice, gate, up, biases, activation: self.activation, out: inner });
        let source = Source { per_token: self.k, ..Source::new(inner, None, &down) };
        l.push(source.pack());
        let width = down.rows();
        let slots = l.temporary(self.k * width);
        let form = Form::Flat { width };
        let residuals: Vec<_> =
            self.residuals.iter().map(|&i| l.input(i, form)).collect::<std::result::Result<_, _>>()?;
        let out = l.output(0, Form::Flat { width });
        l.push(ExpertsDown { source, choice, down, bias, weights, residuals: residuals.clone(), slots, out });
        l.push(Combine { choice, weights, slots, residuals, out, width });
        Ok(())
    }
}
