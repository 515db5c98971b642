//! Tensors of a graph that are computed from those of a checkpoint.

use std::fmt;
use std::sync::Arc;

use zmlx_mlx::{Array, ops};

use crate::tensors::{Tensor, assemble};

type Make = dyn Fn(&[Array]) -> zmlx_mlx::Result<Array> + Send + Sync;

/// How a tensor is made of its sources, where that takes more than stacking them or cutting a part.
#[derive(Clone)]
pub struct Recipe {
    name: &'static str,
    readers: usize,
    make: Arc<Make>,
}

impl Recipe {
    /// `make` gets the arrays of a tensor's sources in their order; as many tensors as `readers` are made of them.
    pub(crate) fn new(
        name: &'static str,
        readers: usize,
        make: impl Fn(&[Array]) -> zmlx_mlx::Result<Array> + Send + Sync + 'static,
    ) -> Self {
        Self { name, readers, make: Arc::new(make) }
    }

    /// How many tensors are made of the same sources.
    pub(crate) fn readers(&self) -> usize {
        self.readers
    }

    /// Makes the tensor.
    pub(crate) fn make(&self, sources: &[Array]) -> zmlx_mlx::Result<Array> {
        (self.make)(sources)
    }

    /// Makes each of `parts`, and stacks them on a new first axis.
    pub(crate) fn stacked(parts: Vec<Tensor>) -> Self {
        let readers = parts.iter().map(Tensor::readers).max().unwrap_or(1);
        Self::new("stacked", readers, move |mut sources| {
            let mut made = Vec::with_capacity(parts.len());
            for part in &parts {
                let (own, rest) = sources.split_at(part.sources.len().min(sources.len()));
                made.push(assemble(part, own)?);
                sources = rest;
            }
            ops::stack(&made.iter().collect::<Vec<_>>(), 0)
        })
    }
}

impl fmt::Debug for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recipe({})", self.name)
    }
}
