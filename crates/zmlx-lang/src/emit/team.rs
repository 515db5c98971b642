//! Reductions and scans across the threads that share a row.
//!
//! Up to 32 threads exchange values by shuffles; more of them add one value for each 32 threads in shared memory.
//! Shared arrays belong to one reduction (written and read once) or to one scan of one pass, which takes the two halves
//! of its array in turn: a half is written again only after a barrier that follows all its reads.

use super::access::Chunk;
use super::emitter::Emitter;
use super::helpers::Helper;
use super::{Dialect, spell};
use crate::graph::{Const, Id, Node};
use crate::{ReduceOp, ScanOp, Ty};

impl From<ReduceOp> for ScanOp {
    /// How two partial results meet. Positions are not combined this way.
    fn from(op: ReduceOp) -> Self {
        match op {
            ReduceOp::Sum => Self::Sum,
            ReduceOp::Prod => Self::Prod,
            ReduceOp::Max | ReduceOp::ArgMax => Self::Max,
            ReduceOp::Min | ReduceOp::ArgMin => Self::Min,
        }
    }
}

impl Emitter<'_> {
    /// Two partial results as one.
    pub fn combine(&mut self, op: ScanOp, ty: Ty, a: &str, b: &str) -> String {
        let sign = match op {
            ScanOp::Sum => '+',
            ScanOp::Prod => '*',
            ScanOp::Max | ScanOp::Min if ty == Ty::F32 => {
                let (helper, name) =
                    if op == ScanOp::Max { (Helper::Max, "zk_max") } else { (Helper::Min, "zk_min") };
                self.need(helper);
                return format!("{name}({a}, {b})");
            }
            ScanOp::Max => return format!("{b} > {a} ? {b} : {a}"),
            ScanOp::Min => return format!("{b} < {a} ? {b} : {a}"),
        };
        let name = self.dialect.ty(ty);
        match ty {
            Ty::F32 => self.float_binary(sign, a, b),
            Ty::I32 => format!("{name}(uint32_t({a}) {sign} uint32_t({b}))"),
            Ty::I64 => format!("{name}(uint64_t({a}) {sign} uint64_t({b}))"),
            _ => format!("{a} {sign} {b}"),
        }
    }

    /// What an empty row gives.
    fn start(&self, op: ScanOp, ty: Ty) -> String {
        match op {
            ScanOp::Sum => self.dialect.literal(Const::Int(0), ty),
            ScanOp::Prod => self.dialect.literal(Const::Int(1), ty),
            ScanOp::Max => spell::extreme(self.dialect, ty, false),
            ScanOp::Min => spell::extreme(self.dialect, ty, true),
        }
    }

    /// The helper that orders values with their places.
    pub fn goes_before(&mut self, op: ReduceOp) -> &'static str {
        if op == ReduceOp::ArgMax {
            self.need(Helper::Above);
            return "zk_above";
        }
        self.need(Helper::Below);
        "zk_below"
    }

    fn shuffle(&mut self, kind: &str, ty: Ty, value: &str, by: &str) -> String {
        if self.dialect == Dialect::Cuda {
            let kind = if kind.is_empty() { "" } else { &format!("{kind}_") };
            return format!("__shfl_{kind}sync(0xffffffffu, {value}, {by})");
        }
        let kind = if kind.is_empty() { String::new() } else { format!("_{kind}") };
        if matches!(ty, Ty::I64 | Ty::U64) {
            self.need(Helper::Shuffle64);
            return format!("zk_shuffle{kind}({value}, ushort({by}))");
        }
        format!("simd_shuffle{kind}({value}, ushort({by}))")
    }

    /// Declares the accumulators `a<id>` (and places `i<id>`) of a thread.
    pub fn declare_accumulators(&mut self, reductions: &[Id]) {
        for &r in reductions {
            let Node::Reduce(op, x) = self.program.value(r).node else { continue };
            let ty = self.ty(x);
            let start = self.start(op.into(), ty);
            self.text.line(format!("{} a{} = {start};", self.dialect.ty(ty), r.0));
            if matches!(op, ReduceOp::ArgMax | ReduceOp::ArgMin) {
                self.text.line(format!("uint32_t i{} = 0xffffffffu;", r.0));
            }
        }
    }

    /// Reduces the threads' accumulators; every thread of the row has the results.
    pub fn reduce_team(&mut self, reductions: &[Id]) {
        let team = self.plan.team();
        for &r in reductions {
            self.butterfly(r, team.min(32));
        }
        if team > 32 && !reductions.is_empty() {
            self.reduce_groups(reductions, team / 32);
        }
        for &r in reductions {
            let Node::Reduce(op, _) = self.program.value(r).node else { continue };
            let n = r.0;
            if matches!(op, ReduceOp::ArgMax | ReduceOp::ArgMin) {
                self.declare(r, &format!("i{n} == 0xffffffffu ? 0u : i{n}"));
            } else {
                self.declare(r, &format!("a{n}"));
            }
        }
    }

    fn reduce_groups(&mut self, reductions: &[Id], groups: u32) {
        let all = self.plan.threads / 32;
        let mut places = Vec::new();
        for &r in reductions {
            let Node::Reduce(op, x) = self.program.value(r).node else { continue };
            self.shared_array(self.ty(x), &format!("z{}", r.0), all);
            places.push((format!("z{}", r.0), format!("a{}", r.0)));
            if matches!(op, ReduceOp::ArgMax | ReduceOp::ArgMin) {
                self.shared_array(Ty::U32, &format!("y{}", r.0), all);
                places.push((format!("y{}", r.0), format!("i{}", r.0)));
            }
        }
        self.text.open("if (thread_index % 32 == 0)");
        for (shared, local) in &places {
            self.text.line(format!("{shared}[thread_index / 32] = {local};"));
        }
        self.text.close();
        self.barrier();
        // Each group of 32 threads reads the row's values, again and again where they are fewer.
        let from = match self.plan.rows_per_group {
            1 => format!("thread_index % {groups}"),
            _ => format!("thread_index / {} * {groups} + thread_index % {groups}", groups * 32),
        };
        for (shared, local) in &places {
            self.text.line(format!("{local} = {shared}[{from}];"));
        }
        for &r in reductions {
            self.butterfly(r, groups);
        }
    }

    /// Reduces over aligned runs of `width` threads.
    fn butterfly(&mut self, r: Id, width: u32) {
        let Node::Reduce(op, x) = self.program.value(r).node else { return };
        let (ty, n) = (self.ty(x), r.0);
        if width < 2 {
            return;
        }
        let simple = self.dialect == Dialect::Metal && width == 32 && !matches!(ty, Ty::I64 | Ty::U64);
        if simple && op == ReduceOp::Sum {
            self.text.line(format!("a{n} = simd_sum(a{n});"));
            return;
        }
        self.unroll();
        self.text.open(format!("for (int m = {}; m > 0; m >>= 1)", width / 2));
        let other = self.shuffle("xor", ty, &format!("a{n}"), "m");
        let name = self.dialect.ty(ty);
        self.text.line(format!("const {name} b = {other};"));
        if matches!(op, ReduceOp::ArgMax | ReduceOp::ArgMin) {
            let place = self.shuffle("xor", Ty::U32, &format!("i{n}"), "m");
            let better = self.goes_before(op);
            self.text.line(format!("const uint32_t at = {place};"));
            self.text.line(format!("if ({better}(b, at, a{n}, i{n})) {{ a{n} = b; i{n} = at; }}"));
        } else {
            let text = self.combine(op.into(), ty, &format!("a{n}"), "b");
            self.text.line(format!("a{n} = {text};"));
        }
        self.text.close();
    }

    /// Declares a scan's elements in the chunk.
    pub fn declare_scan(&mut self, s: Id) {
        self.text.line(format!("{} s{}[{}];", self.dialect.ty(self.ty(s)), s.0, self.plan.vec));
    }

    /// Declares what a pass's scans carry from chunk to chunk, and their shared arrays.
    pub fn declare_carries(&mut self, scans: &[Id], pass: usize) {
        for &s in scans {
            let Node::Scan { op, .. } = self.program.value(s).node else { continue };
            let ty = self.ty(s);
            let start = self.start(op, ty);
            self.text.line(format!("{} carry{}_{pass} = {start};", self.dialect.ty(ty), s.0));
            if self.plan.team() > 32 {
                self.shared_array(ty, &format!("x{}_{pass}", s.0), 2 * self.plan.threads / 32);
            }
        }
    }

    /// Puts the operand of each scan in its array.
    pub fn feed_scans(&mut self, scans: &[Id], j: &str) {
        for &s in scans {
            let Node::Scan { op, arg, .. } = self.program.value(s).node else { continue };
            let (x, start) = (self.operand(arg), self.start(op, self.ty(s)));
            self.text.line(format!("s{}[{j}] = {} < cols ? {x} : {start};", s.0, Chunk::position(j)));
        }
    }

    /// Turns the operands in the arrays into the scans' results.
    pub fn write_scans(&mut self, scans: &[Id], pass: usize, chunk: &Chunk) {
        if scans.is_empty() {
            return;
        }
        let team = self.plan.team();
        for &s in scans {
            self.scan_threads(s, team.min(32));
        }
        if team > 32 {
            self.share_totals(scans, pass, chunk);
        }
        for &s in scans {
            self.finish_scan(s, pass, team, chunk);
        }
    }

    /// Within the thread, then across up to 32 threads: `t<id>` up to and with this thread, `e<id>` before it.
    fn scan_threads(&mut self, s: Id, width: u32) {
        let Node::Scan { op, .. } = self.program.value(s).node else { return };
        let (ty, n, vec) = (self.ty(s), s.0, self.plan.vec);
        let name = self.dialect.ty(ty);
        if vec > 1 {
            let text = self.combine(op, ty, &format!("s{n}[j - 1]"), &format!("s{n}[j]"));
            self.unroll();
            self.text.line(format!("for (int j = 1; j < {vec}; ++j) s{n}[j] = {text};"));
        }
        self.text.line(format!("{name} t{n}_all = s{n}[{}];", vec - 1));
        let start = self.start(op, ty);
        if width == 1 {
            self.text.line(format!("{name} t{n}_before = {start};"));
            return;
        }
        let lane = format!("lane % {width}");
        self.unroll();
        self.text.open(format!("for (int d = 1; d < {width}; d <<= 1)"));
        let other = self.shuffle("up", ty, &format!("t{n}_all"), "d");
        let text = self.combine(op, ty, "b", &format!("t{n}_all"));
        self.text.line(format!("const {name} b = {other};"));
        self.text.line(format!("if ({lane} >= d) t{n}_all = {text};"));
        self.text.close();
        let other = self.shuffle("up", ty, &format!("t{n}_all"), "1");
        self.text.line(format!("{name} t{n}_before = {other};"));
        self.text.line(format!("if ({lane} == 0) t{n}_before = {start};"));
    }

    /// Which half of a shared array this chunk uses.
    fn half(&self, chunk: &Chunk) -> String {
        match &chunk.slot {
            Some(_) => "k % 2".to_owned(),
            None => format!("start / {} % 2", self.plan.team() * self.plan.vec),
        }
    }

    fn share_totals(&mut self, scans: &[Id], pass: usize, chunk: &Chunk) {
        let (half, simds) = (self.half(chunk), self.plan.threads / 32);
        self.text.open("if (thread_index % 32 == 31)");
        for s in scans {
            let n = s.0;
            self.text.line(format!("x{n}_{pass}[{half} * {simds} + thread_index / 32] = t{n}_all;"));
        }
        self.text.close();
        self.barrier();
    }

    fn finish_scan(&mut self, s: Id, pass: usize, team: u32, chunk: &Chunk) {
        let Node::Scan { op, exclusive, .. } = self.program.value(s).node else { return };
        let (ty, n, vec) = (self.ty(s), s.0, self.plan.vec);
        let name = self.dialect.ty(ty);
        let total = format!("t{n}_total");
        if team > 32 {
            let (half, simds) = (self.half(chunk), self.plan.threads / 32);
            let start = self.start(op, ty);
            self.text.line(format!("{name} {total} = {start};"));
            self.text.line(format!("{name} t{n}_left = {start};"));
            self.text.open(format!("for (int g = 0; g < {}; ++g)", team / 32));
            let first = match self.plan.rows_per_group {
                1 => String::new(),
                _ => format!("thread_index / {team} * {} + ", team / 32),
            };
            let joined = self.combine(op, ty, &total, "b");
            self.text.line(format!("const {name} b = x{n}_{pass}[{half} * {simds} + {first}g];"));
            self.text.line(format!("if (g == lane / 32) t{n}_left = {total};"));
            self.text.line(format!("{total} = {joined};"));
            self.text.close();
            let before = self.combine(op, ty, &format!("t{n}_left"), &format!("t{n}_before"));
            self.text.line(format!("t{n}_before = {before};"));
        } else {
            let text = match team {
                1 => format!("t{n}_all"),
                _ => self.shuffle("", ty, &format!("t{n}_all"), &format!("thread_index % 32 | {}", team - 1)),
            };
            self.text.line(format!("const {name} {total} = {text};"));
        }
        let carry = format!("carry{n}_{pass}");
        let before = self.combine(op, ty, &carry, &format!("t{n}_before"));
        self.text.line(format!("t{n}_before = {before};"));
        let carried = self.combine(op, ty, &carry, &total);
        self.text.line(format!("{carry} = {carried};"));
        self.unroll();
        if exclusive {
            // From the last element on, as each takes the place of the one before.
            let text = self.combine(op, ty, &format!("t{n}_before"), &format!("s{n}[j - 1]"));
            self.text.line(format!("for (int j = {}; j > 0; --j) s{n}[j] = {text};", vec - 1));
            self.text.line(format!("s{n}[0] = t{n}_before;"));
        } else {
            let text = self.combine(op, ty, &format!("t{n}_before"), &format!("s{n}[j]"));
            self.text.line(format!("for (int j = 0; j < {vec}; ++j) s{n}[j] = {text};"));
        }
    }
}
