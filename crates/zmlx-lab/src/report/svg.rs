//! Horizontal bars with whiskers, as SVG in the page. Written by hand: the drawing crates bring more code than this, or
//! need fonts of the system to place text.

use std::fmt::Write;

use super::html::escape;
use super::speed;
use crate::stats::Spread;

/// A bar: a median with its spread.
pub(super) struct Bar {
    /// What it is, left of it.
    pub(super) label: String,
    /// Class of its fill: `stock` or `patched`.
    pub(super) class: &'static str,
    /// What is shown.
    pub(super) spread: Spread,
}

const WIDTH: f64 = 760.0;
const LABELS: f64 = 230.0;
const VALUES: f64 = 90.0;
const ROW: f64 = 30.0;
const TOP: f64 = 8.0;
const AXIS: f64 = 34.0;

/// Longest label, in characters of the font's usual width.
const LABEL_CHARACTERS: usize = 34;

/// The chart; the bar is the median, the thin line min to max, the thick one the MAD to either side.
pub(super) fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    let largest = bars.iter().map(|b| b.spread.max).fold(0.0, f64::max);
    let step = nice_step(largest);
    let end = step * (largest / step).ceil().max(1.0);
    let plot = WIDTH - LABELS - VALUES;
    let x = |value: f64| LABELS + plot * (value / end).clamp(0.0, 1.0);
    let bottom = TOP + ROW * bars.len() as f64;
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\">\n",
        bottom + AXIS,
        escape(title)
    );
    let mut tick = 0.0;
    while tick <= end * 1.0001 {
        let at = x(tick);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/><text class=\"tick\" \
             x=\"{at:.1}\" y=\"{:.1}\">{}</text>",
            bottom + 14.0,
            number(tick)
        );
        tick += step;
    }
    let _ = writeln!(
        out,
        "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
        x(end / 2.0),
        bottom + 29.0,
        escape(unit)
    );
    for (index, bar) in bars.iter().enumerate() {
        self::bar(&mut out, bar, TOP + ROW * index as f64, unit, &x);
    }
    out.push_str("</svg>\n");
    out
}

fn bar(out: &mut String, bar: &Bar, top: f64, unit: &str, x: &dyn Fn(f64) -> f64) {
    let Spread { median, min, max, mad } = bar.spread;
    let middle = top + ROW / 2.0;
    let short: String = match bar.label.char_indices().nth(LABEL_CHARACTERS) {
        Some((cut, _)) => format!("{}\u{2026}", &bar.label[..cut]),
        None => bar.label.clone(),
    };
    let _ = writeln!(
        out,
        "<g><title>{}: median {} {unit}, {} to {}, MAD {}</title>\
         <text class=\"label\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\
         <rect class=\"{}\" x=\"{LABELS}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\"/>",
        escape(&bar.label),
        speed(median),
        speed(min),
        speed(max),
        speed(mad),
        LABELS - 8.0,
        middle + 4.0,
        escape(&short),
        bar.class,
        top + 6.0,
        (x(median) - LABELS).max(0.5),
        ROW - 12.0,
    );
    let (left, right) = (x(min), x(max));
    let _ = writeln!(
        out,
        "<path class=\"whisker\" d=\"M{left:.1} {middle:.1}H{right:.1}M{left:.1} {0:.1}v8M{right:.1} {0:.1}v8\"/>\
         <path class=\"mad\" d=\"M{1:.1} {middle:.1}H{2:.1}\"/>\
         <text class=\"value\" x=\"{3:.1}\" y=\"{4:.1}\">{5}</text></g>",
        middle - 4.0,
        x((median - mad).max(min)),
        x((median + mad).min(max)),
        right + 8.0,
        middle + 4.0,
        speed(median)
    );
}

/// 1, 2 or 5 times a power of ten, so that an axis up to `largest` has three to eight steps.
fn nice_step(largest: f64) -> f64 {
    if !(largest > 0.0 && largest.is_finite()) {
        return 1.0;
    }
    let raw = largest / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| raw <= f * power).unwrap_or(10.0);
    factor * power
}

fn number(value: f64) -> String {
    if value >= 1.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        for (largest, step) in
            [(20.5, 5.0), (9.0, 2.0), (100.0, 20.0), (731.0, 200.0), (0.4, 0.1), (0.0, 1.0)]
        {
            assert!((nice_step(largest) - step).abs() < 1e-12, "{largest}: {}", nice_step(largest));
            if largest > 0.0 {
                assert!((3.0..=8.0).contains(&(largest / step).ceil()), "{largest}");
            }
        }
        assert_eq!(nice_step(f64::NAN), 1.0);
    }

    #[test]
    fn bars_are_in_proportion_and_labels_are_escaped() {
        let bar = |median: f64| Bar {
            label: "<a> & \"b\"".into(),
            class: "stock",
            spread: Spread { median, min: median - 1.0, max: median + 1.0, mad: 0.5 },
        };
        let text = bars("t", "tok/s", &[bar(10.0), bar(5.0)]);
        assert!(!text.contains("<a>") && text.contains("&lt;a&gt; &amp; &quot;b&quot;"));
        let widths: Vec<f64> =
            text.split("width=\"").skip(1).filter_map(|part| part.split('"').next()?.parse().ok()).collect();
        assert!((widths[0] / widths[1] - 2.0).abs() < 0.01, "{widths:?}");
    }
}
