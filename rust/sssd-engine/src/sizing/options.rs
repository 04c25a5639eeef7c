//! The constants of the rule. What each is worth: `benches/results/rule-constants.md`.

macro_rules! options {
    ($($(#[doc = $doc:literal])+ $name:ident: $kind:ty = $value:expr;)+) => {
        /// The constants of a [`SizingRule`](super::SizingRule); change them to measure what they are worth.
        #[derive(Clone, Debug, PartialEq)]
        pub struct RuleOptions {
            $($(#[doc = $doc])+ pub $name: $kind,)+
        }

        impl Default for RuleOptions {
            fn default() -> Self {
                Self { $($name: $value,)+ }
            }
        }

        impl RuleOptions {
            /// Name, value and effect of each.
            pub fn list(&self) -> Vec<(&'static str, f64, &'static str)> {
                vec![$((stringify!($name), self.$name as f64, concat!($($doc),+))),+]
            }

            /// Sets one by name; false if there is none of that name or the value is none.
            pub fn set(&mut self, name: &str, value: f64) -> bool {
                if !(value.is_finite() && (0.0..=1e9).contains(&value)) {
                    return false;
                }
                match name {
                    $(stringify!($name) => self.$name = value as $kind,)+
                    _ => return false,
                }
                true
            }
        }
    };
}

options! {
    /// Nodes. The most that are verified of a request, unless the caller says how many.
    most_nodes: usize = 256;
    /// Nodes. What a new request may draft.
    first_limit: usize = 64;
    /// Nodes. The most that are verified in a pass before any were; then twice the most that were.
    first_reach: usize = 4;
    /// Nodes. What a request may draft beyond 1.25 times what was verified of its last draft.
    spare_nodes: usize = 6;
    /// Share. Of a pass without drafts: as many nodes as are drafted in so much of it may be drafted in any case.
    cheap_share: f64 = 0.002;
    /// Share. A request's limit falls to no less of what it was, however little was verified.
    limit_fall: f64 = 0.75;
    /// Share. Weight of the newest draft in what drafts of a request are found to be worth beyond their own time.
    worth_memory: f64 = 0.125;
    /// Tokens. What drafts of a new request are taken to be worth.
    first_worth: f64 = 0.1;
    /// Steps. The longest wait of a request whose drafts are not worth their own time.
    longest_wait: usize = 8;
    /// Probability. Nodes less probable are not drafted at first.
    first_min_prob: f64 = 0.002;
    /// Probability. Bound below which a node is never drafted.
    least_min_prob: f64 = 0.0005;
    /// Probability. Bound above which nodes are always drafted.
    most_min_prob: f64 = 0.5;
    /// Share. Nodes are drafted down to so much of the least probability that was verified lately.
    min_prob_margin: f64 = 0.7;
    /// Share. Weight of the newest step where that least probability rises; it falls at once.
    min_prob_memory: f64 = 0.02;
    /// Share. Weight of the newest step in the decoding rate: a memory of about fifty steps.
    rate_memory: f64 = 0.02;
    /// Tokens of a request per plain step. A step counts for no more.
    most_speedup: f64 = 1000.0;
    /// Times. The newest of a size (by powers of two) that count; their median does, so that a hiccup does not.
    window: usize = 33;
    /// Times. So many of a size count as much as the line through those of all.
    trust: f64 = 4.0;
    /// Steps. After so many the oldest time of every size is forgotten.
    forget_every: usize = 64;
    /// Share. So much is left, when times are forgotten, of what they said that a node costs beyond the curve.
    slope_memory: f64 = 0.9;
    /// Factor. How far a time may be from the curve at all.
    strangest: f64 = 1e6;
    /// Factor. How far the time of a size may move from the curve, relative to all sizes.
    furthest: f64 = 16.0;
    /// Log of a factor. How far the first time with drafts may move that, as it may be a hiccup; n times n^2 as far.
    first_move: f64 = 0.25;
    /// Log of a factor. A change of a correction that is worth building the costs anew.
    news: f64 = 0.02;
    /// Steps. After so many one without drafts is due, to know its time.
    plain_every: usize = 2048;
    /// Steps. The same for a number of requests that is new, if others are known.
    plain_soon: usize = 16;
    /// Steps. So many without drafts tell how fast the machine is now; the faster one does.
    plain_at_once: usize = 2;
    /// Steps. So many without drafts whose time is not known, as they have also read prompts, stand for one whose is.
    unmeasured_plain: usize = 4;
    /// Times. The newest of all sizes, whose median tells that the machine's speed has changed.
    recent: usize = 9;
    /// Log of a factor. By how much it must have changed.
    change: f64 = 0.15;
    /// Times. After so many a size can tell that.
    settled: usize = 3;
    /// Steps. Between two such findings, times the speed-up: a busy machine must not cost what drafts bring.
    changes_apart: f64 = 40.0;
    /// Steps. The first pause of drafting that has lost more than its debt.
    shortest_pause: usize = 16;
    /// Steps. The longest; each is twice the one before.
    longest_pause: usize = 512;
    /// Tokens per request. What drafting may lose against plain decoding before it pauses.
    debt: f64 = 2.0;
}

impl RuleOptions {
    /// Log of the factor by which so many times may move what is believed: a first one may be a hiccup.
    pub(super) fn furthest_of(&self, times: usize) -> f64 {
        (self.first_move * (times * times) as f64).min(self.furthest.max(1.0).ln())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_can_be_listed_and_set() {
        let mut options = RuleOptions::default();
        for (name, value, effect) in options.list() {
            assert!(!effect.is_empty());
            assert!(options.set(name, value + 1.0));
        }
        let changed = options.list();
        assert!(RuleOptions::default().list().iter().zip(changed).all(|(old, new)| old.1 + 1.0 == new.1));
        assert!(!options.set("none", 1.0) && !options.set("debt", f64::NAN) && !options.set("debt", -1.0));
    }
}
