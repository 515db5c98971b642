//! Time of each kind of stage. `cargo run --release -p zmlx-models --example stages -- DIR threads tokens prompt`
use std::collections::BTreeMap;
use std::time::Instant;
use zmlx_models::{LoadOptions, Model, PatchOptions};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let threads = a[2].parse().unwrap();
    let n: usize = a[3].parse().unwrap();
    let prompt: usize = a[4].parse().unwrap();
    let patch = Some(PatchOptions { threads: Some(threads), ..PatchOptions::default() });
    let t = Instant::now();
    let model =
        Model::load(a[1].as_ref(), &LoadOptions { patch, ..Default::default() }, &mut |_| {}).unwrap();
    println!("load {:.2} s", t.elapsed().as_secs_f64());
    println!("{}", model.patch_report().unwrap());
    if std::env::var("SHOW").is_ok() {
        println!("{}", model.graph());
    }
    let mut state = model.new_state();
    let ids: Vec<u32> = (0..prompt as u32).map(|i| i * 37 % 1000 + 5).collect();
    let t = Instant::now();
    model.run(&ids, &mut state).unwrap();
    println!("prefill {} tokens {:.1} tok/s", prompt, prompt as f64 / t.elapsed().as_secs_f64());
    for round in 0..3 {
        let mut state = model.new_state();
        let t = Instant::now();
        for i in 0..n {
            model.run(&[(i as u32 * 977 + 3) % 1000], &mut state).unwrap();
        }
        println!("decode {:.2} tok/s", n as f64 / t.elapsed().as_secs_f64());
        let _ = round;
    }
    model.executor().measure(true);
    let t = Instant::now();
    for i in 0..n {
        model.run(&[(i as u32 * 977 + 3) % 1000], &mut state).unwrap();
    }
    let total = t.elapsed().as_secs_f64() / n as f64;
    let mut all: BTreeMap<&'static str, (f64, usize)> = BTreeMap::new();
    for (name, ns) in model.executor().stage_times() {
        let e = all.entry(name).or_default();
        e.0 += ns as f64 / n as f64 / 1e6 / threads as f64;
        e.1 += 1;
    }
    let sum: f64 = all.values().map(|v| v.0).sum();
    for (name, (ms, count)) in &all {
        println!("{name:<36} {count:>4} stages {ms:8.3} ms");
    }
    println!("in stages {sum:.3} ms of {:.3} ms a token", total * 1e3);
}
