use zmlx_macros::kernel;

#[kernel]
fn early(x: f32) -> f32 {
    if x > 0.0 {
        return x;
    }
    -x
}

fn main() {}
