//! Operations as expressions.

use super::emitter::Emitter;
use super::helpers::Helper;
use crate::graph::{Id, Node};
use crate::{Dtype, Op, Ty};

impl Emitter<'_> {
    /// Declares the local of a value that is not read from memory.
    pub fn define(&mut self, id: Id) {
        let value = self.program.value(id);
        let text = match &value.node {
            Node::Const(_) => return,
            Node::Op(op, args) => self.op(*op, args),
            Node::Cast(dtype, x) => self.cast(*dtype, *x),
            Node::Bitcast(dtype, x) => self.bitcast(*dtype, *x),
            Node::Len(axis) => format!("int({})", self.axis_length(*axis as usize)),
            Node::Load { .. } => return self.define_load(id),
            // Inputs, coordinates and random bits depend on the place; reductions and scans define themselves.
            _ => return,
        };
        self.declare(id, &text);
    }

    /// `const float v3 = ...;`
    pub fn declare(&mut self, id: Id, text: &str) {
        let ty = self.dialect.ty(self.ty(id));
        let name = self.name(id);
        self.text.line(format!("const {ty} {name} = {text};"));
    }

    fn op(&mut self, op: Op, args: &[Id]) -> String {
        let operands: Vec<String> = args.iter().map(|a| self.operand(*a)).collect();
        let ty = args.last().map_or(Ty::F32, |a| self.ty(*a));
        let x: Vec<&str> = operands.iter().map(String::as_str).collect();
        if op == Op::Select {
            return format!("{} ? {} : {}", x[0], x[1], x[2]);
        }
        if let Some(text) = self.comparison(op, &x) {
            return text;
        }
        if let Some(text) = self.shift_by_literal(op, args, &x) {
            return text;
        }
        if ty == Ty::F32 { self.float_op(op, &x) } else { self.int_op(op, ty, &x) }
    }

    /// A shift whose count is known to be in range.
    fn shift_by_literal(&self, op: Op, args: &[Id], x: &[&str]) -> Option<String> {
        let ty = self.ty(*args.first()?);
        let Node::Const(crate::Const::Int(count)) = self.program.value(*args.get(1)?).node else {
            return None;
        };
        if !(0..ty.storage().size() as i64 * 8).contains(&count) {
            return None;
        }
        let (a, name) = (x[0], self.dialect.ty(ty));
        match (op, ty) {
            (Op::Shr, _) => Some(format!("{a} >> {count}")),
            (Op::Shl, Ty::I32) => Some(format!("{name}(uint32_t({a}) << {count})")),
            (Op::Shl, Ty::I64) => Some(format!("{name}(uint64_t({a}) << {count})")),
            (Op::Shl, _) => Some(format!("{a} << {count}")),
            _ => None,
        }
    }

    fn comparison(&mut self, op: Op, x: &[&str]) -> Option<String> {
        let sign = match op {
            Op::Lt => "<",
            Op::Le => "<=",
            Op::Gt => ">",
            Op::Ge => ">=",
            Op::Eq => "==",
            Op::Ne => "!=",
            Op::And => "&&",
            Op::Or => "||",
            Op::Not => return Some(format!("!{}", x[0])),
            Op::IsNan => {
                self.need(Helper::IsNan);
                return Some(format!("zk_isnan({})", x[0]));
            }
            Op::IsInf => {
                self.need(Helper::IsInf);
                return Some(format!("zk_isinf({})", x[0]));
            }
            _ => return None,
        };
        Some(format!("{} {sign} {}", x[0], x[1]))
    }

    /// One rounding an operation. CUDA's compiler fuses products and sums unless told so by name.
    pub fn float_binary(&self, sign: char, a: &str, b: &str) -> String {
        if self.program.strict && self.dialect == super::Dialect::Cuda {
            let name = match sign {
                '+' => "add",
                '-' => "sub",
                '*' => "mul",
                _ => "div",
            };
            return format!("__f{name}_rn({a}, {b})");
        }
        format!("{a} {sign} {b}")
    }

    fn float_op(&mut self, op: Op, x: &[&str]) -> String {
        let strict = self.program.strict;
        let cuda = self.dialect == super::Dialect::Cuda;
        let a = x[0];
        let call = |e: &Self, name: &str| format!("{}({a})", e.dialect.math(name));
        let helper = |e: &mut Self, h: Helper, name: &str| {
            e.need(h);
            format!("zk_{name}({})", x.join(", "))
        };
        match op {
            Op::Add => self.float_binary('+', a, x[1]),
            Op::Sub => self.float_binary('-', a, x[1]),
            Op::Mul => self.float_binary('*', a, x[1]),
            Op::Div => self.float_binary('/', a, x[1]),
            Op::FloorDiv => format!("{}({})", self.dialect.math("floor"), self.float_binary('/', a, x[1])),
            Op::Rem => {
                let floor = format!("{}({})", self.dialect.math("floor"), self.float_binary('/', a, x[1]));
                if strict {
                    // Spelled out, so that each step rounds.
                    let product = self.float_binary('*', x[1], &floor);
                    return self.float_binary('-', a, &product);
                }
                format!("{}(-{floor}, {}, {a})", self.dialect.math("fma"), x[1])
            }
            Op::Pow => format!("{}({a}, {})", self.dialect.math("pow"), x[1]),
            Op::Max => helper(self, Helper::Max, "max"),
            Op::Min => helper(self, Helper::Min, "min"),
            Op::Fma => format!("{}({a}, {}, {})", self.dialect.math("fma"), x[1], x[2]),
            Op::Neg => format!("-{a}"),
            Op::Abs => call(self, "fabs"),
            Op::Sign => helper(self, Helper::Sign, "sign"),
            Op::Sqrt if strict && cuda => format!("__fsqrt_rn({a})"),
            Op::Rsqrt if strict && cuda => format!("__frsqrt_rn({a})"),
            Op::Exp2 => call(self, "exp2"),
            Op::Round => call(self, "rint"),
            Op::Log1p if cuda => call(self, "log1p"),
            Op::Expm1 if cuda => call(self, "expm1"),
            Op::Erf if cuda => call(self, "erf"),
            Op::Log1p => helper(self, Helper::Log1p, "log1p"),
            Op::Expm1 => helper(self, Helper::Expm1, "expm1"),
            Op::Erf => helper(self, Helper::Erf, "erf"),
            Op::Mish => helper(self, Helper::Mish, "mish"),
            Op::Softplus => helper(self, Helper::Softplus, "softplus"),
            Op::Sigmoid => format!("1.0f / (1.0f + {}(-{a}))", self.dialect.math("exp")),
            Op::Silu => format!("{a} / (1.0f + {}(-{a}))", self.dialect.math("exp")),
            // 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)), which neither overflows nor cancels.
            Op::GeluTanh => format!(
                "{a} / (1.0f + {}(-1.5957691f * ({a} + 0.044715f * {a} * {a} * {a})))",
                self.dialect.math("exp")
            ),
            Op::GeluErf => {
                self.need(Helper::Gelu);
                format!("zk_gelu({a})")
            }
            // The rest are library functions of their own name.
            op => call(self, op.name()),
        }
    }

    fn int_op(&mut self, op: Op, ty: Ty, x: &[&str]) -> String {
        let a = x[0];
        let b = x.get(1).copied().unwrap_or_default();
        let signed = matches!(ty, Ty::I32 | Ty::I64);
        let wide = matches!(ty, Ty::I64 | Ty::U64);
        let name = self.dialect.ty(ty);
        let unsigned = if wide { "uint64_t" } else { "uint32_t" };
        let bits = if wide { 64 } else { 32 };
        // Overflow of signed integers is undefined in C++; unsigned ones wrap.
        let wrap = |sign: &str| match signed {
            true => format!("{name}({unsigned}({a}) {sign} {unsigned}({b}))"),
            false => format!("{a} {sign} {b}"),
        };
        match op {
            Op::Add => wrap("+"),
            Op::Sub => wrap("-"),
            Op::Mul => wrap("*"),
            Op::Neg => format!("{name}({unsigned}(0) - {unsigned}({a}))"),
            Op::Abs if signed => format!("{a} < 0 ? {name}({unsigned}(0) - {unsigned}({a})) : {a}"),
            Op::Sign if signed => format!("{name}({a} > 0) - {name}({a} < 0)"),
            Op::Sign => format!("{name}({a} != 0)"),
            Op::Min => format!("{b} < {a} ? {b} : {a}"),
            Op::Max => format!("{b} > {a} ? {b} : {a}"),
            Op::FloorDiv | Op::Rem if signed => {
                self.need(if wide { Helper::DivI64 } else { Helper::DivI32 });
                let function = if op == Op::Rem { "zk_rem" } else { "zk_floordiv" };
                format!("{function}({a}, {b})")
            }
            Op::FloorDiv => format!("{b} == 0 ? {name}(0) : {a} / {b}"),
            Op::Rem => format!("{b} == 0 ? {name}(0) : {a} % {b}"),
            Op::BitAnd => format!("{name}({a} & {b})"),
            Op::BitOr => format!("{name}({a} | {b})"),
            Op::BitXor => format!("{name}({a} ^ {b})"),
            Op::BitNot if ty == Ty::Bool => format!("!{a}"),
            Op::BitNot => format!("~{a}"),
            Op::Popcount => match (self.dialect, wide) {
                (super::Dialect::Metal, true) => format!(
                    "{name}(metal::popcount(uint32_t({a})) + metal::popcount(uint32_t(uint64_t({a}) >> 32)))"
                ),
                (super::Dialect::Metal, false) => format!("{name}(metal::popcount(uint32_t({a})))"),
                (super::Dialect::Cuda, true) => format!("{name}(__popcll(uint64_t({a})))"),
                (super::Dialect::Cuda, false) => format!("{name}(__popc(uint32_t({a})))"),
            },
            Op::Shl => {
                format!("{unsigned}({b}) < {bits}u ? {name}({unsigned}({a}) << {unsigned}({b})) : {name}(0)")
            }
            Op::Shr if signed => {
                format!("{unsigned}({b}) < {bits}u ? {a} >> {b} : {a} < 0 ? {name}(-1) : {name}(0)")
            }
            Op::Shr => format!("{b} < {bits}u ? {a} >> {b} : {name}(0)"),
            // Abs of unsigned types.
            _ => a.to_owned(),
        }
    }

    fn cast(&mut self, dtype: Dtype, x: Id) -> String {
        let (from, a) = (self.ty(x), self.operand(x));
        let to = dtype.compute();
        let (name, storage) = (self.dialect.ty(to), self.dialect.storage(dtype));
        if dtype == Dtype::Bool {
            return format!("{a} != 0");
        }
        if from == Ty::F32 && to.is_int() {
            let (helper, function) = match to {
                Ty::I32 => (Helper::ToI32, "zk_to_i32"),
                Ty::U32 => (Helper::ToU32, "zk_to_u32"),
                Ty::I64 => (Helper::ToI64, "zk_to_i64"),
                _ => (Helper::ToU64, "zk_to_u64"),
            };
            self.need(helper);
            let wide = format!("{function}({a})");
            return if to.storage() == dtype { wide } else { format!("{name}({storage}({wide}))") };
        }
        if to.storage() == dtype {
            return format!("{name}({a})");
        }
        // Rounds or wraps in the narrow type.
        let a = if to == Ty::F32 && from != Ty::F32 { format!("float({a})") } else { a };
        format!("{name}({storage}({a}))")
    }

    fn bitcast(&mut self, dtype: Dtype, x: Id) -> String {
        let (from, a) = (self.ty(x), self.operand(x));
        match (from, dtype.compute()) {
            (Ty::F32, Ty::I32) => format!("int({}({a}))", self.dialect.bits_of_float()),
            (Ty::F32, _) => format!("{}({a})", self.dialect.bits_of_float()),
            (_, Ty::F32) => format!("{}(uint32_t({a}))", self.dialect.float_of_bits()),
            (_, to) => format!("{}({a})", self.dialect.ty(to)),
        }
    }
}
