//! `zmlx plan`: what a token costs, counted from the graph, stock and patched.

mod gpu;

use std::fmt::Write;

use serde::Serialize;
use zmlx_graph::bandwidth::read_bandwidth;
use zmlx_graph::cost::CostRow;
use zmlx_graph::{Cost, Work};
use zmlx_models::{Blueprint, PatchReport, SizesFrom};

use crate::args::{Device, PlanArgs};
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::output::{self, Console, bytes, count, grouped};
use crate::{model, request};

/// A line of the table: what is counted, and how it is written.
type Count = (&'static str, fn(&Work) -> String);

/// Counts, and prints the tables.
pub(crate) fn run(args: PlanArgs, console: &Console) -> Result<(), Failure> {
    let source = request::model_source(args.model)?;
    let position = request::context(args.context.as_deref())?;
    let given = request::bandwidth(args.bandwidth.as_deref())?;
    let patch = request::patch_options(&args.patch)?;
    // A download can be long.
    let _interrupt = Interrupt::install(SecondPress::Exits)?;
    let folder = if args.json {
        model::locate(&source, &console.without_progress())?
    } else {
        model::locate(&source, console)?
    };
    let blueprint = Blueprint::read(&folder).map_err(Failure::load)?;
    let stored = blueprint.decode_cost(position).map_err(Failure::load)?;
    let on_gpu = match args.device {
        Device::Cpu => None,
        Device::Gpu => Some(gpu::Gpu::found().unwrap_or_else(gpu::Gpu::assumed)),
        Device::Auto => gpu::Gpu::found(),
    };
    if let Some(gpu) = on_gpu {
        let counted = blueprint.on_cuda(&patch, position).map_err(Failure::patch)?;
        let plan = gpu::Plan::new(&blueprint, gpu, given, position, &stored, &counted);
        return match args.json {
            true => output::write_json(&plan),
            false => output::write_stdout(plan.describe(&folder.display().to_string()).as_bytes()),
        };
    }
    let held = blueprint.decode_cost_f32(position).map_err(Failure::load)?;
    let fused = blueprint.patched(&patch).map_err(Failure::patch)?;
    let patched = fused.decode_cost(position).map_err(Failure::load)?;
    let bandwidth = Bandwidth::new(given);
    let plan = Plan {
        family: &blueprint.info.family,
        parameters_total: blueprint.info.parameters_total,
        parameters_active: blueprint.info.parameters_active,
        sizes: match blueprint.sizes {
            SizesFrom::Headers => "headers of the weight files",
            SizesFrom::Config => "config.json alone",
        },
        graph: "stock",
        position,
        roofline: Roofline::new(&stored, &bandwidth),
        roofline_f32: Roofline::new(&held, &bandwidth),
        as_stored: &stored,
        held_in_f32: &held.total,
        patched: Patched {
            report: &fused.report,
            roofline: Roofline::new(&patched, &bandwidth),
            cost: &patched,
        },
        bandwidth,
    };
    if args.json {
        return output::write_json(&plan);
    }
    let mut text = plan.describe(&folder.display().to_string());
    if !args.patched {
        table(&mut text, "stock op", &stored.by_op, &stored.total);
    }
    table(&mut text, "patched op", &patched.by_op, &patched.total);
    if args.modules && !args.patched {
        table(&mut text, "stock module", &stored.by_module, &stored.total);
    }
    if args.modules {
        table(&mut text, "patched module", &patched.by_module, &patched.total);
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
    /// Where it comes from, if it was not measured.
    #[serde(skip)]
    said: &'static str,
}

impl Bandwidth {
    /// What was given, or what all threads of this machine read.
    pub(super) fn new(given: Option<f64>) -> Self {
        if let Some(bytes_per_second) = given {
            return Self::stated(bytes_per_second, "as given");
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { bytes_per_second: read_bandwidth(threads), measured: true, threads: Some(threads), said: "" }
    }

    /// What `said` says.
    pub(super) fn stated(bytes_per_second: f64, said: &'static str) -> Self {
        Self { bytes_per_second, measured: false, threads: None, said }
    }

    pub(super) fn bytes_per_second(&self) -> f64 {
        self.bytes_per_second
    }

    /// `21.3 GB/s, read by 2 threads of this machine`.
    pub(super) fn words(&self) -> String {
        let said = match self.threads {
            Some(1) => ", read by 1 thread of this machine".to_owned(),
            Some(n) => format!(", read by {n} threads of this machine"),
            None => format!(", {}", self.said),
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
}

/// The patched graph on the CPU.
#[derive(Serialize)]
struct Patched<'a> {
    report: &'a PatchReport,
    roofline: Roofline,
    cost: &'a Cost,
}

/// The JSON record.
#[derive(Serialize)]
struct Plan<'a> {
    family: &'a str,
    parameters_total: u64,
    parameters_active: u64,
    sizes: &'static str,
    graph: &'static str,
    position: u32,
    bandwidth: Bandwidth,
    roofline: Roofline,
    roofline_f32: Roofline,
    as_stored: &'a Cost,
    held_in_f32: &'a Work,
    patched: Patched<'a>,
}

impl Plan<'_> {
    fn describe(&self, model: &str) -> String {
        let heading = [
            ("model", format!("{model}, {}", self.family)),
            (
                "parameters",
                format!(
                    "{}, {} of them a token",
                    count(self.parameters_total),
                    count(self.parameters_active)
                ),
            ),
            ("sizes from", self.sizes.to_owned()),
            ("token", format!("one, after {} others", grouped(self.position.into()))),
            ("bandwidth", self.bandwidth.words()),
        ];
        let mut text = String::new();
        for (name, value) in heading {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<12} {}", output::one_line(&value));
        }
        let row = |text: &mut String, name: &str, cells: [String; 3]| {
            let [stored, held, patched] = cells;
            let line = format!("{name:<13} {stored:>14} {held:>18} {patched:>14}");
            let _ = writeln!(text, "{}", line.trim_end());
        };
        text.push('\n');
        row(&mut text, "a token", ["stock, as stored", "stock, in float32", "patched"].map(str::to_owned));
        let nodes = |cost: &Cost| grouped(cost.nodes.len() as u64);
        let stock = nodes(self.as_stored);
        row(&mut text, "nodes", [stock.clone(), stock, nodes(self.patched.cost)]);
        let works = [&self.as_stored.total, self.held_in_f32, &self.patched.cost.total];
        let counts: [Count; 6] = [
            ("launches", |w| grouped(w.launches)),
            ("weights", |w| bytes(w.weight_bytes)),
            ("state read", |w| bytes(w.state_read)),
            ("state written", |w| bytes(w.state_written)),
            ("bytes in all", |w| bytes(w.memory_bytes())),
            ("operations", |w| count(w.flops)),
        ];
        for (name, of) in counts {
            row(&mut text, name, works.map(of));
        }
        let rooflines = [&self.roofline, &self.roofline_f32, &self.patched.roofline];
        row(&mut text, "least time", rooflines.map(|r| format!("{:.3} ms", r.seconds_per_token * 1e3)));
        row(&mut text, "at most", rooflines.map(|r| format!("{:.1} tok/s", r.tokens_per_second)));
        let used = self.patched.report.patterns.iter().filter(|p| p.matched > 0);
        let used: Vec<String> = used.map(|p| format!("{} x {}", p.matched, p.name)).collect();
        let used = if used.is_empty() { "none".to_owned() } else { used.join(", ") };
        let _ = writeln!(text, "\npatterns     {used}");
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
