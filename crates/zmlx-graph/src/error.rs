use crate::graph::Value;
use crate::infer::ShapeError;

/// Result of building or running a graph.
pub type Result<T> = std::result::Result<T, GraphError>;

/// What can go wrong with a graph.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphError {
    /// A weight that the graph names was not bound.
    #[error("weight {0} is missing")]
    MissingWeight(String),
    /// An op failed.
    #[error("{path}: {op}: {source}")]
    Node {
        /// Path of the module.
        path: String,
        /// Name of the op.
        op: &'static str,
        /// What MLX said.
        source: zmlx_mlx::Error,
    },
    /// An op cannot take what it is given.
    #[error("{value} at {path}: {op}: {source}")]
    Shape {
        /// The node's first output.
        value: Value,
        /// Path of the module.
        path: String,
        /// Name of the op.
        op: &'static str,
        /// What does not fit.
        source: Box<ShapeError>,
    },
    /// A node reads a value that no earlier node writes, or a graph has no output.
    #[error("malformed graph: {0}")]
    Malformed(String),
    /// A fused node could not be lowered.
    #[error(transparent)]
    Lowering(#[from] crate::native::LoweringError),
    /// A decode step past MLX failed.
    #[error("CUDA: {0}")]
    Cuda(String),
    /// The state was made for another graph, or for another form of it.
    #[error(
        "the state is of another graph, or was made before the model was patched or unpatched: make it anew \
         (Model::new_state, Executor::new_state)"
    )]
    WrongState,
    /// A call without sequences or without tokens.
    #[error("a call of {batch} sequences of {length} tokens: both must be 1 or more")]
    Empty {
        /// Sequences.
        batch: i32,
        /// Tokens of each.
        length: i32,
    },
    /// A call for more or fewer sequences than the state has seen.
    #[error(
        "a call of {found} sequences with a state of {expected}: go on with as many, or make a new state \
         (Model::new_state, Executor::new_state)"
    )]
    WrongBatch {
        /// Sequences of the state.
        expected: i32,
        /// Sequences of the call.
        found: i32,
    },
}
