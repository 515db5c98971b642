//! Kernels that scan in both directions, as two kernels: a GPU text walks a row one way in each pass.

use zmlx_lang::{Dtype, Id, InputDecl, LangError, Node, OutputDecl, Role, Ty};

use crate::{Kernel, Result};

/// A kernel in two launches: the second takes the inputs and then the outputs of the first.
#[derive(Clone)]
pub(crate) struct Split {
    pub first: Kernel,
    pub second: Kernel,
}

/// Takes the scans of one direction (that of the first scan) out into a kernel of their own, as far as they do not depend on
/// scans of the other direction. `None` when all scans go the same way.
pub(crate) fn split(kernel: &Kernel, dtypes: &[Dtype]) -> Result<Option<Split>> {
    let lang = &kernel.0.lang;
    let needed = lang.graph.reachable(&lang.roots());
    let scans: Vec<(Id, bool)> = (0..needed.len() as u32)
        .map(Id)
        .filter(|id| needed[id.index()])
        .filter_map(|id| match lang.graph.node(id) {
            Node::Scan { reverse, .. } => Some((id, *reverse)),
            _ => None,
        })
        .collect();
    let Some(&(_, direction)) = scans.first() else { return Ok(None) };
    if scans.iter().all(|(_, reverse)| *reverse == direction) {
        return Ok(None);
    }
    let taken: Vec<Id> = scans
        .iter()
        .filter(|(id, reverse)| *reverse == direction && independent(lang, *id, direction))
        .map(|s| s.0)
        .collect();

    let mut first = lang.clone();
    let output = |(k, id): (usize, &Id)| OutputDecl {
        name: format!("scan{k}_of_{}", lang.name),
        value: *id,
        dtype: None,
        keep_dims: false,
        scatter: None,
    };
    first.name = format!("{}_scans", lang.name);
    first.outputs = taken.iter().enumerate().map(output).collect();
    // Floats go over as computed, not rounded to the inputs' storage.
    let program = first.program(dtypes)?;
    let mut types = Vec::new();
    for (decl, output) in first.outputs.iter_mut().zip(&program.outputs) {
        let ty = program.value(output.value).ty;
        decl.dtype = (ty == Ty::F32).then_some(Dtype::F32);
        types.push(ty.storage());
    }

    let mut second = lang.clone();
    second.name = format!("{}_rest", lang.name);
    let extra = |(k, dtype): (usize, &Dtype)| InputDecl {
        name: format!("scan{k}_of_{}", lang.name),
        role: Role::Element,
        dtype: Some(*dtype),
    };
    let own = second.inputs.len();
    second.inputs.extend(types.iter().enumerate().map(extra));
    let mut graph = zmlx_lang::Graph::default();
    let roots = graph.import(&lang.graph, &lang.roots(), |graph, id, _| {
        taken.iter().position(|t| *t == id).map(|k| graph.input(own + k))
    });
    second.graph = graph;
    let mut roots = roots.into_iter();
    let mut next = || {
        let what = "its outputs changed in number".to_owned();
        roots.next().ok_or(LangError::Kernel { kernel: lang.name.clone(), what })
    };
    for o in &mut second.outputs {
        o.value = next()?;
        for at in o.scatter.iter_mut().flat_map(|s| &mut s.at) {
            *at = next()?;
        }
        // The promotion of float inputs must not see the new f32 ones.
        o.dtype = o.dtype.or_else(|| {
            lang.program(dtypes).ok()?.outputs.iter().find(|p| p.name == o.name).map(|p| p.dtype)
        });
    }
    Ok(Some(Split { first: Kernel::from_ir(first)?, second: Kernel::from_ir(second)? }))
}

fn independent(kernel: &zmlx_lang::Kernel, id: Id, direction: bool) -> bool {
    let below = kernel.graph.reachable(&[id]);
    let other = |n: &Node| matches!(n, Node::Scan { reverse, .. } if *reverse != direction);
    !kernel.graph.nodes().iter().zip(below).any(|(n, below)| below && other(n))
}

#[cfg(test)]
mod tests {
    use zmlx_lang::emit::{self, Dialect, Layout, Plan};
    use zmlx_mlx::stream::{Device, with_device};
    use zmlx_mlx::{Array, Error};

    use super::*;

    /// Both halves together give what the whole gives, and a GPU text can be written for each.
    #[test]
    fn halves_equal_the_whole() {
        let texts = [
            "f(x) = cumsum(x) * cumsum_reverse(x)",
            "f(x) = cumsum_reverse(x - row_max(cummax(x))) + cumsum(x)",
            "f(x) = cumprod(0.5 * tanh(x)) - cummin_reverse(x), row_sum(cumsum_exclusive_reverse(x))",
        ];
        let values: Vec<f32> = (0..3 * 70).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
        let x = Array::from_slice(&values, &[3, 70]).unwrap();
        for text in texts {
            let whole = Kernel::new(text).unwrap();
            let halves = split(&whole, &[Dtype::F32]).unwrap().expect("it scans both ways");
            let (expected, found) = with_device(Device::Cpu, || {
                let expected = whole.call(&[&x])?;
                let scans = halves.first.call(&[&x])?;
                let inputs: Vec<&Array> = [&x].into_iter().chain(&scans).collect();
                Ok::<_, Error>((expected, halves.second.call(&inputs)?))
            })
            .unwrap();
            for (e, f) in expected.iter().zip(&found) {
                assert_eq!((e.shape(), e.dtype()), (f.shape(), f.dtype()), "{text}");
                for (e, f) in e.to_vec::<f32>().unwrap().iter().zip(f.to_vec::<f32>().unwrap()) {
                    assert!((e - f).abs() <= 1e-5 * (1.0 + e.abs()), "{text}: {f} is not {e}");
                }
            }
            for half in [&halves.first, &halves.second] {
                let lang = &half.0.lang;
                let program = lang.program(&vec![Dtype::F32; lang.inputs.len()]).unwrap();
                for dialect in [Dialect::Metal, Dialect::Cuda] {
                    // Texts that read the row anew in each pass take any kernel that scans one way in each.
                    let params = emit::Params { threads: 128, vec: 1, rows_per_group: 1, items: 0 };
                    let plan = Plan::new(vec![Layout::Full; lang.inputs.len()], 2, false, params);
                    if let Err(e) = emit::emit(&program, dialect, &plan) {
                        panic!("{text}, {}: {e}", half.name());
                    }
                }
            }
        }
        let one_way = Kernel::new("f(x) = cumsum(x) + cumprod(x)").unwrap();
        assert!(split(&one_way, &[Dtype::F32]).unwrap().is_none());
    }
}
