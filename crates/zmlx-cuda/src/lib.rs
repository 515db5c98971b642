//! Decoding on NVIDIA GPUs: the engine's stages as hand-written kernels.

pub mod kernels;
