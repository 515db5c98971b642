//! Derivatives against central differences of the double-precision evaluator.

use zmlx_lang::derive::{Jvp, Vjp, VjpOptions, jvp, vjp};
use zmlx_lang::eval::{Shapes, Tensor, evaluate};
use zmlx_lang::{Dtype, Kernel, Role, shape};

/// Numbers that look random, from -1 to 1, none near 0.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let v = (self.0 >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0;
        if v.abs() < 0.05 { v + 0.1 } else { v }
    }

    pub fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::f32(shape, &(0..n).map(|_| self.next()).collect::<Vec<_>>())
    }
}

/// A kernel and a point.
#[derive(Clone)]
pub struct Point {
    pub kernel: Kernel,
    pub inputs: Vec<Tensor>,
    pub call: Shapes,
}

pub fn values(t: &Tensor) -> Vec<f64> {
    t.to_f64()
}

impl Point {
    /// With the domain that the inputs broadcast to.
    pub fn new(kernel: Kernel, inputs: Vec<Tensor>) -> Self {
        let dtypes: Vec<Dtype> = inputs.iter().map(|i| i.dtype).collect();
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|i| i.shape.clone()).collect();
        let program = kernel.program(&dtypes).unwrap_or_else(|e| panic!("{}: {e}", kernel.to_text()));
        let domain = shape::domain(&program, &shapes, None).unwrap();
        Self { kernel, inputs, call: Shapes { domain: Some(domain.shape), outputs: vec![] } }
    }

    pub fn run(&self) -> Vec<Tensor> {
        evaluate(&self.kernel, &self.inputs, &self.call)
            .unwrap_or_else(|e| panic!("{e}\n{}", self.kernel.to_text()))
    }

    fn moved(&self, n: usize, i: usize, by: f64) -> Self {
        let mut moved = self.clone();
        let mut v = values(&moved.inputs[n]);
        v[i] += by;
        moved.inputs[n] = Tensor::f32(&moved.inputs[n].shape.clone(), &v);
        moved
    }

    pub fn floats(&self) -> Vec<usize> {
        (0..self.inputs.len()).filter(|n| self.inputs[*n].dtype.is_float()).collect()
    }

    fn rank(&self) -> usize {
        self.call.domain.as_ref().unwrap().len()
    }

    /// An output (or something of its shape) as an input of a derivative: with the row's axis where it was dropped.
    fn as_input(&self, t: &Tensor, scattered: bool) -> Tensor {
        let mut t = t.clone();
        if !scattered && t.shape.len() < self.rank() {
            t.shape.push(1);
        }
        t
    }

    /// The point at which the derivative kernel runs for these cotangents.
    pub fn reverse_point(&self, v: &Vjp, cotangents: &[Tensor]) -> Self {
        let outputs = self.run();
        let scattered = |j: usize| self.kernel.outputs[j].scatter.is_some();
        let primals = v.primals.iter().map(|n| self.inputs[*n].clone());
        let given = v.cotangents.iter().map(|j| self.as_input(&cotangents[*j], scattered(*j)));
        let saved = v.saved.iter().map(|j| self.as_input(&outputs[*j], scattered(*j)));
        let inputs = primals.chain(given).chain(saved).collect();
        let call = Shapes { domain: self.call.domain.clone(), outputs: vec![] };
        Self { kernel: v.kernel.clone(), inputs, call }
    }

    /// Gradients in the inputs' shapes.
    pub fn gradients(&self, v: &Vjp, wrt: &[usize], cotangents: &[Tensor]) -> Vec<Vec<f64>> {
        if v.kernel.outputs.is_empty() {
            return wrt.iter().map(|n| vec![0.0; self.inputs[*n].len()]).collect();
        }
        v.kernel.validate().unwrap();
        let point = self.reverse_point(v, cotangents);
        let outputs = point.run();
        let one = |(&n, from): (&usize, &Vec<usize>)| {
            let input = &self.inputs[n];
            let mut sum = vec![0.0; input.len()];
            for k in from {
                let t = &outputs[*k];
                self.check_shape(n, t);
                let strides = shape::broadcast_strides(&input.shape, &t.shape);
                for (i, g) in values(t).iter().enumerate() {
                    let (mut left, mut at) = (i, 0);
                    for axis in (0..t.shape.len()).rev() {
                        at += left % t.shape[axis] * strides[axis];
                        left /= t.shape[axis];
                    }
                    sum[at] += g;
                }
            }
            sum
        };
        wrt.iter().zip(&v.gradients).map(one).collect()
    }

    fn check_shape(&self, n: usize, gradient: &Tensor) {
        let mut expected = self.call.domain.clone().unwrap();
        match self.kernel.inputs[n].role {
            Role::Indexed(_) => expected = self.inputs[n].shape.clone(),
            Role::Element => {}
            _ => {
                if let Some(last) = expected.last_mut() {
                    *last = 1;
                }
            }
        }
        assert_eq!(gradient.shape, expected, "shape of the gradient of {}", self.kernel.inputs[n].name);
    }

    pub fn cotangents(&self, numbers: &mut Numbers) -> Vec<Tensor> {
        self.run().iter().map(|t| numbers.tensor(&t.shape)).collect()
    }

    fn paired(&self, cotangents: &[Tensor]) -> f64 {
        self.run().iter().zip(cotangents).map(|(y, c)| dot(&values(y), &values(c))).sum()
    }

    /// Central differences of the outputs' product with the cotangents.
    pub fn numeric_gradient(&self, n: usize, cotangents: &[Tensor], step: f64) -> Vec<f64> {
        let one = |i: usize| {
            let at = |by: f64| self.moved(n, i, by).paired(cotangents);
            // Fourth order, so that larger steps may be taken.
            (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step))) / (12.0 * step)
        };
        (0..self.inputs[n].len()).map(one).collect()
    }

    pub fn vjp(&self, wrt: &[usize]) -> Vjp {
        vjp(&self.kernel, wrt, &VjpOptions::default()).unwrap()
    }

    pub fn jvp(&self, wrt: &[usize]) -> Jvp {
        jvp(&self.kernel, wrt).unwrap()
    }

    /// The outputs' changes for changes of the inputs `wrt`.
    pub fn changes(&self, j: &Jvp, wrt: &[usize], tangents: &[Tensor]) -> Vec<Vec<f64>> {
        let zero = |t: &Tensor| vec![0.0; t.len()];
        let outputs = self.run();
        if j.kernel.outputs.is_empty() {
            return outputs.iter().map(zero).collect();
        }
        j.kernel.validate().unwrap();
        let tangent = |n: &usize| tangents[wrt.iter().position(|w| w == n).unwrap()].clone();
        let inputs = j.primals.iter().map(|n| self.inputs[*n].clone()).chain(j.tangents.iter().map(tangent));
        let point = Self { kernel: j.kernel.clone(), inputs: inputs.collect(), call: self.call.clone() };
        let changes = point.run();
        let one = |(k, y): (&Option<usize>, &Tensor)| match k {
            Some(k) => {
                assert_eq!(changes[*k].shape, y.shape);
                values(&changes[*k])
            }
            None => zero(y),
        };
        j.outputs.iter().zip(&outputs).map(one).collect()
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1.0f64, |m, v| m.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let same = f == e || (f - e).abs() <= tolerance * scale;
        assert!(same, "{what}: element {i}: {f} instead of {e}\nall {found:?}\ninstead of {expected:?}");
    }
}

/// Both directions at a point: reverse against differences, with saved outputs and without; forward by
/// `<c, J t> = <J' c, t>`.
pub fn check(point: &Point, seed: u64) {
    let mut numbers = Numbers(seed);
    let wrt = point.floats();
    let cotangents = point.cotangents(&mut numbers);
    let text = point.kernel.to_text();
    let v = point.vjp(&wrt);
    let what =
        |n: usize| format!("{text}\nreverse {}\nwrt {}", v.kernel.to_text(), point.kernel.inputs[n].name);
    let gradients = point.gradients(&v, &wrt, &cotangents);
    for (g, &n) in gradients.iter().zip(&wrt) {
        close(g, &point.numeric_gradient(n, &cotangents, 1e-4), 1e-6, &what(n));
    }
    let allow_saved = vec![true; point.kernel.outputs.len()];
    let saving = vjp(&point.kernel, &wrt, &VjpOptions { allow_saved }).unwrap();
    for ((g, saved), &n) in gradients.iter().zip(point.gradients(&saving, &wrt, &cotangents)).zip(&wrt) {
        close(&saved, g, 1e-9, &format!("{} (saved)", what(n)));
    }
    let j = point.jvp(&wrt);
    let tangents: Vec<Tensor> = wrt.iter().map(|n| numbers.tensor(&point.inputs[*n].shape)).collect();
    let changes = point.changes(&j, &wrt, &tangents);
    let left: f64 = changes.iter().zip(&cotangents).map(|(t, c)| dot(t, &values(c))).sum();
    let right: f64 = gradients.iter().zip(&tangents).map(|(g, t)| dot(g, &values(t))).sum();
    close(&[left], &[right], 1e-9, &format!("{text}\nforward {}", j.kernel.to_text()));
}

/// The kernel's gradient is differentiable again: [`check`] of the derivative kernel.
pub fn check_twice(point: &Point, seed: u64) {
    check(point, seed);
    let wrt = point.floats();
    let cotangents = point.cotangents(&mut Numbers(seed + 1));
    if point.vjp(&wrt).kernel.outputs.is_empty() {
        return;
    }
    check(&point.reverse_point(&point.vjp(&wrt), &cotangents), seed + 2);
}
