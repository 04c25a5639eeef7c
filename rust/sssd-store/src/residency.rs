//! Which pages of a mapped file are in memory, so that a draft reads those and never waits for a disk.
//!
//! What the system says of 64 pages at a time is kept in a word. A look-up asks for pages that are not there and goes on
//! without; a thread has them read, and from time to time looks what the system has dropped. It is started when
//! something is missing and ends when nothing is looked up any more, so a fork of the process starts its own. Nobody
//! waits for a lock here, and what is out of date costs time, never an answer that is wrong.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::Mmap;

/// What a look-up may read without waiting.
pub trait Reach: Copy {
    /// Whether `length` bytes from `at` are there; if not, they are asked for.
    fn has(self, at: usize, length: usize) -> bool;
    /// Whether they are there.
    fn sees(self, at: usize, length: usize) -> bool;
}

/// For files in memory, and for whoever wants to wait.
#[derive(Clone, Copy)]
pub struct Everything;

impl Reach for Everything {
    #[inline]
    fn has(self, _: usize, _: usize) -> bool {
        true
    }

    #[inline]
    fn sees(self, _: usize, _: usize) -> bool {
        true
    }
}

/// Pages of a word.
const WORD: usize = u64::BITS as usize;
/// Pages that can be asked for before they are read; newer ones take the place of older ones.
const RING: usize = 1024;
/// Between two looks at what was asked for, while something is and while nothing is.
const SOON: Duration = Duration::from_millis(2);
const LATER: Duration = Duration::from_millis(32);
/// Without a look-up for so long, the thread ends.
const IDLE: Duration = Duration::from_secs(1);
/// Between two looks at what the system has dropped: less if it drops much.
const SWEEPS: Range<Duration> = Duration::from_millis(250)..Duration::from_secs(16);
/// Between sweeps is at least so many times what one takes, while drafts wait for what was dropped and else.
const SWEEP_SHARES: [u32; 2] = [10, 50];
/// Pages that the system is asked about, or asked to read, in one call.
const STRETCH: usize = 4096;
/// Of so many pages one that was dropped is much.
const MUCH: usize = 1024;

/// The pages of a map. Where the system does not tell (not Linux, or somebody else's file), all of them count as there.
pub struct Residency(Arc<Shared>);

struct Shared {
    map: Option<Arc<Mmap>>,
    page_bits: u32,
    words: Vec<Word>,
    /// Pages asked for, each plus 1.
    ring: Vec<AtomicU64>,
    next: AtomicUsize,
    /// Whether something has been asked for since the thread was last seen to run.
    missed: AtomicBool,
    /// Whether something has been looked up since the thread last looked.
    used: AtomicBool,
    /// Whether the words seem to be out of date.
    suspect: AtomicBool,
    /// The process whose thread reads pages; 0 if none does.
    reader: AtomicU32,
    /// What every look-up needs, to be read first.
    preferred: Vec<Range<usize>>,
}

#[derive(Default)]
struct Word {
    resident: AtomicU64,
    known: AtomicBool,
}

impl Residency {
    /// `preferred` are the bytes that every look-up needs.
    pub fn new(map: Arc<Mmap>, preferred: Vec<Range<usize>>) -> std::io::Result<Self> {
        let page_bits = system::page_size().trailing_zeros();
        let words = words(map.len().div_ceil(WORD << page_bits))?;
        Self::with(Some(map), page_bits, words, preferred)
    }

    fn with(
        map: Option<Arc<Mmap>>,
        page_bits: u32,
        words: Vec<Word>,
        preferred: Vec<Range<usize>>,
    ) -> std::io::Result<Self> {
        let mut ring = Vec::new();
        ring.try_reserve_exact(RING)?;
        ring.resize_with(RING, AtomicU64::default);
        Ok(Self(Arc::new(Shared {
            map,
            page_bits,
            words,
            ring,
            next: AtomicUsize::new(0),
            missed: AtomicBool::new(false),
            used: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
            reader: AtomicU32::new(0),
            preferred,
        })))
    }

    /// Pages of 2^`page_bits` bytes of which those are there that `resident` names, and no others ever come.
    #[cfg(test)]
    pub fn fixed(page_bits: u32, pages: usize, resident: impl Fn(usize) -> bool) -> Self {
        let words = words(pages.div_ceil(WORD)).unwrap();
        for (index, word) in words.iter().enumerate() {
            let bits =
                (0..WORD).filter(|bit| resident(index * WORD + bit)).fold(0, |bits, bit| bits | 1 << bit);
            word.resident.store(bits, Relaxed);
            word.known.store(true, Relaxed);
        }
        Self::with(None, page_bits, words, Vec::new()).unwrap()
    }

    /// Whether something has been asked for that has not been read yet, but will be.
    pub fn has_missed(&self) -> bool {
        self.0.missed.load(Relaxed) && self.0.map.is_some()
    }

    /// Whether something has been missing of late.
    pub fn is_watched(&self) -> bool {
        self.0.reader.load(Relaxed) != 0
    }

    /// To be told of each look-up after its end: whether it was slow, and whether it had to wait for a page that seemed to
    /// be there.
    pub fn looked_up(&self, slow: bool, waited: bool) {
        let shared = &self.0;
        if !shared.used.load(Relaxed) {
            shared.used.store(true, Relaxed);
        }
        if waited {
            shared.suspect.store(true, Relaxed);
        }
        if slow || shared.missed.load(Relaxed) {
            Shared::start(shared);
        }
    }
}

impl Reach for &Residency {
    #[inline]
    fn has(self, at: usize, length: usize) -> bool {
        let (first, last) = self.0.pages(at, length);
        let there = self.0.has(first);
        there & (first == last || self.0.has(last))
    }

    #[inline]
    fn sees(self, at: usize, length: usize) -> bool {
        let (first, last) = self.0.pages(at, length);
        self.0.sees(first) && (first == last || self.0.sees(last))
    }
}

/// How often this thread has waited for a page to be read from a disk.
pub fn waits() -> i64 {
    system::waits()
}

fn words(count: usize) -> std::io::Result<Vec<Word>> {
    let mut words = Vec::new();
    words.try_reserve_exact(count)?;
    words.resize_with(count, Word::default);
    Ok(words)
}

impl Shared {
    #[inline]
    fn pages(&self, at: usize, length: usize) -> (usize, usize) {
        (at >> self.page_bits, at.saturating_add(length.max(1) - 1) >> self.page_bits)
    }

    /// What lies beyond the file is not read, whoever asks for it.
    #[inline]
    fn sees(&self, page: usize) -> bool {
        let Some(word) = self.words.get(page / WORD) else { return true };
        word.resident.load(Relaxed) >> (page % WORD) & 1 == 1 || self.looks(page)
    }

    #[inline]
    fn has(&self, page: usize) -> bool {
        let there = self.sees(page);
        if !there {
            self.ask(page);
        }
        there
    }

    /// Has the system tell of a word that nothing is known of.
    #[cold]
    fn looks(&self, page: usize) -> bool {
        let word = &self.words[page / WORD];
        if !word.known.load(Relaxed) {
            let first = page / WORD * WORD;
            self.look(first..first + WORD, &mut [0; WORD]);
        }
        word.resident.load(Relaxed) >> (page % WORD) & 1 == 1
    }

    /// Asks the system about whole words, into `found`, and returns how many pages it has dropped.
    fn look(&self, pages: Range<usize>, found: &mut [u8]) -> usize {
        let found = &mut found[..pages.len()];
        let told =
            self.map.as_ref().is_some_and(|map| system::resident(map, pages.start << self.page_bits, found));
        let mut dropped = 0;
        for (word, found) in self.words[pages.start / WORD..].iter().zip(found.chunks(WORD)) {
            let bits = found.iter().rev().fold(0, |bits, page| bits << 1 | u64::from(page & 1));
            // all are there as far as anybody can tell
            let bits = if told { bits } else { u64::MAX };
            let before = word.resident.swap(bits, Relaxed);
            word.known.store(true, Relaxed);
            dropped += (before & !bits).count_ones() as usize;
        }
        dropped
    }

    #[cold]
    fn ask(&self, page: usize) {
        let slot = self.next.fetch_add(1, Relaxed) % RING;
        self.ring[slot].store(page as u64 + 1, Relaxed);
        if !self.missed.load(Relaxed) {
            self.missed.store(true, Relaxed);
        }
    }

    /// Sees that a thread of this process reads what was asked for. One that cannot be started is tried for again.
    #[cold]
    fn start(this: &Arc<Self>) {
        let process = std::process::id();
        let reader = this.reader.load(Relaxed);
        if this.map.is_none()
            || reader == process
            || this.reader.compare_exchange(reader, process, Relaxed, Relaxed).is_err()
        {
            return;
        }
        let shared = Arc::downgrade(this);
        let thread = thread::Builder::new().name("sssd-pages".into());
        if !sssd_core::room_for_a_thread() || thread.spawn(move || work(&shared)).is_err() {
            this.reader.store(0, Relaxed);
        }
    }

    /// Has the pages read that were asked for, and returns how many.
    fn read(&self, pages: &mut Vec<usize>) -> usize {
        self.missed.store(false, Relaxed);
        let asked = self.ring.iter().filter(|slot| slot.load(Relaxed) != 0);
        pages.clear();
        pages.extend(asked.filter_map(|slot| (slot.swap(0, Relaxed) as usize).checked_sub(1)));
        pages.sort_unstable();
        pages.dedup();
        let Some(map) = &self.map else { return 0 };
        let places = || pages.iter().map(|page| (page, page << self.page_bits));
        // all of them are on their way before the first is waited for
        places().for_each(|(_, at)| system::fetch(map, at, 1 << self.page_bits));
        for (page, at) in places() {
            let Some(word) = self.words.get(page / WORD) else { continue };
            if system::populate(map, at, 1 << self.page_bits) {
                word.resident.fetch_or(1 << (page % WORD), Relaxed);
            } else {
                word.known.store(false, Relaxed);
            }
        }
        pages.len()
    }

    /// Asks the system about everything that is known, and returns whether it has dropped much.
    fn sweep(&self, found: &mut [u8]) -> bool {
        let (mut dropped, mut known) = (0, 0);
        let is_known = |word: &Word| word.known.load(Relaxed);
        for (index, words) in self.words.chunks(STRETCH / WORD).enumerate() {
            // in stretches, for a call takes a while to begin
            if words.iter().any(is_known) {
                let first = index * STRETCH;
                dropped += self.look(first..first + words.len() * WORD, found);
                known += words.len() * WORD;
            }
        }
        dropped > known / MUCH
    }
}

/// The thread that reads what look-ups have missed.
fn work(shared: &Weak<Shared>) {
    let (mut pages, mut found) = (Vec::new(), vec![0; STRETCH]);
    pages.reserve_exact(RING);
    let mut preferred = shared.upgrade().map(|shared| pieces(&shared)).unwrap_or_default().into_iter();
    let (mut used, mut swept, mut interval, mut wait) = (Instant::now(), Instant::now(), SWEEPS.start, SOON);
    let mut took = Duration::ZERO;
    // a store that is gone takes the map with it, unless something is read just now
    while let Some(shared) = shared.upgrade() {
        if shared.reader.load(Relaxed) != std::process::id() {
            return;
        }
        wait = if shared.read(&mut pages) > 0 { SOON } else { LATER.min(2 * wait) };
        if let (Some(piece), Some(map)) = (preferred.next(), &shared.map) {
            system::fetch(map, piece.start, piece.len());
            system::populate(map, piece.start, piece.len());
            let first = piece.start >> shared.page_bits;
            shared.look(
                first / WORD * WORD..(piece.end >> shared.page_bits).next_multiple_of(WORD),
                &mut found,
            );
            continue;
        }
        if shared.used.swap(false, Relaxed) {
            used = Instant::now();
        } else if used.elapsed() > IDLE {
            shared.reader.store(0, Relaxed);
            return;
        }
        let [soon, later] = SWEEP_SHARES.map(|share| share * took);
        let suspect = shared.suspect.load(Relaxed) && swept.elapsed() > soon;
        if suspect || swept.elapsed() > interval.max(later) {
            shared.suspect.store(false, Relaxed);
            let began = Instant::now();
            let much = shared.sweep(&mut found);
            interval = if much { interval / 2 } else { 2 * interval }.clamp(SWEEPS.start, SWEEPS.end);
            swept = Instant::now();
            took = began.elapsed();
        }
        drop(shared);
        thread::sleep(wait);
    }
}

/// What is preferred, in pieces of at most half a stretch of whole pages.
fn pieces(shared: &Shared) -> Vec<Range<usize>> {
    let (page, length) = (1 << shared.page_bits, (shared.words.len() * WORD) << shared.page_bits);
    let piece = STRETCH / 2 * page;
    let whole =
        |range: &Range<usize>| range.start / page * page..range.end.next_multiple_of(page).min(length);
    let cut = |range: Range<usize>| {
        let starts = range.clone().step_by(piece);
        starts.map(move |start| start..(start + piece).min(range.end))
    };
    shared.preferred.iter().map(whole).flat_map(cut).collect()
}

/// What the system is asked, of ranges that start with a page. What lies beyond the map is left out.
#[cfg(target_os = "linux")]
mod system {
    use memmap2::{Advice, Mmap};

    pub fn page_size() -> usize {
        // SAFETY: reads a constant of the system.
        let size = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) });
        size.ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
    }

    /// Whether each page is in memory, in its lowest bit; false if nobody knows.
    pub fn resident(map: &Mmap, at: usize, found: &mut [u8]) -> bool {
        let length = (found.len() * page_size()).min(map.len().saturating_sub(at));
        found.fill(0);
        let start = map.as_ptr().wrapping_add(at).cast_mut().cast();
        // SAFETY: the range lies in the map, and `found` has a byte for each of its pages.
        length == 0 || unsafe { libc::mincore(start, length, found.as_mut_ptr().cast()) } == 0
    }

    pub fn waits() -> i64 {
        // SAFETY: numbers may be zero.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the system fills in what is passed.
        unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
        usage.ru_majflt
    }

    /// Has pages read, and does not wait for it.
    pub fn fetch(map: &Mmap, at: usize, length: usize) {
        advise(map, at, length, Advice::WillNeed);
    }

    /// Waits until pages are there; whether they are.
    pub fn populate(map: &Mmap, at: usize, length: usize) -> bool {
        advise(map, at, length, Advice::PopulateRead)
    }

    fn advise(map: &Mmap, at: usize, length: usize, advice: Advice) -> bool {
        let length = length.min(map.len().saturating_sub(at));
        length > 0 && map.advise_range(advice, at, length).is_ok()
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use memmap2::Mmap;

    pub fn page_size() -> usize {
        4096
    }

    pub fn resident(_: &Mmap, _: usize, _: &mut [u8]) -> bool {
        false
    }

    pub fn waits() -> i64 {
        0
    }

    pub fn fetch(_: &Mmap, _: usize, _: usize) {}

    pub fn populate(_: &Mmap, _: usize, _: usize) -> bool {
        true
    }
}
