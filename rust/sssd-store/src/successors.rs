//! The most frequent successors of a token over several segments: merged when first asked for, and kept, for a draft asks
//! at each of its nodes.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

use smallvec::SmallVec;
use sssd_core::Token;

use crate::format::{MAX_SUCCESSORS, zeros};

/// Tokens whose lists are allotted together.
const CHUNK: usize = 1024;
const NOWHERE: u32 = u32::MAX;

type List = OnceLock<Box<[(Token, f32)]>>;

/// At most 272 bytes for each token of the vocabulary.
pub struct Merged {
    chunks: Vec<OnceLock<Box<[List]>>>,
    /// Hashes successors; at random, so that no file can have them collide.
    multiplier: u32,
}

impl Merged {
    /// Of a store that has nothing to merge yet.
    pub fn empty() -> Self {
        Self { chunks: Vec::new(), multiplier: RandomState::new().hash_one(0) as u32 | 1 }
    }

    /// Forgets what was merged.
    pub fn reset(&mut self, vocab_size: u32) -> std::io::Result<()> {
        let mut chunks = Vec::new();
        let count = (vocab_size as usize).div_ceil(CHUNK);
        chunks.try_reserve_exact(count)?;
        chunks.resize_with(count, OnceLock::new);
        self.chunks = chunks;
        Ok(())
    }

    /// Appends the list of `token`, which `merge` appends the first time. What it says is not whole is not kept.
    pub fn get(
        &self,
        token: Token,
        out: &mut Vec<(Token, f32)>,
        merge: impl FnOnce(&mut Vec<(Token, f32)>) -> bool,
    ) {
        let chunk = self.chunks.get(token as usize / CHUNK);
        let list = chunk.and_then(OnceLock::get).map(|chunk| &chunk[token as usize % CHUNK]);
        if let Some(kept) = list.and_then(OnceLock::get) {
            if out.try_reserve(kept.len()).is_ok() {
                out.extend_from_slice(kept);
            }
            return;
        }
        let first = out.len();
        if merge(out)
            && let Some(chunk) = chunk
        {
            let _ = keep(chunk, token, &out[first..]); // without memory it is merged again
        }
    }

    /// Appends the most frequent of the successors of `parts`, each with its part of the occurrences. At most `most` parts
    /// have any.
    pub fn merge<T: Iterator<Item = (Token, f32)>>(
        &self,
        parts: impl Iterator<Item = (f32, T)>,
        most: usize,
        out: &mut Vec<(Token, f32)>,
    ) -> bool {
        let first = out.len();
        // where in `out` a successor stands
        let count = (2 * MAX_SUCCESSORS * (most + 1)).next_power_of_two();
        let mut places: SmallVec<[u32; 4096]> = SmallVec::new();
        if out.try_reserve(most * MAX_SUCCESSORS).is_err() || places.try_reserve(count).is_err() {
            return false;
        }
        places.resize(count, NOWHERE);
        for (part, successors) in parts {
            for (successor, share) in successors {
                let mut slot =
                    successor.wrapping_mul(self.multiplier) as usize >> (32 - count.trailing_zeros());
                while places[slot] != NOWHERE && out[places[slot] as usize].0 != successor {
                    slot = (slot + 1) % count;
                }
                if places[slot] == NOWHERE {
                    places[slot] = out.len() as u32;
                    out.push((successor, share * part));
                } else {
                    out[places[slot] as usize].1 += share * part;
                }
            }
        }
        let order =
            |left: &(Token, f32), right: &(Token, f32)| right.1.total_cmp(&left.1).then(left.0.cmp(&right.0));
        if out.len() - first > MAX_SUCCESSORS {
            out[first..].select_nth_unstable_by(MAX_SUCCESSORS, order);
            out.truncate(first + MAX_SUCCESSORS);
        }
        out[first..].sort_unstable_by(order);
        true
    }
}

fn keep(chunk: &OnceLock<Box<[List]>>, token: Token, list: &[(Token, f32)]) -> std::io::Result<()> {
    let mut kept = zeros(list.len())?;
    kept.copy_from_slice(list);
    if chunk.get().is_none() {
        let mut lists = Vec::new();
        lists.try_reserve_exact(CHUNK)?;
        lists.resize_with(CHUNK, OnceLock::new);
        let _ = chunk.set(lists.into_boxed_slice()); // or somebody else was first
    }
    if let Some(lists) = chunk.get() {
        let _ = lists[token as usize % CHUNK].set(kept.into_boxed_slice());
    }
    Ok(())
}
