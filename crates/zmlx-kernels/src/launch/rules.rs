//! What MLX's transforms make of a kernel: gradients, tangents, a further axis.

use std::sync::Arc;

use zmlx_lang::program::{Program, ProgramOutput};
use zmlx_lang::{Dtype, Role};
use zmlx_mlx::transforms::Transforms;
use zmlx_mlx::{Array, Error as MlxError, ops};

use super::{Given, Prepared, Shapes, slices};
use crate::dtype::{shape_of, to_mlx, to_shape};
use crate::{Error, Kernel, Result, launch};

pub(super) struct Rules {
    kernel: Kernel,
    prepared: Arc<Prepared>,
    given: Given,
    shapes: Shapes,
    /// Which of the kernel's inputs each of the node's inputs is.
    order: Vec<Option<usize>>,
}

impl Rules {
    pub fn new(
        kernel: &Kernel,
        prepared: &Arc<Prepared>,
        given: &Given,
        shapes: Shapes,
        order: Vec<Option<usize>>,
    ) -> Self {
        Self { kernel: kernel.clone(), prepared: Arc::clone(prepared), given: given.clone(), shapes, order }
    }

    fn program(&self) -> &Program {
        &self.prepared.program
    }

    /// The kernel's input that a node's input is, if it has a derivative.
    fn differentiable(&self, position: usize) -> Option<usize> {
        let n = (*self.order.get(position)?)?;
        self.program().inputs[n].dtype.is_float().then_some(n)
    }

    /// The node's inputs by their number in the kernel. An unused input is not there.
    fn by_number(&self, arrays: &[Array]) -> Vec<Option<Array>> {
        let mut out = vec![None; self.program().inputs.len()];
        for (n, array) in self.order.iter().zip(arrays).filter_map(|(n, a)| Some(((*n)?, a))) {
            out[n] = Some(array.clone());
        }
        out
    }

    /// An output's array as an input of a derivative: a value a row has 1 for its last axis.
    fn as_input(&self, output: &ProgramOutput, array: &Array) -> Result<Array> {
        let dropped = output.per_row && !output.keep_dims && !self.shapes.domain.shape.is_empty();
        Ok(if dropped { array.expand_dims(&[-1])? } else { array.clone() })
    }

    fn domain(&self) -> Given {
        Given { domain: Some(self.shapes.domain.shape.clone()), outputs: Vec::new() }
    }

    fn vjp(
        &self,
        primals: &[Array],
        cotangents: &[Array],
        outputs: &[Array],
        argnums: &[usize],
    ) -> Result<Vec<Array>> {
        let wrt: Vec<usize> = argnums.iter().filter_map(|p| self.differentiable(*p)).collect();
        // Rounded outputs are not what the derivative is of: only f32 is read back.
        let saved = self.program().outputs.iter().map(|o| o.dtype == Dtype::F32).collect();
        let derivative = self.kernel.vjp(wrt.clone(), saved)?;
        let rule = &derivative.rule;
        let gradients = match &derivative.kernel {
            None => Vec::new(),
            Some(kernel) => {
                let numbered = self.by_number(primals);
                let missing = || Error::Argument {
                    kernel: self.kernel.name().to_owned(),
                    what: "its gradient needs an input that it does not use itself".to_owned(),
                };
                let mut inputs = Vec::new();
                for n in &rule.primals {
                    inputs.push(numbered[*n].clone().ok_or_else(missing)?);
                }
                for (numbers, arrays) in [(&rule.cotangents, cotangents), (&rule.saved, outputs)] {
                    for o in numbers {
                        inputs.push(self.as_input(&self.program().outputs[*o], &arrays[*o])?);
                    }
                }
                launch::launch(kernel, inputs, &self.domain())?
            }
        };
        let mut out = Vec::with_capacity(argnums.len());
        for p in argnums {
            let primal = &primals[*p];
            let at = self.differentiable(*p).and_then(|n| wrt.iter().position(|w| *w == n));
            let mut total: Option<Array> = None;
            for g in at.iter().flat_map(|at| &rule.gradients[*at]) {
                let part = reduce_to(&gradients[*g], primal.shape())?;
                total = Some(match total {
                    None => part,
                    Some(sum) => sum.add(&part)?,
                });
            }
            out.push(match total {
                Some(sum) if sum.dtype() == primal.dtype() => sum,
                Some(sum) => sum.astype(primal.dtype())?,
                None => ops::zeros(primal.shape(), primal.dtype())?,
            });
        }
        Ok(out)
    }

    fn jvp(&self, primals: &[Array], tangents: &[Array], argnums: &[usize]) -> Result<Vec<Array>> {
        let given: Vec<(usize, &Array)> =
            argnums.iter().zip(tangents).filter_map(|(p, t)| Some((self.differentiable(*p)?, t))).collect();
        let derivative = self.kernel.jvp(given.iter().map(|(n, _)| *n).collect())?;
        let rule = &derivative.rule;
        let results = match &derivative.kernel {
            None => Vec::new(),
            Some(kernel) => {
                let numbered = self.by_number(primals);
                let mut inputs = Vec::new();
                for n in &rule.primals {
                    inputs.extend(numbered[*n].clone());
                }
                for n in &rule.tangents {
                    inputs.extend(given.iter().find(|(g, _)| g == n).map(|(_, t)| (*t).clone()));
                }
                let given = Given { outputs: Vec::new(), ..self.domain() };
                launch::launch(kernel, inputs, &given)?
            }
        };
        let outputs = self.program().outputs.iter().zip(&self.shapes.outputs).zip(&rule.outputs);
        outputs
            .map(|((output, shape), at)| {
                let dtype = to_mlx(output.dtype);
                let zero = || ops::zeros(&to_shape(shape), dtype);
                let array = at.map_or_else(zero, |at| Ok(results[at].clone()))?;
                Ok(if array.dtype() == dtype { array } else { array.astype(dtype)? })
            })
            .collect()
    }

    /// The arrays of all inputs; one that the node does not have is not used and may be anything.
    fn all_inputs(&self, arrays: &[Array]) -> Result<Vec<Array>> {
        let one = |(n, array): (usize, Option<Array>)| match array {
            Some(a) => Ok(a),
            None => {
                let dtype = to_mlx(self.program().inputs[n].dtype);
                Ok(ops::zeros(&to_shape(&self.shapes.inputs[n]), dtype)?)
            }
        };
        self.by_number(arrays).into_iter().enumerate().map(one).collect()
    }

    fn vmap(&self, inputs: &[Array], axes: &[Option<usize>]) -> Result<Vec<Array>> {
        let arrays = self.all_inputs(inputs)?;
        let mut mapped = vec![None; arrays.len()];
        for (n, axis) in self.order.iter().zip(axes) {
            if let (Some(n), Some(axis)) = (n, axis) {
                mapped[*n] = Some(*axis);
            }
        }
        let element = |n: usize| matches!(self.program().inputs[n].role, Role::Element | Role::Row);
        let together = (0..arrays.len()).all(|n| mapped[n].is_none() || element(n))
            && self.program().outputs.iter().all(|o| o.scatter.is_none());
        let size = slices::mapped_length(&arrays, &mapped).unwrap_or(1);
        if !together || self.shapes.domain.shape.is_empty() && self.program().has_rows {
            return self.one_by_one(&arrays, &mapped);
        }
        // The new axis goes in front, and inputs are filled up to the domain's rank behind it.
        let rank = self.shapes.domain.shape.len();
        let mut moved = Vec::with_capacity(arrays.len());
        for (array, axis) in arrays.iter().zip(&mapped) {
            moved.push(match axis {
                None => array.clone(),
                Some(axis) => {
                    let front = array.moveaxis(*axis as i32, 0)?;
                    let own = front.ndim() - 1;
                    let mut shape = vec![front.shape()[0]];
                    shape.extend(std::iter::repeat_n(1, rank - own.min(rank)));
                    shape.extend_from_slice(&front.shape()[1..]);
                    front.reshape(&shape)?
                }
            });
        }
        let mut domain = vec![usize::try_from(size).unwrap_or(0)];
        domain.extend_from_slice(&self.shapes.domain.shape);
        launch::launch(&self.kernel, moved, &Given { domain: Some(domain), outputs: Vec::new() })
    }

    /// A launch for each slice: for mapped scalars and indexed inputs, and for scattered outputs.
    fn one_by_one(&self, arrays: &[Array], mapped: &[Option<usize>]) -> Result<Vec<Array>> {
        let given =
            Given { domain: Some(self.shapes.domain.shape.clone()), outputs: self.given.outputs.clone() };
        let outputs = self.program().outputs.iter().zip(&self.shapes.outputs);
        let call = |inputs| launch::launch(&self.kernel, inputs, &given);
        match slices::each(arrays, mapped, self.shapes.outputs.len(), call)? {
            Some(stacked) => Ok(stacked),
            None => outputs
                .map(|(output, shape)| {
                    let shape = [&[0], to_shape(shape).as_slice()].concat();
                    Ok(ops::zeros(&shape, to_mlx(output.dtype))?)
                })
                .collect(),
        }
    }
}

/// Sums a gradient over the axes along which an input of `shape` was broadcast.
fn reduce_to(gradient: &Array, shape: &[i32]) -> Result<Array> {
    if gradient.shape() == shape {
        return Ok(gradient.clone());
    }
    let (from, to) = (shape_of(gradient.shape()), shape_of(shape));
    let extra = from.len().saturating_sub(to.len());
    let summed = |k: &usize| *k < extra || to[*k - extra] == 1 && from[*k] != 1;
    let axes: Vec<i32> = (0..from.len()).filter(summed).map(|k| k as i32).collect();
    let mut out = gradient.clone();
    if !axes.is_empty() {
        // Half-precision sums over many rows would lose the small terms.
        let half = matches!(out.dtype(), zmlx_mlx::Dtype::Float16 | zmlx_mlx::Dtype::Bfloat16);
        if half {
            out = out.astype(zmlx_mlx::Dtype::Float32)?;
        }
        out = out.sum(&axes, false)?;
    }
    Ok(out.reshape(shape)?)
}

impl Transforms for Rules {
    fn vjp(
        &self,
        primals: &[Array],
        cotangents: &[Array],
        outputs: &[Array],
        argnums: &[usize],
    ) -> std::result::Result<Vec<Array>, MlxError> {
        Ok(Self::vjp(self, primals, cotangents, outputs, argnums)?)
    }

    fn jvp(
        &self,
        primals: &[Array],
        tangents: &[Array],
        argnums: &[usize],
    ) -> std::result::Result<Vec<Array>, MlxError> {
        Ok(Self::jvp(self, primals, tangents, argnums)?)
    }

    fn vmap(
        &self,
        inputs: &[Array],
        axes: &[Option<usize>],
    ) -> std::result::Result<(Vec<Array>, Vec<usize>), MlxError> {
        let outputs = Self::vmap(self, inputs, axes)?;
        let axes = vec![0; outputs.len()];
        Ok((outputs, axes))
    }
}
