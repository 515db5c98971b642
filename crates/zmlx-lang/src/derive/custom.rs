//! Gradients that an author wrote.

use super::build::Build;
use super::finish::{self, Derived, Extra};
use super::plan::{Level, Plan};
use super::reverse::Vjp;
use crate::error::{LangError, Result};
use crate::{Dtype, Graph, Id, Kernel, Node, OutputDecl, Role};

/// A [`Vjp`] from given expressions instead of derived ones: pairs of an input's number and its gradient, a value of
/// `graph`. In `graph`, the inputs `0..n` are the kernel's, `n..n + m` the values of its `m` outputs, and `n + m..` their
/// cotangents. For a row or scalar input an expression that differs along the row is summed over it.
///
/// # Errors
/// [`LangError::Kernel`] for an input, an output or a value that is not there; [`LangError::NoDerivative`] for an
/// indexed input, whose gradient has no place in an expression.
pub fn custom_vjp(kernel: &Kernel, graph: &Graph, gradients: &[(usize, Id)]) -> Result<Vjp> {
    let wrt: Vec<usize> = gradients.iter().map(|(n, _)| *n).collect();
    let plan = Plan::new(kernel, &wrt)?;
    let mut b = Build::new(&plan.kernel);
    let extra = Extra::declare(&mut b, &plan);
    let number = |n: u32| -> u32 {
        let (own, outputs) = (plan.kernel.inputs.len(), plan.kernel.outputs.len());
        match n as usize {
            k if k < own => n,
            k if k < own + outputs => extra.saved[k - own],
            k => extra.given[k - own - outputs],
        }
    };
    check(&plan, graph, gradients)?;
    let roots: Vec<Id> = gradients.iter().map(|(_, id)| *id).collect();
    let values = b.graph.import(graph, &roots, |g, _, node| match node {
        Node::Input(n) => Some(g.add(Node::Input(number(*n)))),
        Node::Load { input, at, bounds } => {
            Some(g.add(Node::Load { input: number(*input), at: at.clone(), bounds: *bounds }))
        }
        _ => None,
    });
    b.refresh();
    let mut outputs: Vec<Derived> = Vec::new();
    for (&n, value) in wrt.iter().zip(values) {
        let decl = &plan.kernel.inputs[n];
        let level = if decl.role == Role::Element { Level::Element } else { Level::Row };
        let value = if level == Level::Row && !b.is_uniform(value) { b.row_sum(value) } else { value };
        let scalar = matches!(decl.role, Role::Scalar(_)).then_some(Dtype::F32);
        let (name, dtype) = (format!("d_{}", decl.name), decl.dtype.or(scalar));
        outputs.push((OutputDecl { name, value, dtype, keep_dims: true, scatter: None }, level));
    }
    let finish::Finished { kernel, primals, given: cotangents, saved } =
        finish::kernel(&plan, b, outputs, "vjp", &extra, &[]);
    Ok(Vjp { kernel, primals, cotangents, saved, gradients: (0..wrt.len()).map(|i| vec![i]).collect() })
}

fn check(plan: &Plan, graph: &Graph, gradients: &[(usize, Id)]) -> Result<()> {
    let kernel = &plan.kernel;
    let bad = |what: String| Err(LangError::Kernel { kernel: kernel.name.clone(), what });
    for (n, id) in gradients {
        let input = kernel.inputs[*n].name.clone();
        if matches!(kernel.inputs[*n].role, Role::Indexed(_)) {
            let why =
                "an indexed input's gradient is scattered and can't be given as an expression".to_owned();
            return Err(LangError::NoDerivative { kernel: kernel.name.clone(), input, why });
        }
        if id.index() >= graph.nodes().len() {
            return bad(format!("the gradient of {input} refers to a node that is not there"));
        }
    }
    let (own, outputs) = (kernel.inputs.len(), kernel.outputs.len());
    for node in graph.nodes() {
        if let Node::Input(n) | Node::Load { input: n, .. } = node {
            let n = *n as usize;
            if n >= own + 2 * outputs {
                return bad(format!("a gradient reads input {n}, which is not there"));
            }
            let role = match n {
                n if n < own => kernel.inputs[n].role,
                n => plan.outputs[(n - own) % outputs].map_or(Role::Element, Level::role),
            };
            if matches!(role, Role::Indexed(_)) != matches!(node, Node::Load { .. }) {
                return bad(format!(
                    "a gradient reads input {n} in place where it is indexed, or the other way"
                ));
            }
        }
    }
    Ok(())
}
