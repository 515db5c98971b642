//! Products in plain Rust, for processors without a path of their own. The reference of the others in tests.

/// See [`super::pack::pack_row`].
pub(crate) fn pack_row(x: &[f32], group: usize, values: &mut [i16], scales: &mut [f32], sums: &mut [f32]) {
    for (g, part) in x.chunks_exact(group).enumerate() {
        let largest = part.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let (scale, inverse) = group_scale(largest, part.iter().any(|v| v.is_nan()), 32767.0);
        scales[g] = scale;
        let mut sum = 0i32;
        for (i, &v) in part.iter().enumerate() {
            let q = (v * inverse).round_ties_even().clamp(-32767.0, 32767.0) as i16;
            sum += i32::from(q);
            values[g * group + i] = q;
        }
        sums[g] = scale * sum as f32;
    }
}

/// Scale and inverse of a group whose largest magnitude is `largest`, for integers of at most `most`. What is not finite
/// makes the scale NaN, so that it shows in the product.
pub(crate) fn group_scale(largest: f32, nan: bool, most: f32) -> (f32, f32) {
    if nan || largest.is_infinite() {
        return (f32::NAN, 0.0);
    }
    let inverse = most / largest;
    // All zeros, or so small that the inverse overflows.
    if inverse.is_finite() { (largest / most, inverse) } else { (0.0, 0.0) }
}

/// `sum over groups of scale[g] * dot(w, x)` of integers.
pub(crate) fn dot(w: &[i16], x: &[i16], group: usize, scales: &[f32]) -> f32 {
    let mut total = 0.0f32;
    for ((w, x), s) in w.chunks_exact(group).zip(x.chunks_exact(group)).zip(scales) {
        let sum: i32 = w.iter().zip(x).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
        total += sum as f32 * s;
    }
    total
}

/// `sum(a * b)` in eight partial sums.
pub(crate) fn dot_f32(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}
