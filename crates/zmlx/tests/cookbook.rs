//! The code of the documents, run. What stands between `// DOCUMENT: TITLE` and `// end` is a code block of that
//! document; `documents_show_this_code` compares the two.

use std::sync::LazyLock;

use zmlx::kernels::lang::Dtype as Store;
use zmlx::kernels::lang::emit::Dialect;
use zmlx::kernels::raw::{GpuLaunch, RawKernel, Spec, TemplateArg};
use zmlx::kernels::{Error, elementwise, map_reduce, raw_kernel, reduce, scan};
use zmlx::prelude::*;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn close(found: &Array, expected: &[f32], tolerance: f32) -> Result {
    let found = found.astype(Dtype::Float32)?.to_vec::<f32>()?;
    let near = |(f, e): (&f32, &f32)| (f - e).abs() <= tolerance * (1.0 + e.abs());
    let same = found.len() == expected.len() && found.iter().zip(expected).all(near);
    assert!(same, "found    {found:?}\nexpected {expected:?}");
    Ok(())
}

fn ramp(rows: i32, cols: i32) -> Result<Array> {
    let values = (0..rows * cols).map(|i| (i * 37 % 101) as f32 / 17.0 - 2.9).collect();
    Ok(Array::from_vec(values, &[rows, cols])?)
}

#[test]
fn quick_start() -> Result {
    // docs/quick-start-kernels.md: first
    let mish = Kernel::new("x * tanh(log(1 + exp(x)))")?;
    let x = Array::from_slice(&[-1.0f32, 0.0, 2.0], &[3])?;
    println!("{}", mish.call1(&[&x])?);

    let total = |a: &[Array]| mish.call1(&[&a[0]])?.sum_all();
    println!("{}", transforms::grad(total, &[0])(&[&x])?[0]);
    // end
    close(&mish.call1(&[&x])?, &[-0.303_401_5, 0.0, 1.943_959], 1e-6)?;

    // docs/quick-start-kernels.md: macro
    #[zmlx::kernel]
    fn rms_norm(x: f32, weight: f32, #[scalar = 1e-5] eps: f32) -> f32 {
        x * rsqrt(row_mean(x * x) + eps) * weight
    }

    let x = Array::from_slice(&[3.0f32, 4.0, 6.0, 8.0], &[2, 2])?;
    let weight = Array::from_slice(&[1.0f32, 2.0], &[2])?;
    let y = rms_norm(&x, &weight, None)?;
    let softer = rms_norm(&x, &weight, Some(0.1))?;
    // end
    close(&y, &mlx_rms(&x, &weight, 1e-5)?, 1e-6)?;
    close(&softer, &mlx_rms(&x, &weight, 0.1)?, 1e-6)?;

    // docs/quick-start-kernels.md: errors
    let error = Kernel::new("x * tahn(x)").expect_err("tahn is no function");
    println!("{error}");
    // end
    let page = include_str!("../../../docs/quick-start-kernels.md");
    assert!(page.contains(error.to_string().trim_end()), "the page shows another message than\n{error}");

    let here = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3])?;
    // docs/quick-start-kernels.md: shapes
    let sum = Kernel::new("add(a, b) = a + b")?;
    let error = sum.call(&[&x, &here]).expect_err("[2, 2] and [3]");
    println!("{error}");
    // end
    assert!(error.to_string().contains("does not broadcast"), "{error}");
    Ok(())
}

fn mlx_rms(x: &Array, weight: &Array, eps: f32) -> Result<Vec<f32>> {
    Ok(fast::rms_norm(x, Some(weight), eps)?.to_vec::<f32>()?)
}

#[test]
fn readme() -> Result {
    // README.md: kernels
    let swiglu = Kernel::new("gate * sigmoid(gate) * up")?;
    let (gate, up) = (Array::from_slice(&[1.0f32, -2.0], &[2])?, Array::from_slice(&[3.0f32, 0.5], &[2])?);
    let y = swiglu.call1(&[&gate, &up])?;
    let gradients = transforms::grad(|a| swiglu.call1(&[&a[0], &a[1]])?.sum_all(), &[0, 1])(&[&gate, &up])?;
    // end
    let silu = |a: &[Array]| a[0].multiply(&a[0].sigmoid()?)?.multiply(&a[1]);
    let inputs = [gate, up];
    close(&y, &silu(&inputs)?.to_vec::<f32>()?, 1e-6)?;
    let theirs = transforms::grad(|a| silu(a)?.sum_all(), &[0, 1])(&[&inputs[0], &inputs[1]])?;
    for (ours, theirs) in gradients.iter().zip(&theirs) {
        close(ours, &theirs.to_vec::<f32>()?, 1e-6)?;
    }
    Ok(())
}

#[test]
fn activation() -> Result {
    // docs/cookbook.md: activation
    let squareplus = elementwise("0.5 * (x + sqrt(x * x + 4))")?;
    let x = Array::from_slice(&[-1.5f32, 0.0, 1.5], &[3])?;
    assert_eq!(squareplus.call1(&[&x])?.to_vec::<f32>()?, [0.5, 1.0, 2.0]);

    let slope = transforms::grad(|a| squareplus.call1(&[&a[0]])?.sum_all(), &[0]);
    println!("{}", slope(&[&x])?[0]); // 0.2, 0.5, 0.8

    // Any float dtype: computed in f32, stored as the input is.
    let half = x.astype(Dtype::Bfloat16)?;
    assert_eq!(squareplus.call1(&[&half])?.dtype(), Dtype::Bfloat16);
    // end
    close(&slope(&[&x])?[0], &[0.2, 0.5, 0.8], 1e-6)
}

#[test]
fn broadcasting() -> Result {
    // docs/cookbook.md: broadcasting
    let kernel = Kernel::new(
        "leaky_bias(x, bias, slope: scalar = 0.1) =
           let t = x + bias;
           t > 0 ? t : slope * t",
    )?;
    let x = Array::from_slice(&[1.0f32, -4.0, 3.0, -8.0], &[2, 2])?;
    let bias = Array::from_slice(&[1.0f32, 0.0], &[2])?;

    let y = kernel.bind(&[&x, &bias]).scalar("slope", 0.25).run1()?;
    assert_eq!(y.to_vec::<f32>()?, [2.0, -1.0, 4.0, -2.0]);

    // The gradient of what was broadcast is summed over the axes it was broadcast along.
    let loss = |a: &[Array]| kernel.bind(&[&a[0], &a[1]]).scalar("slope", 0.25).run1()?.sum_all();
    assert_eq!(transforms::grad(loss, &[1])(&[&x, &bias])?[0].to_vec::<f32>()?, [2.0, 0.5]);
    // end
    let default = kernel.call1(&[&x, &bias])?;
    close(&default, &[2.0, -0.4, 4.0, -0.8], 1e-6)?;
    let unknown = kernel.bind(&[&x, &bias]).scalar("slop", 0.25).run1().expect_err("no such scalar");
    assert!(unknown.to_string().contains("slope = 0.1"), "{unknown}");
    Ok(())
}

#[test]
fn row_reduction() -> Result {
    // docs/cookbook.md: row reduction
    let norm = reduce("sqrt(row_sum(x * x))")?;
    let x = Array::from_slice(&[3.0f32, 4.0, 0.0, 5.0, 12.0, 0.0], &[2, 3])?;
    let y = norm.call1(&[&x])?;
    assert_eq!((y.shape(), y.to_vec::<f32>()?), (&[2][..], vec![5.0, 13.0]));

    // Several outputs; `keep` leaves the last axis as 1.
    let summary = reduce(
        "summary(x) -> (mean: f32 keep, largest, place: i32) =
           row_mean(x), row_max(x), row_argmax(x)",
    )?;
    let outputs = summary.call(&[&x])?;
    assert_eq!(outputs[0].shape(), [2, 1]);
    assert_eq!(outputs[1].to_vec::<f32>()?, [4.0, 12.0]);
    assert_eq!(outputs[2].to_vec::<i32>()?, [1, 1]);

    // Rows are the last axis. For another one, move it there.
    let columns = norm.call1(&[&x.transpose(&[1, 0])?])?;
    assert_eq!(columns.shape(), [3]);
    // end
    close(&outputs[0], &[7.0 / 3.0, 17.0 / 3.0], 1e-6)?;
    close(&columns, &[34f32.sqrt(), 160f32.sqrt(), 0.0], 1e-6)?;
    Ok(())
}

#[test]
fn softmax() -> Result {
    // docs/cookbook.md: map and reduce
    let attention = map_reduce(
        "attention(scores, scale: scalar = 1.0) =
           let s = index(0) <= index(1) ? scores * scale : -inf;
           let e = exp(s - row_max(s));
           e / row_sum(e)",
    )?;
    let scores = Array::from_slice(&[0.0f32; 9], &[3, 3])?;
    let y = attention.bind(&[&scores]).scalar("scale", 0.125).run1()?.to_vec::<f32>()?;
    assert_eq!(y[..6], [1.0, 0.0, 0.0, 0.5, 0.5, 0.0]);
    // end
    close(&Array::from_slice(&y[6..], &[3])?, &[1.0 / 3.0; 3], 1e-6)?;

    let (x, weight) = (ramp(3, 3)?, ramp(3, 3)?.square()?);
    let loss = |a: &[Array]| attention.call1(&[&a[0]])?.multiply(&weight)?.sum_all();
    let mask = Array::from_slice(&[0.0, -1e9, -1e9, 0.0, 0.0, -1e9, 0.0, 0.0, 0.0f32], &[3, 3])?;
    let reference = |a: &[Array]| a[0].add(&mask)?.softmax(&[-1], true)?.multiply(&weight)?.sum_all();
    let theirs = transforms::grad(reference, &[0])(&[&x])?.remove(0);
    close(&transforms::grad(loss, &[0])(&[&x])?[0], &theirs.to_vec::<f32>()?, 1e-5)
}

#[test]
fn norm() -> Result {
    let (x, weight) = (ramp(4, 6)?, ramp(1, 6)?.reshape(&[6])?);
    // docs/cookbook.md: norm
    let layer_norm = Kernel::new(
        "layer_norm(x, weight, eps: scalar = 1e-5) =
           (x - row_mean(x)) * rsqrt(row_var(x) + eps) * weight",
    )?;
    let loss = |a: &[Array]| layer_norm.call1(&[&a[0], &a[1]])?.square()?.sum_all();

    // With respect to both inputs, each in the shape of its input.
    let first = transforms::grad(loss, &[0, 1])(&[&x, &weight])?;
    assert_eq!((first[0].shape(), first[1].shape()), (x.shape(), weight.shape()));

    // The gradient of the gradient's squared length.
    let slope = |a: &[Array]| transforms::grad(loss, &[0])(&[&a[0], &a[1]])?[0].square()?.sum_all();
    let second = transforms::grad(slope, &[0])(&[&x, &weight])?.remove(0);
    // end
    let reference = |a: &[Array]| {
        let centred = a[0].subtract(&a[0].mean(&[-1], true)?)?;
        let variance = centred.square()?.mean(&[-1], true)?;
        let scale = variance.add(&Array::scalar(1e-5f32)?)?.rsqrt()?;
        centred.multiply(&scale)?.multiply(&a[1])?.square()?.sum_all()
    };
    for (ours, theirs) in first.iter().zip(&transforms::grad(reference, &[0, 1])(&[&x, &weight])?) {
        close(ours, &theirs.to_vec::<f32>()?, 1e-4)?;
    }
    let slope = |a: &[Array]| transforms::grad(reference, &[0])(&[&a[0], &a[1]])?[0].square()?.sum_all();
    let theirs = transforms::grad(slope, &[0])(&[&x, &weight])?.remove(0);
    close(&second, &theirs.to_vec::<f32>()?, 1e-3)
}

#[test]
fn own_gradient() -> Result {
    // docs/cookbook.md: own gradient
    let round = Kernel::builder("straight_through_round")
        .input("x")
        .output("y", "round(x)")
        .gradient("x", "g") // g is the cotangent of the output; inputs and outputs may be used too
        .build()?;
    let x = Array::from_slice(&[0.4f32, 1.5, -2.6], &[3])?;
    assert_eq!(round.call1(&[&x])?.to_vec::<f32>()?, [0.0, 2.0, -3.0]);

    let loss = |a: &[Array]| round.call1(&[&a[0]])?.square()?.sum_all();
    assert_eq!(transforms::grad(loss, &[0])(&[&x])?[0].to_vec::<f32>()?, [0.0, 4.0, -6.0]);
    // end
    let plain = Kernel::new("round(x)")?;
    let loss = |a: &[Array]| plain.call1(&[&a[0]])?.square()?.sum_all();
    assert_eq!(transforms::grad(loss, &[0])(&[&x])?[0].to_vec::<f32>()?, [0.0; 3], "derived: flat");
    let forward = transforms::jvp(|a| Ok(round.call(&[&a[0]])?), &[&x], &[&x]);
    assert!(forward.is_err(), "a given gradient says nothing of forward mode");
    Ok(())
}

#[test]
fn rust_functions() -> Result {
    // docs/cookbook.md: Rust functions
    /// `e^x` to fourth order, and 0 for what is far below.
    #[zmlx::kernel]
    fn short_exp(x: f32) -> f32 {
        const TERMS: [f32; 4] = [1.0, 1.0 / 2.0, 1.0 / 6.0, 1.0 / 24.0];
        let mut sum = 1.0;
        let mut power = 1.0;
        for term in TERMS {
            power *= x;
            sum += term * power;
        }
        if x < -2.0 { 0.0 } else { sum }
    }

    /// Two outputs, and scalars: one that must be given, one with a default.
    #[zmlx::kernel]
    fn clip(x: f32, #[scalar] limit: f32, #[scalar = 0.0] centre: f32) -> (f32, bool) {
        let d = x - centre;
        (centre + d.clamp(-limit, limit), d.abs() > limit)
    }

    let x = Array::from_slice(&[-4.0f32, 0.0, 1.0], &[3])?;
    let y = short_exp(&x)?;
    let (clipped, cut) = clip(&x, 2.0, None)?;
    assert_eq!(clipped.to_vec::<f32>()?, [-2.0, 0.0, 1.0]);
    assert_eq!(cut.to_vec::<bool>()?, [true, false, false]);

    // The kernel itself: text, sources, counts.
    println!("{}", short_exp::kernel().text());

    // A closure over elements, without a name.
    let shifted_relu = zmlx::elementwise!(|x, shift| (x + shift).max(0.0));
    let shift = Array::scalar(1.5f32)?;
    assert_eq!(shifted_relu.call1(&[&x, &shift])?.to_vec::<f32>()?, [0.0, 1.5, 2.5]);
    // end
    close(&y, &[0.0, 1.0, 2.708_333_3], 1e-6)?;
    let slope = transforms::grad(|a| short_exp(&a[0])?.sum_all(), &[0])(&[&x])?.remove(0);
    close(&slope, &[0.0, 1.0, 2.666_666_7], 1e-6)?;
    let (off_centre, _) = clip(&x, 1.0, Some(-1.0))?;
    assert_eq!(off_centre.to_vec::<f32>()?, [-2.0, 0.0, 0.0]);
    Ok(())
}

/// Signatures that the macro makes, beyond those of the recipe.
#[test]
fn macro_signatures() -> Result {
    #[zmlx::kernel]
    fn offsets(
        x: f32,
        #[row] row: i32,
        #[array(1)] table: f32,
        #[scalar = 3] by: u8,
        #[scalar = 1] seed: u64,
        #[scalar] negate: bool,
        #[scalar = 0.5] half: f16,
    ) -> (f32, u32, i32) {
        let at = table.clamp_at([row]);
        let value = x * half + at;
        (if negate { -value } else { value }, random(seed), row + by as i32)
    }
    let x = Array::from_slice(&[1.0f32, 2.0, 3.0, 4.0], &[2, 2])?;
    let rows = Array::from_slice(&[1i32, 9], &[2, 1])?;
    let table = Array::from_slice(&[10.0f32, 20.0], &[2])?;
    let (plain, drawn, shifted) = offsets(&x, &rows, &table, None, None, false, None)?;
    assert_eq!(plain.to_vec::<f32>()?, [20.5, 21.0, 21.5, 22.0]);
    assert_eq!(shifted.to_vec::<i32>()?, [4, 4, 12, 12]);
    let seed = (1 << 40) + 1;
    let (other, redrawn, shifted) = offsets(&x, &rows, &table, Some(255), Some(seed), true, Some(2.0))?;
    assert_eq!(other.to_vec::<f32>()?, [-22.0, -24.0, -26.0, -28.0]);
    assert_eq!(shifted.to_vec::<i32>()?, [256, 256, 264, 264]);
    assert_ne!(drawn.to_vec::<u32>()?, redrawn.to_vec::<u32>()?, "all 64 bits of a seed count");
    let wrong = offsets(&x, &table, &table, None, None, false, None).expect_err("rows are integers");
    assert!(wrong.to_string().contains("row"), "{wrong}");
    Ok(())
}

#[test]
fn scan_gather_scatter() -> Result {
    // docs/cookbook.md: scan, gather, scatter
    let running = scan("cumsum(x)")?;
    let x = Array::from_slice(&[1.0f32, 2.0, 3.0], &[1, 3])?;
    assert_eq!(running.call1(&[&x])?.to_vec::<f32>()?, [1.0, 3.0, 6.0]);

    // Rows of a table by number. The domain is the result's shape: ids have only one place a row.
    let embedding = Kernel::new("embedding(ids: row i32, table: array[2]) = table[ids, index(0)]")?;
    let table = Array::from_slice(&[0.0f32, 1.0, 10.0, 11.0, 20.0, 21.0], &[3, 2])?;
    let look_up = |ids: &Array, table: &Array| embedding.bind(&[ids, table]).domain(&[2, 2]).run1();
    let ids = Array::from_slice(&[2i32, 0], &[2, 1])?;
    assert_eq!(look_up(&ids, &table)?.to_vec::<f32>()?, [20.0, 21.0, 0.0, 1.0]);

    // Its gradient is a scatter: rows that nobody asked for get 0.
    let gradient = transforms::grad(|a| look_up(&ids, &a[0])?.sum_all(), &[0])(&[&table])?.remove(0);
    assert_eq!(gradient.to_vec::<f32>()?, [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]);

    // A place outside is an error when the result is computed on the CPU (on a GPU it gives NaN), unless the kernel
    // says otherwise: `t[i; zero]` and `t[i; clamp]`.
    let outside = Array::from_slice(&[3i32, 0], &[2, 1])?;
    let result =
        zmlx::mlx::stream::with_device(Device::Cpu, || Ok(look_up(&outside, &table)?.to_vec::<f32>()));
    assert!(result?.is_err());

    // Adding into places; here what lies outside is left out.
    let histogram = Kernel::new("histogram(bin: i32) -> (count: i32) = count[bin; zero] += 1")?;
    let bins = Array::from_slice(&[0i32, 2, 2, 9, -1], &[5])?;
    let counts = histogram.bind(&[&bins]).output_shape("count", &[4]).run1()?;
    assert_eq!(counts.to_vec::<i32>()?, [1, 0, 2, 0]);
    // end
    Ok(())
}

#[test]
fn dropout() -> Result {
    // docs/cookbook.md: dropout
    let dropout = Kernel::new("dropped(x, p: scalar, seed: scalar u64) = dropout(x, p, seed)")?;
    let drop = |x: &Array, seed: u64| dropout.bind(&[x]).scalar("p", 0.5).scalar("seed", seed).run1();

    let x = Array::from_slice(&[1.0f32; 64], &[64])?;
    let y = drop(&x, 7)?.to_vec::<f32>()?;
    assert!(y.iter().all(|v| *v == 0.0 || *v == 2.0));
    // The seed alone decides: again the same, and another seed another choice. No text is compiled anew for it.
    assert_eq!(drop(&x, 7)?.to_vec::<f32>()?, y);
    assert_ne!(drop(&x, 8)?.to_vec::<f32>()?, y);

    // The gradient draws the same numbers again instead of keeping a mask.
    let gradient = transforms::grad(|a| drop(&a[0], 7)?.sum_all(), &[0])(&[&x])?.remove(0);
    assert_eq!(gradient.to_vec::<f32>()?, y);
    // end
    assert_eq!(dropout.stats().programs, 1);
    Ok(())
}

#[test]
fn raw() -> Result {
    // docs/cookbook.md: raw kernel
    /// Elements of each row moved `by` places to the right; those that fall off come in on the left.
    static ROLL: LazyLock<zmlx::kernels::Result<RawKernel>> = LazyLock::new(|| {
        let wrong = |what: String| Error::Argument { kernel: "roll".to_owned(), what };
        // Shapes and dtypes of the outputs, or what is wrong with the inputs.
        let outputs = move |inputs: &[Spec], _by: &[i64]| match inputs[0].shape[..] {
            [_, 1..=i32::MAX] => Ok(vec![inputs[0].clone()]),
            _ => Err(wrong(format!("x has shape {:?}; it must be rows of at least one", inputs[0].shape))),
        };
        raw_kernel("roll", &["x"], &["y"], outputs)
            .cpu(|inputs, outputs, by| {
                let cols = inputs[0].shape()[1] as usize;
                let by = by[0].rem_euclid(cols as i64) as usize;
                let (x, y) = (inputs[0].as_slice::<f32>()?, outputs[0].as_mut_slice::<f32>()?);
                for (x, y) in x.chunks(cols).zip(y.chunks_mut(cols)) {
                    y.copy_from_slice(x);
                    y.rotate_right(by);
                }
                Ok(())
            })
            .metal(
                "",
                "uint i = thread_position_in_grid.x;
                 uint cols = x_shape[1];
                 uint col = i % cols;
                 y[i - col + (col + BY) % cols] = x[i];",
            )
            // CUDA rounds the grid up to whole blocks: guard the body.
            .cuda(
                "",
                "unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
                 unsigned cols = x_shape[1];
                 if (i >= x_shape[0] * cols) return;
                 unsigned col = i % cols;
                 y[i - col + (col + BY) % cols] = x[i];",
            )
            .launch(move |inputs, by| {
                let [rows, cols] = [0, 1].map(|axis| i64::from(inputs[0].shape[axis]));
                let threads = i32::try_from(rows * cols).map_err(|_| wrong("x is too large".to_owned()))?;
                let by = TemplateArg::Int(by[0].rem_euclid(cols) as i32);
                let (grid, threadgroup) = ([threads, 1, 1], [256, 1, 1]);
                Ok(GpuLaunch { grid, threadgroup, template: vec![("BY".to_owned(), by)], init_value: None })
            })
            .gradient(|_x, cotangents, _y, _wrt, by| Ok(vec![roll(&cotangents[0], -by[0])?]))
            .build()
    });

    fn roll(x: &Array, by: i64) -> zmlx::kernels::Result<Array> {
        let kernel = ROLL.as_ref().map_err(Clone::clone)?;
        Ok(kernel.call(&[x], &[by])?.remove(0))
    }

    let x = Array::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3])?;
    assert_eq!(roll(&x, 1)?.to_vec::<f32>()?, [3.0, 1.0, 2.0, 6.0, 4.0, 5.0]);
    let loss = |a: &[Array]| roll(&a[0], 1)?.multiply(&a[0])?.sum_all();
    let gradient = transforms::grad(loss, &[0])(&[&x])?.remove(0);
    // end
    assert_eq!(gradient.to_vec::<f32>()?, [5.0, 4.0, 3.0, 11.0, 10.0, 9.0]);
    let kernel = ROLL.as_ref().map_err(Clone::clone)?;
    assert!(
        kernel.text(Dialect::Cuda).is_some_and(|t| t.body.contains("if (i >= x_shape[0] * cols) return;"))
    );
    let launch = kernel.gpu_launch(&[Spec::of(&x)], &[-1])?;
    assert_eq!((launch.grid, launch.template[0].1), ([6, 1, 1], TemplateArg::Int(2)));
    let flat = roll(&Array::from_slice(&[1.0f32], &[1])?, 1).expect_err("one axis");
    assert!(flat.to_string().contains("x has shape [1]"), "{flat}");
    assert_eq!(roll(&Array::from_slice::<f32>(&[], &[0, 3])?, 1)?.shape(), [0, 3]);
    Ok(())
}

#[test]
fn vmap_and_compile() -> Result {
    let (x, c) = (ramp(4, 5)?, ramp(1, 5)?.reshape(&[5])?);
    // docs/cookbook.md: vmap and compile
    let kernel = Kernel::new("distance(x, c) = sqrt(row_sum((x - c) * (x - c)))")?;

    // From one vector to many: a further axis is one more axis of the same launch.
    let one = |a: &[Array]| Ok(kernel.call(&[&a[0], &a[1]])?);
    let mapped = transforms::vmap(one, &[0, -1], &[0])(&[&x, &c])?.remove(0);
    assert_eq!(mapped.shape(), [4]);

    // Inside MLX's compile a kernel stays one node.
    let inner = kernel.clone();
    let twice =
        transforms::compile(move |a| Ok(vec![inner.call1(&[&a[0], &a[1]])?.multiply_scalar(2.0)?]), false)?;
    let doubled = twice.call(&[&x, &c])?.remove(0);
    // end
    let expected = x.subtract(&c)?.square()?.sum(&[-1], false)?.sqrt()?;
    close(&mapped, &expected.to_vec::<f32>()?, 1e-6)?;
    close(&doubled, &expected.multiply_scalar(2.0)?.to_vec::<f32>()?, 1e-6)
}

#[test]
fn reading() -> Result {
    let softmax = Kernel::new("softmax(x) = let e = exp(x - row_max(x)); e / row_sum(e)")?;
    let x = ramp(64, 128)?;
    // docs/cookbook.md: reading a kernel
    // Text of the gradient's kernel, as derived and simplified.
    let gradient = softmax.gradient(&["x"])?.ok_or("it is 0 everywhere")?;
    println!("{}", gradient.text());

    // The source for a backend, also where that backend is not there.
    let cuda = softmax.source(Dialect::Cuda, &[Store::F16], &[vec![4096, 4096]])?;
    println!("{}\n{}\n{}", cuda.name, cuda.header, cuda.body);

    // Typed values by pass, bytes, work, and the least time at 20 GB/s.
    println!("{}", softmax.explain(&[&x], 20e9)?);
    let cost = softmax.cost(&[&x])?;
    assert_eq!((cost.bytes_read, cost.bytes_written), (64 * 128 * 4, 64 * 128 * 4));

    // Counts, and the time of CPU launches on request.
    softmax.set_timing(true);
    eval(&[&softmax.call1(&[&x])?])?;
    println!("{:?}", softmax.stats());
    // end
    let explained = softmax.explain(&[&x], 20e9)?;
    assert!(explained.contains("pass 2:") && explained.contains("row_max"), "{explained}");
    assert!(cuda.name.starts_with("softmax_") && cuda.body.contains("exp"), "{}", cuda.body);
    let metal = softmax.source(Dialect::Metal, &[Store::F16], &[vec![4096, 4096]])?;
    assert_ne!(metal.body, cuda.body);
    assert!(gradient.text().contains("row_sum"), "{}", gradient.text());
    let stats = softmax.stats();
    assert_eq!((stats.calls, stats.cpu_launches + stats.gpu_launches), (1, 1));
    assert_eq!(stats.bytes, 2 * 64 * 128 * 4);
    Ok(())
}

/// Says where choices are kept; the test runs itself with it, since a process reads it once.
const TUNE_DIR: &str = "ZMLX_TUNE_DIR";

#[test]
fn tuning() -> Result {
    let folder = std::env::temp_dir().join(format!("zmlx-cookbook-{}", std::process::id()));
    if std::env::var_os(TUNE_DIR).is_none() {
        let test = std::env::current_exe()?;
        let run = std::process::Command::new(test)
            .args(["--exact", "tuning"])
            .env(TUNE_DIR, &folder)
            .env_remove("ZMLX_TUNE")
            .output()?;
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
        let kept = std::fs::read_dir(&folder)?.count();
        std::fs::remove_dir_all(&folder)?;
        assert!(kept > 0, "no choice was kept in {}", folder.display());
        return Ok(());
    }
    let x = ramp(64, 256)?;
    // docs/cookbook.md: tuning
    let kernel = Kernel::new("softmax(x) = let e = exp(x - row_max(x)); e / row_sum(e)")?;
    let decision = kernel.tune(&[&x], &Default::default())?;
    println!("{decision}");
    // end
    assert!(decision.gain >= 1.0 && decision.evidence.len() > 1, "{decision}");
    close(&kernel.call1(&[&x])?, &x.softmax(&[-1], true)?.to_vec::<f32>()?, 1e-6)
}

/// The pieces of this file for a document: the text between the marks, without the indentation.
fn pieces(document: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut lines = include_str!("cookbook.rs").lines();
    while let Some(line) = lines.next() {
        let Some(title) = line.trim().strip_prefix("// ").and_then(|l| l.strip_prefix(document)) else {
            continue;
        };
        let Some(title) = title.strip_prefix(": ") else { continue };
        let body: Vec<&str> = lines.by_ref().take_while(|l| l.trim() != "// end").collect();
        let dedented = body.iter().map(|l| l.strip_prefix("    ").unwrap_or(l)).collect::<Vec<_>>();
        all.push((title.to_owned(), dedented.join("\n")));
    }
    all
}

/// The blocks of a document in a language.
fn blocks<'a>(document: &'a str, language: &str) -> Vec<&'a str> {
    let open = format!("```{language}\n");
    let block = |rest: &'a str| rest.split("```").next();
    document.split(open.as_str()).skip(1).filter_map(block).map(str::trim_end).collect()
}

#[test]
fn documents_show_this_code() {
    let documents = [
        ("docs/cookbook.md", include_str!("../../../docs/cookbook.md")),
        ("docs/quick-start-kernels.md", include_str!("../../../docs/quick-start-kernels.md")),
        ("README.md", include_str!("../../../README.md")),
    ];
    for (name, text) in documents {
        let (pieces, blocks) = (pieces(name), blocks(text, "rust"));
        assert!(!pieces.is_empty(), "no code for {name}");
        for (title, code) in &pieces {
            assert!(blocks.contains(&code.as_str()), "{name} lacks the code of {title:?}:\n{code}");
        }
        // The README has other code too; in the rest everything is run.
        if name.starts_with("docs/") {
            let run: Vec<&str> = pieces.iter().map(|(_, code)| code.as_str()).collect();
            assert_eq!(blocks, run, "{name} shows the code in another order, or code that is not run");
        }
    }
}

/// Blocks of `docs/adding-a-kernel.md` start with the path of the file that they are from.
#[test]
fn quoted_files_still_say_so() -> Result {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let document = std::fs::read_to_string(root.join("docs/adding-a-kernel.md"))?;
    // Line breaks are the formatter's.
    let squeezed = |text: &str| text.split_whitespace().collect::<String>().replace(",)", ")");
    let quoted = blocks(&document, "rust");
    assert!(!quoted.is_empty());
    for block in quoted {
        let (path, code) = block.split_once('\n').ok_or("a block without a path")?;
        let path = path.trim_start().strip_prefix("// ").ok_or("the first line is the path of the file")?;
        let file = std::fs::read_to_string(root.join(path))?;
        assert!(squeezed(&file).contains(&squeezed(code)), "{path} no longer has\n{code}");
    }
    Ok(())
}
