//! What one small op costs on the host: from C++, from Rust, and the difference. `cargo bench -p zmlx-mlx`.

use zmlx_mlx::bench::{chain_in_cpp, chain_in_rust};
use zmlx_mlx::stream::default_device;
use zmlx_mlx::{Result, Stream};

fn main() -> Result<()> {
    const LENGTH: u64 = 1000;
    const REPEATS: u64 = 5;
    const ROUNDS: usize = 101;
    let stream = Stream::default_of(default_device()?)?;
    println!(
        "chain of {LENGTH} dependent adds of 16 floats, {REPEATS} a round, median of {ROUNDS} interleaved rounds"
    );
    println!("{:<22} {:>10} {:>10} {:>12} {:>7}", "", "C++ us/op", "Rust us/op", "difference", "ratio");
    for (name, pipelined) in [("evaluated one by one", false), ("pipelined", true)] {
        let (mut cpp, mut rust) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let a = chain_in_cpp(stream, LENGTH, REPEATS, pipelined)?;
            let b = chain_in_rust(stream, LENGTH, REPEATS, pipelined)?;
            // The first round warms up.
            if round > 0 {
                cpp.push(a.as_secs_f64() * 1e6 / (LENGTH * REPEATS) as f64);
                rust.push(b.as_secs_f64() * 1e6 / (LENGTH * REPEATS) as f64);
            }
        }
        let (c, r) = (median(&mut cpp), median(&mut rust));
        println!("{name:<22} {c:>10.3} {r:>10.3} {:>+9.3} us {:>7.3}", r - c, r / c);
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
