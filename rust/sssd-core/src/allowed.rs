//! Which tokens may follow: what a grammar, or whatever else restricts the target, says of the places of a draft.

use std::collections::HashMap;

use crate::Token;
use crate::memory::{MemoryFull, try_reserve};

/// The place before the first tokens.
pub const ALLOWED_ROOT: u32 = 0;

/// Where so few tokens may follow, all of them become candidates: what is forced need not have been seen.
pub(crate) const FEW: usize = 4;

/// Words of masks that are kept for the next draft.
const KEPT_WORDS: usize = 1 << 14;

/// The rules of the places of one draft, as far as they are known. A place without one allows everything.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// From a place and the next token to the place after it.
    places: HashMap<(u32, Token), u32>,
    rules: Vec<Rule>,
    /// The masks, one after the other; bit `t % 32` of word `t / 32` is that of token `t`.
    words: Vec<u32>,
    /// Whether somebody can be asked for the rules of other places.
    asks: bool,
}

#[derive(Clone, Copy, Debug)]
enum Rule {
    Unknown,
    Anything,
    /// The tokens of a mask: its words, and how many tokens it allows.
    Mask {
        start: usize,
        end: usize,
        count: usize,
    },
}

/// What may follow at a place: everything, or the tokens of some words.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mask<'a> {
    /// Any token.
    Anything,
    /// Those whose bits are set: bit `t % 32` of word `t / 32`. Tokens beyond are not allowed.
    Words(&'a [u32]),
}

impl Allowed {
    /// Forgets all rules and keeps the memory, if it is not much.
    pub fn clear(&mut self) {
        self.places.clear();
        self.rules.clear();
        self.words.clear();
        self.words.shrink_to(KEPT_WORDS);
        self.asks = false;
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty() && !self.asks
    }

    /// From now on places without a rule are to be asked for: see [`crate::Sequence::unruled`].
    pub fn set_asks(&mut self, asks: bool) {
        self.asks = asks;
    }

    /// Whether places without a rule are to be asked for.
    pub fn asks(&self) -> bool {
        self.asks
    }

    /// Says what may follow after `path`.
    pub fn insert(&mut self, path: &[Token], mask: Mask) -> Result<(), MemoryFull> {
        self.add_rule_room()?;
        let mut place = ALLOWED_ROOT;
        for &token in path {
            if self.places.try_reserve(1).is_err() {
                return Err(MemoryFull::System { wanted: size_of::<((u32, Token), u32)>() });
            }
            self.add_rule_room()?;
            let next = self.rules.len() as u32;
            place = *self.places.entry((place, token)).or_insert(next);
            if place == next {
                self.rules.push(Rule::Unknown);
            }
        }
        self.rules[place as usize] = match mask {
            Mask::Anything => Rule::Anything,
            Mask::Words(words) => {
                let start = self.words.len();
                let wanted = size_of_val(words);
                self.words.try_reserve(words.len()).map_err(|_| MemoryFull::System { wanted })?;
                self.words.extend_from_slice(words);
                let count = words.iter().map(|word| word.count_ones() as usize).sum();
                Rule::Mask { start, end: self.words.len(), count }
            }
        };
        Ok(())
    }

    /// Room for one more place; the root is always there.
    fn add_rule_room(&mut self) -> Result<(), MemoryFull> {
        if self.rules.capacity() - self.rules.len() < 2 {
            let more = self.rules.len().max(16);
            try_reserve(&mut self.rules, more)?;
        }
        if self.rules.is_empty() {
            self.rules.push(Rule::Unknown);
        }
        Ok(())
    }

    /// The place after another one, or one that no rule is known for.
    pub(crate) fn next(&self, place: u32, token: Token) -> u32 {
        self.places.get(&(place, token)).copied().unwrap_or(u32::MAX)
    }

    /// Whether the rules allow every token of a path.
    pub fn permits(&self, path: &[Token]) -> bool {
        let mut place = ALLOWED_ROOT;
        path.iter().all(|&token| {
            let allowed = self.allows(place, token);
            place = self.next(place, token);
            allowed
        })
    }

    /// Whether the rule of a place is to be asked for.
    pub(crate) fn is_unknown(&self, place: u32) -> bool {
        self.asks && matches!(self.rules.get(place as usize), None | Some(Rule::Unknown))
    }

    /// Whether a place allows a token.
    pub(crate) fn allows(&self, place: u32, token: Token) -> bool {
        self.mask(place).is_none_or(|(words, _)| holds(words, token))
    }

    /// How many tokens a place allows, if it has a mask.
    pub(crate) fn count(&self, place: u32) -> Option<usize> {
        self.mask(place).map(|(_, count)| count)
    }

    /// All tokens that a place allows, where these are few.
    pub(crate) fn few(&self, place: u32) -> impl Iterator<Item = Token> + '_ {
        let words = self.mask(place).filter(|&(_, count)| count <= FEW).map_or(&[][..], |(words, _)| words);
        let held = words.iter().enumerate().filter(|(_, word)| **word != 0);
        held.flat_map(|(at, &word)| {
            (0..32).filter(move |bit| word >> bit & 1 != 0).map(move |bit| (32 * at) as Token + bit)
        })
    }

    fn mask(&self, place: u32) -> Option<(&[u32], usize)> {
        match self.rules.get(place as usize) {
            Some(&Rule::Mask { start, end, count }) => Some((&self.words[start..end], count)),
            _ => None,
        }
    }

    /// Bytes that it holds.
    pub fn memory_bytes(&self) -> usize {
        self.places.capacity() * size_of::<((u32, Token), u32)>()
            + self.rules.capacity() * size_of::<Rule>()
            + self.words.capacity() * size_of::<u32>()
    }
}

fn holds(words: &[u32], token: Token) -> bool {
    words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_by_their_paths() {
        let mut allowed = Allowed::default();
        assert!(allowed.is_empty() && allowed.allows(ALLOWED_ROOT, 7));
        allowed.insert(&[], Mask::Words(&[0b101, 0, 1 << 31])).unwrap();
        allowed.insert(&[2, 95], Mask::Words(&[])).unwrap();
        let two = allowed.next(ALLOWED_ROOT, 2);
        let end = allowed.next(two, 95);
        let held: Vec<_> = (0..200).filter(|&token| allowed.allows(ALLOWED_ROOT, token)).collect();
        assert_eq!(held, [0, 2, 95]);
        assert_eq!(allowed.few(ALLOWED_ROOT).collect::<Vec<_>>(), [0, 2, 95]);
        // nothing is known between, and nothing may follow the end
        assert!(allowed.allows(two, 7) && !allowed.allows(end, 7) && allowed.count(end) == Some(0));
        assert!(!allowed.is_unknown(two));
        assert!(allowed.permits(&[2, 95]) && !allowed.permits(&[3, 95]) && !allowed.permits(&[2, 95, 4]));
        allowed.set_asks(true);
        assert!(allowed.is_unknown(two) && !allowed.is_unknown(end) && allowed.is_unknown(u32::MAX));
        allowed.insert(&[2], Mask::Anything).unwrap();
        assert!(!allowed.is_unknown(two) && allowed.allows(two, 7) && allowed.next(two, 95) == end);
        allowed.clear();
        assert!(allowed.is_empty());
    }
}
