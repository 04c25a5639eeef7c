//! Which of a corpus' domains (its sources, say) a request's text is like: how much an occurrence in each counts.
//!
//! A small domain drowns in a large one where all occurrences count the same. Here those of domain `d` count `w_d`, so
//! that a context predicts `sum_d w_d c_d(t) / sum_d w_d n_d` (count merging). The `w_d` that make the tokens that came most
//! probable are those of a generalized Bradley-Terry model and are found by its minorization-maximization (Hunter,
//! "MM algorithms for generalized Bradley-Terry models", Annals of Statistics 2004), a step for each token.

use crate::predictor::arena::Voice;
use crate::sources::CLASSES;
use crate::sources::corpus::DOMAINS;

/// How much the beginning, in which occurrences count the same in all domains, weighs: tokens that came.
const PRIOR: f32 = 4.0;

/// What a request has learned of a corpus' domains.
#[derive(Clone)]
pub struct Domains {
    /// Of each the share that it had in what was said of the tokens that came, summed over them.
    came: [f32; DOMAINS],
    /// The share that it would have had of whatever token, had it counted 1, summed likewise.
    offered: [f32; DOMAINS],
    /// What its occurrences count, the most 1.
    weights: [f32; DOMAINS],
}

impl Default for Domains {
    fn default() -> Self {
        Self { came: [0.0; DOMAINS], offered: [0.0; DOMAINS], weights: [1.0; DOMAINS] }
    }
}

impl Domains {
    /// What an occurrence in each domain counts: above 0, at most 1.
    pub fn weights(&self) -> &[f32; DOMAINS] {
        &self.weights
    }

    /// Learns from the token of a candidate, which came after the node that these voices spoke of.
    pub fn learn(&mut self, voices: &[Voice], truth: u32) {
        let (mut all, mut own) = ([[0.0f32; DOMAINS]; CLASSES], [[0.0f32; DOMAINS]; CLASSES]);
        for &Voice { candidate, weight, class, domain } in voices {
            let (class, domain) = (usize::from(class), usize::from(domain));
            all[class][domain] += weight;
            if candidate == truth {
                own[class][domain] += weight;
            }
        }
        let total: f32 = own.iter().flatten().sum();
        if total <= 0.0 {
            return;
        }
        let raw = self.raw();
        for (all, own) in all.iter().zip(&own) {
            let (mass, share) = (all.iter().sum::<f32>(), own.iter().sum::<f32>() / total);
            for domain in (0..DOMAINS).filter(|&domain| all[domain] > 0.0) {
                self.came[domain] += own[domain] / total;
                self.offered[domain] += share * all[domain] / mass / raw[domain];
            }
        }
        let raw = self.raw();
        let most = raw.into_iter().fold(f32::MIN_POSITIVE, f32::max);
        self.weights = raw.map(|weight| weight / most);
    }

    fn raw(&self) -> [f32; DOMAINS] {
        std::array::from_fn(|domain| (PRIOR + self.came[domain]) / (PRIOR + self.offered[domain]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Domain 0 has much to say and is wrong, domain 1 little and is right.
    const VOICES: [Voice; 3] = [
        Voice { candidate: 1, weight: 0.6, class: 2, domain: 0 },
        Voice { candidate: 2, weight: 0.1, class: 2, domain: 0 },
        Voice { candidate: 2, weight: 0.05, class: 2, domain: 1 },
    ];

    #[test]
    fn who_has_what_comes_counts_more_than_who_has_much() {
        let mut domains = Domains::default();
        for _ in 0..30 {
            domains.learn(&VOICES, 2);
        }
        let [large, small] = [0, 1].map(|domain| domains.weights()[domain]);
        assert_eq!(small, 1.0);
        assert!(large < 0.2 && large > 0.0);
        // the other way round it goes back
        for _ in 0..200 {
            domains.learn(&VOICES, 1);
        }
        assert!(domains.weights()[0] > domains.weights()[1]);
    }

    #[test]
    fn the_weights_are_those_that_make_what_came_most_probable() {
        // of 10 tokens 6 were those of domain 0 alone, 4 those of domain 1, which offers as much
        let voices = [(1, 0), (2, 1)].map(|(candidate, domain)| Voice { candidate, weight: 0.5, class: 3, domain });
        let mut domains = Domains::default();
        let mut seen = voices;
        for n in 0..4000 {
            for (voice, before) in seen.iter_mut().zip(&voices) {
                voice.weight = before.weight * domains.weights()[usize::from(voice.domain)];
            }
            domains.learn(&seen, if n % 10 < 6 { 1 } else { 2 });
        }
        assert!((domains.weights()[1] - 4.0 / 6.0).abs() < 0.05, "{:?}", domains.weights());
    }

    #[test]
    fn nothing_is_learned_from_what_no_domain_had() {
        let mut domains = Domains::default();
        domains.learn(&VOICES, 9);
        domains.learn(&[], 1);
        assert_eq!(domains.weights(), &[1.0; DOMAINS]);
    }
}
