//! Which nodes belong to one layer, and which layers are equal.

use std::collections::HashMap;
use std::fmt::Write;

use crate::graph::Graph;
use crate::infer::Types;

/// The layer that a module path belongs to and the rest of the path: `model.layers.3.mlp.up` is
/// (`model.layers.3`, `mlp.up`). The layer ends with the first part that is a number; `None` if there is none.
pub fn layer_of(path: &str) -> Option<(&str, &str)> {
    let mut start = 0;
    for part in path.split('.') {
        let end = start + part.len();
        if start > 0 && !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            return Some((&path[..end], path[end..].trim_start_matches('.')));
        }
        start = end + 1;
    }
    None
}

/// A module path with `*` for the number of its layer, equal in all layers: `model.layers.*.mlp.up`.
pub fn pooled_path(path: &str) -> String {
    match layer_of(path) {
        Some((layer, rest)) => {
            let stem = layer.rfind('.').map_or(layer, |dot| &layer[..dot]);
            let dot = if rest.is_empty() { "" } else { "." };
            format!("{stem}.*{dot}{rest}")
        }
        None => path.to_owned(),
    }
}

/// The nodes of one layer, or those before or after all layers.
#[derive(Debug)]
pub(crate) struct Group {
    /// Path of the layer; `input` and `output` for what is in none.
    pub(crate) name: String,
    /// Its nodes, in order.
    pub(crate) nodes: Vec<usize>,
}

/// The groups of a graph in order of their first node.
pub(crate) fn groups(graph: &Graph) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut by_name: HashMap<String, usize> = HashMap::new();
    let mut layers_begun = false;
    for (index, node) in graph.nodes.iter().enumerate() {
        let name = match layer_of(&node.path) {
            Some((layer, _)) => {
                layers_begun = true;
                layer
            }
            None if layers_begun => "output",
            None => "input",
        };
        let group = *by_name.entry(name.to_owned()).or_insert_with(|| {
            groups.push(Group { name: name.to_owned(), nodes: Vec::new() });
            groups.len() - 1
        });
        groups[group].nodes.push(index);
    }
    groups
}

/// Numbers of the groups that are equal, in order of the first of each kind.
pub(crate) fn kinds(graph: &Graph, types: &Types, groups: &[Group]) -> Vec<Vec<usize>> {
    let mut kinds: Vec<Vec<usize>> = Vec::new();
    let mut by_text: HashMap<String, usize> = HashMap::new();
    for (index, group) in groups.iter().enumerate() {
        let kind = *by_text.entry(signature(graph, types, group)).or_insert_with(|| {
            kinds.push(Vec::new());
            kinds.len() - 1
        });
        kinds[kind].push(index);
    }
    kinds
}

/// A text that is equal for two groups if they compute the same with other weights.
fn signature(graph: &Graph, types: &Types, group: &Group) -> String {
    let local: HashMap<usize, usize> = group.nodes.iter().enumerate().map(|(l, &n)| (n, l)).collect();
    let mut text = String::new();
    for &index in &group.nodes {
        let node = &graph.nodes[index];
        let path = layer_of(&node.path).map_or(node.path.as_str(), |(_, rest)| rest);
        // Writing to a String cannot fail.
        let _ = write!(text, "{path} {} {:?} {:?}", node.op.name(), node.op.pattern(), node.op.attributes());
        for &input in &node.inputs {
            match (local.get(&input.node), types.get(input)) {
                (Some(at), _) => drop(write!(text, " %{at}.{}", input.output)),
                (None, Some(outside)) => drop(write!(text, " {outside}")),
                (None, None) => {}
            }
        }
        for weight in node.op.weights() {
            let weight = &graph.weights[weight.0];
            let _ = write!(text, " {:?} {:?}", weight.shape, weight.format);
        }
        text.push('\n');
    }
    text
}

/// `model.layers.0-1, 3-5` for the layers 0, 1, 3, 4 and 5.
pub(crate) fn title(names: &[&str]) -> String {
    let numbered = |name: &str| -> Option<(String, u64)> {
        let (stem, number) = name.rsplit_once('.')?;
        Some((stem.to_owned(), number.parse().ok()?))
    };
    let Some(all) = names.iter().map(|n| numbered(n)).collect::<Option<Vec<_>>>() else {
        return names.join(", ");
    };
    let Some((stem, _)) = all.first() else { return String::new() };
    if all.iter().any(|(s, _)| s != stem) {
        return names.join(", ");
    }
    let mut numbers: Vec<u64> = all.iter().map(|(_, n)| *n).collect();
    numbers.sort_unstable();
    let runs = numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    let words: Vec<String> = runs
        .map(|run| match run {
            [first, .., last] => format!("{first}-{last}"),
            other => other.iter().map(ToString::to_string).collect(),
        })
        .collect();
    format!("{stem}.{}", words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_paths() {
        let cases = [
            ("model.layers.3.mlp.up", Some(("model.layers.3", "mlp.up")), "model.layers.*.mlp.up"),
            ("model.layers.12", Some(("model.layers.12", "")), "model.layers.*"),
            ("model.norm", None, "model.norm"),
            ("blk.0.experts.7.w", Some(("blk.0", "experts.7.w")), "blk.*.experts.7.w"),
            ("3.mlp", None, "3.mlp"),
            ("", None, ""),
            ("a..1", Some(("a..1", "")), "a..*"),
        ];
        for (path, layer, pooled) in cases {
            assert_eq!(layer_of(path), layer, "{path}");
            assert_eq!(pooled_path(path), pooled, "{path}");
        }
    }

    #[test]
    fn titles_are_short() {
        let cases: [(&[&str], &str); 4] = [
            (&["input"], "input"),
            (&["m.0"], "m.0"),
            (&["m.0", "m.1", "m.3", "m.4", "m.5", "m.9"], "m.0-1, 3-5, 9"),
            (&["m.0", "k.1"], "m.0, k.1"),
        ];
        for (names, expected) in cases {
            assert_eq!(title(names), expected);
        }
    }
}
