use zmlx_macros::kernel;

#[kernel]
fn outside(x: f32) -> f32 {
    let a = [x, 1.0];
    a[2]
}

#[kernel]
fn by_data(x: f32, i: i32) -> f32 {
    [x, 1.0][i]
}

#[kernel]
fn table_rank(i: i32, #[array(2)] t: f32) -> f32 {
    t[i]
}

#[kernel]
fn table_alone(i: i32, #[array(1)] t: f32) -> f32 {
    t + 1.0
}

#[kernel]
fn float_coordinate(x: f32, #[array(1)] t: f32) -> f32 {
    t[x]
}

fn main() {}
