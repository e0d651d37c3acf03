//! When a client sends a PING, and when it considers the server as unreachable.
//!
//! It checks the connection at intervals of a third of the server's idle timeout. A PING is due if nothing was sent or
//! nothing was received since the last check, so that no silence lasts two thirds of it.

use std::time::Duration;

/// The time without a frame after a PING, after which the server counts as unreachable.
pub const PONG_TIMEOUT: Duration = Duration::from_secs(10);
/// Lower bound, so that a server with a tiny idle timeout is not flooded with PINGs.
const MIN_INTERVAL: Duration = Duration::from_millis(250);

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    Ping,
    Unreachable,
}

/// The state of the keepalive of one connection.
#[derive(Debug, Default)]
pub struct Keepalive {
    /// Whether anything was sent since the last check, apart from its PING.
    pub(crate) sent_since_check: bool,
    last_received: Duration,
    interval: Duration,
    check_at: Option<Duration>,
    pong_deadline: Option<Duration>,
}

impl Keepalive {
    /// Begin with WELCOME. An idle timeout of 0 needs no checks.
    pub(crate) fn start(&mut self, idle_timeout_ms: u64, now: Duration) {
        self.last_received = now;
        if idle_timeout_ms > 0 {
            self.interval = (Duration::from_millis(idle_timeout_ms) / 3).max(MIN_INTERVAL);
            self.check_at = now.checked_add(self.interval);
        }
    }

    pub(crate) fn received(&mut self, now: Duration) {
        self.last_received = now;
    }

    pub(crate) fn pong_received(&mut self) {
        self.pong_deadline = None;
    }

    /// Return when to call `check`.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        [self.check_at, self.pong_deadline].into_iter().flatten().min()
    }

    pub(crate) fn check(&mut self, now: Duration) -> Due {
        if let Some(deadline) = self.pong_deadline.filter(|&deadline| deadline <= now) {
            if self.last_received <= deadline.saturating_sub(PONG_TIMEOUT) {
                return Due::Unreachable;
            }
            self.pong_deadline = None; // other bytes were received since
        }
        let Some(check_at) = self.check_at.filter(|&check_at| check_at <= now) else {
            return Due::Nothing;
        };
        let is_active = self.sent_since_check && self.last_received > check_at.saturating_sub(self.interval);
        self.sent_since_check = false;
        self.check_at = now.checked_add(self.interval);
        if is_active {
            return Due::Nothing;
        }
        let deadline = now + PONG_TIMEOUT;
        self.pong_deadline = Some(self.pong_deadline.map_or(deadline, |earlier| earlier.min(deadline)));
        Due::Ping
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn started() -> Keepalive {
        let mut keepalive = Keepalive::default();
        keepalive.start(30_000, Duration::ZERO);
        keepalive
    }

    #[test]
    fn an_idle_connection_gets_a_ping_after_a_third_of_the_idle_timeout() {
        let mut keepalive = started();
        assert_eq!(keepalive.deadline(), Some(10 * S));
        assert_eq!(keepalive.check(9 * S), Due::Nothing);
        assert_eq!(keepalive.check(10 * S), Due::Ping);
    }

    #[test]
    fn a_busy_connection_gets_no_ping() {
        let mut keepalive = started();
        keepalive.sent_since_check = true;
        keepalive.received(3 * S);
        assert_eq!(keepalive.check(10 * S), Due::Nothing);
        keepalive.sent_since_check = true; // sent, and nothing received
        assert_eq!(keepalive.check(20 * S), Due::Ping);
    }

    #[test]
    fn silence_after_a_ping_means_an_unreachable_server() {
        let mut keepalive = started();
        assert_eq!(keepalive.check(10 * S), Due::Ping);
        assert_eq!(keepalive.check(20 * S), Due::Unreachable);
    }

    #[test]
    fn any_byte_after_a_ping_is_a_sign_of_life() {
        let mut keepalive = started();
        assert_eq!(keepalive.check(10 * S), Due::Ping);
        keepalive.received(15 * S);
        assert_eq!(keepalive.check(20 * S), Due::Ping);
        keepalive.pong_received();
        assert_eq!(keepalive.deadline(), Some(30 * S));
    }

    #[test]
    fn idle_timeout_zero_needs_no_checks() {
        let mut keepalive = Keepalive::default();
        keepalive.start(0, Duration::ZERO);
        assert_eq!(keepalive.deadline(), None);
    }
}
