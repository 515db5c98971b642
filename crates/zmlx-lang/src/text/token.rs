//! Text to tokens.

use winnow::ascii::till_line_ending;
use winnow::combinator::{alt, opt, preceded, repeat};
use winnow::error::{ContextError, ErrMode};
use winnow::prelude::*;
use winnow::stream::LocatingSlice;
use winnow::token::{one_of, take_while};

use super::report::Problem;

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    /// An identifier.
    Name,
    /// An integer literal.
    Int(u64),
    /// A float literal.
    Float(f64),
    /// An operator or punctuation.
    Symbol,
    /// The end of the text.
    End,
}

/// A token with its text and byte range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Token<'s> {
    pub kind: Kind,
    pub text: &'s str,
    pub span: (usize, usize),
}

impl Token<'_> {
    /// Whether it is this operator or punctuation.
    pub fn is(&self, symbol: &str) -> bool {
        self.kind == Kind::Symbol && self.text == symbol
    }

    /// Whether it is this word.
    pub fn is_word(&self, word: &str) -> bool {
        self.kind == Kind::Name && self.text == word
    }

    /// For messages.
    pub fn describe(&self) -> String {
        match self.kind {
            Kind::End => "end of the text".to_owned(),
            _ if self.text.len() > 40 => "a long word".to_owned(),
            _ => format!("`{}`", self.text),
        }
    }
}

type Text<'s> = LocatingSlice<&'s str>;
type Lexed<T> = Result<T, ErrMode<ContextError>>;

/// The tokens of a text, with an `End` last.
pub(super) fn tokens(text: &str) -> Result<Vec<Token<'_>>, Problem> {
    let mut rest = LocatingSlice::new(text);
    let mut tokens = Vec::new();
    loop {
        // Both always succeed: blanks may be none.
        let _ = blanks(&mut rest);
        let start = text.len() - rest.len();
        if rest.is_empty() {
            tokens.push(Token { kind: Kind::End, text: "", span: (start, start) });
            return Ok(tokens);
        }
        let (word, range) = word.with_span().parse_next(&mut rest).map_err(|_| unexpected(text, start))?;
        let span = (range.start, range.end);
        tokens.push(Token { kind: classify(word, span)?, text: word, span });
    }
}

fn unexpected(text: &str, at: usize) -> Problem {
    let c = text[at..].chars().next().unwrap_or(' ');
    let label = match c {
        '\'' | '"' | '`' => "there are no strings in the language",
        '{' | '}' => "group with ( )",
        '\\' | '@' | '$' | '.' => "expected a name, a number or an operator",
        _ => "names are made of ASCII letters, digits and _",
    };
    Problem::new((at, at + c.len_utf8()), format!("unexpected character {c:?}"), label)
}

fn blanks(i: &mut Text<'_>) -> Lexed<()> {
    let space = take_while(1.., |c: char| c.is_ascii_whitespace()).void();
    let comment = ('#', till_line_ending).void();
    repeat(0.., alt((space, comment))).parse_next(i)
}

fn word<'s>(i: &mut Text<'s>) -> Lexed<&'s str> {
    alt((name, number, symbol)).parse_next(i)
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn name<'s>(i: &mut Text<'s>) -> Lexed<&'s str> {
    (one_of(|c: char| c.is_ascii_alphabetic() || c == '_'), take_while(0.., is_name)).take().parse_next(i)
}

/// Anything that starts like a number, with the letters that follow: `classify` says what is wrong with it.
fn number<'s>(i: &mut Text<'s>) -> Lexed<&'s str> {
    let digits = || take_while(1.., |c: char| c.is_ascii_digit() || c == '_');
    let point = (opt(digits()), '.', opt(digits()));
    let mantissa = alt(((digits(), opt(preceded('.', opt(digits())))).void(), point.void()));
    let exponent = (one_of(['e', 'E']), opt(one_of(['+', '-'])), digits());
    let prefixed = ('0', one_of(['x', 'X', 'b', 'B']), take_while(0.., is_name)).void();
    let decimal = (mantissa, opt(exponent), take_while(0.., is_name)).void();
    alt((prefixed, decimal)).take().verify(|t: &str| t != ".").parse_next(i)
}

fn symbol<'s>(i: &mut Text<'s>) -> Lexed<&'s str> {
    // Longer ones first.
    let two = alt((alt(("**", "//", "<<", ">>", "&&", "||")), alt(("<=", ">=", "==", "!=", "+=", "->"))));
    let one = one_of(|c: char| "+-*/%<>!~&|^?:()[],;=".contains(c));
    alt((two, one.take())).parse_next(i)
}

fn classify(word: &str, span: (usize, usize)) -> Result<Kind, Problem> {
    let first = word.as_bytes().first().copied().unwrap_or(b' ');
    if first.is_ascii_alphabetic() || first == b'_' {
        if word.len() > 128 {
            return Err(Problem::new(span, "a name of more than 128 characters", "shorten it"));
        }
        return Ok(Kind::Name);
    }
    if !first.is_ascii_digit() && first != b'.' {
        return Ok(Kind::Symbol);
    }
    let digits = word.replace('_', "");
    let radix = match digits.get(..2) {
        Some("0x" | "0X") => Some(16),
        Some("0b" | "0B") => Some(2),
        _ => None,
    };
    let integer = match radix {
        Some(radix) => Some(u64::from_str_radix(&digits[2..], radix)),
        None if digits.bytes().all(|b| b.is_ascii_digit()) => Some(digits.parse()),
        None => None,
    };
    match integer {
        Some(Ok(v)) => Ok(Kind::Int(v)),
        Some(Err(e)) if *e.kind() == std::num::IntErrorKind::PosOverflow => {
            Err(Problem::new(span, "an integer that does not fit in 64 bits", "write a float, such as 1e20"))
        }
        Some(Err(_)) => {
            Err(Problem::new(span, "not a number", "expected digits of that base after 0x or 0b"))
        }
        None => match digits.parse::<f64>() {
            Ok(v) if v.is_finite() => Ok(Kind::Float(v)),
            Ok(_) => Err(Problem::new(span, "a number beyond the range of f64", "write inf for infinity")),
            Err(_) => {
                Err(Problem::new(span, "not a number", "expected digits such as 12, 1.5, 1e-5 or 0xff"))
            }
        },
    }
}
