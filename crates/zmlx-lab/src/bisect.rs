//! Which fused op leaves its class: each held against its reference on stock's values.

use std::fmt;

use serde::Serialize;
use zmlx_graph::bisect::{OpError, bisect as held_against};
use zmlx_mlx::Array;
use zmlx_mlx::stream::with_stream;
use zmlx_models::{Model, PatchOptions};

use crate::arms::Arm;
use crate::bench::MOST_TOKENS;
use crate::error::LabError;
use crate::measure::{PREFILL_CHUNK, Progress, Steps, check_context, generate, in_range};
use crate::prompts::{Prompt, built_in, tokenise};

/// What `bisect` does.
#[derive(Debug, Clone, PartialEq)]
pub struct BisectOptions {
    /// The prompts, 1 or more.
    pub prompts: Vec<Prompt>,
    /// Tokens that follow each, one call each, 2 or more.
    pub max_tokens: usize,
    /// What is patched.
    pub patch: PatchOptions,
}

impl Default for BisectOptions {
    fn default() -> Self {
        Self { prompts: built_in(), max_tokens: 32, patch: PatchOptions::default() }
    }
}

/// The largest error of a fused op, and the prompt it was found with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OpRecord {
    /// The prompt.
    pub prompt: String,
    /// The error; its `call` counts chunks of the prompt, then tokens.
    #[serde(flatten)]
    pub worst: OpError,
}

/// What `bisect` found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bisection {
    /// Each fused op, in order of execution.
    pub ops: Vec<OpRecord>,
    /// Tokens that went through.
    pub tokens: usize,
    /// Notes on the prompts.
    pub notes: Vec<String>,
}

impl Bisection {
    /// The first op that leaves its class; none if all keep it.
    pub fn first(&self) -> Option<&OpRecord> {
        self.ops.iter().find(|op| !op.worst.is_within())
    }
}

/// Runs the prompts and the continuations that the model itself gives through stock and patched graph, node by node. Each
/// fused op is given stock's values, so its error is its own. (What an op keeps in its state is its own too.)
///
/// # Errors
/// Options out of range, prompts that do not fit, failures of the model. An op that leaves its class is none.
pub fn bisect(
    model: &Model,
    options: &BisectOptions,
    tell: &mut dyn FnMut(Progress),
) -> Result<Bisection, LabError> {
    in_range("max tokens", options.max_tokens, 2, MOST_TOKENS)?;
    let mut found = Bisection { ops: Vec::new(), tokens: 0, notes: Vec::new() };
    let prompts = tokenise(model, &options.prompts, &mut found.notes)?;
    check_context(model, &prompts, options.max_tokens)?;
    let (reference, engine) = model.both_ways(&options.patch).map_err(|e| LabError::Patch(e.to_string()))?;
    let mut steps = Steps { done: 0, total: prompts.len(), tell };
    for prompt in &prompts {
        steps.next(format!("op by op, {}", prompt.record.name));
        let arm = if model.is_patched() { Arm::Patched } else { Arm::Stock };
        let said = generate(model, arm, &prompt.record.name, &prompt.ids, options.max_tokens)?.tokens;
        let chunks = prompt.ids.chunks(PREFILL_CHUNK).chain(said.chunks(1));
        let calls = chunks.map(|ids| Array::from_slice(ids, &[1, ids.len() as i32]));
        let calls = calls.collect::<zmlx_mlx::Result<Vec<Array>>>()?;
        let errors = with_stream(model.stream(), || held_against(&reference, &engine, &calls))?;
        found.tokens += prompt.ids.len() + said.len();
        found.merge(&prompt.record.name, errors);
    }
    Ok(found)
}

impl Bisection {
    fn merge(&mut self, prompt: &str, errors: Vec<OpError>) {
        let first = self.ops.is_empty();
        for (index, worst) in errors.into_iter().enumerate() {
            let record = OpRecord { prompt: prompt.to_owned(), worst };
            match self.ops.get_mut(index) {
                Some(old) if record.worst.error > old.worst.error => *old = record,
                None if first => self.ops.push(record),
                _ => {}
            }
        }
    }
}

/// The worst op of each pattern, and the verdict.
impl fmt::Display for Bisection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut patterns: Vec<&str> = Vec::new();
        for op in &self.ops {
            if !patterns.contains(&op.worst.pattern.as_str()) {
                patterns.push(&op.worst.pattern);
            }
        }
        writeln!(
            f,
            "{:<18} {:<16} {:>4} {:>10} {:>10}  worst at",
            "pattern", "class", "ops", "error", "bound"
        )?;
        for pattern in patterns {
            let ops = || self.ops.iter().filter(|op| op.worst.pattern == pattern);
            let Some(worst) = ops().max_by(|a, b| a.worst.error.total_cmp(&b.worst.error)) else { continue };
            let e = &worst.worst;
            writeln!(
                f,
                "{pattern:<18} {:<16} {:>4} {:>10.2e} {:>10.2e}  {}, prompt {}, call {}",
                e.class,
                ops().count(),
                e.error,
                e.bound,
                e.path,
                worst.prompt,
                e.call
            )?;
        }
        let (ops, tokens) = (self.ops.len(), self.tokens);
        match self.first() {
            _ if ops == 0 => write!(f, "nothing was patched, so there is nothing to look at"),
            None => write!(f, "all {ops} fused ops keep their class over {tokens} tokens"),
            Some(first) => write!(f, "the first op that leaves its class: {first}"),
        }
    }
}

impl fmt::Display for OpRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &self.worst;
        write!(
            f,
            "{} at {} (node %{}, output {}): error {:.2e}, {} allows {:.2e}; prompt {}, call {}",
            e.pattern, e.path, e.node, e.output, e.error, e.class, e.bound, self.prompt, e.call
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zmlx_graph::Fidelity;

    fn error(node: usize, pattern: &str, error: f64) -> OpError {
        let (path, class) = (format!("layers.{node}"), Fidelity::TokenIdentical);
        OpError { node, path, pattern: pattern.into(), class, output: 0, call: 3, error, bound: 1e-3 }
    }

    #[test]
    fn the_worst_of_all_prompts_counts_and_the_first_op_is_named() {
        let mut found = Bisection { ops: Vec::new(), tokens: 9, notes: Vec::new() };
        assert!(found.to_string().contains("nothing was patched"));
        found.merge("short", vec![error(1, "router", 1e-5), error(2, "moe_mlp", 1e-6)]);
        assert!(found.first().is_none() && found.to_string().contains("all 2 fused ops keep"));
        found.merge("long", vec![error(1, "router", 1e-6), error(2, "moe_mlp", 0.5)]);
        found.merge("code", vec![error(1, "router", f64::INFINITY), error(2, "moe_mlp", 0.1)]);
        let first = found.first().unwrap();
        assert_eq!((first.prompt.as_str(), first.worst.node), ("code", 1));
        assert_eq!(found.ops[1].prompt, "long");
        let text = found.to_string();
        assert!(text.contains("router at layers.1 (node %1, output 0): error inf"), "{text}");
    }
}
