//! Which evidence speaks for a token: the context in which refinements and calibration are learned.

use crate::sources::{self, ALIGNED, FEEDBACK, LIVE, LOWER, NO_CLASS, REQUEST, STORE, SUCCESSORS};

/// Groups of classes, after the one of no class.
const GROUPS: [u8; 16] = [0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5];
const GROUP_COUNT: usize = 6;
/// The groups of the request, and in place of no class how recently the token occurred in it.
const REQUEST_GROUPS: usize = GROUP_COUNT + 3;
/// A datastore that says nothing, then its groups, of which no class is one if it says something else.
const STORE_GROUPS: usize = GROUP_COUNT;
/// Where only request and datastore speak: request, datastore, whether `lower` and `successors` hold the token.
const TEXT_RADICES: [usize; 4] = [REQUEST_GROUPS, STORE_GROUPS, 2, 2];
// the first entry of each is that of no class; classes beyond the twelfth do not occur
const LIVE_GROUPS: [u8; 16] = [0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2];
const ALIGNED_GROUPS: [u8; 16] = [0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3];
/// Where the target's probabilities speak; 0 is left for where they do not.
const FEEDBACK_GROUPS: [u8; 16] = [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6];
/// Beside other sources a datastore that speaks: of other tokens, after a short match, after a long one.
const BESIDE_GROUPS: [u8; 16] = [1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3];
/// Otherwise: live store, aligned text, feedback; of the request never, occurred, short or long match; datastore.
const OTHER_RADICES: [usize; 5] = [3, 4, 7, 4, 4];
const TEXTS: usize = product(&TEXT_RADICES);
/// Number of rows.
pub const ROWS: usize = TEXTS + product(&OTHER_RADICES);
/// What the request says, by kind, and whether another source says anything, and holds the token.
const REQUEST_KINDS: [u8; 16] = [0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3];
const OTHER_KINDS: usize = 3;
/// Number of kinds of evidence.
pub const KINDS: usize = 4 * OTHER_KINDS;

const fn product(radices: &[usize]) -> usize {
    let (mut product, mut at) = (1, 0);
    while at < radices.len() {
        product *= radices[at];
        at += 1;
    }
    product
}

/// The number with these digits, the most significant first.
fn number<const N: usize>(digits: [usize; N], radices: [usize; N]) -> usize {
    digits.into_iter().zip(radices).fold(0, |number, (digit, radix)| number * radix + digit)
}

/// Which kinds of evidence speak for a token.
#[derive(Clone, Copy)]
pub struct Support {
    /// For each source, the class of the longest context that the token followed, or [`NO_CLASS`].
    pub classes: [u8; sources::COUNT],
    /// A bit for each source that has anything to say, about this token or others.
    pub speaks: u8,
    /// How recently the token itself occurred in the request, if no context speaks for it.
    pub occurrence: Occurrence,
}

/// How long ago a token occurred in the request.
#[derive(Clone, Copy, Default, PartialEq)]
pub enum Occurrence {
    #[default]
    Never,
    Long,
    Recent,
    Just,
}

impl Occurrence {
    /// From the distance in tokens.
    pub fn ago(distance: usize) -> Self {
        match distance {
            0..64 => Self::Just,
            64..512 => Self::Recent,
            _ => Self::Long,
        }
    }
}

impl Support {
    fn speaks(self, source: usize) -> bool {
        self.speaks >> source & 1 != 0
    }

    fn holds(self, source: usize) -> bool {
        self.classes[source] != NO_CLASS
    }

    /// What `table` has for the source's class; `NO_CLASS` plus one wraps to its first entry. The table is longer than
    /// there are classes, so that no bounds need be checked.
    fn look(self, source: usize, table: &[u8; 16]) -> usize {
        usize::from(table[usize::from(self.classes[source].wrapping_add(1) & 15)])
    }

    /// Its row of the refinements. Those of the other sources, if any of them speaks, are apart, since what has them
    /// to go by as well comes true more often.
    #[inline]
    pub fn row(self) -> usize {
        self.others().map_or_else(|| self.texts(), |row| TEXTS + row)
    }

    /// The kind of evidence, for the request's own calibration.
    #[inline]
    pub fn kind(self) -> usize {
        let others = [STORE, LIVE, FEEDBACK];
        let speaks = others.iter().any(|&source| self.speaks(source));
        let holds = others.iter().any(|&source| self.holds(source));
        self.look(REQUEST, &REQUEST_KINDS) * OTHER_KINDS + usize::from(speaks) + usize::from(holds)
    }

    /// Its row among the contexts of request and datastore.
    #[inline]
    fn texts(self) -> usize {
        let request = match self.look(REQUEST, &GROUPS) {
            0 => [0, GROUP_COUNT, GROUP_COUNT + 1, GROUP_COUNT + 2][self.occurrence as usize],
            group => group,
        };
        let store = match self.speaks(STORE) {
            false => 0,
            true => self.look(STORE, &GROUPS).max(1),
        };
        let held = [LOWER, SUCCESSORS].map(|source| usize::from(self.holds(source)));
        number([request, store, held[0], held[1]], TEXT_RADICES)
    }

    /// Its row among the contexts of the other sources, if any of them speaks.
    #[inline]
    fn others(self) -> Option<usize> {
        let live = self.look(LIVE, &LIVE_GROUPS);
        let aligned = self.look(ALIGNED, &ALIGNED_GROUPS);
        let feedback = match self.speaks(FEEDBACK) {
            false => 0,
            true => self.look(FEEDBACK, &FEEDBACK_GROUPS),
        };
        if live + aligned + feedback == 0 {
            return None;
        }
        let request = match self.look(REQUEST, &GROUPS) {
            0 => usize::from(self.occurrence != Occurrence::Never),
            group => 2 + usize::from(group > 3),
        };
        let store = match self.speaks(STORE) {
            false => 0,
            true => self.look(STORE, &BESIDE_GROUPS),
        };
        Some(number([live, aligned, feedback, request, store], OTHER_RADICES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn support(classes: &[(usize, u8)], speaks: &[usize], occurrence: Occurrence) -> Support {
        let mut support = Support { classes: [NO_CLASS; sources::COUNT], speaks: 0, occurrence };
        classes.iter().for_each(|&(source, class)| support.classes[source] = class);
        let held = classes.iter().map(|&(source, _)| source);
        held.chain(speaks.iter().copied()).for_each(|source| support.speaks |= 1 << source);
        support
    }

    #[test]
    fn what_speaks_and_holds_tells_rows_and_kinds_apart() {
        use Occurrence::{Just, Long, Never, Recent};
        let all = [
            support(&[], &[], Never),
            support(&[], &[], Long),
            support(&[], &[], Recent),
            support(&[], &[], Just),
            support(&[], &[STORE], Never),
            support(&[(STORE, 0)], &[], Never),
            support(&[(STORE, 1)], &[], Never),
            support(&[(LOWER, 0)], &[], Never),
            support(&[(SUCCESSORS, 0)], &[], Never),
            support(&[(REQUEST, 0)], &[], Never),
            support(&[(REQUEST, 7)], &[], Never),
            support(&[(REQUEST, 7), (LIVE, 1)], &[], Never),
            support(&[(REQUEST, 7), (LIVE, 4)], &[], Never),
            support(&[(REQUEST, 7), (ALIGNED, 4)], &[], Never),
            support(&[(REQUEST, 7)], &[FEEDBACK], Never),
            support(&[(REQUEST, 7), (FEEDBACK, 0)], &[], Never),
            support(&[(REQUEST, 7), (FEEDBACK, 3)], &[STORE], Never),
            support(&[(REQUEST, 7), (FEEDBACK, 3), (STORE, 1)], &[], Never),
            support(&[(REQUEST, 7), (FEEDBACK, 3), (STORE, 2)], &[], Never),
        ];
        let mut rows: Vec<_> = all.iter().map(|support| support.row()).collect();
        rows.sort_unstable();
        rows.dedup();
        // a datastore that has the token after no context is one that speaks of others
        assert_eq!(rows.len(), all.len() - 1);
        assert!(rows[all.len() - 2] < ROWS);
        let kinds = [(0, 0), (4, 1), (5, 2), (9, 3), (10, 9), (14, 10), (15, 11)];
        assert!(kinds.iter().all(|&(at, kind)| all[at].kind() == kind));
    }
}
