//! What a kernel does and costs, in words, and its source texts.

use std::fmt::Write as _;

use zmlx_lang::emit::{self, Dialect};
use zmlx_lang::{Dtype, Node};
use zmlx_mlx::Array;

use crate::dtype::shape_of;
use crate::launch::{Given, Shapes, gpu};
use crate::{Kernel, Result, tuning};

/// Counts of a launch, before it is measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Bytes that must be read: every used input once.
    pub bytes_read: u64,
    /// Bytes that must be written: every output once.
    pub bytes_written: u64,
    /// Operations, in multiplications of about equal work.
    pub flops: u64,
    /// Walks over each row.
    pub passes: u32,
}

impl Cost {
    /// The least seconds a device needs that moves `bandwidth` bytes and does `flops` operations a second.
    pub fn roofline(&self, bandwidth: f64, flops: f64) -> f64 {
        ((self.bytes_read + self.bytes_written) as f64 / bandwidth).max(self.flops as f64 / flops)
    }
}

impl Kernel {
    /// The source text for inputs of these dtypes and shapes, with the parameters a launch would use by default.
    ///
    /// # Errors
    /// When dtypes or shapes do not fit, or the dialect can't express the kernel.
    pub fn source(&self, dialect: Dialect, dtypes: &[Dtype], shapes: &[Vec<usize>]) -> Result<emit::Source> {
        self.source_over(dialect, dtypes, shapes, None)
    }

    /// [`Kernel::source`] for a kernel whose domain (and scattered outputs' shape) is given.
    ///
    /// # Errors
    /// As `source`.
    pub fn source_over(
        &self,
        dialect: Dialect,
        dtypes: &[Dtype],
        shapes: &[Vec<usize>],
        domain: Option<&[usize]>,
    ) -> Result<emit::Source> {
        let prepared = self.prepare(dtypes.to_vec())?;
        let scattered = |o: &zmlx_lang::program::ProgramOutput| {
            o.scatter.as_ref().filter(|s| s.like.is_none()).map(|s| vec![1; s.at.len()])
        };
        let outputs = prepared.program.outputs.iter().map(scattered).collect();
        let given = Given { domain: domain.map(<[usize]>::to_vec), outputs };
        let shapes = Shapes::new(&prepared.program, shapes.to_vec(), &given)?;
        let params = tuning::gpu_params(self, &prepared, dialect, &shapes)?;
        Ok(emit::emit(&prepared.program, dialect, &gpu::plan(&prepared.program, &shapes, params))?)
    }

    /// What a launch with these arrays must move and do.
    ///
    /// # Errors
    /// When the arrays do not fit the kernel.
    pub fn cost(&self, inputs: &[&Array]) -> Result<Cost> {
        let arrays = self.bind(inputs).arrays()?;
        let prepared = self.prepare(self.dtypes(&arrays)?)?;
        let shapes = arrays.iter().map(|a| shape_of(a.shape())).collect();
        let shapes = Shapes::new(&prepared.program, shapes, &Given::default())?;
        let program = &prepared.program;
        let size = |s: &[usize], d: Dtype| s.iter().map(|n| *n as u64).product::<u64>() * d.size() as u64;
        let used = program.inputs.iter().zip(&shapes.inputs).filter(|(i, _)| i.used);
        Ok(Cost {
            bytes_read: used.map(|(i, s)| size(s, i.dtype)).sum(),
            bytes_written: program.outputs.iter().zip(&shapes.outputs).map(|(o, s)| size(s, o.dtype)).sum(),
            flops: program.flops_per_element() * shapes.domain.len() as u64,
            passes: program.passes,
        })
    }

    /// The kernel in words for a launch with these arrays: text, typed values by pass, bytes, work, and the least time
    /// on a device that moves `bandwidth` bytes a second.
    ///
    /// # Errors
    /// When the arrays do not fit the kernel.
    pub fn explain(&self, inputs: &[&Array], bandwidth: f64) -> Result<String> {
        let arrays = self.bind(inputs).arrays()?;
        let prepared = self.prepare(self.dtypes(&arrays)?)?;
        let program = &prepared.program;
        let cost = self.cost(inputs)?;
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(out, "{}", self.text());
        let _ = writeln!(
            out,
            "hash {}; {} values in {} pass(es) over each row",
            self.hash(),
            program.values.len(),
            program.passes
        );
        for pass in 0..program.passes {
            let _ = writeln!(out, "pass {pass}:");
            let needed = program.needed_in_pass(pass);
            for (i, v) in program.values.iter().enumerate() {
                let reduced = matches!(v.node, Node::Reduce(_, x) if program.value(x).stage == pass);
                if needed[i] || reduced {
                    let args: Vec<String> = v.node.args().iter().map(|a| format!("%{}", a.0)).collect();
                    let _ = writeln!(
                        out,
                        "  %{i}: {} = {} {}",
                        v.ty,
                        describe(&v.node, program),
                        args.join(", ")
                    );
                }
            }
        }
        let total = cost.bytes_read + cost.bytes_written;
        let _ = writeln!(
            out,
            "bytes: {} read, {} written; work: {} operations ({:.2} a byte)",
            cost.bytes_read,
            cost.bytes_written,
            cost.flops,
            cost.flops as f64 / total.max(1) as f64
        );
        let _ = writeln!(
            out,
            "at {:.1} GB/s: {:.3} ms at least",
            bandwidth / 1e9,
            total as f64 / bandwidth * 1e3
        );
        let stats = self.stats();
        let _ = writeln!(
            out,
            "so far: {} calls, {} CPU launches, {} GPU launches, {} bytes",
            stats.calls, stats.cpu_launches, stats.gpu_launches, stats.bytes
        );
        Ok(out)
    }
}

fn describe(node: &Node, program: &zmlx_lang::Program) -> String {
    match node {
        Node::Input(n) => format!("input {}", program.inputs[*n as usize].name),
        Node::Const(c) => format!("{}", c.as_f64()),
        Node::Index(axis) => format!("index({axis})"),
        Node::Len(axis) => format!("len({axis})"),
        Node::Random(_) => "random".to_owned(),
        Node::Op(op, _) => op.name().to_owned(),
        Node::Cast(dtype, _) => dtype.name().to_owned(),
        Node::Bitcast(dtype, _) => format!("bitcast_{dtype}"),
        Node::Reduce(op, _) => op.name().to_owned(),
        Node::Scan { op, reverse, exclusive, .. } => {
            let (e, r) = (if *exclusive { "_exclusive" } else { "" }, if *reverse { "_reverse" } else { "" });
            format!("{}{e}{r}", op.name())
        }
        Node::Load { input, .. } => format!("load {}", program.inputs[*input as usize].name),
    }
}
