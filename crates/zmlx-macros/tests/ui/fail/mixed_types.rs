use zmlx_macros::kernel;

#[kernel]
fn float_and_int(x: f32, n: i32) -> f32 {
    x * n
}

#[kernel]
fn float_and_literal(x: f32) -> f32 {
    x * 2
}

#[kernel]
fn widths(a: i32, b: i64) -> i64 {
    a + b
}

#[kernel]
fn branches(x: f32, n: i32) -> f32 {
    if x > 0.0 { x } else { n }
}

#[kernel]
fn condition(x: f32) -> f32 {
    if x { x } else { 0.0 }
}

#[kernel]
fn logic(x: f32, y: f32) -> bool {
    x && y
}

fn main() {}
