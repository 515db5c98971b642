//! What readers get to see of a graph.

use zmlx_graph::infer::inputs;
use zmlx_graph::op::{Context, Op};
use zmlx_graph::weights::Format;
use zmlx_graph::{Builder, Detail, Graph, InferContext, ShapeError, Type};
use zmlx_mlx::Array;

mod support;
use support::everything;

/// Stands for what a pattern puts into a graph.
#[derive(Debug)]
struct Fused;

impl Op for Fused {
    fn name(&self) -> &'static str {
        "twice"
    }

    fn pattern(&self) -> Option<&str> {
        Some("add<itself>")
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        Ok(vec![x.clone()])
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> zmlx_mlx::Result<Vec<Array>> {
        Ok(vec![inputs[0].add(inputs[0])?])
    }
}

/// Four layers, of which one is unlike the others.
fn layers() -> Graph {
    let dense = |_: &str, _: i32| Format::Dense;
    let mut b = Builder::new(&dense);
    let ids = b.tokens();
    let mut x = b.embedding("embed", ids, 64, 8);
    for layer in 0..4 {
        let path = format!("blocks.{layer}");
        let y = b.rms_norm(&format!("{path}.norm"), x, 8, 1e-5);
        let y = if layer == 2 { b.node(&path, Fused, &[y]) } else { b.add(&path, y, y) };
        x = b.add(&path, x, y);
    }
    let out = b.linear("head", x, 64, 8);
    b.finish(out)
}

#[test]
fn text_names_weights_slots_and_types() {
    let text = layers().describe().unwrap();
    let lines = [
        "@0 = weight : [64, 8] dense [embed]",
        "%1 = embedding(%0, @0) : [B, L, 8] activation [embed]",
        "%9 = twice(%8) : [B, L, 8] activation [blocks.2] <add<itself>>",
        "%14 = linear(%13, @5) : [B, L, 64] activation [head]",
        "return %14",
    ];
    for line in lines {
        assert!(text.lines().any(|l| l == line), "no '{line}' in:\n{text}");
    }
    let text = everything().0.describe().unwrap();
    for part in [
        "$0 = kv_cache : [B, 2, S, 8] activation, [B, 2, S, 8] activation [attention]",
        "$1 = conv_state : [B, 2, 32] activation [conv]",
        ", $0) : [B, 2, S, 8] activation, [B, 2, S, 8] activation [attention]",
        "affine 4-bit group 32",
        "float32 [moe.bias]",
    ] {
        assert!(text.contains(part), "no '{part}' in:\n{text}");
    }
}

#[test]
fn records_are_json_with_types_and_patterns() {
    let record = serde_json::to_value(layers().record().unwrap()).unwrap();
    let node = &record["nodes"][9];
    assert_eq!((&node["op"], &node["pattern"]), (&"twice".into(), &"add<itself>".into()));
    assert_eq!(node["outputs"][0]["shape"], serde_json::json!(["B", "L", "8"]));
    assert!(record["nodes"][8].get("pattern").is_none());
    assert_eq!((&record["output"], record["weights"].as_array().map(Vec::len)), (&"%14".into(), Some(6)));
    let record = serde_json::to_value(everything().0.record().unwrap()).unwrap();
    assert_eq!(record["slots"][1]["kind"], "conv_state");
    let rope = record["nodes"].as_array().unwrap().iter().find(|n| n["op"] == "rope").unwrap();
    assert_eq!(rope["attributes"][0], serde_json::json!(["dims", 8]));
}

#[test]
fn dot_has_each_node_and_edge_once() {
    let graph = layers();
    let dot = graph.dot().unwrap();
    assert_eq!(dot.matches("subgraph cluster_").count(), 6, "input, four layers, output");
    let edges: usize = graph.nodes.iter().map(|n| n.inputs.len()).sum();
    assert_eq!(dot.matches(" -> ").count(), edges + 1, "and one to the logits");
    assert_eq!(dot.matches("<add<itself>>").count(), 1);
    assert_eq!(dot.matches('{').count(), dot.matches('}').count());
    assert!(dot.contains("n13 -> n14 [label=\"[B, L, 8] activation\"]"), "{dot}");
}

/// Checks that tags are closed in order, and gives the texts.
fn texts(svg: &str) -> Vec<String> {
    let mut open = Vec::new();
    let mut texts = Vec::new();
    for piece in svg.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').expect("a tag ends");
        let name: String = tag.chars().take_while(|c| c.is_ascii_alphabetic()).collect();
        match tag.strip_prefix('/') {
            Some(closed) => assert_eq!(open.pop().as_deref(), Some(closed)),
            None if tag.ends_with('/') => {}
            None => open.push(name),
        }
        if !text.trim().is_empty() {
            texts.push(text.to_owned());
        }
    }
    assert!(open.is_empty(), "{open:?}");
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    texts
}

#[test]
fn equal_layers_are_drawn_once_unless_all_are_asked_for() {
    let graph = layers();
    let once = texts(&graph.svg(Detail::Distinct).unwrap());
    let count = |texts: &[String], what: &str| texts.iter().filter(|t| t.as_str() == what).count();
    assert_eq!(count(&once, "blocks.0-1, 3"), 1, "{once:?}");
    assert_eq!((count(&once, "rms_norm"), count(&once, "twice"), count(&once, "linear")), (2, 1, 1));
    assert_eq!(count(&once, "pattern add&lt;itself&gt;"), 1);
    // The overview has them all.
    assert_eq!(count(&once, "blocks.3"), 1);
    let all = texts(&graph.svg(Detail::Every).unwrap());
    assert_eq!((count(&all, "rms_norm"), count(&all, "twice"), count(&all, "linear")), (4, 1, 1));
    let many = everything().0;
    let drawn = texts(&many.svg(Detail::Distinct).unwrap());
    for node in &many.nodes {
        assert!(count(&drawn, node.op.name()) > 0, "{}", node.op.name());
    }
    assert_eq!(graph.svg(Detail::Every), graph.svg(Detail::Every), "the same picture each time");
}

#[test]
fn graphs_that_do_not_fit_are_errors_in_each_form() {
    let dense = |_: &str, _: i32| Format::Dense;
    let mut b = Builder::new(&dense);
    let ids = b.tokens();
    let x = b.embedding("embed", ids, 64, 8);
    let out = b.linear("head", x, 64, 9);
    let graph = b.finish(out);
    let errors = [
        graph.describe().unwrap_err(),
        graph.record().unwrap_err(),
        graph.dot().unwrap_err(),
        graph.svg(Detail::Every).unwrap_err(),
    ];
    for error in errors {
        assert!(error.to_string().contains("%2 at head: linear: input 0"), "{error}");
    }
}
