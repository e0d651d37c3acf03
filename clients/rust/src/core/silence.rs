//! When a client finds out that a server hangs with its calls (zcp1.md, section 6.6).
//!
//! While requests are in flight, a PING is due if no byte has arrived for a while, and when a call has timed out. A server that
//! sends no byte after that is silent. That does not end the connection, but a client with another address connects there beside
//! it. The keepalive does not know of this PING.

use std::time::Duration;

/// How long no byte may arrive while requests are in flight.
const PING_AFTER: Duration = Duration::from_secs(5);
/// The same after a call has timed out.
const PING_AFTER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long no byte may arrive after the PING was written.
const PATIENCE: Duration = Duration::from_secs(2);
/// The bytes sent since the last byte arrived that make it a second longer.
const BYTES_PER_SECOND: u64 = 65_536;

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    Ping,
    /// The server is silent. Due again while that lasts.
    Silent,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Waiting,
    /// A PING waits to be written.
    Queued,
    /// It was written then.
    Pinged(Duration),
    Silent,
}

/// The watch over one connection. `now` is monotonic.
#[derive(Debug, Default)]
pub(crate) struct Silence {
    is_watching: bool,
    last_byte: Duration,
    /// The bytes that had been sent when the last byte arrived.
    sent: u64,
    /// Since when requests are in flight.
    waiting_since: Option<Duration>,
    has_timed_out: bool,
    phase: Phase,
    /// When the last PING was sent, and when the silence was reported last.
    asked_at: Duration,
    reported_at: Duration,
}

impl Silence {
    /// Begin to watch.
    pub(crate) fn watch(&mut self, now: Duration, sent: u64) {
        self.is_watching = true;
        self.heard(now, sent);
    }

    /// Record that a byte has arrived. Return whether that ends a silence.
    pub(crate) fn heard(&mut self, now: Duration, sent: u64) -> bool {
        self.last_byte = now;
        self.sent = sent;
        self.has_timed_out = false;
        std::mem::take(&mut self.phase) == Phase::Silent
    }

    /// Record that a call has timed out.
    pub(crate) fn timed_out(&mut self) {
        self.has_timed_out = true;
    }

    /// Record that the transport cannot send: a PING waits behind other bytes.
    pub(crate) fn blocked(&mut self) {
        if matches!(self.phase, Phase::Pinged(_)) {
            self.phase = Phase::Queued;
        }
    }

    /// Return when the last byte has arrived, and when the last PING was sent.
    pub(crate) fn times(&self) -> (Duration, Duration) {
        (self.last_byte, self.asked_at)
    }

    pub(crate) fn is_silent(&self) -> bool {
        self.phase == Phase::Silent
    }

    /// Return when something is due, without a change before.
    fn due_at(&self, sent: u64) -> Option<Duration> {
        match self.phase {
            Phase::Waiting if self.has_timed_out => Some(self.last_byte + PING_AFTER_TIMEOUT),
            Phase::Waiting => Some(self.waiting_since?.max(self.last_byte) + PING_AFTER),
            Phase::Pinged(at) => Some(at + PATIENCE + Duration::from_secs((sent - self.sent) / BYTES_PER_SECOND)),
            Phase::Silent => Some(self.reported_at + PATIENCE),
            Phase::Queued => None,
        }
    }

    /// Return what is due, and when the next thing is. The transport can send. After `Ping` a PING is sent at once.
    pub(crate) fn check(&mut self, has_requests: bool, sent: u64, now: Duration) -> (Due, Option<Duration>) {
        if !self.is_watching {
            return (Due::Nothing, None);
        }
        self.waiting_since = if has_requests { self.waiting_since.or(Some(now)) } else { None };
        if !has_requests && !self.has_timed_out && self.phase != Phase::Silent {
            self.phase = Phase::Waiting;
        }
        if self.phase == Phase::Queued {
            self.phase = Phase::Pinged(now);
        }
        let due = match self.phase {
            _ if self.due_at(sent).is_none_or(|at| now < at) => Due::Nothing,
            Phase::Waiting => {
                self.phase = Phase::Pinged(now);
                self.asked_at = now;
                Due::Ping
            }
            _ => {
                self.phase = Phase::Silent;
                self.reported_at = now;
                Due::Silent
            }
        };
        (due, self.due_at(sent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn watching() -> Silence {
        let mut silence = Silence::default();
        silence.watch(10 * S, 0);
        silence
    }

    #[test]
    fn a_server_without_a_byte_for_five_seconds_gets_a_ping_and_is_silent_two_seconds_later() {
        let mut silence = watching();
        assert_eq!(silence.check(true, 100, 20 * S), (Due::Nothing, Some(25 * S)));
        assert_eq!(silence.check(true, 100, 25 * S), (Due::Ping, Some(27 * S)));
        assert_eq!(silence.check(true, 200, 26 * S), (Due::Nothing, Some(27 * S)));
        assert!(!silence.is_silent());
        assert_eq!(silence.check(true, 200, 27 * S), (Due::Silent, Some(29 * S)));
        assert_eq!(silence.check(true, 200, 28 * S), (Due::Nothing, Some(29 * S)));
        assert_eq!(silence.check(true, 200, 40 * S), (Due::Silent, Some(42 * S)));
        assert!(silence.is_silent());
        assert!(silence.heard(41 * S, 200));
        assert_eq!(silence.check(true, 200, 41 * S), (Due::Nothing, Some(46 * S)));
    }

    #[test]
    fn any_byte_after_the_ping_is_a_sign_of_life() {
        let mut silence = watching();
        silence.check(true, 100, 20 * S);
        assert_eq!(silence.check(true, 100, 25 * S).0, Due::Ping);
        assert!(!silence.heard(26 * S, 100));
        assert_eq!(silence.check(true, 100, 30 * S), (Due::Nothing, Some(31 * S)));
    }

    #[test]
    fn an_idle_connection_is_not_watched() {
        let mut silence = watching();
        assert_eq!(silence.check(false, 0, 60 * S), (Due::Nothing, None));
        assert_eq!(silence.check(true, 0, 70 * S), (Due::Nothing, Some(75 * S)));
        assert_eq!(silence.check(false, 0, 71 * S), (Due::Nothing, None));
        assert_eq!(silence.check(true, 0, 80 * S), (Due::Nothing, Some(85 * S)));
        assert_eq!(Silence::default().check(true, 0, 80 * S), (Due::Nothing, None));
    }

    #[test]
    fn a_call_that_times_out_causes_a_ping_unless_a_byte_came_within_a_second() {
        let mut silence = watching();
        silence.check(true, 0, 10 * S);
        silence.timed_out();
        assert_eq!(silence.check(true, 0, 10 * S + S / 2), (Due::Nothing, Some(11 * S)));
        assert_eq!(silence.check(true, 0, 12 * S), (Due::Ping, Some(14 * S)));
        silence.timed_out(); // no further PING
        assert_eq!(silence.check(true, 0, 13 * S), (Due::Nothing, Some(14 * S)));
    }

    #[test]
    fn the_patience_begins_when_the_ping_is_written_and_grows_with_what_was_sent() {
        let mut silence = watching();
        silence.check(true, 0, 10 * S);
        assert_eq!(silence.check(true, 200_000, 15 * S), (Due::Ping, Some(20 * S)));
        silence.blocked();
        assert_eq!(silence.check(true, 200_000, 40 * S), (Due::Nothing, Some(45 * S)));
    }
}
