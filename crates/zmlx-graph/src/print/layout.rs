//! A layered layout of a directed graph: ranks by the longest path, few crossings, short edges.
//!
//! The usual three steps of Sugiyama's method, for graphs of some dozens of nodes whose edges all go from lower to higher
//! numbers. Written here because it must give the same picture each time and a route around boxes for long edges, and
//! takes no more lines than fitting a general crate to that would.

/// Space between neighbours of a rank, and between ranks.
const GAP: (f64, f64) = (16.0, 30.0);
/// Sweeps that sort ranks, and that move nodes sideways.
const SWEEPS: usize = 16;
/// Width of the place where a long edge crosses a rank.
const LANE: f64 = 6.0;

/// Where everything is. All coordinates are at least 0.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// Centres of the nodes.
    pub(super) centres: Vec<(f64, f64)>,
    /// For each edge, points from the lower side of one node to the upper side of the other.
    pub(super) routes: Vec<Vec<(f64, f64)>>,
    /// Size of all.
    pub(super) size: (f64, f64),
}

/// Nodes and the places where long edges cross ranks, in one list.
struct Items {
    width: Vec<f64>,
    height: Vec<f64>,
    rank: Vec<usize>,
    /// Neighbours on the rank above and on the rank below.
    above: Vec<Vec<usize>>,
    below: Vec<Vec<usize>>,
}

/// Lays out nodes of these sizes with these edges, each from a lower to a higher number; others are left out of the
/// ranking and get no route.
pub(super) fn layered(sizes: &[(f64, f64)], edges: &[(usize, usize)]) -> Layout {
    let fits = |&(from, to): &(usize, usize)| from < to && to < sizes.len();
    let ranks = ranks(sizes.len(), &edges.iter().copied().filter(fits).collect::<Vec<_>>());
    let mut items = Items {
        width: sizes.iter().map(|s| s.0).collect(),
        height: sizes.iter().map(|s| s.1).collect(),
        rank: ranks,
        above: vec![Vec::new(); sizes.len()],
        below: vec![Vec::new(); sizes.len()],
    };
    let chains: Vec<Vec<usize>> =
        edges.iter().map(|e| if fits(e) { items.chain(e.0, e.1) } else { Vec::new() }).collect();
    let mut rows = items.rows();
    sort_rows(&items, &mut rows);
    let x = place(&items, &rows);
    let mut y = vec![0.0; items.rank.len()];
    // Half the height of each row: an edge that crosses it goes straight past its boxes.
    let mut halves = Vec::with_capacity(rows.len());
    let (mut top, mut size) = (0.0, (0.0f64, 0.0));
    for row in &rows {
        let tallest = row.iter().map(|&i| items.height[i]).fold(0.0, f64::max);
        for &item in row {
            y[item] = top + tallest / 2.0;
            size.0 = size.0.max(x[item] + items.width[item] / 2.0);
        }
        halves.push(tallest / 2.0);
        size.1 = top + tallest;
        top += tallest + GAP.1;
    }
    let route = |chain: &Vec<usize>| -> Vec<(f64, f64)> {
        let last = chain.len().saturating_sub(1);
        let points = |(place, &item): (usize, &usize)| {
            let (side, half) = (items.height[item] / 2.0, halves[items.rank[item]]);
            let shifts = if place == 0 {
                vec![side]
            } else if place == last {
                vec![-side]
            } else {
                vec![-half, half]
            };
            shifts.into_iter().map(move |shift| (item, shift)).collect::<Vec<_>>()
        };
        chain.iter().enumerate().flat_map(points).map(|(item, shift)| (x[item], y[item] + shift)).collect()
    };
    let centres = (0..sizes.len()).map(|i| (x[i], y[i])).collect();
    Layout { centres, routes: chains.iter().map(route).collect(), size }
}

/// The longest path from a source; sources themselves are moved down to their first reader.
fn ranks(count: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let mut sorted = edges.to_vec();
    sorted.sort_unstable_by_key(|e| e.1);
    let mut rank = vec![0usize; count];
    let mut has_input = vec![false; count];
    for &(from, to) in &sorted {
        rank[to] = rank[to].max(rank[from] + 1);
        has_input[to] = true;
    }
    for node in (0..count).filter(|&n| !has_input[n]) {
        let first = edges.iter().filter(|e| e.0 == node).map(|e| rank[e.1]).min();
        rank[node] = first.map_or(0, |r| r.saturating_sub(1));
    }
    rank
}

impl Items {
    /// Joins two nodes, with one item for each rank in between; gives all on the way.
    fn chain(&mut self, from: usize, to: usize) -> Vec<usize> {
        let mut chain = vec![from];
        for rank in self.rank[from] + 1..self.rank[to] {
            self.width.push(LANE);
            self.height.push(0.0);
            self.rank.push(rank);
            self.above.push(Vec::new());
            self.below.push(Vec::new());
            chain.push(self.rank.len() - 1);
        }
        chain.push(to);
        for pair in chain.windows(2) {
            self.below[pair[0]].push(pair[1]);
            self.above[pair[1]].push(pair[0]);
        }
        chain
    }

    fn rows(&self) -> Vec<Vec<usize>> {
        let mut rows = vec![Vec::new(); self.rank.iter().max().map_or(0, |r| r + 1)];
        for (item, &rank) in self.rank.iter().enumerate() {
            rows[rank].push(item);
        }
        rows
    }
}

/// Sorts each row by the mean place of its neighbours, up and down in turn, and keeps the best order seen.
fn sort_rows(items: &Items, rows: &mut Vec<Vec<usize>>) {
    let mut best = (crossings(items, rows), rows.clone());
    for sweep in 0..SWEEPS {
        let down = sweep % 2 == 0;
        let mut place = vec![0.0; items.rank.len()];
        let order: Vec<usize> =
            if down { (0..rows.len()).collect() } else { (0..rows.len()).rev().collect() };
        for row in order {
            let neighbours = if down { &items.above } else { &items.below };
            let mut keyed: Vec<(f64, usize)> = rows[row]
                .iter()
                .enumerate()
                .map(|(at, &item)| (mean(&neighbours[item], &place).unwrap_or(at as f64), item))
                .collect();
            keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
            rows[row] = keyed.into_iter().map(|(_, item)| item).collect();
            for (at, &item) in rows[row].iter().enumerate() {
                place[item] = at as f64;
            }
        }
        let found = crossings(items, rows);
        if found < best.0 {
            best = (found, rows.clone());
        }
    }
    *rows = best.1;
}

fn mean(of: &[usize], place: &[f64]) -> Option<f64> {
    (!of.is_empty()).then(|| of.iter().map(|&i| place[i]).sum::<f64>() / of.len() as f64)
}

/// How many pairs of edges cross.
fn crossings(items: &Items, rows: &[Vec<usize>]) -> usize {
    let mut place = vec![0; items.rank.len()];
    for row in rows {
        for (at, &item) in row.iter().enumerate() {
            place[item] = at;
        }
    }
    let mut count = 0;
    for row in rows {
        let edges: Vec<(usize, usize)> =
            row.iter().flat_map(|&a| items.below[a].iter().map(move |&b| (a, b))).collect();
        for (i, &(a, b)) in edges.iter().enumerate() {
            let crosses = |&&(c, d): &&(usize, usize)| {
                (place[a] < place[c] && place[b] > place[d]) || (place[a] > place[c] && place[b] < place[d])
            };
            count += edges[i + 1..].iter().filter(crosses).count();
        }
    }
    count
}

/// Moves items sideways towards their neighbours, keeping the order of each row.
fn place(items: &Items, rows: &[Vec<usize>]) -> Vec<f64> {
    let mut x = vec![0.0; items.rank.len()];
    for row in rows {
        let mut left = 0.0;
        for &item in row {
            x[item] = left + items.width[item] / 2.0;
            left += items.width[item] + GAP.0;
        }
    }
    for sweep in 0..2 * SWEEPS {
        for row in rows {
            let wanted: Vec<f64> = row
                .iter()
                .map(|&item| {
                    let (up, down) = (mean(&items.above[item], &x), mean(&items.below[item], &x));
                    match (up, down, sweep % 3) {
                        (Some(u), Some(_), 0) => u,
                        (Some(_), Some(d), 1) => d,
                        (Some(u), Some(d), _) => (u + d) / 2.0,
                        (one, other, _) => one.or(other).unwrap_or(x[item]),
                    }
                })
                .collect();
            settle(items, row, &wanted, &mut x);
        }
    }
    let left = x.iter().zip(&items.width).map(|(x, w)| x - w / 2.0).fold(f64::INFINITY, f64::min);
    if left.is_finite() {
        x.iter_mut().for_each(|x| *x -= left);
    }
    x
}

/// Puts a row as near to `wanted` as its order and the gaps allow: the mean of pushing right and of pushing left.
fn settle(items: &Items, row: &[usize], wanted: &[f64], x: &mut [f64]) {
    let apart = |a: usize, b: usize| (items.width[a] + items.width[b]) / 2.0 + GAP.0;
    let (mut right, mut left) = (wanted.to_vec(), wanted.to_vec());
    for i in 1..row.len() {
        right[i] = right[i].max(right[i - 1] + apart(row[i - 1], row[i]));
    }
    for i in (0..row.len().saturating_sub(1)).rev() {
        left[i] = left[i].min(left[i + 1] - apart(row[i], row[i + 1]));
    }
    for (i, &item) in row.iter().enumerate() {
        x[item] = (right[i] + left[i]) / 2.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No two boxes overlap, all is inside, and edges go down from box to box.
    fn check(sizes: &[(f64, f64)], edges: &[(usize, usize)]) -> Layout {
        let layout = layered(sizes, edges);
        for (i, (a, s)) in layout.centres.iter().zip(sizes).enumerate() {
            assert!(a.0 - s.0 / 2.0 > -0.01 && a.0 + s.0 / 2.0 < layout.size.0 + 0.01, "{i} is outside");
            assert!(a.1 - s.1 / 2.0 > -0.01 && a.1 + s.1 / 2.0 < layout.size.1 + 0.01, "{i} is outside");
            for (j, (b, t)) in layout.centres.iter().zip(sizes).enumerate().skip(i + 1) {
                let apart = (a.0 - b.0).abs() >= (s.0 + t.0) / 2.0 - 0.01
                    || (a.1 - b.1).abs() >= (s.1 + t.1) / 2.0 - 0.01;
                assert!(apart, "{i} and {j} overlap");
            }
        }
        for (edge, route) in edges.iter().zip(&layout.routes) {
            assert!(route.windows(2).all(|w| w[0].1 < w[1].1), "{edge:?} goes up: {route:?}");
            assert_eq!(route.first().map(|p| p.0), Some(layout.centres[edge.0].0));
            assert_eq!(route.last().map(|p| p.0), Some(layout.centres[edge.1].0));
        }
        layout
    }

    #[test]
    fn boxes_do_not_overlap_and_edges_go_down() {
        let size = (80.0, 40.0);
        let diamond = check(&[size; 4], &[(0, 1), (0, 2), (1, 3), (2, 3)]);
        assert!(diamond.centres[1].1 == diamond.centres[2].1, "one rank");
        // A residual edge goes around what it passes.
        let residual = check(&[size; 4], &[(0, 1), (1, 2), (2, 3), (0, 3)]);
        assert_eq!(residual.routes[3].len(), 6);
        for middle in [1, 2] {
            let lane = residual.routes[3][2 * middle].0;
            assert!((lane - residual.centres[middle].0).abs() >= 40.0, "{lane} is under a box");
        }
        // Two chains that are crossed in the order of their numbers.
        let crossed = check(&[size; 4], &[(0, 3), (1, 2)]);
        assert_eq!(
            (crossed.centres[0].0 < crossed.centres[1].0),
            (crossed.centres[3].0 < crossed.centres[2].0)
        );
    }

    #[test]
    fn odd_graphs_are_laid_out_too() {
        check(&[], &[]);
        check(&[(10.0, 10.0); 3], &[]);
        let wrong = layered(&[(10.0, 10.0); 2], &[(1, 0), (0, 5), (0, 0)]);
        assert!(wrong.routes.iter().all(Vec::is_empty));
        let sizes: Vec<(f64, f64)> = (0..60).map(|i| (20.0 + f64::from(i * 37 % 90), 30.0)).collect();
        let edges: Vec<(usize, usize)> =
            (1..60).flat_map(|i| [(i * 7919 % i, i), (i * 104_729 % i, i)]).collect();
        check(&sizes, &edges);
    }
}
