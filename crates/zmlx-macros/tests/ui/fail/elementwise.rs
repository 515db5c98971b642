use zmlx_macros::elementwise;

fn main() {
    elementwise!(|x| x - row_max(x));
    elementwise!(|x| cumsum(x));
    elementwise!(|x: f32, x: f32| x);
    elementwise!(|x: f32| -> i32 { x });
    elementwise!(1.0);
    elementwise!(|x| ());
    elementwise!(|x| x.exp);
}
