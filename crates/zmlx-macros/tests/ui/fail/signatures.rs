use zmlx_macros::kernel;

#[kernel]
fn generic<T>(x: T) -> T {
    x
}

#[kernel]
fn doubles(x: f64) -> f64 {
    x
}

#[kernel]
async fn later(x: f32) -> f32 {
    x
}

#[kernel]
fn pattern((a, b): (f32, f32)) -> f32 {
    a + b
}

#[kernel]
fn method(self, x: f32) -> f32 {
    x
}

#[kernel]
fn output_name(out: f32) -> f32 {
    out
}

#[kernel]
fn lifetime(x: Vec<f32>) -> f32 {
    x
}

#[kernel]
struct NotAFunction;

fn main() {}
