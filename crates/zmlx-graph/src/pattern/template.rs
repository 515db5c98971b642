//! The text of a pattern.
//!
//! One node a line, in the form in which graphs print: `y = linear(x)`, several outputs as `k, v = kv_append(a, b)`. `~`
//! for `=` says that others may read the node too: it is cheap, and each fused op that needs it does it anew. `op?` may be
//! absent (its output is then its first input), and `a|b` is either op. `@name` is the fused op that pattern `name` made. A
//! node after `with` must be there and is left alone: it ties parts together that meet nowhere else. The last line says
//! what leaves: `return k, v`.

/// One way in which a pattern can look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template {
    pub(crate) nodes: Vec<Step>,
    pub(crate) outputs: Vec<String>,
}

impl Template {
    /// The names that its nodes read and none of them makes, in order.
    pub(crate) fn inputs(&self) -> Vec<&String> {
        let made = |name: &String| self.nodes.iter().any(|step| step.outputs.contains(name));
        let mut inputs: Vec<&String> = Vec::new();
        for name in self.nodes.iter().filter(|s| !s.witness).flat_map(|s| &s.inputs) {
            if !made(name) && !inputs.contains(&name) {
                inputs.push(name);
            }
        }
        inputs
    }
}

/// A node of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) outputs: Vec<String>,
    /// Names of the ops it may be.
    pub(crate) ops: Vec<String>,
    pub(crate) inputs: Vec<String>,
    /// Whether others may read it too.
    pub(crate) shared: bool,
    /// Whether it must be there and is left alone.
    pub(crate) witness: bool,
}

/// Every way in which a text can be read: with and without each optional op. `Err` says what is wrong with the text.
pub(crate) fn parse(text: &str) -> Result<Vec<Template>, String> {
    let mut lines = Vec::new();
    let mut outputs = None;
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if let Some(list) = line.strip_prefix("return ") {
            outputs = Some(names(list));
            continue;
        }
        lines.push(step(line).ok_or_else(|| format!("not a node: {line}"))?);
    }
    let outputs = outputs.ok_or("no return line")?;
    let optional: Vec<usize> = (0..lines.len()).filter(|&i| lines[i].1).collect();
    // The fullest first.
    let mut choices: Vec<u32> = (0..1 << optional.len()).collect();
    choices.sort_by_key(|absent| absent.count_ones());
    let all = choices.into_iter().map(|absent| {
        let mut template = Template { nodes: Vec::new(), outputs: outputs.clone() };
        let mut renamed: Vec<(String, String)> = Vec::new();
        for (i, (step, _)) in lines.iter().enumerate() {
            let mut step = step.clone();
            for name in &mut step.inputs {
                if let Some((_, new)) = renamed.iter().find(|(old, _)| old == name) {
                    name.clone_from(new);
                }
            }
            let gone = optional.iter().position(|&o| o == i).is_some_and(|bit| absent >> bit & 1 == 1);
            if gone {
                renamed.push((step.outputs[0].clone(), step.inputs[0].clone()));
            } else {
                template.nodes.push(step);
            }
        }
        for name in &mut template.outputs {
            if let Some((_, new)) = renamed.iter().find(|(old, _)| old == name) {
                name.clone_from(new);
            }
        }
        template
    });
    Ok(all.collect())
}

fn names(list: &str) -> Vec<String> {
    list.split(',').map(|n| n.trim().to_owned()).collect()
}

/// A node, and whether it may be absent.
fn step(line: &str) -> Option<(Step, bool)> {
    let (witness, line) = line.strip_prefix("with ").map_or((false, line), |rest| (true, rest));
    let (left, call, shared) = match (line.split_once(" = "), line.split_once(" ~ ")) {
        (Some((left, call)), _) => (left, call, false),
        (None, Some((left, call))) => (left, call, true),
        _ => return None,
    };
    let (op, inputs) = call.strip_suffix(')')?.split_once('(')?;
    let optional = op.ends_with('?');
    let ops = op.trim_end_matches('?').split('|').map(str::to_owned).collect();
    let inputs = if inputs.trim().is_empty() { Vec::new() } else { names(inputs) };
    Some((Step { outputs: names(left), ops, inputs, shared, witness }, optional))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optional_ops_are_there_or_not() {
        let all = parse("n ~ rms_norm?(x)\n a, b = split|cut(n)\n c = add(a, b)\n return c").unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].nodes.len(), 3);
        assert!(all[0].nodes[0].shared && !all[0].nodes[1].shared);
        assert_eq!(all[1].nodes[0].inputs, ["x"]);
        assert_eq!(all[1].nodes[0].ops, ["split", "cut"]);
        assert_eq!(all[1].outputs, ["c"]);
    }

    #[test]
    fn a_witness_gives_no_inputs() {
        let all = parse("a = f(x)\n with y = g(a, z)\n b = h(a)\n return b").unwrap();
        assert_eq!((all[0].nodes.len(), all[0].nodes[1].witness, all[0].nodes[2].witness), (3, true, false));
        assert_eq!(all[0].inputs(), ["x"]);
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for text in ["a = b", "a = f(x)", "f(x)\nreturn x", "a = f(x\nreturn a"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
