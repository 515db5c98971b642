use zmlx_macros::kernel;

#[kernel]
fn wrong(x: f32) -> i32 {
    x + 1.0
}

#[kernel]
fn missing(x: f32) -> f32 {
    let _ = x;
}

#[kernel]
fn none(x: f32) {
    x;
}

#[kernel]
fn one_of_two(x: f32) -> (f32, f32) {
    (x, x > 0.0)
}

#[kernel]
fn count(x: f32) -> (f32, f32) {
    (x, x, x)
}

fn main() {}
