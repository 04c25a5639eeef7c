//! A request's weights: those it started from, and the words of them that it has changed. A request changes a few
//! hundred words of the tables, so that it holds some kilobytes in place of a copy.
//!
//! The words are in pages, and the changed ones of a page one beside the other, in their order. A page has a bit for each
//! of its words, and for each eight of these how many of the page come before: where a word is takes a few reads,
//! however many have changed, and four bytes are spent on it and hardly one more.

use std::sync::Arc;

use crate::memory::{MemoryFull, Reservation, try_clone, try_reserve};
use crate::predictor::support::KINDS;
use crate::predictor::weights::{
    EscapeCell, GateCell, Model, Rate, WORDS, Weights, ages_word, refinement_word, scale,
};

/// Words of a page, in bytes of bits, and pages.
const BYTES: usize = 16;
const PAGE: usize = 8 * BYTES;
const PAGES: usize = WORDS.div_ceil(PAGE);
/// In place of a page: none of its words has changed.
const NO_PAGE: u8 = u8::MAX;
const _: () = assert!(PAGES <= NO_PAGE as usize);
/// How many bits are set.
const ONES: [u8; 256] = {
    let mut ones = [0; 256];
    let mut bits = 0;
    while bits < 256 {
        ones[bits] = bits.count_ones() as u8;
        bits += 1;
    }
    ones
};
/// By how much arrays grow.
const MORE_PAGES: usize = 8;
const MORE_WORDS: usize = 64;

/// How many outcomes a cell remembers, rates of learning, and limits of what is learned.
const ESCAPE_MEMORY: u16 = 60;
const REFINEMENT_MEMORY: u16 = 255;
const GATE_RATE: f32 = 0.02;
const GATE_LIMIT: f32 = 8.0;
const AGE_RATE: f32 = 0.01;
const AGE_LIMIT: f32 = 2.0;

/// The changed words of a page.
#[derive(Clone, Copy)]
struct Page {
    /// Where the first of them is.
    start: u16,
    changed: [u8; BYTES],
    /// How many come before each eight words.
    before: [u8; BYTES],
}

const UNCHANGED: Page = Page { start: 0, changed: [0; BYTES], before: [0; BYTES] };

impl Page {
    /// Whether the word at `at` has changed, and the next one of the same eight.
    #[inline]
    fn changed(&self, at: usize) -> [bool; 2] {
        let bits = self.changed[at / 8] >> (at % 8);
        [bits & 1 != 0, bits & 2 != 0]
    }

    /// Where the word at `at` is, or would be.
    #[inline]
    fn place(&self, at: usize) -> usize {
        let before = self.changed[at / 8] & ((1 << (at % 8)) - 1);
        usize::from(self.start) + usize::from(self.before[at / 8] + ONES[usize::from(before)])
    }
}

/// The weights of a request.
pub struct Overlay {
    base: Arc<Weights>,
    /// Where each page is in `held`, in which they are in the order in which they came; so are their words in `words`.
    pages: [u8; PAGES],
    held: Vec<Page>,
    words: Vec<u32>,
    /// Of a fork: the words that it began with. What was learned up to there is another's to hand on.
    inherited: Vec<(u16, u32)>,
    paid: Reservation,
}

impl Overlay {
    /// These weights, without changes. `paid` pays for those to come.
    pub fn new(base: Arc<Weights>, mut paid: Reservation) -> Self {
        paid.admit();
        Self {
            base,
            pages: [NO_PAGE; PAGES],
            held: Vec::new(),
            words: Vec::new(),
            inherited: Vec::new(),
            paid,
        }
    }

    /// The same weights for a fork, which hands on only what it changes itself.
    pub fn fork(&self, mut paid: Reservation) -> Result<Self, MemoryFull> {
        let inherited = self.words.len() * size_of::<(u16, u32)>();
        paid.try_resize(inherited + size_of_val(&*self.held) + size_of_val(&*self.words))?;
        let mut fork = Self::new(Arc::clone(&self.base), paid);
        fork.pages = self.pages;
        (fork.held, fork.words) = (try_clone(&self.held)?, try_clone(&self.words)?);
        try_reserve(&mut fork.inherited, self.words.len())?;
        fork.inherited.extend(self.changes());
        Ok(fork)
    }

    /// The probability that the next token is none of the successors seen in such contexts.
    pub fn escape(&self, cell: EscapeCell) -> f32 {
        Rate::from_word(self.get(cell.word())).get()
    }

    pub fn learn_escape(&mut self, cell: EscapeCell, escaped: bool) {
        self.update(cell.word(), escaped, ESCAPE_MEMORY);
    }

    /// The logarithm of a source's weight, up to a constant.
    pub fn gate(&self, cell: GateCell) -> f32 {
        f32::from_bits(self.get(cell.word()))
    }

    /// Moves the weight by the difference between posterior and prior share of the source.
    pub fn learn_gate(&mut self, cell: GateCell, gradient: f32) {
        self.change(cell.word(), |word| {
            let gate = f32::from_bits(word) + GATE_RATE * gradient;
            gate.clamp(-GATE_LIMIT, GATE_LIMIT).to_bits()
        });
    }

    /// The probability of a token that the mixture gives `mixed` and whose support has this row.
    #[inline]
    pub fn refine(&self, row: usize, mixed: f32) -> f32 {
        let scale = scale(mixed);
        let step = usize::from(scale as u8);
        let above = scale - step as f32;
        let [low, high] = self.pair(refinement_word(row, step)).map(|word| Rate::from_word(word).get());
        low * (1.0 - above) + high * above
    }

    pub fn learn_refinement(&mut self, row: usize, mixed: f32, came_true: bool) {
        let step = usize::from((scale(mixed) + 0.5) as u8);
        self.update(refinement_word(row, step), came_true, REFINEMENT_MEMORY);
    }

    /// The biases of an output of `tokens` tokens, by kind of evidence.
    pub fn ages(&self, tokens: usize) -> [f32; KINDS] {
        std::array::from_fn(|kind| f32::from_bits(self.get(ages_word(tokens) + kind)))
    }

    pub fn learn_age(&mut self, tokens: usize, kind: usize, gradient: f32) {
        self.change(ages_word(tokens) + kind, |word| {
            let bias = f32::from_bits(word) + AGE_RATE * gradient;
            bias.clamp(-AGE_LIMIT, AGE_LIMIT).to_bits()
        });
    }

    fn update(&mut self, word: usize, outcome: bool, memory: u16) {
        self.change(word, |word| {
            let mut rate = Rate::from_word(word);
            rate.update(outcome, memory);
            rate.to_word()
        });
    }

    #[inline]
    fn get(&self, word: usize) -> u32 {
        self.find(word).map_or_else(|| self.base.words()[word], |at| self.words[at])
    }

    /// A word and the next: most are of the same eight, and most of these have not changed.
    #[inline]
    fn pair(&self, word: usize) -> [u32; 2] {
        let base = self.base.words();
        let at = word % 8;
        if at == 7 {
            return [self.get(word), self.get(word + 1)];
        }
        let changed = self.page(word).map(|page| (page, page.changed(word % PAGE)));
        let Some((page, [low, high])) = changed.filter(|&(_, [low, high])| low || high) else {
            return [base[word], base[word + 1]];
        };
        let first = page.place(word % PAGE);
        [
            if low { self.words[first] } else { base[word] },
            if high { self.words[first + usize::from(low)] } else { base[word + 1] },
        ]
    }

    /// The page of a word, if any word of it has changed.
    #[inline]
    fn page(&self, word: usize) -> Option<&Page> {
        self.held.get(usize::from(self.pages[word / PAGE]))
    }

    /// Where a word is, if it has changed.
    #[inline]
    fn find(&self, word: usize) -> Option<usize> {
        let page = self.page(word)?;
        page.changed(word % PAGE)[0].then(|| page.place(word % PAGE))
    }

    /// Lets `act` change a word.
    #[inline]
    fn change(&mut self, word: usize, act: impl FnOnce(u32) -> u32) {
        if let Some(at) = self.find(word) {
            self.words[at] = act(self.words[at]);
            return;
        }
        let before = self.base.words()[word];
        let after = act(before);
        // what there is no memory for is not learned
        if after != before && self.make_room().is_ok() {
            self.insert(word, after);
        }
    }

    /// Adds a word, for which there is room.
    fn insert(&mut self, word: usize, value: u32) {
        let own = &mut self.pages[word / PAGE];
        if *own == NO_PAGE {
            *own = self.held.len() as u8;
            self.held.push(Page { start: self.words.len() as u16, ..UNCHANGED });
        }
        let (own, at) = (usize::from(*own), word % PAGE);
        let page = &mut self.held[own];
        let place = page.place(at);
        page.changed[at / 8] |= 1 << (at % 8);
        page.before[at / 8 + 1..].iter_mut().for_each(|before| *before += 1);
        self.held[own + 1..].iter_mut().for_each(|later| later.start += 1);
        self.words.insert(place, value);
    }

    /// Pays for, and makes, room for one word on a page of its own.
    fn make_room(&mut self) -> Result<(), MemoryFull> {
        let more = |len, capacity, step| if len == capacity { step } else { 0 };
        let pages = more(self.held.len(), self.held.capacity(), MORE_PAGES);
        let words = more(self.words.len(), self.words.capacity(), MORE_WORDS);
        if pages + words == 0 {
            return Ok(());
        }
        let bytes = pages * size_of::<Page>() + words * size_of::<u32>();
        self.paid.try_resize(self.memory_bytes() + bytes)?;
        let made = try_reserve(&mut self.held, pages).and_then(|()| try_reserve(&mut self.words, words));
        self.paid.try_resize(self.memory_bytes())?;
        made
    }

    /// The changed words and their values, in order.
    fn changes(&self) -> impl Iterator<Item = (u16, u32)> + '_ {
        let pages = (0..WORDS).step_by(PAGE).filter_map(|first| Some((first, self.page(first)?)));
        pages.flat_map(move |(first, page)| {
            let changed = (0..PAGE).filter(|&at| page.changed(at)[0]);
            changed.map(move |at| ((first + at) as u16, self.words[page.place(at)]))
        })
    }

    /// Whether there is something to hand on.
    pub fn has_learned(&self) -> bool {
        !self.changes().eq(self.inherited.iter().copied())
    }

    /// Moves `model` towards what has changed, by a quarter of the way.
    pub fn merge_into(&self, model: &mut Model) {
        let mut inherited = self.inherited.iter().copied().peekable();
        for (word, after) in self.changes() {
            let at = usize::from(word);
            let before =
                inherited.next_if(|held| held.0 == word).map_or(self.base.words()[at], |held| held.1);
            model.approach(at, before, after);
        }
    }

    /// A copy of the tables as they are for this request.
    pub fn to_model(&self) -> Result<Model, MemoryFull> {
        let mut model = self.base.try_clone()?;
        for (word, value) in self.changes() {
            model.words_mut()[usize::from(word)] = value;
        }
        Ok(model)
    }

    /// Bytes of what has changed, which are paid for.
    pub fn memory_bytes(&self) -> usize {
        fn bytes<T>(items: &Vec<T>) -> usize {
            items.capacity() * size_of::<T>()
        }
        bytes(&self.held) + bytes(&self.words) + bytes(&self.inherited)
    }
}

#[cfg(test)]
pub mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::memory::MemoryPool;
    use crate::predictor::weights::PROBABILITIES;
    use crate::sources::STORE;
    use proptest::prelude::*;

    /// The weights that ship, within a limit of bytes.
    pub fn shipped(limit: usize) -> Overlay {
        Overlay::new(Weights::shipped(), Reservation::new(&Arc::new(MemoryPool::new(limit)), usize::MAX))
    }

    proptest! {
        /// Changed words are those of a map, whatever the order; forks go their own way and hand on only that.
        #[test]
        fn words_are_those_of_a_map(
            before in prop::collection::vec((0..WORDS, 0u32..9), 0..300),
            after in prop::collection::vec((0..WORDS, 0u32..9), 0..300),
            few: bool,
        ) {
            let near = |word: usize| if few { word % 70 + 100 } else { word };
            let (mut overlay, mut map) = (shipped(usize::MAX), BTreeMap::new());
            let base = Weights::shipped();
            let fill = |overlay: &mut Overlay, words: &[(usize, u32)], map: &mut BTreeMap<usize, u32>| {
                for &(word, value) in words {
                    overlay.change(near(word), |_| value);
                    map.insert(near(word), value);
                }
            };
            fill(&mut overlay, &before, &mut map);
            let mut fork = overlay.fork(overlay.paid.new_empty()).unwrap();
            prop_assert!(!fork.has_learned());
            let at_fork = map.clone();
            fill(&mut fork, &after, &mut map);
            for (overlay, map) in [(&overlay, &at_fork), (&fork, &map)] {
                let expected = |word| map.get(&word).copied().unwrap_or(base.words()[word]);
                prop_assert!((0..WORDS).all(|word| overlay.get(word) == expected(word)));
                prop_assert!((1..WORDS).all(|word| overlay.pair(word - 1) == [word - 1, word].map(expected)));
                prop_assert!(overlay.to_model().unwrap().words().iter().copied().eq((0..WORDS).map(expected)));
                prop_assert_eq!(overlay.paid.bytes(), overlay.memory_bytes());
            }
            let (mut one, mut two) = (Model::default(), Model::default());
            fork.merge_into(&mut one);
            for (&word, &value) in &map {
                two.approach(word, at_fork.get(&word).copied().unwrap_or(base.words()[word]), value);
            }
            prop_assert!(one == two);
        }
    }

    #[test]
    fn what_there_is_no_memory_for_is_not_learned() {
        let mut overlay = shipped(1000);
        (0..WORDS).for_each(|word| overlay.change(word, |_| 7));
        let held = overlay.words.len();
        assert!((100..300).contains(&held) && overlay.memory_bytes() <= 1000, "{held}");
        assert_eq!((overlay.get(held - 1), overlay.get(held)), (7, Model::default().words()[held]));
        assert_eq!(shipped(0).memory_bytes(), 0);
    }

    #[test]
    fn refinements_are_interpolated_and_learned_at_the_nearest_step() {
        let mut overlay = shipped(usize::MAX);
        let word = |step| refinement_word(0, step);
        (0..PROBABILITIES).for_each(|step| overlay.change(word(step), |_| 0));
        let step = scale(0.3) as usize;
        overlay.change(word(step + 1), |_| Rate::new(0.5, 100).to_word());
        assert!((overlay.refine(0, 0.3) - 0.5 * (scale(0.3) - step as f32)).abs() < 1e-6);
        overlay.learn_refinement(0, 0.5, true);
        let count = |at: &usize| Rate::from_word(overlay.get(word(*at))).count == 1;
        assert_eq!((0..PROBABILITIES).filter(count).collect::<Vec<_>>(), [9]);
    }

    #[test]
    fn gates_and_ages_go_the_way_of_the_gradient_and_stay_within_their_limits() {
        let mut overlay = shipped(usize::MAX);
        let cell = Model::gate_cell(STORE, 3, 0.5);
        let before = overlay.gate(cell);
        overlay.learn_gate(cell, 0.5);
        assert!((overlay.gate(cell) - before - 0.01).abs() < 1e-6);
        (0..10_000).for_each(|_| overlay.learn_gate(cell, -1.0));
        assert_eq!(overlay.gate(cell), -GATE_LIMIT);
        let before = overlay.ages(70)[3];
        overlay.learn_age(127, 3, 1.0);
        assert!((overlay.ages(64)[3] - before - AGE_RATE).abs() < 1e-6);
        (0..1000).for_each(|_| overlay.learn_age(64, 3, 1.0));
        assert_eq!(overlay.ages(64)[3], AGE_LIMIT);
    }
}
