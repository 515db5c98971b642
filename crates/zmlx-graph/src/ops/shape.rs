use zmlx_mlx::{Array, Result};

use crate::op::{Attribute, Context, Op};

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

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        inputs[0].split(self.parts, -1)
    }
}

/// Adds an axis of size 1 at the end.
#[derive(Debug)]
pub struct ExpandLast;

impl Op for ExpandLast {
    fn name(&self) -> &'static str {
        "expand_last"
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

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].sum(&[self.axis], self.keepdims)?])
    }
}
