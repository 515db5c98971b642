use std::collections::BTreeMap;

use super::layout::{Layout, layered};
use super::svg::{Anchor, Svg, text_width};
use super::{Detail, groups};
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::infer::Types;

const FONT: f64 = 11.0;
const SMALL: f64 = 9.0;
const MARGIN: f64 = 24.0;
/// Panels are put side by side up to this width.
const WIDEST: f64 = 3600.0;
const FUSED: &str = "#ffd09a";
const WEIGHT: &str = "#dbe9ff";
const STATE: &str = "#d5f0d9";
const PLAIN: &str = "#f4f4f7";
const OUTSIDE: &str = "#ffffff";
/// One a kind of layer, in turn.
const KINDS: [&str; 8] =
    ["#e3dcf5", "#fbe3d0", "#d7ecef", "#f9dfe8", "#e4efd2", "#f5ecc6", "#dde3ea", "#efe0d6"];

/// A box of a panel.
struct Item {
    lines: Vec<String>,
    fill: &'static str,
    title: String,
}

/// The nodes of one group, laid out.
struct Panel {
    title: String,
    items: Vec<Item>,
    sizes: Vec<(f64, f64)>,
    layout: Layout,
}

impl Graph {
    /// A picture of the graph. On the left every layer in order, coloured by what it is; beside it the nodes of each kind
    /// of layer (or of every layer, with [`Detail::Every`]): op, module, type of the result. Orange is a node that a
    /// pattern put there, blue one with weights, green one with state.
    ///
    /// # Errors
    /// As [`Graph::infer`].
    pub fn svg(&self, detail: Detail) -> Result<String> {
        let types = self.infer()?;
        let groups = groups::groups(self);
        let kinds = groups::kinds(self, &types, &groups);
        let drawn: Vec<Vec<usize>> = match detail {
            Detail::Distinct => kinds.clone(),
            Detail::Every => (0..groups.len()).map(|g| vec![g]).collect(),
        };
        let panels: Vec<Panel> = drawn
            .iter()
            .map(|alike| {
                let names: Vec<&str> = alike.iter().map(|&g| groups[g].name.as_str()).collect();
                self.panel(&types, groups::title(&names), &groups[alike[0]].nodes)
            })
            .collect();
        let kind_of = |group: usize| kinds.iter().position(|k| k.contains(&group)).unwrap_or(0);
        let mut svg = Svg::new();
        let mut size = legend(&mut svg);
        let column: Vec<(&str, usize, usize)> = groups
            .iter()
            .enumerate()
            .map(|(g, group)| (group.name.as_str(), kind_of(g), group.nodes.len()))
            .collect();
        let overview = overview(&mut svg, (MARGIN, size.1), &column);
        let (left, mut x, mut y) = (MARGIN * 2.0 + overview.0, MARGIN * 2.0 + overview.0, size.1);
        let (mut tallest, top) = (0.0f64, size.1);
        for (panel, alike) in panels.iter().zip(&drawn) {
            let (w, h) = panel.outer();
            if x > left && x + w > WIDEST {
                (x, y, tallest) = (left, y + tallest + MARGIN, 0.0);
            }
            panel.draw(&mut svg, (x, y), KINDS[kind_of(alike[0]) % KINDS.len()]);
            tallest = tallest.max(h);
            size = (size.0.max(x + w + MARGIN), size.1.max(y + h + MARGIN));
            x += w + MARGIN;
        }
        size.1 = size.1.max(top + overview.1 + MARGIN);
        Ok(svg.finish(size.0, size.1))
    }

    /// The boxes of some nodes, of the values that come from other nodes, and of what others read.
    fn panel(&self, types: &Types, title: String, nodes: &[usize]) -> Panel {
        let mut items = Vec::new();
        let mut edges = Vec::new();
        let type_of = |v: Value| types.get(v).map_or_else(String::new, ToString::to_string);
        let outer: BTreeMap<Value, ()> = nodes
            .iter()
            .flat_map(|&n| self.nodes[n].inputs.iter().copied())
            .filter(|v| !nodes.contains(&v.node))
            .map(|v| (v, ()))
            .collect();
        let mut place: BTreeMap<Value, usize> = BTreeMap::new();
        for &value in outer.keys() {
            let from = groups::pooled_path(&self.nodes[value.node].path);
            place.insert(value, items.len());
            let lines = vec![format!("from {from}"), type_of(value)];
            items.push(Item { lines, fill: OUTSIDE, title: format!("{value}") });
        }
        let first = items.len();
        for (at, &index) in nodes.iter().enumerate() {
            items.push(self.node_box(types, index));
            for input in &self.nodes[index].inputs {
                let from = place.get(input).copied();
                let inside = || nodes.iter().position(|&n| n == input.node).map(|n| first + n);
                edges.extend(from.or_else(inside).map(|from| (from, first + at)));
            }
        }
        for (at, &index) in nodes.iter().enumerate() {
            let read = |v: &Value| v.node == index;
            let outside = self.nodes.iter().enumerate().filter(|(n, _)| !nodes.contains(n));
            if read(&self.output) || outside.flat_map(|(_, n)| &n.inputs).any(read) {
                let line = if read(&self.output) { "logits" } else { "to what follows" };
                items.push(Item { lines: vec![line.to_owned()], fill: OUTSIDE, title: String::new() });
                edges.push((first + at, items.len() - 1));
            }
        }
        edges.sort_unstable();
        edges.dedup();
        let sizes: Vec<(f64, f64)> = items.iter().map(Item::size).collect();
        let layout = layered(&sizes, &edges);
        Panel { title, items, sizes, layout }
    }

    fn node_box(&self, types: &Types, index: usize) -> Item {
        let node = &self.nodes[index];
        let rest = groups::layer_of(&node.path).map_or(node.path.as_str(), |(_, rest)| rest);
        let mut lines = vec![node.op.name().to_owned()];
        lines.extend(node.op.pattern().map(|p| format!("pattern {p}")));
        if !rest.is_empty() {
            lines.push(rest.to_owned());
        }
        // Splits give many values of one type.
        let outputs = types.node(index);
        let mut shapes: Vec<String> = outputs.iter().map(ToString::to_string).collect();
        shapes.dedup();
        match (shapes.len(), outputs.len()) {
            (1, n) if n > 1 => lines.push(format!("{n} x {}", shapes[0])),
            _ => lines.append(&mut shapes),
        }
        let fill = match node.op.pattern() {
            Some(_) => FUSED,
            None if node.op.slot().is_some() => STATE,
            None if !node.op.weights().is_empty() => WEIGHT,
            None => PLAIN,
        };
        let mut title = format!("%{index} {} [{}]", node.op.name(), node.path);
        for (name, value) in node.op.attributes() {
            title.push_str(&format!("\n{name} = {value}"));
        }
        for weight in node.op.weights() {
            let weight = &self.weights[weight.0];
            title.push_str(&format!("\n{} {:?} {}", weight.path, weight.shape, super::format_words(weight)));
        }
        Item { lines, fill, title }
    }
}

impl Item {
    fn size(&self) -> (f64, f64) {
        let width = |(i, l): (usize, &String)| text_width(l, if i == 0 { FONT } else { SMALL });
        let widest = self.lines.iter().enumerate().map(width).fold(40.0, f64::max);
        (widest + 14.0, 8.0 + FONT + 2.0 + (self.lines.len() - 1) as f64 * (SMALL + 3.0))
    }
}

impl Panel {
    /// Size with title and frame.
    fn outer(&self) -> (f64, f64) {
        let title = text_width(&self.title, FONT + 2.0);
        (self.layout.size.0.max(title) + 2.0 * MARGIN, self.layout.size.1 + 2.0 * MARGIN + 24.0)
    }

    fn draw(&self, svg: &mut Svg, at: (f64, f64), colour: &str) {
        let outer = self.outer();
        svg.rect(at, outer, colour, "");
        svg.rect((at.0 + 4.0, at.1 + 28.0), (outer.0 - 8.0, outer.1 - 32.0), "#fdfdfe", "");
        svg.text((at.0 + 12.0, at.1 + 19.0), FONT + 2.0, true, Anchor::Start, &self.title);
        let shift = (at.0 + (outer.0 - self.layout.size.0) / 2.0, at.1 + 24.0 + MARGIN);
        let moved = |p: &(f64, f64)| (p.0 + shift.0, p.1 + shift.1);
        for route in &self.layout.routes {
            svg.arrow(&route.iter().map(moved).collect::<Vec<_>>());
        }
        for ((item, size), centre) in self.items.iter().zip(&self.sizes).zip(&self.layout.centres) {
            let (x, y) = moved(centre);
            let top = y - size.1 / 2.0;
            svg.rect((x - size.0 / 2.0, top), *size, item.fill, &item.title);
            let mut line = top + 4.0 + FONT;
            for (index, text) in item.lines.iter().enumerate() {
                svg.text((x, line), if index == 0 { FONT } else { SMALL }, index == 0, Anchor::Middle, text);
                line += SMALL + 3.0;
            }
        }
    }
}

/// What the colours mean, in the first line. Gives the corner below.
fn legend(svg: &mut Svg) -> (f64, f64) {
    let mut x = MARGIN;
    for (fill, words) in
        [(FUSED, "fused by a pattern"), (WEIGHT, "has weights"), (STATE, "has state"), (PLAIN, "neither")]
    {
        svg.rect((x, MARGIN - 12.0), (14.0, 14.0), fill, "");
        svg.text((x + 20.0, MARGIN), FONT, false, Anchor::Start, words);
        x += 44.0 + text_width(words, FONT);
    }
    (x, MARGIN * 2.0)
}

/// The groups one below the other. Gives their size.
fn overview(svg: &mut Svg, at: (f64, f64), groups: &[(&str, usize, usize)]) -> (f64, f64) {
    let label = |nodes: usize| format!("{nodes} nodes");
    let wide = |&(name, _, nodes): &(&str, usize, usize)| {
        text_width(name, FONT).max(text_width(&label(nodes), SMALL))
    };
    let width = groups.iter().map(wide).fold(60.0, f64::max) + 20.0;
    let (height, step) = (34.0, 46.0);
    for (row, &(name, kind, nodes)) in groups.iter().enumerate() {
        let y = at.1 + row as f64 * step;
        if row > 0 {
            svg.arrow(&[(at.0 + width / 2.0, y - step + height), (at.0 + width / 2.0, y)]);
        }
        svg.rect((at.0, y), (width, height), KINDS[kind % KINDS.len()], "");
        svg.text((at.0 + width / 2.0, y + 14.0), FONT, true, Anchor::Middle, name);
        svg.text((at.0 + width / 2.0, y + 27.0), SMALL, false, Anchor::Middle, label(nodes));
    }
    (width, groups.len() as f64 * step)
}
