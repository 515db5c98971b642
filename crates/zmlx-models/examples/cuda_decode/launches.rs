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

/// Where the time of a step goes while launches overlap, those of one name and size together, in microseconds a launch; see
/// [`zmlx_graph::cuda::LaunchParts`].
pub(crate) fn timeline(executor: &Executor, token: u32, state: &mut State) -> Result<()> {
    let found = executor.timeline(&[token; 6], state)?.ok_or("no launch of ours")?;
    println!("  a step with notes: {:.1} us", found.seconds * 1e6);
    println!(
        "  {:<34} {:>5} {:>6} {:>9} {:>7} | {:>6} {:>6} {:>6} {:>6} {:>6} | {:>6} {:>6} | {:>6} {:>6}",
        "launch",
        "count",
        "blocks",
        "bytes",
        "us",
        "wait",
        "all",
        "place",
        "sums",
        "end",
        "first",
        "last",
        "GB/s",
        "share"
    );
    for row in &found.rows {
        let p = row.each;
        let [us, wait, all, place, sum, end, first, last] =
            [p.whole, p.wait, p.all, p.place, p.sums, p.end, p.first, p.last].map(|s| s * 1e6);
        let rate = row.bytes_per_second.map_or_else(|| "-".to_owned(), |r| format!("{:.0}", r / 1e9));
        println!(
            "  {:<34} {:>5} {:>6} {:>9} {us:>7.2} | {wait:>6.2} {all:>6.2} {place:>6.2} {sum:>6.2} {end:>6.2} | {first:>6.2} {last:>6.2} | {rate:>6} {:>4.1} %",
            row.name,
            row.count,
            row.blocks,
            row.bytes,
            100.0 * row.share
        );
    }
    Ok(())
}
