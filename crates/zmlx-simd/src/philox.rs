//! Philox4x32-10: a counter-based random generator. Counter and key in, four uniform u32 out, no state.
//!
//! Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

use pulp::Simd;

const MUL: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
/// What is added to the key each round: the golden ratio and sqrt(3) - 1, in 32-bit fixed point.
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// Four random u32 of this counter and key, one at a time (the definition).
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MUL[0]) * u64::from(counter[0]);
        let b = u64::from(MUL[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// [`philox4x32`] in every lane: lane i of the result belongs to lane i of the counter and key.
#[inline(always)]
pub fn philox4x32_lanes<S: Simd>(simd: S, counter: [S::u32s; 4], key: [S::u32s; 2]) -> [S::u32s; 4] {
    let mul = [simd.splat_u32s(MUL[0]), simd.splat_u32s(MUL[1])];
    let weyl = [simd.splat_u32s(WEYL[0]), simd.splat_u32s(WEYL[1])];
    let (mut c, mut k) = (counter, key);
    for _ in 0..ROUNDS {
        let (a_lo, a_hi) = simd.widening_mul_u32s(c[0], mul[0]);
        let (b_lo, b_hi) = simd.widening_mul_u32s(c[2], mul[1]);
        c = [
            simd.xor_u32s(simd.xor_u32s(b_hi, c[1]), k[0]),
            b_lo,
            simd.xor_u32s(simd.xor_u32s(a_hi, c[3]), k[1]),
            a_lo,
        ];
        k = [simd.add_u32s(k[0], weyl[0]), simd.add_u32s(k[1], weyl[1])];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Lanes<'a>(&'a [[u32; 6]], &'a mut Vec<[u32; 4]>);

    impl pulp::WithSimd for Lanes<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for chunk in self.0.chunks(S::U32_LANES) {
                let column = |j: usize| {
                    let lanes: Vec<u32> = chunk.iter().map(|row| row[j]).collect();
                    simd.partial_load_u32s(&lanes)
                };
                let out = philox4x32_lanes(
                    simd,
                    [column(0), column(1), column(2), column(3)],
                    [column(4), column(5)],
                );
                let mut rows = vec![[0u32; 4]; chunk.len()];
                for (j, v) in out.into_iter().enumerate() {
                    let mut lanes = vec![0u32; chunk.len()];
                    simd.partial_store_u32s(&mut lanes, v);
                    for (row, x) in rows.iter_mut().zip(lanes) {
                        row[j] = x;
                    }
                }
                self.1.extend(rows);
            }
        }
    }

    /// The known-answer vectors published with the paper's library.
    #[test]
    fn known_answers() {
        let all = u32::MAX;
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([all; 4], [all; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32(counter, key), want, "{counter:x?} {key:x?}");
        }
    }

    #[test]
    fn lanes_equal_scalar_on_every_isa() {
        let rows: Vec<[u32; 6]> = (0..101u32)
            .map(|i| {
                let r = philox4x32([i, 1, 2, 3], [7, 8]);
                [r[0], r[1], r[2], r[3], r[0] ^ i, r[1].wrapping_mul(i)]
            })
            .collect();
        let want: Vec<[u32; 4]> =
            rows.iter().map(|r| philox4x32([r[0], r[1], r[2], r[3]], [r[4], r[5]])).collect();
        for (name, arch) in crate::available() {
            let mut got = Vec::new();
            arch.dispatch(Lanes(&rows, &mut got));
            assert_eq!(got, want, "{name}");
        }
    }
}
