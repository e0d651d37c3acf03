//! Random numbers from a seed, and mutations.

/// Values at which decoders make mistakes.
const BOUNDARIES: [u8; 20] = [
    0x00, 0x01, 0x3f, 0x40, 0x7f, 0x80, 0x81, 0x90, 0x91, 0xa0, 0xc0, 0xc1, 0xc4, 0xc6, 0xcf, 0xd9, 0xdb, 0xdd, 0xdf,
    0xff,
];

/// xorshift64*: fast, and the same everywhere.
pub struct Random(u64);

impl Random {
    /// Make a generator. Seeds that are close to each other give unrelated numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // The finalizer of splitmix64.
        let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((state ^ (state >> 31)) | 1)
    }

    /// Return 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Return a number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        let end = (end as u64).max(1);
        usize::try_from((self.bits() >> 11) % end).unwrap_or(0)
    }

    /// Return true once in `rarity` times.
    pub fn once_in(&mut self, rarity: usize) -> bool {
        self.below(rarity) == 0
    }

    /// Return a random byte.
    pub fn byte(&mut self) -> u8 {
        self.bits().to_be_bytes()[0]
    }

    /// Return one of several values.
    ///
    /// # Panics
    ///
    /// If `values` is empty.
    pub fn choose<'a, T>(&mut self, values: &'a [T]) -> &'a T {
        &values[self.below(values.len())]
    }

    /// Change bytes in a few places.
    pub fn mutate(&mut self, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(8) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = *self.choose(&BOUNDARIES),
                2 if at < bytes.len() => bytes[at] = self.byte(),
                3 => bytes.insert(at, *self.choose(&BOUNDARIES)),
                4 => bytes.truncate(at),
                5 => {
                    let end = (at + self.below(9)).min(bytes.len());
                    bytes.drain(at..end);
                }
                6 => {
                    // Nest, or repeat.
                    let end = (at + self.below(40)).min(bytes.len());
                    let part = bytes[at..end].to_vec();
                    for _ in 0..self.below(40) {
                        bytes.splice(at..at, part.iter().copied());
                    }
                }
                _ => {
                    let other = self.choose(others);
                    let from = self.below(other.len() + 1);
                    let to = (from + self.below(64)).min(other.len());
                    bytes.splice(at..at, other[from..to].iter().copied());
                }
            }
        }
    }
}
