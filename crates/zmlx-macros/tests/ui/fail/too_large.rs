use zmlx_macros::kernel;

#[kernel]
fn many_rounds(x: f32) -> f32 {
    for _ in 0..1_000_000 {}
    x
}

#[kernel]
fn many_nodes(x: f32) -> f32 {
    let mut y = x;
    for i in 0..100 {
        for j in 0..100 {
            y = y * x + (i * j) as f32;
        }
    }
    y
}

#[kernel]
fn many_calls(x: f32) -> f32 {
    fn a(v: f32) -> f32 { v }
    let mut y = x;
    for _ in 0..4000 {
        for _ in 0..4000 {
            y = a(y);
        }
    }
    y
}

fn main() {}
