//! Which of a corpus' domains (its sources, say) a request's text is like: how much an occurrence in each counts.
//!
//! A small domain drowns in a large one where all occurrences count the same. Here a context predicts
//! `sum_d w_d c_d(t) / sum_d w_d n_d` from the occurrences `n_d` in each domain `d`, of which `c_d(t)` go on with `t` (count
//! merging: Bacchiani, Riley, Roark and Sproat, "MAP adaptation of stochastic grammars", 2006). Each domain alone and
//! all together are experts that predict the tokens that come; a domain counts more than others by how much better it has done
//! of late, where it has done better than all together.

use crate::predictor::arena::Voice;
use crate::sources::CLASSES;
use crate::sources::corpus::DOMAINS;

/// The logarithm of a domain's odds against all together, before anything has come.
const PRIOR: f32 = 2.0;
/// What is left of the old evidence after each token.
const FADING: f32 = 0.98;
/// What every expert gives to every token besides what occurrences say.
const FLOOR: f32 = 0.1;
/// The least that an occurrence counts, and the most evidence.
const LEAST: f32 = 0.01;
const LIMIT: f32 = 8.0;

/// What a request has learned of a corpus' domains.
#[derive(Clone)]
pub struct Domains {
    /// The logarithm of the odds of each alone against all together, less the prior.
    evidence: [f32; DOMAINS],
    /// What its occurrences count, the most 1.
    weights: [f32; DOMAINS],
}

impl Default for Domains {
    fn default() -> Self {
        Self { evidence: [0.0; DOMAINS], weights: [1.0; DOMAINS] }
    }
}

impl Domains {
    /// What an occurrence in each domain counts: above 0, at most 1.
    pub fn weights(&self) -> &[f32; DOMAINS] {
        &self.weights
    }

    /// Takes up what has been learned, for the next draft.
    pub fn start(&mut self) {
        let odds = self.evidence.map(|evidence| (PRIOR + evidence).max(0.0));
        let best = odds.into_iter().fold(0.0, f32::max);
        self.weights = odds.map(|odds| (odds - best).exp().max(LEAST));
    }

    /// Learns from the token of a candidate, which came after the node that these voices spoke of.
    pub fn learn(&mut self, voices: &[Voice], truth: u32) {
        if voices.is_empty() {
            return;
        }
        let mut counts = [[(0.0f32, 0.0f32); CLASSES]; DOMAINS];
        for &Voice { candidate, weight, class, domain } in voices {
            let (all, came) = &mut counts[usize::from(domain)][usize::from(class)];
            let count = weight / self.weights[usize::from(domain)];
            *all += count;
            *came += if candidate == truth { count } else { 0.0 };
        }
        let sum = |class: usize| {
            counts.iter().fold((0.0, 0.0), |sum, own| (sum.0 + own[class].0, sum.1 + own[class].1))
        };
        let together = FLOOR + blended(&std::array::from_fn::<_, CLASSES, _>(sum));
        for (evidence, classes) in self.evidence.iter_mut().zip(&counts) {
            let odds = (FLOOR + blended(classes)) / together;
            *evidence = (FADING * *evidence + odds.ln()).clamp(-LIMIT, LIMIT);
        }
    }
}

/// The probability of a token that occurrences give it, of each class all and those that it followed: longer contexts
/// first, each trusted by what it has seen.
fn blended(classes: &[(f32, f32)]) -> f32 {
    let (mut prob, mut rest) = (0.0, 1.0);
    for (all, came) in classes.iter().rev().filter(|class| class.0 > 0.0) {
        prob += rest * came / (all + 1.0);
        rest /= all + 1.0;
    }
    prob
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Domain 0 has much to say and is wrong, domain 1 little and is right.
    fn voices(domains: &Domains) -> [Voice; 3] {
        [(1, 60.0, 0), (2, 10.0, 0), (2, 5.0, 1)].map(|(candidate, count, domain)| {
            let weight = count * domains.weights()[usize::from(domain)];
            Voice { candidate, weight, class: 2, domain }
        })
    }

    fn learned(tokens: impl IntoIterator<Item = u32>) -> Domains {
        let mut domains = Domains::default();
        for token in tokens {
            domains.learn(&voices(&domains), token);
            domains.start();
        }
        domains
    }

    #[test]
    fn who_has_what_comes_counts_more_than_who_has_much() {
        let domains = learned([2; 20]);
        assert_eq!(domains.weights()[..2], [LEAST, 1.0]);
        // the other way round it goes back
        let domains = learned([2; 20].into_iter().chain([1; 40]));
        assert_eq!(domains.weights()[0], 1.0);
        assert!(domains.weights()[1] < 1.0);
    }

    #[test]
    fn nothing_is_learned_from_what_nobody_had() {
        let domains = learned([9; 10]);
        assert_eq!(domains.weights(), &[1.0; DOMAINS]);
        let mut domains = Domains::default();
        domains.learn(&[], 1);
        domains.start();
        assert_eq!(domains.weights(), &[1.0; DOMAINS]);
    }

    #[test]
    fn longer_contexts_come_first() {
        assert!((blended(&[(3.0, 3.0)]) - 0.75).abs() < 1e-6);
        let both = blended(&[(4.0, 1.0), (1.0, 1.0)]);
        assert!((both - (0.5 + 0.5 * 0.2)).abs() < 1e-6);
    }
}
