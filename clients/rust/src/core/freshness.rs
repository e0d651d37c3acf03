//! Checks salt, counter and timestamp of the frames of one direction (zcp1.md, section 7).

/// The tenth consecutive stale frame ends the connection.
pub const MAX_CONSECUTIVE_STALE: u32 = 10;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The frame can be used.
    Fresh,
    /// The timestamp is off by more than the tolerance.
    Stale,
    /// The nonce belongs to another connection.
    WrongSalt,
    /// The counter did not grow.
    CounterUsed,
}

/// The state of one direction of a connection.
#[derive(Clone, Debug)]
pub struct Freshness {
    salt: u64,
    last_counter: u64,
    tolerance_ms: u64,
}

impl Freshness {
    /// Begin with the salt of the connection and the last counter that was used.
    #[must_use]
    pub fn new(salt: u64, last_counter: u64, tolerance_ms: u64) -> Self {
        Self { salt, last_counter, tolerance_ms }
    }

    /// Check the header of a frame. `server_time` is in milliseconds since 1970. The counter of a stale frame counts as
    /// used. No timestamp overflows the difference.
    pub fn check(&mut self, salt: u64, counter: u64, timestamp: u64, server_time: i128) -> Verdict {
        if salt != self.salt {
            return Verdict::WrongSalt;
        }
        if counter <= self.last_counter {
            return Verdict::CounterUsed;
        }
        self.last_counter = counter;
        let age = (server_time - i128::from(timestamp)).unsigned_abs();
        if age <= u128::from(self.tolerance_ms) { Verdict::Fresh } else { Verdict::Stale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_example_of_section_7_1() {
        const NOW: i128 = 1_767_225_600_000;
        for (salt, counter, timestamp, verdict) in [
            (1, 8, 1_767_225_570_000, Verdict::Fresh),
            (1, 8, 1_767_225_569_999, Verdict::Stale),
            (1, 20, 1_767_225_630_000, Verdict::Fresh),
            (1, 7, 1_767_225_600_000, Verdict::CounterUsed),
            (2, 8, 1_767_225_600_000, Verdict::WrongSalt),
            (1, 7, 0, Verdict::CounterUsed),
            (1, 8, u64::MAX, Verdict::Stale),
        ] {
            let mut freshness = Freshness::new(1, 7, 30_000);
            assert_eq!(freshness.check(salt, counter, timestamp, NOW), verdict);
        }
    }

    #[test]
    fn the_counter_of_a_stale_frame_is_used() {
        let mut freshness = Freshness::new(1, 7, 30_000);
        assert_eq!(freshness.check(1, 8, 0, 1_767_225_600_000), Verdict::Stale);
        assert_eq!(freshness.check(1, 8, 1_767_225_600_000, 1_767_225_600_000), Verdict::CounterUsed);
    }
}
