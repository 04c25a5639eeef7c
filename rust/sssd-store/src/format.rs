//! The bytes of the header, the segment table and the trailer; `docs/format.md` describes them in words.
//! Everything read here is untrusted: sizes are checked against the file before anything is looked at.

use std::io;
use std::ops::Range;
use std::path::Path;

use sssd_core::{CONTEXT, DIMENSIONS};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::packed::{bits_for, packed_len};
use crate::{Error, Fingerprint, Result};

/// Format version of a file without tables for ranking.
pub const VERSION: u32 = 1;
/// Format version of a file with them, the newest that this release writes and reads.
pub const TABLES_VERSION: u32 = 2;
/// Bytes of the header, and the alignment of sections.
pub const PAGE: u64 = 4096;
/// Bytes under one checksum.
pub const BLOCK: u64 = 1 << 20;
/// Suffixes per fence key.
pub const FENCE: u64 = 64;
/// Successors kept of a token.
pub const MAX_SUCCESSORS: usize = 32;
/// Largest vocabulary: symbols take at most 25 bits.
pub const MAX_VOCAB: u32 = 1 << 24;
/// Most symbols of a segment: positions take at most 32 bits.
pub const MAX_SYMBOLS: u64 = 1 << 32;
/// Most segments with tokens of a file: each is searched in every look-up.
pub const MAX_SEGMENTS: usize = 64;

// The first byte is not ASCII, the line ends catch a transfer in text mode (as PNG does).
const MAGIC: [u8; 8] = *b"\x89SSD\r\n\x1a\n";
const TRAILER: u64 = 40;
const SECTIONS: usize = 6;
const SEGMENT_ENTRY: usize = 8 * (4 + 2 * SECTIONS);
const CRC_AT: usize = PAGE as usize - 4;

/// Bytes of the weights of the tables for ranking.
pub const WEIGHTS: u64 = 4 * (DIMENSIONS * (CONTEXT + 1)) as u64;
/// Tables of rows.
pub const ROWS: usize = 3;
/// Of each token: what a row of each table is worth, what is added to its score, the logarithm of its share of the text.
pub const PARAMETERS: usize = ROWS + 2;
/// Rows begin at a line of the cache.
const LINE: u64 = 64;

/// Bytes of the tables for ranking.
pub fn tables_length(vocab_size: u32) -> u64 {
    rows_at(vocab_size) + (ROWS * DIMENSIONS) as u64 * u64::from(vocab_size)
}

/// Where in them the rows begin.
pub fn rows_at(vocab_size: u32) -> u64 {
    (WEIGHTS + 4 * PARAMETERS as u64 * u64::from(vocab_size)).next_multiple_of(LINE)
}

/// What the header says about the whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub vocab_size: u32,
    pub uuid: [u8; 16],
    pub fingerprint: Fingerprint,
    pub tokens: u64,
    pub documents: u64,
    pub segment_symbols: u64,
    pub deduplicated: bool,
    pub file_length: u64,
    pub checksums_at: u64,
    pub checksums_hash: u64,
    pub table_at: u64,
    pub segments: u64,
    pub table_hash: u64,
    pub tables: Option<TablesEntry>,
}

/// Where the tables for ranking are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TablesEntry {
    pub place: Range<u64>,
    /// Tokens that they were learned from.
    pub learned: u64,
}

/// A segment's counts and the places of its sections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SegmentEntry {
    /// Tokens and document ends.
    pub symbols: u64,
    pub documents: u64,
    pub suffixes: u64,
    pub successors: u64,
    /// Text, suffixes, buckets, fences, successor index, successors.
    pub sections: [Range<u64>; SECTIONS],
}

/// Bits of a symbol: 0 ends a document, `s > 0` is token `s - 1`.
pub fn symbol_bits(vocab_size: u32) -> u32 {
    bits_for(u64::from(vocab_size))
}

impl SegmentEntry {
    pub fn position_bits(&self) -> u32 {
        bits_for(self.symbols.saturating_sub(1))
    }

    pub fn rank_bits(&self) -> u32 {
        bits_for(self.suffixes)
    }

    pub fn successor_index_bits(&self) -> u32 {
        bits_for(self.successors)
    }

    /// Bytes of each section as the counts demand.
    pub fn section_lengths(&self, vocab_size: u32) -> [u64; SECTIONS] {
        let symbol_bits = symbol_bits(vocab_size);
        let index = u64::from(vocab_size) + 1;
        [
            packed_len(self.symbols, symbol_bits),
            packed_len(self.suffixes, self.position_bits()),
            packed_len(index, self.rank_bits()),
            8 * self.suffixes.div_ceil(FENCE),
            packed_len(index, self.successor_index_bits()),
            packed_len(self.successors, symbol_bits + 8),
        ]
    }

    fn encode(&self) -> impl Iterator<Item = u8> {
        let counts = [self.symbols, self.documents, self.suffixes, self.successors];
        let places = self.sections.clone().into_iter().flat_map(|section| [section.start, section.end]);
        counts.into_iter().chain(places).flat_map(u64::to_le_bytes)
    }

    fn decode(bytes: &[u8]) -> Self {
        let mut fields = Fields(bytes);
        let [symbols, documents, suffixes, successors] = std::array::from_fn(|_| fields.u64());
        let sections = std::array::from_fn(|_| fields.u64()..fields.u64());
        Self { symbols, documents, suffixes, successors, sections }
    }

    fn check(&self, vocab_size: u32) -> std::result::Result<(), &'static str> {
        let distinct = u64::from(vocab_size) * MAX_SUCCESSORS as u64;
        if self.symbols > MAX_SYMBOLS
            || self.suffixes > self.symbols
            || self.documents != self.symbols - self.suffixes
            || self.successors > distinct
        {
            return Err("a segment's counts contradict each other");
        }
        let lengths = self.section_lengths(vocab_size);
        if self
            .sections
            .iter()
            .zip(lengths)
            .any(|(place, length)| place.start.checked_add(length) != Some(place.end))
        {
            return Err("a section's length contradicts the counts");
        }
        Ok(())
    }
}

impl Header {
    /// The version of the format that a file with such a header has.
    pub fn version(&self) -> u32 {
        if self.tables.is_some() { TABLES_VERSION } else { VERSION }
    }

    fn encode(&self) -> [u8; PAGE as usize] {
        let words = [
            self.tokens,
            self.documents,
            self.segment_symbols,
            u64::from(self.deduplicated),
            self.file_length,
            self.checksums_at,
            self.checksums_hash,
            self.table_at,
            self.segments,
            self.table_hash,
        ];
        let version = self.version().to_le_bytes();
        let fields = MAGIC.into_iter().chain(version).chain(self.vocab_size.to_le_bytes());
        let fields = fields.chain(self.uuid).chain(self.fingerprint);
        let tables = self.tables.iter().flat_map(|entry| {
            let shape = [DIMENSIONS as u32, CONTEXT as u32].into_iter().flat_map(u32::to_le_bytes);
            let words = [entry.place.start, entry.place.end, entry.learned].into_iter();
            words.flat_map(u64::to_le_bytes).chain(shape)
        });
        let mut out = [0; PAGE as usize];
        fill(&mut out, fields.chain(words.into_iter().flat_map(u64::to_le_bytes)).chain(tables));
        let sum = crc32fast::hash(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    fn trailer(&self) -> [u8; TRAILER as usize] {
        let mut out = [0; TRAILER as usize];
        fill(&mut out, self.uuid.into_iter().chain(self.file_length.to_le_bytes()).chain(MAGIC));
        let sum = xxh3_64(&out[..TRAILER as usize - 8]);
        fill(&mut out[TRAILER as usize - 8..], sum.to_le_bytes());
        out
    }

    /// Fills in the places, hashes and the UUID, and returns the header and what follows the body.
    pub fn seal(
        mut self,
        body_end: u64,
        checksums: &[u64],
        table: &[SegmentEntry],
    ) -> io::Result<([u8; PAGE as usize], Vec<u8>)> {
        let mut tail = Vec::new();
        tail.try_reserve_exact(8 * checksums.len() + SEGMENT_ENTRY * table.len() + TRAILER as usize)?;
        tail.extend(checksums.iter().flat_map(|sum| sum.to_le_bytes()));
        self.checksums_at = body_end;
        self.checksums_hash = xxh3_64(&tail);
        self.table_at = body_end + tail.len() as u64;
        self.segments = table.len() as u64;
        tail.extend(table.iter().flat_map(SegmentEntry::encode));
        self.table_hash = xxh3_64(&tail[(self.table_at - body_end) as usize..]);
        self.file_length = body_end + tail.len() as u64 + TRAILER;
        self.uuid = [0; 16];
        self.uuid = xxh3_128(&self.encode()[..CRC_AT]).to_le_bytes(); // of the contents: equal input, equal bytes
        tail.extend(self.trailer());
        Ok((self.encode(), tail))
    }
}

fn fill(out: &mut [u8], bytes: impl IntoIterator<Item = u8>) {
    out.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
}

/// Zeros, or an error where there is no memory for them.
pub fn zeros<T: Clone + Default>(count: usize) -> io::Result<Vec<T>> {
    let mut out = Vec::new();
    out.try_reserve_exact(count)?;
    out.resize(count, T::default());
    Ok(out)
}

/// Reads header, segment table and trailer of a file of `length` bytes, and checks everything that can be checked
/// without reading the body. `read` copies the bytes from a place on.
pub fn parse(path: &Path, length: u64, read: Read) -> Result<(Header, Vec<SegmentEntry>)> {
    let corrupt = |problem: &str| Error::corrupt(path, problem);
    let header = read_header(path, length, read)?;
    let trailer_at = header.file_length - TRAILER.min(header.file_length);
    let table_length = header.segments.checked_mul(SEGMENT_ENTRY as u64);
    let blocks = header.checksums_at.checked_sub(PAGE).map(|body| body.div_ceil(BLOCK));
    let in_order = blocks.and_then(|blocks| header.checksums_at.checked_add(blocks.checked_mul(8)?))
        == Some(header.table_at)
        && table_length.and_then(|length| header.table_at.checked_add(length)) == Some(trailer_at);
    if !in_order {
        return Err(corrupt("the parts of the file overlap"));
    }
    let tail = read_part(path, header.table_at..header.file_length, read)?;
    let (table, trailer) = tail.split_at((trailer_at - header.table_at) as usize);
    if trailer != header.trailer() {
        return Err(corrupt("the trailer does not belong to the header"));
    }
    if xxh3_64(table) != header.table_hash {
        return Err(corrupt("the segment table does not match its checksum"));
    }
    let mut entries = Vec::new();
    entries
        .try_reserve_exact(header.segments as usize)
        .map_err(Error::memory("the segments of a datastore"))?;
    entries.extend(table.chunks_exact(SEGMENT_ENTRY).map(SegmentEntry::decode));
    check_table(&header, &entries).map_err(corrupt)?;
    check_places(path, &header, &entries)?;
    let searched = entries.iter().filter(|entry| entry.suffixes > 0).count();
    if searched > MAX_SEGMENTS {
        let problem = format!("{searched} segments with tokens, more than the {MAX_SEGMENTS} allowed");
        return Err(Error::corrupt(path, problem));
    }
    Ok((header, entries))
}

/// Copies the bytes of a file from a place on.
pub type Read<'a> = &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>;

fn read_part(path: &Path, part: Range<u64>, read: Read) -> Result<Vec<u8>> {
    let mut out = zeros((part.end - part.start) as usize).map_err(Error::io(path))?;
    read(part.start, &mut out).map_err(Error::read(path))?;
    Ok(out)
}

/// The header, if it is one of a file of this length.
fn read_header(path: &Path, length: u64, read: Read) -> Result<Header> {
    let corrupt = |problem: &str| Error::corrupt(path, problem);
    let mut page = [0; PAGE as usize];
    if length >= PAGE {
        read(0, &mut page).map_err(Error::read(path))?;
    }
    if !page.starts_with(&MAGIC) {
        return Err(corrupt("not a datastore file, or a truncated one"));
    }
    let mut fields = Fields(&page[MAGIC.len()..]);
    let found = fields.u32();
    if !(VERSION..=TABLES_VERSION).contains(&found) {
        return Err(Error::Version { path: path.to_owned(), found, supported: TABLES_VERSION });
    }
    if page[CRC_AT..] != crc32fast::hash(&page[..CRC_AT]).to_le_bytes() {
        return Err(corrupt("the header does not match its checksum"));
    }
    let mut header = Header {
        vocab_size: fields.u32(),
        uuid: fields.array(),
        fingerprint: fields.array(),
        tokens: fields.u64(),
        documents: fields.u64(),
        segment_symbols: fields.u64(),
        deduplicated: fields.u64() != 0,
        file_length: fields.u64(),
        checksums_at: fields.u64(),
        checksums_hash: fields.u64(),
        table_at: fields.u64(),
        segments: fields.u64(),
        table_hash: fields.u64(),
        tables: None,
    };
    if found == TABLES_VERSION {
        header.tables = Some(TablesEntry { place: fields.u64()..fields.u64(), learned: fields.u64() });
        if (fields.u32(), fields.u32()) != (DIMENSIONS as u32, CONTEXT as u32) {
            return Err(corrupt("the tables for ranking have a shape that no release has written"));
        }
    }
    if header.file_length != length {
        let problem = format!("{length} bytes long instead of {}", header.file_length);
        return Err(Error::corrupt(path, problem));
    }
    if header.vocab_size == 0 || header.vocab_size > MAX_VOCAB {
        return Err(corrupt("the vocabulary size is out of range"));
    }
    if let Some(TablesEntry { place, .. }) = &header.tables
        && place.start.checked_add(tables_length(header.vocab_size)) != Some(place.end)
    {
        return Err(corrupt("the length of the tables for ranking contradicts the vocabulary"));
    }
    Ok(header)
}

/// What is wrong with the segments: each by itself, or what they come to.
fn check_table(header: &Header, table: &[SegmentEntry]) -> std::result::Result<(), &'static str> {
    let (mut tokens, mut documents) = (0, 0);
    for entry in table {
        entry.check(header.vocab_size)?;
        tokens += entry.suffixes;
        documents += entry.documents;
    }
    if (tokens, documents) != (header.tokens, header.documents) {
        return Err("the segments do not add up to the counts of the header");
    }
    Ok(())
}

/// Whether the sections lie in the body, one after the other.
fn check_places(path: &Path, header: &Header, table: &[SegmentEntry]) -> Result<()> {
    let mut places = Vec::new();
    places
        .try_reserve_exact(table.len() * SECTIONS + 1)
        .map_err(Error::memory("the segments of a datastore"))?;
    places.extend(table.iter().flat_map(|entry| &entry.sections));
    places.extend(header.tables.iter().map(|entry| &entry.place));
    places.sort_unstable_by_key(|place| place.start);
    let mut end = PAGE;
    for place in places {
        if place.start % PAGE != 0 || place.start < end || place.end > header.checksums_at {
            return Err(Error::corrupt(path, "a section lies outside its place"));
        }
        end = place.end;
    }
    Ok(())
}

/// The byte ranges of a file that [`parse`] has accepted that changed since they were written, of the blocks that are
/// `wanted`. `proceed` is asked before each of them.
pub fn damage(
    path: &Path,
    length: u64,
    read: Read,
    wanted: &dyn Fn(&Range<u64>) -> bool,
    proceed: &dyn Fn() -> Result<()>,
) -> Result<Vec<Range<u64>>> {
    let (header, _) = parse(path, length, read)?;
    let checksums = read_part(path, header.checksums_at..header.table_at, read)?;
    if xxh3_64(&checksums) != header.checksums_hash {
        return Err(Error::corrupt(path, "the block checksums do not match their own checksum"));
    }
    let mut damaged: Vec<Range<u64>> = Vec::new();
    let body = header.checksums_at - PAGE;
    let mut block = zeros(BLOCK.min(body) as usize).map_err(Error::io(path))?;
    let mut start = PAGE;
    for sum in checksums.chunks_exact(8) {
        let end = (start + BLOCK).min(header.checksums_at);
        if !wanted(&(start..end)) {
            start = end;
            continue;
        }
        proceed()?;
        let block = &mut block[..(end - start) as usize];
        read(start, block).map_err(Error::read(path))?;
        if xxh3_64(block).to_le_bytes() != sum {
            match damaged.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => {
                    damaged.try_reserve(1).map_err(Error::memory("the damaged ranges"))?;
                    damaged.push(start..end);
                }
            }
        }
        start = end;
    }
    Ok(damaged)
}

/// Takes fields off the front of a slice known to be long enough.
pub struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let (head, rest) = self.0.split_at(N.min(self.0.len()));
        out[..head.len()].copy_from_slice(head);
        self.0 = rest;
        out
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}
