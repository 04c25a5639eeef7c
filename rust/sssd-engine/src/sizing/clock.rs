//! How much longer passes take than the curve says, by what they hold.
//!
//! Of each size the median of its newest times counts, so that a hiccup does not. Through these medians goes a line:
//! so much of what the curve says, and so much for each node. Times of all sizes tell it, and it says what sizes take
//! that were never measured; what a size takes beyond it is believed as its own times grow in number.

use std::collections::VecDeque;

use super::options::RuleOptions;

/// Sizes are told apart by their bit length.
const BUCKETS: usize = usize::BITS as usize + 1;

/// Nodes whose cost is less than that, over a pass without drafts, cost nothing.
const LEAST_SLOPE: f64 = 0.005;

/// A time that was measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Time {
    /// Nodes: of each row, or of the pass where rows are packed.
    pub size: usize,
    /// What the curve says of this size, over what it says of a pass without drafts.
    pub relative: f64,
    /// Log of what was measured over what the curve says.
    pub log: f64,
}

/// Corrections of the curve, learned from times.
pub(super) struct Clock {
    /// By the bit length of the size.
    times: Vec<Times>,
    line: Line,
    /// What a node costs beyond what the curve says, over a pass without drafts, by times that are forgotten.
    prior_slope: f64,
    newest: VecDeque<(Time, f64)>,
    ticks: usize,
    /// Whether times of any sizes have differed from those before, several in turn and all alike.
    pub has_changed: bool,
}

/// The newest times of sizes of one bit length, the newest last.
#[derive(Clone, Debug, Default)]
struct Times {
    held: VecDeque<Time>,
    /// Their median log, and what they hold in the mean.
    log: f64,
    size: f64,
    relative: f64,
    /// Log of what they take beyond the line.
    beyond: f64,
}

/// What passes take, over what the curve says of one without drafts: `share * relative + slope * size`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    share: f64,
    slope: f64,
}

impl Line {
    /// No pass takes less than one without drafts.
    fn at(self, size: f64, relative: f64) -> f64 {
        (self.share * relative + self.slope * size).max(self.share)
    }
}

impl Clock {
    /// `prior_slope` is what a node may be taken to cost, over a pass without drafts, beyond what the curve says.
    pub fn new(prior_slope: f64) -> Self {
        Self {
            times: Vec::new(),
            line: Line { share: 1.0, slope: prior_slope },
            prior_slope,
            newest: VecDeque::new(),
            ticks: 0,
            has_changed: false,
        }
    }

    /// Whether there was a time.
    pub fn is_told(&self) -> bool {
        self.ticks > 0
    }

    /// What a node costs beyond what the curve says, over a pass without drafts.
    pub fn slope(&self) -> f64 {
        self.line.slope / self.line.share
    }

    /// Takes a time in; returns whether corrections have changed.
    pub fn tick(&mut self, time: Time, options: &RuleOptions) -> bool {
        let bucket = bucket(time.size);
        if self.times.len() <= bucket {
            self.times.resize(bucket + 1, Times::default());
        }
        let times = &mut self.times[bucket];
        if times.held.len() >= options.settled.max(1) {
            push(&mut self.newest, options.recent, (time, time.log - times.log));
            if self.newest.len() == options.recent.max(1) {
                let surprise = median_low(self.newest.iter().map(|&(_, surprise)| surprise));
                self.has_changed |= surprise.abs() > options.change;
            }
        }
        push(&mut times.held, options.window, time);
        times.settle();
        self.ticks += 1;
        if self.ticks.is_multiple_of(options.forget_every.max(1)) {
            // what once was slow gets another chance, little by little
            self.prior_slope = options.slope_memory * self.slope();
            self.times.iter_mut().for_each(|times| {
                times.held.pop_front();
                times.settle();
            });
        }
        self.fit(options)
    }

    /// Forgets all times but the newest, and remembers what nodes cost.
    pub fn forget(&mut self, options: &RuleOptions) {
        self.prior_slope = self.slope();
        self.times.iter_mut().for_each(|times| times.held.clear());
        for (time, _) in self.newest.drain(..) {
            push(&mut self.times[bucket(time.size)].held, options.window, time);
        }
        self.times.iter_mut().for_each(Times::settle);
        self.has_changed = false;
    }

    /// The line through the medians, least squares of relative errors, and what is beyond it. Whether anything has
    /// changed that matters.
    fn fit(&mut self, options: &RuleOptions) -> bool {
        let held = || self.times.iter().filter(|times| !times.held.is_empty());
        let Some(first) = held().next() else { return false };
        let drafted: usize = self.times.iter().skip(1).map(|times| times.held.len()).sum();
        let prior = Line { share: 1.0, slope: self.prior_slope };
        // what each size says of a pass without drafts
        let without =
            |times: &Times| times.log - (prior.at(times.size, times.relative) / times.relative).ln();
        let plain = if first.size == 0.0 { first.log } else { median_low(held().map(without)) };
        // sums over weight * (relative, size) x (relative, size, value)
        let [mut rr, mut rs, mut ss, mut rv, mut sv, mut count, mut known] = [0.0; 7];
        for times in held() {
            let furthest = options.furthest_of(drafted);
            let before = plain.exp() * prior.at(times.size, times.relative);
            let moved = times.log + times.relative.ln() - before.ln();
            let value = before * moved.clamp(-furthest, furthest).exp();
            let weight = times.held.len() as f64 / (value * value);
            rr += weight * times.relative * times.relative;
            rs += weight * times.relative * times.size;
            ss += weight * times.size * times.size;
            rv += weight * times.relative * value;
            sv += weight * times.size * value;
            count += times.held.len() as f64;
            known += times.held.len() as f64 * (times.size / value.max(before)).powi(2);
        }
        // what nodes cost before counts for less and less: as one time of the mean size where there are `trust` squared
        let (weight, slope) = (options.trust * options.trust * known / (count * count), prior.slope);
        let (rr, rs, ss) = (rr + weight * slope * slope, rs - weight * slope, ss + weight);
        let determinant = rr * ss - rs * rs;
        let mut line = Line { share: rv / rr, slope: slope * rv / rr };
        if determinant > 1e-9 * rr * ss {
            let share = (rv * ss - sv * rs) / determinant;
            if share > 0.0 {
                line = Line { share, slope: (sv * rr - rv * rs) / determinant };
            }
        }
        let mut news = (line.share.ln() - self.line.share.ln()).abs() >= options.news
            || (line.slope - self.line.slope).abs() >= options.news * self.line.slope.abs().max(LEAST_SLOPE);
        let mut beyond = vec![0.0; self.times.len()];
        for (beyond, times) in beyond.iter_mut().zip(&self.times).filter(|(_, times)| !times.held.is_empty())
        {
            let (count, furthest) = (times.held.len() as f64, options.furthest_of(times.held.len()));
            let above = times.log + times.relative.ln() - line.at(times.size, times.relative).ln();
            *beyond = above.clamp(-furthest, furthest) * count / (count + options.trust);
            news |= (*beyond - times.beyond).abs() >= options.news;
        }
        if news {
            self.line = line;
            self.times.iter_mut().zip(beyond).for_each(|(times, beyond)| times.beyond = beyond);
        }
        news
    }

    /// The corrected seconds of passes of these sizes, the first without drafts, which rise: not falling with the size.
    pub fn correct(&self, sizes: &[usize], seconds: &mut [f64]) {
        let Some(&plain) = seconds.first() else { return };
        for (time, &size) in seconds.iter_mut().zip(sizes) {
            let beyond = self.times.get(bucket(size)).map_or(0.0, |times| times.beyond);
            *time = plain * self.line.at(size as f64, *time / plain) * beyond.exp();
        }
        // half-way between the least monotone times above and the greatest below
        let mut above = seconds.to_vec();
        for index in 1..above.len() {
            above[index] = above[index].max(above[index - 1]);
        }
        let mut below = f64::INFINITY;
        for (time, above) in seconds.iter_mut().zip(above).rev() {
            below = below.min(*time);
            *time = (above + below) / 2.0;
        }
    }
}

impl Times {
    /// Looks at all that are held.
    fn settle(&mut self) {
        let count = self.held.len().max(1) as f64;
        self.size = self.held.iter().map(|time| time.size as f64).sum::<f64>() / count;
        self.relative = self.held.iter().map(|time| time.relative).sum::<f64>() / count;
        self.log = if self.held.is_empty() { 0.0 } else { median_low(self.held.iter().map(|time| time.log)) };
        if self.held.is_empty() {
            self.beyond = 0.0;
        }
    }
}

fn bucket(size: usize) -> usize {
    ((usize::BITS - size.leading_zeros()) as usize).min(BUCKETS - 1)
}

fn push<T>(values: &mut VecDeque<T>, most: usize, value: T) {
    while values.len() >= most.max(1) {
        values.pop_front();
    }
    values.push_back(value);
}

/// The median, of two the lower; there is one.
fn median_low(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    let middle = (sorted.len() - 1) / 2;
    *sorted.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that was told so many times of each size, of a curve on which a node costs `steep`.
    fn told(count: usize, sizes: &[usize], steep: f64, seconds: impl Fn(usize) -> f64) -> Clock {
        let mut clock = Clock::new(0.0);
        for size in sizes.iter().flat_map(|&size| std::iter::repeat_n(size, count)) {
            let relative = 1.0 + steep * size as f64;
            let log = (seconds(size) / relative).ln();
            clock.tick(Time { size, relative, log }, &RuleOptions::default());
        }
        clock
    }

    fn corrected(clock: &Clock, sizes: &[usize], steep: f64) -> Vec<f64> {
        let mut seconds: Vec<_> = sizes.iter().map(|&size| 1.0 + steep * size as f64).collect();
        clock.correct(sizes, &mut seconds);
        seconds
    }

    fn near(found: &[f64], expected: &[f64], within: f64) {
        assert!(
            found.iter().zip(expected).all(|(found, expected)| (found / expected - 1.0).abs() < within),
            "{found:?} {expected:?}"
        );
    }

    #[test]
    fn sizes_that_were_never_measured_lie_on_the_line() {
        for steep in [0.0, 0.02, 0.3] {
            let line = |size: usize| 2.0 * (1.0 + 0.03 * size as f64);
            let clock = told(30, &[0, 2, 8], steep, line);
            let sizes = [0, 1, 3, 5, 16, 64];
            near(&corrected(&clock, &sizes, steep), &sizes.map(line), 0.05);
        }
    }

    #[test]
    fn a_curve_that_is_far_too_steep_is_soon_forgotten() {
        let truth = |size: usize| if size == 0 { 1.0 } else { 1.1 };
        let clock = told(20, &[0, 8], 0.75, truth);
        near(&corrected(&clock, &[0, 8], 0.75), &[1.0, 1.1], 0.03);
        let mut clock = told(2, &[0], 0.75, truth);
        for _ in 0..20 {
            clock.tick(Time { size: 8, relative: 7.0, log: (1.1_f64 / 7.0).ln() }, &RuleOptions::default());
        }
        near(&corrected(&clock, &[0, 8], 0.75), &[1.0, 1.1], 0.2);
    }

    #[test]
    fn what_a_size_takes_beyond_the_line_is_believed_with_time() {
        let stairs = |size: usize| if size == 0 { 1.0 } else { 1.3 };
        let sizes = [0, 1, 2, 4, 8, 16];
        let found = corrected(&told(30, &sizes, 0.0, stairs), &sizes, 0.0);
        near(&found, &sizes.map(stairs), 0.03);
        let soon = corrected(&told(1, &sizes, 0.0, stairs), &sizes, 0.0);
        assert!(soon[0] > found[0] && soon[1] < found[1], "{soon:?} {found:?}");
    }

    #[test]
    fn one_hiccup_moves_little() {
        let clock = told(1, &[0, 8], 0.0, |size| if size == 0 { 1.0 } else { 20.0 });
        assert!(corrected(&clock, &[0, 8], 0.0)[1] <= 0.25_f64.exp());
    }

    #[test]
    fn corrected_times_never_fall() {
        let clock = told(3, &[0, 8], 0.0, |size| if size == 0 { 1.0 } else { 0.13 });
        let seconds = corrected(&clock, &[0, 1, 4, 8, 100], 0.1);
        assert!(seconds.windows(2).all(|pair| pair[0] <= pair[1]), "{seconds:?}");
    }

    #[test]
    fn a_change_of_speed_is_noticed_and_what_was_before_it_forgotten_but_for_what_nodes_cost() {
        let options = RuleOptions::default();
        let mut clock = told(30, &[0, 8], 0.0, |size| 1.0 + 0.05 * size as f64);
        assert!(!clock.has_changed);
        let slower = Time { size: 0, relative: 1.0, log: 2.0_f64.ln() };
        (0..options.recent).for_each(|_| _ = clock.tick(slower, &options));
        assert!(clock.has_changed);
        clock.forget(&options);
        clock.tick(slower, &options);
        near(&corrected(&clock, &[0, 8], 0.0), &[2.0, 2.8], 0.03);
    }

    #[test]
    fn old_times_are_forgotten_and_what_nodes_cost_little_by_little() {
        let options = RuleOptions::default();
        let mut clock = told(30, &[0, 8], 0.0, |size| 1.0 + 0.1 * size as f64);
        let (plain, before) = (Time { size: 0, relative: 1.0, log: 0.0 }, clock.slope());
        let mut forgotten = 0;
        while !clock.times[4].held.is_empty() {
            clock.tick(plain, &options);
            forgotten += 1;
        }
        assert!((29 * options.forget_every..31 * options.forget_every).contains(&forgotten), "{forgotten}");
        let after = clock.slope();
        assert!(0.8 * before < after && after < 0.95 * before, "{before} {after}");
        (0..99 * options.forget_every).for_each(|_| _ = clock.tick(plain, &options));
        assert!(clock.slope() < 0.01 * before);
    }
}
