//! Rows of logits on the CPU: tasks, conversions, softmax sums.

use half::{bf16, f16};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use zmlx_mlx::cpu::{CpuInput, CpuOutput};
use zmlx_mlx::{Dtype, Error};
use zmlx_simd::{convert, math};

use super::select::Selector;

/// Calls smaller than this many elements run on the calling thread.
const INLINE: usize = 16 << 10;
/// Elements of a task, about: its rows stay in the second-level cache.
const TASK: usize = 16 << 10;
/// Rows of a task are a multiple of this, so that no lane is idle.
const LANES: usize = 16;

/// Element types whose rows are selected from.
pub(super) trait Logit: zmlx_mlx::Plain {
    /// The values as f32, in `scratch` where they are not so already.
    fn widen<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];
}

impl Logit for f32 {
    fn widen<'a>(values: &'a [Self], _: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }
}

/// Converts into `scratch`, which gets the length of `values`.
macro_rules! widened {
    ($($ty:ty = $convert:path),*) => {$(
        impl Logit for $ty {
            fn widen<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
                scratch.resize(values.len(), 0.0);
                // The lengths are equal, which is all that the conversion can complain about.
                let done = $convert(values, scratch);
                debug_assert!(done.is_ok());
                scratch
            }
        }
    )*};
}
widened!(f16 = convert::f16_to_f32, bf16 = convert::bf16_to_f32);

/// What weights are made of.
#[derive(Clone, Copy)]
pub(super) struct Weighting<'a> {
    /// Whether the chosen ones are normalised among themselves.
    pub norm: bool,
    /// Added to the probabilities before the choice.
    pub bias: Option<&'a [f32]>,
    /// Added to the sum that biased weights are divided by.
    pub eps: f32,
}

/// One task's rows.
struct Task<'a> {
    x: &'a [f32],
    cols: usize,
    k: usize,
    places: &'a mut [u32],
    /// Weights and how they are made, where they are wanted.
    weights: Option<(&'a mut [f32], Weighting<'a>)>,
    selector: &'a mut Selector,
    scores: &'a mut Vec<f32>,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, cols, k, places, weights, selector, scores } = self;
        match weights {
            None => selector.rows(simd, x, cols, k, places),
            Some((out, how)) => match how.bias {
                None => {
                    selector.rows(simd, x, cols, k, places);
                    weigh(simd, x, cols, k, places, out, how.norm);
                }
                Some(bias) => {
                    scores.resize(x.len(), 0.0);
                    for (row, score) in x.chunks_exact(cols).zip(scores.chunks_exact_mut(cols)) {
                        probabilities(simd, row, bias, score);
                    }
                    selector.rows(simd, scores, cols, k, places);
                    gather(scores, cols, k, places, out);
                    if how.norm {
                        out.chunks_exact_mut(k).for_each(|w| divide(w, w.iter().sum::<f32>() + how.eps));
                    }
                }
            },
        }
    }
}

#[inline(always)]
fn divide(values: &mut [f32], by: f32) {
    values.iter_mut().for_each(|v| *v /= by);
}

/// out\[row\]\[j\] = x\[row\]\[places\[row\]\[j\]\].
#[inline(always)]
fn gather<T: Copy>(x: &[T], cols: usize, k: usize, places: &[u32], out: &mut [T]) {
    let rows = x.chunks_exact(cols).zip(places.chunks_exact(k)).zip(out.chunks_exact_mut(k));
    for ((row, places), out) in rows {
        out.iter_mut().zip(places).for_each(|(o, p)| *o = row[*p as usize]);
    }
}

/// The weights without bias: the chosen logits' exponentials over the sum of theirs, or of all.
#[inline(always)]
fn weigh<S: Simd>(simd: S, x: &[f32], cols: usize, k: usize, places: &[u32], out: &mut [f32], norm: bool) {
    for ((row, places), out) in x.chunks_exact(cols).zip(places.chunks_exact(k)).zip(out.chunks_exact_mut(k))
    {
        let most = row[places[0] as usize];
        out.iter_mut().zip(places).for_each(|(o, p)| *o = row[*p as usize] - most);
    }
    let (body, tail) = S::as_mut_simd_f32s(out);
    for v in body {
        [*v] = math::exp(simd, [*v]);
    }
    if !tail.is_empty() {
        let [last] = math::exp(simd, [simd.partial_load_f32s(tail)]);
        simd.partial_store_f32s(tail, last);
    }
    for ((row, places), out) in x.chunks_exact(cols).zip(places.chunks_exact(k)).zip(out.chunks_exact_mut(k))
    {
        let sum = if norm { out.iter().sum() } else { sum_exp(simd, row, row[places[0] as usize]) };
        divide(out, sum);
    }
}

/// The sum of e^(x - most) over a row.
#[inline(always)]
fn sum_exp<S: Simd>(simd: S, row: &[f32], most: f32) -> f32 {
    let (body, tail) = S::as_simd_f32s(row);
    let shift = simd.splat_f32s(most);
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (fours, rest) = pulp::as_arrays::<4, _>(body);
    for four in fours {
        sums = math::add(simd, sums, math::exp(simd, math::sub(simd, *four, [shift; 4])));
    }
    for x in rest {
        let [e] = math::exp(simd, [simd.sub_f32s(*x, shift)]);
        sums[0] = simd.add_f32s(sums[0], e);
    }
    if !tail.is_empty() {
        let [x] = math::exp(simd, [simd.sub_f32s(simd.partial_load_f32s(tail), shift)]);
        // Lanes past the end hold no element.
        let mut lanes = [0.0f32; 64];
        simd.partial_store_f32s(&mut lanes[..S::F32_LANES], x);
        lanes[tail.len()..].fill(0.0);
        sums[3] = simd.add_f32s(sums[3], simd.partial_load_f32s(&lanes[..S::F32_LANES]));
    }
    let (a, b) = (simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
    simd.reduce_sum_f32s(simd.add_f32s(a, b))
}

/// e^(x - shift) / sum + bias. No closure: one that is not inlined would lack the instruction set.
#[inline(always)]
fn score<S: Simd>(simd: S, x: S::f32s, bias: S::f32s, shift: S::f32s, sum: S::f32s) -> S::f32s {
    let [e] = math::exp(simd, [simd.sub_f32s(x, shift)]);
    simd.add_f32s(simd.div_f32s(e, sum), bias)
}

/// softmax(row) + bias.
#[inline(always)]
fn probabilities<S: Simd>(simd: S, row: &[f32], bias: &[f32], out: &mut [f32]) {
    let (body, tail) = S::as_simd_f32s(row);
    let mut most = simd.splat_f32s(f32::NEG_INFINITY);
    for x in body {
        most = simd.max_f32s(most, *x);
    }
    // A NaN that is lost here comes back through the sum.
    let most = tail.iter().fold(simd.reduce_max_f32s(most), |m, x| m.max(*x));
    let sum = simd.splat_f32s(sum_exp(simd, row, most));
    let shift = simd.splat_f32s(most);
    let (bias, bias_tail) = S::as_simd_f32s(bias);
    let (out, out_tail) = S::as_mut_simd_f32s(out);
    for ((o, x), b) in out.iter_mut().zip(body).zip(bias) {
        *o = score(simd, *x, *b, shift, sum);
    }
    if !tail.is_empty() {
        let last = score(simd, simd.partial_load_f32s(tail), simd.partial_load_f32s(bias_tail), shift, sum);
        simd.partial_store_f32s(out_tail, last);
    }
}

/// Runs `one` on the rows of each task: numbers of the first row and of rows, and the task's part of both outputs.
fn tasks<V: Send>(
    (rows, cols, k): (usize, usize, usize),
    (first, places): (&mut [V], &mut [u32]),
    one: impl Fn(&mut Room, usize, &mut [V], &mut [u32]) + Sync,
) {
    if rows * cols <= INLINE || rayon::current_num_threads() == 1 {
        let mut room = Room::new();
        let per = per_task(cols).min(rows.max(1)) * k;
        let parts = first.chunks_mut(per).zip(places.chunks_mut(per));
        parts.enumerate().for_each(|(t, (v, p))| one(&mut room, t * per / k, v, p));
        return;
    }
    let per = per_task(cols) * k;
    let parts = first.par_chunks_mut(per).zip(places.par_chunks_mut(per)).enumerate();
    parts.for_each_init(Room::new, |room, (t, (v, p))| one(room, t * per / k, v, p));
}

fn per_task(cols: usize) -> usize {
    let rows = TASK / cols.max(1);
    if rows >= LANES { rows / LANES * LANES } else { rows.max(1) }
}

/// Memory that tasks of one thread use again.
struct Room {
    selector: Selector,
    wide: Vec<f32>,
    scores: Vec<f32>,
}

impl Room {
    fn new() -> Self {
        Self { selector: Selector::new(), wide: Vec::new(), scores: Vec::new() }
    }
}

fn two<'a, 'b>(
    outputs: &'a mut [CpuOutput<'b>],
) -> Result<(&'a mut CpuOutput<'b>, &'a mut CpuOutput<'b>), Error> {
    match outputs {
        [a, b] => Ok((a, b)),
        _ => Err(Error::custom("two outputs are needed")),
    }
}

/// Rows and columns of an input.
fn extent(x: &CpuInput<'_>) -> (usize, usize) {
    let size = |dims: &[i32]| dims.iter().map(|d| usize::try_from(*d).unwrap_or(0)).product();
    match x.shape().split_last() {
        Some((cols, rows)) => (size(rows), size(&[*cols])),
        None => (0, 0),
    }
}

/// Chooses the function of a dtype.
macro_rules! by_dtype {
    ($x:expr, $f:ident($($arg:expr),*)) => {
        match $x.dtype() {
            Dtype::Float16 => $f::<f16>($($arg),*),
            Dtype::Bfloat16 => $f::<bf16>($($arg),*),
            _ => $f::<f32>($($arg),*),
        }
    };
}

/// `(values, indices)` of `top_k`.
pub(super) fn top_k(inputs: &[CpuInput<'_>], outputs: &mut [CpuOutput<'_>], k: usize) -> Result<(), Error> {
    by_dtype!(inputs[0], top_k_of(&inputs[0], outputs, k))
}

fn top_k_of<T: Logit>(x: &CpuInput<'_>, outputs: &mut [CpuOutput<'_>], k: usize) -> Result<(), Error> {
    let (rows, cols) = extent(x);
    let (values, places) = two(outputs)?;
    let (all, values, places) =
        (x.as_slice::<T>()?, values.as_mut_slice::<T>()?, places.as_mut_slice::<u32>()?);
    let arch = zmlx_simd::arch();
    tasks((rows, cols, k), (values, places), |room, row, values, places| {
        let own = &all[row * cols..][..places.len() / k * cols];
        let x = T::widen(own, &mut room.wide);
        let (selector, scores) = (&mut room.selector, &mut room.scores);
        arch.dispatch(Task { x, cols, k, places, weights: None, selector, scores });
        gather(own, cols, k, places, values);
    });
    Ok(())
}

/// `(weights, indices)` of `top_k_gating`; a second input is the bias.
pub(super) fn gating(
    inputs: &[CpuInput<'_>],
    outputs: &mut [CpuOutput<'_>],
    k: usize,
    (norm, eps): (bool, f32),
) -> Result<(), Error> {
    let bias = inputs.get(1).map(|b| b.as_slice::<f32>()).transpose()?;
    by_dtype!(inputs[0], gating_of(&inputs[0], outputs, k, Weighting { norm, bias, eps }))
}

fn gating_of<T: Logit>(
    x: &CpuInput<'_>,
    outputs: &mut [CpuOutput<'_>],
    k: usize,
    how: Weighting<'_>,
) -> Result<(), Error> {
    let (rows, cols) = extent(x);
    let (weights, places) = two(outputs)?;
    let (all, weights, places) =
        (x.as_slice::<T>()?, weights.as_mut_slice::<f32>()?, places.as_mut_slice::<u32>()?);
    let arch = zmlx_simd::arch();
    tasks((rows, cols, k), (weights, places), |room, row, weights, places| {
        let x = T::widen(&all[row * cols..][..places.len() / k * cols], &mut room.wide);
        let (selector, scores) = (&mut room.selector, &mut room.scores);
        arch.dispatch(Task { x, cols, k, places, weights: Some((weights, how)), selector, scores });
    });
    Ok(())
}
