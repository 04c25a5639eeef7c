//! The rule: how much to draft, and how much of it to verify, at each step.
//!
//! Nodes of all trees compete, the most probable first. What maximises tokens per second over many steps is to maximise,
//! in each, *expected tokens - rate * seconds*, with the rate at which tokens come at large. The rate is learned, and at
//! least that of decoding without drafts.
//!
//! When times show that the whole machine has become slower or faster, those before are forgotten and some steps without
//! drafts are asked for, as only times of the same period can be compared.
//!
//! Three things keep speculation from costing more than it brings: the rate never falls below plain decoding's; measured
//! times count only relative to one another and within bounds, kept monotone in the width; and when tokens that drafts
//! brought, minus those that plain decoding would have made in the extra time, sink below a bound, drafting pauses,
//! longer every time.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::clock::{Clock, Time};
use super::costs::{Allocation, Layout, PassCosts};
use super::curve::{CostCurve, DraftCost, context_key};
use super::options::RuleOptions;

/// Costs of more batches and contexts are not kept.
const MOST_KEPT: usize = 256;
/// What ranking adds to the tokens of a step, and its part of the time of a draft: measured at 32 nodes with the datastore
/// of `docs/predictor.md`.
const RANKING_GAIN: f64 = 0.02;
const RANKING_PART: f64 = 0.25;

/// Sizes the drafts of batches by a cost curve, and corrects the curve by the times of steps. One rule serves any number
/// of requests, batches and threads.
pub struct SizingRule {
    curve: Arc<CostCurve>,
    max_nodes: usize,
    options: RuleOptions,
    state: Mutex<State>,
}

/// What the rule remembers of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Nodes worth drafting.
    pub limit: usize,
    /// Steps until the next draft.
    pub wait: usize,
    /// Steps to wait after the next draft, if drafts go on not to be worth their own time.
    pub pause: usize,
    /// What drafts have brought in lately, in the mean, less what they cost, in tokens.
    pub worth: f64,
}

/// What came of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepTimes {
    /// Requests of the step.
    pub batch: usize,
    /// Nodes that the pass had room for: of each row, or of all where rows are packed.
    pub size: usize,
    /// Mean length of the requests, tokens.
    pub context: f64,
    /// Time of the verify pass, where it is known.
    pub seconds: Option<f64>,
    /// Prompt tokens that the same pass has read: then its time tells nothing of drafts.
    pub prefill_tokens: usize,
    /// Tokens that the step produced, at least one per request.
    pub tokens: f64,
    /// Time of drafting.
    pub draft_seconds: f64,
}

struct State {
    /// What is known of passes of about so many requests.
    watches: BTreeMap<u32, Watch>,
    /// Of which the last step was.
    last: u32,
    /// Tokens per second at large, over those of plain decoding.
    speedup: f64,
    /// The largest size: twice what was ever verified, as a curve may promise too much.
    reach: usize,
    /// Somewhat below the least probability of a node that was verified lately.
    min_prob: f64,
    /// What drafts have brought in, less what they have cost, in tokens per request.
    account: f64,
    pause: usize,
    paused: usize,
    /// The share of a step that goes into drafts, were they ranked, and whether they are.
    drafting: f64,
    ranks: bool,
    /// Corrected costs by batch and context key.
    known: HashMap<(usize, i64), Arc<PassCosts>>,
}

/// Times of passes of about so many requests, and whether those of steps without drafts are known.
struct Watch {
    clock: Clock,
    plain_due: usize,
    since_plain: usize,
    /// Steps without drafts whose time is not known, since the last one whose is.
    unmeasured: usize,
    since_change: f64,
}

/// What nodes were given out at, to judge by whether a draft was worth its time.
pub struct Prices<'a> {
    rule: &'a SizingRule,
    rate: f64,
    /// Seconds of the pass beyond one without drafts, for each node in it.
    extra: f64,
    /// Seconds of a pass without drafts.
    plain: f64,
    requests: usize,
}

impl SizingRule {
    /// By default as many nodes of a request are verified as the options say, or the widest pass that is ready has room
    /// for.
    pub fn new(curve: Arc<CostCurve>, max_nodes: Option<usize>, options: RuleOptions) -> Self {
        let ready = curve.ready().last().map_or(options.most_nodes, |widest| widest - 1);
        let max_nodes = max_nodes.unwrap_or(options.most_nodes.min(ready));
        let state = State {
            watches: BTreeMap::new(),
            last: 0,
            speedup: 1.0,
            reach: options.first_reach,
            min_prob: options.first_min_prob,
            account: 0.0,
            pause: options.shortest_pause,
            paused: 0,
            drafting: 0.0,
            ranks: true,
            known: HashMap::new(),
        };
        Self { curve, max_nodes, options, state: Mutex::new(state) }
    }

    /// The most nodes of a request.
    pub fn max_nodes(&self) -> usize {
        self.max_nodes
    }

    /// Tokens per second at large, over those of plain decoding.
    pub fn speedup(&self) -> f64 {
        self.lock().speedup
    }

    /// Least probability of a node worth drafting.
    pub fn min_prob(&self) -> f64 {
        self.lock().min_prob
    }

    /// Whether ranking candidates is worth its time.
    pub fn ranks(&self) -> bool {
        self.lock().ranks
    }

    /// What is remembered of a new request.
    pub fn pace(&self) -> Pace {
        Pace {
            limit: self.options.first_limit.min(self.max_nodes),
            wait: 0,
            pause: 1,
            worth: self.options.first_worth,
        }
    }

    /// Begins a step: the least probability of a node worth drafting, or none if nothing is to be drafted.
    pub fn begin_step(&self) -> Option<f32> {
        let mut state = self.lock();
        if state.paused > 0 {
            state.paused -= 1;
            return None;
        }
        // without the time of a plain step nobody knows what drafts cost
        let due = state.watches.get(&state.last).map_or(self.options.plain_at_once, |watch| watch.plain_due);
        (due == 0).then_some(state.min_prob as f32)
    }

    /// The number of nodes to draft for a request in a step in which drafts are made; 0 where it would not pay.
    pub fn limit(&self, pace: &mut Pace) -> usize {
        if pace.wait > 0 {
            pace.wait -= 1;
            return 0;
        }
        pace.limit.min(self.max_nodes)
    }

    /// What passes cost and the rate for the next step.
    pub fn costs(&self, batch: usize, context: f64) -> (Arc<PassCosts>, f64) {
        let mut state = self.lock();
        let costs = self.known(&mut state, batch, context);
        let rate = state.rate(&costs, batch);
        (costs, rate)
    }

    /// Gives the nodes of all trees out, most probable first. `context` is the mean length of the requests.
    pub fn allocate(&self, context: f64, trees: &mut Allocation) -> Prices<'_> {
        let requests = trees.len();
        let (costs, rate) = self.costs(requests.max(1), context);
        trees.allocate(&costs, rate);
        self.learn_min_prob(trees);
        let (total, widest) = trees.given().fold((0, 0), |(total, widest), (_, count)| {
            let count: usize = count;
            (total + count, widest.max(count))
        });
        let size = if costs.layout() == Layout::Packed { total } else { widest };
        let extra = if total > 0 { costs.extra(size) / total as f64 } else { 0.0 };
        Prices { rule: self, rate, extra, plain: costs.seconds()[0], requests }
    }

    fn learn_min_prob(&self, trees: &Allocation) {
        let RuleOptions { min_prob_margin, min_prob_memory, least_min_prob, most_min_prob, .. } =
            self.options;
        let mut state = self.lock();
        let last = trees.given().filter_map(|(probs, count)| probs.get(count.checked_sub(1)?));
        let least = last.copied().min_by(f32::total_cmp).map_or(state.min_prob, f64::from);
        let cut = trees.given().any(|(probs, count)| count < probs.len());
        let target = min_prob_margin * if cut { least } else { least.min(state.min_prob) };
        // down at once, up slowly: the next step's drafts may be poorer than this one's
        let rise = if target < state.min_prob { 1.0 } else { min_prob_memory };
        let moved = state.min_prob + rise * (target - state.min_prob);
        state.min_prob = moved.max(least_min_prob).min(most_min_prob);
    }

    /// Learns from a step. Values that no step has are ignored.
    pub fn observe(&self, step: &StepTimes) {
        let StepTimes { batch, size, context, seconds, prefill_tokens, tokens, draft_seconds } = *step;
        let absurd = seconds.is_some_and(|seconds| !(seconds.is_finite() && seconds > 0.0));
        if absurd || batch < 1 || tokens.is_nan() || tokens < batch as f64 {
            return;
        }
        let options = &self.options;
        let (mut state, mut news) = (self.lock(), false);
        let measured = seconds.filter(|_| prefill_tokens == 0);
        let apart = options.changes_apart * state.speedup.max(1.0);
        let watch = state.watch(batch, options);
        if let Some(seconds) = measured {
            let expected = self.curve.size_time(batch, size as f64, context);
            let strangest = options.strangest.max(1.0).ln();
            let log = (seconds.ln() - expected.ln()).clamp(-strangest, strangest);
            let relative = expected / self.curve.size_time(batch, 0.0, context);
            if watch.clock.tick(Time { size, relative, log }, options) {
                news = true;
            }
        }
        watch.note(size == 0, measured.is_some(), apart, options);
        if size > state.reach / 2 {
            (state.reach, news) = (size.saturating_mul(2), true);
        }
        if news {
            state.known.clear();
        }
        // the medians speak for the pass, not its own time: a busy machine is not the draft's fault
        let costs = self.known(&mut state, batch, context);
        let (plain, extra) = (costs.seconds()[0], costs.extra(size));
        let drafted = if draft_seconds > 0.0 { draft_seconds.min(plain) } else { 0.0 };
        let spent = plain + extra + drafted;
        let made = tokens / batch as f64;
        let speedup = (made * plain / spent).min(options.most_speedup);
        state.speedup += options.rate_memory * (speedup - state.speedup);
        if size > 0 {
            state.weigh_ranking(drafted / spent, options);
        }
        if size > 0 || drafted > 0.0 {
            // of a step without nodes only the drafting was in vain
            let lost = if size > 0 { spent - plain } else { drafted };
            state.settle(made - 1.0 - lost / plain, options);
        }
    }

    /// Corrected costs, for contexts within a few percent.
    fn known(&self, state: &mut State, batch: usize, context: f64) -> Arc<PassCosts> {
        let key = (batch, context_key(context));
        if let Some(known) = state.known.get(&key) {
            return Arc::clone(known);
        }
        if state.known.len() >= MOST_KEPT {
            state.known.clear();
        }
        let known = self.curve.costs(batch, context, self.max_nodes + 1);
        let (mut sizes, mut seconds, layout) =
            (known.sizes().to_vec(), known.seconds().to_vec(), known.layout());
        let fit = sizes.partition_point(|&size| size <= state.reach).max(2).min(sizes.len());
        sizes.truncate(fit);
        seconds.truncate(fit);
        if let Some(watch) = state.nearest(batch) {
            watch.clock.correct(&sizes, &mut seconds);
        }
        let costs = Arc::new(PassCosts::trusted(sizes, seconds, layout));
        state.known.insert(key, Arc::clone(&costs));
        costs
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn rate(&self, costs: &PassCosts, batch: usize) -> f64 {
        costs.plain_rate(batch) * self.speedup.max(1.0)
    }

    /// `share` of a step went into drafts.
    fn weigh_ranking(&mut self, share: f64, options: &RuleOptions) {
        let ranked = if self.ranks { share } else { share / (1.0 - RANKING_PART) };
        self.drafting += options.rate_memory * (ranked - self.drafting);
        self.ranks = self.drafting * RANKING_PART < RANKING_GAIN;
    }

    /// What is known of passes of about so many requests, or else of the nearest number.
    fn nearest(&self, batch: usize) -> Option<&Watch> {
        let place = place(batch);
        let told = |watch: &(&u32, &Watch)| watch.1.clock.is_told();
        let below = self.watches.range(..=place).rev().find(told);
        let above = self.watches.range(place..).find(told);
        let nearer = match (below, above) {
            (Some(below), Some(above)) if above.0 - place < place - below.0 => above,
            (below, above) => below.or(above)?,
        };
        Some(nearer.1)
    }

    /// What is known of passes of about so many requests, to learn from one of them.
    fn watch(&mut self, batch: usize, options: &RuleOptions) -> &mut Watch {
        self.last = place(batch);
        let slope = self.nearest(batch).map(|watch| watch.clock.slope());
        // where nothing is known of other numbers of requests, steps without drafts come first; else soon
        let (plain_due, since_plain) = match slope {
            None => (options.plain_at_once, 0),
            Some(_) => (0, options.plain_every.saturating_sub(options.plain_soon)),
        };
        self.watches.entry(self.last).or_insert_with(|| Watch {
            clock: Clock::new(slope.unwrap_or(0.0)),
            plain_due,
            since_plain,
            unmeasured: 0,
            since_change: f64::INFINITY,
        })
    }

    /// Puts on the account what a step has gained, and pauses drafting where it is overdrawn.
    fn settle(&mut self, gained: f64, options: &RuleOptions) {
        self.account = (self.account + gained).min(options.debt);
        if self.account == options.debt {
            self.pause = options.shortest_pause;
        } else if self.account < -options.debt {
            (self.paused, self.account) = (self.pause, 0.0);
            self.pause = (2 * self.pause).min(options.longest_pause);
        }
    }
}

impl Watch {
    /// Asks for steps without drafts where their time is not known, or no longer; changes of the machine's speed are
    /// `apart` steps from one another.
    fn note(&mut self, plain: bool, measured: bool, apart: f64, options: &RuleOptions) {
        self.since_plain += 1;
        self.since_change += 1.0;
        if plain {
            self.unmeasured = if measured { 0 } else { self.unmeasured + 1 };
            // where every step also reads prompts the curve has to do
            if measured || self.unmeasured >= options.unmeasured_plain.max(1) {
                self.plain_due = self.plain_due.saturating_sub(1);
                (self.since_plain, self.unmeasured) = (0, 0);
            }
        }
        if self.since_plain >= options.plain_every {
            self.plain_due = 1;
        }
        if self.since_change >= apart && self.clock.has_changed {
            // drafts and plain steps slow down together when others use the machine, so only times of the same
            // period can be compared
            self.clock.forget(options);
            (self.plain_due, self.since_change) = (options.plain_at_once, 0.0);
        }
    }
}

/// Numbers of requests whose passes are taken to be alike: those of one bit length and next bit.
fn place(batch: usize) -> u32 {
    let bits = usize::BITS - batch.leading_zeros();
    2 * bits + u32::from(bits > 1 && batch >> (bits - 2) & 1 == 1)
}

impl Prices<'_> {
    /// Learns from what was given to a request of the nodes that were drafted for it.
    pub fn judge(&self, pace: &mut Pace, probs: &[f32], given: usize) {
        let options = &self.rule.options;
        let DraftCost { request, node, threads, .. } = *self.rule.curve.draft();
        let threads = threads.min(self.requests) as f64;
        if given == probs.len() && given == pace.limit {
            pace.limit = (2 * pace.limit).min(self.rule.max_nodes);
        } else {
            let fallen = (pace.limit as f64 * options.limit_fall) as usize;
            // what takes no time need not be spared: of no cost as many as there are
            let cheap = options.cheap_share * self.plain * threads / (node * self.requests as f64);
            pace.limit = (given + given / 4 + options.spare_nodes).max(fallen).max(cheap as usize);
            pace.limit = pace.limit.min(self.rule.max_nodes);
        }
        let expected: f64 = probs[..given].iter().map(|&prob| f64::from(prob)).sum();
        let gain = expected - self.rate * self.extra * given as f64;
        let spent = (request + node * probs.len() as f64) / threads;
        pace.worth += options.worth_memory * (gain - self.rate * spent - pace.worth);
        if pace.worth >= 0.0 {
            pace.pause = 1;
        } else {
            pace.wait = pace.pause;
            pace.pause = (2 * pace.pause).min(options.longest_wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is remembered of a request for which so often a node, of this probability, was drafted in so many seconds
    /// and so many for the node, where passes cost nothing more for it and a second is worth a token.
    fn judged(times: usize, prob: f32, request: f64, node: f64) -> Pace {
        let draft = DraftCost { step: 0.0, request, node, threads: 1 };
        let axes = [vec![1.0], vec![1.0, 9.0], vec![0.0]];
        let curve = CostCurve::new(axes, vec![1.0, 1.0], Layout::Packed, Vec::new(), draft).unwrap();
        let rule = SizingRule::new(Arc::new(curve), None, RuleOptions::default());
        let mut trees = Allocation::default();
        trees.push(&[prob]);
        let mut pace = rule.pace();
        for _ in 0..times {
            let prices = rule.allocate(0.0, &mut trees);
            assert_eq!(trees.counts(), [1]);
            prices.judge(&mut pace, &[prob], 1);
        }
        pace
    }

    #[test]
    fn drafts_have_to_be_worth_their_own_time() {
        assert_eq!((judged(100, 0.4, 0.3, 0.0).wait, judged(100, 0.4, 0.3, 0.0).pause), (0, 1));
        assert_eq!((judged(100, 0.4, 0.5, 0.0).wait, judged(100, 0.4, 0.5, 0.0).pause), (8, 8));
    }

    #[test]
    fn one_draft_in_vain_is_no_reason_to_wait() {
        assert_eq!(judged(1, 0.4, 0.5, 0.0).wait, 0);
    }

    #[test]
    fn numbers_of_requests_that_are_alike_are_next_to_each_other() {
        let places: Vec<_> = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16].map(place).to_vec();
        assert_eq!(places, [2, 4, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10]);
    }

    #[test]
    fn a_number_of_requests_that_is_new_takes_over_what_nodes_cost_elsewhere() {
        let axes = [vec![1.0], vec![1.0, 99.0], vec![0.0]];
        let draft = DraftCost { step: 0.0, request: 0.0, node: 0.0, threads: 1 };
        let curve = CostCurve::new(axes, vec![1.0, 1.0], Layout::Packed, Vec::new(), draft).unwrap();
        let rule = SizingRule::new(Arc::new(curve), Some(8), RuleOptions::default());
        let step = |batch: usize, size: usize| {
            let seconds = Some((1.0 + 0.1 * batch as f64) * (1.0 + 0.05 * size as f64));
            let (tokens, context) = (2.0 * batch as f64, 0.0);
            let (prefill_tokens, draft_seconds) = (0, 0.0);
            StepTimes { batch, size, context, seconds, prefill_tokens, tokens, draft_seconds }
        };
        (0..60).for_each(|count| rule.observe(&step(8, count % 20)));
        rule.observe(&step(3, 4));
        assert!(rule.begin_step().is_some());
        let (costs, _) = rule.costs(3, 0.0);
        let over = costs.seconds()[8] / costs.seconds()[0];
        assert!((1.3..1.5).contains(&over), "{over}");
        // a step without drafts is asked for soon
        let soon = (0..40).find(|_| {
            rule.observe(&step(3, 4));
            rule.begin_step().is_none()
        });
        assert_eq!(soon, Some(RuleOptions::default().plain_soon - 2));
    }

    #[test]
    fn times_of_few_requests_say_nothing_of_those_of_many() {
        let axes = [vec![1.0], vec![1.0, 99.0], vec![0.0]];
        let draft = DraftCost { step: 0.0, request: 0.0, node: 0.0, threads: 1 };
        let curve = CostCurve::new(axes, vec![1.0, 1.0], Layout::Packed, Vec::new(), draft).unwrap();
        let rule = SizingRule::new(Arc::new(curve), Some(8), RuleOptions::default());
        for step in 0..400 {
            let (batch, size) = if step / 10 % 2 == 0 { (1, step % 8) } else { (8, 3 * (step % 8)) };
            // as on a CPU: rows cost as much as nodes
            let seconds = Some(0.9 + 0.1 * (batch + size) as f64);
            let (tokens, context) = (2.0 * batch as f64, 0.0);
            rule.observe(&StepTimes {
                batch,
                size,
                context,
                seconds,
                prefill_tokens: 0,
                tokens,
                draft_seconds: 0.0,
            });
        }
        for batch in [1, 8] {
            let (costs, _) = rule.costs(batch, 0.0);
            for (size, seconds) in costs.sizes().iter().zip(costs.seconds()).take(8 * batch) {
                let expected = 0.9 + 0.1 * (batch + size) as f64;
                assert!((seconds / expected - 1.0).abs() < 0.05, "{batch} {size} {seconds} {expected}");
            }
        }
    }

    #[test]
    fn passes_that_read_prompts_tell_no_times_and_hold_nobody_up() {
        let axes = [vec![1.0], vec![1.0, 9.0], vec![0.0]];
        let draft = DraftCost { step: 0.0, request: 0.0, node: 0.0, threads: 1 };
        let curve = CostCurve::new(axes, vec![1.0, 2.0], Layout::Packed, Vec::new(), draft).unwrap();
        let rule = SizingRule::new(Arc::new(curve), None, RuleOptions::default());
        let step = |seconds, prefill_tokens| StepTimes {
            batch: 1,
            size: 0,
            context: 0.0,
            seconds,
            prefill_tokens,
            tokens: 1.0,
            draft_seconds: 0.0,
        };
        let (before, mut waited) = (rule.costs(1, 0.0), 0);
        while rule.begin_step().is_none() {
            rule.observe(&if waited % 2 == 0 { step(Some(50.0), 4096) } else { step(None, 0) });
            waited += 1;
        }
        assert_eq!(waited, RuleOptions::default().plain_at_once * RuleOptions::default().unmeasured_plain);
        assert_eq!(rule.costs(1, 0.0), before);
        (0..9).for_each(|_| rule.observe(&step(Some(50.0), 0)));
        assert!(rule.costs(1, 0.0).0.seconds()[0] > 40.0);
    }

    #[test]
    fn candidates_are_ranked_where_drafts_are_cheap() {
        let axes = [vec![1.0], vec![1.0, 9.0], vec![0.0]];
        let draft = DraftCost { step: 0.0, request: 0.0, node: 0.0, threads: 1 };
        let curve = CostCurve::new(axes, vec![1.0, 1.0], Layout::Packed, Vec::new(), draft).unwrap();
        let rule = SizingRule::new(Arc::new(curve), None, RuleOptions::default());
        let after = |draft_seconds| {
            for _ in 0..2000 {
                let (seconds, prefill_tokens) = (Some(1.0), 0);
                let (size, tokens, context) = (4, 2.0, 0.0);
                rule.observe(&StepTimes {
                    batch: 1,
                    size,
                    context,
                    seconds,
                    prefill_tokens,
                    tokens,
                    draft_seconds,
                });
            }
            rule.ranks()
        };
        assert!(after(0.05));
        assert!(!after(0.1));
        // what it takes without ranking says that it would take too much with it
        assert!(!after(0.07));
        assert!(after(0.02));
    }

    #[test]
    fn what_was_not_verified_need_not_be_drafted_again_where_drafting_takes_time() {
        // no less than three quarters of before, however little was verified
        assert_eq!(judged(1, 0.4, 0.3, 0.01).limit, 48);
        assert_eq!(judged(99, 0.4, 0.3, 0.01).limit, 7);
        // as many as take a five-hundredth of a pass
        assert_eq!(judged(99, 0.4, 0.3, 0.0001).limit, 20);
        assert_eq!(judged(99, 0.4, 0.3, 0.0).limit, 256);
    }
}
