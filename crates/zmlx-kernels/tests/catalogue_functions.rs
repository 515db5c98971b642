//! The functions of the catalogue: arguments, errors, reductions, statistics; and its table in the documentation.

use zmlx_kernels::catalogue::{self, AdamW, CrossEntropy, Reduction, Rope};
use zmlx_kernels::{Array, Error};
use zmlx_mlx::stream::{self, Device};
use zmlx_mlx::{fast, ops, transforms};

type Fallible = Result<(), Box<dyn std::error::Error>>;

fn close(found: &Array, expected: &[f32], tolerance: f32) {
    let found = found.to_vec::<f32>().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let same = f == e || f.is_nan() && e.is_nan() || (f - e).abs() <= tolerance * (1.0 + e.abs());
        assert!(same, "element {i}: {f} is not {e}");
    }
}

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 23.0).collect()
}

fn array(shape: &[i32]) -> zmlx_mlx::Result<Array> {
    Array::from_slice(&ramp(shape.iter().product::<i32>() as usize), shape)
}

#[track_caller]
fn refused<T>(result: zmlx_kernels::Result<T>, part: &str) {
    match result {
        Err(Error::Argument { what, .. }) => assert!(what.contains(part), "{what}"),
        Err(e) => panic!("another error: {e}"),
        Ok(_) => panic!("accepted, expected an error about {part}"),
    }
}

/// A place outside an array is an error on the CPU. A GPU can't report one: what is read is NaN there, what is added is
/// skipped.
fn outside(call: impl Fn() -> zmlx_kernels::Result<Array>, part: &str, reads: bool) -> Fallible {
    let on_cpu = stream::with_device(Device::Cpu, || Ok(call().map(|a| a.eval())))??;
    let error = on_cpu.unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
    if stream::current_device()? == Device::Gpu {
        let found = call()?.to_vec::<f32>()?;
        assert_eq!(found.iter().any(|v| v.is_nan()), reads, "{part}: {found:?}");
    }
    Ok(())
}

#[test]
fn dropout_rates_and_independence() -> Fallible {
    let n = 200_000;
    let ones = ops::ones(&[200, 1000], zmlx_mlx::Dtype::Float32)?;
    let mask = |seed: u64, p: f32| -> Result<Vec<f64>, Box<dyn std::error::Error>> {
        let y = catalogue::dropout(&ones, p, seed)?.to_vec::<f32>()?;
        let kept = 1.0 / (1.0 - p);
        assert!(y.iter().all(|v| *v == 0.0 || (v - kept).abs() < 1e-5 * kept));
        Ok(y.iter().map(|v| f64::from(u8::from(*v != 0.0))).collect())
    };
    let correlation = |a: &[f64], b: &[f64]| {
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
        let (ma, mb) = (mean(a), mean(b));
        let sum = |x: &[f64], mx: f64, y: &[f64], my: f64| {
            x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum::<f64>()
        };
        sum(a, ma, b, mb) / (sum(a, ma, a, ma) * sum(b, mb, b, mb)).sqrt()
    };
    // Five standard deviations of what independent draws give.
    let bound = 5.0 / f64::from(n).sqrt();
    for p in [0.1f32, 0.5, 0.9] {
        let kept = mask(7, p)?;
        let (rate, expected) = (kept.iter().sum::<f64>() / f64::from(n), 1.0 - f64::from(p));
        let sigma = (expected * (1.0 - expected) / f64::from(n)).sqrt();
        assert!((rate - expected).abs() < 5.0 * sigma, "p {p}: kept {rate}");
        for lag in (1..=16).chain([32, 1000]) {
            let r = correlation(&kept[lag..], &kept[..kept.len() - lag]);
            assert!(r.abs() < bound, "p {p}, lag {lag}: correlation {r}");
        }
        for seed in [8, 6, 7 << 32, 0] {
            let other = mask(seed, p)?;
            for shift in 0..3 {
                let r = correlation(&kept[shift..], &other[..other.len() - shift]);
                assert!(r.abs() < bound, "p {p}, seed {seed} shifted by {shift}: correlation {r}");
            }
        }
        assert_eq!(kept, mask(7, p)?);
    }
    assert!(mask(3, 0.0)?.iter().all(|v| *v == 1.0));
    let few = mask(3, 0.999)?.iter().sum::<f64>();
    assert!((100.0..300.0).contains(&few), "{few}");
    refused(catalogue::dropout(&ones, 1.0, 1), "below 1");
    refused(catalogue::dropout(&ones, -0.1, 1), "at least 0");
    refused(catalogue::dropout(&ones, f32::NAN, 1), "at least 0");
    Ok(())
}

#[test]
fn cross_entropy_reductions_and_errors() -> Fallible {
    let logits = array(&[2, 3, 5])?;
    let targets = Array::from_slice(&[0i32, 4, -100, 2, -100, 3], &[2, 3])?;
    let with = |reduction| CrossEntropy { reduction, ..CrossEntropy::default() };
    let each = catalogue::cross_entropy(&logits, &targets, &with(Reduction::None))?;
    assert_eq!(each.shape(), [2, 3]);
    let each = each.to_vec::<f32>()?;
    let x = logits.to_vec::<f32>()?;
    for (row, target) in targets.to_vec::<i32>()?.into_iter().enumerate() {
        let row_x = &x[5 * row..5 * row + 5];
        let lse = row_x.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        let expected = if target < 0 { 0.0 } else { lse - f64::from(row_x[target as usize]) };
        assert!((f64::from(each[row]) - expected).abs() < 1e-6, "row {row}: {} is not {expected}", each[row]);
    }
    let sum: f32 = each.iter().sum();
    close(&catalogue::cross_entropy(&logits, &targets, &with(Reduction::Sum))?, &[sum], 1e-6);
    close(&catalogue::cross_entropy(&logits, &targets, &with(Reduction::Mean))?, &[sum / 4.0], 1e-6);

    let none = Array::from_slice(&[-100i32; 6], &[2, 3])?;
    close(&catalogue::cross_entropy(&logits, &none, &with(Reduction::Sum))?, &[0.0], 0.0);
    close(&catalogue::cross_entropy(&logits, &none, &with(Reduction::Mean))?, &[f32::NAN], 0.0);

    let beyond = Array::from_slice(&[0i32, 4, 5, 2, 1, 3], &[2, 3])?;
    let call = || catalogue::cross_entropy(&logits, &beyond, &with(Reduction::None));
    outside(call, "class_weight is read at [5]", true)?;
    refused(catalogue::cross_entropy(&logits, &array(&[2])?, &with(Reduction::None)), "one for each row");
    let smooth = CrossEntropy { label_smoothing: 1.5, ..CrossEntropy::default() };
    refused(catalogue::cross_entropy(&logits, &targets, &smooth), "label_smoothing");
    let weight = array(&[4])?;
    let weighted = CrossEntropy { class_weight: Some(&weight), ..CrossEntropy::default() };
    refused(catalogue::cross_entropy(&logits, &targets, &weighted), "[5]");

    // MLX's own, where it has one, and through a gradient.
    let t = Array::from_slice(&[0i32, 4, 1, 2, 0, 3], &[2, 3])?;
    let ours = transforms::grad(
        |a: &[Array]| Ok(catalogue::cross_entropy(&a[0], &t, &CrossEntropy::default())?),
        &[0],
    )(&[&logits])?;
    let theirs = transforms::grad(
        |a: &[Array]| {
            let picked = a[0].take_along_axis(&t.expand_dims(&[-1])?, -1)?.squeeze(&[-1])?;
            a[0].logsumexp(&[-1], false)?.subtract(&picked)?.mean_all()
        },
        &[0],
    )(&[&logits])?;
    close(&ours[0], &theirs[0].to_vec::<f32>()?, 1e-6);
    Ok(())
}

#[test]
fn rope_equals_mlx() -> Fallible {
    let (dims, base) = (8, 10_000f64);
    let angle = |i: usize| (i / 4) as f64 * base.powf(-2.0 * (i % 4) as f64 / f64::from(dims));
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = (0..4 * 64).map(|i| f(angle(i)) as f32).collect();
        Array::from_slice(&values, &[64, 4])
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let x = array(&[2, 3, 5, 12])?;
    for interleaved in [false, true] {
        let theirs = fast::rope(&x, dims, interleaved, Some(base as f32), 1.0, 9, None)?;
        let offset = Array::from_slice(&[9i32, 9], &[2])?;
        let choices = Rope { interleaved, heads_last: false };
        let ours = catalogue::apply_rope(&x, &cos, &sin, Some(&offset), choices)?;
        close(&ours, &theirs.to_vec::<f32>()?, 3e-6);
        let swapped = Rope { interleaved, heads_last: true };
        let ours = catalogue::apply_rope(&x.swapaxes(1, 2)?, &cos, &sin, Some(&offset), swapped)?;
        close(&ours.swapaxes(1, 2)?, &theirs.to_vec::<f32>()?, 3e-6);
    }
    let far = Array::from_slice(&[0i32, 60], &[2])?;
    let call = || catalogue::apply_rope(&x, &cos, &sin, Some(&far), Rope::default());
    outside(call, "cos is read at [64, 0]", true)?;
    refused(catalogue::apply_rope(&x, &cos, &array(&[64, 3])?, None, Rope::default()), "two equal tables");
    refused(catalogue::apply_rope(&x, &cos, &sin, Some(&array(&[3])?), Rope::default()), "offset");
    Ok(())
}

#[test]
fn places_outside_are_errors() -> Fallible {
    let (source, other) = (array(&[4, 3])?, array(&[2, 3])?);
    let rows = |v: &[i32]| Array::from_slice(v, &[v.len() as i32]);
    let sums = catalogue::gather_add(&source, &rows(&[3, 0])?, &other)?;
    close(&sums, &source.take(&rows(&[3, 0])?, 0)?.add(&other)?.to_vec::<f32>()?, 1e-6);
    for bad in [-1, 4] {
        let places = rows(&[0, bad])?;
        let call = || catalogue::gather_add(&source, &places, &other);
        outside(call, &format!("source is read at [{bad}, 0]"), true)?;
        let call = || catalogue::scatter_add(&places, &other, 4);
        outside(call, &format!("sums is added to at [{bad}, 0]"), false)?;
    }
    refused(catalogue::gather_add(&source, &rows(&[1])?, &other), "not [2]");
    refused(catalogue::gather_add(&source, &rows(&[1, 1])?, &array(&[2, 4])?), "have 3 elements");
    refused(catalogue::scatter_add(&rows(&[1, 1])?, &array(&[2])?, 4), "two axes");
    let twice = catalogue::scatter_add(&rows(&[1, 1])?, &ops::ones(&[2, 2], zmlx_mlx::Dtype::Float16)?, 3)?;
    close(&twice, &[0.0, 0.0, 2.0, 2.0, 0.0, 0.0], 0.0);
    Ok(())
}

#[test]
fn gated_units_take_any_shape() -> Fallible {
    let x = array(&[2, 3, 8])?;
    let bias = array(&[8])?;
    let halves = |x: &Array| Ok::<_, zmlx_mlx::Error>((x.slice_axis(-1, 0, 4)?, x.slice_axis(-1, 4, 8)?));
    let reference = |x: &Array| {
        let (a, b) = halves(x)?;
        a.multiply(&a.sigmoid()?)?.multiply(&b)
    };
    let y = catalogue::swiglu(&x)?;
    assert_eq!(y.shape(), [2, 3, 4]);
    close(&y, &reference(&x)?.to_vec::<f32>()?, 1e-6);
    close(&catalogue::bias_swiglu(&x, &bias)?, &reference(&x.add(&bias)?)?.to_vec::<f32>()?, 1e-6);
    let (a, b) = halves(&x)?;
    close(&catalogue::geglu(&x)?, &catalogue::geglu2(&a, &b)?.to_vec::<f32>()?, 1e-6);
    let biased = halves(&x.add(&bias)?)?;
    close(
        &catalogue::bias_geglu(&x, &bias)?,
        &catalogue::geglu2(&biased.0, &biased.1)?.to_vec::<f32>()?,
        1e-6,
    );
    // More than one row: the gradient reaches all of them, and the bias sums over them.
    let ours = transforms::grad(|a| catalogue::bias_swiglu(&a[0], &a[1])?.square()?.sum_all(), &[0, 1]);
    let theirs = transforms::grad(|a| reference(&a[0].add(&a[1])?)?.square()?.sum_all(), &[0, 1]);
    for (o, t) in ours(&[&x, &bias])?.iter().zip(&theirs(&[&x, &bias])?) {
        assert_eq!(o.shape(), t.shape());
        close(o, &t.to_vec::<f32>()?, 1e-5);
    }
    refused(catalogue::swiglu(&array(&[2, 3])?), "two halves");
    refused(catalogue::bias_geglu(&x, &array(&[4])?), "not [8]");
    Ok(())
}

#[test]
fn images_and_bits() -> Fallible {
    let x = Array::from_slice(&[0.0f32, 1.0, 2.0, 3.0], &[1, 2, 2, 1])?;
    let y = catalogue::resize_bilinear(&x, (4, 4))?;
    assert_eq!(y.shape(), [1, 4, 4, 1]);
    let row = [0.0f32, 0.25, 0.75, 1.0];
    let expected: Vec<f32> = [0.0f32, 0.5, 1.5, 2.0].iter().flat_map(|v| row.map(|r| r + v)).collect();
    close(&y, &expected, 1e-6);
    close(&catalogue::resize_nearest(&x, (1, 4))?, &[2.0, 2.0, 3.0, 3.0], 0.0);
    refused(catalogue::resize_nearest(&x, (0, 4)), "can't resize");
    refused(catalogue::resize_bilinear(&array(&[2, 2])?, (4, 4)), "[N, H, W, C]");

    let image = array(&[1, 5, 6, 2])?;
    for k in [3, 5, 7] {
        let mut identity = vec![0.0f32; (k * k * 2) as usize];
        let centre = (k * k / 2 * 2) as usize;
        (identity[centre], identity[centre + 1]) = (1.0, 2.0);
        let weight = Array::from_slice(&identity, &[k, k, 2])?;
        let scaled = image.multiply(&Array::from_slice(&[1.0f32, 2.0], &[2])?)?;
        close(&catalogue::depthwise_conv(&image, &weight)?, &scaled.to_vec::<f32>()?, 1e-6);
    }
    refused(catalogue::depthwise_conv(&image, &array(&[4, 4, 2])?), "K of 3, 5 or 7");
    refused(catalogue::depthwise_conv(&image, &array(&[3, 3, 1])?), "does not fit");

    let bits: Vec<u8> = (0..40).map(|i| u8::from(i * i % 7 == 1)).collect();
    let packed = catalogue::pack_bits(&Array::from_slice(&bits, &[5, 8])?)?;
    assert_eq!(packed.to_vec::<u8>()?[0], 0b0100_0010);
    assert_eq!(catalogue::unpack_bits(&packed)?.to_vec::<u8>()?, bits);
    refused(catalogue::pack_bits(&array(&[9])?), "multiple of 8");
    Ok(())
}

#[test]
fn adamw_keeps_dtypes() -> Fallible {
    let (p, g) = (array(&[6])?, array(&[6])?.multiply_scalar(0.1)?);
    let zeros = ops::zeros(&[6], zmlx_mlx::Dtype::Float32)?;
    let choices = AdamW { learning_rate: 0.1, weight_decay: 0.0, ..AdamW::default() };
    let (after, m, v) = catalogue::adamw_step(&p, &g, &zeros, &zeros, 1, choices)?;
    // The first step goes by the learning rate against the gradient's sign.
    let expected: Vec<f32> =
        p.to_vec::<f32>()?.iter().zip(g.to_vec::<f32>()?).map(|(p, g)| p - 0.1 * g.signum()).collect();
    close(&after, &expected, 1e-5);
    close(&m, &g.multiply_scalar(0.1)?.to_vec::<f32>()?, 1e-6);
    close(&v, &g.square()?.multiply_scalar(1e-3)?.to_vec::<f32>()?, 1e-6);
    for dtype in [zmlx_mlx::Dtype::Float16, zmlx_mlx::Dtype::Bfloat16] {
        let (half, m, _) =
            catalogue::adamw_step(&p.astype(dtype)?, &g.astype(dtype)?, &zeros, &zeros, 2, choices)?;
        assert_eq!((half.dtype(), m.dtype()), (dtype, zmlx_mlx::Dtype::Float32));
    }
    refused(catalogue::adamw_step(&p, &g, &zeros, &zeros, 0, choices), "from 1");
    refused(catalogue::adamw_step(&p, &g, &array(&[5])?, &zeros, 1, choices), "first");
    Ok(())
}

#[test]
fn norms_reductions_and_scans() -> Fallible {
    let x = array(&[3, 40])?;
    let (w, b) = (array(&[40])?, array(&[40])?.multiply_scalar(0.5)?);
    let theirs = fast::rms_norm(&x, Some(&w), 1e-5)?.to_vec::<f32>()?;
    close(&catalogue::rms_norm(&x, Some(&w), 1e-5)?, &theirs, 2e-6);
    close(&catalogue::rms_norm(&x, None, 1e-5)?, &fast::rms_norm(&x, None, 1e-5)?.to_vec::<f32>()?, 2e-6);
    let theirs = fast::layer_norm(&x, Some(&w), Some(&b), 1e-5)?.to_vec::<f32>()?;
    close(&catalogue::layer_norm(&x, Some((&w, &b)), 1e-5)?, &theirs, 2e-6);
    let (normed, sum) = catalogue::add_rms_norm(&x, &x, &w, 1e-5)?;
    close(&sum, &x.add(&x)?.to_vec::<f32>()?, 0.0);
    close(&catalogue::fused_add_rms_norm(&x, &x, &w, 1e-5)?, &normed.to_vec::<f32>()?, 0.0);
    let (normed, _) = catalogue::layer_norm_residual(&x, &x, &w, &b, 1e-5)?;
    close(&catalogue::fused_add_layer_norm(&x, &x, &w, &b, 1e-5)?, &normed.to_vec::<f32>()?, 0.0);
    refused(catalogue::rms_norm_dropout(&x, &w, 2.0, 1, 1e-5), "below 1");
    let dropped = catalogue::rms_norm_dropout(&x, &w, 0.5, 3, 1e-5)?;
    let again = catalogue::dropout(&catalogue::rms_norm(&x, Some(&w), 1e-5)?, 0.5, 3)?;
    close(&dropped, &again.to_vec::<f32>()?, 1e-6);

    close(&catalogue::std(&x, 0.0)?, &x.std(&[-1], false, 0)?.to_vec::<f32>()?, 2e-6);
    let v = Array::from_slice(&[1.0f32, 2.0, 4.0], &[3])?;
    close(&catalogue::cumsum(&v, true, true)?, &[6.0, 4.0, 0.0], 0.0);
    close(&catalogue::cumprod(&v, false, true)?, &[1.0, 1.0, 2.0], 0.0);
    close(&catalogue::cummax(&v.negative()?, true, false)?, &[-1.0, -2.0, -4.0], 0.0);
    close(&catalogue::elu(&v.negative()?, 2.0)?, &[-1.264_241_1, -1.729_329_4, -1.963_368_7], 1e-6);

    let large: Vec<f32> = (0..4096).map(|i| if i % 2 == 0 { 1e7 + i as f32 } else { -1e7 + 0.5 }).collect();
    let exact: f64 = large.iter().map(|v| f64::from(*v)).sum();
    let large = Array::from_slice(&large, &[1, 4096])?;
    close(&catalogue::sum_compensated(&large)?, &[exact as f32], 0.0);
    close(&catalogue::mean_compensated(&large)?, &[(exact / 4096.0) as f32], 1e-7);
    Ok(())
}

/// Set `ZMLX_UPDATE_DOCS` to write the file.
#[test]
fn the_documentation_has_this_table() -> Fallible {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/kernels.md");
    let table = catalogue::table();
    if std::env::var_os("ZMLX_UPDATE_DOCS").is_some() {
        std::fs::write(path, &table)?;
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(found == table, "docs/kernels.md is out of date: run this test with ZMLX_UPDATE_DOCS=1");
    Ok(())
}
