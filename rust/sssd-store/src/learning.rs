//! Learns the tables for ranking candidates from the text of a file's segments, in one pass.
//!
//! A log-bilinear model (Mnih and Hinton 2007) of which of the successors of the last token comes, given the last eight
//! tokens and a mean of the text before: softmax over the successors, starting from their shares, so that nothing is
//! summed over the vocabulary. Stochastic gradient descent with the rates of Adagrad (Duchi, Hazan and Singer 2011), one for each row.
//! The text is read in blocks of random order. One thread does it: its steps depend on one another, and the bytes are to
//! be the same wherever a file is built.

use std::io;

use pulp::{Arch, NullaryFnOnce};
use sssd_core::{CONTEXT, Corpus, DIMENSIONS, NO_SHARE, TOPIC, Token, exp};

use crate::datastore::Datastore;
use crate::format::{MAX_SUCCESSORS, PARAMETERS, ROWS, rows_at, zeros};
use crate::progress::Progress;
use crate::residency::Everything;
use crate::tables::{INPUT, OUTPUT, TOPICS, Weights};

/// Symbols of a block.
const BLOCK: usize = 1 << 12;
/// Symbols that are learned from, at most: more of them teach little.
const MOST_SYMBOLS: u64 = 1 << 25;
/// Tokens before the first that is learned from in a document.
const LEAD: usize = 2;
/// Of tokens that follow the last one nearly always nothing is learned.
const CERTAIN: f32 = 0.95;
/// Tokens that stand for the topic in a step.
const DRAWN: usize = 6;
/// Adagrad's rates, and what its sums begin with.
const RATE: f32 = 0.15;
const BIAS_RATE: f32 = 0.075;
const WEIGHT_RATE: f32 = 0.05;
const FIRST_SQUARES: f32 = 0.01;
/// A row moves by the mean of its numbers' squares; this makes up for those being smaller than one number's alone.
const SQUARES: f32 = 4.0 / DIMENSIONS as f32;
/// Rows begin with numbers below this.
const FIRST: f32 = 0.1;
/// Smaller errors teach nothing.
const LEAST_ERROR: f32 = 0.003;
/// Numbers side by side for the compiler to add at once.
const LANES: usize = 32;

type Vector = [f32; DIMENSIONS];

/// What learning from a text of so many symbols comes to, in symbols of progress.
pub fn symbols_to_learn(symbols: u64) -> u64 {
    symbols.min(MOST_SYMBOLS)
}

/// Bytes that learning takes.
pub fn memory(vocab_size: u32) -> u64 {
    let row = (4 * DIMENSIONS + 4) as u64;
    let successors = MAX_SUCCESSORS as u64 * 12 + 2 * 272 + 8;
    u64::from(vocab_size) * (ROWS as u64 * row + 8 + 8 + successors)
}

/// The successors of each token, with the logarithms of their shares.
struct Successors {
    index: Vec<u32>,
    entries: Vec<(Token, f32)>,
}

impl Successors {
    fn new(store: &Datastore, progress: &Progress) -> io::Result<Self> {
        let (mut index, mut entries) = (zeros(store.vocab_size() as usize + 1)?, Vec::new());
        let mut list = Vec::new();
        for token in 0..store.vocab_size() {
            if token % BLOCK as u32 == 0 {
                progress.advance(0)?;
            }
            list.clear();
            store.successors(token, &mut list);
            if list.len() >= 2 && list[0].1 <= CERTAIN {
                entries.try_reserve(list.len())?;
                entries.extend(list.iter().map(|&(token, share)| (token, f64::from(share).ln() as f32)));
            }
            index[token as usize + 1] = entries.len() as u32;
        }
        Ok(Self { index, entries })
    }

    #[inline(always)]
    fn of(&self, token: Token) -> &[(Token, f32)] {
        let at = |token: usize| self.index[token] as usize;
        &self.entries[at(token as usize)..at(token as usize + 1)]
    }
}

/// What is learned, and the squares of the gradients so far.
struct Model {
    rows: [Vec<f32>; ROWS],
    row_squares: [Vec<f32>; ROWS],
    biases: Vec<f32>,
    bias_squares: Vec<f32>,
    weights: Weights,
    weight_squares: Weights,
    random: Random,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    #[inline(always)]
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    #[inline(always)]
    fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next()) * limit as u128) >> 64) as usize
    }
}

#[inline(always)]
fn row(rows: &[f32], token: Token) -> &Vector {
    let at = token as usize * DIMENSIONS;
    rows[at..at + DIMENSIONS].as_chunks().0.first().unwrap_or(&[0.0; DIMENSIONS])
}

#[inline(always)]
fn row_mut(rows: &mut [f32], token: Token) -> &mut [f32] {
    let at = token as usize * DIMENSIONS;
    &mut rows[at..at + DIMENSIONS]
}

#[inline(always)]
fn dot(left: &Vector, right: &Vector) -> f32 {
    let mut sums = [0.0f32; LANES];
    for (left, right) in left.as_chunks::<LANES>().0.iter().zip(right.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            sums[lane] += left[lane] * right[lane];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

impl Model {
    fn new(vocab_size: u32) -> io::Result<Self> {
        let mut random = Random(99);
        let count = vocab_size as usize;
        let mut rows = [Vec::new(), Vec::new(), Vec::new()];
        for rows in &mut rows {
            *rows = zeros(count * DIMENSIONS)?;
            rows.iter_mut().for_each(|number| {
                *number = ((random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * FIRST;
            });
        }
        let squares = || {
            let mut squares = zeros(count)?;
            squares.fill(FIRST_SQUARES);
            io::Result::Ok(squares)
        };
        Ok(Self {
            rows,
            row_squares: [squares()?, squares()?, squares()?],
            biases: zeros(count)?,
            bias_squares: squares()?,
            weights: [[0.5; DIMENSIONS]; CONTEXT + 1],
            weight_squares: [[1.0; DIMENSIONS]; CONTEXT + 1],
            random,
        })
    }

    /// Learns from a token, the last one of `text`, if the one before it has it among several successors.
    #[inline(always)]
    fn learn(&mut self, text: &[Token], successors: &Successors) {
        let Some((&token, before)) = text.split_last() else { return };
        let Some(&last) = before.last() else { return };
        let list = successors.of(last);
        let Some(truth) = list.iter().position(|entry| entry.0 == token) else { return };
        let span = before.len().min(TOPIC);
        let drawn: [Token; DRAWN] =
            std::array::from_fn(|_| before[before.len() - 1 - self.random.below(span)]);
        let mut topic = [0.0; DIMENSIONS];
        for &token in &drawn {
            let row = row(&self.rows[TOPICS], token);
            topic.iter_mut().zip(row).for_each(|(sum, number)| *sum += number * (1.0 / DRAWN as f32));
        }
        let context = self.context(before, &topic);
        let gradient = self.learn_outputs(list, truth, &context);
        self.learn_inputs(before, &gradient);
        self.learn_topics(&drawn, &topic, &gradient);
    }

    #[inline(always)]
    fn context(&self, before: &[Token], topic: &Vector) -> Vector {
        let mut context = [0.0; DIMENSIONS];
        for at in 0..DIMENSIONS {
            context[at] = self.weights[CONTEXT][at] * topic[at];
        }
        for (&token, weights) in before.iter().rev().zip(&self.weights[..CONTEXT]) {
            let row = row(&self.rows[INPUT], token);
            for at in 0..DIMENSIONS {
                context[at] += weights[at] * row[at];
            }
        }
        context
    }

    /// Moves what speaks for each successor towards what came, and returns the gradient at the context.
    #[inline(always)]
    fn learn_outputs(&mut self, list: &[(Token, f32)], truth: usize, context: &Vector) -> Vector {
        let mut scores = [0.0f32; MAX_SUCCESSORS];
        let mut most = f32::MIN;
        for (score, &(token, share)) in scores.iter_mut().zip(list) {
            *score = share + dot(context, row(&self.rows[OUTPUT], token)) + self.biases[token as usize];
            most = most.max(*score);
        }
        let scores = &mut scores[..list.len().min(MAX_SUCCESSORS)];
        let mut sum = 0.0;
        for score in scores.iter_mut() {
            *score = exp(*score - most);
            sum += *score;
        }
        let squares = dot(context, context) * SQUARES;
        let mut gradient = [0.0; DIMENSIONS];
        for (at, (score, &(token, _))) in scores.iter().zip(list).enumerate() {
            let error = score / sum - f32::from(u8::from(at == truth));
            if error.abs() < LEAST_ERROR {
                continue;
            }
            let seen = &mut self.row_squares[OUTPUT][token as usize];
            *seen += error * error * squares;
            let rate = RATE * error / seen.sqrt();
            let row = row_mut(&mut self.rows[OUTPUT], token);
            for ((number, gradient), context) in row.iter_mut().zip(&mut gradient).zip(context) {
                *gradient += error * *number;
                *number -= rate * context;
            }
            let seen = &mut self.bias_squares[token as usize];
            *seen += error * error;
            self.biases[token as usize] -= BIAS_RATE * error / seen.sqrt();
        }
        gradient
    }

    #[inline(always)]
    fn learn_inputs(&mut self, before: &[Token], gradient: &Vector) {
        for (position, &token) in before.iter().rev().take(CONTEXT).enumerate() {
            let weights = self.weights[position];
            let own: Vector = std::array::from_fn(|at| gradient[at] * weights[at]);
            let seen = &mut self.row_squares[INPUT][token as usize];
            *seen += dot(&own, &own) * SQUARES;
            let rate = RATE / seen.sqrt();
            let row = row_mut(&mut self.rows[INPUT], token);
            let held: Vector = std::array::from_fn(|at| row[at]);
            row.iter_mut().zip(&own).for_each(|(number, own)| *number -= rate * own);
            self.learn_weights(position, gradient, &held);
        }
    }

    #[inline(always)]
    fn learn_weights(&mut self, position: usize, gradient: &Vector, held: &Vector) {
        let (weights, squares) = (&mut self.weights[position], &mut self.weight_squares[position]);
        for at in 0..DIMENSIONS {
            let own = gradient[at] * held[at];
            squares[at] += own * own;
            weights[at] -= WEIGHT_RATE * own / squares[at].sqrt();
        }
    }

    #[inline(always)]
    fn learn_topics(&mut self, drawn: &[Token; DRAWN], topic: &Vector, gradient: &Vector) {
        self.learn_weights(CONTEXT, gradient, topic);
        let weights = &self.weights[CONTEXT];
        let own: Vector = std::array::from_fn(|at| gradient[at] * weights[at] * (1.0 / DRAWN as f32));
        let squares = dot(&own, &own) * SQUARES;
        for &token in drawn {
            let seen = &mut self.row_squares[TOPICS][token as usize];
            *seen += squares;
            let rate = RATE / seen.sqrt();
            let row = row_mut(&mut self.rows[TOPICS], token);
            row.iter_mut().zip(&own).for_each(|(number, own)| *number -= rate * own);
        }
    }
}

/// Learning from a block of symbols.
struct Block<'a> {
    model: &'a mut Model,
    successors: &'a Successors,
    symbols: &'a mut [u32],
}

impl NullaryFnOnce for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for document in self.symbols.split_mut(|&symbol| symbol == 0) {
            document.iter_mut().for_each(|symbol| *symbol -= 1);
            for end in LEAD..document.len() {
                self.model.learn(&document[..end + 1], self.successors);
            }
        }
    }
}

/// Learns tables from the text of a store's segments. Returns the section's bytes in pieces of which none is large, but
/// for what they are made from.
pub fn learn(store: &Datastore, progress: &Progress, out: &mut dyn io::Write) -> io::Result<u64> {
    let successors = Successors::new(store, progress)?;
    let mut model = Model::new(store.vocab_size())?;
    let mut blocks = Vec::new();
    for (number, segment) in store.all_segments().iter().enumerate() {
        let count = segment.symbols().div_ceil(BLOCK as u64) as usize;
        blocks.try_reserve(count)?;
        blocks.extend((0..count as u64).map(|block| (number as u32, block as u32)));
    }
    let mut random = Random(5);
    for last in (1..blocks.len()).rev() {
        blocks.swap(last, random.below(last + 1));
    }
    blocks.truncate(MOST_SYMBOLS as usize / BLOCK);
    let (mut bytes, mut symbols, mut learned) = (Vec::new(), Vec::new(), 0);
    for (number, block) in blocks {
        let segment = &store.all_segments()[number as usize];
        segment.read_symbols(u64::from(block) * BLOCK as u64, BLOCK, &mut bytes, &mut symbols)?;
        learned += symbols.iter().filter(|&&symbol| symbol > 0).count() as u64;
        let (model, successors) = (&mut model, &successors);
        Arch::new().dispatch(Block { model, successors, symbols: &mut symbols });
        progress.advance(symbols.len() as u64)?;
    }
    drop(successors);
    write(&model, store, out)?;
    Ok(learned)
}

/// Writes the section.
fn write(model: &Model, store: &Datastore, out: &mut dyn io::Write) -> io::Result<()> {
    for weight in model.weights.as_flattened() {
        out.write_all(&weight.to_le_bytes())?;
    }
    let vocab_size = store.vocab_size();
    let total: u64 = store.all_segments().iter().map(|segment| segment.suffixes()).sum();
    let scale = |table: usize, token: Token| {
        let most = row(&model.rows[table], token).iter().fold(0.0f32, |most, number| most.max(number.abs()));
        most.max(1e-9) / 127.0
    };
    for token in 0..vocab_size {
        let buckets = store.all_segments().iter().filter_map(|segment| segment.ranks(token, Everything));
        let count: u64 = buckets.map(|bucket| bucket.end - bucket.start).sum();
        let share = if count > 0 { (count as f64 / total as f64).ln() as f32 } else { NO_SHARE };
        let scales = [INPUT, TOPICS, OUTPUT].map(|table| scale(table, token));
        let parameters: [f32; PARAMETERS] =
            [scales[0], scales[1], scales[2], model.biases[token as usize], share.max(NO_SHARE)];
        parameters.iter().try_for_each(|number| out.write_all(&number.to_le_bytes()))?;
    }
    let written = size_of::<Weights>() as u64 + 4 * PARAMETERS as u64 * u64::from(vocab_size);
    out.write_all(&[0; 64][..(rows_at(vocab_size) - written) as usize])?;
    for table in [INPUT, TOPICS, OUTPUT] {
        for token in 0..vocab_size {
            let scale = scale(table, token);
            let row = row(&model.rows[table], token).map(|number| (number / scale).round() as i8 as u8);
            out.write_all(&row)?;
        }
    }
    Ok(())
}
