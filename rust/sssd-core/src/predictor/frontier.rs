//! The candidates that may still become nodes: a heap that forgets those that cannot.

use std::collections::BinaryHeap;

/// A max-heap of candidates by path probability. Equal probabilities leave in the order they came.
#[derive(Clone, Default)]
pub struct Frontier {
    heap: BinaryHeap<u64>,
    /// How many candidates can still leave.
    room: usize,
    /// Candidates below this probability will never leave.
    floor: f32,
}

impl Frontier {
    pub fn memory_bytes(&self) -> usize {
        self.heap.capacity() * size_of::<u64>()
    }

    /// Empties the frontier. At most `room` candidates will leave, none below `floor`.
    pub fn reset(&mut self, room: usize, floor: f32) {
        self.heap.clear();
        self.room = room;
        self.floor = floor;
    }

    pub fn push(&mut self, candidate: u32, probability: f32) {
        if probability < self.floor {
            return;
        }
        // the bits of non-negative floats are ordered like the floats
        self.heap.push(u64::from(probability.to_bits()) << 32 | u64::from(!candidate));
        if self.heap.len() >= 2 * self.room + 32 {
            self.trim();
        }
    }

    pub fn pop(&mut self) -> Option<u32> {
        let key = self.heap.pop()?;
        self.room = self.room.saturating_sub(1);
        Some(!(key as u32))
    }

    /// Keeps the best `room` candidates and raises the floor to the last of them.
    fn trim(&mut self) {
        let mut keys = std::mem::take(&mut self.heap).into_vec();
        if let Some(last) = self.room.checked_sub(1) {
            let (_, &mut key, _) = keys.select_nth_unstable_by(last, |a, b| b.cmp(a));
            self.floor = self.floor.max(f32::from_bits((key >> 32) as u32));
        }
        keys.truncate(self.room);
        self.heap = keys.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn leaves_the_best_in_order(values in prop::collection::vec(0u8..50, 0..400), room in 0usize..80) {
            let mut frontier = Frontier::default();
            frontier.reset(room, 0.0);
            for (candidate, &value) in values.iter().enumerate() {
                frontier.push(candidate as u32, f32::from(value) / 50.0);
            }
            let mut expected: Vec<_> = (0..values.len() as u32).collect();
            expected.sort_by_key(|&candidate| (std::cmp::Reverse(values[candidate as usize]), candidate));
            expected.truncate(room);
            let left: Vec<_> = (0..room).map_while(|_| frontier.pop()).collect();
            prop_assert_eq!(left, expected);
        }
    }
}
