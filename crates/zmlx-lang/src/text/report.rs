//! Errors in texts, drawn with the line and a caret under the place.

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

use crate::LangError;

/// An error at a place of the text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Problem {
    /// Byte range of the place.
    pub span: (usize, usize),
    /// What is wrong, one line.
    pub title: String,
    /// Beside the caret: what was expected, or what to write.
    pub label: String,
}

impl Problem {
    pub fn new(span: (usize, usize), title: impl Into<String>, label: impl Into<String>) -> Self {
        Self { span, title: title.into(), label: label.into() }
    }

    /// The error with the report drawn over `text`.
    pub fn draw(self, text: &str) -> LangError {
        let offset = floor_boundary(text, self.span.0);
        let end = ceil_boundary(text, self.span.1.max(offset));
        let snippet = Snippet::source(text)
            .path("kernel")
            .annotation(AnnotationKind::Primary.span(offset..end).label(self.label.as_str()));
        let report = &[Level::ERROR.primary_title(self.title.as_str()).element(snippet)];
        LangError::Syntax { message: Renderer::plain().render(report), offset }
    }
}

fn floor_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

fn ceil_boundary(text: &str, at: usize) -> usize {
    (at.min(text.len())..=text.len()).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len())
}

/// What people write who come from another language, and its name here.
const ALIASES: &[(&str, &str)] = &[
    ("ln", "log"),
    ("sum", "row_sum"),
    ("mean", "row_mean"),
    ("var", "row_var"),
    ("prod", "row_prod"),
    ("argmax", "row_argmax"),
    ("argmin", "row_argmin"),
    ("logsumexp", "row_logsumexp"),
    ("amax", "row_max"),
    ("amin", "row_min"),
    ("fmax", "max"),
    ("fmin", "min"),
    ("maximum", "max"),
    ("minimum", "min"),
    ("clip", "clamp"),
    ("swish", "silu"),
    ("gelu_erf", "gelu"),
    ("logistic", "sigmoid"),
    ("rint", "round"),
    ("float", "f32"),
    ("float32", "f32"),
    ("float16", "f16"),
    ("half", "f16"),
    ("bfloat16", "bf16"),
    ("int", "i32"),
    ("int32", "i32"),
    ("int64", "i64"),
    ("uint", "u32"),
    ("uint32", "u32"),
    ("boolean", "bool"),
    ("if", "where"),
    ("length", "len"),
];

/// The name among `known` that was probably meant.
pub(super) fn suggest<'n>(name: &str, known: impl Iterator<Item = &'n str>) -> Option<String> {
    // Long names are not typing errors of anything, and the distance takes quadratic time.
    if name.len() > 32 {
        return None;
    }
    let known: Vec<&str> = known.collect();
    let lower = name.to_ascii_lowercase();
    let alias = ALIASES.iter().find(|(from, to)| *from == lower && known.contains(to));
    if let Some((_, to)) = alias {
        return Some((*to).to_owned());
    }
    // Of equally near ones, one of the same length: letters change places more often than they get lost.
    let near = known.iter().map(|k| (strsim::osa_distance(&lower, &k.to_ascii_lowercase()), k));
    let best = near.min_by_key(|(distance, k)| (*distance, k.len().abs_diff(name.len())))?;
    let allowed = if name.len() <= 3 { 1 } else { 2 };
    (best.0 <= allowed && best.0 < name.len()).then(|| (*best.1).to_owned())
}
