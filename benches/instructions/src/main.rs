//! Replays recorded requests for callgrind, which counts the instructions of drafting or of appending alone:
//!
//! ```text
//! valgrind --tool=callgrind --toggle-collect='*draft_once*' instructions TOKENS STORE|- NODES REQUESTS [TOPK] [unranked]
//! ```
//!
//! TOKENS holds 32-bit words, little-endian: how many traces, then of each how many requests, then of each how many
//! prompt and response tokens, and these. REQUESTS of each trace are replayed. TOPK holds for each response token what
//! the target held probable: 8 tokens, then 8 probabilities of 32 bits. `unranked` leaves out ranking. Prints what was
//! accepted and a digest of the drafts, which must be equal for two builds that are compared, and times, which are worth
//! something on an idle machine without callgrind.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sssd_core::{
    Common, Corpus, DraftTree, Limits, MemoryPool, Namespace, Reservation, Sequence, TOP_K, TopK,
};

#[inline(never)]
fn draft_once(sequence: &mut Sequence, limits: Limits) -> &DraftTree {
    black_box(sequence.draft(limits))
}

#[inline(never)]
fn extend_once(sequence: &mut Sequence, tokens: &[u32], top: Option<TopK>) {
    black_box(sequence.extend(tokens, top)).unwrap();
}

/// How long `work` takes for each of `tokens`.
fn timed<T>(times: &mut Vec<Duration>, tokens: usize, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    times.push(start.elapsed() / tokens as u32);
    done
}

fn percentile<T: Copy>(sorted: &[T], percent: usize) -> T {
    sorted[sorted.len() * percent / 100]
}

fn words(path: &str) -> Vec<u32> {
    std::fs::read(path).unwrap().as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

/// Ids and probabilities of all positions.
fn read_top_k(path: &str) -> (Vec<u32>, Vec<f32>) {
    let rows = words(path);
    let rows = rows.as_chunks::<{ 2 * TOP_K }>().0;
    let ids = rows.iter().flat_map(|row| &row[..TOP_K]).copied();
    (ids.collect(), rows.iter().flat_map(|row| &row[TOP_K..]).map(|&word| f32::from_bits(word)).collect())
}

fn accepted(tree: &DraftTree, recording: &[u32]) -> usize {
    let mut node = -1;
    let mut depth = 0;
    while let Some(&token) = recording.get(depth) {
        let Some(next) = (0..tree.len()).find(|&at| tree.parents[at] == node && tree.token_ids[at] == token)
        else {
            break;
        };
        node = next as i32;
        depth += 1;
    }
    depth
}

/// What is seen of the requests.
#[derive(Default)]
struct Figures {
    drafts: Vec<Duration>,
    extended: Vec<Duration>,
    nodes: usize,
    accepted: usize,
    /// Bytes of each request's weights.
    weights: Vec<usize>,
    /// Of all trees.
    digest: DefaultHasher,
}

impl Figures {
    fn note(&mut self, tree: &DraftTree) {
        self.nodes += tree.len();
        (&tree.token_ids, &tree.parents).hash(&mut self.digest);
        tree.probs.iter().for_each(|prob| prob.to_bits().hash(&mut self.digest));
    }

    /// Drafts a request of which `prompt` is known, and lets `response` come.
    fn replay(
        &mut self,
        namespace: &Namespace,
        prompt: &[u32],
        response: &[u32],
        top: Option<TopK>,
        limits: Limits,
    ) {
        let pool = Arc::new(MemoryPool::new(usize::MAX));
        let mut sequence = Sequence::new(namespace, Reservation::new(&pool, usize::MAX)).unwrap();
        sequence.prefill(prompt).unwrap();
        sequence.admit();
        let (mut at, mut end) = (0, 1);
        while at < response.len() {
            let rows = TOP_K * at..TOP_K * end;
            let top = top.map(|top| TopK { ids: &top.ids[rows.clone()], probs: &top.probs[rows], ..top });
            timed(&mut self.extended, end - at, || extend_once(&mut sequence, &response[at..end], top));
            at = end;
            if at < response.len() {
                let tree = timed(&mut self.drafts, 1, || draft_once(&mut sequence, limits));
                self.note(tree);
                let depth = accepted(tree, &response[at..]);
                self.accepted += depth;
                end = (at + depth + 1).min(response.len());
            }
        }
        // the sequence's own are charged by themselves
        self.weights.push(pool.used() - sequence.charged_bytes());
    }

    fn print(mut self) {
        let digest = self.digest.finish();
        let drafts = self.drafts.len();
        println!("drafts {drafts} nodes {} accepted {} digest {digest:016x}", self.nodes, self.accepted);
        self.drafts.sort_unstable();
        self.weights.sort_unstable();
        self.extended.sort_unstable();
        for (what, times) in [("draft", &self.drafts), ("extend, a token", &self.extended)] {
            let [p50, p99] = [50, 99].map(|percent| percentile(times, percent));
            println!("{what}: p50 {p50:.2?} p99 {p99:.2?}");
        }
        let [p50, p99] = [50, 99].map(|percent| percentile(&self.weights, percent));
        println!("weights: p50 {p50} p99 {p99} bytes a request");
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let (arguments, ranking) = match &arguments[..] {
        [arguments @ .., last] if last == "unranked" => (arguments, false),
        arguments => (arguments, true),
    };
    let [_, tokens, store, nodes, requests, top @ ..] = arguments else { panic!("see the head of main.rs") };
    let (nodes, requests): (usize, usize) = (nodes.parse().unwrap(), requests.parse().unwrap());
    let limits = Limits { max_nodes: nodes, ranking, ..Limits::DEFAULT };
    let top = top.first().map(|path| read_top_k(path));
    let words = words(tokens);
    let mut words = words.iter().copied();
    let store: Option<Arc<dyn Corpus>> = (store != "-").then(|| {
        Arc::new(sssd_store::Datastore::open(&[store], sssd_store::Load::Mmap).unwrap()) as Arc<dyn Corpus>
    });
    let (mut figures, mut rows) = (Figures::default(), 0);
    for _ in 0..words.next().unwrap() {
        for request in 0..words.next().unwrap() as usize {
            let (prompt, response) = (words.next().unwrap(), words.next().unwrap());
            let prompt: Vec<u32> = words.by_ref().take(prompt as usize).collect();
            let response: Vec<u32> = words.by_ref().take(response as usize).collect();
            let first = rows;
            rows += TOP_K * response.len();
            if request < requests {
                let top = top.as_ref();
                let top =
                    top.map(|(ids, probs)| TopK { k: TOP_K, ids: &ids[first..], probs: &probs[first..] });
                let pool = Arc::new(MemoryPool::new(usize::MAX));
                let common = Arc::new(Common::new(vec![128_009], store.clone(), &pool));
                let namespace = Namespace::new(&"".into(), &common, 0, 1 << 20, 0).unwrap();
                figures.replay(&namespace, &prompt, &response, top, limits);
            }
        }
    }
    figures.print();
}
