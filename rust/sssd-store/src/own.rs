//! What follows a token within one small domain, where the whole store's list says what follows it elsewhere.

use std::cmp::Reverse;

use sssd_core::Token;

use crate::format::{MAX_SUCCESSORS, zeros};
use crate::{Error, Result};

/// The most frequent successors of each token within a domain.
pub struct Own {
    /// Of each token of the vocabulary where its list begins, and the part of its occurrences that the domain has.
    tokens: Vec<(u32, f32)>,
    lists: Vec<(Token, f32)>,
}

impl Own {
    /// From pairs of tokens that follow one another, in any order; `count` counts a token in the whole store.
    pub fn new(pairs: &mut [(Token, Token)], vocab_size: u32, count: impl Fn(Token) -> u64) -> Result<Self> {
        let memory = || Error::memory("the domains of a datastore");
        let reserved = |_| Error::OutOfMemory("the domains of a datastore".into());
        pairs.sort_unstable();
        let mut tokens: Vec<(u32, f32)> = zeros(vocab_size as usize + 1).map_err(reserved)?;
        let mut lists = Vec::new();
        let mut found: Vec<(u32, Token)> = Vec::new();
        let mut next = 0;
        for same in pairs.chunk_by(|one, other| one.0 == other.0) {
            let token = same[0].0;
            let start = lists.len() as u32;
            tokens[next as usize..=token as usize].fill((start, 0.0));
            next = token + 1;
            tokens[token as usize].1 = same.len() as f32 / count(token).max(same.len() as u64) as f32;
            found.clear();
            for run in same.chunk_by(|one, other| one == other) {
                found.try_reserve(1).map_err(memory())?;
                found.push((run.len() as u32, run[0].1));
            }
            found.sort_unstable_by_key(|&(count, token)| (Reverse(count), token));
            lists.try_reserve(found.len().min(MAX_SUCCESSORS)).map_err(memory())?;
            let shares = found.iter().map(|&(count, token)| (token, count as f32 / same.len() as f32));
            lists.extend(shares.take(MAX_SUCCESSORS));
        }
        tokens[next as usize..].fill((lists.len() as u32, 0.0));
        lists.shrink_to_fit();
        Ok(Self { tokens, lists })
    }

    /// The list of `token` if the domain's occurrences of it count more than all others, each of which counts `others`.
    pub fn successors(&self, token: Token, others: f32) -> Option<&[(Token, f32)]> {
        let place = self.tokens.get(token as usize..token as usize + 2)?;
        let [(start, part), (end, _)] = *place else { return None };
        if part * (1.0 + others) <= others { None } else { self.lists.get(start as usize..end as usize) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_those_of_the_domain_where_it_has_most_of_what_counts() {
        let mut pairs = [(2, 3), (2, 1), (2, 3), (0, 2), (2, 3)];
        let own = Own::new(&mut pairs, 5, |token| if token == 2 { 40 } else { 1 }).unwrap();
        assert_eq!(own.successors(0, 1.0), Some(&[(2, 1.0)][..]));
        // it has 4 of 40 occurrences: more than 36 others only where those count less than a ninth
        assert_eq!(own.successors(2, 0.12), None);
        assert_eq!(own.successors(2, 0.11), Some(&[(3, 0.75), (1, 0.25)][..]));
        for absent in [1, 3, 4, 5, u32::MAX - 2] {
            assert_eq!(own.successors(absent, 0.5), None);
        }
    }

    #[test]
    fn lists_are_no_longer_than_those_of_the_store() {
        let mut pairs: Vec<_> = (0..100).map(|next| (7, next)).collect();
        let own = Own::new(&mut pairs, 100, |_| 100).unwrap();
        assert_eq!(own.successors(7, 0.5).unwrap().len(), MAX_SUCCESSORS);
    }
}
