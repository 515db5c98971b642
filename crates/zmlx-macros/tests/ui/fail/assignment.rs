use zmlx_macros::kernel;

#[kernel]
fn immutable(x: f32) -> f32 {
    let y = x;
    y = 2.0;
    y
}

#[kernel]
fn parameter(x: f32) -> f32 {
    x += 1.0;
    x
}

#[kernel]
fn other_type(x: f32) -> f32 {
    let mut y = x;
    y = x > 0.0;
    y
}

#[kernel]
fn maybe_without_value(x: f32) -> f32 {
    let y;
    if x > 0.0 {
        y = x;
    }
    y
}

#[kernel]
fn from_a_closure(x: f32) -> f32 {
    let mut sum = x;
    let add = |v: f32| { sum += v; };
    add(x);
    sum
}

fn main() {}
