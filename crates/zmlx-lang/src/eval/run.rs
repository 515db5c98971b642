//! Walking the domain.

use super::number::{self, Num};
use super::{Data, Rounding, Tensor, philox};
use crate::error::{LangError, Result};
use crate::graph::{Bounds, Const, Id, Node};
use crate::program::{Program, ProgramOutput, Value};
use crate::shape::{Domain, broadcast_strides};
use crate::{Dtype, Ty};

/// Elements held at a time when rows do not matter.
const BLOCK: usize = 4096;

/// A piece of a row; the whole row when the kernel reduces or scans.
#[derive(Clone, Copy)]
struct Piece {
    row: usize,
    start: usize,
    len: usize,
}

pub(super) struct Run<'a> {
    program: &'a Program,
    inputs: &'a [Tensor],
    domain: &'a Domain,
    rounding: Rounding,
    /// For each input, its step along each axis of the domain; empty for indexed ones.
    strides: Vec<Vec<usize>>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        program: &'a Program,
        inputs: &'a [Tensor],
        domain: &'a Domain,
        rounding: Rounding,
    ) -> Self {
        let strides = |t: &Tensor| broadcast_strides(&t.shape, &domain.shape);
        Self { program, inputs, domain, rounding, strides: inputs.iter().map(strides).collect() }
    }

    pub(super) fn all(&self, shapes: &[Vec<usize>]) -> Result<Vec<Tensor>> {
        let zero = |(o, shape): (&ProgramOutput, &Vec<usize>)| {
            let zero = Num::of(0, o.dtype.compute());
            vec![zero; shape.iter().product()]
        };
        let mut outputs: Vec<Vec<Num>> = self.program.outputs.iter().zip(shapes).map(zero).collect();
        let step = if self.program.has_rows { self.domain.cols.max(1) } else { BLOCK };
        for row in 0..self.domain.rows {
            let mut start = 0;
            // A row of no elements still has reductions.
            while start < self.domain.cols || (start == 0 && self.program.has_rows) {
                let piece = Piece { row, start, len: step.min(self.domain.cols - start) };
                self.piece(piece, shapes, &mut outputs)?;
                start += step;
            }
        }
        let finish =
            |((o, shape), data): ((&ProgramOutput, &Vec<usize>), Vec<Num>)| self.finish(o, shape, data);
        Ok(self.program.outputs.iter().zip(shapes).zip(outputs).map(finish).collect())
    }

    fn finish(&self, output: &ProgramOutput, shape: &[usize], data: Vec<Num>) -> Tensor {
        let round = self.rounding != Rounding::Exact;
        let data = if output.dtype.is_float() {
            let store = |v: Num| if round { number::round_float(v.f(), output.dtype) } else { v.f() };
            Data::Float(data.into_iter().map(store).collect())
        } else {
            Data::Int(data.into_iter().map(|v| number::wrap(v.i(), output.dtype)).collect())
        };
        Tensor { shape: shape.to_vec(), dtype: output.dtype, data }
    }

    fn piece(&self, piece: Piece, shapes: &[Vec<usize>], outputs: &mut [Vec<Num>]) -> Result<()> {
        let mut values: Vec<Vec<Num>> = Vec::with_capacity(self.program.values.len());
        for value in &self.program.values {
            values.push(self.value(value, &values, piece)?);
        }
        let base = piece.row * self.domain.cols + piece.start;
        for ((output, shape), data) in self.program.outputs.iter().zip(shapes).zip(outputs) {
            let column = &values[output.value.index()];
            match &output.scatter {
                Some(scatter) => {
                    for j in 0..piece.len {
                        let at = coordinates(&scatter.at, &values, j);
                        if let Some(i) = self.place(&output.name, shape, &at, scatter.bounds)? {
                            data[i] = match (data[i], pick(column, j)) {
                                (Num::F(a), b) => Num::F(a + b.f()),
                                (Num::I(a), b) => Num::I(number::wrap(a + b.i(), output.dtype)),
                            };
                        }
                    }
                }
                None if output.per_row => data[piece.row] = pick(column, 0),
                None => (0..piece.len).for_each(|j| data[base + j] = pick(column, j)),
            }
        }
        Ok(())
    }

    /// The values of a piece; one alone where it is the same along the row.
    fn value(&self, value: &Value, values: &[Vec<Num>], piece: Piece) -> Result<Vec<Num>> {
        let count = if value.uniform { 1 } else { piece.len };
        let arg = |id: Id, j: usize| pick(&values[id.index()], j);
        let ty = |id: Id| self.program.value(id).ty;
        let each = |f: &dyn Fn(usize) -> Num| (0..count).map(f).collect::<Vec<_>>();
        Ok(match &value.node {
            Node::Input(n) => self.input(*n as usize, piece, count),
            Node::Const(c) => vec![self.literal(*c, value.ty); count],
            Node::Index(axis) => each(&|j| Num::I(self.index(*axis as usize, piece, j) as i128)),
            Node::Len(axis) => {
                let axis = *axis as usize;
                let shape = &self.domain.shape;
                let len = if axis < shape.len() { shape[shape.len() - 1 - axis] } else { 1 };
                vec![Num::I(number::wrap(len as i128, Dtype::I32)); count]
            }
            Node::Random(seed) => {
                let base = piece.row * self.domain.cols + piece.start;
                each(&|j| {
                    let bits = philox::element_bits(arg(*seed, j).i() as u64, (base + j) as u64);
                    Num::I(i128::from(bits))
                })
            }
            Node::Op(op, args) => {
                let operand = args.last().map_or(Ty::F32, |a| ty(*a));
                each(&|j| {
                    let args: Vec<Num> = args.iter().map(|a| arg(*a, j)).collect();
                    number::apply(*op, operand, &args, self.rounding)
                })
            }
            Node::Cast(dtype, x) => each(&|j| number::cast(arg(*x, j), *dtype)),
            Node::Bitcast(dtype, x) => each(&|j| number::bitcast(arg(*x, j), *dtype)),
            Node::Reduce(op, x) => {
                let row = (0..piece.len).map(|j| arg(*x, j));
                vec![number::reduce(*op, ty(*x), row, self.rounding)]
            }
            Node::Scan { op, reverse, exclusive, arg: x } => {
                let row: Vec<Num> = (0..piece.len).map(|j| arg(*x, j)).collect();
                number::scan(*op, value.ty, *reverse, *exclusive, &row, self.rounding)
            }
            Node::Load { input, at, bounds } => {
                let array = &self.inputs[*input as usize];
                let name = &self.program.inputs[*input as usize].name;
                let one = |j| {
                    let at = coordinates(at, values, j);
                    Ok(match self.place(name, &array.shape, &at, *bounds)? {
                        Some(i) => self.element(array, i),
                        None => Num::of(0, value.ty),
                    })
                };
                (0..count).map(one).collect::<Result<Vec<_>>>()?
            }
        })
    }

    fn element(&self, array: &Tensor, i: usize) -> Num {
        match &array.data {
            Data::Float(v) if self.rounding == Rounding::EachOperation => Num::F(f64::from(v[i] as f32)),
            Data::Float(v) => Num::F(v[i]),
            Data::Int(v) => Num::I(v[i]),
        }
    }

    fn literal(&self, c: Const, ty: Ty) -> Num {
        match c {
            _ if ty == Ty::F32 && self.rounding == Rounding::EachOperation => {
                Num::F(f64::from(c.as_f64() as f32))
            }
            _ if ty == Ty::F32 => Num::F(c.as_f64()),
            Const::Int(v) => Num::I(number::wrap(v.into(), ty.storage())),
            c => number::cast(Num::F(c.as_f64()), ty.storage()),
        }
    }

    fn input(&self, n: usize, piece: Piece, count: usize) -> Vec<Num> {
        let (array, strides) = (&self.inputs[n], &self.strides[n]);
        // An indexed or scalar input is never stepped over; the rest by the row's coordinates.
        let (mut offset, mut left) = (0, piece.row);
        let outer = self.domain.shape.len().saturating_sub(1);
        for k in (0..outer).rev() {
            offset += left % self.domain.shape[k] * strides[k];
            left /= self.domain.shape[k];
        }
        let step = strides.last().copied().unwrap_or(0);
        (0..count).map(|j| self.element(array, offset + (piece.start + j) * step)).collect()
    }

    /// The coordinate along an axis counted from the last.
    fn index(&self, axis: usize, piece: Piece, j: usize) -> usize {
        let shape = &self.domain.shape;
        if axis >= shape.len() {
            return 0;
        }
        if axis == 0 {
            return piece.start + j;
        }
        let inner: usize = shape[shape.len() - axis..shape.len() - 1].iter().product();
        piece.row / inner % shape[shape.len() - 1 - axis]
    }

    /// The position of coordinates in an array of `shape`; `None` where nothing is read or written.
    fn place(&self, name: &str, shape: &[usize], at: &[i128], bounds: Bounds) -> Result<Option<usize>> {
        let mut position = 0;
        for (&i, &len) in at.iter().zip(shape) {
            let inside = i >= 0 && (i as u128) < len as u128;
            let i = match bounds {
                _ if inside => i as usize,
                Bounds::Clamp if len > 0 => i.clamp(0, len as i128 - 1) as usize,
                Bounds::Clamp | Bounds::Zero => return Ok(None),
                Bounds::Checked => {
                    let at = at.iter().map(|v| *v as i64).collect();
                    let (kernel, array) = (self.program.name.clone(), name.to_owned());
                    return Err(LangError::OutOfBounds { kernel, array, shape: shape.to_vec(), at });
                }
            };
            position = position * len + i;
        }
        Ok(Some(position))
    }
}

/// The element of a column that may hold one value for all.
fn pick(column: &[Num], j: usize) -> Num {
    if column.len() == 1 { column[0] } else { column[j] }
}

fn coordinates(at: &[Id], values: &[Vec<Num>], j: usize) -> Vec<i128> {
    at.iter().map(|a| pick(&values[a.index()], j).i()).collect()
}
