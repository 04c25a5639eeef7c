//! The text that the output follows: a predicted output, or an earlier passage that it copied until it went
//! astray. Longest matches lose the thread at every edit; this keeps it.

use crate::index::{Index, NONE, ORDERS};

/// Matched tokens that start a copy, as an index of [`ORDERS`].
const START: usize = 4;
/// Matched tokens that find the thread again, likewise.
const AGAIN: usize = 2;
/// Occurrences looked at to find the thread again.
const STEPS: usize = 16;
/// Tokens after which a copy that went astray is given up; a prediction never is.
const PATIENCE: u16 = 16;
/// How far ahead the newest token is looked for, as if the output had left something out.
const SKIPS: usize = 16;

/// Where the output may go on, and how it stands to what is followed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Continuation {
    pub position: u32,
    pub end: u32,
    /// In place of a match length: 1 if the output replaces tokens of what it copied, 2 if it adds some, 3 if it
    /// leaves some out; 5 to 7 likewise for a prediction; 9 and more, rising with the tokens that agreed, while
    /// it follows the prediction.
    pub length: u16,
}

/// The length after one more token that agrees: 4 for a copy that was found again.
pub fn agreed(length: u16) -> u16 {
    match length {
        1..=4 => 4,
        5..=8 => 9,
        _ => length.saturating_add(1),
    }
}

#[derive(Clone, Copy, Default)]
pub struct Aligned {
    /// Where the output may go on, if anything is followed.
    next: Option<u32>,
    /// Tokens at the start of the index that are a predicted output.
    predicted: u32,
    /// Tokens that agreed up to now.
    run: u16,
    /// Tokens since the last one that agreed.
    astray: u16,
}

impl Aligned {
    /// Follows the first `predicted` tokens of the index from the beginning of the output on.
    pub fn new(predicted: u32) -> Self {
        Self { next: (predicted > 0).then_some(0), predicted, ..Self::default() }
    }

    fn end(&self, index: &Index) -> u32 {
        match self.next {
            Some(next) if next < self.predicted => self.predicted,
            _ => index.tokens().len() as u32,
        }
    }

    /// Takes account of the newest token of the index.
    pub fn follow(&mut self, index: &Index) {
        let tokens = index.tokens();
        let last = tokens.len() as u32 - 1;
        if let Some(next) =
            self.next.filter(|&next| tokens.get(next as usize) == tokens.last() && next < last)
        {
            self.next = Some(next + 1).filter(|&next| next != self.predicted);
            self.run = self.run.saturating_add(1);
            self.astray = 0;
            return;
        }
        self.run = 0;
        self.astray = self.astray.saturating_add(1);
        let order = if self.next.is_some() { AGAIN } else { START };
        let mut position = index.previous(order, last);
        let mut nearest: Option<u32> = None;
        for _ in 0..STEPS {
            if position == NONE {
                break;
            }
            let wanted = self.next.unwrap_or(last);
            let allowed = self.predicted == 0 || position < self.predicted;
            if allowed && nearest.is_none_or(|held| wanted.abs_diff(position) < wanted.abs_diff(held)) {
                nearest = Some(position);
            }
            position = index.previous(order, position);
        }
        if let Some(position) = nearest {
            let next = Some(position + 1).filter(|&next| next != self.predicted);
            *self = Self { next, run: ORDERS[order] as u16, astray: 0, ..*self };
        } else if self.predicted == 0 && self.astray > PATIENCE {
            self.next = None;
        }
    }

    /// Where the output may go on. A copy on its way is not told: longest matches say the same.
    pub fn continuations(&self, index: &Index, mut act: impl FnMut(Continuation)) {
        let tokens = index.tokens();
        let end = self.end(index);
        let Some(next) = self.next.filter(|&next| next < end) else { return };
        if self.astray == 0 {
            if self.predicted > 0 {
                act(Continuation { position: next, end, length: self.run.saturating_add(9) });
            }
            return;
        }
        let ahead = &tokens[next as usize..(next as usize + SKIPS).min(end as usize)];
        let skipped = tokens.last().and_then(|last| ahead.iter().position(|token| token == last));
        let replaced = next.saturating_add(u32::from(self.astray));
        let left_out = skipped.map_or(NONE, |skipped| next + skipped as u32 + 1);
        for (length, position) in [(1, replaced), (2, next), (3, left_out)] {
            if position < end {
                let length = if self.predicted > 0 { length + 4 } else { length };
                act(Continuation { position, end, length });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn continuations(predicted: &[u32], output: &[u32]) -> Vec<(u32, u16)> {
        let mut index = Index::default();
        index.append(predicted).unwrap();
        let mut aligned = Aligned::new(predicted.len() as u32);
        for &token in output {
            index.append(&[token]).unwrap();
            aligned.follow(&index);
        }
        let mut found = Vec::new();
        aligned.continuations(&index, |c| found.push((index.tokens()[c.position as usize], c.length)));
        found
    }

    const TEXT: [u32; 10] = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19];

    #[test]
    fn a_prediction_is_followed_from_the_start_and_after_edits() {
        assert_eq!(continuations(&TEXT, &[]), [(10, 9)]);
        assert_eq!(continuations(&TEXT, &[10, 11]), [(12, 11)]);
        assert_eq!(continuations(&TEXT, &[10, 99]), [(12, 5), (11, 6)]);
        assert_eq!(continuations(&TEXT, &[10, 13]), [(12, 5), (11, 6), (14, 7)]);
        assert_eq!(continuations(&TEXT, &[10, 99, 98, 97, 14, 15, 16]), [(17, 12)]);
        assert_eq!(continuations(&TEXT, &TEXT), []);
        // found again at its end: what comes after it in the index is the output
        assert_eq!(continuations(&[5, 1, 2, 3], &[9, 9, 1, 2, 3]), []);
    }

    #[test]
    fn a_copy_that_goes_astray_is_kept_for_a_while() {
        let copy = [&TEXT[..], &[1], &TEXT[..7]].concat();
        assert_eq!(continuations(&[], &copy), []);
        assert_eq!(continuations(&[], &[&copy[..], &[99]].concat()), [(18, 1), (17, 2)]);
        let long = (100..100 + u32::from(PATIENCE) + 2).collect::<Vec<_>>();
        assert_eq!(continuations(&[], &[&copy[..], &long].concat()), []);
    }
}
