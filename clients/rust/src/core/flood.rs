//! The rate at which a client reads frames that answer no request.

use std::time::Duration;

/// The rate in the long run. Each 2 KiB of body count as one more frame.
const UNREQUESTED_PER_S: f64 = 4_000.0;
/// The number of frames that are read without a pause.
const UNREQUESTED_BURST: f64 = 8_000.0;
const FRAME_BYTES: f64 = 2_048.0;

/// A leaky bucket: it is filled by frames, and drains with time.
#[derive(Debug, Default)]
pub(crate) struct FloodLimit {
    level: f64,
    at: Duration,
}

impl FloodLimit {
    pub(crate) fn count(&mut self, body_size: usize, now: Duration) {
        let left = self.level - now.saturating_sub(self.at).as_secs_f64() * UNREQUESTED_PER_S;
        #[allow(clippy::cast_precision_loss, reason = "a frame is far smaller than 2^52 bytes")]
        let size = body_size as f64;
        self.level = left.max(0.0) + 1.0 + size / FRAME_BYTES;
        self.at = now;
    }

    /// Return for how long to stop reading; zero below the limit.
    pub(crate) fn delay(&self, now: Duration) -> Duration {
        let excess = self.level - UNREQUESTED_BURST;
        if excess <= 0.0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64(excess / UNREQUESTED_PER_S).saturating_sub(now.saturating_sub(self.at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_read_without_a_pause_and_a_flood_is_not() {
        let mut limit = FloodLimit::default();
        for _ in 0..8_000 {
            limit.count(0, Duration::ZERO);
        }
        assert_eq!(limit.delay(Duration::ZERO), Duration::ZERO);
        for _ in 0..4_000 {
            limit.count(0, Duration::ZERO);
        }
        assert_eq!(limit.delay(Duration::ZERO), Duration::from_secs(1));
        assert_eq!(limit.delay(Duration::from_millis(400)), Duration::from_millis(600));
        limit.count(0, Duration::from_secs(10));
        assert_eq!(limit.delay(Duration::from_secs(10)), Duration::ZERO);
    }

    #[test]
    fn large_frames_count_as_several() {
        let mut limit = FloodLimit::default();
        for _ in 0..20 {
            limit.count(1 << 20, Duration::ZERO);
        }
        assert!(limit.delay(Duration::ZERO) > Duration::ZERO);
    }
}
