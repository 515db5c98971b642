//! Attention over latents: queries are split and turned, and latents and rotary keys finished and appended, by the kernel
//! that attends; the products of heads after it put its parts together.

use zmlx_engine::program::{Buffer, Stage};
use zmlx_engine::stages;

use super::heads::float;
use super::{Translator, is_passed_over, made, stage_as};
use crate::error::{CudaError, Result};
use crate::kernels::{
    Angles, HeadProducts, HeadProductsOperands, HeadRows, LatentAttend, LatentOperands, Norm, Qmv,
    QmvOperands,
};
use crate::plan::SlotAddress;

/// Stages that have no launch of their own, until a kernel does what they do.
#[derive(Debug, Default)]
pub(super) struct Latent<'a> {
    /// Queries whose parts are told apart where they are read.
    split: Option<Held<&'a stages::SplitRope>>,
    /// Rows that attention appends to its cache.
    append: Option<Held<&'a stages::LatentAppend>>,
    /// What attention left in parts.
    mixed: Option<Mixed>,
}

/// A stage, its number, and where what it reads is: its buffer may be another's before attention reads it.
#[derive(Debug, Clone, Copy)]
struct Held<S> {
    stage: S,
    at: usize,
    rows: u64,
}

#[derive(Debug)]
struct Mixed {
    buffer: Buffer,
    attention: LatentAttend,
    parts: [u64; 2],
}

/// Products that read the same rows, what becomes of them, and where those stages are.
struct Group<'a> {
    queries: &'a stages::Linear,
    /// Where queries are compressed first: what makes them of that.
    decompressed: Option<(usize, &'a stages::Linear)>,
    split: (usize, &'a stages::SplitRope),
    latents: &'a stages::Linear,
    append: (usize, &'a stages::LatentAppend),
}

const NAME: &str = "latent attention";

fn refused<T>(reason: &str) -> Result<T> {
    Err(CudaError::Untranslated { stage: NAME, reason: reason.to_owned() })
}

fn angles(rope: &stages::Rope) -> Angles {
    Angles { half: rope.half(), traditional: rope.is_traditional(), magnitude: rope.magnitude() }
}

/// Whether rows of a product go through nothing after it.
fn is_plain(linear: &stages::Linear) -> bool {
    linear.gate.is_none() && linear.residual.is_none()
}

fn same_norm(a: Option<&stages::Norm>, b: Option<&stages::Norm>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => a.eps == b.eps && a.weight == b.weight,
        _ => false,
    }
}

/// Whether what attention takes over lasts through a stage: products write through [`Translator::written`].
fn is_known(stage: &dyn Stage) -> bool {
    is_passed_over(stage)
        || stage_as::<stages::Linear>(stage).is_some()
        || stage_as::<stages::HeadProducts>(stage).is_some()
        || stage_as::<stages::LatentAppend>(stage).is_some()
}

impl<'a> Translator<'a> {
    /// This stage and those after it that a token does not pass over.
    fn following(&self) -> impl Iterator<Item = (usize, &'a dyn Stage)> + use<'a> {
        let (stages, at) = (self.request.program.stages(), self.at);
        (at..stages.len()).map(|at| (at, &*stages[at])).filter(|(_, stage)| !is_passed_over(*stage))
    }

    /// The products of queries and latents that begin here.
    fn group(&self) -> Option<Group<'a>> {
        let mut following = self.following();
        let queries: &stages::Linear = stage_as(following.next()?.1)?;
        let mut next = following.next()?;
        let decompressed = stage_as::<stages::Linear>(next.1).map(|linear| (next.0, linear));
        if let Some((_, linear)) = decompressed {
            if linear.source.buffer != queries.out || !is_plain(linear) {
                return None;
            }
            next = following.next()?;
        }
        let split = (next.0, stage_as::<stages::SplitRope>(next.1)?);
        let latents: &stages::Linear = stage_as(following.next()?.1)?;
        let (at, append) = following.next()?;
        let append = (at, stage_as::<stages::LatentAppend>(append)?);
        let connected = split.1.queries == decompressed.map_or(queries, |(_, linear)| linear).out
            && append.1.compressed == latents.out;
        let alike = is_plain(queries)
            && is_plain(latents)
            && queries.source.buffer == latents.source.buffer
            && same_norm(queries.source.norm.as_ref(), latents.source.norm.as_ref())
            && self.matrix(&queries.matrix).ok()?.0 == self.matrix(&latents.matrix).ok()?.0;
        // Latents are written earlier than the program says: nothing may still need what was there.
        let mut others = vec![queries.source.buffer, queries.out, split.1.out, split.1.turned];
        others.extend(decompressed.map(|(_, linear)| linear.out));
        (connected && alike && !others.contains(&latents.out)).then_some(Group {
            queries,
            decompressed,
            split,
            latents,
            append,
        })
    }

    /// If products of queries and of latents begin here that read the same rows: one launch for both, and what follows up to
    /// the latents. Of one sequence: rows of several would lie apart, each with the other product's behind it.
    pub(super) fn latent_group(&mut self) -> Result<bool> {
        let Some(group) = self.group().filter(|_| self.sequences() == 1) else { return Ok(false) };
        let Group { queries, latents, .. } = group;
        let rows = [queries.matrix.rows(), latents.matrix.rows()];
        let (format, weights) = self.matrix(&queries.matrix)?;
        let second = Some(self.matrix(&latents.matrix)?.1);
        let (norm, norm_weight) = self.norm(queries.source.norm.as_ref())?;
        let out = self.neighbours([queries.out, latents.out], rows)?;
        let bias = self.joined_bias([(&queries.bias, rows[0]), (&latents.bias, rows[1]), (&None, 0)])?;
        let x = self.buffer(queries.source.buffer)?;
        let operands = QmvOperands {
            x,
            norm: norm_weight,
            weights,
            second,
            bias: [bias, None],
            out,
            ..Default::default()
        };
        let kernel = Qmv {
            stacked: [rows[1], 0],
            norm,
            bias: [bias.is_some(), false],
            ..Qmv::new(rows[0] + rows[1], queries.matrix.columns(), format, 1)
        };
        self.push("queries + latents", self.product(kernel, |k| (k.source(), k.launch(&operands)))?);
        if let Some((at, linear)) = group.decompressed {
            self.at = at;
            self.linear(linear)?;
        }
        self.at = group.split.0;
        self.split_rope(group.split.1)?;
        self.at = group.append.0;
        self.latent_append(group.append.1)?;
        Ok(true)
    }

    /// Room for a row each of two buffers, the second behind the first; theirs if they have it.
    fn neighbours(&mut self, buffers: [Buffer; 2], widths: [usize; 2]) -> Result<u64> {
        let behind = (widths[0] * size_of::<f32>()) as u64;
        let known = buffers.map(|b| self.buffers.get(&b).copied());
        if let [Some(first), Some(second)] = known
            && second == first + behind
        {
            return Ok(first);
        }
        let first = self.memory.room((widths[0] + widths[1]) * size_of::<f32>())?;
        self.buffers.insert(buffers[0], first);
        self.buffers.insert(buffers[1], first + behind);
        Ok(first)
    }

    pub(super) fn split_rope(&mut self, stage: &'a stages::SplitRope) -> Result<()> {
        self.latent.split = Some(Held { stage, at: self.at, rows: self.buffer(stage.queries)? });
        Ok(())
    }

    pub(super) fn latent_append(&mut self, stage: &'a stages::LatentAppend) -> Result<()> {
        self.latent.append = Some(Held { stage, at: self.at, rows: self.buffer(stage.compressed)? });
        Ok(())
    }

    /// Where a product writes: elsewhere if attention still needs what is in its buffer.
    pub(super) fn written(&mut self, buffer: Buffer) -> Result<u64> {
        let held = self.latent.split.is_some_and(|held| held.stage.queries == buffer)
            || self.latent.append.is_some_and(|held| held.stage.compressed == buffer);
        if held {
            self.buffers.remove(&buffer);
        }
        self.buffer(buffer)
    }

    /// What attention takes over.
    fn taken_over(
        &mut self,
        stage: &stages::LatentAttend,
    ) -> Result<(Held<&'a stages::SplitRope>, Held<&'a stages::LatentAppend>)> {
        let (Some(split), Some(append)) = (self.latent.split.take(), self.latent.append.take()) else {
            return refused("no split of queries and no latents come before it");
        };
        let between = &self.request.program.stages()[split.at.min(append.at) + 1..self.at];
        if !between.iter().all(|s| is_known(&**s) || stage_as::<stages::SplitRope>(&**s).is_some()) {
            return refused("there are other stages between the split of queries and it");
        }
        let held = (split, append);
        let (split, append) = (split.stage, append.stage);
        if split.turned != stage.turned || split.heads != stage.heads || append.slot != stage.slot {
            return refused("the split of queries, or the latents, before it are another attention's");
        }
        let reads = |stage: &dyn Stage| {
            let linear = stage_as::<stages::Linear>(stage);
            linear.is_some_and(|l| [split.out, split.turned].contains(&l.source.buffer))
        };
        if between.iter().any(|s| reads(&**s)) {
            return refused("something else reads its queries");
        }
        if angles(&split.rope) != angles(&append.rope) {
            return refused("queries are turned in another way than keys");
        }
        Ok(held)
    }

    pub(super) fn latent_attend(&mut self, stage: &stages::LatentAttend) -> Result<()> {
        let (Held { stage: split, rows: queries, .. }, Held { stage: append, rows: compressed, .. }) =
            self.taken_over(stage)?;
        let reader: Option<&stages::HeadProducts> = self.next_stage();
        if reader.is_none_or(|reader| reader.source.buffer != stage.out) {
            return refused("no products of heads read what it leaves");
        }
        let SlotAddress::Kv { heads: 1, key_width: latent, value_width: rope, .. } = self.slot(stage.slot)?
        else {
            return refused("its cache has more than one head");
        };
        let (cache, kind) = self.cache(stage.slot)?;
        let norm = self.optional_constant(append.norm.weight.as_ref())?;
        let width = split.nope + split.rope_width;
        let kernel = LatentAttend {
            angles: angles(&split.rope),
            norm: Norm { eps: append.norm.eps, weight: norm.is_some() },
            cache: float(kind),
            scale: stage.scale,
            turned_strides: [stage.heads * width, width],
            ..LatentAttend::new(stage.heads, [latent, rope], [self.sequences(), 1])
        };
        let parts = self.shared_room([kernel.parts(), kernel.stats()])?;
        let operands = LatentOperands {
            queries: self.buffer(stage.queries)?,
            turned: queries + (split.nope * size_of::<f32>()) as u64,
            compressed,
            norm,
            angles: [self.angles(&split.rope)?, self.angles(&append.rope)?],
            cache,
            parts: parts[0],
            stats: parts[1],
        };
        self.push("rope + append + latent attention", made(kernel.source(), kernel.launch(&operands))?);
        self.latent.mixed = Some(Mixed { buffer: stage.out, attention: kernel, parts });
        Ok(())
    }

    pub(super) fn head_products(&mut self, stage: &stages::HeadProducts) -> Result<()> {
        let buffer = stage.source.buffer;
        let (heads, shape) = (stage.matrix.experts(), [stage.matrix.rows(), stage.matrix.columns()]);
        if stage.source.norm.is_some() || stage.source.per_token != heads {
            return refused("products of heads with a norm, or of another number of heads");
        }
        let (format, weights) = self.matrix(&stage.matrix)?;
        let mut kernel = HeadProducts::new(heads, shape, format, self.sequences());
        let mixed = self.latent.mixed.take().filter(|mixed| mixed.buffer == buffer);
        let split = self.latent.split.filter(|split| split.stage.out == buffer);
        let (x, stats) = match (mixed, split) {
            (Some(Mixed { attention, parts, .. }), _) => {
                kernel = kernel.of_parts(&attention);
                (parts[0], Some(parts[1]))
            }
            (None, Some(Held { stage: split, rows, .. })) => {
                let width = split.nope + split.rope_width;
                kernel.x = HeadRows::Rows([heads * width, width]);
                (rows, None)
            }
            (None, None) => (self.buffer(buffer)?, None),
        };
        let operands = HeadProductsOperands { x, stats, weights, out: self.written(stage.out)? };
        self.push("products of heads", self.product(kernel, |k| (k.source(), k.launch(&operands)))?);
        Ok(())
    }
}
