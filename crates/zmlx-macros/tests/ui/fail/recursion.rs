use zmlx_macros::kernel;

#[kernel]
fn direct(x: f32) -> f32 {
    fn f(v: f32) -> f32 {
        if v > 1.0 { f(v / 2.0) } else { v }
    }
    f(x)
}

#[kernel]
fn mutual(x: f32) -> f32 {
    fn f(v: f32) -> f32 { g(v) }
    fn g(v: f32) -> f32 { f(v) }
    f(x)
}

fn main() {}
