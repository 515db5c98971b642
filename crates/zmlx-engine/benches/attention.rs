//! Attention of one token over a long cache, in float32 and in half precision. `cargo bench -p zmlx-engine --bench attention`
use std::time::Instant;

use zmlx_engine::program::{Call, Program, Runner, Slot, Wanted};
use zmlx_engine::stages::Attend;

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn main() {
    let most = std::thread::available_parallelism().map_or(1, usize::from);
    // Query heads, key/value heads, width of a head.
    for (heads, kv_heads, d) in [(32, 8, 64), (16, 2, 128), (8, 1, 256)] {
        for seen in [256, 4096, 16384] {
            let mut programs = Vec::new();
            for half in [false, true] {
                for threads in [1, most] {
                    let slot = Slot::kv(kv_heads, d, d);
                    let mut slot = if half { slot.half() } else { slot };
                    slot.reserve(1, 0, seen);
                    if let Slot::Kv { keys, values, .. } = &slot {
                        let row: Vec<f32> = (0..keys.len()).map(|i| (i as f32 * 0.37).sin()).collect();
                        // SAFETY: nobody else has the slot.
                        unsafe {
                            keys.write(0, &row);
                            values.write(0, &row);
                        }
                    }
                    let mut program = Program::new();
                    let (queries, out) = (program.buffer(heads * d), program.buffer(heads * d));
                    let attend =
                        Attend { queries, heads, slot: 0, scale: 0.1, window: None, sinks: None, out };
                    let merge = attend.merge(d);
                    program.push(0, attend);
                    program.push(0, merge);
                    let mut runner = Runner::new(threads, 2);
                    let q: Vec<f32> = (0..heads * d).map(|i| (i as f32 * 0.11).cos()).collect();
                    runner.fill(&program, queries, 1, &q);
                    programs.push((half, threads, [slot], program, runner, Vec::new()));
                }
            }
            for _ in 0..15 {
                for (_, _, slots, program, runner, times) in &mut programs {
                    let start = Instant::now();
                    runner.run(
                        program,
                        slots,
                        &Call { tokens: &[0], batch: 1, position: seen - 1, wanted: Wanted::All },
                    );
                    times.push(start.elapsed().as_secs_f64());
                }
            }
            for (half, threads, slots, _, _, times) in programs {
                let seconds = median(times);
                println!(
                    "{heads}/{kv_heads} heads of {d}, {seen} positions, {}, {threads} threads: {:.0} us, {:.1} GB/s",
                    if half { "f16" } else { "f32" },
                    1e6 * seconds,
                    slots[0].bytes() as f64 / seconds / 1e9
                );
            }
        }
    }
}
