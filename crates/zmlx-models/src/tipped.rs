//! Whether other logits come of caches in 16 bits, and of experts whose scores nearly tie.
//!
//! A router chooses the `k` experts of the largest scores, some after it has chosen among groups of experts. Where the score
//! that is just chosen and the one that is just not lie closer than rounding moves them, 16 bits choose another than
//! float32, and the logits of that step and of all that read its caches move far. Keys and values that are held in 16 bits
//! can bring that about by themselves. [`explain`] shows that this is what happened: it runs the exact model
//! again with rounded keys and values and with such choices turned over, and says with which of them its logits are the
//! others.

use std::collections::BTreeMap;

use serde::Serialize;
use zmlx_graph::op::Attribute;
use zmlx_graph::{GraphError, Node};
use zmlx_mlx::stream::with_stream;
use zmlx_mlx::{Array, Dtype};

use crate::Model;

/// The op that puts keys and values into a cache and gives all that are in it.
const APPEND: &str = "kv_append";
/// Most choices that are turned over one by one to find the next.
const TRIED: usize = 96;
/// Most choices that one explanation has.
const MOST: usize = 6;
/// What a choice must take from the distance to stay in the explanation.
const GAIN: f32 = 0.9;

/// What is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Experts, by their scores.
    Expert,
    /// Groups of experts, by the sum of their two largest scores.
    Group,
}

/// A choice that was turned over.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tip {
    /// Of what.
    pub kind: Kind,
    /// Path of the router's module.
    pub path: String,
    /// Place of the token.
    pub position: usize,
    /// The expert or group of the smallest score that was chosen.
    pub from: u32,
    /// That of the largest score that was not.
    pub to: u32,
    /// How far these scores lie apart, as a part of the root of the mean square of the token's scores that were compared.
    pub gap: f32,
}

/// What [`explain`] may change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Allowed {
    /// The dtype that keys and values are rounded to, if the other model's caches are in one of 16 bits.
    pub caches: Option<Dtype>,
    /// The largest [gap](Tip::gap) of a choice.
    pub gap: f32,
    /// How far logits may be off in the end, as a part of their norm.
    pub distance: f32,
}

/// What [`explain`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// Choices that were turned over, in the order in which they were found.
    pub tips: Vec<Tip>,
    /// `||exact - other|| / ||exact||` of the logits as they are.
    pub before: f32,
    /// The same with rounded keys and values, if that is allowed.
    pub rounded: Option<f32>,
    /// The same with all choices of `tips` turned over as well.
    pub after: f32,
}

/// A choice, by its node and the place of its token.
type Place = (usize, usize);

/// Choices that are to be turned over: what goes and what comes.
type Changes = BTreeMap<Place, (u32, u32)>;

/// A run of the exact model.
struct Run {
    distance: f32,
    /// All choices, the closest first.
    close: Vec<(Place, Tip)>,
}

/// With which choices of experts turned over, on rounded keys and values if that is allowed, `exact`'s logits after `tokens` are
/// `other` (`[vocabulary]`) but for [`Allowed::distance`]. Greedy: each time that choice which helps most, of the 96 closest
/// that are allowed, until the distance is reached, six were taken or none takes a tenth of what is left. Choices of
/// positions (sparse attention) are left as they are.
///
/// `exact` is a model that is not patched, so that each of its nodes is seen.
///
/// # Errors
/// [`GraphError`], as [`Model::run`]; [`GraphError::Malformed`] if `exact` is patched or `other` is not as long as the
/// vocabulary.
pub fn explain(
    exact: &Model,
    tokens: &[u32],
    other: &[f32],
    allowed: &Allowed,
) -> Result<Explanation, GraphError> {
    if exact.is_patched() {
        return Err(GraphError::Malformed(
            "the exact model is patched: unpatch it, or load it anew".to_owned(),
        ));
    }
    if other.len() != exact.vocab_size() {
        let (found, expected) = (other.len(), exact.vocab_size());
        return Err(GraphError::Malformed(format!("{found} other logits for a vocabulary of {expected}")));
    }
    let mut changes = Changes::new();
    let mut now = run(exact, tokens, other, &changes, None)?;
    let before = now.distance;
    if allowed.caches.is_some() {
        now = run(exact, tokens, other, &changes, allowed.caches)?;
    }
    let rounded = allowed.caches.map(|_| now.distance);
    let mut tips = Vec::new();
    while now.distance > allowed.distance && tips.len() < MOST {
        let close = now.close.iter().take_while(|(_, tip)| tip.gap <= allowed.gap);
        let untouched = close.filter(|(place, _)| !changes.contains_key(place));
        let mut best: Option<(Place, Tip, Run)> = None;
        for (place, tip) in untouched.take(TRIED) {
            let mut with = changes.clone();
            with.insert(*place, (tip.from, tip.to));
            let made = run(exact, tokens, other, &with, allowed.caches)?;
            if best.as_ref().is_none_or(|(.., best)| made.distance < best.distance) {
                best = Some((*place, tip.clone(), made));
            }
        }
        match best {
            Some((place, tip, made)) if made.distance < now.distance * GAIN => {
                changes.insert(place, (tip.from, tip.to));
                tips.push(tip);
                now = made;
            }
            _ => break,
        }
    }
    Ok(Explanation { tips, before, rounded, after: now.distance })
}

/// An op that chooses by the scores that are its first input.
#[derive(Clone, Copy)]
enum Chooser {
    /// It gives the experts' numbers.
    Experts,
    /// It gives the scores with those of so many of so many groups left.
    Groups { groups: usize, keep: usize },
}

impl Chooser {
    fn of(node: &Node) -> Option<Self> {
        let number = |wanted: &str| {
            let attributes = node.op.attributes();
            attributes.iter().find_map(|(name, value)| match value {
                Attribute::Int(n) if *name == wanted => usize::try_from(*n).ok(),
                _ => None,
            })
        };
        match node.op.name() {
            "top_k_indices" | "top_k_of_negated" => Some(Self::Experts),
            "mask_groups" => Some(Self::Groups { groups: number("groups")?, keep: number("keep")? }),
            _ => None,
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Experts => Kind::Expert,
            Self::Groups { .. } => Kind::Group,
        }
    }

    /// For each token what was compared, and what was chosen of it.
    fn choices(self, scores: &Array, made: &Array) -> zmlx_mlx::Result<Vec<(Vec<f32>, Vec<u32>)>> {
        let experts = scores.dim(-1)? as usize;
        let scores = floats(scores)?;
        let rows = scores.chunks(experts);
        match self {
            Self::Experts => {
                let k = made.dim(-1)? as usize;
                let chosen = made.astype(Dtype::Uint32)?.to_vec::<u32>()?;
                Ok(rows.map(<[f32]>::to_vec).zip(chosen.chunks(k).map(<[u32]>::to_vec)).collect())
            }
            Self::Groups { groups, keep } => {
                let best = |group: &[f32]| {
                    let mut group = group.to_vec();
                    group.sort_by(|a, b| b.total_cmp(a));
                    group.iter().take(2).sum()
                };
                let ranked = |row: &[f32]| {
                    let sums: Vec<f32> = row.chunks(experts / groups).map(best).collect();
                    let mut order: Vec<u32> = (0..groups as u32).collect();
                    order.sort_by(|a, b| sums[*b as usize].total_cmp(&sums[*a as usize]));
                    order.truncate(keep);
                    (sums, order)
                };
                Ok(rows.map(ranked).collect())
            }
        }
    }

    /// What the op gave, with some choices turned over.
    fn turned(
        self,
        scores: &Array,
        made: &Array,
        changes: &[(usize, (u32, u32))],
    ) -> zmlx_mlx::Result<Array> {
        let all = match self {
            Self::Experts => {
                let k = made.dim(-1)? as usize;
                let mut all = made.astype(Dtype::Uint32)?.to_vec::<u32>()?;
                for (position, (from, to)) in changes {
                    let row = &mut all[position * k..(position + 1) * k];
                    // With choices before it turned over it may be another already.
                    if let Some(place) = row.iter().position(|e| e == from).filter(|_| !row.contains(to)) {
                        row[place] = *to;
                    }
                }
                Array::from_slice(&all, made.shape())?
            }
            Self::Groups { groups, .. } => {
                let (mut all, scores) = (floats(made)?, floats(scores)?);
                let experts = made.dim(-1)? as usize;
                for (position, (from, to)) in changes {
                    let group = |group: &u32| {
                        let first = position * experts + *group as usize * (experts / groups);
                        first..first + experts / groups
                    };
                    all[group(from)].fill(0.0);
                    all[group(to)].copy_from_slice(&scores[group(to)]);
                }
                Array::from_slice(&all, made.shape())?
            }
        };
        all.astype(made.dtype())
    }
}

/// The exact model with some choices turned over and keys and values rounded to `caches`, from nothing.
fn run(
    exact: &Model,
    tokens: &[u32],
    other: &[f32],
    changes: &Changes,
    caches: Option<Dtype>,
) -> Result<Run, GraphError> {
    let executor = exact.executor();
    let nodes = &executor.graph().nodes;
    let choosers: Vec<Option<Chooser>> = nodes.iter().map(Chooser::of).collect();
    let scores_of = |node: usize| nodes[node].inputs.first().map(|value| value.place());
    let kept: Vec<(usize, usize)> =
        (0..nodes.len()).filter(|&node| choosers[node].is_some()).filter_map(scores_of).collect();
    let mut scores: BTreeMap<(usize, usize), Array> = BTreeMap::new();
    let mut given: BTreeMap<usize, Array> = BTreeMap::new();
    let failed = |source| GraphError::Node { path: "logits".to_owned(), op: "compare", source };
    let logits = with_stream(exact.stream(), || -> Result<Vec<f32>, GraphError> {
        let ids = Array::from_slice(tokens, &[1, tokens.len() as i32]).map_err(failed)?;
        let logits = executor.run_changed(&ids, &mut executor.new_state(), &mut |node, outputs| {
            if let (Some(chooser), Some(from)) = (choosers[node], scores_of(node)) {
                given.insert(node, outputs[0].clone());
                let turned = changes.range((node, 0)..=(node, usize::MAX));
                let turned: Vec<_> = turned.map(|((_, position), change)| (*position, *change)).collect();
                if let Some(scores) = scores.get(&from).filter(|_| !turned.is_empty()) {
                    outputs[0] = chooser.turned(scores, &outputs[0], &turned)?;
                }
            }
            if let Some(dtype) = caches.filter(|_| nodes[node].op.name() == APPEND) {
                for array in outputs.iter_mut() {
                    *array = array.astype(dtype)?.astype(array.dtype())?;
                }
            }
            for (output, array) in outputs.iter().enumerate() {
                if kept.contains(&(node, output)) {
                    scores.insert((node, output), array.clone());
                }
            }
            Ok(())
        })?;
        floats(&logits).map_err(failed)
    })?;
    // Those of the last token.
    let logits = &logits[logits.len() - other.len()..];
    let norm = |row: &mut dyn Iterator<Item = f32>| row.map(|v| v * v).sum::<f32>().sqrt();
    let distance =
        norm(&mut logits.iter().zip(other).map(|(a, b)| a - b)) / norm(&mut logits.iter().copied());
    let mut close = Vec::new();
    for (node, made) in &given {
        let Some((chooser, scores)) = choosers[*node].zip(scores_of(*node).and_then(|at| scores.get(&at)))
        else {
            continue;
        };
        let choices = chooser.choices(scores, made).map_err(failed)?;
        let path = &nodes[*node].path;
        close.extend(choices.iter().enumerate().filter_map(|(position, (scores, chosen))| {
            let (from, to, gap) = closest(scores, chosen)?;
            let tip = Tip { kind: chooser.kind(), path: path.clone(), position, from, to, gap };
            Some(((*node, position), tip))
        }));
    }
    close.sort_by(|(_, a), (_, b)| a.gap.total_cmp(&b.gap));
    Ok(Run { distance, close })
}

fn floats(array: &Array) -> zmlx_mlx::Result<Vec<f32>> {
    array.astype(Dtype::Float32)?.to_vec::<f32>()
}

/// The last that was chosen, the first that was not, and the gap between them; `None` where all were chosen.
fn closest(scores: &[f32], chosen: &[u32]) -> Option<(u32, u32, f32)> {
    let score = |e: &u32| scores[*e as usize];
    let from = chosen.iter().min_by(|a, b| score(a).total_cmp(&score(b)))?;
    let others = (0..scores.len() as u32).filter(|e| !chosen.contains(e));
    let to = others.max_by(|a, b| score(a).total_cmp(&score(b)))?;
    let finite = || scores.iter().filter(|s| s.is_finite());
    let mean = finite().map(|s| s * s).sum::<f32>() / finite().count().max(1) as f32;
    Some((*from, to, (score(from) - score(&to)) / mean.sqrt().max(f32::MIN_POSITIVE)))
}
