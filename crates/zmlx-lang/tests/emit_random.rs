//! Texts of random expressions in the emulator against the evaluator, both dialects, under random plans.

mod emit_support;

use emit_support::{Case, case, check, params, random};
use zmlx_lang::Dtype;

/// A generator with a known sequence.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides
    }

    fn pick<'t>(&mut self, of: &[&'t str]) -> &'t str {
        of[self.roll(of.len())]
    }

    /// An expression whose value is smooth and at most about 10, so that rounding can't change it much.
    fn expression(&mut self, depth: usize, rows: bool) -> String {
        if depth == 0 {
            return self.pick(&["x", "y", "z", "0.5", "-1.25", "(f32(index(0)) * 0.01)"]).to_owned();
        }
        let a = self.expression(depth - 1, rows);
        match self.roll(if rows { 14 } else { 9 }) {
            0 => {
                let function = self.pick(&[
                    "tanh",
                    "sigmoid",
                    "sin",
                    "cos",
                    "atan",
                    "erf",
                    "gelu_tanh",
                    "softplus",
                    "mish",
                ]);
                format!("{function}({a} * 0.3)")
            }
            1 => format!("exp(-abs({a}))"),
            2 => format!("log1p(abs({a}))"),
            3 => format!("({a}) / (1 + abs({}))", self.expression(depth - 1, rows)),
            4 => format!("sqrt(1 + ({a}) * ({a}))"),
            5 => format!("(x > y ? {a} : {})", self.expression(depth - 1, rows)),
            6 => format!("max({a}, {})", self.expression(depth - 1, rows)),
            7 => format!("({a}) * 0.5 + {}", self.expression(depth - 1, rows)),
            8 => format!("({a}) - 0.25 * ({})", self.expression(depth - 1, rows)),
            9 => format!("row_mean({a})"),
            10 => format!("row_max({a})"),
            11 => format!("row_min({a}) * ({})", self.pick(&["x", "y", "0.5"])),
            12 => format!("cumsum({a}) * 0.02"),
            _ => format!("cummax({a})"),
        }
    }
}

fn cases(seed: u64, count: usize, rows: bool) -> Vec<Case> {
    let mut dice = Dice(seed);
    (0..count)
        .map(|i| {
            let depth = 2 + dice.roll(3);
            let body = dice.expression(depth, rows);
            // All inputs take part, so that the domain is known.
            let row = if rows { " + 0 * row_sum(x)" } else { "" };
            let text = format!("f(x, y, z) = ({body}) + 0 * (x + y + z){row}");
            let outer = [3, 2];
            let cols = [1, 5, 32, 70][dice.roll(4)];
            let shapes: [&[usize]; 4] = [&[3, 2, cols], &[cols], &[outer[0], 1, 1], &[2, cols]];
            let dtype = [Dtype::F32, Dtype::F32, Dtype::F16, Dtype::Bf16][dice.roll(4)];
            let mut input = |k: u64| random(dtype, shapes[dice.roll(4)], seed + i as u64 * 3 + k);
            let inputs = [random(dtype, shapes[0], seed), input(1), input(2)];
            let (vec, rows_per_group) = ([1, 2, 4, 8][dice.roll(4)], [1, 2, 4, 32][dice.roll(4)]);
            let threads = [32, 64, 128][dice.roll(3)];
            let held = u32::try_from(cols).unwrap().div_ceil(threads / rows_per_group * vec);
            let p = match rows {
                true if held * vec <= 32 && dice.roll(3) > 0 => params(threads, vec, rows_per_group, held),
                true => params(threads, vec, rows_per_group, 0),
                false => params(threads, vec, 1, 1 + dice.roll(2) as u32),
            };
            let c = case(&text, &inputs, p).tolerance(1e-4, 1e-4);
            let c = if dice.roll(4) == 0 { c.wide() } else { c };
            if dice.roll(4) == 0 { c.strided() } else { c }
        })
        .collect()
}

#[test]
fn random_elementwise_kernels() {
    check(&cases(11, 60, false));
}

#[test]
fn random_row_kernels() {
    check(&cases(12, 80, true));
}
