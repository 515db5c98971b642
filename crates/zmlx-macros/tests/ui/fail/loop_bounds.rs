use zmlx_macros::kernel;

#[kernel]
fn bound_of_data(x: f32, n: i32) -> f32 {
    let mut y = x;
    for _ in 0..n {
        y *= x;
    }
    y
}

#[kernel]
fn open(x: f32) -> f32 {
    for _ in 0.. {}
    x
}

#[kernel]
fn over_float(x: f32) -> f32 {
    for _ in 0..x {}
    x
}

#[kernel]
fn over_number(x: f32) -> f32 {
    for _ in x {}
    x
}

fn main() {}
