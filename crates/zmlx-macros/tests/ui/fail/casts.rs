use zmlx_macros::kernel;

#[kernel]
fn to_bool(x: f32) -> bool {
    x as bool
}

#[kernel]
fn from_bool(x: f32) -> f32 {
    (x > 0.0) as f32
}

#[kernel]
fn to_double(x: f32) -> f32 {
    x as f64
}

#[kernel]
fn to_size(n: u32) -> u32 {
    n as usize
}

fn main() {}
