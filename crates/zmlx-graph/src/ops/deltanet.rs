//! What gated delta nets (Qwen3-Next, Qwen3.5) are made of, in mlx-lm's arithmetic.

use zmlx_mlx::cpu::{CpuInput, CpuKernel, CpuOutput, CpuPrimitive, Spec};
use zmlx_mlx::stream::current_device;
use zmlx_mlx::{Array, Device, Dtype, Error, Result, fast, ops};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted, wrong_slot};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, DtypeSpec, Type};
use crate::state::{SlotId, SlotKind, SlotValue};
use crate::weights::WeightId;

/// `x * sigmoid(x)`.
#[derive(Debug)]
pub struct Silu;

impl Op for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        if !x.dtype.is_float() {
            return Err(ShapeError::input(0, x, "floats"));
        }
        Ok(vec![x.clone()])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], 2, 5)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].multiply(&inputs[0].sigmoid()?)?])
    }
}

/// `scale * x / sqrt(mean(x^2) + eps)` over the last axis.
#[derive(Debug, Clone, Copy)]
pub struct UnitNorm {
    /// Multiplies the result, in its dtype.
    pub scale: f64,
    /// Added under the root.
    pub eps: f32,
}

impl Op for UnitNorm {
    fn name(&self) -> &'static str {
        "unit_norm"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("scale", Attribute::Float(self.scale)), ("eps", Attribute::Float(self.eps.into()))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        if !x.dtype.is_float() || x.shape.rank() == 0 {
            return Err(ShapeError::input(0, x, "[..., width] of floats"));
        }
        Ok(vec![x.clone()])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], 2, 5)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![fast::rms_norm(inputs[0], None, self.eps)?.multiply_scalar(self.scale)?])
    }
}

/// How much of its state a head keeps: `exp(-exp(a_log) softplus(a + dt_bias))` of `a` `[B, L, heads]`, in float32.
#[derive(Debug, Clone, Copy)]
pub struct DeltaGate {
    /// `a_log`: `[heads]`.
    pub a_log: WeightId,
    /// `dt_bias`: `[heads]`.
    pub dt_bias: WeightId,
}

impl Op for DeltaGate {
    fn name(&self) -> &'static str {
        "delta_gate"
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.a_log, self.dt_bias]
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [a] = inputs(given)?;
        let Some(heads) = a.shape.last().filter(|_| a.dtype.is_float()) else {
            return Err(ShapeError::input(0, a, "[batch, length, heads] of floats"));
        };
        for id in self.weights() {
            let weight = context.weight(id)?;
            if !matches!(weight.shape.as_slice(), &[n] if heads.is(n.into())) {
                return Err(ShapeError::weight(weight, format_args!("a vector [{heads}]")));
            }
        }
        Ok(vec![Type { dtype: DtypeSpec::F32, ..a.clone() }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&self.weights(), 6, 12)
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let (a_log, dt_bias) = (context.weight(self.a_log).dense()?, context.weight(self.dt_bias).dense()?);
        let x = inputs[0].add(&dt_bias)?;
        let softplus = x.logaddexp(&Array::scalar_as(0.0, x.dtype())?)?;
        let rate = a_log.astype(Dtype::Float32)?.exp()?.negative()?;
        Ok(vec![rate.multiply(&softplus)?.exp()?.astype(Dtype::Float32)?])
    }
}

/// The gated delta rule, token by token. Inputs: q, k `[B, L, key_heads, key]`, v `[B, L, heads, value]`, g and beta
/// `[B, L, heads]`; output `[B, L, heads, value]`. With `S` the state of a head, `[value, key]`, zeros at first:
///
/// `S = g S; S = S + beta (v - S k) k^T; y = S q`
///
/// Heads in groups share queries and keys. The state is float32.
#[derive(Debug, Clone, Copy)]
pub struct GatedDelta {
    /// The state.
    pub slot: SlotId,
}

impl Op for GatedDelta {
    fn name(&self) -> &'static str {
        "gated_delta"
    }

    fn slot(&self) -> Option<SlotId> {
        Some(self.slot)
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [q, k, v, g, beta] = inputs(given)?;
        let slot = context.slot(self.slot)?;
        if slot.kind != SlotKind::DeltaState {
            return Err(wrong_slot(slot, "the state of a delta net"));
        }
        let [batch, length, key_heads, key] = q.shape.0.as_slice() else {
            return Err(ShapeError::input(0, q, "[batch, length, key_heads, key]"));
        };
        if k.shape != q.shape {
            return Err(ShapeError::input(1, k, &q.shape));
        }
        let [_, _, heads, value] = v.shape.0.as_slice() else {
            return Err(ShapeError::input(2, v, format_args!("[{batch}, {length}, heads, value]")));
        };
        let grouped = heads.constant().zip(key_heads.constant()).is_some_and(|(h, g)| g > 0 && h % g == 0);
        if !grouped || v.shape.0[..2] != q.shape.0[..2] {
            let expected = format!("[{batch}, {length}, n * {key_heads}, value]");
            return Err(ShapeError::input(2, v, expected));
        }
        for (number, t) in [(3, g), (4, beta)] {
            if t.shape.0[..] != v.shape.0[..3] {
                return Err(ShapeError::input(number, t, format_args!("[{batch}, {length}, {heads}]")));
            }
        }
        let state = [batch.clone(), heads.clone(), value.clone(), key.clone()];
        context.holds(self.slot, vec![Type::new(state, DtypeSpec::F32)])?;
        promoted(2, v, q.dtype)?;
        Ok(vec![Type { shape: v.shape.clone(), dtype: q.dtype }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let [q, _, v, ..] = node.inputs() else { return Work::default() };
        let (batch, length) = (node.dim(v, 0), node.dim(v, 1));
        let cells = node.dim(v, 2) * node.dim(v, 3) * node.dim(q, 3);
        let steps = batch.saturating_mul(length);
        Work {
            flops: steps.saturating_mul(7 * cells),
            state_read: 4 * batch * cells,
            state_written: 4 * batch * cells,
            ..node.plain(&[], 9 * length, 0)
        }
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [q, k, v, g, beta] = inputs else {
            return Err(Error::Argument("gated_delta takes q, k, v, g and beta".to_owned()));
        };
        let (batch, length, heads, value) = (v.dim(0)?, v.dim(1)?, v.dim(2)?, v.dim(3)?);
        let (key, repeats) = (q.dim(3)?, heads / q.dim(2)?);
        let dtype = q.dtype();
        let (q, k) = if repeats > 1 {
            (q.repeat(repeats, -2)?, k.repeat(repeats, -2)?)
        } else {
            ((*q).clone(), (*k).clone())
        };
        let SlotValue::Delta(kept) = context.slot(self.slot) else {
            return Err(Error::Argument("gated_delta needs the slot of a delta net".to_owned()));
        };
        let mut state = match kept.take() {
            Some(state) => state,
            None => ops::zeros(&[batch, heads, value, key], Dtype::Float32)?,
        };
        let wide = [&q, &k, *v, *g, *beta].iter().all(|x| x.dtype() == Dtype::Float32);
        if wide && current_device()? == Device::Cpu {
            let made = CpuPrimitive::new(DeltaRule).apply(&[&q, &k, v, g, beta, &state])?;
            let [y, state] = <[Array; 2]>::try_from(made)
                .map_err(|_| Error::Argument("gated_delta gives two arrays".to_owned()))?;
            *kept = Some(state);
            return Ok(vec![y]);
        }
        let mut out = Vec::with_capacity(length as usize);
        for t in 0..length {
            let at = |x: &Array| x.slice_axis(1, t, t + 1)?.squeeze(&[1]);
            let (k, v) = (at(&k)?.expand_dims(&[-2])?, at(v)?);
            state = state.multiply(&at(g)?.expand_dims(&[-1, -2])?)?;
            let known = state.multiply(&k)?.sum(&[-1], false)?;
            let delta = v.subtract(&known)?.multiply(&at(beta)?.expand_dims(&[-1])?)?;
            state = state.add(&k.multiply(&delta.expand_dims(&[-1])?)?)?;
            let y = state.multiply(&at(&q)?.expand_dims(&[-2])?)?.sum(&[-1], false)?;
            out.push(y.astype(dtype)?);
        }
        *kept = Some(state);
        Ok(vec![ops::stack(&out.iter().collect::<Vec<_>>(), 1)?])
    }
}

/// All tokens of [`GatedDelta`] in one node, on the CPU in float32: mlx-lm's loop over tokens is one of MLX ops. Inputs: q,
/// k `[B, L, H, key]`, v `[B, L, H, value]`, g, beta `[B, L, H]`, state `[B, H, value, key]`; outputs: as v, and the state.
struct DeltaRule;

/// Sums that a product is taken in side by side.
const LANES: usize = 8;

impl CpuKernel for DeltaRule {
    fn name(&self) -> &str {
        "gated_delta"
    }

    fn outputs(&self, inputs: &[Spec]) -> Result<Vec<Spec>> {
        match inputs {
            [_, _, v, _, _, state] => Ok(vec![v.clone(), state.clone()]),
            _ => Err(Error::Argument("gated_delta takes six arrays".to_owned())),
        }
    }

    fn in_place(&self) -> Vec<(usize, usize)> {
        vec![(5, 1)]
    }

    fn eval(&self, inputs: &[CpuInput<'_>], outputs: &mut [CpuOutput<'_>]) -> Result<()> {
        let ([q, k, v, g, beta, _], [out, state]) = (inputs, outputs) else {
            return Err(Error::Argument("gated_delta takes six arrays and gives two".to_owned()));
        };
        let (&[_, length, heads, key], Some(&value)) = (q.shape(), v.shape().last()) else {
            return Err(Error::Argument("gated_delta takes heads".to_owned()));
        };
        let [length, heads, key, value] = [length, heads, key, value].map(|n| n.max(0) as usize);
        if length * heads * key * value == 0 {
            return Ok(());
        }
        let (q, k, v) = (q.as_slice::<f32>()?, k.as_slice::<f32>()?, v.as_slice::<f32>()?);
        let (g, beta) = (g.as_slice::<f32>()?, beta.as_slice::<f32>()?);
        let out = out.as_mut_slice::<f32>()?;
        for (i, state) in state.as_mut_slice::<f32>()?.chunks_exact_mut(value * key).enumerate() {
            let (sequence, head) = (i / heads, i % heads);
            for t in sequence * length..(sequence + 1) * length {
                let at = t * heads + head;
                let (q, k) = (&q[at * key..][..key], &k[at * key..][..key]);
                let (v, y) = (&v[at * value..][..value], &mut out[at * value..][..value]);
                for ((row, v), y) in state.chunks_exact_mut(key).zip(v).zip(y) {
                    row.iter_mut().for_each(|s| *s *= g[at]);
                    let delta = (v - dot(row, k)) * beta[at];
                    row.iter_mut().zip(k).for_each(|(s, k)| *s += k * delta);
                    *y = dot(row, q);
                }
            }
        }
        Ok(())
    }
}

/// The sum of products.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a).zip(b).for_each(|((s, a), b)| *s += a * b);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// `[batch, length, heads, d]` to `[batch, length, heads * d]`.
#[derive(Debug)]
pub struct FlattenHeads;

impl Op for FlattenHeads {
    fn name(&self) -> &'static str {
        "flatten_heads"
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let [batch, length, heads, width] = x.shape.0.as_slice() else {
            return Err(ShapeError::input(0, x, "[batch, length, heads, d]"));
        };
        let dims: [Dim; 3] = [batch.clone(), length.clone(), heads.clone() * width.clone()];
        Ok(vec![Type::new(dims, x.dtype)])
    }

    fn work(&self, _: &NodeCost<'_>) -> Work {
        Work::default()
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].flatten(-2, -1)?])
    }
}
