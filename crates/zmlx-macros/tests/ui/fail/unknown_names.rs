use zmlx_macros::kernel;

#[kernel]
fn function(x: f32) -> f32 {
    sigmiod(x)
}

#[kernel]
fn method(x: f32) -> f32 {
    x.tanhh()
}

#[kernel]
fn variable(x: f32) -> f32 {
    x + y
}

#[kernel]
fn path(x: f32) -> f32 {
    x + std::f64::consts::PI
}

#[kernel]
fn elsewhere(x: f32) -> f32 {
    helpers::twice(x)
}

#[kernel]
fn operator_as_function(x: f32) -> f32 {
    add(x, x)
}

#[kernel]
fn function_as_method(x: f32) -> f32 {
    x.sigmoid()
}

#[kernel]
fn far_off(x: f32) -> f32 {
    x.hypotenuse()
}

fn main() {}
