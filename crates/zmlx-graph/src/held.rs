//! Weights that executors of one model share.

use std::collections::HashMap;
use std::sync::Arc;

use zmlx_engine::matrix::Matrix;
use zmlx_mlx::{Array, Dtype};

use crate::error::Result;
use crate::exec::Executor;
use crate::graph::Graph;
use crate::native::Cut;
use crate::weights::{BoundWeight, TensorSpec, Weight, WeightId};

/// Weights as executors hold them, by reference: matrices arranged for the engine, and arrays of MLX. An executor that is
/// made with them loads only what they lack.
///
/// They are of use to graphs that declare the same weights, as a graph and its rewritten forms do; for others they count as
/// none.
#[derive(Debug, Clone, Default)]
pub struct Held {
    /// As the graph declares them.
    pub(crate) declared: Vec<Weight>,
    pub(crate) matrices: HashMap<WeightId, Matrix>,
    pub(crate) vectors: HashMap<WeightId, Vec<f32>>,
    pub(crate) bound: HashMap<WeightId, BoundWeight>,
}

impl Held {
    /// None.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds those of `other` that it lacks; those of another model take the place of what was there.
    pub fn join(&mut self, other: Self) {
        if self.declared != other.declared {
            *self = other;
            return;
        }
        for (id, matrix) in other.matrices {
            self.matrices.entry(id).or_insert(matrix);
        }
        for (id, vector) in other.vectors {
            self.vectors.entry(id).or_insert(vector);
        }
        for (id, bound) in other.bound {
            self.bound.entry(id).or_insert(bound);
        }
    }

    /// For each weight of the graph, by number, whether it has the arrays that MLX runs it with.
    pub fn on_mlx(&self, graph: &Graph) -> Vec<bool> {
        let bound = self.of(graph).map(|held| &held.bound);
        (0..graph.weights.len())
            .map(|index| bound.is_some_and(|b| b.contains_key(&WeightId(index))))
            .collect()
    }

    /// Those that are of use to the graph.
    pub(crate) fn of(&self, graph: &Graph) -> Option<&Self> {
        (self.declared == graph.weights).then_some(self)
    }

    /// As [`Executor::new`].
    ///
    /// # Errors
    /// As [`Executor::new`].
    pub fn stock(
        &self,
        graph: Arc<Graph>,
        mut tensor: impl FnMut(&TensorSpec) -> Option<Array>,
    ) -> Result<Executor> {
        Executor::on_mlx(graph, self, &mut tensor)
    }

    /// As [`Executor::new`], but products of many rows take the ways that prompts take on an NVIDIA GPU, where calls of one
    /// token run past MLX. Of a stock graph it shows, op by op, what such an executor does with a prompt, except
    /// where a fused op has kernels of its own for many tokens.
    ///
    /// # Errors
    /// As [`Executor::new`].
    pub fn prompts(
        &self,
        graph: Arc<Graph>,
        mut tensor: impl FnMut(&TensorSpec) -> Option<Array>,
    ) -> Result<Executor> {
        Executor::on_mlx_unpacking(graph, self, &mut tensor)
    }

    /// As [`Executor::new`], but calls of one token run past MLX on an NVIDIA GPU, if all nodes are fused and have kernels
    /// there; if not, the executor runs them on MLX too, and the text says why.
    ///
    /// # Errors
    /// As [`Executor::new`].
    pub fn cuda(
        &self,
        graph: Arc<Graph>,
        mut tensor: impl FnMut(&TensorSpec) -> Option<Array>,
    ) -> Result<(Executor, Option<String>)> {
        Executor::on_cuda(graph, self, &mut tensor)
    }

    /// As [`Executor::native`].
    ///
    /// # Errors
    /// As [`Executor::native`].
    pub fn native(
        &self,
        graph: Arc<Graph>,
        threads: usize,
        mut stored: impl FnMut(&TensorSpec, &mut Vec<u8>) -> Option<Dtype>,
        mut converted: impl FnMut(&TensorSpec) -> Option<Array>,
    ) -> Result<Executor> {
        Executor::on_engine(graph, threads, Cut::Regions, self, &mut stored, &mut converted)
    }

    /// As [`Executor::separate`].
    ///
    /// # Errors
    /// As [`Executor::separate`].
    pub fn separate(
        &self,
        graph: Arc<Graph>,
        threads: usize,
        mut stored: impl FnMut(&TensorSpec, &mut Vec<u8>) -> Option<Dtype>,
        mut converted: impl FnMut(&TensorSpec) -> Option<Array>,
    ) -> Result<Executor> {
        Executor::on_engine(graph, threads, Cut::Nodes, self, &mut stored, &mut converted)
    }
}
