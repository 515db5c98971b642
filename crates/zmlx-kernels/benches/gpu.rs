//! Kernels on a GPU against the bandwidth of a copy, in one run: `cargo bench -p zmlx-kernels --bench gpu`.
//!
//! For each kernel and dtype: the time of the emitter's default parameters, of the tuner's choice (kernels over rows;
//! all with `-- --tune-all`, which compiles a dozen texts each; `-- bfloat16 softmax` keeps what has one of these in its name
//! or dtype), and of plain MLX ops where there is one op for it; traffic over time as a share of a copy's; the largest difference from the CPU engine.
//! Times are medians of batches, variants alternating. Without a GPU it says so and ends.

use std::time::Instant;

use zmlx_kernels::{Array, Kernel};
use zmlx_mlx::{Device, Dtype, ops, transforms};
use zmlx_tune::Settings;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Body<'a> = Box<dyn Fn() -> zmlx_kernels::Result<Vec<Array>> + 'a>;

/// Launches between two waits: the wait and the way to the first launch are a tenth of a millisecond, shared by all.
const BATCH: usize = 40;
const ROUNDS: usize = 9;

fn batch(body: &Body<'_>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..BATCH {
        let out = body()?;
        transforms::async_eval(&out.iter().collect::<Vec<_>>())?;
    }
    zmlx_mlx::stream::synchronize()?;
    Ok(start.elapsed().as_secs_f64() / BATCH as f64)
}

/// Medians of the bodies' times, taken in turn.
fn medians(bodies: &[Body<'_>]) -> Result<Vec<f64>> {
    let mut samples = vec![Vec::new(); bodies.len()];
    for round in 0..=ROUNDS {
        for (body, samples) in bodies.iter().zip(&mut samples) {
            let seconds = batch(body)?;
            if round > 0 {
                samples.push(seconds);
            }
        }
    }
    Ok(samples
        .into_iter()
        .map(|mut s| {
            s.sort_by(f64::total_cmp);
            s[s.len() / 2]
        })
        .collect())
}

fn difference(a: &Array, b: &Array) -> Result<f64> {
    let read = |a: &Array| a.astype(Dtype::Float32)?.to_vec::<f32>();
    let (a, b) = (read(a)?, read(b)?);
    Ok(a.iter().zip(&b).map(|(x, y)| f64::from((x - y).abs() / (y.abs() + 1e-3))).fold(0.0, f64::max))
}

fn plain(name: &str, a: &[Array]) -> Option<zmlx_mlx::Result<Array>> {
    match name {
        "softmax" => Some(ops::softmax(&a[0], &[-1], true)),
        "rms_norm" => Some(zmlx_mlx::fast::rms_norm(&a[0], Some(&a[1]), 1e-5)),
        "exp" => Some(a[0].exp()),
        _ => None,
    }
}

fn main() -> Result<()> {
    if zmlx_mlx::stream::current_device()? != Device::Gpu {
        println!("no GPU: nothing to measure");
        return Ok(());
    }
    let all = std::env::args().any(|a| a == "--tune-all");
    let names: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let (rows, cols) = (16384, 4096);
    let k = "0.7978845608028654";
    let cases = [
        ("copy", "copy(x) = +x".to_owned(), 1, false),
        ("exp", "exp(x)".to_owned(), 1, false),
        ("mish", "x * tanh(log(1 + exp(x)))".to_owned(), 1, false),
        ("gelu_tanh", format!("0.5 * x * (1 + tanh({k} * (x + 0.044715 * x * x * x)))"), 1, false),
        ("silu_mul", "silu(a) * b".to_owned(), 2, false),
        ("softmax", "softmax(x) = let e = exp(x - row_max(x)); e / row_sum(e)".to_owned(), 1, false),
        ("rms_norm", "rms(x, w) = x * rsqrt(row_mean(x * x) + 1e-5) * w".to_owned(), 1, true),
        (
            "layer_norm",
            "ln(x, w) = let d = x - row_mean(x); d * rsqrt(row_mean(d * d) + 1e-5) * w".to_owned(),
            1,
            true,
        ),
        ("row_sum", "row_sum(x)".to_owned(), 1, false),
        ("cumsum", "cumsum(x)".to_owned(), 1, false),
    ];
    println!(
        "{}: {rows} x {cols}, medians of {ROUNDS} batches of {BATCH}",
        zmlx_mlx::runtime::device_name()?
    );
    println!(
        "{:10} {:8} {:>9} {:>9} {:>9} {:>9} {:>7} {:>9} {:>9}",
        "kernel", "dtype", "default", "tuned", "gain", "GB/s", "% copy", "plain MLX", "vs CPU"
    );
    for dtype in [Dtype::Float32, Dtype::Bfloat16] {
        let mut copy_rate = 0.0;
        let make = |seed: i32| -> Result<Array> {
            let key = zmlx_mlx::random::key(seed as u64)?;
            let x = zmlx_mlx::random::normal(&[rows, cols], dtype, None, None, &key)?;
            x.eval()?;
            Ok(x)
        };
        let (x, y) = (make(1)?, make(2)?);
        let w = ops::ones(&[cols], dtype)?;
        for (name, text, elements, weight) in &cases {
            let dtype_name = dtype.to_string();
            let (by_name, by_dtype): (Vec<_>, Vec<_>) =
                names.iter().partition(|n| cases.iter().any(|c| c.0.contains(n.as_str())));
            let kept = |list: &[&String], what: &str| {
                list.is_empty() || list.iter().any(|n| what.contains(n.as_str()))
            };
            if *name != "copy" && !kept(&by_name, name) || !kept(&by_dtype, &dtype_name) {
                continue;
            }
            let mut arrays = vec![x.clone()];
            if *elements == 2 {
                arrays.push(y.clone());
            }
            if *weight {
                arrays.push(w.clone());
            }
            let inputs: Vec<&Array> = arrays.iter().collect();
            let default = Kernel::new(text)?;
            // A kernel of its own, whose caches do not know the choice before it is made.
            let tuned = Kernel::new(text)?;
            let settings = Settings { budget: std::time::Duration::from_secs(2), ..Settings::default() };
            let untuned = default.call(&inputs)?;
            transforms::eval(&untuned.iter().collect::<Vec<_>>())?;
            let tunes = all || text.contains("row_") || text.contains("cumsum");
            let choice =
                if tunes { tuned.tune(&inputs, &settings)?.choice.to_string() } else { "default".to_owned() };
            let mut bodies: Vec<Body<'_>> =
                vec![Box::new(|| default.call(&inputs)), Box::new(|| tuned.call(&inputs))];
            if plain(name, &arrays).is_some() {
                bodies.push(Box::new(|| match plain(name, &arrays) {
                    Some(out) => Ok(vec![out?]),
                    None => Ok(Vec::new()),
                }));
            }
            let times = medians(&bodies)?;
            let best = times[0].min(times[1]);
            let cost = default.cost(&inputs)?;
            let rate = (cost.bytes_read + cost.bytes_written) as f64 / best;
            if *name == "copy" {
                copy_rate = rate;
            }
            // A slice is enough for the numbers: rows are computed alike.
            let part: Vec<Array> = arrays
                .iter()
                .map(|a| if a.ndim() == 2 { a.slice_axis(0, 0, 64) } else { Ok(a.clone()) })
                .collect::<zmlx_mlx::Result<_>>()?;
            let part: Vec<&Array> = part.iter().collect();
            let on_gpu = tuned.call1(&part)?;
            let on_cpu = zmlx_mlx::stream::with_device(Device::Cpu, || Ok(tuned.call1(&part)?))?;
            println!(
                "{name:10} {dtype:8} {:8.1}u {:8.1}u {:8.2}x {:9.0} {:6.1}% {:>9} {:9.1e}  {}",
                times[0] * 1e6,
                times[1] * 1e6,
                times[0] / times[1],
                rate / 1e9,
                100.0 * rate / copy_rate,
                times.get(2).map_or("-".to_owned(), |t| format!("{:.1}u", t * 1e6)),
                difference(&on_gpu, &on_cpu)?,
                choice,
            );
        }
    }
    Ok(())
}
