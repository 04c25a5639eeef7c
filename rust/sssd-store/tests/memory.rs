//! Allocations that fail, one after the other, and how much a builder allocates at most.
//!
//! Allocations of less than 1 KiB succeed: those of std and of other crates (paths, threads, errors) abort the process
//! when they fail. What the sorter allocates in C is not seen here (`tests/datastore/test_memory.py`).

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;
use sssd_core::Corpus;
use sssd_store::{BuildOptions, Builder, Datastore, Error, Load, Progress, Result, write_tombstones};

const LARGE: usize = 1024;

struct Failing;

thread_local! {
    /// Large allocations of this thread until one fails.
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
    /// Bytes that this thread has allocated and not given back, and the most there were.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}
/// Large allocations that failed.
static FAILED: AtomicUsize = AtomicUsize::new(0);

fn refused(size: usize) -> bool {
    let Ok(left) = LEFT.try_with(Cell::get) else { return false };
    if size < LARGE || left == usize::MAX {
        return false;
    }
    LEFT.set(left.saturating_sub(1));
    FAILED.fetch_add(usize::from(left == 0), Ordering::Relaxed);
    left == 0
}

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        let now = held.get().0 + bytes;
        held.set((now, held.get().1.max(now)));
    });
}

// SAFETY: it is the system's allocator, or says that there is no memory.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if refused(layout.size()) {
            return std::ptr::null_mut();
        }
        count(layout.size() as isize);
        // SAFETY: as this function is called.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as this function is called.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if refused(size) {
            return std::ptr::null_mut();
        }
        count(size as isize - layout.size() as isize);
        // SAFETY: as this function is called.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Failing = Failing;

/// Everything that a store is used for.
fn life(path: &Path, others: &Path, stream: &[u32]) -> Result<()> {
    let options = BuildOptions { deduplicate: true, max_memory: Some(12 << 20), ..BuildOptions::new(2000) };
    let mut builder = Builder::create(path, options)?;
    for document in stream[..20_000].chunks(50) {
        builder.add_document(document)?;
    }
    builder.add_document(&stream[..90_000])?;
    for piece in stream.chunks(9_000) {
        builder.add_stream(piece, 1999)?;
    }
    let summary = builder.finish(&Progress::default())?;
    assert!(summary.segments > 1);
    live(&Arc::new(Datastore::open(&[path], Load::Mmap)?), path, others)?;
    for load in [Load::Mmap, Load::Ram] {
        let store = Datastore::open(&[path, path], load)?;
        store.verify()?;
        store.count(&stream[..5000])?;
        for position in store.occurrences(&stream[..1], 10_000)? {
            store.continuation(position, &mut [0; 4]);
        }
        let (mut matches, mut successors) = (Vec::new(), Vec::new());
        store.matches(&stream[..8], 8, 64, &mut matches);
        store.successors(stream[0], &mut successors);
    }
    Ok(())
}

/// Some documents die, and the rest goes into another store.
fn live(store: &Arc<Datastore>, path: &Path, others: &Path) -> Result<()> {
    let dead: SmallVec<[bool; 1024]> = (0..store.documents()).map(|document| document % 3 == 0).collect();
    let (tombstones, progress) = (others.join("dead"), Progress::default());
    write_tombstones(store, &dead, &tombstones, &progress)?;
    let mut store = Datastore::open(&[path], Load::Mmap)?;
    store.add_tombstones(0, &tombstones, &progress)?;
    store.count(&[1])?;
    let mut chosen: SmallVec<[bool; 1024]> = dead.iter().map(|_| true).collect();
    let mut builder = Builder::create(&others.join("merged"), BuildOptions::new(2000))?;
    builder.add_datastore(&Arc::new(Datastore::union([&store])?), &mut chosen)?;
    builder.finish(&progress).map(drop)
}

fn stream(length: u32) -> Vec<u32> {
    (0..length).map(|index| (index ^ index >> 7).wrapping_mul(2_654_435_761) >> 8 & 0x3ff).collect()
}

#[test]
fn an_allocation_that_fails_is_an_error_and_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let (path, stream) = (folder.path().join("store"), stream(200_000));
    let others = tempfile::tempdir().unwrap();
    life(&path, others.path(), &stream).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let (mut errors, mut survived) = (0, 0);
    for allowed in 0.. {
        FAILED.store(0, Ordering::Relaxed);
        LEFT.set(allowed);
        let result = life(&path, others.path(), &stream);
        LEFT.set(usize::MAX);
        match result {
            Err(Error::OutOfMemory(_)) => errors += 1,
            Err(error) => panic!("allocation {allowed}: {error}"),
            // drafts go without
            Ok(()) if FAILED.load(Ordering::Relaxed) > 0 => survived += 1,
            Ok(()) => break,
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "allocation {allowed} left a file");
        assert!(std::fs::read(&path).unwrap() == whole, "allocation {allowed} tore the file");
    }
    println!("{errors} errors, {survived} without");
    assert!(errors > 30 && survived > 0);
}

#[test]
fn max_memory_holds() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(6_000_000);
    for limit in [24 << 20, 48 << 20] {
        let options = BuildOptions { max_memory: Some(limit), ..BuildOptions::new(1024) };
        let (before, _) = HELD.get();
        HELD.set((before, before));
        let mut builder = Builder::create(&folder.path().join("store"), options).unwrap();
        for piece in stream.chunks(5_000) {
            builder.add_document(piece).unwrap();
        }
        let summary = builder.finish(&Progress::default()).unwrap();
        let peak = (HELD.get().1 - before) as u64;
        println!("{limit} allowed, {peak} taken, {} segments", summary.segments);
        // another segment has room beside it; a limit that is not used would make segments that are too small
        let half = limit / 2 + (8 << 20);
        assert!(peak <= half && peak > limit / 3, "{peak} of {limit}");
    }
}
