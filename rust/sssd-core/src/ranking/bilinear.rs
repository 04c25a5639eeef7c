//! What a corpus has learned of which token follows which others, further back than its samples look: a log-bilinear
//! model (Mnih and Hinton, "Three new graphical models for statistical language modelling", 2007) whose context adds a
//! mean of the text before it. It is learned as a correction to the successors of the last token, so that nothing is
//! summed over the vocabulary.

use pulp::{Arch, NullaryFnOnce};

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

/// What speaks for a token to follow.
#[derive(Clone, Copy)]
pub struct Output<'a> {
    /// What the context is multiplied with.
    pub row: Row<'a>,
    /// What is added to the score.
    pub bias: f32,
    /// The logarithm of the token's share of the text.
    pub share: f32,
}

/// Rows that are asked for before the first of them is needed.
const AHEAD: usize = 32;
/// The logarithm of the share of a token that the text does not have.
pub const NO_SHARE: f32 = -16.1;
/// The largest number of a context in steps: products with rows then sum up in 32 bits.
const STEPS: f32 = 32_767.0;
/// Adding it leaves the nearest integer in the lowest bits of the sum.
const TO_INTEGER: f32 = 12_582_912.0;

type Vector = [f32; DIMENSIONS];

impl Row<'_> {
    /// Reads it, so that the processor has it before it is needed.
    #[inline(always)]
    fn touch(self) -> u8 {
        self.values[0] ^ self.values[DIMENSIONS / 2]
    }

    #[inline(always)]
    fn add_to(self, out: &mut Vector, weights: &Vector) {
        for ((out, &value), weight) in out.iter_mut().zip(self.values).zip(weights) {
            *out += f32::from(value.cast_signed()) * (weight * self.scale);
        }
    }
}

/// A context in whole steps: products with rows are integers, the same however they are summed up.
struct Context {
    values: [i16; DIMENSIONS],
    step: f32,
}

impl Context {
    #[inline(always)]
    fn new(vector: &Vector) -> Self {
        let mut most = 0;
        for number in vector {
            // the bits of non-negative floats are ordered like the floats
            most = most.max(number.abs().to_bits());
        }
        let most = f32::from_bits(most);
        let (mut values, steps) = ([0; DIMENSIONS], STEPS / most.max(f32::MIN_POSITIVE));
        for (value, number) in values.iter_mut().zip(vector) {
            *value = (number * steps + TO_INTEGER).to_bits() as i16;
        }
        Self { values, step: most / STEPS }
    }

    #[inline(always)]
    fn product(&self, row: Row<'_>) -> f32 {
        let mut sum = 0;
        for (&own, &value) in self.values.iter().zip(row.values) {
            sum += i32::from(own) * i32::from(value.cast_signed());
        }
        sum as f32 * (self.step * row.scale)
    }
}

/// What tables say of a token that may come next.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Said {
    /// How much more probable it is in this context than after its last token alone, as a logarithm, but for what is the
    /// same for all tokens.
    pub score: f32,
    /// The logarithm of its share of the text.
    pub share: f32,
}

const NOTHING: Said = Said { score: 0.0, share: NO_SHARE };

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
    fn output(&self, token: Token) -> Option<Output<'_>>;

    /// Sets what is said of each of `tokens`, after the tokens `last`, the last one first: at most [`CONTEXT`] of them
    /// count. In one call, so that the rows come from memory together.
    fn say(&self, last: &[Token], topic: &Topic, tokens: &[Token], out: &mut [Said]) {
        Arch::new().dispatch(Say { tables: self, last, topic, tokens, out });
    }

    /// The mean of the topic rows of a text.
    fn mean(&self, text: &[Token]) -> [f32; DIMENSIONS] {
        Arch::new().dispatch(Mean { tables: self, text })
    }
}

struct Say<'a, T: ?Sized> {
    tables: &'a T,
    last: &'a [Token],
    topic: &'a Topic,
    tokens: &'a [Token],
    out: &'a mut [Said],
}

impl<T: LogBilinear + ?Sized> NullaryFnOnce for Say<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tables, last, topic, tokens, out } = self;
        // not by closures: those are compiled for any processor
        let mut context = None;
        for (tokens, out) in tokens.chunks(AHEAD).zip(out.chunks_mut(AHEAD)) {
            let (mut outputs, mut seen) = ([None; AHEAD], 0);
            for (place, &token) in outputs.iter_mut().zip(tokens) {
                *place = tables.output(token);
                if let Some(output) = place {
                    seen ^= output.row.touch();
                }
            }
            std::hint::black_box(seen);
            let made = match context.take() {
                Some(context) => context,
                None => Context::new(&self::context(tables, last, topic)),
            };
            for (said, output) in out.iter_mut().zip(outputs) {
                *said = match output {
                    Some(Output { row, bias, share }) => Said { score: made.product(row) + bias, share },
                    None => NOTHING,
                };
            }
            context = Some(made);
        }
    }
}

struct Mean<'a, T: ?Sized> {
    tables: &'a T,
    text: &'a [Token],
}

impl<T: LogBilinear + ?Sized> NullaryFnOnce for Mean<'_, T> {
    type Output = Vector;

    #[inline(always)]
    fn call(self) -> Vector {
        let (mut mean, share) = ([0.0; DIMENSIONS], [1.0 / self.text.len().max(1) as f32; DIMENSIONS]);
        for tokens in self.text.chunks(AHEAD) {
            let (mut rows, mut seen) = ([None; AHEAD], 0);
            for (place, &token) in rows.iter_mut().zip(tokens) {
                *place = self.tables.topic(token);
                if let Some(row) = place {
                    seen ^= row.touch();
                }
            }
            std::hint::black_box(seen);
            for row in rows.into_iter().flatten() {
                row.add_to(&mut mean, &share);
            }
        }
        mean
    }
}

/// The vector of a context, the last token first.
#[inline(always)]
fn context<T: LogBilinear + ?Sized>(tables: &T, last: &[Token], topic: &Topic) -> Vector {
    let weights = tables.weights();
    let mut out = [0.0; DIMENSIONS];
    for (out, (weight, mean)) in out.iter_mut().zip(weights[CONTEXT].iter().zip(&topic.mean)) {
        *out = weight * mean;
    }
    for (&token, weights) in last.iter().zip(&weights[..CONTEXT]) {
        if let Some(row) = tables.input(token) {
            row.add_to(&mut out, weights);
        }
    }
    out
}

/// The mean of the topic rows of a text's last tokens.
#[derive(Clone)]
pub struct Topic {
    /// The tables, and the length of the text; nothing if it is not known.
    of: Option<(u64, usize)>,
    mean: Vector,
}

impl Default for Topic {
    fn default() -> Self {
        Self { of: None, mean: [0.0; DIMENSIONS] }
    }
}

impl Topic {
    /// Makes it that of `text`: as it was at the last multiple of the step, which any way to the text leads by.
    #[inline]
    pub fn follow(&mut self, tables: &dyn LogBilinear, text: &[Token]) {
        let end = text.len() - text.len() % TOPIC_STEP;
        let of = Some((tables.id(), end));
        if self.of != of {
            self.of = of;
            self.mean = tables.mean(&text[end.saturating_sub(TOPIC)..end]);
        }
    }

    /// The text is another one now.
    pub fn forget(&mut self) {
        self.of = None;
    }
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

        fn output(&self, token: Token) -> Option<Output<'_>> {
            let row = self.row(2, token)?;
            Some(Output { row, bias: 0.1 * token as f32, share: -1.0 - token as f32 })
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
            let last: Vec<Token> = text[..end].iter().rev().copied().collect();
            let tokens: Vec<Token> = (0..25).chain(0..60).collect();
            let mut said = vec![Said::default(); tokens.len()];
            tables.say(&last, &topic, &tokens, &mut said);
            for (token, said) in tokens.into_iter().zip(said) {
                let slow = slowly(&tables, &text[..end], token);
                assert!((f64::from(said.score) - slow).abs() < 2e-3, "{end}, {token}: {said:?}, {slow}");
                assert_eq!(said.share, if token < 20 { -1.0 - token as f32 } else { NO_SHARE });
            }
        }
    }

    #[test]
    fn every_processor_gives_the_same_bits() {
        let tables = Noise::new(90);
        let text: Vec<Token> = (0..150).map(|at| at * 7 % 89).collect();
        let tokens: Vec<Token> = (0..75).collect();
        let mut topic = Topic::default();
        topic.follow(&tables, &text);
        // called as it is, it is compiled for any processor
        assert_eq!(Mean { tables: &tables, text: &text }.call(), tables.mean(&text));
        let [mut any, mut own] = [(); 2].map(|()| vec![Said::default(); tokens.len()]);
        Say { tables: &tables, last: &text, topic: &topic, tokens: &tokens, out: &mut any }.call();
        tables.say(&text, &topic, &tokens, &mut own);
        assert_eq!(any, own);
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
