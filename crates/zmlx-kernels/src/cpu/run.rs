//! Rows, blocks and threads.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;
use zmlx_lang::shape::Domain;
use zmlx_lang::{Dtype, Id, Node, Program, Role, Ty};
use zmlx_simd::lockstep::Soon;
use zmlx_simd::stream;

use super::bits::{add_bits, const_bits, narrow, narrow_block, narrow_floats, splat};
use super::code::{Code, Pass, Place, Step, scan_slot};
use super::exec::{Accumulate, Block, Exec, by_registers};
use super::layout::Layout;
use super::reduce::Acc;
use super::scan::{Carry, scan};
use super::table::{OutOfBounds, Table, convert_in, element, widen};

/// Memory of an output, written by this call alone.
pub(crate) struct OutputBuffer<'a> {
    pub bytes: &'a mut [u8],
    pub shape: Vec<usize>,
}

/// The arrays of a call.
pub(crate) struct Buffers<'a> {
    pub domain: &'a Domain,
    pub inputs: &'a [&'a [u8]],
    pub shapes: &'a [Vec<usize>],
    pub outputs: Vec<OutputBuffer<'a>>,
}

/// Calls smaller than this many elements run on the calling thread.
const INLINE: usize = 16 << 10;
/// Elements of a task, about.
const TASK: usize = 128 << 10;
/// Output bytes from which stores go past the caches: what is written is not read again soon.
const STREAM: usize = 8 << 20;
/// Most bytes a task keeps of one row between passes.
const KEEP: usize = 256 << 10;

/// Runs a program. `keeping` and `lean` are the same program with and without values kept between passes.
pub(crate) fn run(keeping: &Code, lean: &Code, buffers: Buffers<'_>) -> Result<(), String> {
    let layout = Layout::new(&keeping.program, buffers.domain, buffers.shapes);
    let fits = keeping.rows * layout.cols * keeping.lane <= KEEP;
    let code = if fits { keeping } else { lean };
    let total: usize = layout.rows * layout.cols;
    let threads = rayon::current_num_threads();
    let scans = lean.passes.iter().any(|p| !p.scans.is_empty());
    let scatters = code.program.outputs.iter().any(|o| o.scatter.is_some());
    let few_rows = layout.rows < 2 * threads && layout.cols > INLINE;
    let rows = layout.rows;
    if total <= INLINE || scatters || threads == 1 && !few_rows {
        return Job::new(code, layout, buffers).on_this_thread();
    }
    if few_rows && !scans {
        let job = Job::new(lean, layout, buffers);
        return job.result((0..rows).try_for_each(|row| job.split_row(row)));
    }
    let per_task = (TASK / layout.cols.max(1)).clamp(1, rows.div_ceil(4 * threads).max(1));
    let job = Job::new(code, layout, buffers);
    let task = |t: usize| job.whole_rows(t * per_task..((t + 1) * per_task).min(rows));
    job.result((0..rows.div_ceil(per_task)).into_par_iter().with_max_len(1).try_for_each(task))
}

/// Memory of an output as tasks share it: each writes elements of its own (or one task runs alone).
#[derive(Clone, Copy)]
struct Out {
    data: *mut u8,
    len: usize,
}

// SAFETY: tasks write disjoint elements, and the buffer outlives the job.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

struct Job<'a> {
    code: &'a Code,
    layout: Layout,
    inputs: &'a [&'a [u8]],
    tables: Vec<Table<'a>>,
    outputs: Vec<Out>,
    output_shapes: Vec<Vec<usize>>,
    /// Sums of scattered outputs that are narrower than what they are added in.
    sums: Vec<Mutex<Vec<f32>>>,
    /// For each pass, values that are computed right where an output wants them.
    direct: Vec<Vec<(Id, usize)>>,
    stream: bool,
    arch: pulp::Arch,
}

/// 64 bytes that start a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// What one task works in.
struct Arena {
    /// The bits of each uniform value.
    cells: Vec<u64>,
    slots: Vec<Line>,
    rows: Vec<Line>,
    lanes: Vec<*mut u8>,
    accs: Vec<Acc>,
    /// Whether values that never change have been computed and filled in.
    ready: bool,
}

fn lines(bytes: usize) -> Vec<Line> {
    vec![Line([0; 8]); bytes.div_ceil(64)]
}

impl<'a> Job<'a> {
    fn new(code: &'a Code, layout: Layout, buffers: Buffers<'a>) -> Self {
        let table = |(bytes, shape): (&&'a [u8], &'a Vec<usize>)| Table { bytes, shape };
        let mut bytes = 0;
        let (mut outputs, mut output_shapes, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for (mut o, spec) in buffers.outputs.into_iter().zip(&code.program.outputs) {
            bytes += o.bytes.len();
            let narrow = spec.scatter.is_some() && spec.dtype.is_float() && spec.dtype != Dtype::F32;
            sums.push(Mutex::new(if narrow { vec![0.0; o.bytes.len() / 2] } else { Vec::new() }));
            if spec.scatter.is_some() {
                o.bytes.fill(0);
            }
            outputs.push(Out { data: o.bytes.as_mut_ptr(), len: o.bytes.len() });
            output_shapes.push(std::mem::take(&mut o.shape));
        }
        let mut job = Self {
            code,
            layout,
            direct: Vec::new(),
            inputs: buffers.inputs,
            tables: buffers.inputs.iter().zip(buffers.shapes).map(table).collect(),
            outputs,
            output_shapes,
            sums,
            stream: bytes >= STREAM,
            arch: zmlx_simd::arch(),
        };
        job.direct = code.passes.iter().map(|pass| job.direct_outputs(pass)).collect();
        job
    }

    fn program(&self) -> &'a Program {
        &self.code.program
    }

    fn on_this_thread(&self) -> Result<(), String> {
        let done = self.whole_rows(0..self.layout.rows);
        for (n, (o, sums)) in self.outputs.iter().zip(&self.sums).enumerate() {
            let sums = sums.lock().map_err(|_| "a task failed".to_owned())?;
            if !sums.is_empty() {
                // SAFETY: no task runs any more; the buffer has two bytes a sum.
                let bytes = unsafe { std::slice::from_raw_parts_mut(o.data, o.len) };
                narrow_floats(&sums, bytes, self.program().outputs[n].dtype);
            }
        }
        self.result(done)
    }

    fn result(&self, done: Result<(), OutOfBounds>) -> Result<(), String> {
        done.map_err(|e| match self.program().inputs.get(e.input) {
            Some(input) => {
                let shape = self.tables[e.input].shape;
                format!("{} is read at {:?}, outside its shape {shape:?}", input.name, e.at)
            }
            None => {
                let n = e.input - self.program().inputs.len();
                let (name, shape) = (&self.program().outputs[n].name, &self.output_shapes[n]);
                format!("{name} is added to at {:?}, outside its shape {shape:?}", e.at)
            }
        })
    }

    fn arena(&self) -> Arena {
        let n = self.program().values.len();
        let slot = self.slot_bytes();
        Arena {
            cells: vec![0; n],
            slots: lines(self.code.slots * slot),
            rows: lines(self.code.rows * self.row_bytes()),
            lanes: vec![std::ptr::null_mut(); n],
            accs: Vec::new(),
            ready: false,
        }
    }

    /// A few lines more than a block: slots a multiple of 4 KiB apart would meet in the same sets of the cache.
    fn slot_bytes(&self) -> usize {
        (self.code.options.block * self.code.lane).next_multiple_of(64) + 320
    }

    fn row_bytes(&self) -> usize {
        (self.layout.cols * self.code.lane).next_multiple_of(64) + 320
    }

    fn whole_rows(&self, rows: Range<usize>) -> Result<(), OutOfBounds> {
        let mut arena = self.arena();
        for row in rows {
            self.begin(&mut arena, row)?;
            for (p, pass) in self.code.passes.iter().enumerate() {
                self.pass(&mut arena, row, p, pass, 0..self.layout.cols)?;
                self.finish(&mut arena, p)?;
            }
            self.row_outputs(&arena, row);
            arena.ready = true;
        }
        self.settle();
        Ok(())
    }

    /// Puts streamed stores before whatever tells others that the task is done.
    fn settle(&self) {
        if self.stream {
            stream::fence();
        }
    }

    /// One long row on all threads: each pass in parallel over columns.
    fn split_row(&self, row: usize) -> Result<(), OutOfBounds> {
        let mut main = self.arena();
        self.begin(&mut main, row)?;
        let cols = self.layout.cols;
        let tasks = cols.div_ceil(TASK).max(1);
        for (p, pass) in self.code.passes.iter().enumerate() {
            let cells = &main.cells;
            let part = |t: usize| {
                let mut arena = self.arena();
                arena.cells.copy_from_slice(cells);
                (0..p).for_each(|earlier| self.fill(&mut arena, earlier));
                self.pass(&mut arena, row, p, pass, t * TASK..((t + 1) * TASK).min(cols))?;
                self.settle();
                Ok(arena.accs)
            };
            let parts: Vec<Vec<Acc>> =
                (0..tasks).into_par_iter().with_max_len(1).map(part).collect::<Result<_, OutOfBounds>>()?;
            self.reset_accs(pass, &mut main.accs);
            for part in &parts {
                main.accs.iter_mut().zip(part).for_each(|(all, one)| all.merge(one));
            }
            self.finish(&mut main, p)?;
        }
        self.row_outputs(&main, row);
        Ok(())
    }

    /// Puts the uniform values that are known before the first pass in their cells.
    fn begin(&self, arena: &mut Arena, row: usize) -> Result<(), OutOfBounds> {
        for &id in &self.code.uniform[0] {
            if arena.ready && !self.code.varies[id.index()] {
                continue;
            }
            let value = self.program().value(id);
            arena.cells[id.index()] = match value.node {
                Node::Const(c) => const_bits(c, value.ty),
                Node::Len(axis) => self.layout.len(axis as usize) as u64,
                Node::Index(axis) => self.layout.index(axis as usize, row) as u64,
                Node::Input(n) => {
                    let n = n as usize;
                    let dtype = self.program().inputs[n].dtype;
                    let at = if self.program().inputs[n].role == Role::Row {
                        self.layout.start(n, row)
                    } else {
                        0
                    };
                    widen(&self.inputs[n][at * dtype.size()..], dtype)
                }
                _ => continue,
            };
        }
        self.compute_cells(arena, 0)
    }

    /// Computes the uniform values that are known from pass `stage` on.
    fn compute_cells(&self, arena: &mut Arena, stage: usize) -> Result<(), OutOfBounds> {
        let code = &self.code.computed[usize::from(arena.ready)][stage];
        if code.is_empty() {
            return Ok(());
        }
        let base = arena.cells.as_mut_ptr();
        for i in 0..arena.lanes.len() {
            // SAFETY: one cell a value.
            arena.lanes[i] = unsafe { base.add(i) } as *mut u8;
        }
        let block = Block {
            program: self.program(),
            arch: self.arch,
            lanes: &arena.lanes,
            cells: base,
            n: 1,
            col: 0,
            linear: 0,
            tables: &self.tables,
            streamed: None,
            soon: Cell::new(None),
        };
        self.arch.dispatch(Exec { block: &block, code })
    }

    /// Repeats uniform values that are known from pass `stage` on in their slots.
    fn fill(&self, arena: &mut Arena, stage: usize) {
        let n = self.code.options.block.min(self.layout.cols);
        for &(id, slot) in &self.code.fills {
            let value = self.program().value(id);
            if value.stage as usize != stage || arena.ready && !self.code.varies[id.index()] {
                continue;
            }
            let bits = arena.cells[id.index()];
            // SAFETY: a slot has room for a block of lanes and is used by this value alone.
            unsafe { splat(self.slot(arena, slot), n, bits, value.ty) };
        }
    }

    fn slot(&self, arena: &mut Arena, slot: u16) -> *mut u8 {
        let bytes = self.slot_bytes();
        // SAFETY: there are `slots` slots.
        unsafe { (arena.slots.as_mut_ptr() as *mut u8).add(slot as usize * bytes) }
    }

    fn reset_accs(&self, pass: &Pass, accs: &mut Vec<Acc>) {
        let acc = |r: &Step| match self.program().value(r.id).node {
            Node::Reduce(op, x) => Acc::new(op, self.program().value(x).ty),
            _ => Acc::new(zmlx_lang::ReduceOp::Sum, Ty::I32),
        };
        accs.clear();
        accs.extend(pass.reduces.iter().map(acc));
    }

    /// Stores the results of a pass's reductions and computes what follows from them.
    fn finish(&self, arena: &mut Arena, p: usize) -> Result<(), OutOfBounds> {
        let reduces = &self.code.passes[p].reduces;
        for (r, acc) in reduces.iter().zip(&arena.accs) {
            arena.cells[r.id.index()] = acc.bits();
        }
        if reduces.is_empty() { Ok(()) } else { self.compute_cells(arena, p + 1) }
    }

    fn row_outputs(&self, arena: &Arena, row: usize) {
        for (o, out) in self.program().outputs.iter().zip(&self.outputs) {
            if o.per_row {
                let size = o.dtype.size();
                let bytes = narrow(arena.cells[o.value.index()], self.program().value(o.value).ty, o.dtype);
                // SAFETY: one element a row, written by the row's task alone.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.data.add(row * size), size) };
            }
        }
    }

    fn pass(
        &self,
        arena: &mut Arena,
        row: usize,
        p: usize,
        pass: &Pass,
        cols: Range<usize>,
    ) -> Result<(), OutOfBounds> {
        self.fill(arena, p);
        for step in 0..pass.scans.len() {
            self.scan(arena, row, pass, step)?;
        }
        let mut accs = std::mem::take(&mut arena.accs);
        self.reset_accs(pass, &mut accs);
        self.set_places(arena, pass);
        let direct = &self.direct[p];
        let streamed = direct.first().filter(|_| self.stream).map(|(value, _)| *value);
        let align = self.alignment(pass, row, cols.start);
        let mut col = cols.start;
        while col < cols.end {
            let most = if col == cols.start && align > 0 { align } else { self.code.options.block };
            let n = most.min(cols.end - col);
            self.move_places(arena, pass, col);
            for &(value, o) in direct {
                let at = (row * self.layout.cols + col) * self.program().outputs[o].dtype.size();
                // SAFETY: element outputs have one element for each place of the domain.
                arena.lanes[value.index()] = unsafe { self.outputs[o].data.add(at) };
            }
            self.inputs_in(arena, &pass.code, row, col, n);
            let soon = if p == 1 && row + 1 < self.layout.rows { self.soon(row + 1, col, n) } else { None };
            let linear = (row * self.layout.cols + col) as u64;
            let block = Block {
                program: self.program(),
                arch: self.arch,
                lanes: &arena.lanes,
                cells: arena.cells.as_ptr(),
                n,
                col,
                linear,
                tables: &self.tables,
                streamed,
                soon: Cell::new(soon),
            };
            self.arch.dispatch(Exec { block: &block, code: &pass.code })?;
            if !accs.is_empty() {
                self.arch.dispatch(Accumulate { block: &block, reduces: &pass.reduces, accs: &mut accs });
            }
            for &o in &pass.stores {
                if !direct.iter().any(|d| d.1 == o) {
                    self.store(&block, row, o)?;
                }
            }
            col += n;
        }
        arena.accs = accs;
        Ok(())
    }

    /// Columns of a later row to ask for while this one computes: the first pass over a row waits for memory, later ones for
    /// arithmetic, and so both are busy.
    fn soon(&self, row: usize, col: usize, n: usize) -> Option<Soon> {
        let mut inputs = self.layout.inputs.iter().enumerate();
        inputs.find_map(|(input, steps)| {
            if steps.col == 0 || steps.outer.iter().all(|s| *s == 0) {
                return None;
            }
            let size = self.program().inputs[input].dtype.size();
            let at = (self.layout.start(input, row) + col) * size;
            let bytes = self.inputs[input].get(at..at + n * size)?;
            Some(Soon::new(bytes.as_ptr(), size))
        })
    }

    /// Elements up to the first cache line of a streamed output, so that later blocks write whole lines.
    fn alignment(&self, pass: &Pass, row: usize, col: usize) -> usize {
        let [o] = pass.stores.as_slice() else { return 0 };
        if !self.stream {
            return 0;
        }
        let size = self.program().outputs[*o].dtype.size();
        let at = self.outputs[*o].data as usize + (row * self.layout.cols + col) * size;
        at.next_multiple_of(64).wrapping_sub(at) / size
    }

    /// Places that stay for the whole pass.
    fn set_places(&self, arena: &mut Arena, pass: &Pass) {
        for i in 0..pass.places.len() {
            if let Place::Slot(slot) = pass.places[i] {
                arena.lanes[i] = self.slot(arena, slot);
            }
        }
    }

    /// Places inside row-long buffers, for a block that starts at `col`.
    fn move_places(&self, arena: &mut Arena, pass: &Pass, col: usize) {
        if self.code.rows == 0 {
            return;
        }
        for i in 0..pass.places.len() {
            if let Place::Row(r) = pass.places[i] {
                let lane = if matches!(self.program().values[i].ty, Ty::I64 | Ty::U64) { 8 } else { 4 };
                let at = r as usize * self.row_bytes() + col * lane;
                // SAFETY: there are `rows` buffers as long as the row.
                arena.lanes[i] = unsafe { (arena.rows.as_mut_ptr() as *mut u8).add(at) };
            }
        }
    }

    /// Outputs whose value can be computed right where it belongs.
    fn direct_outputs(&self, pass: &Pass) -> Vec<(Id, usize)> {
        let mut direct: Vec<(Id, usize)> = Vec::new();
        for &o in &pass.stores {
            let output = &self.program().outputs[o];
            let value = self.program().value(output.value);
            let computed = matches!(pass.places[output.value.index()], Place::Slot(_))
                && pass.code.iter().any(|s| s.id == output.value)
                && !matches!(value.node, Node::Input(_));
            let same = value.ty != Ty::Bool && value.ty.storage() == output.dtype;
            let aligned = (self.outputs[o].data as usize).is_multiple_of(output.dtype.size());
            let first = !direct.iter().any(|d| d.0 == output.value);
            // Streamed lanes can't be read back cheaply: only a value that nothing else in the pass reads.
            let read = pass.code.iter().any(|s| s.args(self.program()).contains(&output.value))
                || pass.reduces.iter().any(|r| r.args(self.program()).contains(&output.value));
            let streams = !read && pass.stores.len() == 1 && by_registers(self.program(), output.value);
            if computed && same && aligned && first && (!self.stream || streams) && output.scatter.is_none() {
                direct.push((output.value, o));
            }
        }
        direct
    }

    /// Makes the block's elements of inputs readable: in place when stored as computed, else converted into the slot.
    fn inputs_in(&self, arena: &mut Arena, code: &[Step], row: usize, col: usize, n: usize) {
        for step in code {
            let id = step.id;
            let Node::Input(input) = self.program().value(id).node else { continue };
            let input = input as usize;
            let (dtype, step) = (self.program().inputs[input].dtype, self.layout.inputs[input].col);
            let size = dtype.size();
            let at = (self.layout.start(input, row) + col * step) * size;
            let bytes = self.inputs[input];
            let to = arena.lanes[id.index()];
            if step == 0 {
                let bits = widen(&bytes[at..], dtype);
                // SAFETY: the value's slot has room for a block.
                unsafe { splat(to, n, bits, dtype.compute()) };
                continue;
            }
            let bytes = &bytes[at..at + n * size];
            let in_place = dtype.compute().storage() == dtype && dtype != Dtype::Bool;
            if in_place && (bytes.as_ptr() as usize).is_multiple_of(size) {
                // Operations only read where inputs are.
                arena.lanes[id.index()] = bytes.as_ptr() as *mut u8;
            } else {
                // SAFETY: the value's slot has room for a block.
                unsafe { convert_in(bytes, dtype, to, n) };
            }
        }
    }

    fn scan(&self, arena: &mut Arena, row: usize, pass: &Pass, step: usize) -> Result<(), OutOfBounds> {
        let step = &pass.scans[step];
        let Node::Scan { op, reverse, .. } = self.program().value(step.value).node else { return Ok(()) };
        let cols = self.layout.cols;
        let block = self.code.options.block;
        let blocks = cols.div_ceil(block);
        let mut carry = Carry::new(op, self.program().value(step.value).ty);
        self.set_places(arena, pass);
        for b in 0..blocks {
            let b = if reverse { blocks - 1 - b } else { b };
            let (col, n) = (b * block, block.min(cols - b * block));
            self.move_places(arena, pass, col);
            for (k, part) in step.code.iter().enumerate() {
                arena.lanes[part.id.index()] = self.slot(arena, scan_slot(self.code.fills.len(), k));
            }
            self.inputs_in(arena, &step.code, row, col, n);
            let linear = (row * cols + col) as u64;
            let block = Block {
                program: self.program(),
                arch: self.arch,
                lanes: &arena.lanes,
                cells: arena.cells.as_ptr(),
                n,
                col,
                linear,
                tables: &self.tables,
                streamed: None,
                soon: Cell::new(None),
            };
            self.arch.dispatch(Exec { block: &block, code: &step.code })?;
            scan(&block, step.value, &mut carry);
        }
        Ok(())
    }

    fn store(&self, block: &Block<'_>, row: usize, o: usize) -> Result<(), OutOfBounds> {
        let output = &self.program().outputs[o];
        let ty = self.program().value(output.value).ty;
        let from = block.lanes[output.value.index()];
        if let Some(scatter) = &output.scatter {
            return self.scatter(block, o, scatter);
        }
        let size = output.dtype.size();
        let at = (row * self.layout.cols + block.col) * size;
        // SAFETY: the value's lanes, and the output's elements at these places, which belong to this task alone.
        let (lanes, out) = unsafe {
            let lane = if matches!(ty, Ty::I64 | Ty::U64) { 8 } else { 4 };
            let lanes = std::slice::from_raw_parts(from, block.n * lane);
            (lanes, std::slice::from_raw_parts_mut(self.outputs[o].data.add(at), block.n * size))
        };
        if ty != Ty::Bool && ty.storage() == output.dtype {
            if self.stream {
                // SAFETY: each task ends with a fence.
                let _ = unsafe { stream::stream_copy_unfenced(out, lanes) };
            } else {
                out.copy_from_slice(lanes);
            }
        } else {
            narrow_block(lanes, ty, out, output.dtype);
        }
        Ok(())
    }

    fn scatter(&self, block: &Block<'_>, o: usize, scatter: &zmlx_lang::Scatter) -> Result<(), OutOfBounds> {
        let output = &self.program().outputs[o];
        let ty = self.program().value(output.value).ty;
        let mut sums = self.sums[o].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: coordinates and values are lanes of the block; scatters run in one task, so nothing else touches
        // the output.
        unsafe {
            let coordinate = |k: usize, i: usize| *(block.lanes[scatter.at[k].index()] as *const i32).add(i);
            let out = self.outputs[o];
            for i in 0..block.n {
                let found = element(&self.output_shapes[o], scatter.bounds, |k| coordinate(k, i));
                let Some(at) = found.map_err(|()| OutOfBounds {
                    input: self.program().inputs.len() + o,
                    at: (0..scatter.at.len()).map(|k| coordinate(k, i)).collect(),
                })?
                else {
                    continue;
                };
                let lanes = block.lanes[output.value.index()];
                if !sums.is_empty() {
                    sums[at] += *(lanes as *const f32).add(i);
                    continue;
                }
                let wide = matches!(ty, Ty::I64 | Ty::U64);
                let bits = if wide {
                    *(lanes as *const u64).add(i)
                } else {
                    u64::from(*(lanes as *const u32).add(i))
                };
                let size = output.dtype.size();
                let place = std::slice::from_raw_parts_mut(out.data.add(at * size), size);
                let sum = add_bits(widen(place, output.dtype), bits, ty);
                place.copy_from_slice(&narrow(sum, ty, output.dtype)[..size]);
            }
        }
        Ok(())
    }
}
