//! Which documents of a datastore file are dead, and what a look-up needs to pass them over: a file of its own, read into
//! memory and checked whole when the store is opened. `docs/format.md` describes the bytes.
//!
//! A look-up finds the ranks of all suffixes, as without tombstones. [`Living::rank`] numbers the living ones among them,
//! so that counting and spreading samples go by those numbers alone, and [`Living::select`] finds the ranks again.

mod write;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

pub use write::write_tombstones;

use crate::bytes::{Bytes, Load, Source};
use crate::format::{BLOCK, Fields, MAX_SUCCESSORS, PAGE, symbol_bits};
use crate::packed::{Packed, bits_for, packed_len};
use crate::progress::Progress;
use crate::{Error, Result};

/// Version of the tombstones' format that this release writes and reads.
pub const TOMBSTONES_VERSION: u32 = 1;
// told from those of datastores and saved drafters by its fourth byte
const MAGIC: [u8; 8] = *b"\x89SSX\r\n\x1a\n";
const CRC_AT: usize = PAGE as usize - 4;
/// Bytes of a segment's entry in the table.
const ENTRY: u64 = 24;
/// Sections start at multiples of this: a block is one cache line.
const ALIGN: u64 = 64;
/// Ranks of a block: 8 bytes tell how many live before it, 56 which of its own do.
const RANKS: u64 = 448;
/// Living ranks between two entries of what finds them.
const STRIDE: u64 = 512;

/// What the header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Header {
    vocab_size: u32,
    store: [u8; 16],
    documents: u64,
    dead_documents: u64,
    dead_tokens: u64,
    file_length: u64,
    checksums_at: u64,
    segments: u64,
    /// Of what follows the body.
    tail_hash: u64,
}

/// Counts of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    suffixes: u64,
    living: u64,
    successors: u64,
}

/// What tombstones must agree with.
pub struct Buried<'a> {
    pub path: &'a Path,
    pub uuid: [u8; 16],
    pub vocab_size: u32,
    pub documents: u64,
    /// Of the segments with tokens.
    pub suffixes: Vec<u64>,
}

impl Header {
    fn encode(&self) -> [u8; PAGE as usize] {
        let words = [
            self.documents,
            self.dead_documents,
            self.dead_tokens,
            self.file_length,
            self.checksums_at,
            self.segments,
            self.tail_hash,
        ];
        let fields =
            MAGIC.into_iter().chain(TOMBSTONES_VERSION.to_le_bytes()).chain(self.vocab_size.to_le_bytes());
        let fields = fields.chain(self.store).chain(words.into_iter().flat_map(u64::to_le_bytes));
        let mut out = [0; PAGE as usize];
        out.iter_mut().zip(fields).for_each(|(place, byte)| *place = byte);
        let sum = crc32fast::hash(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// The header of a file of this length, if it is one for this store.
    fn decode(path: &Path, page: &[u8], length: u64, store: &Buried) -> Result<Self> {
        let corrupt = |problem: &str| Err(Error::corrupt(path, problem));
        if length < PAGE || !page.starts_with(&MAGIC) {
            return corrupt("not a file of tombstones, or a truncated one");
        }
        let mut fields = Fields(&page[MAGIC.len()..]);
        let found = fields.u32();
        if found != TOMBSTONES_VERSION {
            return Err(Error::Version { path: path.to_owned(), found, supported: TOMBSTONES_VERSION });
        }
        if page[CRC_AT..] != crc32fast::hash(&page[..CRC_AT]).to_le_bytes() {
            return corrupt("the header does not match its checksum");
        }
        let header = Self {
            vocab_size: fields.u32(),
            store: fields.array(),
            documents: fields.u64(),
            dead_documents: fields.u64(),
            dead_tokens: fields.u64(),
            file_length: fields.u64(),
            checksums_at: fields.u64(),
            segments: fields.u64(),
            tail_hash: fields.u64(),
        };
        if header.store != store.uuid {
            return Err(Error::InvalidArgument(format!(
                "{}: tombstones of another datastore than {}; open it without them, or write them for it",
                path.display(),
                store.path.display()
            )));
        }
        let segments = store.suffixes.len() as u64;
        if (header.vocab_size, header.documents, header.segments)
            != (store.vocab_size, store.documents, segments)
        {
            return corrupt("the counts are not those of its datastore");
        }
        let tail =
            header.checksums_at.checked_sub(PAGE).map(|body| body.div_ceil(BLOCK) * 8 + ENTRY * segments);
        if header.file_length != length
            || tail.and_then(|tail| header.checksums_at.checked_add(tail)) != Some(length)
        {
            return corrupt("its length is not what the header says");
        }
        Ok(header)
    }
}

impl Entry {
    fn index_bits(self) -> u32 {
        bits_for(self.successors)
    }

    /// Bytes of blocks, successor index and successors.
    fn section_lengths(self, vocab_size: u32) -> [u64; 3] {
        [
            blocks(self.suffixes) * ALIGN,
            packed_len(u64::from(vocab_size) + 1, self.index_bits()),
            packed_len(self.successors, symbol_bits(vocab_size) + 8),
        ]
    }
}

/// Blocks of a segment, so many that also the rank after the last is in one.
fn blocks(suffixes: u64) -> u64 {
    suffixes / RANKS + 1
}

/// Checked tombstones of a file.
pub struct Tombstones {
    bytes: Arc<Bytes>,
    /// A bit a document.
    documents: Range<usize>,
    pub dead_tokens: u64,
    pub dead_documents: u64,
    /// Of the segments with tokens.
    pub segments: Vec<Living>,
}

impl Tombstones {
    pub fn open(path: &Path, store: &Buried, progress: &Progress) -> Result<Self> {
        let source = Source::open(path)?;
        let mut page = [0; PAGE as usize];
        if source.len() >= PAGE {
            source.read(0, &mut page).map_err(Error::read(path))?;
        }
        // before memory is taken for it
        let header = Header::decode(path, &page, source.len(), store)?;
        if header.checksums_at > most_bytes(store) {
            return Err(Error::corrupt(path, "larger than tombstones of its datastore can be"));
        }
        Self::from_bytes(path, source.load(path, Load::Ram, progress)?, store)
    }

    pub fn from_bytes(path: &Path, bytes: Bytes, store: &Buried) -> Result<Self> {
        let bytes = Arc::new(bytes);
        let corrupt = |problem: &str| Error::corrupt(path, problem);
        let page = bytes.get(..PAGE as usize).unwrap_or_default();
        let header = Header::decode(path, page, bytes.len() as u64, store)?;
        let body_end = header.checksums_at as usize;
        let tail = &bytes[body_end..];
        if xxh3_64(tail) != header.tail_hash {
            return Err(corrupt("what follows the sections does not match its checksum"));
        }
        let (sums, table) = tail.split_at(tail.len() - (ENTRY * header.segments) as usize);
        let blocks = bytes[PAGE as usize..body_end].chunks(BLOCK as usize);
        if !blocks.zip(sums.chunks_exact(8)).all(|(block, sum)| xxh3_64(block).to_le_bytes() == sum) {
            return Err(corrupt("the sections do not match their checksums"));
        }
        let mut end = PAGE;
        let mut place = |length: u64| {
            let start = end;
            end = end.saturating_add(length.next_multiple_of(ALIGN));
            if end > header.checksums_at {
                return Err(corrupt("a section lies outside its place"));
            }
            Ok(start as usize..(start + length) as usize)
        };
        let documents = place(header.documents.div_ceil(64) * 8)?;
        let mut segments = Vec::new();
        segments.try_reserve_exact(store.suffixes.len()).map_err(Error::memory("tombstones"))?;
        for (entry, &suffixes) in table.chunks_exact(ENTRY as usize).zip(&store.suffixes) {
            let mut fields = Fields(entry);
            let [suffixes_there, living, successors] = std::array::from_fn(|_| fields.u64());
            let entry = Entry { suffixes, living, successors };
            if suffixes_there != suffixes
                || living > suffixes
                || successors > most_successors(store, suffixes)
            {
                return Err(corrupt("a segment's counts are not those of its datastore"));
            }
            let [blocks, index, list] = entry.section_lengths(store.vocab_size);
            let sections = [place(blocks)?, place(index)?, place(list)?];
            segments.push(Living::new(Arc::clone(&bytes), entry, store.vocab_size, sections, path)?);
        }
        let dead: u64 = words(&bytes[documents.clone()]).map(|word| u64::from(word.count_ones())).sum();
        let dead_tokens: u64 = segments.iter().map(|segment| segment.suffixes - segment.living).sum();
        if end != header.checksums_at || (dead, dead_tokens) != (header.dead_documents, header.dead_tokens) {
            return Err(corrupt("the parts do not add up to the counts of the header"));
        }
        let Header { dead_tokens, dead_documents, .. } = header;
        Ok(Self { bytes, documents, dead_tokens, dead_documents, segments })
    }

    /// The bytes of the header: equal for equal tombstones.
    pub fn header(&self) -> &[u8] {
        &self.bytes[..PAGE as usize]
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether a document of the file is dead.
    pub fn is_dead(&self, document: u64) -> bool {
        let byte = self.bytes[self.documents.clone()].get((document / 8) as usize);
        byte.is_some_and(|byte| byte >> (document % 8) & 1 == 1)
    }
}

/// Bytes up to the end of the sections that tombstones can take.
fn most_bytes(store: &Buried) -> u64 {
    let sections = store.suffixes.iter().flat_map(|&suffixes| {
        let successors = most_successors(store, suffixes);
        Entry { suffixes, living: suffixes, successors }.section_lengths(store.vocab_size)
    });
    PAGE + (store.documents / 8 + 2 * ALIGN) + sections.map(|length| length + ALIGN).sum::<u64>()
}

fn most_successors(store: &Buried, suffixes: u64) -> u64 {
    suffixes.min(u64::from(store.vocab_size) * MAX_SUCCESSORS as u64)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
}

/// The living suffixes of a segment.
pub struct Living {
    bytes: Arc<Bytes>,
    blocks: Range<usize>,
    suffixes: u64,
    pub living: u64,
    /// The block of every so many-th of them.
    places: Vec<u32>,
    successor_index: Range<usize>,
    successors: Range<usize>,
    index_bits: u32,
    entry_bits: u32,
}

impl Living {
    /// Checks that the counts of the blocks are those of their bits.
    fn new(
        bytes: Arc<Bytes>,
        entry: Entry,
        vocab_size: u32,
        [blocks, successor_index, successors]: [Range<usize>; 3],
        path: &Path,
    ) -> Result<Self> {
        let mut places = Vec::new();
        places
            .try_reserve_exact(entry.living.div_ceil(STRIDE) as usize)
            .map_err(Error::memory("tombstones"))?;
        let mut living = 0;
        for (index, block) in bytes[blocks.clone()].chunks_exact(ALIGN as usize).enumerate() {
            let mut block = words(block);
            let before = block.next().unwrap_or_default();
            let held: u64 = block.map(|word| u64::from(word.count_ones())).sum();
            if before != living || living + held > entry.living {
                return Err(Error::corrupt(path, "the living are miscounted"));
            }
            living += held;
            while (places.len() as u64) * STRIDE < living {
                places.push(index as u32);
            }
        }
        let (index_bits, entry_bits) = (entry.index_bits(), symbol_bits(vocab_size) + 8);
        let Entry { suffixes, .. } = entry;
        let found = Self {
            bytes,
            blocks,
            suffixes,
            living,
            places,
            successor_index,
            successors,
            index_bits,
            entry_bits,
        };
        // no rank from the last on lives
        if living != entry.living || found.rank(suffixes) != living {
            return Err(Error::corrupt(path, "the living are miscounted"));
        }
        Ok(found)
    }

    fn word(&self, block: u64, word: u64) -> u64 {
        let start = self.blocks.start + (block * ALIGN + word * 8) as usize;
        self.bytes.get(start..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// How many suffixes before this rank live.
    #[inline]
    pub fn rank(&self, rank: u64) -> u64 {
        let (block, bit) = (rank / RANKS, rank % RANKS);
        let whole = (1..=bit / 64).map(|word| u64::from(self.word(block, word).count_ones()));
        let part = match bit % 64 {
            0 => 0,
            bits => self.word(block, bit / 64 + 1) << (64 - bits),
        };
        self.word(block, 0) + whole.sum::<u64>() + u64::from(part.count_ones())
    }

    /// The rank of a living suffix; `number` is how many live before it.
    #[inline]
    pub fn select(&self, number: u64) -> u64 {
        let place = |index: u64| self.places.get(index as usize).map(|&block| u64::from(block));
        let last = blocks(self.suffixes) - 1;
        let mut low = place(number / STRIDE).unwrap_or(last);
        let mut high = place(number / STRIDE + 1).unwrap_or(last);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if self.word(middle, 0) <= number {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        let mut left = number.saturating_sub(self.word(low, 0));
        for word in 1..8 {
            let mut bits = self.word(low, word);
            let held = u64::from(bits.count_ones());
            if left < held {
                (0..left).for_each(|_| bits &= bits - 1);
                return low * RANKS + (word - 1) * 64 + u64::from(bits.trailing_zeros());
            }
            left -= held;
        }
        self.suffixes
    }

    /// Where each token's successors start, and the successors, as in a segment.
    pub fn successors(&self) -> (Packed<'_>, Packed<'_>) {
        let index = Packed::new(&self.bytes[self.successor_index.clone()], self.index_bits);
        (index, Packed::new(&self.bytes[self.successors.clone()], self.entry_bits))
    }
}
