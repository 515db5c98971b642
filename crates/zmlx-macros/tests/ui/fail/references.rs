use zmlx_macros::kernel;

#[kernel]
fn reference(x: f32) -> f32 {
    let y = &x;
    *y
}

#[kernel]
fn parameter(x: &f32) -> f32 {
    x
}

#[kernel]
fn string(x: f32) -> f32 {
    let name = "x";
    x
}

#[kernel]
fn prints(x: f32) -> f32 {
    println!("{x}");
    x
}

fn main() {}
