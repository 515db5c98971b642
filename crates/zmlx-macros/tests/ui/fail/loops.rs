use zmlx_macros::kernel;

#[kernel]
fn while_loop(x: f32) -> f32 {
    let mut y = x;
    while y > 1.0 {
        y = y / 2.0;
    }
    y
}

#[kernel]
fn endless(x: f32) -> f32 {
    loop {
        break x;
    }
}

#[kernel]
fn leaves(x: f32) -> f32 {
    for i in 0..4 {
        if i == 2 { break; }
    }
    x
}

fn main() {}
