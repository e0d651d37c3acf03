//! Randomness for jitter and for names of temporary files. The core gets none.

use ring::rand::{SecureRandom, SystemRandom};

/// Return 64 random bits; zeros if the system has none, which costs only the spread of delays.
pub(crate) fn number() -> u64 {
    let mut bytes = [0; 8];
    let _ = SystemRandom::new().fill(&mut bytes);
    u64::from_be_bytes(bytes)
}

/// Return a random number in [0, 1).
pub(crate) fn fraction() -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "53 bits are exact")]
    let fraction = (number() >> 11) as f64 / (1u64 << 53) as f64;
    fraction
}
