//! Arrays that grow without moving what they hold, so that others can read meanwhile.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::Zeroable;

use crate::memory::{MemoryFull, Reservation};

/// Items of the first segment; each further one is as long as all before it together.
const FIRST: usize = 1 << FIRST_BITS;
const FIRST_BITS: u32 = 8;
const SEGMENTS: usize = 24;
/// Bytes of a page of the system, or part of one.
const PAGE: usize = 4096;

/// Items that are zero at first, at most `most` of them. Pages of the system that nobody has written to cost nothing.
pub struct Segments<T> {
    segments: [OnceLock<Box<[T]>>; SEGMENTS],
    len: AtomicUsize,
    most: usize,
}

impl<T: Zeroable> Segments<T> {
    pub fn new(most: usize) -> Self {
        let most = most.min(FIRST << (SEGMENTS - 1));
        Self { segments: [const { OnceLock::new() }; SEGMENTS], len: AtomicUsize::new(0), most }
    }

    /// Items that are there.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    pub fn memory_bytes(&self) -> usize {
        self.len() * size_of::<T>()
    }

    /// Has at least `len` items there, or as many as there may be. Calls must not overlap.
    pub fn grow(&self, len: usize, paid: &mut Reservation) -> Result<(), MemoryFull> {
        self.grow_with(len, paid, |_| {})
    }

    /// The same, with every page of it in memory: who writes to them later does not wait for the system.
    pub fn grow_resident(&self, len: usize, paid: &mut Reservation) -> Result<(), MemoryFull> {
        self.grow_with(len, paid, |items| {
            // or the compiler would see that they are zero already
            let items = std::hint::black_box(items);
            items.iter_mut().step_by(PAGE / size_of::<T>()).for_each(|item| *item = T::zeroed());
        })
    }

    fn grow_with(
        &self,
        len: usize,
        paid: &mut Reservation,
        prepare: impl Fn(&mut [T]),
    ) -> Result<(), MemoryFull> {
        while self.len() < len.min(self.most) {
            let (held, (segment, _)) = (self.len(), place(self.len()));
            let more = held.max(FIRST).min(self.most - held);
            let wanted = more * size_of::<T>();
            paid.try_resize(paid.bytes() + wanted)?;
            let Ok(mut items) = bytemuck::try_zeroed_slice_box(more) else {
                let _ = paid.try_resize(paid.bytes() - wanted);
                return Err(MemoryFull::System { wanted });
            };
            prepare(&mut items);
            let _ = self.segments[segment].set(items);
            self.len.store(held + more, Ordering::Release);
        }
        Ok(())
    }

    /// The item at `at`, if it is there.
    pub fn get(&self, at: usize) -> Option<&T> {
        let (segment, offset) = place(at);
        self.segments.get(segment)?.get()?.get(offset)
    }

    /// The same, to write to.
    pub fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        let (segment, offset) = place(at);
        self.segments.get_mut(segment)?.get_mut()?.get_mut(offset)
    }

    /// `count` items from `at` on, which lie in one segment if both are multiples of a power of two up to `FIRST`.
    pub fn slice(&self, at: usize, count: usize) -> Option<&[T]> {
        let (segment, offset) = place(at);
        self.segments.get(segment)?.get()?.get(offset..offset + count)
    }
}

/// The segment of an item, and where it is there.
fn place(at: usize) -> (usize, usize) {
    match (at >> FIRST_BITS).checked_ilog2() {
        None => (0, at),
        Some(doublings) => (doublings as usize + 1, at - (FIRST << doublings)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::MemoryPool;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn items_stay_where_they_are(most in 0usize..9000, lengths in prop::collection::vec(0usize..10_000, 1..6)) {
            let pool = Arc::new(MemoryPool::new(usize::MAX));
            let (mut items, mut paid) = (Segments::<u32>::new(most), Reservation::new(&pool, usize::MAX));
            for length in lengths {
                let before = items.len();
                items.grow(length, &mut paid).unwrap();
                prop_assert!(items.len() >= length.min(most) && items.len() <= most);
                prop_assert_eq!(pool.used(), items.memory_bytes());
                for at in before..items.len() {
                    prop_assert_eq!(items.get(at), Some(&0));
                    *items.get_mut(at).unwrap() = at as u32;
                }
            }
            for at in 0..items.len() {
                prop_assert_eq!(items.get(at), Some(&(at as u32)));
            }
            prop_assert_eq!(items.get(items.len()), None);
            for at in (0..items.len() / 32 * 32).step_by(32) {
                prop_assert_eq!(items.slice(at, 32).map(|slice| slice[31]), Some(at as u32 + 31));
            }
        }
    }

    #[test]
    fn a_full_memory_leaves_what_is_there() {
        let pool = Arc::new(MemoryPool::new(10_000));
        let (items, mut paid) = (Segments::<u32>::new(1 << 20), Reservation::new(&pool, usize::MAX));
        paid.admit();
        assert!(items.grow(5000, &mut paid).is_err());
        assert_eq!((items.len(), pool.used()), (2048, 8192));
    }
}
