//! Writing outputs.

use super::Dialect;
use super::access::Chunk;
use super::emitter::Emitter;
use super::helpers::Helper;
use crate::program::ProgramOutput;

impl Emitter<'_> {
    /// Whether a vector store to element outputs is possible here: `even<n>`.
    pub fn declare_even(&mut self, rows: bool) {
        if self.plan.vec == 1 || self.dialect == Dialect::Metal {
            return;
        }
        let base = if rows { " + base" } else { "" };
        for (n, o) in self.program.outputs.iter().enumerate() {
            if !o.per_row && o.scatter.is_none() {
                self.need(Helper::Vector);
                let (name, vec) = (&self.outputs[n], self.plan.vec);
                self.text.line(format!("const bool even{n} = zk_aligned<{vec}>({name}{base});"));
            }
        }
    }

    /// Declares the arrays in which a chunk's results wait.
    pub fn declare_results(&mut self, outputs: &[usize]) {
        for &n in outputs {
            let o = &self.program.outputs[n];
            if o.scatter.is_none() && self.plan.vec > 1 {
                let storage = self.dialect.storage(o.dtype);
                self.text.line(format!("{storage} w{n}[{}];", self.plan.vec));
            }
        }
    }

    /// Inside the loop over a chunk's elements `j`: keeps an output's element, or adds it where it is scattered to.
    pub fn keep_result(&mut self, n: usize, chunk: &Chunk) {
        let program = self.program;
        let output = &program.outputs[n];
        let value = self.operand(output.value);
        if let Some(scatter) = &output.scatter {
            let dims = self.offsets.outputs[n];
            let (inside, place) = self.place(&format!("w{n}"), &scatter.at, scatter.bounds, dims);
            let at = format!("{}[{place}]", self.outputs[n]);
            let add = match self.dialect {
                Dialect::Metal => format!("atomic_fetch_add_explicit(&{at}, {value}, memory_order_relaxed);"),
                Dialect::Cuda => format!("atomicAdd(&{at}, {value});"),
            };
            let live = Chunk::position(if self.plan.vec == 1 { "0" } else { "j" });
            self.text.line(format!("if ({live} < {} && {inside}) {add}", chunk.stored_bound()));
            return;
        }
        let value = self.stored(output, &value);
        if self.plan.vec == 1 {
            let store = self.store(n, output, &self.element(chunk, "0"), &value);
            self.text.line(format!("if (c < {}) {store}", chunk.stored_bound()));
        } else {
            self.text.line(format!("w{n}[j] = {value};"));
        }
    }

    /// After the loop over a chunk's elements: writes them.
    pub fn store_chunk(&mut self, outputs: &[usize], chunk: &Chunk) {
        let vec = self.plan.vec;
        if vec == 1 {
            return;
        }
        for &n in outputs {
            let output = &self.program.outputs[n];
            if output.scatter.is_some() {
                continue;
            }
            let whole = format!("c + {vec} <= {}", chunk.stored_bound());
            let each = self.store(n, output, &self.element(chunk, "j"), &format!("w{n}[j]"));
            let cuda = self.dialect == Dialect::Cuda;
            if cuda && chunk.reverse {
                // Falls to the loop below.
            } else if cuda {
                let base = if chunk.rows { "base + c" } else { "c" };
                self.text.open(format!("if (even{n} && {whole})"));
                self.text.line(format!("zk_store<{vec}>({} + {base}, w{n});", self.outputs[n]));
                self.text.otherwise();
            } else {
                self.text.open(format!("if ({whole})"));
                self.unroll();
                self.text.line(format!("for (int j = 0; j < {vec}; ++j) {each}"));
                self.text.otherwise();
            }
            self.unroll();
            self.text.open(format!("for (int j = 0; j < {vec}; ++j)"));
            self.text.line(format!("if (c + j < {}) {each}", chunk.stored_bound()));
            self.text.close();
            if !(cuda && chunk.reverse) {
                self.text.close();
            }
        }
    }

    /// The outputs of one value a row.
    pub fn store_rows(&mut self) {
        let program = self.program;
        let per_row: Vec<usize> =
            (0..program.outputs.len()).filter(|n| program.outputs[*n].per_row).collect();
        if per_row.is_empty() {
            return;
        }
        self.text.open("if (live && lane == 0)");
        for n in per_row {
            let output = &program.outputs[n];
            let value = self.stored(output, &self.operand(output.value));
            let store = self.store(n, output, "row", &value);
            self.text.line(store);
        }
        self.text.close();
    }

    fn element(&self, chunk: &Chunk, j: &str) -> String {
        match (chunk.rows, chunk.reverse) {
            (true, true) => format!("base + ({})", chunk.offset(j)),
            (true, false) => format!("base + {}", chunk.offset(j)),
            _ => chunk.offset(j),
        }
    }

    fn store(&self, n: usize, output: &ProgramOutput, at: &str, value: &str) -> String {
        let name = &self.outputs[n];
        if self.atomics && self.dialect == Dialect::Metal {
            let ty = self.dialect.storage(output.dtype);
            return format!("atomic_store_explicit(&{name}[{at}], {ty}({value}), memory_order_relaxed);");
        }
        format!("{name}[{at}] = {value};")
    }
}
