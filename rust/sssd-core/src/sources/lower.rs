//! Shorter contexts than those of the samples: occurrences in the request of a node's last two tokens, or of its one
//! token at depth 1, where they follow another token than on the node's path.

use crate::Token;
use crate::index::{Index, NONE, ORDERS};
use crate::sources::request::earliest;

/// Longest context. (3 to 8 tokens: -0.1 %. 1 token besides 2: +0.3 % at 64 nodes, a third more time in cold memory.)
const LENGTH: usize = 2;
const SAMPLES: usize = 8;
/// Positions passed for each sample that is wanted.
const STEPS: usize = 2;

/// The length of the context that is looked up at a node, and its index in [`ORDERS`].
fn context(depth: u16) -> (usize, usize) {
    let length = LENGTH.min(usize::from(depth));
    (length, ORDERS.partition_point(|&order| order < length))
}

/// The newest position that ends the context of a node, or [`NONE`]. `token` is the node's, `above` its parent's.
pub fn newest(index: &Index, depth: u16, token: Token, above: Token) -> u32 {
    let (length, order) = context(depth);
    let newest = index.newest(order, &[token, above][..length]);
    if newest < earliest(index, length) { NONE } else { newest }
}

/// Calls `act` with each position from `newest` back and the number of tokens that agree. `path` has the tokens of the
/// node, its parent and the one above, as far as there is one.
pub fn occurrences(
    index: &Index,
    depth: u16,
    newest: u32,
    path: [Token; LENGTH + 1],
    mut act: impl FnMut(u32, usize),
) {
    let (length, order) = context(depth);
    let (mut position, mut found, mut steps) = (newest, 0, STEPS * SAMPLES);
    let earliest = earliest(index, length);
    while position != NONE && position >= earliest && found < SAMPLES && steps > 0 {
        steps -= 1;
        if index.match_length(position, &path[..=length]) == length {
            found += 1;
            act(position, length);
        }
        position = index.previous(order, position);
    }
}
