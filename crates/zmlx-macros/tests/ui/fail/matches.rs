use zmlx_macros::kernel;

#[kernel]
fn matches(x: i32) -> i32 {
    match x {
        0 => 1,
        _ => 2,
    }
}

#[kernel]
fn if_let(x: f32) -> f32 {
    if let y = x { y } else { 0.0 }
}

fn main() {}
