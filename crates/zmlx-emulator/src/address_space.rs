//! Metal wants an address space on every pointer and reference; a C++ compiler does not miss it.
//!
//! Found by words: the name of a type directly before `*` or `&` is a pointer or a reference, never a product. Types
//! that the text defines itself are not known here, so this finds most omissions, not all.

use crate::kernel::{KernelText, TemplateArg};
use crate::rewrite::without_comments;

const SPACES: [&str; 6] = ["device", "constant", "threadgroup", "thread", "ray_data", "object_data"];
const SCALARS: [&str; 23] = [
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "float",
    "half",
    "bfloat",
    "float16_t",
    "bfloat16_t",
    "size_t",
    "int8_t",
    "uint8_t",
    "int16_t",
    "uint16_t",
    "int32_t",
    "uint32_t",
    "int64_t",
    "uint64_t",
];

fn is_type(word: &str, own: &[String]) -> bool {
    let base = word.strip_suffix(['2', '3', '4']).filter(|b| !b.ends_with(|c: char| c.is_ascii_digit()));
    SCALARS.contains(&word) || base.is_some_and(|b| SCALARS.contains(&b)) || own.iter().any(|t| t == word)
}

/// Words and single characters of a text, with their lines.
fn tokens(text: &str) -> Vec<(usize, String)> {
    let code = String::from_utf8_lossy(&without_comments(text)).into_owned();
    let mut out: Vec<(usize, String)> = Vec::new();
    let (mut line, mut in_word) = (1, false);
    for c in code.chars() {
        let word = c.is_ascii_alphanumeric() || c == '_';
        if word && in_word {
            if let Some((_, w)) = out.last_mut() {
                w.push(c);
            }
        } else if !c.is_whitespace() {
            out.push((line, c.to_string()));
        }
        in_word = word;
        line += usize::from(c == '\n');
    }
    out
}

/// Lines of a text with a pointer or reference that lacks its address space.
fn lines(text: &str, own: &[String]) -> Vec<usize> {
    let tokens = tokens(text);
    let word = |i: usize| tokens.get(i).map_or("", |(_, w)| w.as_str());
    let mut found = Vec::new();
    for i in 0..tokens.len() {
        if !is_type(word(i), own) || !matches!(word(i + 1), "*" | "&" | "const" | "volatile") {
            continue;
        }
        let mut after = i + 1;
        while matches!(word(after), "const" | "volatile" | "device" | "constant" | "threadgroup" | "thread") {
            after += 1;
        }
        if !matches!(word(after), "*" | "&") {
            continue;
        }
        let before = tokens[..i].iter().rev().map(|(_, w)| w.as_str());
        let qualifiers = before.take_while(|w| *w == "const" || *w == "volatile" || SPACES.contains(w));
        let given = qualifiers.chain((i + 1..after).map(&word)).any(|w| SPACES.contains(&w));
        if !given {
            found.push(tokens[i].0);
        }
    }
    found
}

/// The first such lines of a kernel: whether in the header, and the number.
pub(crate) fn missing(kernel: &KernelText) -> Vec<(bool, usize)> {
    let mut own: Vec<String> = kernel
        .template
        .iter()
        .filter(|(_, arg)| matches!(arg, TemplateArg::Dtype(_)))
        .map(|(name, _)| name.clone())
        .collect();
    for text in [&kernel.header, &kernel.body] {
        let tokens = tokens(text);
        own.extend(tokens.windows(2).filter(|w| w[0].1 == "typename").map(|w| w[1].1.clone()));
    }
    let header = lines(&kernel.header, &own).into_iter().map(|l| (true, l));
    header.chain(lines(&kernel.body, &own).into_iter().map(|l| (false, l))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_and_references_need_an_address_space() {
        let own = ["T".to_owned()];
        let cases: [(&str, usize); 14] = [
            ("float* p = x;", 1),
            ("const float4 *p;", 1),
            ("T const* p;", 1),
            ("f((float4*)x);", 1),
            ("void f(float& v);", 1),
            ("const device float* p = x;", 0),
            ("device const T* p;", 0),
            ("float device* p;", 0),
            ("reinterpret_cast<const device uint4*>(x)", 0),
            ("thread half& v", 0),
            ("float(a) * b; sizeof(int) * n; half2(a) & b;", 0),
            ("float a = b * c; // float* p", 0),
            ("int n = k & 3; threadgroup atomic_uint* q;", 0),
            ("template <typename U> U f(U* p, U v);", 0),
        ];
        for (text, want) in cases {
            assert_eq!(lines(text, &own).len(), want, "{text}");
        }
        let kernel = KernelText::new("k", "int a;\nfloat* p;")
            .header("template <typename U> U f(U* p) { return *p; }");
        assert_eq!(missing(&kernel), [(true, 1), (false, 2)]);
    }
}
