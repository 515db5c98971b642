//! Where the time of a decode step goes, launch by launch.

use std::collections::BTreeMap;

use zmlx_graph::{Executor, State};

use crate::Result;

/// The launches of a token, those of one name and size together.
pub(crate) fn times(executor: &Executor, token: u32, state: &mut State) -> Result<()> {
    executor.launch_times(token, state)?;
    let mut rows: BTreeMap<(&str, u64, i32, i32), Vec<f64>> = BTreeMap::new();
    for _ in 0..5 {
        for l in executor.launch_times(token, state)? {
            rows.entry((l.name, l.bytes, l.registers, l.spilled)).or_default().push(l.seconds);
        }
    }
    println!(
        "  {:<34} {:>6} {:>9} {:>10} {:>8} {:>5} {:>6}",
        "launch", "count", "us each", "bytes", "GB/s", "regs", "spill"
    );
    for ((name, bytes, registers, spilled), mut seconds) in rows {
        seconds.sort_by(f64::total_cmp);
        let (median, count) = (seconds[seconds.len() / 2], seconds.len() / 5);
        let rate = bytes as f64 / median / 1e9;
        let us = median * 1e6;
        println!("  {name:<34} {count:>6} {us:>9.2} {bytes:>10} {rate:>8.0} {registers:>5} {spilled:>6}");
    }
    Ok(())
}

/// Where the time of a step goes while launches overlap, those of one name and size together, in microseconds a launch: from
/// the end of the launch before to the end of the wait, until the last block has placed its activations, until the last has
/// its sums, until the last has ended; and how long before the end of the wait the first and the last block began.
pub(crate) fn timeline(executor: &Executor, token: u32, state: &mut State) -> Result<()> {
    let mut rows: BTreeMap<(&str, u64, usize), (usize, [f64; 8])> = BTreeMap::new();
    let mut whole = Vec::new();
    for round in 0..6 {
        let all = executor.launch_moments(token, state)?;
        if round == 0 {
            continue;
        }
        whole.push(all.last().map_or(0, |l| l.moments[4][1]) as f64 / 1e3);
        let mut before = 0;
        for l in &all {
            let [begun, waited, placed, summed, ended] = l.moments;
            let placed = placed[1].max(waited[1]);
            let summed = summed[1].max(placed);
            let row = rows.entry((l.name, l.bytes, l.blocks)).or_default();
            row.0 += 1;
            let lead = |t: u64| waited[0] as f64 - t as f64;
            let parts = [
                ended[1] as f64 - before as f64,
                waited[0] as f64 - before as f64,
                waited[1] as f64 - waited[0] as f64,
                placed as f64 - waited[1] as f64,
                summed as f64 - placed as f64,
                ended[1] as f64 - summed as f64,
                lead(begun[0]),
                lead(begun[1]),
            ];
            row.1.iter_mut().zip(parts).for_each(|(sum, part)| *sum += part / 1e3);
            before = ended[1];
        }
    }
    whole.sort_by(f64::total_cmp);
    println!("  a step with notes: {:.1} us", whole[whole.len() / 2]);
    println!(
        "  {:<34} {:>5} {:>6} {:>9} {:>7} | {:>6} {:>6} {:>6} {:>6} {:>6} | {:>6} {:>6}",
        "launch", "count", "blocks", "bytes", "us", "wait", "all", "place", "sums", "end", "first", "last"
    );
    for ((name, bytes, blocks), (count, sums)) in rows {
        let each = sums.map(|sum| sum / count as f64);
        let [us, wait, all, place, sum, end, first, last] = each;
        println!(
            "  {name:<34} {:>5} {blocks:>6} {bytes:>9} {us:>7.2} | {wait:>6.2} {all:>6.2} {place:>6.2} {sum:>6.2} {end:>6.2} | {first:>6.2} {last:>6.2}",
            count / 5
        );
    }
    Ok(())
}
