//! Writing SVG.

use std::fmt::{Display, Write};

/// Width of a character of the monospace font, as a part of its size.
const CHARACTER: f64 = 0.602;

/// Width of a text in a monospace font.
pub(crate) fn text_width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * CHARACTER
}

/// `text` shortened to fit `width`, with dots for what is left out.
pub(crate) fn fitted(text: &str, size: f64, width: f64) -> String {
    let room = (width / (size * CHARACTER)).floor().max(0.0) as usize;
    if text.chars().count() <= room {
        return text.to_owned();
    }
    match room {
        0..=3 => String::new(),
        _ => text.chars().take(room - 2).chain("..".chars()).collect(),
    }
}

/// `text` with what XML keeps for itself written as entities, and control characters left out.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push('\n'),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}

/// A picture that is being written. Sizes are in pixels, y goes down.
pub(crate) struct Svg {
    body: String,
}

/// Where a text is anchored.
#[derive(Clone, Copy)]
pub(crate) enum Anchor {
    Start,
    Middle,
}

impl Svg {
    pub(crate) fn new() -> Self {
        Self { body: String::new() }
    }

    /// A filled rectangle with round corners; `title` is what a browser shows beside the pointer.
    pub(crate) fn rect(&mut self, at: (f64, f64), size: (f64, f64), fill: &str, title: &str) {
        let ((x, y), (w, h)) = (at, size);
        // Writing to a String cannot fail.
        let _ = write!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.2}\" height=\"{h:.1}\" rx=\"3\" fill=\"{fill}\" \
             stroke=\"#667\" stroke-width=\"0.6\">"
        );
        if !title.is_empty() {
            let _ = write!(self.body, "<title>{}</title>", escaped(title));
        }
        self.body.push_str("</rect>\n");
    }

    /// A line of text whose base line is at `at`.
    pub(crate) fn text(&mut self, at: (f64, f64), size: f64, bold: bool, anchor: Anchor, text: impl Display) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
        };
        let weight = if bold { " font-weight=\"bold\"" } else { "" };
        let text = escaped(&text.to_string());
        let _ = writeln!(
            self.body,
            "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\"{weight}>{text}</text>",
            at.0, at.1
        );
    }

    /// A smooth line through `points`, with an arrow at its end.
    pub(crate) fn arrow(&mut self, points: &[(f64, f64)]) {
        let Some((first, rest)) = points.split_first() else { return };
        let _ = write!(self.body, "<path d=\"M{:.1} {:.1}", first.0, first.1);
        let mut from = *first;
        for &(x, y) in rest {
            let middle = (from.1 + y) / 2.0;
            let _ = write!(self.body, "C{:.1} {middle:.1} {x:.1} {middle:.1} {x:.1} {y:.1}", from.0);
            from = (x, y);
        }
        self.body
            .push_str("\" fill=\"none\" stroke=\"#778\" stroke-width=\"1\" marker-end=\"url(#arrow)\"/>\n");
    }

    /// The whole document.
    pub(crate) fn finish(self, width: f64, height: f64) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"ui-monospace, monospace\" fill=\"#112\">\n\
             <defs><marker id=\"arrow\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"6\" \
             markerHeight=\"6\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" fill=\"#778\"/></marker></defs>\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.body
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_escaped_and_shortened() {
        assert_eq!(escaped("a<b> & \"c\"\u{1b}[2J"), "a&lt;b&gt; &amp; &quot;c&quot;[2J");
        assert_eq!(fitted("attention", 10.0, 100.0), "attention");
        assert_eq!(fitted("attention", 10.0, 40.0), "atte..");
        assert_eq!(fitted("attention", 10.0, 10.0), "");
        assert_eq!(fitted("attention", 10.0, -3.0), "");
    }
}
