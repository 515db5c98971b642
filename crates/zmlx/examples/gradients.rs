//! Arrays, gradients, and a Rust function inside MLX's graph: `cargo run --release -p zmlx --example gradients`.

use zmlx::mlx::Result;
use zmlx::mlx::cpu::{CpuInput, CpuKernel, CpuOutput, CpuPrimitive, Spec};
use zmlx::prelude::*;

/// `x^3`, element by element, in Rust.
struct Cube;

impl CpuKernel for Cube {
    fn name(&self) -> &str {
        "cube"
    }

    fn outputs(&self, inputs: &[Spec]) -> Result<Vec<Spec>> {
        Ok(vec![inputs[0].clone()])
    }

    fn eval(&self, inputs: &[CpuInput<'_>], outputs: &mut [CpuOutput<'_>]) -> Result<()> {
        let x = inputs[0].as_slice::<f32>()?;
        for (y, x) in outputs[0].as_mut_slice::<f32>()?.iter_mut().zip(x) {
            *y = x * x * x;
        }
        Ok(())
    }

    fn vjp(
        &self,
        primals: &[Array],
        cotangents: &[Array],
        _outputs: &[Array],
        _argnums: &[usize],
    ) -> Result<Vec<Array>> {
        Ok(vec![primals[0].square()?.multiply_scalar(3.0)?.multiply(&cotangents[0])?])
    }
}

fn main() -> Result<()> {
    let x = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3])?;

    // MLX is lazy: nothing is computed before a value is read.
    let sum = x.square()?.sum_all()?;
    println!("sum of squares: {}", sum.item::<f32>()?);

    // The gradient of a Rust closure.
    let gradient = transforms::grad(|v| v[0].square()?.sum_all(), &[0]);
    println!("its gradient: {}", gradient(&[&x])?[0]);

    // The same through a primitive whose evaluation and derivative are Rust code.
    let cube = CpuPrimitive::new(Cube);
    println!("cubes: {}", cube.apply(&[&x])?[0]);
    let gradient = transforms::grad(move |v| cube.apply(&[&v[0]])?[0].sum_all(), &[0]);
    let slope = gradient(&[&x])?.remove(0);
    println!("their gradient: {slope}");
    assert_eq!(slope.to_vec::<f32>()?, [3.0, 12.0, 27.0]);

    // What is wrong comes back as an error with the op and the shapes.
    let wrong = x.matmul(&Array::from_slice(&[1.0f32, 2.0], &[2])?);
    println!("{}", wrong.expect_err("the shapes do not fit"));
    Ok(())
}
