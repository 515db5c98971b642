//! Checking plans and proposing them.

use super::{Dialect, Layout, Plan};
use crate::error::{LangError, Result};
use crate::graph::Node;
use crate::kernel::Role;
use crate::program::Program;

/// The part of a [`Plan`] that is free to choose, which a tuner searches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Params {
    /// See [`Plan::threads`].
    pub threads: u32,
    /// See [`Plan::vec`].
    pub vec: u32,
    /// See [`Plan::rows_per_group`].
    pub rows_per_group: u32,
    /// See [`Plan::items`].
    pub items: u32,
}

impl Layout {
    /// The best layout for an input of `shape` in a domain that it broadcasts to.
    pub fn of(role: Role, shape: &[usize], domain: &[usize]) -> Self {
        let count: usize = shape.iter().product();
        let (cols, outer) = domain.split_last().map_or((1, &[][..]), |(last, outer)| (*last, outer));
        let rows: usize = outer.iter().product();
        let last = shape.last().copied().unwrap_or(1);
        match role {
            Role::Indexed(_) => Self::Indexed,
            _ if count == 1 => Self::Scalar,
            _ if count == rows * cols => Self::Full,
            // An axis of length 1 aside, an array of as many elements as the row has is the row.
            _ if count == cols && last == cols => Self::Col,
            _ if count == rows && last == 1 => Self::Row,
            _ => Self::Strided,
        }
    }
}

impl Plan {
    /// A plan of what the shapes decide and what is free to choose.
    pub fn new(layouts: Vec<Layout>, ndim: usize, index64: bool, params: Params) -> Self {
        let Params { threads, vec, rows_per_group, items } = params;
        Self { layouts, ndim, index64, threads, vec, rows_per_group, items }
    }

    /// What is free to choose.
    pub fn params(&self) -> Params {
        let &Self { threads, vec, rows_per_group, items, .. } = self;
        Params { threads, vec, rows_per_group, items }
    }

    /// Threads that work on one row.
    pub fn team(&self) -> u32 {
        self.threads / self.rows_per_group
    }

    /// The longest row that a row kernel of this plan takes; `None`: any.
    pub fn row_capacity(&self) -> Option<u32> {
        (self.items > 0).then(|| self.team() * self.items * self.vec)
    }

    /// Elements a thread holds at a time.
    pub(super) fn held(&self) -> u32 {
        self.items.max(1) * self.vec
    }

    pub(super) fn check(&self, program: &Program) -> Result<()> {
        let bad = |what: String| Err(LangError::Kernel { kernel: program.name.clone(), what });
        if self.layouts.len() != program.inputs.len() {
            let (plan, inputs) = (self.layouts.len(), program.inputs.len());
            return bad(format!("the plan has layouts for {plan} inputs, the kernel has {inputs}"));
        }
        for (input, layout) in program.inputs.iter().zip(&self.layouts) {
            if matches!(input.role, Role::Indexed(_)) != (*layout == Layout::Indexed) {
                return bad(format!(
                    "the plan reads input {} as {layout:?}, its role is {:?}",
                    input.name, input.role
                ));
            }
        }
        if self.ndim == 0 && self.layouts.contains(&Layout::Strided) {
            return bad("the plan has strides for a domain without axes".to_owned());
        }
        if !self.threads.is_power_of_two() || !(32..=1024).contains(&self.threads) {
            return bad(format!("{} threads a group are not a power of two from 32 to 1024", self.threads));
        }
        if !matches!(self.vec, 1 | 2 | 4 | 8) {
            return bad(format!("a vector width of {} is not 1, 2, 4 or 8", self.vec));
        }
        if self.items > 64 || self.items * self.vec > 64 {
            return bad(format!(
                "{} times {} elements are more than a thread can hold",
                self.items, self.vec
            ));
        }
        let most = if program.has_rows { self.threads } else { 1 };
        if !self.rows_per_group.is_power_of_two() || self.rows_per_group > most {
            let rows = self.rows_per_group;
            return bad(format!("{rows} rows a group are not a power of two from 1 to {most}"));
        }
        Ok(())
    }
}

/// Parameters worth trying for a domain of `rows` rows of `cols` elements, the default first. Vector widths go by the
/// widest dtype, 16 bytes an access; groups have 64 to 1024 threads; rows of up to 16,384 elements are also held in
/// registers.
pub fn candidates(program: &Program, dialect: Dialect, rows: u64, cols: u64) -> Vec<Params> {
    let mut found = if program.has_rows {
        row_candidates(program, dialect, rows, cols)
    } else {
        elementwise_candidates(program, rows.saturating_mul(cols))
    };
    let mut seen = std::collections::HashSet::new();
    found.retain(|p| seen.insert(*p));
    found
}

/// Elements in 16 bytes of the widest dtype that the kernel streams, at most 8.
fn widest_vector(program: &Program) -> u32 {
    let inputs = program.inputs.iter().filter(|i| i.used && i.role == Role::Element).map(|i| i.dtype);
    let outputs = program.outputs.iter().filter(|o| !o.per_row && o.scatter.is_none()).map(|o| o.dtype);
    let widest = inputs.chain(outputs).map(|d| d.size()).max().unwrap_or(4);
    (16 / widest as u32).min(8)
}

fn scattered(program: &Program) -> bool {
    program.outputs.iter().any(|o| o.scatter.is_some())
        || program.values.iter().any(|v| matches!(v.node, Node::Load { .. }) && !v.uniform)
}

fn elementwise_candidates(program: &Program, elements: u64) -> Vec<Params> {
    let widest = widest_vector(program);
    let default = Params { threads: 256, vec: widest, rows_per_group: 1, items: 2 };
    // A small array should still reach many processors.
    let small = Params { threads: 128, vec: 1, rows_per_group: 1, items: 1 };
    let mut found = match elements {
        _ if scattered(program) => vec![Params { threads: 256, ..small }],
        0..65_536 => vec![small],
        65_536..1_048_576 => vec![Params { threads: 256, items: 1, ..default }],
        _ => vec![default],
    };
    for threads in [256, 128, 512, 64, 1024] {
        for vec in [widest, widest / 2, 1] {
            for items in [1, 2, 4] {
                let params = Params { threads, vec: vec.max(1), rows_per_group: 1, items };
                if u64::from(params.threads * params.vec * params.items) <= elements.max(1024) {
                    found.push(params);
                }
            }
        }
    }
    found
}

/// Whether scans run both from the front and from the end.
pub(super) fn mixed_directions(program: &Program) -> bool {
    let is = |want: bool| move |n: &Node| matches!(n, Node::Scan { reverse, .. } if *reverse == want);
    let any = |f: &dyn Fn(&Node) -> bool| program.values.iter().any(|v| f(&v.node));
    any(&is(true)) && any(&is(false))
}

fn row_candidates(program: &Program, dialect: Dialect, rows: u64, cols: u64) -> Vec<Params> {
    let widest = widest_vector(program);
    let vec =
        (1..=widest).rev().find(|v| v.is_power_of_two() && cols.is_multiple_of(u64::from(*v))).unwrap_or(1);
    let mut found = Vec::new();
    // Elements a thread holds: more of them use fewer threads a row; too many spill.
    let held: &[u32] = if dialect == Dialect::Cuda { &[8, 16, 4, 32] } else { &[8, 4, 16, 32] };
    if cols <= 16_384 && !mixed_directions(program) {
        for &held in held {
            let vec = vec.min(held);
            let team = cols.div_ceil(u64::from(held)).next_power_of_two().clamp(1, 1024) as u32;
            let items = (cols.div_ceil(u64::from(team * vec)) as u32).max(1);
            if items * vec > 32 {
                continue;
            }
            for threads in [128, 256, 512, 1024, 64] {
                let params = Params { threads, vec, rows_per_group: (threads / team).max(1), items };
                // A row a group when the team fills it; else as many rows as fit, if there are that many.
                if team <= threads && (u64::from(params.rows_per_group) <= rows.max(1) || threads == 64) {
                    found.push(params);
                }
            }
        }
    }
    for threads in [256, 512, 1024, 128] {
        found.push(Params { threads, vec, rows_per_group: 1, items: 0 });
    }
    found.push(Params { threads: 256, vec, rows_per_group: 8, items: 0 });
    // A long row first goes through the looped text with many threads.
    if cols > 16_384 {
        found.sort_by_key(|p| (p.items != 0, p.threads != 1024, p.vec != vec));
    }
    found
}
