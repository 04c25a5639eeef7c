//! An entry that threads read and write without locks: a cache line of atomic words, written under a version that
//! readers check, so that they see a whole entry or none.
//!
//! H.-J. Boehm, "Can seqlocks get along with programming language memory models?", MSPC 2012.

use crate::sync::{AtomicU64, Ordering, fence};

/// State, and what is kept.
pub const WORDS: usize = 8;

// State: tag (32 bits), writes (8), version (24, odd while the entry is being written).
const VERSION: u64 = 0xff_ffff;
const MOST_WRITES: u64 = 255;

/// Whose entry it is, as it looks; 0 if nobody's.
pub fn tag(entry: &[AtomicU64]) -> u32 {
    (entry[0].load(Ordering::Relaxed) >> 32) as u32
}

/// How often the entry was written under its tag, at most 255 times.
pub fn writes(words: &[u64; WORDS]) -> u8 {
    (words[0] >> 24) as u8
}

/// Makes it the entry of `tag`, with all `words` but the first, and counts one more write of that tag. Does nothing
/// while another thread writes it: what that one writes is as good. Tells whether the entry was nobody's before.
pub fn write(entry: &[AtomicU64], tag: u32, words: &[u64; WORDS]) -> bool {
    let state = entry[0].load(Ordering::Relaxed);
    let held = if (state >> 32) as u32 == tag { state >> 24 & 0xff } else { 0 };
    set(entry, state, u64::from(tag) << 32 | (held + 1).min(MOST_WRITES) << 24, words) && state >> 32 == 0
}

/// Makes it what was read elsewhere: `words`, tag and writes included. False while another thread writes it.
pub fn put(entry: &[AtomicU64], words: &[u64; WORDS]) -> bool {
    set(entry, entry[0].load(Ordering::Relaxed), words[0], words)
}

/// Writes `words` and `new`, under the next version, to an entry that was last seen in `state`.
fn set(entry: &[AtomicU64], state: u64, new: u64, words: &[u64; WORDS]) -> bool {
    if state % 2 == 1
        || entry[0].compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed).is_err()
    {
        return false;
    }
    fence(Ordering::Release);
    for (to, &word) in entry.iter().zip(words).skip(1) {
        to.store(word, Ordering::Relaxed);
    }
    entry[0].store(new & !VERSION | ((state & VERSION) + 2) & VERSION, Ordering::Release);
    true
}

/// All words, the first without the version; nothing while a thread writes them.
pub fn read(entry: &[AtomicU64]) -> Option<[u64; WORDS]> {
    let state = entry[0].load(Ordering::Acquire);
    if state % 2 == 1 {
        return None;
    }
    let mut words = [state & !VERSION; WORDS];
    for (to, word) in words.iter_mut().zip(entry).skip(1) {
        *to = word.load(Ordering::Relaxed);
    }
    fence(Ordering::Acquire);
    (entry[0].load(Ordering::Relaxed) == state).then_some(words)
}
