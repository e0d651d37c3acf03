//! Exponential backoff with full jitter.

use std::time::Duration;

const FIRST_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(30);

/// Return the random delay after a number of earlier ones: between 0 and a ceiling of 100 ms that doubles up to 30 s. `random` is
/// from 0 to 1.
///
/// Full jitter spreads the reconnects after an outage evenly, however many clients there are.
pub(crate) fn delay(earlier: u32, random: f64) -> Duration {
    let ceiling = FIRST_DELAY.saturating_mul(2_u32.saturating_pow(earlier)).min(MAX_DELAY);
    ceiling.mul_f64(random)
}

/// Delays in a row.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    earlier: u32,
    random: fn() -> f64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(crate::random::fraction)
    }
}

impl Backoff {
    /// `random` returns numbers from 0 to 1.
    pub(crate) fn new(random: fn() -> f64) -> Self {
        Self { earlier: 0, random }
    }

    /// Return the next delay, which is added to the delay that the server asks for.
    pub(crate) fn next(&mut self, retry_after: Duration) -> Duration {
        let delay = delay(self.earlier, (self.random)());
        self.earlier = self.earlier.saturating_add(1);
        retry_after + delay
    }

    /// Start again from 100 ms, after a success.
    pub(crate) fn reset(&mut self) {
        self.earlier = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_doubles_up_to_thirty_seconds() {
        let mut backoff = Backoff::new(|| 1.0);
        let delays: Vec<_> = (0..11).map(|_| backoff.next(Duration::ZERO).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000]);
        backoff.reset();
        assert_eq!(backoff.next(Duration::from_secs(1)).as_millis(), 1_100);
    }

    #[test]
    fn the_delay_is_random_below_the_ceiling() {
        let mut backoff = Backoff::default();
        assert!((0..100).all(|_| backoff.next(Duration::ZERO) <= MAX_DELAY));
    }
}
