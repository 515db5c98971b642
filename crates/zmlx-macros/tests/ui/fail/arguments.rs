use zmlx_macros::kernel;

#[kernel]
fn helper(x: f32) -> f32 {
    fn f(a: f32, b: f32) -> f32 { a + b }
    f(x)
}

#[kernel]
fn method(x: f32) -> f32 {
    x.powf()
}

#[kernel]
fn extra(x: f32) -> f32 {
    x.exp(1.0)
}

#[kernel]
fn of_language(x: f32) -> f32 {
    elu(x)
}

#[kernel]
fn type_of_argument(n: i32) -> f32 {
    sigmoid(n)
}

#[kernel]
fn type_of_helper(n: i32) -> f32 {
    fn f(a: f32) -> f32 { a }
    f(n)
}

#[kernel]
fn seed(x: f32) -> f32 {
    uniform(x)
}

#[kernel]
fn axis(x: f32, n: i32) -> f32 {
    x + index(n) as f32
}

fn main() {}
