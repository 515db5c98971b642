//! `zmlx profile`: decode steps timed node by node, and launch by launch where they run on a GPU past MLX.

use std::fmt::Write;

use zmlx_graph::profile::ProfileRow;
use zmlx_models::{LaunchProfile, LoadOptions, ModelProfile, PatchReport, ProfileOptions};

use super::plan::Bandwidth;
use crate::args::ProfileArgs;
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::output::{self, Console, bytes};
use crate::{model, request};

/// `--steps` when it is not given.
const STEPS: usize = 16;
/// `--prompt-tokens` when it is not given.
const PROMPT_TOKENS: usize = 128;

/// Runs the steps, prints the tables, writes the pictures.
pub(crate) fn run(args: ProfileArgs, console: &Console) -> Result<(), Failure> {
    let source = request::model_source(args.model)?;
    let load = LoadOptions {
        patch: Some(request::patch_options(&args.patch)?),
        ..request::loading(args.dtype, args.device, &args.quantize)?
    };
    let steps = request::count("--steps", args.steps.as_deref(), STEPS)?;
    let prompt_tokens = request::count("--prompt-tokens", args.prompt_tokens.as_deref(), PROMPT_TOKENS)?;
    let given = request::bandwidth(args.bandwidth.as_deref())?;
    let _interrupt = Interrupt::install(SecondPress::Exits)?;
    let quiet = console.without_progress();
    let model = model::open(&source, &load, if args.json { &quiet } else { console })?;
    let bandwidth = match (given, model.device_bandwidth()) {
        (None, Some(stated)) => Bandwidth::stated(stated, "as the GPU's driver states"),
        _ => Bandwidth::new(given),
    };
    let options = ProfileOptions { prompt_tokens, steps, bandwidth: bandwidth.bytes_per_second() };
    let found = model.profile(&options).map_err(|error| match error {
        zmlx_models::GenerateError::PromptTooLong { .. } => Failure::usage(format_args!(
            "{prompt_tokens} prompt tokens and twice {} steps do not fit: {error}; give fewer with --prompt-tokens \
             or --steps",
            steps.saturating_add(1)
        )),
        error => Failure::runtime(error),
    })?;
    if let Some(path) = &args.svg {
        output::write_file(path, found.svg.as_bytes())?;
        console.note(&format!("wrote {}", path.display()));
    }
    if let Some(path) = &args.html {
        let info = model.info();
        let form = form(model.patch_report().as_ref());
        let heading =
            format!("{}: a decode step on {} in {}, {form}", info.family, found.device, found.dtype);
        output::write_file(path, found.report.html(&heading, &found.svg).as_bytes())?;
        console.note(&format!("wrote {}", path.display()));
    }
    if args.json {
        output::write_json(&found)
    } else {
        let form = form(model.patch_report().as_ref());
        output::write_stdout(describe(&found, &form, steps, &bandwidth).as_bytes())
    }
}

/// What ran: stock MLX, the engine, or some of each.
fn form(report: Option<&PatchReport>) -> String {
    match report {
        Some(PatchReport { cuda: Some(device), launches_per_token, .. }) => {
            format!("patched, {launches_per_token} launches a token as one graph on {device}")
        }
        Some(r) if r.native => format!("patched, all on the CPU engine with {} threads", r.threads),
        Some(r) if r.threads > 0 => format!("patched, in part on the CPU engine with {} threads", r.threads),
        _ => "stock".to_owned(),
    }
}

fn describe(found: &ModelProfile, form: &str, steps: usize, bandwidth: &Bandwidth) -> String {
    let report = &found.report;
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ =
        writeln!(text, "model      {} on {}, position {}, {form}", found.dtype, found.device, found.position);
    let _ = writeln!(text, "bandwidth  {}", bandwidth.words());
    let _ = writeln!(
        text,
        "step       {:.3} ms undisturbed, {:.3} ms as the sum of its nodes, each waited for; medians of {steps}",
        found.step_seconds * 1e3,
        report.total.seconds * 1e3
    );
    if let Some(launches) = &found.launches {
        launch_table(&mut text, launches);
    }
    table(&mut text, "op", &report.by_op, &report.total);
    table(&mut text, "module", &report.by_module, &report.total);
    if report.by_op.iter().chain(&report.by_module).any(|r| r.cache_resident) {
        text.push_str("\n* faster than memory: these bytes came from a processor's cache\n");
    }
    text
}

/// The launches of a step past MLX. Times of one launch are in microseconds; their parts follow one another.
fn launch_table(text: &mut String, found: &LaunchProfile) {
    let timeline = &found.timeline;
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "token      {:.3} ms in undisturbed decode past MLX, {:.3} ms with its {} launches noted; of {} steps",
        found.token_seconds * 1e3,
        timeline.seconds * 1e3,
        timeline.launches(),
        timeline.steps
    );
    if let Some(bound) = &found.bound {
        let _ = writeln!(
            text,
            "bound      {:.3} ms for {} of weights and state, {:.0} % of undisturbed decode",
            bound.seconds * 1e3,
            bytes(bound.bytes),
            100.0 * bound.share
        );
    }
    let wide = timeline.rows.iter().map(|r| r.name.chars().count()).max().unwrap_or(0).max(6);
    let _ = writeln!(
        text,
        "\n{:<wide$}  count       bytes   us each    wait     all   place    sums     end   GB/s   share",
        "launch"
    );
    for row in &timeline.rows {
        let p = row.each;
        let [whole, wait, all, place, sums, end] =
            [p.whole, p.wait, p.all, p.place, p.sums, p.end].map(|seconds| seconds * 1e6);
        let moved = if row.bytes > 0 { bytes(row.bytes) } else { "-".to_owned() };
        let rate = row.bytes_per_second.map_or_else(|| "-".to_owned(), |r| format!("{:.0}", r / 1e9));
        let _ = writeln!(
            text,
            "{:<wide$}  {:>5}  {moved:>10}  {whole:>8.2}  {wait:>6.2}  {all:>6.2}  {place:>6.2}  {sums:>6.2}  {end:>6.2}  \
             {rate:>5}  {:>4.1} %",
            row.name,
            row.count,
            100.0 * row.share
        );
    }
}

fn table(text: &mut String, what: &str, rows: &[ProfileRow], total: &ProfileRow) {
    let wide = rows.iter().map(|r| r.name.chars().count()).max().unwrap_or(0).max(6);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "\n{what:<wide$}  nodes       time   share       bytes   GB/s  roofline");
    for row in rows.iter().chain([total]) {
        let moved = if row.bytes > 0 { bytes(row.bytes) } else { "-".to_owned() };
        let rate = row.bytes_per_second.map_or_else(|| "-".to_owned(), |r| format!("{:.1}", r / 1e9));
        let roofline = row.roofline.map_or_else(|| "-".to_owned(), |r| format!("{:.0} %", 100.0 * r));
        let line = format!(
            "{:<wide$}  {:>5}  {:>6.3} ms  {:>4.1} %  {moved:>10}  {rate:>5}  {roofline:>8}{}",
            row.name,
            row.nodes,
            row.seconds * 1e3,
            100.0 * row.share,
            if row.cache_resident { " *" } else { "" }
        );
        let _ = writeln!(text, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use zmlx_graph::cuda::{LaunchParts, LaunchRow, Timeline};
    use zmlx_models::DecodeBound;

    use super::*;

    #[test]
    fn launches_are_rows_with_their_parts() {
        let each = LaunchParts {
            whole: 10.6e-6,
            wait: 0.4e-6,
            all: 0.1e-6,
            place: 1.5e-6,
            sums: 8e-6,
            end: 0.6e-6,
            ..LaunchParts::default()
        };
        let row = |name, bytes: u64, bytes_per_second| LaunchRow {
            name,
            count: 48,
            blocks: 132,
            bytes,
            each,
            bytes_per_second,
            share: 0.3,
        };
        let rows = vec![row("experts", 14_200_000, Some(1.34e12)), row("rope", 0, None)];
        let timeline = Timeline { steps: 16, seconds: 1.7e-3, rows };
        let bound = Some(DecodeBound::new(1_700_000_000, 3.35e12, 1.6e-3));
        let mut text = String::new();
        launch_table(&mut text, &LaunchProfile { timeline, token_seconds: 1.6e-3, bound });
        let expected = "\
token      1.600 ms in undisturbed decode past MLX, 1.700 ms with its 96 launches noted; of 16 steps
bound      0.507 ms for 1.70 GB of weights and state, 32 % of undisturbed decode

launch   count       bytes   us each    wait     all   place    sums     end   GB/s   share
experts     48     14.2 MB     10.60    0.40    0.10    1.50    8.00    0.60   1340  30.0 %
rope        48           -     10.60    0.40    0.10    1.50    8.00    0.60      -  30.0 %
";
        assert_eq!(text, expected);
    }
}
