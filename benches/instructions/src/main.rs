//! Replays recorded requests for callgrind, which counts the instructions of drafting or of appending alone:
//!
//! ```text
//! valgrind --tool=callgrind --toggle-collect='*draft_once*' instructions TOKENS STORE|- NODES REQUESTS [unranked]
//! ```
//!
//! TOKENS holds 32-bit words, little-endian: how many traces, then of each how many requests, then of each how many
//! prompt and response tokens, and these. REQUESTS of each trace are replayed, with `unranked` without ranking. Prints
//! what was accepted, which must be equal for two builds that are compared.

use std::hint::black_box;
use std::sync::Arc;

use sssd_core::{Common, Corpus, DraftTree, Limits, MemoryPool, Namespace, Reservation, Sequence};

#[inline(never)]
fn draft_once(sequence: &mut Sequence, limits: Limits) -> &DraftTree {
    black_box(sequence.draft(limits))
}

#[inline(never)]
fn extend_once(sequence: &mut Sequence, tokens: &[u32]) {
    black_box(sequence.extend(tokens, None)).unwrap();
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

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let (arguments, ranking) = match &arguments[..] {
        [arguments @ .., last] if last == "unranked" => (arguments, false),
        arguments => (arguments, true),
    };
    let [_, tokens, store, nodes, requests] = arguments else { panic!("see the head of main.rs") };
    let (nodes, requests): (usize, usize) = (nodes.parse().unwrap(), requests.parse().unwrap());
    let bytes = std::fs::read(tokens).unwrap();
    let mut words = bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word));
    let store: Option<Arc<dyn Corpus>> = (store != "-").then(|| {
        Arc::new(sssd_store::Datastore::open(&[store], sssd_store::Load::Mmap).unwrap()) as Arc<dyn Corpus>
    });
    let (mut drafts, mut drafted, mut sum) = (0, 0, 0);
    for _ in 0..words.next().unwrap() {
        for request in 0..words.next().unwrap() as usize {
            let (prompt, response) = (words.next().unwrap(), words.next().unwrap());
            let prompt: Vec<u32> = words.by_ref().take(prompt as usize).collect();
            let response: Vec<u32> = words.by_ref().take(response as usize).collect();
            if request >= requests {
                continue;
            }
            let pool = Arc::new(MemoryPool::new(usize::MAX));
            let common = Arc::new(Common::new(vec![128_009], store.clone(), &pool));
            let namespace = Namespace::new(&"".into(), &common, 0, 1 << 20, 0).unwrap();
            let mut sequence = Sequence::new(&namespace, Reservation::new(&pool, usize::MAX)).unwrap();
            sequence.prefill(&prompt).unwrap();
            sequence.admit();
            extend_once(&mut sequence, &response[..1]);
            let mut at = 1;
            while at < response.len() {
                let limits = Limits { max_nodes: nodes, ranking, ..Limits::DEFAULT };
                let tree = draft_once(&mut sequence, limits);
                let depth = accepted(tree, &response[at..]);
                (drafts, drafted, sum) = (drafts + 1, drafted + tree.len(), sum + depth);
                let end = (at + depth + 1).min(response.len());
                extend_once(&mut sequence, &response[at..end]);
                at = end;
            }
        }
    }
    println!("drafts {drafts} nodes {drafted} accepted {sum}");
}
