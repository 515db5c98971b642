//! Capsules for people: text for a terminal, and a page with charts.

mod html;
mod svg;
mod text;

use std::path::Path;

use crate::capsule::write_whole;
use crate::error::LabError;
use crate::roofline::{Against, Bound};
use crate::stats::{Gain, GainKind};

pub use html::html;
pub use text::{comparison, text};

/// Writes a page under a temporary name, then renames it.
pub fn write_html(path: &Path, page: &str) -> Result<(), LabError> {
    write_whole(path, page.as_bytes())
}

/// `1.52x (noise 2.1 %)`, or that it is none.
pub fn gain_text(gain: &Gain) -> String {
    let noise = 100.0 * gain.noise;
    match gain.kind {
        GainKind::Faster => format!("{:.2}x, faster (noise {noise:.1} %)", gain.ratio),
        GainKind::Slower => format!("{:.2}x, slower (noise {noise:.1} %)", gain.ratio),
        GainKind::Noise => format!("{:.2}x, within noise ({noise:.1} %)", gain.ratio),
    }
}

/// What bounds an arm, in words.
fn bound_text(bound: &Bound) -> String {
    match bound {
        Bound::CacheResident => "cache-resident: all weights fit into the last level of caches".to_owned(),
        Bound::Memory { fraction, against: Against::Median } => {
            format!("{:.1} % of the read bandwidth", 100.0 * fraction)
        }
        Bound::Memory { fraction, against: Against::Best } => {
            format!("{:.1} % of the best read bandwidth (above its median: it drifted)", 100.0 * fraction)
        }
    }
}

/// Text from a capsule on one line without control characters, which could command a terminal, and of bounded length.
fn plain(text: &str) -> String {
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let words = text.split(|c: char| c.is_whitespace() || odd(c)).filter(|word| !word.is_empty());
    let mut line = words.collect::<Vec<_>>().join(" ");
    if let Some((cut, _)) = line.char_indices().nth(400) {
        line.truncate(cut);
        line.push_str("...");
    }
    line
}

/// A speed with as many digits as it deserves.
fn speed(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Bytes in decimal units.
fn bytes(n: u64) -> String {
    match n as f64 {
        v if v >= 1e9 => format!("{:.2} GB", v / 1e9),
        v if v >= 1e6 => format!("{:.1} MB", v / 1e6),
        v => format!("{:.1} kB", v / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_called_noise() {
        let gain = |ratio, kind| gain_text(&Gain { ratio, noise: 0.021, kind });
        assert_eq!(gain(1.52, GainKind::Faster), "1.52x, faster (noise 2.1 %)");
        assert_eq!(gain(0.5, GainKind::Slower), "0.50x, slower (noise 2.1 %)");
        assert_eq!(gain(1.01, GainKind::Noise), "1.01x, within noise (2.1 %)");
    }

    #[test]
    fn text_from_strangers_is_tamed() {
        assert_eq!(plain("a\x1b[2J\n b\u{202e}c"), "a [2J b c");
        assert_eq!(plain(&"x".repeat(500)).len(), 403);
    }

    #[test]
    fn units() {
        assert_eq!([speed(123.4), speed(12.34), speed(1.234)], ["123", "12.3", "1.23"]);
        assert_eq!([bytes(880_000_000), bytes(4_700_000_000), bytes(20)], ["880.0 MB", "4.70 GB", "0.0 kB"]);
    }
}
