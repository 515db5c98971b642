use zmlx_macros::kernel;

#[kernel]
fn round(x: f32) -> f32 {
    x.round()
}

#[kernel]
fn remainder(x: f32, y: f32) -> f32 {
    x % y
}

#[kernel]
fn euclid(x: f32, y: f32) -> f32 {
    x.rem_euclid(y)
}

fn main() {}
