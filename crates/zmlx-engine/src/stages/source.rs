//! Where a product's activations come from: rows of a buffer, perhaps normalised, packed in the matrix's layout.

use crate::matrix::{Layout, Matrix, Rows};
use crate::program::{Buffer, Frame, Local, SHARE_FROM, Stage};
use crate::vector;

/// RMS norm over a row.
#[derive(Debug, Clone)]
pub struct Norm {
    /// The weights, one an element; ones if absent.
    pub weight: Option<Vec<f32>>,
    /// Added under the root.
    pub eps: f32,
}

/// Rows of a buffer as a product takes them.
#[derive(Debug, Clone)]
pub struct Source {
    /// The buffer.
    pub buffer: Buffer,
    /// Width of a row.
    pub width: usize,
    /// Rows a token: 1, or the experts of a token.
    pub per_token: usize,
    /// What is done to a row first.
    pub norm: Option<Norm>,
    /// How the product takes it.
    pub layout: Layout,
}

impl Source {
    /// One row a token for products with `matrix`.
    pub fn new(buffer: Buffer, norm: Option<Norm>, matrix: &Matrix) -> Self {
        Self { buffer, width: matrix.columns(), per_token: 1, norm, layout: matrix.layout() }
    }

    /// The stage that packs it for all threads when there are many rows.
    pub fn pack(&self) -> Pack {
        Pack(self.clone())
    }

    /// Rows of a call.
    fn rows(&self, frame: &Frame<'_>) -> usize {
        frame.rows() * self.per_token
    }

    /// One row, normalised if it is to be.
    fn row<'a>(&self, frame: &'a Frame<'_>, row: usize, room: &'a mut Vec<f32>) -> &'a [f32] {
        // SAFETY: earlier stages wrote it; nobody writes it in this one.
        let x = unsafe { frame.buffer(self.buffer).get(row * self.width..(row + 1) * self.width) };
        match &self.norm {
            None => x,
            Some(norm) => {
                room.resize(self.width, 0.0);
                vector::rms_norm(x, norm.weight.as_deref(), norm.eps, room);
                room
            }
        }
    }

    /// Packs the rows for this thread alone, if it is the thread's first chunk and rows are not packed for all.
    pub(super) fn prepare(&self, frame: &Frame<'_>, local: &mut Local, first: bool) {
        let rows = self.rows(frame);
        if !first || frame.shares(rows) {
            return;
        }
        local.activations.reserve(self.layout, rows, self.width);
        let mut room = std::mem::take(&mut local.a);
        for row in 0..rows {
            let x = self.row(frame, row, &mut room);
            local.activations.set(self.layout, row, x);
        }
        local.a = room;
    }

    /// The packed rows.
    pub(super) fn packed<'a>(&self, frame: &'a Frame<'_>, local: &'a crate::matrix::Activations) -> Rows<'a> {
        if frame.shares(self.rows(frame)) {
            // SAFETY: the pack stage before this one is complete.
            unsafe { frame.shared.rows(self.layout, self.width) }
        } else {
            local.rows(self.layout, self.width)
        }
    }
}

/// Packs rows for all threads; no chunks when there are few.
#[derive(Debug)]
pub struct Pack(Source);

/// Rows a chunk.
const ROWS: usize = 8;

impl Stage for Pack {
    fn name(&self) -> &'static str {
        "pack"
    }

    fn in_decode(&self) -> bool {
        self.0.per_token >= SHARE_FROM
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        let rows = self.0.rows(frame);
        if frame.shares(rows) { rows.div_ceil(ROWS) } else { 0 }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let mut room = std::mem::take(&mut local.a);
        for row in chunk * ROWS..((chunk + 1) * ROWS).min(self.0.rows(frame)) {
            let x = self.0.row(frame, row, &mut room);
            // SAFETY: this row is this chunk's, and no stage reads the shared activations now.
            unsafe { frame.shared.set(self.0.layout, row, x) };
        }
        local.a = room;
    }

    fn packs(&self) -> Option<(Layout, usize, usize)> {
        Some((self.0.layout, self.0.width, self.0.per_token))
    }
}
