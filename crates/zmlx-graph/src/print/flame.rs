use super::groups::layer_of;
use super::svg::{Anchor, Svg, fitted};
use crate::cost::{Cost, Work};
use crate::graph::Graph;
use crate::profile::Profile;

const WIDTH: f64 = 1600.0;
const MARGIN: f64 = 16.0;
const ROW: f64 = 21.0;
const FONT: f64 = 10.0;
/// Boxes narrower than this are left out.
const NARROWEST: f64 = 0.4;

/// A module, or an op in one, with all that is inside.
struct Block {
    name: String,
    /// Whether it is an op and not a module.
    op: bool,
    fused: bool,
    seconds: f64,
    work: Work,
    inside: Vec<Block>,
}

impl Block {
    fn new(name: &str, op: bool) -> Self {
        Self {
            name: name.to_owned(),
            op,
            fused: false,
            seconds: 0.0,
            work: Work::default(),
            inside: Vec::new(),
        }
    }

    fn add(&mut self, path: &[&str], op: &str, fused: bool, seconds: f64, work: Work) {
        self.seconds += seconds;
        self.work = self.work + work;
        let (name, rest, is_op) = match path {
            [first, rest @ ..] => (*first, rest, false),
            [] if self.op => return,
            [] => (op, path, true),
        };
        let place = self.inside.iter().position(|b| b.name == name && b.op == is_op).unwrap_or_else(|| {
            self.inside.push(Self::new(name, is_op));
            self.inside.len() - 1
        });
        self.inside[place].fused |= is_op && fused;
        self.inside[place].add(rest, op, fused, seconds, work);
    }

    fn depth(&self) -> usize {
        1 + self.inside.iter().map(Self::depth).max().unwrap_or(0)
    }
}

impl Profile {
    /// A picture of where the time went: the whole call on top, its layers below in their order, then their modules, and
    /// at the bottom ops; as wide as they took long. A pointer over a box shows its time, share, bytes and bytes a second.
    /// The profile and the cost are of `graph`.
    pub fn svg(&self, graph: &Graph, cost: &Cost) -> String {
        let mut all = Block::new("call", false);
        for ((node, &seconds), work) in graph.nodes.iter().zip(&self.seconds).zip(&cost.nodes) {
            let (layer, rest) = layer_of(&node.path).unwrap_or((&node.path, ""));
            let rest = rest.split('.').filter(|part| !part.is_empty());
            let path: Vec<&str> = std::iter::once(layer).chain(rest).collect();
            all.add(&path, node.op.name(), node.op.pattern().is_some(), seconds, *work);
        }
        all.name = format!("call: {}", milliseconds(all.seconds));
        let mut svg = Svg::new();
        let scale = if all.seconds > 0.0 { (WIDTH - 2.0 * MARGIN) / all.seconds } else { 0.0 };
        draw(&mut svg, &all, (MARGIN, MARGIN), scale, all.seconds);
        svg.finish(WIDTH, 2.0 * MARGIN + all.depth() as f64 * ROW)
    }
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.3} ms", seconds * 1e3)
}

fn draw(svg: &mut Svg, block: &Block, at: (f64, f64), scale: f64, all: f64) {
    let width = block.seconds * scale;
    if width < NARROWEST {
        return;
    }
    let bytes = block.work.memory_bytes();
    let mut title = format!("{}\n{}", block.name, milliseconds(block.seconds));
    title.push_str(&format!(", {:.1} %", 100.0 * block.seconds / all));
    if bytes > 0 {
        title.push_str(&format!("\n{bytes} bytes, {:.1} GB/s", bytes as f64 / block.seconds / 1e9));
    }
    svg.rect(at, (width, ROW - 1.0), &colour(block), &title);
    let label = fitted(&block.name, FONT, width - 6.0);
    if !label.is_empty() {
        svg.text((at.0 + 3.0, at.1 + 14.0), FONT, !block.op, Anchor::Start, label);
    }
    let mut x = at.0;
    for inside in &block.inside {
        draw(svg, inside, (x, at.1 + ROW), scale, all);
        x += inside.seconds * scale;
    }
}

/// Ops by their name, the same in each picture; fused ones orange, modules grey.
fn colour(block: &Block) -> String {
    if block.fused {
        return "#ffb766".to_owned();
    }
    if !block.op {
        return "#e8e8ee".to_owned();
    }
    let hash = block.name.bytes().fold(2_166_136_261u32, |h, b| (h ^ u32::from(b)).wrapping_mul(16_777_619));
    // Hues of orange are kept for fused ops.
    format!("hsl({},58%,80%)", 60 + hash % 300)
}
