//! Elementwise and row kernels on the CPU beside XLA (jax), in one run: `cargo bench -p zmlx-kernels`.
//!
//! Runs alternate between the two, buffers are recycled on both sides, and what is printed is medians and their ratio.
//! The first use makes a virtual environment with jax in the target folder (says so; needs Python 3 with pip and the
//! network). `-- --no-peer` leaves jax out; `-- --resident` runs sizes that fit into the cache, for counting cycles. A last column gives the compulsory traffic over the median.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use zmlx_kernels::{Array, Kernel, catalogue};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

struct Peer {
    child: Child,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
    version: String,
}

impl Peer {
    fn start() -> Result<Self> {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("peers");
        let python = folder.join("bin/python");
        if !python.exists() {
            eprintln!("installing jax into {} (once)", folder.display());
            run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
            run(Command::new(&python).args(["-m", "pip", "install", "-q", "jax", "numpy"]))?;
        }
        let script: PathBuf = [env!("CARGO_MANIFEST_DIR"), "benches", "jax_peer.py"].iter().collect();
        let mut child = Command::new(python)
            .arg(script)
            // Buffers that are freed stay in the process, in large pages.
            .env(
                "GLIBC_TUNABLES",
                "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1",
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().ok_or("no output")?;
        let mut answers = BufReader::new(out).lines();
        let version = answers.next().ok_or("jax did not start")??;
        Ok(Self { child, answers, version })
    }

    fn time(&mut self, name: &str) -> Result<f64> {
        writeln!(self.child.stdin.as_mut().ok_or("no input")?, "{name}")?;
        Ok(self.answers.next().ok_or("jax stopped")??.parse()?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn run(command: &mut Command) -> Result<()> {
    if command.status()?.success() { Ok(()) } else { Err(format!("{command:?} failed").into()) }
}

/// Numbers that look normally distributed: sums of four of a simple generator's.
fn normal(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f64::from(state) / f64::from(u32::MAX) - 0.5
    };
    (0..n).map(|_| ((next() + next() + next() + next()) * 1.732) as f32).collect()
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

type Body = Box<dyn Fn() -> zmlx_kernels::Result<Vec<Array>>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wanted: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    let resident = arguments.iter().any(|a| a == "--resident");
    let (n, rows, cols, rounds) =
        if resident { (256 << 10, 64, 4096, 2000) } else { (16 << 20, 4096, 4096, 24) };
    let mut peer =
        if resident || arguments.iter().any(|a| a == "--no-peer") { None } else { Some(Peer::start()?) };
    zmlx_mlx::stream::set_default_device(zmlx_mlx::stream::Device::Cpu)?;
    let x = Array::from_vec(normal(n, 1), &[n as i32])?;
    let y = Array::from_vec(normal(n, 2), &[n as i32])?;
    let m = Array::from_vec(normal(rows * cols, 3), &[rows as i32, cols as i32])?;
    let w = Array::from_vec(vec![1.0f32; cols], &[cols as i32])?;
    let logits = Array::from_vec(normal(4096 * 128, 4), &[4096, 128])?;
    // Inputs where results usually are: in the engine's own memory.
    let copy = Kernel::new("copy(x) = +x")?;
    let placed = |a: Array| -> Result<Array> {
        let a = copy.call1(&[&a])?;
        a.eval()?;
        Ok(a)
    };
    let (x, y, m, w) = (placed(x)?, placed(y)?, placed(m)?, placed(w)?);
    let unary = |text: &str, arrays: Vec<Array>| -> Result<Body> {
        let kernel = Kernel::new(text)?;
        Ok(Box::new(move || kernel.call(&arrays.iter().collect::<Vec<_>>())))
    };
    let gating: Body = Box::new(move || {
        let (weights, indices) = catalogue::top_k_gating(&logits, 8, true)?;
        Ok(vec![weights, indices])
    });
    let k = "0.7978845608028654";
    let cases: Vec<(&str, usize, Body)> = vec![
        ("mish", 8 * n, unary("x * tanh(log(1 + exp(x)))", vec![x.clone()])?),
        (
            "gelu_tanh",
            8 * n,
            unary(&format!("0.5 * x * (1 + tanh({k} * (x + 0.044715 * x * x * x)))"), vec![x.clone()])?,
        ),
        ("silu_mul", 12 * n, unary("silu(a) * b", vec![x, y])?),
        (
            "softmax",
            8 * rows * cols,
            unary("softmax(x) = let e = exp(x - row_max(x)); e / row_sum(e)", vec![m.clone()])?,
        ),
        (
            "rms_norm",
            8 * rows * cols,
            unary("rms(x, w) = x * rsqrt(row_mean(x * x) + 1e-5) * w", vec![m, w])?,
        ),
        ("top_k_gating", 4096 * (128 * 4 + 8 * 8), gating),
    ];
    println!(
        "{} threads, {}; peer: {}",
        rayon::current_num_threads(),
        zmlx_simd::isa_name(),
        peer.as_ref().map_or("none", |p| &p.version)
    );
    println!("{:14} {:>10} {:>10} {:>8} {:>10}", "kernel", "ours ms", "jax ms", "ratio", "ours GB/s");
    for (name, bytes, body) in &cases {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let start = Instant::now();
            let out = body()?;
            zmlx_mlx::transforms::eval(&out.iter().collect::<Vec<_>>())?;
            let seconds = start.elapsed().as_secs_f64();
            drop(out);
            let other = peer.as_mut().map(|p| p.time(name)).transpose()?;
            if round >= 3 {
                ours.push(seconds);
                theirs.extend(other);
            }
        }
        let ours = median(ours);
        let gbs = *bytes as f64 / ours / 1e9;
        match theirs.is_empty() {
            true => println!("{name:14} {:10.3} {:>10} {:>8} {gbs:10.2}", ours * 1e3, "-", "-"),
            false => {
                let theirs = median(theirs);
                println!(
                    "{name:14} {:10.3} {:10.3} {:7.2}x {gbs:10.2}",
                    ours * 1e3,
                    theirs * 1e3,
                    theirs / ours
                );
            }
        }
    }
    Ok(())
}
