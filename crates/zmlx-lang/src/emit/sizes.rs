//! Run-time sizes: what the kernel takes as its last input, and how many groups it needs.

use super::{Layout, Plan};
use crate::error::{LangError, Result};
use crate::program::Program;
use crate::shape::broadcast_strides;

/// Positions in the array of sizes.
#[derive(Debug, Clone)]
pub(super) struct Offsets {
    /// For each input: where its strides or dims begin.
    pub inputs: Vec<usize>,
    /// For each output: where a scattered one's dims begin.
    pub outputs: Vec<usize>,
}

/// Position of the domain's axes.
pub(super) const DIMS: usize = 2;

impl Offsets {
    pub fn new(program: &Program, plan: &Plan) -> Self {
        let mut next = DIMS + plan.ndim;
        let mut take = |n: usize| {
            next += n;
            next - n
        };
        let inputs = program.inputs.iter().zip(&plan.layouts).map(|(input, layout)| {
            take(match (layout, input.role) {
                _ if !input.used => 0,
                (Layout::Strided, _) => plan.ndim,
                (_, crate::Role::Indexed(rank)) => rank as usize,
                _ => 0,
            })
        });
        let inputs = inputs.collect();
        let outputs = program.outputs.iter().map(|o| take(o.scatter.as_ref().map_or(0, |s| s.at.len())));
        let outputs = outputs.collect();
        Self { inputs, outputs }
    }
}

/// The sizes that a text of `plan` takes as its last input, an `int32` array, or `int64` when `plan.index64`:
/// `[rows, cols, axes of the domain..., strides of each used Strided input..., axes of each used Indexed input...,
/// axes of each scattered output...]`, inputs in order (strides and axes as they come), then outputs.
///
/// `shapes` are those of all inputs, `outputs` those of all outputs (only the scattered ones matter).
///
/// # Errors
/// [`LangError::Shape`] when the domain has another rank than the plan, a shape is missing or has another rank than
/// the kernel addresses, or a size does not fit the plan's index type.
pub fn meta(
    program: &Program,
    plan: &Plan,
    domain: &[usize],
    shapes: &[Vec<usize>],
    outputs: &[Vec<usize>],
) -> Result<Vec<i64>> {
    let bad = |what: String| LangError::Shape { kernel: program.name.clone(), what };
    if domain.len() != plan.ndim {
        return Err(bad(format!("the plan is for {} axes, the domain is {domain:?}", plan.ndim)));
    }
    if shapes.len() != program.inputs.len() || outputs.len() != program.outputs.len() {
        return Err(bad(format!("{} input and {} output shapes were given", shapes.len(), outputs.len())));
    }
    let (cols, outer) = domain.split_last().map_or((1, &[][..]), |(last, outer)| (*last, outer));
    let rows: usize = outer.iter().product();
    if let Some(most) = plan.row_capacity().filter(|_| program.has_rows)
        && cols > most as usize
    {
        return Err(bad(format!(
            "the plan is for rows of at most {most} elements, the domain is {domain:?}"
        )));
    }
    let mut sizes = vec![rows, cols];
    sizes.extend(domain);
    for ((input, layout), shape) in program.inputs.iter().zip(&plan.layouts).zip(shapes) {
        match (layout, input.role) {
            _ if !input.used => {}
            (Layout::Strided, _) => sizes.extend(broadcast_strides(shape, domain)),
            (_, crate::Role::Indexed(rank)) if shape.len() == rank as usize => sizes.extend(shape),
            (_, crate::Role::Indexed(rank)) => {
                return Err(bad(format!("input {} must have {rank} axes, got shape {shape:?}", input.name)));
            }
            _ => {}
        }
    }
    for (output, shape) in program.outputs.iter().zip(outputs) {
        match &output.scatter {
            Some(s) if s.at.len() == shape.len() => sizes.extend(shape),
            Some(s) => {
                let (name, axes) = (&output.name, s.at.len());
                return Err(bad(format!(
                    "output {name} is addressed by {axes} coordinates, its shape is {shape:?}"
                )));
            }
            None => {}
        }
    }
    if !plan.index64 && needs_index64(domain, shapes, outputs) {
        return Err(bad(format!("the domain {domain:?} needs a plan with 64-bit sizes")));
    }
    Ok(sizes.into_iter().map(|n| n as i64).collect())
}

/// Whether a call of these shapes needs [`Plan::index64`]: 32-bit offsets must reach every element and a group beyond.
pub fn needs_index64(domain: &[usize], shapes: &[Vec<usize>], outputs: &[Vec<usize>]) -> bool {
    let most = (i32::MAX as usize) - (1 << 24);
    let large = |s: &[usize]| s.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).is_none_or(|n| n > most);
    large(domain) || shapes.iter().chain(outputs).any(|s| large(s))
}

/// How many groups a launch takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GridRule {
    /// A group for so many elements.
    Elements {
        /// Elements a group.
        per_group: u32,
        /// Threads a group.
        threads: u32,
    },
    /// A group for so many rows.
    Rows {
        /// Rows a group.
        per_group: u32,
        /// Threads a group.
        threads: u32,
    },
}

/// Groups along x when there are too many for one axis of a launch.
const WIDE: u64 = 1 << 20;

impl GridRule {
    pub(super) fn new(program: &Program, plan: &Plan) -> Self {
        if program.has_rows {
            Self::Rows { per_group: plan.rows_per_group, threads: plan.threads }
        } else {
            Self::Elements { per_group: plan.threads * plan.held(), threads: plan.threads }
        }
    }

    /// Groups for a domain.
    pub fn groups(&self, rows: u64, cols: u64) -> u64 {
        match *self {
            Self::Elements { per_group, .. } => (rows * cols).div_ceil(per_group.into()),
            Self::Rows { per_group, .. } => rows.div_ceil(per_group.into()),
        }
    }

    /// Threads in all, on each axis, as MLX takes them; whole groups, so that CUDA has nothing to round up. `None` when
    /// there is nothing to launch, or more than any device can.
    pub fn grid(&self, rows: u64, cols: u64) -> Option<[u32; 3]> {
        let (Self::Elements { threads, .. } | Self::Rows { threads, .. }) = *self;
        let groups = self.groups(rows, cols);
        let fits = groups * u64::from(threads) <= i32::MAX as u64;
        let (x, y) = if fits { (groups, 1) } else { (WIDE, groups.div_ceil(WIDE)) };
        (groups > 0 && y < 65_536).then(|| [(x * u64::from(threads)) as u32, y as u32, 1])
    }

    /// Threads a group, on each axis.
    pub fn threadgroup(&self) -> [u32; 3] {
        let (Self::Elements { threads, .. } | Self::Rows { threads, .. }) = *self;
        [threads, 1, 1]
    }
}
