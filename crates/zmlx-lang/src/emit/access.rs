//! Reading inputs: in chunks of consecutive elements, and at computed places.

use super::emitter::{Emitter, META};
use super::helpers::Helper;
use super::{Dialect, Layout};
use crate::Role;
use crate::graph::{Bounds, Id, Node};

/// Where a loop over a thread's elements stands. A chunk is `vec` consecutive elements from position `c` on.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    /// Positions are columns of one row, whose first element is at `base`; else they count through the domain.
    pub rows: bool,
    /// Positions count from the end of the row.
    pub reverse: bool,
    /// Index of the chunk's first element in the thread's arrays, `None` when they hold just this chunk.
    pub slot: Option<String>,
}

impl Chunk {
    /// One past the last position.
    pub fn bound(&self) -> &'static str {
        if self.rows { "cols" } else { "n" }
    }

    /// One past the last position that is stored.
    pub fn stored_bound(&self) -> &'static str {
        if self.rows { "end" } else { "n" }
    }

    /// Element `j` of the chunk in the thread's arrays.
    pub fn index(&self, j: &str) -> String {
        match &self.slot {
            Some(slot) if j == "0" => slot.clone(),
            Some(slot) => format!("{slot} + {j}"),
            None => j.to_owned(),
        }
    }

    /// The chunk's part of the array that holds an input's elements.
    fn held(&self, input: usize) -> String {
        match &self.slot {
            Some(slot) => format!("r{input} + {slot}"),
            None => format!("r{input}"),
        }
    }

    /// The position of element `j` as an offset in a row or in the domain.
    pub fn offset(&self, j: &str) -> String {
        match (j, self.reverse) {
            ("0", false) => "c".to_owned(),
            ("0", true) => "cols - 1 - c".to_owned(),
            (_, false) => format!("c + {j}"),
            (_, true) => format!("cols - 1 - c - {j}"),
        }
    }

    /// The position of element `j`, to compare with a bound.
    pub fn position(j: &str) -> String {
        if j == "0" { "c".to_owned() } else { format!("c + {j}") }
    }
}

impl Emitter<'_> {
    /// Inputs that loops over elements read, of those whose element value is needed.
    pub fn streamed(&self, needed: &[bool]) -> Vec<usize> {
        let mut found: Vec<usize> = Vec::new();
        for (i, value) in self.program.values.iter().enumerate() {
            if let Node::Input(n) = value.node
                && needed[i]
                && !self.hoisted[i]
                && !found.contains(&(n as usize))
            {
                found.push(n as usize);
            }
        }
        found
    }

    /// Declares the arrays that hold elements of inputs.
    pub fn declare_held(&mut self, inputs: &[usize], len: u32) {
        for &n in inputs {
            let storage = self.dialect.storage(self.program.inputs[n].dtype);
            self.text.line(format!("{storage} r{n}[{len}];"));
        }
    }

    /// Whether vector accesses to an input are possible here: `wide<n>`.
    pub fn declare_wide(&mut self, inputs: &[usize], rows: bool) {
        if self.plan.vec == 1 || self.dialect == Dialect::Metal {
            return;
        }
        for &n in inputs {
            let base = match self.plan.layouts[n] {
                Layout::Full if rows => " + base",
                Layout::Full | Layout::Col => "",
                _ => continue,
            };
            self.need(Helper::Vector);
            let (name, vec) = (&self.inputs[n], self.plan.vec);
            self.text.line(format!("const bool wide{n} = zk_aligned<{vec}>({name}{base});"));
        }
    }

    /// Loads the chunk at `c`. Elements beyond the bound become 0.
    pub fn load_chunk(&mut self, inputs: &[usize], chunk: &Chunk) {
        let (consecutive, placed): (Vec<usize>, Vec<usize>) =
            inputs.iter().partition(|n| self.by_position(**n, chunk));
        for n in consecutive {
            self.load_consecutive(n, chunk);
        }
        let (columns, placed): (Vec<usize>, Vec<usize>) =
            placed.iter().partition(|n| self.plan.layouts[**n] == Layout::Col && self.plan.vec > 1);
        for n in columns {
            self.load_column(n, chunk);
        }
        self.load_placed(&placed, chunk);
    }

    /// Loads the chunk's part of a row that repeats, at once where the chunk lies within one row.
    fn load_column(&mut self, n: usize, chunk: &Chunk) {
        let vec = self.plan.vec;
        let name = self.inputs[n].clone();
        let whole = format!("c + {vec} <= n && col0 + {vec} <= cols");
        if self.dialect == Dialect::Cuda {
            self.text.open(format!("if (wide{n} && col0 % {vec} == 0 && {whole})"));
            self.text.line(format!("zk_load<{vec}>({name} + col0, {});", chunk.held(n)));
        } else {
            self.text.open(format!("if ({whole})"));
            self.unroll();
            let slot = chunk.index("j");
            self.text.line(format!("for (int j = 0; j < {vec}; ++j) r{n}[{slot}] = {name}[col0 + j];"));
        }
        self.text.otherwise();
        self.load_placed(&[n], chunk);
        self.text.close();
    }

    /// Loads elements one by one, as rows and columns change within a chunk.
    fn load_placed(&mut self, inputs: &[usize], chunk: &Chunk) {
        if inputs.is_empty() {
            return;
        }
        let j = self.open_places(true);
        self.text.line(format!("const bool inside = {} < n;", Chunk::position(j)));
        if inputs.iter().any(|n| self.plan.layouts[*n] == Layout::Strided) {
            self.coordinates(&(1..self.plan.ndim).collect::<Vec<_>>(), "row");
        }
        for &n in inputs {
            let at = match self.plan.layouts[n] {
                Layout::Row => "row".to_owned(),
                Layout::Col => "col".to_owned(),
                _ => self.strided(n),
            };
            self.load_guarded(n, &chunk.index(j), "inside", &at);
        }
        self.close_places(true);
    }

    /// Opens the loop over a chunk's elements, where a chunk is one element a block; gives the element's index. With
    /// `places` the row and column of each are in `row` and `col`: they change within a chunk.
    pub fn open_places(&mut self, places: bool) -> &'static str {
        let vec = self.plan.vec;
        let size = self.size();
        if vec == 1 {
            self.text.block();
            if places {
                self.text.line(format!("const {size} row = row0, col = col0;"));
            }
            return "0";
        }
        if places {
            self.text.block();
            self.text.line(format!("{size} row = row0, col = col0;"));
        }
        self.unroll();
        self.text.open(format!("for (int j = 0; j < {vec}; ++j)"));
        "j"
    }

    /// Closes what [`Self::open_places`] opened.
    pub fn close_places(&mut self, places: bool) {
        if places && self.plan.vec > 1 {
            self.text.line("if (++col == cols) { col = 0; ++row; }");
            self.text.close();
        }
        self.text.close();
    }

    /// Whether an input's elements of a chunk follow from its position alone.
    fn by_position(&self, n: usize, chunk: &Chunk) -> bool {
        chunk.rows || self.plan.layouts[n] == Layout::Full
    }

    /// Whether chunks need their row and column: `row0` and `col0`.
    pub fn needs_place(&self, inputs: &[usize], needed: &[bool]) -> bool {
        let by_index = |(i, v): (usize, &crate::program::Value)| {
            needed[i] && !self.hoisted[i] && matches!(v.node, Node::Index(_))
        };
        inputs.iter().any(|n| self.plan.layouts[*n] != Layout::Full)
            || self.program.values.iter().enumerate().any(by_index)
    }

    fn load_guarded(&mut self, n: usize, slot: &str, inside: &str, at: &str) {
        let (name, zero) = (&self.inputs[n], self.dialect.zero(self.program.inputs[n].dtype));
        self.text.line(format!("r{n}[{slot}] = {inside} ? {name}[{at}] : {zero};"));
    }

    fn load_consecutive(&mut self, n: usize, chunk: &Chunk) {
        let vec = self.plan.vec;
        let layout = self.plan.layouts[n];
        let offset = |j: &str| match layout {
            Layout::Full if chunk.rows => format!("base + {}", paren(&chunk.offset(j), chunk.reverse)),
            Layout::Strided => format!("o{n} + ({}) * t{n}", chunk.offset(j)),
            Layout::Row => "row".to_owned(),
            Layout::Scalar => "0".to_owned(),
            _ => chunk.offset(j),
        };
        let guarded = |e: &mut Self| {
            let inside = format!("c + j < {}", chunk.bound());
            e.unroll();
            e.text.open(format!("for (int j = 0; j < {vec}; ++j)"));
            e.load_guarded(n, &chunk.index("j"), &inside, &offset("j"));
            e.text.close();
        };
        if vec == 1 {
            let inside = format!("c < {}", chunk.bound());
            self.load_guarded(n, &chunk.index("0"), &inside, &offset("0"));
            return;
        }
        let whole = format!("c + {vec} <= {}", chunk.bound());
        let name = self.inputs[n].clone();
        match (self.dialect, layout) {
            (Dialect::Cuda, Layout::Full | Layout::Col) if !chunk.reverse => {
                self.text.open(format!("if (wide{n} && {whole})"));
                let at = if layout == Layout::Full && chunk.rows { "base + c" } else { "c" };
                self.text.line(format!("zk_load<{vec}>({name} + {at}, {});", chunk.held(n)));
            }
            _ => {
                // Without a test in the loop the compiler joins the accesses.
                self.text.open(format!("if ({whole})"));
                self.unroll();
                self.text.line(format!(
                    "for (int j = 0; j < {vec}; ++j) r{n}[{}] = {name}[{}];",
                    chunk.index("j"),
                    offset("j")
                ));
            }
        }
        self.text.otherwise();
        guarded(self);
        self.text.close();
    }

    /// Defines the coordinates `p<axis>` of these axes, counted from the last and beyond 0, of row `row`.
    pub fn coordinates(&mut self, axes: &[usize], row: &str) {
        let Some(&last) = axes.iter().filter(|a| **a < self.plan.ndim).max() else { return };
        let (size, unsigned) = (self.size(), self.unsigned_size());
        let mut rest = row.to_owned();
        for axis in 1..=last {
            // The outermost axis takes what is left.
            if axis + 1 == self.plan.ndim {
                self.text.line(format!("const {size} p{axis} = {rest};"));
                break;
            }
            let length = self.axis_length(axis);
            self.text
                .line(format!("const {size} q{axis} = {size}({unsigned}({rest}) / {unsigned}({length}));"));
            self.text.line(format!("const {size} p{axis} = {rest} - q{axis} * {length};"));
            rest = format!("q{axis}");
        }
    }

    /// The offset of a strided input's element at coordinates `p<axis>` and `col`.
    fn strided(&self, n: usize) -> String {
        let mut terms = vec![format!("col * {META}[{}]", self.offsets.inputs[n] + self.plan.ndim - 1)];
        for axis in 1..self.plan.ndim {
            terms.push(format!("p{axis} * {META}[{}]", self.offsets.inputs[n] + self.plan.ndim - 1 - axis));
        }
        terms.join(" + ")
    }

    /// The offset `o<n>` of a strided input's row and its step `t<n>` along it.
    pub fn declare_strided(&mut self, n: usize) {
        let size = self.size();
        let terms: Vec<String> = (1..self.plan.ndim)
            .map(|axis| format!("p{axis} * {META}[{}]", self.offsets.inputs[n] + self.plan.ndim - 1 - axis))
            .collect();
        let offset = if terms.is_empty() { "0".to_owned() } else { terms.join(" + ") };
        let step = match self.plan.ndim {
            0 => "0".to_owned(),
            d => format!("{META}[{}]", self.offsets.inputs[n] + d - 1),
        };
        self.text.line(format!("const {size} o{n} = {offset};"));
        self.text.line(format!("const {size} t{n} = {step};"));
    }

    /// The value of a hoisted input.
    pub fn define_hoisted_input(&mut self, id: Id, n: usize) {
        let at = match self.plan.layouts[n] {
            Layout::Scalar => "0".to_owned(),
            Layout::Strided => format!("o{n}"),
            // One value a row, of a domain whose rows are one element long.
            Layout::Full => "base".to_owned(),
            Layout::Col => "0".to_owned(),
            _ => "row".to_owned(),
        };
        let text = self.computed(n, &format!("{}[{at}]", self.inputs[n]));
        self.declare(id, &text);
    }

    /// A stored element of an input in the type it is computed in.
    pub fn computed(&self, n: usize, element: &str) -> String {
        let dtype = self.program.inputs[n].dtype;
        if dtype.compute().storage() == dtype {
            return element.to_owned();
        }
        format!("{}({element})", self.dialect.ty(dtype.compute()))
    }

    /// An element at computed places.
    pub fn define_load(&mut self, id: Id) {
        let Node::Load { input, at, bounds } = &self.program.value(id).node else { return };
        let n = *input as usize;
        let name = self.name(id);
        let (inside, place) = self.place(&name, at, *bounds, self.offsets.inputs[n]);
        let value = self.program.value(id);
        let outside = match (bounds, value.ty) {
            (Bounds::Checked, crate::Ty::F32) => self.dialect.float(f32::NAN),
            (_, ty) => self.dialect.literal(crate::Const::Int(0), ty),
        };
        let element = self.computed(n, &format!("{}[{place}]", self.inputs[n]));
        self.declare(id, &format!("{inside} ? {element} : {outside}"));
    }

    /// Whether coordinates lie in an array whose axes begin at `dims` of the sizes, and where; defines locals.
    pub fn place(&mut self, name: &str, at: &[Id], bounds: Bounds, dims: usize) -> (String, String) {
        let size = self.size();
        let mut tests = Vec::new();
        let mut place = String::new();
        for (k, &a) in at.iter().enumerate() {
            let length = format!("{META}[{}]", dims + k);
            let mut x = self.operand(a);
            if bounds == Bounds::Clamp {
                self.text.line(format!(
                    "const {size} {name}_{k} = {x} < 0 ? 0 : {x} < {length} ? {size}({x}) : {length} - 1;"
                ));
                x = format!("{name}_{k}");
                tests.push(format!("{length} > 0"));
            } else {
                tests.push(format!("{x} >= 0 && {x} < {length}"));
            }
            let x = if self.plan.index64 && bounds != Bounds::Clamp { format!("int64_t({x})") } else { x };
            place = if k == 0 { x } else { format!("{} * {length} + {x}", paren(&place, k > 1)) };
        }
        if at.is_empty() {
            return ("true".to_owned(), "0".to_owned());
        }
        self.text.line(format!("const bool {name}_in = {};", tests.join(" && ")));
        (format!("{name}_in"), place)
    }

    /// Inputs of stride layout that are used, for row kernels to place once a row.
    pub fn strided_inputs(&self) -> Vec<usize> {
        let strided = |n: &usize| self.plan.layouts[*n] == Layout::Strided;
        let indexed = |n: &usize| matches!(self.program.inputs[*n].role, Role::Indexed(_));
        self.used_inputs().filter(strided).filter(|n| !indexed(n)).collect()
    }
}

fn paren(text: &str, needed: bool) -> String {
    if needed { format!("({text})") } else { text.to_owned() }
}
