//! Arrays of unsigned integers of a fixed number of bits, least significant bit first.

use std::io::{self, Write};

/// Bits that one unaligned 8-byte load is sure to hold from any bit offset.
pub const LOAD_BITS: u32 = 57;
/// Zero bytes after the last value, so that every value can be loaded with one 8-byte read.
const PADDING: u64 = 7;

/// Bits needed for the values `0..=max`, at least 1.
pub fn bits_for(max: u64) -> u32 {
    (u64::BITS - max.leading_zeros()).max(1)
}

/// Bytes of an array of `count <= 2^33` values of `bits <= 57`.
pub fn packed_len(count: u64, bits: u32) -> u64 {
    (count * u64::from(bits)).div_ceil(8) + PADDING
}

/// Reads a packed array. What lies outside the bytes reads as zero, so that no index can do harm.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    bytes: &'a [u8],
    bits: u32,
}

impl<'a> Packed<'a> {
    pub fn new(bytes: &'a [u8], bits: u32) -> Self {
        debug_assert!((1..=LOAD_BITS).contains(&bits));
        Self { bytes, bits }
    }

    pub fn bits(self) -> u32 {
        self.bits
    }

    #[inline]
    pub fn get(self, index: u64) -> u64 {
        self.load(index) & mask(self.bits)
    }

    /// At least 57 bits from value `index` on: the value itself and the ones that follow it.
    #[inline]
    pub fn load(self, index: u64) -> u64 {
        let bit = index.wrapping_mul(u64::from(self.bits));
        let Ok(start) = usize::try_from(bit / 8) else { return 0 };
        match self.bytes.get(start..).and_then(<[u8]>::first_chunk) {
            Some(bytes) => u64::from_le_bytes(*bytes) >> (bit % 8),
            None => 0,
        }
    }

    /// The first of the 8 bytes that [`Self::load`] reads.
    #[inline]
    pub fn place(self, index: u64) -> usize {
        usize::try_from(index.wrapping_mul(u64::from(self.bits)) / 8).unwrap_or(usize::MAX)
    }

    #[inline]
    pub fn prefetch(self, index: u64) {
        if let Some(byte) = self.bytes.get(self.place(index)) {
            prefetch(byte);
        }
    }
}

/// Brings the cache line of `byte` closer.
#[inline]
pub fn prefetch(byte: &u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing architecturally and cannot fault; the address is that of a live reference.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(byte).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = byte;
}

/// The lowest `bits < 64` bits set.
#[inline]
pub fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// Writes a packed array.
pub struct PackedWriter {
    bits: u32,
    pending: u128,
    pending_bits: u32,
}

impl PackedWriter {
    pub fn new(bits: u32) -> Self {
        debug_assert!((1..=LOAD_BITS).contains(&bits));
        Self { bits, pending: 0, pending_bits: 0 }
    }

    #[inline]
    pub fn push(&mut self, value: u64, out: &mut impl Write) -> io::Result<()> {
        debug_assert!(value <= mask(self.bits));
        self.pending |= u128::from(value) << self.pending_bits;
        self.pending_bits += self.bits;
        if self.pending_bits >= u64::BITS {
            out.write_all(&(self.pending as u64).to_le_bytes())?;
            self.pending >>= u64::BITS;
            self.pending_bits -= u64::BITS;
        }
        Ok(())
    }

    pub fn finish(self, out: &mut impl Write) -> io::Result<()> {
        let used = self.pending_bits.div_ceil(8) as usize;
        out.write_all(&self.pending.to_le_bytes()[..used])?;
        out.write_all(&[0; PADDING as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reads_back_what_was_written(bits in 1..=LOAD_BITS, values in prop::collection::vec(any::<u64>(), 0..200)) {
            let (mut bytes, mut writer) = (Vec::new(), PackedWriter::new(bits));
            for value in &values {
                writer.push(value & mask(bits), &mut bytes)?;
            }
            writer.finish(&mut bytes)?;
            prop_assert_eq!(bytes.len() as u64, packed_len(values.len() as u64, bits));
            let packed = Packed::new(&bytes, bits);
            for (index, value) in values.iter().enumerate() {
                prop_assert_eq!(packed.get(index as u64), value & mask(bits));
            }
            prop_assert_eq!(packed.get(u64::MAX / 64), 0);
        }
    }

    #[test]
    fn lengths_beyond_two_gib_do_not_overflow() {
        assert_eq!(packed_len(1 << 31, 31), (31 << 28) + 7);
        assert_eq!(packed_len(1 << 33, 57), (57 << 30) + 7);
        assert_eq!(bits_for(0), 1);
        assert_eq!(bits_for((1 << 31) - 1), 31);
        assert_eq!(bits_for(1 << 31), 32);
    }
}
