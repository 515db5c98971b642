//! Places of the k largest elements of rows, largest first; equal elements in the order of their places.
//!
//! Short lists: several streams at once, one in each lane of a register. A stream is a row, or a piece of a long row.
//! Lists are kept sorted across registers (entry j of every lane in register j), so inserting an element takes
//! comparisons and selections only: no branch and no step across lanes, and equal elements stay in order. Long lists:
//! a partial sort of each row.

use pulp::Simd;

/// Most lanes of any instruction set.
const MAX_LANES: usize = 16;
/// Columns of a tile: with all lanes it fits the first-level cache beside the lists.
const COLS: usize = 64;
/// Longest lists kept in lanes; a partial sort is faster for longer ones.
const MAX_LIST: usize = 16;
/// Streams from this length on are tested before an insertion: most of their elements change nothing.
const TESTED: usize = 512;
/// Rows from this length on are cut into pieces when they alone do not fill the lanes.
const CUT: usize = 1024;

/// The integer that orders `x`: by value, both zeros alike, NaN above everything.
#[inline(always)]
fn order(x: f32) -> i32 {
    if x.is_nan() {
        return i32::MAX;
    }
    let bits = (x + 0.0).to_bits() as i32;
    bits ^ (((bits >> 31) as u32) >> 1) as i32
}

/// [`order`] of a register.
#[inline(always)]
fn orders<S: Simd>(simd: S, x: S::f32s) -> S::i32s {
    let number = simd.equal_f32s(x, x);
    let bits: S::u32s = pulp::cast(simd.add_f32s(x, simd.splat_f32s(0.0)));
    let negative = simd.greater_than_i32s(simd.splat_i32s(0), pulp::cast(bits));
    let most = simd.splat_u32s(0x7fff_ffff);
    let ordered = simd.select_u32s(negative, simd.xor_u32s(bits, most), bits);
    pulp::cast(simd.select_u32s(number, ordered, most))
}

/// Largest order first, then lowest place, when sorted downwards.
#[inline(always)]
fn rank(order: i32, place: u32) -> u64 {
    (u64::from(order as u32 ^ 0x8000_0000) << 32) | u64::from(!place)
}

/// What a selection works in; kept between calls of a task.
pub(super) struct Selector {
    orders: Vec<i32>,
    places: Vec<u32>,
    tile: Vec<f32>,
    ranks: Vec<u64>,
}

impl Selector {
    pub fn new() -> Self {
        Self {
            orders: vec![0; MAX_LIST * MAX_LANES],
            places: vec![0; MAX_LIST * MAX_LANES],
            tile: vec![0.0; COLS * MAX_LANES],
            ranks: Vec::new(),
        }
    }

    /// Writes the places of the first `k` of each row of `x` (rows of `cols` elements) to `places` (rows of `k`).
    /// `1 <= k <= cols < 2^32`.
    #[inline(always)]
    pub fn rows<S: Simd>(&mut self, simd: S, x: &[f32], cols: usize, k: usize, places: &mut [u32]) {
        if k > MAX_LIST {
            x.chunks_exact(cols).zip(places.chunks_exact_mut(k)).for_each(|(row, out)| self.sort(row, out));
            return;
        }
        let lanes = S::F32_LANES;
        for (rows, out) in x.chunks(lanes * cols).zip(places.chunks_mut(lanes * k)) {
            let count = rows.len() / cols;
            let pieces = if cols >= CUT { lanes / count } else { 1 };
            let piece = cols.div_ceil(pieces);
            let mut streams: [&[f32]; MAX_LANES] = [&[]; MAX_LANES];
            let each = rows.chunks_exact(cols).flat_map(|row| (0..pieces).map(move |p| part(row, p, piece)));
            streams.iter_mut().zip(each).for_each(|(s, e)| *s = e);
            self.lists(simd, &streams[..count * pieces], k);
            if pieces == 1 {
                for (l, out) in out.chunks_exact_mut(k).enumerate() {
                    (0..k).for_each(|j| out[j] = self.places[j * lanes + l]);
                }
            } else {
                let one =
                    |(r, out)| self.merge(&streams[r * pieces..][..pieces], r * pieces, piece, lanes, out);
                out.chunks_exact_mut(k).enumerate().for_each(one);
            }
        }
    }

    /// One row by a partial sort.
    fn sort(&mut self, row: &[f32], out: &mut [u32]) {
        self.ranks.clear();
        self.ranks.extend(row.iter().zip(0..).map(|(x, place)| rank(order(*x), place)));
        self.first_ranks(out);
    }

    /// One row from the lists of its pieces, which are streams `first..`.
    fn merge(&mut self, pieces: &[&[f32]], first: usize, piece: usize, lanes: usize, out: &mut [u32]) {
        self.ranks.clear();
        for (p, stream) in pieces.iter().enumerate() {
            let entries = (0..out.len()).map(|j| j * lanes + first + p);
            // Entries past a piece's end stand for nothing: the piece is shorter than the list or than others.
            let real = entries.filter(|e| (self.places[*e] as usize) < stream.len());
            let ranks = real.map(|e| rank(self.orders[e], self.places[e] + (p * piece) as u32));
            self.ranks.extend(ranks);
        }
        self.first_ranks(out);
    }

    fn first_ranks(&mut self, out: &mut [u32]) {
        if out.len() < self.ranks.len() {
            self.ranks.select_nth_unstable_by(out.len() - 1, |a, b| b.cmp(a));
            self.ranks.truncate(out.len());
        }
        self.ranks.sort_unstable_by(|a, b| b.cmp(a));
        out.iter_mut().zip(&self.ranks).for_each(|(o, r)| *o = !(*r as u32));
    }

    /// The first `k` of each stream into the lists, entry j of stream l at `[j * lanes + l]`. Where a stream is shorter
    /// than `k`, entries are left with places past its end.
    #[inline(always)]
    fn lists<S: Simd>(&mut self, simd: S, streams: &[&[f32]], k: usize) {
        match k {
            1 => self.lists_of::<S, 1>(simd, streams),
            2 => self.lists_of::<S, 2>(simd, streams),
            3..=4 => self.lists_of::<S, 4>(simd, streams),
            5..=8 => self.lists_of::<S, 8>(simd, streams),
            _ => self.lists_of::<S, MAX_LIST>(simd, streams),
        }
    }

    #[inline(always)]
    fn lists_of<S: Simd, const K: usize>(&mut self, simd: S, streams: &[&[f32]]) {
        let lanes = S::F32_LANES;
        let len = streams.iter().map(|s| s.len()).max().unwrap_or(0);
        let mut orders = [simd.splat_i32s(i32::MIN); K];
        let mut places = [simd.splat_u32s(u32::MAX); K];
        for start in (0..len).step_by(COLS) {
            let cols = COLS.min(len - start);
            fill_tile(&mut self.tile, streams, start, cols, lanes);
            let (columns, _) = S::as_simd_f32s(&self.tile[..cols * lanes]);
            for (c, x) in columns.iter().enumerate() {
                let key = self::orders(simd, *x);
                if len >= TESTED && !any_above(simd, key, orders[K - 1]) {
                    continue;
                }
                insert(simd, &mut orders, &mut places, key, simd.splat_u32s((start + c) as u32));
            }
        }
        let (to, _) = S::as_mut_simd_i32s(&mut self.orders[..K * lanes]);
        to.copy_from_slice(&orders);
        let (to, _) = S::as_mut_simd_u32s(&mut self.places[..K * lanes]);
        to.copy_from_slice(&places);
    }
}

/// Piece number `p` of a row cut into pieces of length `piece`; the last ones may be short or empty.
#[inline(always)]
fn part(row: &[f32], p: usize, piece: usize) -> &[f32] {
    &row[(p * piece).min(row.len())..((p + 1) * piece).min(row.len())]
}

/// Whether any lane of `a` is above `b`'s.
#[inline(always)]
fn any_above<S: Simd>(simd: S, a: S::i32s, b: S::i32s) -> bool {
    let above = simd.greater_than_i32s(a, b);
    let ones = simd.select_u32s(above, simd.splat_u32s(u32::MAX), simd.splat_u32s(0));
    pulp::bytemuck::cast_slice::<S::u32s, u64>(core::slice::from_ref(&ones)).iter().fold(0, |all, v| all | v)
        != 0
}

/// Puts one element into each lane's list, behind those of its own order.
#[inline(always)]
fn insert<S: Simd, const K: usize>(
    simd: S,
    orders: &mut [S::i32s; K],
    places: &mut [S::u32s; K],
    key: S::i32s,
    place: S::u32s,
) {
    let mut over = simd.greater_than_i32s(key, orders[K - 1]);
    for j in (1..K).rev() {
        // From the end, so that entry j - 1 is still the old one.
        let above = simd.greater_than_i32s(key, orders[j - 1]);
        orders[j] = simd.max_i32s(orders[j], simd.min_i32s(orders[j - 1], key));
        places[j] = simd.select_u32s(over, simd.select_u32s(above, places[j - 1], place), places[j]);
        over = above;
    }
    orders[0] = simd.max_i32s(orders[0], key);
    places[0] = simd.select_u32s(over, place, places[0]);
}

/// Columns `start..start + cols` of the streams, column by column; -inf where a stream has ended or is missing.
#[inline(always)]
fn fill_tile(tile: &mut [f32], streams: &[&[f32]], start: usize, cols: usize, lanes: usize) {
    let tile = &mut tile[..cols * lanes];
    let full = streams.len() == lanes && streams.iter().all(|s| s.len() >= start + cols);
    if !full {
        tile.fill(f32::NEG_INFINITY);
    }
    #[cfg(target_arch = "x86_64")]
    if full
        && lanes == 8
        && cols.is_multiple_of(8)
        && let Some(simd) = pulp::x86::V3::try_new()
    {
        for (block, out) in tile.chunks_exact_mut(64).enumerate() {
            transpose(simd, streams, start + 8 * block, out);
        }
        return;
    }
    for (l, stream) in streams.iter().enumerate() {
        let piece = stream.get(start..).unwrap_or(&[]);
        for (to, from) in tile.chunks_exact_mut(lanes).zip(piece) {
            to[l] = *from;
        }
    }
}

/// Columns `at..at + 8` of eight streams.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose(simd: pulp::x86::V3, streams: &[&[f32]], at: usize, out: &mut [f32]) {
    use core::arch::x86_64::__m256;
    let avx = simd.avx;
    let mut r = [avx._mm256_setzero_ps(); 8];
    for (r, s) in r.iter_mut().zip(streams) {
        // Of whole registers; partial loads go through a call.
        if let Some(eight) = s[at..].first_chunk::<8>() {
            *r = pulp::cast(*eight);
        }
    }
    let low = |i: usize| avx._mm256_unpacklo_ps(r[i], r[i + 1]);
    let high = |i: usize| avx._mm256_unpackhi_ps(r[i], r[i + 1]);
    // Pairs of rows, then fours, then halves.
    let (a, b) = ([low(0), low(2), low(4), low(6)], [high(0), high(2), high(4), high(6)]);
    let front = |p: &[__m256; 4], i: usize| avx._mm256_shuffle_ps::<0b01_00_01_00>(p[i], p[i + 1]);
    let back = |p: &[__m256; 4], i: usize| avx._mm256_shuffle_ps::<0b11_10_11_10>(p[i], p[i + 1]);
    let top = [front(&a, 0), back(&a, 0), front(&b, 0), back(&b, 0)];
    let bottom = [front(&a, 2), back(&a, 2), front(&b, 2), back(&b, 2)];
    for (c, out) in out.chunks_exact_mut(8).enumerate() {
        let (t, b) = (top[c % 4], bottom[c % 4]);
        let column = if c < 4 {
            avx._mm256_permute2f128_ps::<0x20>(t, b)
        } else {
            avx._mm256_permute2f128_ps::<0x31>(t, b)
        };
        out.copy_from_slice(&pulp::cast::<_, [f32; 8]>(column));
    }
}
