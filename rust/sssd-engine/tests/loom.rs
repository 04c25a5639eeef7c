//! Shared work under loom: all interleavings of a caller with helpers that come when they like.
#![cfg(model)]

#[path = "../src/share.rs"]
mod share;

mod sync {
    pub use loom::sync::{RwLock, RwLockWriteGuard, atomic};
    pub use std::sync::PoisonError;
}

use std::ops::Range;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use share::{Items, Share};

/// Items that count how often they were done.
#[derive(Default)]
struct Counts(Vec<Arc<AtomicUsize>>);

impl Items for Counts {
    fn group(&self, left: usize) -> usize {
        left.div_ceil(2)
    }

    fn items(&self) -> usize {
        self.0.len()
    }

    fn run(&self, items: Range<usize>) {
        for item in items {
            self.0[item].fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(model);
}

/// One round of new items, each of which must have been done once when it is over, as its caller sees it.
fn round(share: &Share<Counts>, items: usize, call: impl FnOnce()) {
    let counts: Vec<_> = (0..items).map(|_| Arc::new(AtomicUsize::new(0))).collect();
    let mut work = share.lock();
    work.0 = counts.clone();
    let work = share.run(work, call);
    assert_eq!(work.0.len(), items);
    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
}

fn helper(share: &Arc<Share<Counts>>) -> thread::JoinHandle<()> {
    let share = Arc::clone(share);
    thread::spawn(move || share.help())
}

#[test]
fn every_item_is_done_once_however_many_help() {
    check(|| {
        let share = Arc::default();
        let mut helpers = Vec::new();
        round(&share, 3, || helpers.extend([helper(&share), helper(&share)]));
        helpers.into_iter().for_each(|helper| helper.join().unwrap());
    });
}

#[test]
fn a_helper_may_come_in_a_later_round() {
    check(|| {
        let share = Arc::default();
        let mut late = None;
        round(&share, 1, || late = Some(helper(&share)));
        round(&share, 2, || {});
        late.unwrap().join().unwrap();
    });
}

#[test]
fn a_helper_may_come_when_another_thread_is_the_caller() {
    check(|| {
        let share: Arc<Share<Counts>> = Arc::default();
        let mut late = None;
        round(&share, 1, || late = Some(helper(&share)));
        let other = Arc::clone(&share);
        thread::spawn(move || round(&other, 1, || {})).join().unwrap();
        late.unwrap().join().unwrap();
    });
}
