//! `zmlx plan`: what a token costs, counted from the graph.

use std::fmt::Write;

use serde::Serialize;
use zmlx_graph::bandwidth::read_bandwidth;
use zmlx_graph::cost::CostRow;
use zmlx_graph::{Cost, Work};
use zmlx_models::{Blueprint, SizesFrom};

use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::output::{self, Console, bytes, count, grouped};
use crate::{model, request};

/// Counts, and prints the tables.
pub(crate) fn run(args: PlanArgs, console: &Console) -> Result<(), Failure> {
    let source = request::model_source(args.model)?;
    let position = request::context(args.context.as_deref())?;
    let given = request::bandwidth(args.bandwidth.as_deref())?;
    // A download can be long.
    let _interrupt = Interrupt::install(SecondPress::Exits)?;
    let folder = if args.json {
        model::locate(&source, &console.without_progress())?
    } else {
        model::locate(&source, console)?
    };
    let blueprint = Blueprint::read(&folder).map_err(Failure::load)?;
    let stored = blueprint.decode_cost(position).map_err(Failure::load)?;
    let held = blueprint.decode_cost_f32(position).map_err(Failure::load)?;
    let bandwidth = Bandwidth::new(given);
    let plan = Plan {
        family: &blueprint.info.family,
        sizes: match blueprint.sizes {
            SizesFrom::Headers => "headers of the weight files",
            SizesFrom::Config => "config.json alone",
        },
        graph: "stock",
        position,
        roofline: Roofline::new(&stored, &bandwidth),
        roofline_f32: Roofline::new(&held, &bandwidth),
        bandwidth,
        as_stored: &stored,
        held_in_f32: &held.total,
    };
    if args.json {
        return output::write_json(&plan);
    }
    let mut text = plan.describe(&folder.display().to_string());
    table(&mut text, "op", &stored.by_op, &stored.total);
    if args.modules {
        table(&mut text, "module", &stored.by_module, &stored.total);
    }
    output::write_stdout(text.as_bytes())
}

/// How fast memory is.
#[derive(Serialize)]
pub(super) struct Bandwidth {
    bytes_per_second: f64,
    /// Whether it was measured here and now.
    measured: bool,
    /// Threads that it was measured with.
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
}

impl Bandwidth {
    /// What was given, or what all threads of this machine read.
    pub(super) fn new(given: Option<f64>) -> Self {
        if let Some(bytes_per_second) = given {
            return Self { bytes_per_second, measured: false, threads: None };
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { bytes_per_second: read_bandwidth(threads), measured: true, threads: Some(threads) }
    }

    pub(super) fn bytes_per_second(&self) -> f64 {
        self.bytes_per_second
    }

    /// `21.3 GB/s, read by 2 threads of this machine`.
    pub(super) fn words(&self) -> String {
        let said = match self.threads {
            Some(1) => ", read by 1 thread of this machine".to_owned(),
            Some(n) => format!(", read by {n} threads of this machine"),
            None => ", as given".to_owned(),
        };
        format!("{:.1} GB/s{said}", self.bytes_per_second / 1e9)
    }
}

/// The least time of a token.
#[derive(Serialize)]
struct Roofline {
    seconds_per_token: f64,
    tokens_per_second: f64,
}

impl Roofline {
    fn new(cost: &Cost, bandwidth: &Bandwidth) -> Self {
        let seconds = cost.roofline_seconds(bandwidth.bytes_per_second());
        Self { seconds_per_token: seconds, tokens_per_second: 1.0 / seconds }
    }

    fn words(&self) -> String {
        format!("{:.3} ms a token, {:.1} tok/s", self.seconds_per_token * 1e3, self.tokens_per_second)
    }
}

/// The JSON record.
#[derive(Serialize)]
struct Plan<'a> {
    family: &'a str,
    sizes: &'static str,
    graph: &'static str,
    position: u32,
    bandwidth: Bandwidth,
    roofline: Roofline,
    roofline_f32: Roofline,
    as_stored: &'a Cost,
    held_in_f32: &'a Work,
}

impl Plan<'_> {
    fn describe(&self, model: &str) -> String {
        let (total, wide) = (&self.as_stored.total, self.held_in_f32);
        let nodes: usize = self.as_stored.by_op.iter().map(|r| r.nodes).sum();
        let rows = [
            ("model", model.to_owned()),
            ("sizes from", self.sizes.to_owned()),
            ("graph", format!("{}, {} nodes, {}", self.graph, grouped(nodes as u64), self.family)),
            ("token", format!("one, after {} others", grouped(self.position.into()))),
            ("launches", format!("{} a token", grouped(total.launches))),
            ("weights", format!("{} a token", bytes(total.weight_bytes))),
            (
                "state",
                format!("{} read, {} written a token", bytes(total.state_read), bytes(total.state_written)),
            ),
            ("in all", format!("{} a token, as stored", bytes(total.memory_bytes()))),
            ("", format!("{} a token, held in float32 (stock MLX on a CPU)", bytes(wide.memory_bytes()))),
            ("operations", format!("{} a token", count(total.flops))),
            ("bandwidth", self.bandwidth.words()),
            ("least time", format!("{}, as stored", self.roofline.words())),
            ("", format!("{}, held in float32", self.roofline_f32.words())),
        ];
        let mut text = String::new();
        for (name, value) in rows {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<12} {}", output::one_line(&value));
        }
        text
    }
}

fn table(text: &mut String, what: &str, rows: &[CostRow], total: &Work) {
    let wide = rows.iter().map(|r| r.name.chars().count()).max().unwrap_or(0).max(6);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "\n{what:<wide$}  nodes  launches      weights        state   share   operations");
    let all = CostRow { name: "all".to_owned(), nodes: rows.iter().map(|r| r.nodes).sum(), work: *total };
    for row in rows.iter().chain([&all]) {
        let work = &row.work;
        let share = 100.0 * work.memory_bytes() as f64 / total.memory_bytes().max(1) as f64;
        let state = work.state_read.saturating_add(work.state_written);
        let _ = writeln!(
            text,
            "{:<wide$}  {:>5}  {:>8}  {:>11}  {:>11}  {share:>5.1} %  {:>11}",
            row.name,
            row.nodes,
            work.launches,
            bytes(work.weight_bytes),
            bytes(state),
            count(work.flops)
        );
    }
}
