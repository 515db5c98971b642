//! `zmlx models`: the families, their patterns, and where each was verified.

use std::fmt::Write;

use zmlx_models::survey::{self, FamilySurvey, PatternSurvey};

use crate::args::ModelsArgs;
use crate::failure::Failure;
use crate::output;

/// Prints the families.
pub(crate) fn run(args: &ModelsArgs) -> Result<(), Failure> {
    if args.markdown {
        return output::write_stdout(survey::markdown().map_err(Failure::patch)?.as_bytes());
    }
    let families = survey::survey().map_err(Failure::patch)?;
    if args.json {
        return output::write_json(&families);
    }
    let text = if args.patterns { patterns(&families) } else { list(&families) };
    output::write_stdout(text.as_bytes())
}

fn list(families: &[FamilySurvey]) -> String {
    let mut text = String::new();
    for family in families {
        let mut rows = Vec::new();
        if family.model_types.len() > 1 {
            rows.push(("model_type", family.model_types.join(", ")));
        }
        if !family.models.is_empty() {
            rows.push(("random-model", family.models.join(", ")));
        }
        if let Some(p) = &family.patched {
            let whole = if p.native { ", all on the CPU engine" } else { "" };
            let launches = format!(
                "{} -> {} launches a token ({}, CPU){whole}",
                p.launches_stock, p.launches_patched, p.model
            );
            rows.push(("patched", launches));
            let cuda = match (p.launches_cuda, &p.cuda_refused) {
                (Some(launches), _) => format!("{launches} launches a token, past MLX"),
                (None, why) => format!("by MLX: {}", why.as_deref().unwrap_or_default()),
            };
            rows.push(("on CUDA", cuda));
            let matched = p.patterns.iter().filter(|p| p.matched > 0);
            let matched: Vec<String> = matched.map(|p| format!("{} x{}", p.name, p.matched)).collect();
            rows.push(("patterns", if matched.is_empty() { "none".into() } else { matched.join(", ") }));
        }
        for v in &family.verified {
            rows.push((
                "verified",
                format!("{} {}: {} ({})", v.backend, v.dtype, v.what, v.models.join(", ")),
            ));
        }
        if family.verified.is_empty() {
            rows.push(("verified", "nowhere yet".to_owned()));
        }
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", family.family);
        for (name, value) in rows {
            let _ = writeln!(text, "  {name:<13} {value}");
        }
    }
    text
}

/// One row a pattern, one column a family.
fn patterns(families: &[FamilySurvey]) -> String {
    let columns: Vec<(&str, &PatternSurvey)> =
        families.iter().filter_map(|f| Some((f.family, f.patched.as_ref()?))).collect();
    let mut text = format!("{:<18} {:<16}", "pattern", "class");
    columns.iter().for_each(|(family, _)| text.push_str(&format!(" {family:>9}")));
    text.push('\n');
    let mut refused = String::new();
    for pattern in columns.first().iter().flat_map(|(_, survey)| &survey.patterns) {
        let _ = write!(text, "{:<18} {:<16}", pattern.name, pattern.class);
        for (family, survey) in &columns {
            let found = survey.patterns.iter().find(|p| p.name == pattern.name);
            let width = family.len().max(9);
            let cell = found.map_or(0, |p| p.matched);
            let _ = write!(text, " {:>width$}", if cell == 0 { "-".to_owned() } else { cell.to_string() });
            for why in found.into_iter().flat_map(|p| &p.refused) {
                let _ = writeln!(refused, "{} in {family}: {why}", pattern.name);
            }
        }
        text.push('\n');
    }
    if !refused.is_empty() {
        let _ = write!(text, "\nleft alone though alike:\n{refused}");
    }
    text
}
