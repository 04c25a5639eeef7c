//! The entries of the lock-free table under loom: all interleavings, and whatever the memory orders allow.
#![cfg(model)]

#[path = "../src/sources/seqlock.rs"]
#[allow(dead_code)]
mod seqlock;

mod sync {
    pub use loom::sync::atomic::{AtomicU64, Ordering, fence};
}

use loom::sync::Arc;
use loom::thread;
use seqlock::WORDS;
use sync::AtomicU64;

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(2);
    builder.check(model);
}

/// The state and two of the words, which keeps the interleavings few.
const USED: usize = 3;

fn new_entry() -> Arc<Vec<AtomicU64>> {
    Arc::new((0..USED).map(|_| AtomicU64::new(0)).collect())
}

fn write(entry: &[AtomicU64], tag: u32) {
    seqlock::write(entry, tag, &[u64::from(tag); WORDS]);
}

/// The tag of a whole entry.
fn whole(words: &[u64; WORDS]) -> u32 {
    let tag = (words[0] >> 32) as u32;
    assert_eq!(words[1..USED], [u64::from(tag); USED - 1]);
    tag
}

#[test]
fn a_reader_sees_whole_entries_of_two_writers() {
    check(|| {
        let entry = new_entry();
        let writers: Vec<_> = (1..3)
            .map(|tag| {
                let entry = Arc::clone(&entry);
                thread::spawn(move || write(&entry, tag))
            })
            .collect();
        if let Some(words) = seqlock::read(&entry) {
            whole(&words);
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        let last = seqlock::read(&entry).expect("nobody writes any more");
        assert_eq!((whole(&last), seqlock::writes(&last)), (seqlock::tag(&entry), 1));
        assert_ne!(whole(&last), 0);
    });
}

#[test]
fn a_reader_sees_one_of_two_writes_of_a_writer() {
    check(|| {
        let entry = new_entry();
        write(&entry, 1);
        let writer = {
            let entry = Arc::clone(&entry);
            thread::spawn(move || {
                write(&entry, 2);
                write(&entry, 3);
            })
        };
        let mut newest = 0;
        for _ in 0..2 {
            if let Some(words) = seqlock::read(&entry) {
                let seen = whole(&words);
                assert!(seen >= newest.max(1));
                newest = seen;
            }
        }
        writer.join().unwrap();
        assert_eq!(seqlock::read(&entry).map(|words| whole(&words)), Some(3));
    });
}
