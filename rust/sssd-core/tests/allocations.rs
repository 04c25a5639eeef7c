//! Drafting is on the critical path of every step: once warm, it takes no memory from the system.

#![allow(clippy::unwrap_used)]
use std::sync::Arc;

use allocation_counter::measure;
use sssd_core::{
    Common, Corpus, FlatTrees, Limits, Match, MemoryPool, Namespace, PassBlock, Reservation, Sequence, Shape,
    Token, TopK,
};

/// A corpus in which everything is followed by a cycle.
struct Cycle;

impl Corpus for Cycle {
    fn matches(&self, context: &[Token], max_length: usize, max_samples: usize, out: &mut Vec<Match>) {
        let length = context.len().min(max_length) as u32;
        let found =
            (0..max_samples as u64).map(|n| Match { position: n * 7, length, weight: 2.0, domain: 0 });
        out.extend(found);
    }

    fn continuation(&self, position: u64, out: &mut [Token]) -> usize {
        out.iter_mut().zip(position..).for_each(|(token, at)| *token = (at % 40) as Token);
        out.len()
    }

    fn successors(&self, token: Token, out: &mut Vec<(Token, f32)>) {
        out.extend((0..32).map(|n| ((token + n) % 40, 0.03)));
    }
}

fn reservation() -> Reservation {
    Reservation::new(&Arc::new(MemoryPool::new(usize::MAX)), usize::MAX)
}

#[test]
fn drafts_allocate_nothing_once_warm() {
    let pool = Arc::new(MemoryPool::new(usize::MAX));
    let common = Arc::new(Common::new(vec![], Some(Arc::new(Cycle)), &pool));
    let namespace = Namespace::new(&"".into(), &common, 1 << 20, 1 << 20, 0).unwrap();
    let mut text = (0u32..).map(|n| (n.wrapping_mul(n) / 7 + n / 3) % 40);
    let earlier: Vec<Token> = text.by_ref().take(2000).collect();
    Sequence::begin(&namespace, &earlier, &[], reservation()).unwrap().finish(&mut || false);
    let prompt: Vec<Token> = text.by_ref().take(1000).collect();
    let mut sequence = Sequence::begin(&namespace, &prompt, &earlier[..500], reservation()).unwrap();
    let (mut most, mut nodes) = (0, 0);
    for (step, token) in text.take(1200).enumerate() {
        let ids: [Token; 8] = std::array::from_fn(|n| token + n as Token);
        sequence.extend(&[token], Some(TopK { k: 8, ids: &ids, probs: &[0.1; 8] })).unwrap();
        let used = measure(|| {
            nodes += sequence.draft(Limits::nodes(64)).len();
        });
        // the sizes that drafts need are met within the first half
        if step >= 600 {
            most = most.max(used.count_total);
        }
    }
    assert!(nodes > 1200 * 32, "trees must be of some size for this to mean anything");
    assert_eq!(most, 0);
}

#[test]
fn blocks_and_choices_allocate_nothing_once_they_have_grown() {
    let (token_ids, parents): (Vec<i32>, Vec<i32>) = (0..32).map(|node| (node, node - 1)).unzip();
    let trees = FlatTrees { token_ids: &token_ids, parents: &parents, offsets: &[0, 32, 32] };
    let mut block = PassBlock::default();
    let (mut long, mut short, mut mask) = ([0; 66], [0; 3], [false; 2 * 33 * 33]);
    let (mut kept, logits) = ([0; 34], [0.5; 5000]);
    let mut step = |block: &mut PassBlock| {
        block.set(&[1, 2], trees, Shape::Padded(None)).unwrap();
        block.ids(&mut long).unwrap();
        block.mask(&mut mask).unwrap();
        block.accept(&[0_i32; 66], &mut kept, &mut long, &mut short).unwrap();
        sssd_core::top_k(&logits, &mut [0; 8], &mut [0.0; 8]);
    };
    step(&mut block);
    assert_eq!(measure(|| step(&mut block)).count_total, 0);
}
