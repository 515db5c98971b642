//! The patterns, one a file. Their order is that in which they are tried.

mod attention_out;
mod deepseek_router;
mod deltanet;
mod embedding;
mod glm47_rope;
mod kv_f16;
mod layernorm;
mod linear_residual;
mod lm_head;
mod moe_mlp;
mod norm_linear;
mod qkv_rope_append;
mod residual_norm;
mod rmsnorm;
mod router;
mod short_conv;
mod skv_mla;
mod softmax;
mod sparse_mla;
mod swiglu_mlp;

use std::any::Any;
use std::sync::Arc;

use zmlx_engine::matrix::Matrix;
use zmlx_engine::program::Buffer;
use zmlx_engine::stages::{Activation, Source};

use crate::native::{Form, Lowering, LoweringError, Turn};
use crate::op::Op;
use crate::ops::{ClampedSwiGlu, Rope, RopeFrequencies};
use crate::pattern::{Match, Pattern};
use crate::weights::WeightId;

/// All patterns.
pub static ALL: &[&Pattern] = &[
    &embedding::PATTERN,
    &qkv_rope_append::PATTERN,
    &attention_out::PATTERN,
    &glm47_rope::PATTERN,
    &skv_mla::PATTERN,
    &sparse_mla::PATTERN,
    // After all that look for the ops whose caches it changes.
    &kv_f16::PATTERN,
    &short_conv::PATTERN,
    &deltanet::PATTERN,
    &router::PATTERN,
    &deepseek_router::PATTERN,
    &moe_mlp::PATTERN,
    &swiglu_mlp::PATTERN,
    &swiglu_mlp::GEGLU,
    &linear_residual::PATTERN,
    &lm_head::PATTERN,
    &norm_linear::PATTERN,
    &residual_norm::PATTERN,
    &rmsnorm::PATTERN,
    &layernorm::PATTERN,
    &softmax::PATTERN,
];

/// The pattern of that name.
pub fn named(name: &str) -> Option<&'static Pattern> {
    ALL.iter().find(|p| p.name == name).copied()
}

/// A norm's weight and epsilon.
type NormOf = Option<(WeightId, f32)>;

/// The rows that a product with `matrix` reads: input `input`, normalised if there is a norm. Adds the stage that packs
/// them for all threads.
fn source(
    lowering: &mut Lowering<'_>,
    input: usize,
    norm: NormOf,
    matrix: &Matrix,
) -> Result<Source, LoweringError> {
    let buffer = lowering.input(input, Form::Flat { width: matrix.columns() })?;
    let norm = lowering.norm(norm)?;
    let source = Source::new(buffer, norm, matrix);
    lowering.push(source.pack());
    Ok(source)
}

/// The buffer of an input that is added to a result of that width.
fn residual(
    lowering: &mut Lowering<'_>,
    input: Option<usize>,
    width: usize,
) -> Result<Option<Buffer>, LoweringError> {
    input.map(|i| lowering.input(i, Form::Flat { width })).transpose()
}

/// The rotary embedding `name`, if it is there.
fn turn(m: &Match<'_>, name: &str) -> Result<Option<Turn>, String> {
    if let Some(r) = m.op::<Rope>(name) {
        let (base, frequencies) = (Some(r.base), None);
        return Ok(Some(Turn {
            dims: r.dims,
            traditional: r.traditional,
            base,
            scale: r.scale,
            frequencies,
            magnitude: 1.0,
        }));
    }
    let Some(r) = m.op::<RopeFrequencies>(name) else { return Ok(None) };
    let made = r.frequencies.array(r.dims).and_then(|a| a.to_vec::<f32>());
    let frequencies = Some(made.map_err(|e| e.to_string())?);
    Ok(Some(Turn {
        dims: r.dims,
        traditional: r.traditional,
        base: None,
        scale: 1.0,
        frequencies,
        magnitude: r.magnitude as f32,
    }))
}

/// The activation that a gated op of the graph applies.
fn activation(op: &Arc<dyn Op>) -> Result<Activation, String> {
    let any: &dyn Any = &**op;
    if let Some(&ClampedSwiGlu { alpha, limit }) = any.downcast_ref() {
        return Ok(Activation::ClampedSwiGlu { alpha: alpha as f32, limit: limit as f32 });
    }
    match op.name() {
        "swiglu" => Ok(Activation::Silu),
        "geglu_tanh" => Ok(Activation::GeluTanh),
        "geglu_erf" => Ok(Activation::GeluErf),
        other => Err(format!("the activation {other} has no CPU kernel")),
    }
}

/// Whether two matrices can be read in one go: stored and sized alike.
fn alike(a: &Matrix, b: &Matrix) -> Result<(), LoweringError> {
    let same =
        (a.rows(), a.columns(), a.layout(), a.granule()) == (b.rows(), b.columns(), b.layout(), b.granule());
    if same {
        Ok(())
    } else {
        Err(LoweringError::Pattern("two matrices that go together are stored differently".into()))
    }
}
