//! What all parts of the text need: names, what is constant along a thread's work, helpers in use.

use std::collections::BTreeSet;

use super::helpers::Helper;
use super::sizes::Offsets;
use super::writer::Writer;
use super::{Dialect, Layout, Plan, unsupported};
use crate::error::Result;
use crate::graph::{Id, Node};
use crate::program::{Program, ProgramOutput, Value};
use crate::{Dtype, Ty};

/// Parameter name of the array of sizes.
pub(super) const META: &str = "sizes";

pub(super) struct Emitter<'a> {
    pub program: &'a Program,
    pub dialect: Dialect,
    pub plan: &'a Plan,
    /// Parameter names.
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    /// Values computed once a thread (a row, for row kernels), outside loops over elements.
    pub hoisted: Vec<bool>,
    pub offsets: Offsets,
    /// Whether any output is scattered to.
    pub atomics: bool,
    pub helpers: BTreeSet<Helper>,
    pub text: Writer,
    /// Bytes of shared memory that the text has declared.
    pub shared: usize,
}

impl<'a> Emitter<'a> {
    pub fn new(program: &'a Program, dialect: Dialect, plan: &'a Plan) -> Result<Self> {
        let atomics = program.outputs.iter().any(|o| o.scatter.is_some());
        for o in &program.outputs {
            let addable = matches!(o.dtype, Dtype::F32 | Dtype::I32 | Dtype::U32);
            if !addable && (o.scatter.is_some() || atomics && dialect == Dialect::Metal) {
                let why = format!(
                    "output {} is {}, atomics are f32, i32 or u32: scatter into one and cast",
                    o.name, o.dtype
                );
                return Err(unsupported(program, dialect, why));
            }
        }
        let mut e = Self {
            program,
            dialect,
            plan,
            inputs: parameters("in", program.inputs.iter().map(|i| &i.name)),
            outputs: parameters("out", program.outputs.iter().map(|o| &o.name)),
            hoisted: Vec::new(),
            offsets: Offsets::new(program, plan),
            atomics,
            helpers: BTreeSet::new(),
            text: Writer::default(),
            shared: 0,
        };
        for value in &program.values {
            let hoisted = e.is_hoisted(value);
            e.hoisted.push(hoisted);
        }
        Ok(e)
    }

    fn is_hoisted(&self, value: &Value) -> bool {
        let rows = self.program.has_rows;
        match &value.node {
            _ if rows && value.uniform => true,
            Node::Input(n) => match self.plan.layouts[*n as usize] {
                Layout::Scalar => true,
                Layout::Row => rows,
                _ => false,
            },
            Node::Const(_) | Node::Len(_) | Node::Reduce(..) => true,
            Node::Index(axis) => rows && *axis != 0,
            Node::Random(_) | Node::Scan { .. } => false,
            node => node.args().iter().all(|a| self.hoisted[a.index()]),
        }
    }

    /// Numbers of the inputs that the text takes.
    pub fn used_inputs(&self) -> impl Iterator<Item = usize> + use<'a> {
        let program = self.program;
        (0..program.inputs.len()).filter(|n| program.inputs[*n].used)
    }

    pub fn ty(&self, id: Id) -> Ty {
        self.program.value(id).ty
    }

    /// The type of offsets and sizes.
    pub fn size(&self) -> &'static str {
        if self.plan.index64 { "int64_t" } else { "int" }
    }

    /// The unsigned type that offsets are divided in, which is faster.
    pub fn unsigned_size(&self) -> &'static str {
        if self.plan.index64 { "uint64_t" } else { "uint32_t" }
    }

    /// The length of an axis counted from the last, from the sizes.
    pub fn axis_length(&self, axis: usize) -> String {
        match axis {
            0 => "cols".to_owned(),
            a if a < self.plan.ndim => format!("{META}[{}]", super::sizes::DIMS + self.plan.ndim - 1 - a),
            _ => "1".to_owned(),
        }
    }

    /// The local of a value.
    pub fn name(&self, id: Id) -> String {
        let letter = if self.hoisted[id.index()] { 'u' } else { 'v' };
        format!("{letter}{}", id.0)
    }

    /// A value as an operand.
    pub fn operand(&self, id: Id) -> String {
        let value = self.program.value(id);
        match value.node {
            Node::Const(c) => self.dialect.literal(c, value.ty),
            _ => self.name(id),
        }
    }

    pub fn need(&mut self, helper: Helper) {
        self.helpers.insert(helper);
    }

    /// An element of an output rounded to its dtype.
    pub fn stored(&self, output: &ProgramOutput, value: &str) -> String {
        if output.dtype.compute().storage() == output.dtype {
            return value.to_owned();
        }
        format!("{}({value})", self.dialect.storage(output.dtype))
    }

    /// A barrier of the group that also orders its shared memory.
    pub fn barrier(&mut self) {
        self.text
            .line(self.dialect.pick("threadgroup_barrier(mem_flags::mem_threadgroup);", "__syncthreads();"));
    }

    /// Declares a shared array.
    pub fn shared_array(&mut self, ty: Ty, name: &str, len: u32) {
        let keyword = self.dialect.pick("threadgroup", "__shared__");
        self.text.line(format!("{keyword} {} {name}[{len}];", self.dialect.ty(ty)));
        self.shared += ty.storage().size().max(4) * len as usize;
    }

    /// Makes the compiler unroll the loop that follows, so that arrays it indexes stay in registers.
    pub fn unroll(&mut self) {
        self.text.directive("#pragma unroll");
    }

    /// The lines every text begins with.
    pub fn prologue(&mut self) {
        if self.program.strict && self.dialect == Dialect::Metal {
            self.text.directive("#pragma clang fp contract(off)");
        }
        let size = self.size();
        let group = self.dialect.pick(
            "threadgroup_position_in_grid.x + threadgroup_position_in_grid.y * threadgroups_per_grid.x",
            "blockIdx.x + blockIdx.y * gridDim.x",
        );
        let thread = self.dialect.pick("thread_index_in_threadgroup", "threadIdx.x");
        self.text.line(format!("const {size} group = {size}({group});"));
        self.text.line(format!("const int thread_index = int({thread});"));
        self.text.line(format!("const {size} rows = {META}[0];"));
        self.text.line(format!("const {size} cols = {META}[1];"));
    }
}

/// Parameter names: a prefix keeps them apart from reserved words and from this text's own names. MLX adds parameters
/// where a body contains `<input>_shape` and the like, or the name of a position attribute: such names become numbers.
fn parameters<'n>(prefix: &str, names: impl Iterator<Item = &'n String>) -> Vec<String> {
    const TAKEN: [&str; 12] = [
        "_shape",
        "_strides",
        "_ndim",
        "_per_",
        "_in_grid",
        "_in_quad",
        "_in_simd",
        "_in_thread",
        "grid_origin",
        "grid_size",
        "execution_width",
        "__",
    ];
    let one = |(n, name): (usize, &String)| match TAKEN.iter().any(|t| name.contains(t)) {
        true => format!("{prefix}_{n}"),
        false => format!("{prefix}_{name}"),
    };
    names.enumerate().map(one).collect()
}
