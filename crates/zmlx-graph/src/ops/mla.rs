use zmlx_mlx::{Array, Dtype, Error, Result, fast, ops};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, Type};
use crate::weights::WeightId;

/// Multi-head latent attention, causal: inputs (q_nope `[B, H, L, nope]`, q_pe `[B, H, L, rope]`, latents
/// `[B, 1, S, latent]`, k_pe `[B, 1, S, rope]`), output `[B, H, L, value]`.
///
/// With `E_h` and `U_h` the matrices of head `h`, keys are `c @ E_h` and values `c @ U_h.T` for latents `c`; scores are
/// `scale (q_nope . key + q_pe . k_pe)`. One query is brought to the latents' space instead (`q_nope @ E_h.T`), as mlx-lm
/// does it, which is the same sum in another order.
#[derive(Debug, Clone, Copy)]
pub struct MlaAttention {
    /// `E`: `[H, latent, nope]`.
    pub embed: WeightId,
    /// `U`: `[H, value, latent]`.
    pub unembed: WeightId,
    /// Scale of the scores.
    pub scale: f32,
}

impl Op for MlaAttention {
    fn name(&self) -> &'static str {
        "mla_attention"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("scale", Attribute::Float(self.scale.into()))]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.embed, self.unembed]
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [q, q_pe, latents, k_pe] = inputs(given)?;
        let (embed, unembed) = (context.weight(self.embed)?, context.weight(self.unembed)?);
        let &[heads, latent, nope] = embed.shape.as_slice() else {
            return Err(ShapeError::weight(embed, "matrices [heads, latent, nope]"));
        };
        let value = match unembed.shape.as_slice() {
            &[h, value, l] if (h, l) == (heads, latent) => value,
            _ => return Err(ShapeError::weight(unembed, format_args!("[{heads}, value, {latent}]"))),
        };
        let [batch, h, length, width] = q.shape.0.as_slice() else {
            return Err(ShapeError::input(0, q, format_args!("[batch, {heads}, L, {nope}]")));
        };
        if !h.is(heads.into()) || !width.is(nope.into()) {
            return Err(ShapeError::input(0, q, format_args!("[{batch}, {heads}, {length}, {nope}]")));
        }
        if q_pe.shape.rank() != 4 || q_pe.shape.0[..3] != q.shape.0[..3] {
            return Err(ShapeError::input(1, q_pe, format_args!("[{batch}, {heads}, {length}, rope]")));
        }
        let expected = |last: &Dim| format!("[{batch}, 1, S, {last}]");
        let fits = |t: &Type, last: &Dim| matches!(t.shape.0.as_slice(), [b, one, _, w] if b == batch && one.is(1) && w == last);
        let (latent, rope) = (Dim::from(latent), &q_pe.shape.0[3]);
        if !fits(latents, &latent) {
            return Err(ShapeError::input(2, latents, expected(&latent)));
        }
        if !fits(k_pe, rope) || k_pe.shape.0[2] != latents.shape.0[2] {
            return Err(ShapeError::input(3, k_pe, expected(rope)));
        }
        let mut dtype = q.dtype;
        for (number, t) in given.iter().enumerate().skip(1) {
            dtype = promoted(number, t, dtype)?;
        }
        Ok(vec![Type { shape: q.shape.with_last(value), dtype }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let [q, q_pe, latents, k_pe] = node.inputs() else { return Work::default() };
        let (heads, length, seen) = (node.dim(q, 1), node.dim(q, 2), node.dim(latents, 2));
        let (nope, rope, latent) = (node.dim(q, 3), node.dim(q_pe, 3), node.dim(latents, 3));
        let value = node.outputs().first().map_or(0, |o| node.dim(o, 3));
        let hidden = length.saturating_mul(length.saturating_sub(1)) / 2;
        let pairs = node.dim(q, 0) * heads * length.saturating_mul(seen).saturating_sub(hidden);
        // The two projections are of the queries if there is one, else of all latents.
        let projected = if length == 1 { 1 } else { seen };
        let (key, mixed) = if length == 1 { (latent, latent) } else { (nope, value) };
        Work {
            launches: 6,
            flops: pairs.saturating_mul(2 * (key + rope + mixed) + 5)
                + node.dim(q, 0) * heads * projected * 2 * latent * (nope + value),
            state_read: node.bytes(latents).saturating_add(node.bytes(k_pe)),
            activation_bytes: [q, q_pe].into_iter().chain(node.outputs()).map(|t| node.bytes(t)).sum(),
            ..node.plain(&self.weights(), 6, 0)
        }
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let &[q, q_pe, latents, k_pe] = inputs else {
            return Err(Error::Argument("mla_attention takes q_nope, q_pe, latents and k_pe".to_owned()));
        };
        Ok(vec![self.attend(context, q, q_pe, latents, k_pe, None)?])
    }
}

impl MlaAttention {
    /// `seen_by`: which positions each query may look at, `[..., L, S]`; of one query, all by default.
    fn attend(
        &self,
        context: &Context<'_>,
        q: &Array,
        q_pe: &Array,
        latents: &Array,
        k_pe: &Array,
        seen_by: Option<&Array>,
    ) -> Result<Array> {
        let (length, scale) = (q.dim(2)?, f64::from(self.scale));
        let scores = q_pe.multiply_scalar(scale)?.matmul(&k_pe.swapaxes(-1, -2)?)?;
        let (embed, unembed) = (context.weight(self.embed), context.weight(self.unembed));
        let attention = |q: &Array, keys: &Array, values: &Array, scores: &Array| {
            fast::scaled_dot_product_attention(q, keys, values, self.scale, "", Some(scores), None)
        };
        if length == 1 {
            return unembed.linear(&attention(&embed.linear(q)?, latents, latents, &scores)?);
        }
        let causal = match seen_by {
            Some(seen_by) => seen_by.clone(),
            None => causal(length, latents.dim(2)?)?,
        };
        let scores = causal.where_(&scores, &lowest(scores.dtype())?)?;
        let (keys, values) = (embed.linear_back(latents)?, unembed.linear(latents)?);
        attention(q, &keys, &values, &scores)
    }
}

/// Whether the last `length` of `seen` positions see each of them: `[length, seen]`.
pub(super) fn causal(length: i32, seen: i32) -> Result<Array> {
    let row = |start: i32, stop: i32| ops::arange(start.into(), stop.into(), 1.0, Dtype::Int32);
    row(seen - length, seen)?.expand_dims(&[-1])?.greater_equal(&row(0, seen)?)
}

/// [`MlaAttention`] over chosen positions only: its inputs, and positions `[B, 1, L, k]` as
/// [`TopPositions`](super::TopPositions) gives them. Positions of all that was seen (`k = S`) choose nothing.
///
/// One query has its latents gathered, in the order of its positions; several have the others masked, as mlx-lm does it.
#[derive(Debug, Clone, Copy)]
pub struct SparseMlaAttention(pub MlaAttention);

impl Op for SparseMlaAttention {
    fn name(&self) -> &'static str {
        "sparse_mla_attention"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        self.0.attributes()
    }

    fn weights(&self) -> Vec<WeightId> {
        self.0.weights()
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [q, _, _, _, positions] = inputs(given)?;
        let made = self.0.infer(context, &given[..4])?;
        let fits = match (positions.shape.0.as_slice(), q.shape.0.as_slice()) {
            ([b, one, l, _], [batch, _, length, _]) => (b, l) == (batch, length) && one.is(1),
            _ => false,
        };
        if !fits || !positions.dtype.is_index() {
            return Err(ShapeError::input(
                4,
                positions,
                format_args!("[B, 1, L, k] integers for queries {q}"),
            ));
        }
        Ok(made)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // As if every position were read: what is left out depends on how long the sequence is.
        let Some(inputs) = node.inputs().get(..4) else { return Work::default() };
        let dense = NodeCost::new(node.context(), node.weights(), inputs, node.outputs());
        let work = self.0.work(&dense);
        Work { launches: work.launches + 2, ..work }
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let &[q, q_pe, latents, k_pe, positions] = inputs else {
            let message = "sparse_mla_attention takes q_nope, q_pe, latents, k_pe and positions";
            return Err(Error::Argument(message.to_owned()));
        };
        let (length, seen) = (q.dim(2)?, latents.dim(2)?);
        if positions.dim(-1)? == seen {
            return Ok(vec![self.0.attend(context, q, q_pe, latents, k_pe, None)?]);
        }
        if length == 1 {
            let at = positions.transpose(&[0, 1, 3, 2])?;
            let gathered = |a: &Array| {
                let mut shape = at.shape().to_vec();
                shape[3] = a.dim(3)?;
                a.take_along_axis(&at.broadcast_to(&shape)?, 2)
            };
            return Ok(vec![self.0.attend(context, q, q_pe, &gathered(latents)?, &gathered(k_pe)?, None)?]);
        }
        let none = ops::zeros(&[q.dim(0)?, 1, length, seen], Dtype::Bool)?;
        let chosen = none.put_along_axis(positions, &Array::scalar_as(1.0, Dtype::Bool)?, -1)?;
        let seen_by = chosen.logical_and(&causal(length, seen)?)?;
        Ok(vec![self.0.attend(context, q, q_pe, latents, k_pe, Some(&seen_by))?])
    }
}

/// The lowest finite number of a dtype.
pub(super) fn lowest(dtype: Dtype) -> Result<Array> {
    let value = match dtype {
        Dtype::Float16 => -65504.0,
        Dtype::Bfloat16 => f64::from(f32::from_bits(0xff7f_0000)),
        _ => f64::from(f32::MIN),
    };
    Array::scalar_as(value, dtype)
}
