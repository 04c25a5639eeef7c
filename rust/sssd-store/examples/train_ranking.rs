//! Learns the network of the ranking stage: `train_ranking STORES REQUESTS OUT END_TOKEN`, STORES with commas between.
//! `benches/train_ranking.py` makes REQUESTS and calls this.
//!
//! REQUESTS are little-endian `u32`: of each request the numbers of tokens of prompt and response, then these tokens.
//! They are replayed with the datastores, one after the other, some of them beside a live store, and with the network as
//! learned so far; what the ranking stage saw at nodes that the target reached is what is learned from: Adam (Kingma and
//! Ba 2015) on the logarithm of the probability of what came.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sssd_core::{
    Common, Corpus, DraftTree, FEATURES, HIDDEN, Limits, MemoryPool, Namespace, Network, Ranked, Reservation,
    Sequence, Token,
};
use sssd_store::{Datastore, Load};

/// Threads that replay.
const THREADS: usize = 2;
/// Nodes of a draft.
const NODES: usize = 48;
/// Times that all requests are replayed, and that what was seen then is learned from.
const REPLAYS: usize = 2;
const PASSES: usize = 3;
/// Consecutive requests with one datastore; of so many such groups, one shares a live store of so many bytes.
const GROUP: usize = 12;
const LIVE_EVERY: usize = 3;
const LIVE_BYTES: usize = 16 << 20;
/// Nodes whose gradients make a step.
const BATCH: usize = 64;
const RATE: f32 = 0.003;
/// Decay of the means of gradients and their squares.
const MEANS: [f32; 2] = [0.9, 0.999];
const LEAK: f32 = 0.1;

struct Request {
    prompt: Vec<Token>,
    response: Vec<Token>,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// Between -1 and 1.
    fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A node that the target reached.
struct Event {
    rows: Vec<(f32, [f32; FEATURES])>,
    kept: f32,
    /// The row of what came; none if it was a candidate without a row.
    truth: Option<usize>,
}

impl Event {
    /// `token` came after the node.
    fn new(seen: Ranked, token: Token) -> Self {
        let none = seen.rows.len() - 1;
        let scored = seen.tokens.iter().position(|&scored| scored == token);
        let truth = scored.or_else(|| (!seen.others.contains(&token)).then_some(none));
        Self { rows: seen.rows, kept: seen.kept, truth }
    }
}

/// The weights in their order: features by hidden units, biases, outputs.
fn flat(network: &mut Network) -> Vec<f32> {
    network.weights_mut().map(|weight| *weight).collect()
}

const BIAS: usize = FEATURES * HIDDEN;
const OUTPUT: usize = BIAS + HIDDEN;

fn hidden(weights: &[f32], features: &[f32; FEATURES]) -> [f32; HIDDEN] {
    let mut hidden: [f32; HIDDEN] = std::array::from_fn(|unit| weights[BIAS + unit]);
    for (feature, weights) in features.iter().zip(weights.chunks_exact(HIDDEN)) {
        hidden.iter_mut().zip(weights).for_each(|(unit, weight)| *unit += weight * feature);
    }
    hidden
}

/// Adds the gradient of an event, and returns the loss without the network and with it.
fn learn(weights: &[f32], event: &Event, gradient: &mut [f32]) -> (f64, f64) {
    let units: Vec<_> = event.rows.iter().map(|(_, features)| hidden(weights, features)).collect();
    let odds: Vec<f32> = event
        .rows
        .iter()
        .zip(&units)
        .map(|((base, _), units)| {
            let outputs = units.iter().zip(&weights[OUTPUT..]);
            let output: f32 = outputs.map(|(unit, weight)| unit.max(LEAK * unit) * weight).sum();
            (base + output).clamp(-30.0, 30.0).exp()
        })
        .collect();
    let kept = event.kept.max(1e-6);
    let whole = odds.iter().sum::<f32>() + kept;
    for (row, (odds, units)) in odds.iter().zip(&units).enumerate() {
        let error = odds / whole - f32::from(u8::from(event.truth == Some(row)));
        for unit in 0..HIDDEN {
            let slope = if units[unit] > 0.0 { 1.0 } else { LEAK };
            gradient[OUTPUT + unit] += error * units[unit] * slope;
            let back = error * weights[OUTPUT + unit] * slope;
            gradient[BIAS + unit] += back;
            for (feature, value) in event.rows[row].1.iter().enumerate() {
                gradient[feature * HIDDEN + unit] += back * value;
            }
        }
    }
    let bases: Vec<f32> = event.rows.iter().map(|(base, _)| base.exp()).collect();
    let before = event.truth.map_or(kept, |truth| bases[truth]) / (bases.iter().sum::<f32>() + kept);
    let after = event.truth.map_or(kept, |truth| odds[truth]) / whole;
    (-f64::from(before).ln(), -f64::from(after).ln())
}

#[derive(Default)]
struct Adam {
    means: [Vec<f32>; 2],
    steps: i32,
}

impl Adam {
    fn step(&mut self, weights: &mut [f32], gradient: &[f32], rate: f32) {
        self.steps += 1;
        self.means.iter_mut().for_each(|means| means.resize(weights.len(), 0.0));
        let [first, second] = &mut self.means;
        let bias = MEANS.map(|decay| 1.0 - decay.powi(self.steps));
        for (at, (weight, gradient)) in weights.iter_mut().zip(gradient).enumerate() {
            first[at] = MEANS[0] * first[at] + (1.0 - MEANS[0]) * gradient;
            second[at] = MEANS[1] * second[at] + (1.0 - MEANS[1]) * gradient * gradient;
            *weight -= rate * (first[at] / bias[0]) / ((second[at] / bias[1]).sqrt() + 1e-8);
        }
    }
}

fn accepted(tree: &DraftTree, rest: &[Token]) -> usize {
    let (mut parent, mut count) = (-1, 0);
    while let Some(node) = (0..tree.len())
        .find(|&node| tree.parents[node] == parent && Some(&tree.token_ids[node]) == rest.get(count))
    {
        (parent, count) = (node as i32, count + 1);
    }
    count
}

/// What the ranking stage saw of a request at the nodes that the target reached.
fn replay(request: &Request, namespace: &Namespace, pool: &Arc<MemoryPool>, events: &mut Vec<Event>) {
    let reservation = Reservation::new(pool, usize::MAX);
    let mut sequence = Sequence::begin(namespace, &request.prompt, &[], reservation).expect("memory");
    let response = &request.response;
    sequence.extend(&response[..1], None).expect("memory");
    let mut at = 1;
    while at < response.len() {
        sequence.record_ranking();
        let rest = &response[at..];
        let count = accepted(sequence.draft(Limits::nodes(NODES)), rest);
        for seen in sequence.record_ranking().nodes {
            let depth = seen.depth;
            let path = rest.get(..depth).unwrap_or_default().iter().rev();
            if depth <= count && depth < rest.len() && path.zip(&seen.last).all(|(truth, own)| truth == own) {
                events.push(Event::new(seen, rest[depth]));
            }
        }
        let end = (at + count + 1).min(response.len());
        sequence.extend(&response[at..end], None).expect("memory");
        at = end;
    }
    sequence.finish(&mut || false);
}

/// The same of all requests, in their order.
fn replay_all(requests: &[Request], stores: &[Arc<Datastore>], network: &Network, end: Token) -> Vec<Event> {
    let groups: Vec<_> = requests.chunks(GROUP).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let (pool, mut seen) = (Arc::new(MemoryPool::new(usize::MAX)), Vec::new());
        let common = stores.iter().map(|store| {
            let corpus: Arc<dyn Corpus> = Arc::clone(store) as Arc<dyn Corpus>;
            let network = Some(Arc::new(network.clone()));
            Arc::new(Common::new(vec![end], Some(corpus), &pool).with_network(network))
        });
        let common: Vec<_> = common.collect();
        while let (number, Some(group)) = {
            let number = next.fetch_add(1, Ordering::Relaxed);
            (number, groups.get(number))
        } {
            let lives = number / common.len() % LIVE_EVERY == 0;
            let common = &common[number % common.len()];
            let namespace =
                |bytes| Arc::new(Namespace::new(&"".into(), common, bytes, 0, 0).expect("memory"));
            let (shared, mut events) = (lives.then(|| namespace(LIVE_BYTES)), Vec::new());
            for request in *group {
                let own = shared.clone().unwrap_or_else(|| namespace(0));
                replay(request, &own, &pool, &mut events);
            }
            seen.push((number, events));
        }
        seen
    };
    let mut seen: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    seen.sort_unstable_by_key(|(number, _)| *number);
    seen.into_iter().flat_map(|(_, events)| events).collect()
}

fn requests(path: &str) -> std::io::Result<Vec<Request>> {
    let bytes = std::fs::read(path)?;
    let mut numbers = bytes.as_chunks().0.iter().map(|&number: &[u8; 4]| u32::from_le_bytes(number));
    let mut requests = Vec::new();
    while let Some((prompt, response)) = numbers.next().zip(numbers.next()) {
        let prompt = numbers.by_ref().take(prompt as usize).collect();
        requests.push(Request { prompt, response: numbers.by_ref().take(response as usize).collect() });
    }
    Ok(requests)
}

/// Moves the weights by one pass over the events, from `done` of `total` steps on. Returns the losses without the network
/// and with it.
fn pass(weights: &mut [f32], adam: &mut Adam, events: &[Event], (done, total): (usize, usize)) -> (f64, f64) {
    let (mut before, mut after) = (0.0, 0.0);
    for (step, batch) in events.chunks(BATCH).enumerate() {
        let mut gradient = vec![0.0; weights.len()];
        for event in batch {
            let (without, with) = learn(weights, event, &mut gradient);
            (before, after) = (before + without, after + with);
        }
        gradient.iter_mut().for_each(|gradient| *gradient /= batch.len() as f32);
        let rate = RATE * (1.0 - (done + step) as f32 / total as f32).max(0.02);
        adam.step(weights, &gradient, rate);
    }
    (before / events.len() as f64, after / events.len() as f64)
}

/// What nothing was learned of must not speak, whatever it began with.
fn silence(weights: &mut [f32], events: &[Event]) {
    let mut seen = [false; FEATURES];
    for (_, row) in events.iter().flat_map(|event| &event.rows) {
        seen.iter_mut().zip(row).for_each(|(seen, value)| *seen |= *value != 0.0);
    }
    for (seen, weights) in seen.iter().zip(weights.chunks_exact_mut(HIDDEN)) {
        if !seen {
            weights.fill(0.0);
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [stores, traces, out, end] = arguments.as_slice() else {
        return Err("STORES REQUESTS OUT END_TOKEN".into());
    };
    let stores = stores.split(',').map(|store| Datastore::open(&[store], Load::Ram).map(Arc::new));
    let (stores, requests, end) = (stores.collect::<Result<Vec<_>, _>>()?, requests(traces)?, end.parse()?);
    let mut random = Random(7);
    let mut network = Network::random(&mut || random.number());
    let mut weights = flat(&mut network);
    for number in 0..REPLAYS {
        let mut events = replay_all(&requests, &stores, &network, end);
        let steps = events.len().div_ceil(BATCH);
        silence(&mut weights, &events);
        let mut adam = Adam::default();
        for pass_number in 0..PASSES {
            for last in (1..events.len()).rev() {
                events.swap(last, random.next() as usize % (last + 1));
            }
            let steps = (pass_number * steps, PASSES * steps);
            let (before, after) = pass(&mut weights, &mut adam, &events, steps);
            let count = events.len();
            writeln!(
                std::io::stdout(),
                "replay {number}, pass {pass_number}: {count} nodes, {before:.4} nat before, {after:.4} after"
            )?;
        }
        network.weights_mut().zip(&weights).for_each(|(weight, learned)| *weight = *learned);
        std::fs::write(out, network.to_bytes())?;
    }
    Ok(())
}
