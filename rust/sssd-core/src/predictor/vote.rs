//! Samples of a node vote for the token that followed them, and go on to the candidate for it.

use crate::index::Index;
use crate::memory::push;
use crate::predictor::arena::{Candidate, Sample, Scratch, Tally, Vote, child};
use crate::predictor::inputs::Inputs;
use crate::sources::{Evidence, Length, MAX_LENGTH, NO_CLASS, SOURCES, aligned, class};
use crate::{Corpus, MAX_TOKEN, Token};

/// Tokens read from a corpus at a time.
const NEXT_READ: usize = 16;

/// Hands each sample of `node` on to the candidate for its next token. The votes are left in `scratch`.
#[inline]
pub fn vote(
    node: u32,
    candidates: &mut Vec<Candidate>,
    inputs: &Inputs,
    scratch: &mut Scratch,
    tally: &mut Tally,
) {
    let Scratch { samples, origins, read, votes, table, .. } = scratch;
    votes.clear();
    let mut next = origins[node as usize].samples;
    while let Some(sample) = samples.get_mut(next as usize) {
        let current = std::mem::replace(&mut next, sample.next);
        let source = usize::from(sample.source);
        let Some(token) = token(sample, inputs.index, inputs.corpus(source), read) else { continue };
        let child = child(node, token, candidates, origins, table);
        let class = class(sample.length) as u8;
        tally_vote(tally, source, class, sample.weight, &mut candidates[child as usize]);
        sample.cursor += 1;
        sample.length = match SOURCES[source].length {
            Length::PlusOne => sample.length + 1,
            Length::Aligned => aligned::agreed(sample.length),
        }
        .min(MAX_LENGTH as u16);
        sample.next = std::mem::replace(&mut origins[child as usize].samples, current);
        push(
            votes,
            Vote {
                candidate: child,
                weight: sample.weight,
                source: source as u8,
                class,
                domain: sample.domain,
            },
        );
    }
}

/// The token that a sample predicts, if its text goes on.
#[inline]
fn token(
    sample: &mut Sample,
    index: &Index,
    corpus: Option<&dyn Corpus>,
    read: &mut Vec<Token>,
) -> Option<Token> {
    if sample.cursor == sample.end {
        if sample.ended {
            return None;
        }
        sample.read_on(read, corpus?, NEXT_READ);
        if sample.cursor == sample.end {
            return None;
        }
    }
    let token = match SOURCES[usize::from(sample.source)].evidence {
        Evidence::Corpus { .. } => read[sample.cursor as usize],
        _ => index.token(sample.cursor),
    };
    // a placeholder is no prediction
    (token <= MAX_TOKEN).then_some(token)
}

/// Counts a vote, and the candidate among those of the longest class that it has been seen after.
#[inline]
fn tally_vote(tally: &mut Tally, source: usize, class: u8, weight: f32, candidate: &mut Candidate) {
    let held = &mut candidate.classes[source];
    if *held == NO_CLASS || *held < class {
        if *held != NO_CLASS {
            tally.distinct[source][usize::from(*held)] -= 1;
        }
        tally.distinct[source][usize::from(class)] += 1;
        *held = class;
    }
    tally.counts[source][usize::from(class)] += weight;
    tally.held[source] |= 1 << class;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictor::inputs::tests::Parts;
    use crate::sources::{ALIGNED, REQUEST, STORE};

    #[test]
    fn samples_go_on_to_the_candidate_for_their_next_token_one_token_longer() {
        let parts = Parts::new(&[5, 6, 7, 5, 6, 8, 5]);
        let (mut scratch, mut tally) = (Scratch::default(), Tally::default());
        let mut candidates = vec![Candidate::new(5, 0, 0)];
        scratch.start();
        scratch.table.clear();
        for (source, cursor, length) in [(REQUEST, 1, 1), (REQUEST, 4, 3), (ALIGNED, 2, 1), (REQUEST, 7, 2)] {
            scratch.add_sample(0, Sample::in_request(source, cursor, 7, length));
        }
        vote(0, &mut candidates, &parts.inputs(), &mut scratch, &mut tally);
        assert_eq!(candidates[1..].iter().map(|child| child.token).collect::<Vec<_>>(), [7, 6]);
        // the last sample stands at the end of the text and has no voice
        assert_eq!(scratch.votes.iter().map(|vote| vote.candidate).collect::<Vec<_>>(), [1, 2, 2]);
        let lengths: Vec<_> = scratch.samples.iter().map(|sample| (sample.cursor, sample.length)).collect();
        assert_eq!(lengths, [(2, 2), (5, 4), (3, aligned::agreed(1)), (7, 2)]);
        assert_eq!((scratch.origins[1].samples, scratch.origins[2].samples), (2, 0));
    }

    #[test]
    fn candidates_count_once_at_the_longest_context_they_followed() {
        let mut tally = Tally::default();
        let mut candidates = [Candidate::new(7, 0, 1), Candidate::new(8, 0, 1)];
        for (source, class, candidate) in
            [(REQUEST, 2, 0), (REQUEST, 4, 0), (REQUEST, 3, 0), (REQUEST, 2, 1), (STORE, 1, 1)]
        {
            tally_vote(&mut tally, source, class, 1.5, &mut candidates[candidate]);
        }
        assert_eq!(tally.distinct[REQUEST][..6], [0, 0, 1, 0, 1, 0]);
        assert_eq!(tally.counts[REQUEST][..6], [0.0, 0.0, 3.0, 1.5, 1.5, 0.0]);
        assert_eq!((tally.held[REQUEST], tally.held[STORE]), (0b11100, 0b10));
        assert_eq!((candidates[0].classes[REQUEST], candidates[1].classes[REQUEST]), (4, 2));
        assert_eq!(tally.distinct[STORE][1], 1);
    }
}
