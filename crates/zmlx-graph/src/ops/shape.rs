use zmlx_mlx::{Array, Result, ops};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, Shape, Type};

/// `[batch, length, heads * d]` to `[batch, length, heads, d]`.
#[derive(Debug)]
pub struct SplitHeads {
    /// Number of heads.
    pub heads: i32,
}

impl Op for SplitHeads {
    fn name(&self) -> &'static str {
        "split_heads"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("heads", Attribute::Int(self.heads.into()))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let error = || ShapeError::input(0, x, format_args!("[batch, length, n * {}]", self.heads));
        let [batch, length, width] = x.shape.0.as_slice() else { return Err(error()) };
        let head = width.divided(self.heads.into()).filter(|_| self.heads > 0).ok_or_else(error)?;
        let dims = [batch.clone(), length.clone(), self.heads.into(), head];
        Ok(vec![Type::new(dims, x.dtype)])
    }

    fn work(&self, _: &NodeCost<'_>) -> Work {
        Work::default()
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let x = inputs[0];
        Ok(vec![x.reshape(&[x.dim(0)?, x.dim(1)?, self.heads, -1])?])
    }
}

/// `[batch, heads, length, d]` to `[batch, length, heads * d]`.
#[derive(Debug)]
pub struct MergeHeads;

impl Op for MergeHeads {
    fn name(&self) -> &'static str {
        "merge_heads"
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let [batch, heads, length, width] = x.shape.0.as_slice() else {
            return Err(ShapeError::input(0, x, "[batch, heads, length, head_dim]"));
        };
        let dims = [batch.clone(), length.clone(), heads.clone() * width.clone()];
        Ok(vec![Type::new(dims, x.dtype)])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // Heads and positions only change places in memory if there is more than one position.
        match node.inputs().first() {
            Some(x) if node.dim(x, 2) > 1 => node.plain(&[], 1, 0),
            _ => Work::default(),
        }
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let x = inputs[0];
        Ok(vec![x.transpose(&[0, 2, 1, 3])?.reshape(&[x.dim(0)?, x.dim(2)?, -1])?])
    }
}

/// Permutes axes.
#[derive(Debug)]
pub struct Transpose(pub Vec<i32>);

impl Op for Transpose {
    fn name(&self) -> &'static str {
        "transpose"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("axes", Attribute::Text(format!("{:?}", self.0)))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let axes: Option<Vec<usize>> = self.0.iter().map(|&a| x.shape.axis(a)).collect();
        let error = || ShapeError::input(0, x, format_args!("as many axes as {:?}, each once", self.0));
        let axes = axes.filter(|a| a.len() == x.shape.rank()).ok_or_else(error)?;
        if (0..axes.len()).any(|axis| !axes.contains(&axis)) {
            return Err(error());
        }
        let dims = axes.into_iter().map(|a| x.shape.0[a].clone()).collect();
        Ok(vec![Type { shape: Shape(dims), dtype: x.dtype }])
    }

    fn work(&self, _: &NodeCost<'_>) -> Work {
        Work::default()
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].transpose(&self.0)?])
    }
}

/// Splits the last axis into equal parts.
#[derive(Debug)]
pub struct Split {
    /// Number of parts.
    pub parts: i32,
}

impl Op for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("parts", Attribute::Int(self.parts.into()))]
    }

    fn outputs(&self) -> usize {
        self.parts.max(0) as usize
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let error = || ShapeError::input(0, x, format_args!("[..., n * {}]", self.parts));
        let part = x.shape.last().and_then(|d| d.divided(self.parts.into())).filter(|_| self.parts > 0);
        let shape = x.shape.with_last(part.ok_or_else(error)?);
        Ok(vec![Type { shape, dtype: x.dtype }; self.outputs()])
    }

    fn work(&self, _: &NodeCost<'_>) -> Work {
        Work::default()
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        inputs[0].split(self.parts, -1)
    }
}

/// Splits the last axis at these places.
#[derive(Debug)]
pub struct SplitAt {
    /// Where parts end, ascending; the last part takes the rest.
    pub at: Vec<i32>,
}

impl Op for SplitAt {
    fn name(&self) -> &'static str {
        "split_at"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("at", Attribute::Text(format!("{:?}", self.at)))]
    }

    fn outputs(&self) -> usize {
        self.at.len() + 1
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let error = || ShapeError::input(0, x, format_args!("[..., n] with n above {:?}", self.at));
        let width = x.shape.last().and_then(Dim::constant).ok_or_else(error)?;
        let ends = self.at.iter().map(|&at| i64::from(at)).chain([width]);
        let mut parts = Vec::new();
        let mut start = 0;
        for end in ends {
            if end <= start {
                return Err(error());
            }
            parts.push(Type { shape: x.shape.with_last(Dim::from(end - start)), dtype: x.dtype });
            start = end;
        }
        Ok(parts)
    }

    fn work(&self, _: &NodeCost<'_>) -> Work {
        Work::default()
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        inputs[0].split_at(&self.at, -1)
    }
}

/// Joins arrays along an axis.
#[derive(Debug)]
pub struct Concatenate {
    /// The axis.
    pub axis: i32,
}

impl Op for Concatenate {
    fn name(&self) -> &'static str {
        "concatenate"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("axis", Attribute::Int(self.axis.into()))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let Some((first, rest)) = given.split_first() else {
            return Err(ShapeError::Count { expected: 1, found: 0 });
        };
        let error = || ShapeError::input(0, first, format_args!("an array with axis {}", self.axis));
        let axis = first.shape.axis(self.axis).ok_or_else(error)?;
        let mut all = first.clone();
        for (i, t) in rest.iter().enumerate() {
            let mut expected = first.shape.clone();
            if let (Some(e), Some(found)) = (expected.0.get_mut(axis), t.shape.0.get(axis)) {
                *e = found.clone();
            }
            if t.shape != expected {
                let text = format!("{} but for axis {}", first.shape, self.axis);
                return Err(ShapeError::input(i + 1, t, text));
            }
            all.shape.0[axis] = all.shape.0[axis].clone() + t.shape.0[axis].clone();
            all.dtype = promoted(i + 1, t, all.dtype)?;
        }
        Ok(vec![all])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], 1, 0)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![ops::concatenate(inputs, self.axis)?])
    }
}

/// Adds an axis of size 1 at the end.
#[derive(Debug)]
pub struct ExpandLast;

impl Op for ExpandLast {
    fn name(&self) -> &'static str {
        "expand_last"
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let mut shape = x.shape.clone();
        shape.0.push(Dim::from(1));
        Ok(vec![Type { shape, dtype: x.dtype }])
    }

    fn work(&self, _: &NodeCost<'_>) -> Work {
        Work::default()
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].expand_dims(&[-1])?])
    }
}

/// Sum over one axis.
#[derive(Debug)]
pub struct Sum {
    /// The axis.
    pub axis: i32,
    /// Whether it stays, with size 1.
    pub keepdims: bool,
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("axis", Attribute::Int(self.axis.into()))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let error = || ShapeError::input(0, x, format_args!("an array with axis {}", self.axis));
        let axis = x.shape.axis(self.axis).ok_or_else(error)?;
        let mut shape = x.shape.clone();
        if self.keepdims {
            shape.0[axis] = Dim::from(1);
        } else {
            shape.0.remove(axis);
        }
        Ok(vec![Type { shape, dtype: x.dtype }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let summed = node.inputs().first().map_or(0, |x| node.elements(x));
        Work { flops: summed, ..node.plain(&[], 1, 0) }
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].sum(&[self.axis], self.keepdims)?])
    }
}
