//! How much longer passes take than the curve says, by width.

use std::collections::VecDeque;

use super::options::RuleOptions;

/// Widths are told apart by their bit length.
const BUCKETS: usize = usize::BITS as usize + 1;

/// Corrections of the curve, learned from times.
pub(super) struct Clock {
    /// Logs of measured times over the curve's, the newest last, by the bit length of the width.
    logs: Vec<VecDeque<f64>>,
    /// Log corrections of widths 0, 1, 2 to 3, 4 to 7, ...
    corrections: Vec<f64>,
    newest: VecDeque<Measured>,
    ticks: usize,
    /// Whether times of any widths have differed from those before, several in turn and all alike.
    pub has_changed: bool,
}

struct Measured {
    bucket: usize,
    log: f64,
    /// What of it was not expected.
    surprise: f64,
}

impl Clock {
    pub fn new() -> Self {
        Self {
            logs: vec![VecDeque::new(); BUCKETS],
            corrections: vec![0.0],
            newest: VecDeque::new(),
            ticks: 0,
            has_changed: false,
        }
    }

    /// Takes a measurement in; returns whether corrections have changed.
    pub fn tick(&mut self, width: usize, log: f64, options: &RuleOptions) -> bool {
        let bucket = bucket(width);
        if self.logs[bucket].len() >= options.settled.max(1) {
            let surprise = log - median_low(self.logs[bucket].iter().copied());
            push(&mut self.newest, options.recent, Measured { bucket, log, surprise });
            if self.newest.len() == options.recent.max(1) {
                let surprise = median_low(self.newest.iter().map(|newest| newest.surprise));
                self.has_changed |= surprise.abs() > options.change;
            }
        }
        push(&mut self.logs[bucket], options.window, log);
        self.ticks += 1;
        if self.ticks.is_multiple_of(options.forget_every.max(1)) {
            // a width that once was slow gets another chance
            self.logs.iter_mut().for_each(|logs| _ = logs.pop_front());
        }
        let corrections = self.measured(options);
        let same = corrections.len() == self.corrections.len()
            && corrections.iter().zip(&self.corrections).all(|(new, old)| (new - old).abs() < options.news);
        if !same {
            self.corrections = corrections;
        }
        !same
    }

    /// Forgets all times but the newest.
    pub fn forget(&mut self, options: &RuleOptions) {
        self.logs.iter_mut().for_each(VecDeque::clear);
        for Measured { bucket, log, .. } in self.newest.drain(..) {
            push(&mut self.logs[bucket], options.window, log);
        }
        self.has_changed = false;
    }

    /// Medians, drawn towards the plain step's, and linear between the widths that were measured.
    fn measured(&self, options: &RuleOptions) -> Vec<f64> {
        let medians: Vec<(usize, usize, f64)> = (self.logs.iter().enumerate())
            .filter(|(_, logs)| !logs.is_empty())
            .map(|(bucket, logs)| (bucket, logs.len(), median_low(logs.iter().copied())))
            .collect();
        if medians.is_empty() {
            return self.corrections.clone();
        }
        let plain = match medians[0] {
            (0, _, median) => median,
            _ => median_low(medians.iter().map(|&(_, _, median)| median)),
        };
        let mut corrections = vec![plain];
        for (bucket, count, log) in medians.into_iter().filter(|&(bucket, ..)| bucket > 0) {
            let count = count as f64;
            let furthest = (options.first_move * count * count).min(options.furthest.ln());
            let moved = (count * (log - plain) / (count + options.trust)).clamp(-furthest, furthest);
            let (start, from) = (corrections.len(), corrections[corrections.len() - 1]);
            let steps = (bucket + 1 - start) as f64;
            let slope = (plain + moved - from) / steps;
            corrections.extend((1..=bucket + 1 - start).map(|step| from + slope * step as f64));
        }
        corrections
    }

    /// The corrected seconds of passes of these widths, which rise: not falling with the width.
    pub fn correct(&self, widths: impl Iterator<Item = usize>, seconds: &mut [f64]) {
        let last = self.corrections.len() - 1;
        for (time, width) in seconds.iter_mut().zip(widths) {
            *time *= self.corrections[bucket(width).min(last)].exp();
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

fn bucket(width: usize) -> usize {
    (usize::BITS - width.leading_zeros()) as usize
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
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticked(times: &[(usize, f64)]) -> Clock {
        let mut clock = Clock::new();
        times.iter().for_each(|&(width, log)| _ = clock.tick(width, log, &RuleOptions::default()));
        clock
    }

    #[test]
    fn corrections_are_medians_drawn_towards_the_plain_step() {
        let clock = ticked(&[(0, 0.1), (0, 0.1), (0, 5.0), (4, 1.1), (4, 1.1)]);
        // two times count half; widths in between lie on the line
        for (found, expected) in clock.corrections.iter().zip([0.1, 0.1 + 0.5 / 3.0, 0.1 + 1.0 / 3.0, 0.6]) {
            assert!((found - expected).abs() < 1e-12, "{:?}", clock.corrections);
        }
    }

    #[test]
    fn one_hiccup_moves_little() {
        let clock = ticked(&[(0, 0.0), (8, 3.0)]);
        assert_eq!(clock.corrections[4], 0.25);
    }

    #[test]
    fn corrected_times_never_fall() {
        let clock = ticked(&[(0, 0.0), (8, -2.0), (8, -2.0), (8, -2.0)]);
        let mut seconds = [1.0, 1.1, 1.2, 1.3];
        clock.correct([0, 1, 4, 8].into_iter(), &mut seconds);
        assert!(seconds.windows(2).all(|pair| pair[0] <= pair[1]), "{seconds:?}");
        assert!(seconds[0] < 1.0);
    }

    #[test]
    fn a_change_of_speed_is_noticed_and_what_was_before_it_forgotten() {
        let mut clock = ticked(&[(0, 0.0); 9]);
        assert!(!clock.has_changed);
        (0..5).for_each(|_| _ = clock.tick(0, 0.7, &RuleOptions::default()));
        assert!(clock.has_changed);
        clock.forget(&RuleOptions::default());
        clock.tick(0, 0.7, &RuleOptions::default());
        assert_eq!(clock.corrections, [0.7]);
    }

    #[test]
    fn old_times_are_forgotten() {
        let mut clock = ticked(&[(8, 1.0)]);
        (0..256).for_each(|_| _ = clock.tick(0, 0.0, &RuleOptions::default()));
        assert!(clock.logs[4].is_empty());
    }
}
