//! Declarations of shared memory become references to arrays that the runtime places between guards.
//!
//! `threadgroup float a[32][33];` turns into a type of that shape and `zs::shared<type, K>("a")`, on the same lines;
//! `extern __shared__ float a[];` into a pointer to the launch's dynamic shared memory. Pointers and parameters in
//! shared memory stay as they are: the word before them is an empty macro.

/// A declaration outside of any function, by its line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Misplaced(pub usize);

/// The text with comments and string literals blanked, byte for byte as long.
pub(crate) fn without_comments(text: &str) -> Vec<u8> {
    let mut out = text.as_bytes().to_vec();
    let mut i = 0;
    while i < out.len() {
        let end = match (out[i], out.get(i + 1)) {
            (b'/', Some(b'/')) => find(&out, i, b"\n").unwrap_or(out.len()),
            (b'/', Some(b'*')) => find(&out, i + 2, b"*/").map_or(out.len(), |e| e + 2),
            (b'"', _) => string_end(&out, i),
            _ => {
                i += 1;
                continue;
            }
        };
        for b in &mut out[i..end] {
            if *b != b'\n' {
                *b = b' ';
            }
        }
        i = end;
    }
    out
}

fn find(text: &[u8], from: usize, what: &[u8]) -> Option<usize> {
    (from..text.len()).find(|&i| text[i..].starts_with(what))
}

fn string_end(text: &[u8], start: usize) -> usize {
    let mut i = start + 1;
    while i < text.len() && text[i] != b'"' {
        i += if text[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(text.len())
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

/// The identifier that ends at or before `end`, skipping blanks.
fn word_before(text: &[u8], end: usize) -> (usize, usize) {
    let mut e = end;
    while e > 0 && text[e - 1].is_ascii_whitespace() {
        e -= 1;
    }
    let mut s = e;
    while s > 0 && is_word(text[s - 1]) {
        s -= 1;
    }
    (s, e)
}

/// Type, then names with their dimensions, of `float a[2], b;` without the semicolon. None where it is no plain
/// declaration of variables.
fn declarators(text: &str) -> Option<(String, Vec<(String, String)>)> {
    let text = strip_alignment(text);
    let bytes = text.as_bytes();
    let (mut parts, mut start, mut angle, mut square) = (Vec::new(), 0, 0i32, 0i32);
    for (i, &b) in bytes.iter().enumerate() {
        match b {
            b'[' => square += 1,
            b']' => square -= 1,
            _ if square > 0 => {}
            b'<' => angle += 1,
            b'>' => angle -= 1,
            b',' if angle == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            b'*' | b'&' | b'=' | b'(' | b')' | b'{' | b'}' => return None,
            _ => {}
        }
    }
    parts.push(&text[start..]);
    let mut ty = String::new();
    let mut names = Vec::new();
    for (k, part) in parts.iter().enumerate() {
        let cut = part.find('[').unwrap_or(part.len());
        let (s, e) = word_before(part.as_bytes(), cut);
        if s == e {
            return None;
        }
        if k == 0 {
            ty = part[..s].trim().to_owned();
        } else if !part[..s].trim().is_empty() {
            return None;
        }
        names.push((part[s..e].to_owned(), part[cut..].trim_end().to_owned()));
    }
    (!ty.is_empty()).then_some((ty, names))
}

/// Without `alignas(..)` and `__align__(..)`: the runtime aligns every array to a page.
fn strip_alignment(text: &str) -> String {
    let mut out = text.to_owned();
    for word in ["alignas", "__align__"] {
        while let Some(s) = out.find(word) {
            let Some(e) = out[s..].find(')') else { break };
            out.replace_range(s..=s + e, "");
        }
    }
    out
}

fn rewritten(ty: &str, names: &[(String, String)], dynamic: bool, next: &mut usize) -> String {
    let mut out = String::new();
    for (name, dims) in names {
        *next += 1;
        let k = *next;
        if dynamic {
            out += &format!(
                "{ty}* {name} = static_cast<{ty}*>(zs_dynamic_shared(\"{name}\", zs::scalar<{ty}>::bytes)); "
            );
        } else {
            out += &format!(
                "typedef {ty} zs_type_{k}{dims}; zs_type_{k}& {name} = zs::shared<zs_type_{k}, {k}>(\"{name}\"); "
            );
        }
    }
    out
}

/// Rewrites the declarations in `text`. `depth` is the number of braces open before it, `next` numbers arrays.
pub(crate) fn shared_memory(text: &str, mut depth: i32, next: &mut usize) -> Result<String, Misplaced> {
    let code = without_comments(text);
    let mut out = String::with_capacity(text.len());
    let (mut i, mut copied) = (0, 0);
    while i < code.len() {
        match code[i] {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b if is_word(b) && (i == 0 || !is_word(code[i - 1])) => {
                let end = i + code[i..].iter().take_while(|&&b| is_word(b)).count();
                let word = &code[i..end];
                if word == b"threadgroup" || word == b"__shared__" {
                    let stop = find(&code, end, b";").unwrap_or(code.len());
                    let inner = String::from_utf8_lossy(&code[end..stop]).into_owned();
                    if let (true, Some((ty, names))) = (stop < code.len(), declarators(&inner)) {
                        if depth == 0 {
                            return Err(Misplaced(1 + text[..i].matches('\n').count()));
                        }
                        let (s, e) = word_before(&code, i);
                        let before = &code[s..e];
                        let cut = if before == b"extern" || before == b"static" { s } else { i };
                        out += &text[copied..cut];
                        out += &rewritten(&ty, &names, before == b"extern", next);
                        // Lines that the declaration spans stay as many.
                        let lines = text[cut..stop].matches('\n').count();
                        let kept = names.iter().map(|(_, d)| d.matches('\n').count()).sum::<usize>();
                        out += &"\n".repeat(lines.saturating_sub(kept));
                        copied = stop + 1;
                        i = stop + 1;
                        continue;
                    }
                }
                i = end;
                continue;
            }
            _ => {}
        }
        i += 1;
    }
    out += &text[copied..];
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewrite(text: &str) -> String {
        shared_memory(text, 1, &mut 0).unwrap()
    }

    #[test]
    fn arrays_are_rewritten_and_pointers_are_not() {
        let cases = [
            (
                "threadgroup float a[32];",
                r#"typedef float zs_type_1[32]; zs_type_1& a = zs::shared<zs_type_1, 1>("a"); "#,
            ),
            ("threadgroup float* p = a;", "threadgroup float* p = a;"),
            ("f(threadgroup float* p, int n); x;", "f(threadgroup float* p, int n); x;"),
            (
                "threadgroup_barrier(mem_flags::mem_threadgroup);",
                "threadgroup_barrier(mem_flags::mem_threadgroup);",
            ),
            ("// threadgroup float a[2];\n", "// threadgroup float a[2];\n"),
            (
                "extern __shared__ float s[];",
                r#"float* s = static_cast<float*>(zs_dynamic_shared("s", zs::scalar<float>::bytes)); "#,
            ),
        ];
        for (text, want) in cases {
            assert_eq!(rewrite(text), want, "{text}");
        }
        let two = rewrite("__shared__ alignas(16) vec<float, 4> a[N * 2][3],\n b;\nx");
        assert!(two.contains("typedef vec<float, 4> zs_type_1[N * 2][3];"), "{two}");
        assert!(two.contains("typedef vec<float, 4> zs_type_2;"), "{two}");
        assert_eq!(two.matches('\n').count(), 2, "{two}");
    }

    #[test]
    fn outside_of_functions_is_refused() {
        assert_eq!(shared_memory("int a;\n__shared__ float b[2];", 0, &mut 0), Err(Misplaced(2)));
    }
}
