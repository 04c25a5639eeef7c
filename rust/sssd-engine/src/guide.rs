//! What a caller has to say of drafts: another drafter's, and which tokens are allowed.

use sssd_core::{Allowed, Given, Outside, Sequence, Token};

/// Rules that are asked for at a time. The first of them is needed for certain, the others most likely.
const ASKED: usize = 16;

/// What is said of one request's draft.
#[derive(Debug, Default)]
pub struct Guide {
    /// Another drafter's draft, if it has any nodes.
    pub given: Given,
    /// Which tokens may follow, if it has any rules.
    pub allowed: Allowed,
}

/// A place whose rule is asked for: the request's place in its batch, and the tokens of the draft that lead there.
pub type Place = (usize, Vec<Token>);

impl Guide {
    /// Forgets what was said.
    pub fn clear(&mut self) {
        self.given.clear();
        self.allowed.clear();
    }

    /// As a draft takes it.
    pub fn outside(&self) -> Outside<'_> {
        Outside {
            given: Some(&self.given).filter(|given| !given.is_empty()),
            allowed: Some(&self.allowed).filter(|allowed| !allowed.is_empty()),
        }
    }

    /// Adds the places whose rules the last draft of a sequence lacked.
    pub(crate) fn find_unruled(&self, sequence: &Sequence, item: usize, places: &mut Vec<Place>) {
        if self.allowed.asks() {
            sequence.unruled(&self.allowed, ASKED, |path| places.push((item, path.to_vec())));
        }
    }

    /// Bytes that it holds.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.given.memory_bytes() + self.allowed.memory_bytes()
    }
}
