//! The CPU engine against the double-precision evaluator: every operation, every reduction and scan, random kernels,
//! odd shapes, every storage dtype.

use zmlx_kernels::lang::eval::{self, Data, Tensor};
use zmlx_kernels::lang::{Dtype, Op, ReduceOp, ScanOp, Signature, text};
use zmlx_kernels::{Array, Kernel};
use zmlx_mlx::Device;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A generator with a known sequence.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides
    }

    fn number(&mut self) -> f64 {
        (self.roll(4001) as f64 - 2000.0) / 1000.0
    }

    fn pick<'t>(&mut self, of: &[&'t str]) -> &'t str {
        of[self.roll(of.len())]
    }

    /// An expression whose value is smooth and at most about 10, so that rounding can't change it much.
    fn expression(&mut self, depth: usize) -> String {
        if depth == 0 {
            return self.pick(&["x", "y", "z", "0.5", "-1.25", "(f32(index(0)) * 0.001)"]).to_owned();
        }
        let a = self.expression(depth - 1);
        match self.roll(15) {
            0 => format!(
                "{}({a} * 0.3)",
                self.pick(&["tanh", "sigmoid", "sin", "erf", "gelu", "gelu_tanh", "silu", "mish"])
            ),
            1 => format!("exp(-abs({a}))"),
            2 => format!("log1p(abs({a}))"),
            3 => format!("({a}) / (1 + abs({}))", self.expression(depth - 1)),
            4 => format!("sqrt(1 + ({a}) * ({a}))"),
            5 => format!("(x > y ? {a} : {})", self.expression(depth - 1)),
            6 => format!("max({a}, {})", self.expression(depth - 1)),
            7 => format!("silu({a}) * ({})", self.expression(depth - 1)),
            8 => format!("({a}) * 0.5 * ({})", self.pick(&["x", "y", "z"])),
            9 => format!("row_mean({a})"),
            10 => format!("exp({a} - row_max({a}))"),
            11 => format!("row_mean(({a}) * ({}))", self.expression(depth - 1)),
            12 => format!("cumsum({a}) * 0.001"),
            13 => format!("cummax_reverse({a})"),
            _ => format!("row_min({a}) * 0.5"),
        }
    }
}

fn array(t: &Tensor) -> Result<Array> {
    let shape: Vec<i32> = t.shape.iter().map(|d| *d as i32).collect();
    let to = match t.dtype {
        Dtype::Bool => zmlx_mlx::Dtype::Bool,
        Dtype::U8 => zmlx_mlx::Dtype::Uint8,
        Dtype::U16 => zmlx_mlx::Dtype::Uint16,
        Dtype::U32 => zmlx_mlx::Dtype::Uint32,
        Dtype::U64 => zmlx_mlx::Dtype::Uint64,
        Dtype::I8 => zmlx_mlx::Dtype::Int8,
        Dtype::I16 => zmlx_mlx::Dtype::Int16,
        Dtype::I32 => zmlx_mlx::Dtype::Int32,
        Dtype::I64 => zmlx_mlx::Dtype::Int64,
        Dtype::F16 => zmlx_mlx::Dtype::Float16,
        Dtype::Bf16 => zmlx_mlx::Dtype::Bfloat16,
        Dtype::F32 => zmlx_mlx::Dtype::Float32,
    };
    let wide = match &t.data {
        Data::Float(v) => Array::from_slice(&v.iter().map(|v| *v as f32).collect::<Vec<_>>(), &shape)?,
        Data::Int(v) if t.dtype == Dtype::U64 => {
            Array::from_slice(&v.iter().map(|v| *v as u64).collect::<Vec<_>>(), &shape)?
        }
        Data::Int(v) => Array::from_slice(&v.iter().map(|v| *v as i64).collect::<Vec<_>>(), &shape)?,
    };
    Ok(wide.astype(to)?)
}

fn read(a: &Array) -> Result<Vec<f64>> {
    Ok(match a.dtype() {
        zmlx_mlx::Dtype::Uint64 => a.to_vec::<u64>()?.into_iter().map(|v| v as f64).collect(),
        zmlx_mlx::Dtype::Float32 | zmlx_mlx::Dtype::Float16 | zmlx_mlx::Dtype::Bfloat16 => {
            a.astype(zmlx_mlx::Dtype::Float32)?.to_vec::<f32>()?.into_iter().map(f64::from).collect()
        }
        _ => a.astype(zmlx_mlx::Dtype::Int64)?.to_vec::<i64>()?.into_iter().map(|v| v as f64).collect(),
    })
}

/// Inputs that both sides see: floats rounded to their dtype.
fn tensor(dtype: Dtype, shape: &[usize], values: &[f64]) -> Tensor {
    let value = |v: f64| match dtype {
        Dtype::F16 => half::f16::from_f64(v).to_f64(),
        Dtype::Bf16 => half::bf16::from_f64(v).to_f64(),
        _ => f64::from(v as f32),
    };
    if dtype.is_float() {
        return Tensor::float(shape, dtype, values.iter().map(|v| value(*v)).collect());
    }
    let signed = matches!(dtype, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64);
    let int = |v: f64| match dtype {
        Dtype::Bool => i128::from(v > 0.0),
        _ if signed => (v * 40.0) as i128,
        _ => (v * 40.0).abs() as i128,
    };
    Tensor::int(shape, dtype, values.iter().map(|v| int(*v)).collect())
}

/// Runs a text on both and lists differences.
fn differences(what: &str, inputs: &[Tensor], relative: f64, absolute: f64) -> Result<Vec<String>> {
    let lang = text::elementwise(None, what).map_err(|e| format!("{what}: {e}"))?;
    let expected =
        eval::evaluate(&lang, inputs, &eval::Shapes::default()).map_err(|e| format!("{what}: {e}"))?;
    let kernel = Kernel::from_ir(lang)?;
    let arrays = inputs.iter().map(array).collect::<Result<Vec<_>>>()?;
    let found =
        zmlx_mlx::stream::with_device(Device::Cpu, || Ok(kernel.call(&arrays.iter().collect::<Vec<_>>())?))?;
    let mut out = Vec::new();
    for (f, e) in found.iter().zip(&expected) {
        let shape: Vec<usize> = f.shape().iter().map(|d| *d as usize).collect();
        if shape != e.shape {
            out.push(format!("{what}: shape {shape:?}, not {:?}", e.shape));
            continue;
        }
        for (i, (f, e)) in read(f)?.iter().zip(e.to_f64()).enumerate() {
            // What does not fit into single precision is an infinity there.
            let e = if e.abs() > f64::from(f32::MAX) { e.signum() * f64::INFINITY } else { e };
            let same = *f == e || f.is_nan() && e.is_nan() || (f - e).abs() <= absolute + relative * e.abs();
            if !same {
                out.push(format!(
                    "{what} on {:?} {:?}: element {i} is {f}, not {e}",
                    inputs[0].dtype, inputs[0].shape
                ));
                break;
            }
        }
    }
    Ok(out)
}

fn random(dice: &mut Dice, dtype: Dtype, shape: &[usize]) -> Tensor {
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| dice.number()).collect();
    tensor(dtype, shape, &values)
}

#[test]
fn every_operation_on_every_dtype_it_takes() -> Result<()> {
    let mut dice = Dice(1);
    let mut failures = Vec::new();
    for &op in Op::ALL {
        let names = &["a", "b", "c"][..op.arity()];
        let call = match op.signature() {
            Signature::Select => "select(a > 0, b, c)".to_owned(),
            _ => format!("{}({})", op.name(), names.join(", ")),
        };
        for dtype in Dtype::ALL {
            let float_only = matches!(op.signature(), Signature::Float | Signature::FloatTest);
            let shift = matches!(op, Op::Shl | Op::Shr);
            let fits = match op.signature() {
                Signature::Float | Signature::FloatTest => dtype.is_float() || dtype == Dtype::I32,
                Signature::Integer => {
                    !dtype.is_float() && (dtype != Dtype::Bool || !shift && op != Op::Popcount)
                }
                _ => true,
            };
            if !fits || float_only && dtype == Dtype::Bool {
                continue;
            }
            let inputs: Vec<Tensor> = names.iter().map(|_| random(&mut dice, dtype, &[3, 41])).collect();
            // Storing rounds to the inputs' dtype.
            let relative = match dtype {
                Dtype::F16 => 1e-3,
                Dtype::Bf16 => 8e-3,
                _ => 1e-5,
            };
            failures.extend(differences(
                &format!("f(a, b, c) = {call}").replace("f(a, b, c)", &format!("f({})", names.join(", "))),
                &inputs,
                relative,
                relative,
            )?);
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

#[test]
fn every_reduction_and_scan_on_odd_shapes() -> Result<()> {
    let mut dice = Dice(2);
    let mut failures = Vec::new();
    let mut texts: Vec<String> = ReduceOp::ALL.iter().map(|r| format!("f(x) = {}(x)", r.name())).collect();
    for scan in ScanOp::ALL {
        for suffix in ["", "_exclusive", "_reverse", "_exclusive_reverse"] {
            texts.push(format!("f(x) = {}{suffix}(x * 0.9)", scan.name()));
        }
    }
    texts.push("f(x) = cumsum(x) + cumsum_reverse(x) * row_max(cummax(x))".to_owned());
    for shape in [
        vec![1],
        vec![0],
        vec![3, 0],
        vec![0, 3],
        vec![5, 1],
        vec![2, 3, 7],
        vec![1, 3000],
        vec![2, 70001],
        vec![1, 300_007],
        vec![513, 33],
    ] {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::I32, Dtype::U8, Dtype::I64] {
            let x = random(&mut dice, dtype, &shape);
            for text in &texts {
                let long = shape.iter().product::<usize>() > 5000;
                // Sums of many numbers that cancel.
                let absolute = if long { 2e-2 } else { 1e-4 };
                let relative = if dtype == Dtype::Bf16 { 1e-2 } else { 1e-4 };
                // Products of thousands of integers wrap the same; of floats they vanish.
                let slow = long && text.contains("cum") && dtype != Dtype::F32;
                if !slow {
                    failures.extend(differences(text, std::slice::from_ref(&x), relative, absolute)?);
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

#[test]
fn random_kernels_equal_the_evaluator() -> Result<()> {
    let mut dice = Dice(3);
    let mut failures = Vec::new();
    for round in 0..400 {
        let depth = 1 + round % 4;
        let expression = dice.expression(depth);
        let text = format!("f(x, y, z) = {expression}, x + y * z");
        let (rows, cols) = (1 + dice.roll(5), [1, 7, 64, 300, 1025, 5000][dice.roll(6)]);
        let x = random(&mut dice, Dtype::F32, &[rows, cols]);
        let (y_cols, z_cols) = ([1, cols][dice.roll(2)], [1, cols][dice.roll(2)]);
        let y = random(&mut dice, Dtype::F32, &[y_cols]);
        let z = random(&mut dice, Dtype::F32, &[rows, z_cols]);
        failures.extend(differences(&text, &[x, y, z], 1e-4, 1e-4)?);
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

#[test]
fn special_values_travel() -> Result<()> {
    let special = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, 1.0, -1.0, 3.4e38, 1e-45];
    let mut a = Vec::new();
    let mut b = Vec::new();
    for x in special {
        for y in special {
            a.push(x);
            b.push(y);
        }
    }
    let n = [a.len()];
    let (a, b) = (tensor(Dtype::F32, &n, &a), tensor(Dtype::F32, &n, &b));
    let mut failures = Vec::new();
    for text in [
        "max(a, b)",
        "min(a, b)",
        "a + b",
        "a * b",
        "a < b ? a : b",
        "isnan(a) || isinf(b)",
        "sign(a) + b * 0",
        "exp(a) + b * 0",
    ] {
        failures.extend(differences(&format!("f(a, b) = {text}"), &[a.clone(), b.clone()], 1e-6, 1e-45)?);
    }
    for text in ["row_max(a)", "row_min(a)", "row_argmax(a)", "row_argmin(a)", "cummax(a)"] {
        failures.extend(differences(&format!("f(a) = {text}"), std::slice::from_ref(&a), 0.0, 0.0)?);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[test]
fn large_outputs_are_streamed_and_equal_small_ones() -> Result<()> {
    // 16 MiB of output goes past the caches; the same rows in small calls do not.
    let (rows, cols) = (1024, 4099);
    let values: Vec<f32> =
        (0..rows * cols).map(|i| ((i * 2_654_435_761_usize) % 1000) as f32 / 250.0 - 2.0).collect();
    let x = Array::from_slice(&values, &[rows as i32, cols as i32])?;
    zmlx_mlx::stream::with_device(Device::Cpu, || {
        for text in [
            "f(x) = silu(x) * x",
            "f(x) = let e = exp(x - row_max(x)); e / row_sum(e)",
            "f(x) = x * rsqrt(row_mean(x * x)) * x",
            "f(x) = floor(x)",
        ] {
            let kernel = Kernel::new(text)?;
            let large = kernel.call1(&[&x])?;
            for start in [0, 500, 1023] {
                let part = x.slice_axis(0, start, start + 1)?;
                let small = kernel.call1(&[&part])?.to_vec::<f32>()?;
                assert_eq!(
                    large.slice_axis(0, start, start + 1)?.to_vec::<f32>()?,
                    small,
                    "{text} row {start}"
                );
            }
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn failures_name_what_is_wrong() -> Result<()> {
    let x = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3])?;
    let kernel = Kernel::new("f(x, w) = x * w")?;
    let message = |r: zmlx_kernels::Result<Vec<Array>>| r.map(|_| ()).unwrap_err().to_string();
    assert_eq!(message(kernel.call(&[&x])), "kernel f takes x, w; 1 arrays were given");
    let two = Array::from_slice(&[1.0f32, 2.0], &[2])?;
    assert!(
        message(kernel.call(&[&x, &two])).contains("does not broadcast"),
        "{}",
        message(kernel.call(&[&x, &two]))
    );
    let double = zmlx_mlx::stream::with_device(Device::Cpu, || x.astype(zmlx_mlx::Dtype::Float64))?;
    assert!(message(kernel.call(&[&double, &x])).contains("float64"));
    let gather = Kernel::new("g(t: array[1], i: i32) = t[i]")?;
    let out = Array::from_slice(&[0i32, 7], &[2])?;
    let failed =
        zmlx_mlx::stream::with_device(Device::Cpu, || gather.call1(&[&x, &out]).map_err(Into::into))?
            .to_vec::<f32>();
    let text = failed.map(|_| ()).unwrap_err().to_string();
    assert!(text.contains("t is read at [7], outside its shape [3]"), "{text}");
    assert!(Kernel::new("x +* 2").unwrap_err().to_string().contains('^'));
    Ok(())
}

/// Needs 5 GB and half a minute: `cargo test --release -p zmlx-kernels --test engine -- --ignored`.
#[test]
#[ignore = "large"]
fn more_than_two_to_the_31_elements() -> Result<()> {
    zmlx_mlx::stream::with_device(Device::Cpu, || {
        let (rows, cols) = (65_537, 32_771);
        let x = zmlx_mlx::ops::zeros(&[rows, cols], zmlx_mlx::Dtype::Uint8)?;
        let places = Kernel::new("f(x) -> (y: u8) = index(1) * 7 + index(0) * 3 + i32(x)")?;
        let y = places.call1(&[&x])?;
        for row in [0, 1, 65_535, 65_536] {
            let found = y.slice_axis(0, row, row + 1)?.to_vec::<u8>()?;
            for col in [0, 1, 32_770] {
                assert_eq!(found[col as usize], (row * 7 + col * 3) as u8, "row {row} column {col}");
            }
        }
        Ok(())
    })?;
    Ok(())
}
