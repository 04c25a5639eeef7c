//! Earlier occurrences of the end of the context in the request itself.

use crate::Token;
use crate::index::{Index, NONE, ORDERS};
use crate::sources::MAX_LENGTH;

/// Occurrences looked at, and of these of each length when there are longer ones. (8 of each shorter length instead
/// of 16: -0.1 % at 64 nodes. 64 instead of 16: no gain, and a fifth more time.)
const SAMPLES: usize = 64;
const SHORTER_SAMPLES: usize = 16;
/// Positions passed for each sample that is wanted.
const STEPS: usize = 4;

/// Texts of so many tokens are looked through whole: from such ones the weights were learned.
const WHOLE: usize = 10_240;
/// In longer ones, the newest tokens in which contexts of one token, and of two, are looked for. Further back they are
/// chance, which costs time and what a datastore knows better (`docs/long-contexts.md`).
const NEWEST: [usize; 2] = [2048, 4096];

/// The position from which on contexts of `length` tokens are looked for.
pub fn earliest(index: &Index, length: usize) -> u32 {
    let tokens = index.tokens().len();
    match NEWEST.get(length - 1) {
        Some(newest) if tokens > WHOLE => (tokens - newest) as u32,
        _ => 0,
    }
}

/// Calls `act` with the position of each and the number of tokens that agree, longest contexts first, newest first.
pub fn occurrences(index: &Index, act: impl FnMut(u32, usize)) {
    let tokens = index.tokens();
    let last = tokens.len() as u32 - 1;
    let mut context = [0; MAX_LENGTH];
    let known = tokens.len().min(MAX_LENGTH);
    context.iter_mut().zip(tokens.iter().rev()).for_each(|(to, &from)| *to = from);
    along(index, &context[..known], |order| index.previous(order, last), act);
}

/// The same for a context that the request need not end with, newest token first.
pub fn occurrences_of(index: &Index, context: &[Token], act: impl FnMut(u32, usize)) {
    along(index, context, |order| index.newest(order, context), act);
}

/// Goes along the chains of each length from `newest` back.
fn along(index: &Index, context: &[Token], newest: impl Fn(usize) -> u32, mut act: impl FnMut(u32, usize)) {
    let (mut found, mut steps) = (0, STEPS * SAMPLES);
    let mut longer = MAX_LENGTH + 1;
    for order in (0..ORDERS.len()).rev() {
        let most = if found > 0 { SAMPLES.min(found + SHORTER_SAMPLES) } else { SAMPLES };
        let earliest = earliest(index, ORDERS[order]);
        let mut position = newest(order);
        while position != NONE && position >= earliest && found < most && steps > 0 {
            steps -= 1;
            let length = index.match_length(position, context);
            if (1..longer).contains(&length) {
                found += 1;
                act(position, length);
            }
            position = index.previous(order, position);
        }
        longer = ORDERS[order];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tokens: &[u32]) -> Vec<(u32, usize)> {
        let (mut index, mut found) = (Index::default(), Vec::new());
        index.append(tokens).unwrap();
        occurrences(&index, |position, length| found.push((position, length)));
        found
    }

    #[test]
    fn the_longest_come_first_and_the_newest_of_each_length() {
        assert_eq!(found(&[1, 2, 9, 2, 8, 1, 2, 7, 1, 2]), [(6, 2), (1, 2), (3, 1)]);
        assert_eq!(found(&[1, 2, 3]), []);
    }

    #[test]
    fn in_long_texts_short_contexts_are_looked_for_nearby() {
        // [2] and [1, 2] once at the beginning, and [7, 1, 2] after it
        let text = |between: usize| [&[1, 2, 7, 1, 2][..], &vec![9; between], &[7, 1, 2]].concat();
        assert_eq!(found(&text(WHOLE - 8)), [(4, 3), (1, 2)]);
        assert_eq!(found(&text(WHOLE - 7)), [(4, 3)]);
        // the earlier occurrence ends so many tokens before the end of the text
        let lengths = |earlier: &[u32], now: &[u32], back: usize| {
            let text = [&vec![9; WHOLE][..], earlier, &vec![9; back - now.len() - 1], now].concat();
            found(&text).into_iter().map(|found| found.1).collect::<Vec<_>>()
        };
        assert_eq!(lengths(&[5, 8], &[6, 8], NEWEST[0]), [1]);
        assert_eq!(lengths(&[5, 8], &[6, 8], NEWEST[0] + 1), []);
        assert_eq!(lengths(&[5, 7, 8], &[6, 7, 8], NEWEST[1]), [2]);
        assert_eq!(lengths(&[5, 7, 8], &[6, 7, 8], NEWEST[1] + 1), []);
    }

    #[test]
    fn there_are_fewer_of_shorter_lengths_beside_longer_ones() {
        let alone = [[0, 9], [1, 9]].concat().repeat(50);
        assert_eq!(found(&[&alone[..], &[2, 9]].concat()).len(), SAMPLES);
        let beside = found(&[&[2, 9][..], &alone, &[2, 9]].concat());
        assert_eq!((beside.len(), beside[0]), (1 + SHORTER_SAMPLES, (1, 2)));
    }
}
