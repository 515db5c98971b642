//! A call's shapes as rows, columns and strides.

use zmlx_lang::shape::{Domain, broadcast_strides};
use zmlx_lang::{Node, Program, Role};

/// How the engine walks the domain, and where inputs lie in it.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Rows to walk.
    pub rows: usize,
    /// Elements of each.
    pub cols: usize,
    /// Outer axes after merging, outermost first; their product is `rows`.
    pub outer: Vec<usize>,
    /// For each input: step along each outer axis and along the columns, in elements.
    pub inputs: Vec<Steps>,
    /// The domain's own axes.
    pub shape: Vec<usize>,
}

/// An input's steps.
#[derive(Debug, Clone, Default)]
pub(super) struct Steps {
    pub outer: Vec<usize>,
    pub col: usize,
}

impl Layout {
    pub fn new(program: &Program, domain: &Domain, shapes: &[Vec<usize>]) -> Self {
        let place = |v: &zmlx_lang::program::Value| matches!(v.node, Node::Index(_) | Node::Len(_));
        let flat = !program.has_rows && !program.values.iter().any(place);
        // Everything as strides over the domain's axes; a 0-d domain is one axis of 1.
        let dims = if domain.shape.is_empty() { vec![1] } else { domain.shape.clone() };
        let strides: Vec<Vec<usize>> = program
            .inputs
            .iter()
            .zip(shapes)
            .map(|(input, shape)| match input.role {
                Role::Element | Role::Row if input.used => broadcast_strides(shape, &dims),
                _ => vec![0; dims.len()],
            })
            .collect();
        let (mut dims, mut strides) =
            if flat { merge(&dims, &strides) } else { merge_outer(&dims, &strides) };
        let cols = dims.pop().unwrap_or(1);
        let inputs = strides
            .iter_mut()
            .map(|s| Steps { col: s.pop().unwrap_or(0), outer: std::mem::take(s) })
            .collect();
        let rows = dims.iter().product();
        Self { rows, cols, outer: dims, inputs, shape: domain.shape.clone() }
    }

    /// Where an input's row starts, in elements.
    pub fn start(&self, input: usize, row: usize) -> usize {
        let steps = &self.inputs[input].outer;
        match (self.outer.as_slice(), steps.as_slice()) {
            ([], _) => 0,
            ([_], [step]) => row * step,
            (outer, steps) => {
                let (mut rest, mut at) = (row, 0);
                for (d, s) in outer.iter().zip(steps).rev() {
                    at += rest % d * s;
                    rest /= d;
                }
                at
            }
        }
    }

    /// The coordinate of a row along an axis of the domain, counted from the last.
    pub fn index(&self, axis: usize, row: usize) -> usize {
        let rank = self.shape.len();
        if axis >= rank {
            return 0;
        }
        let inner: usize = self.shape[rank - axis..rank - 1].iter().product();
        row / inner.max(1) % self.shape[rank - 1 - axis].max(1)
    }

    /// The length of an axis of the domain, counted from the last; 1 beyond its rank.
    pub fn len(&self, axis: usize) -> usize {
        let rank = self.shape.len();
        if axis >= rank { 1 } else { self.shape[rank - 1 - axis] }
    }
}

/// Joins neighbouring axes that every input walks evenly.
fn merge(dims: &[usize], strides: &[Vec<usize>]) -> (Vec<usize>, Vec<Vec<usize>>) {
    let mut out_dims: Vec<usize> = Vec::new();
    let mut out: Vec<Vec<usize>> = vec![Vec::new(); strides.len()];
    for (k, &d) in dims.iter().enumerate() {
        if d == 1 {
            continue;
        }
        let joins = !out_dims.is_empty()
            && strides.iter().zip(&out).all(|(s, o)| o.last().is_some_and(|&last| last == s[k] * d));
        if joins {
            if let Some(last) = out_dims.last_mut() {
                *last *= d;
            }
            out.iter_mut().zip(strides).for_each(|(o, s)| {
                if let Some(last) = o.last_mut() {
                    *last = s[k];
                }
            });
        } else {
            out_dims.push(d);
            out.iter_mut().zip(strides).for_each(|(o, s)| o.push(s[k]));
        }
    }
    if out_dims.is_empty() {
        return (vec![1], vec![vec![0]; strides.len()]);
    }
    (out_dims, out)
}

/// The same for all axes but the last, which stays the row.
fn merge_outer(dims: &[usize], strides: &[Vec<usize>]) -> (Vec<usize>, Vec<Vec<usize>>) {
    let last = dims.len() - 1;
    let outer: Vec<Vec<usize>> = strides.iter().map(|s| s[..last].to_vec()).collect();
    let (mut d, mut s) = if last == 0 { (Vec::new(), outer) } else { merge(&dims[..last], &outer) };
    d.push(dims[last]);
    s.iter_mut().zip(strides).for_each(|(s, from)| s.push(from[last]));
    (d, s)
}
