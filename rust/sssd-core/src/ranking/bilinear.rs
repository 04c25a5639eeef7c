//! What a corpus has learned of which token follows which others, further back than its samples look: a log-bilinear
//! model (Mnih and Hinton, "Three new graphical models for statistical language modelling", 2007) whose context adds a
//! mean of the text before it. It is learned as a correction to the successors of the last token, so that nothing is
//! summed over the vocabulary.

use crate::Token;

/// Numbers of a row.
pub const DIMENSIONS: usize = 128;
/// Tokens before the predicted one that have a weight of their own.
pub const CONTEXT: usize = 8;
/// The last tokens whose mean is the topic.
pub const TOPIC: usize = 100;
/// The topic is taken anew where the text's length is a multiple of this.
const TOPIC_STEP: usize = 16;

/// A row of a table: signed bytes, and what they are to be multiplied by.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    /// As two's complement.
    pub values: &'a [u8; DIMENSIONS],
    /// What one is worth.
    pub scale: f32,
}

/// Numbers side by side for the compiler to add at once: the order of sums is the same on every processor.
const LANES: usize = 32;

impl Row<'_> {
    /// Reads it, so that the processor has it before it is needed.
    #[inline(always)]
    fn touch(self) -> u8 {
        self.values[0] ^ self.values[DIMENSIONS / 2]
    }

    #[inline(always)]
    fn add_to(self, out: &mut [f32; DIMENSIONS], weights: &[f32; DIMENSIONS]) {
        for ((out, &value), weight) in out.iter_mut().zip(self.values).zip(weights) {
            *out += f32::from(value.cast_signed()) * (weight * self.scale);
        }
    }

    #[inline(always)]
    fn dot(self, vector: &[f32; DIMENSIONS]) -> f32 {
        let mut sums = [0.0f32; LANES];
        for (values, vector) in self.values.as_chunks::<LANES>().0.iter().zip(vector.as_chunks::<LANES>().0) {
            for lane in 0..LANES {
                sums[lane] += f32::from(values[lane].cast_signed()) * vector[lane];
            }
        }
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                sums[lane] += sums[lane + width];
            }
            width /= 2;
        }
        sums[0] * self.scale
    }
}

/// The tables of a corpus. What is not in memory, or not in the vocabulary, is left out.
pub trait LogBilinear: Send + Sync {
    /// Tells tables apart.
    fn id(&self) -> u64;

    /// The weights of the tokens before the predicted one, the last token's first, and those of the topic. All finite.
    fn weights(&self) -> &[[f32; DIMENSIONS]; CONTEXT + 1];

    /// What `token` says of what follows it.
    fn input(&self, token: Token) -> Option<Row<'_>>;

    /// What `token` says of the text that it stands in.
    fn topic(&self, token: Token) -> Option<Row<'_>>;

    /// What speaks for `token` to follow.
    fn output(&self, token: Token) -> Option<Row<'_>>;

    /// What is added to the score of `token`, and the logarithm of its share of the text.
    fn bias(&self, token: Token) -> (f32, f32);
}

/// The mean of the topic rows of a text's last tokens.
#[derive(Clone)]
pub struct Topic {
    /// The tables, and the length of the text; nothing if it is not known.
    of: Option<(u64, usize)>,
    mean: [f32; DIMENSIONS],
}

impl Default for Topic {
    fn default() -> Self {
        Self { of: None, mean: [0.0; DIMENSIONS] }
    }
}

impl Topic {
    /// Makes it that of `text`: as it was at the last multiple of the step, which any way to the text leads by.
    #[inline(always)]
    pub fn follow(&mut self, tables: &dyn LogBilinear, text: &[Token]) {
        let end = text.len() - text.len() % TOPIC_STEP;
        let of = Some((tables.id(), end));
        if self.of == of {
            return;
        }
        self.of = of;
        self.mean = [0.0; DIMENSIONS];
        let last = &text[end.saturating_sub(TOPIC)..end];
        let rows = || last.iter().filter_map(|&token| tables.topic(token));
        std::hint::black_box(rows().fold(0, |seen, row| seen ^ row.touch()));
        let share = [1.0 / last.len().max(1) as f32; DIMENSIONS];
        rows().for_each(|row| row.add_to(&mut self.mean, &share));
    }

    /// The text is another one now.
    pub fn forget(&mut self) {
        self.of = None;
    }
}

/// The vector of a context, the last token first.
#[inline(always)]
pub fn context(
    tables: &dyn LogBilinear,
    last: impl Iterator<Item = Token>,
    topic: &Topic,
) -> [f32; DIMENSIONS] {
    let weights = tables.weights();
    let mut out = [0.0; DIMENSIONS];
    for (out, (weight, mean)) in out.iter_mut().zip(weights[CONTEXT].iter().zip(&topic.mean)) {
        *out = weight * mean;
    }
    for (token, weights) in last.zip(&weights[..CONTEXT]) {
        if let Some(row) = tables.input(token) {
            row.add_to(&mut out, weights);
        }
    }
    out
}

/// How much more probable `token` is in this context than after its last token alone, as a logarithm, but for what is
/// the same for all tokens.
#[inline(always)]
pub fn score(tables: &dyn LogBilinear, context: &[f32; DIMENSIONS], token: Token) -> f32 {
    tables.output(token).map_or(0.0, |row| row.dot(context) + tables.bias(token).0)
}

/// Reads the rows that scores will need.
#[inline(always)]
pub fn touch(tables: &dyn LogBilinear, tokens: impl Iterator<Item = Token>) {
    let rows = tokens.filter_map(|token| tables.output(token));
    std::hint::black_box(rows.fold(0, |seen, row| seen ^ row.touch()));
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Tables of numbers that look random.
    pub struct Noise {
        rows: Vec<[u8; DIMENSIONS]>,
        weights: [[f32; DIMENSIONS]; CONTEXT + 1],
    }

    impl Noise {
        /// For tokens below `vocab_size`.
        pub fn new(vocab_size: usize) -> Self {
            let mut state = 1u32;
            let mut number = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            };
            let rows = (0..3 * vocab_size).map(|_| std::array::from_fn(|_| number())).collect();
            let mut weights = [[0.0; DIMENSIONS]; CONTEXT + 1];
            weights.as_flattened_mut().iter_mut().for_each(|weight| *weight = f32::from(number()) / 256.0);
            Self { rows, weights }
        }

        fn row(&self, table: usize, token: Token) -> Option<Row<'_>> {
            let values = self.rows.get(3 * token as usize + table)?;
            Some(Row { values, scale: 0.002 * (1 + token % 3) as f32 })
        }

        fn numbers(&self, table: usize, token: Token) -> Vec<f64> {
            self.row(table, token).map_or(vec![0.0; DIMENSIONS], |row| {
                row.values
                    .iter()
                    .map(|&value| f64::from(value.cast_signed()) * f64::from(row.scale))
                    .collect()
            })
        }
    }

    impl LogBilinear for Noise {
        fn id(&self) -> u64 {
            self.rows.len() as u64
        }

        fn weights(&self) -> &[[f32; DIMENSIONS]; CONTEXT + 1] {
            &self.weights
        }

        fn input(&self, token: Token) -> Option<Row<'_>> {
            self.row(0, token)
        }

        fn topic(&self, token: Token) -> Option<Row<'_>> {
            self.row(1, token)
        }

        fn output(&self, token: Token) -> Option<Row<'_>> {
            self.row(2, token)
        }

        fn bias(&self, token: Token) -> (f32, f32) {
            (0.1 * token as f32, -1.0 - token as f32)
        }
    }

    /// The score as its definition says, in double precision.
    fn slowly(tables: &Noise, text: &[Token], token: Token) -> f64 {
        let end = text.len() - text.len() % TOPIC_STEP;
        let last = &text[end.saturating_sub(TOPIC)..end];
        let mut context = [0.0; DIMENSIONS];
        for &token in last {
            for (at, number) in tables.numbers(1, token).iter().enumerate() {
                context[at] += number / last.len() as f64 * f64::from(tables.weights[CONTEXT][at]);
            }
        }
        for (position, &token) in text.iter().rev().take(CONTEXT).enumerate() {
            for (at, number) in tables.numbers(0, token).iter().enumerate() {
                context[at] += number * f64::from(tables.weights[position][at]);
            }
        }
        let output = tables.numbers(2, token);
        let bias = if output.iter().any(|&number| number != 0.0) { 0.1 * f64::from(token) } else { 0.0 };
        context.iter().zip(&output).map(|(context, number)| context * number).sum::<f64>() + bias
    }

    #[test]
    fn scores_are_those_of_their_definition() {
        let tables = Noise::new(20);
        let text: Vec<Token> = (0..300).map(|at| at * at % 23).collect(); // three of them without rows
        for end in [0, 1, 5, 16, 37, 100, 115, 116, 290] {
            let mut topic = Topic::default();
            topic.follow(&tables, &text[..end]);
            let context = context(&tables, text[..end].iter().rev().copied(), &topic);
            for token in 0..25 {
                let (fast, slow) = (score(&tables, &context, token), slowly(&tables, &text[..end], token));
                assert!((f64::from(fast) - slow).abs() < 1e-3, "{end}, {token}: {fast}, {slow}");
            }
        }
    }

    #[test]
    fn the_topic_is_that_of_the_text_whichever_way_led_there() {
        let tables = Noise::new(20);
        let text: Vec<Token> = (0..200).map(|at| at * 7 % 19).collect();
        let mut along = Topic::default();
        for end in 0..text.len() {
            let mut fresh = Topic::default();
            fresh.follow(&tables, &text[..end]);
            if end % 3 == 0 {
                along.follow(&tables, &text[..end]);
                assert_eq!(along.mean, fresh.mean);
            }
        }
        // another text of the same length
        let other: Vec<Token> = text.iter().map(|token| token + 1).collect();
        along.forget();
        along.follow(&tables, &other);
        let mut fresh = Topic::default();
        fresh.follow(&tables, &other);
        assert_eq!(along.mean, fresh.mean);
    }
}
