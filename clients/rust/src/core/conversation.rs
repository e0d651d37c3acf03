//! The state of one connection.
//!
//! Decides: WELCOME, the clock offset, freshness of received frames, which request an answer belongs to, what can be sent
//! now (requests in flight, frame size, credit), keepalive, and what ends the connection.
//!
//! Rules where the protocol leaves the choice to a client:
//!
//! - On an error of the server a client only ends the connection and reports why: it has no ERROR to send.
//! - A RESPONSE or ERROR with an invalid body fails its call with INTERNAL (it may have run). An invalid WELCOME, GOAWAY,
//!   EVENT or ERROR on stream 0 ends the connection.
//! - A stale answer, ITEM or CREDIT fails its call with DATA_LOSS. A stale CALL is refused, and a stale WITHDRAW is
//!   honoured. Any other stale frame is dropped and counted. ERROR STALE_TIMESTAMP is processed even if it is stale
//!   itself, since it corrects the clock offset.
//! - The bytes of an incomplete frame count as a sign of life, until it has taken `FRAME_TIMEOUT`.
//! - Until a RESPONSE shows that the server accepted a token, frames are limited as on a connection without a session.
//! - At most one PONG waits to be sent. It answers all PINGs that arrive until then.
//! - Frames that answer no request are read at a limited rate: a server that floods them gets back-pressure.

mod receiving;
mod sending;
mod server_calls;

use super::calls::ServerCalls;
use super::credit::{ReceiveCredit, SendCredit};
use super::events::Event;
use super::flood::FloodLimit;
use super::freshness::Freshness;
use super::keepalive::{self, Keepalive};
use super::output::Output;
use super::requests::{MAX_FRAME_BEFORE_SESSION, Requests};
use super::silence::{Due, Silence};
use super::streams::ItemStreams;
use crate::codec::MAX_DEPTH;
use crate::error::Code;
use crate::frame::{Accepted, FrameDecoder, Kind, Side};
use crate::message::{Credit, Welcome};
use crate::secret::Token;
use std::time::Duration;

/// The time from the header of a frame to its last byte, after which the connection counts as lost.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(300);

/// The largest accepted server time: timestamps derived from a larger one could exceed 64 bits.
pub const MAX_SERVER_TIME: u64 = 1 << 62;

/// The limits that a client observes for what it receives.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The largest `length` accepted from the server after WELCOME, in bytes. 1,048,576 by default.
    pub max_frame: u32,
    /// The tolerated difference of timestamps from the estimated server time, in milliseconds. 30,000 by default.
    pub tolerance_ms: u64,
    /// The deepest nesting of bodies, at most 32.
    pub max_depth: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { max_frame: 1_048_576, tolerance_ms: 30_000, max_depth: MAX_DEPTH }
    }
}

/// The states of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing can be sent; only WELCOME can arrive.
    AwaitingWelcome,
    /// Both sides can send.
    Open,
    /// GOAWAY was received: answers still arrive, new requests are refused.
    Draining,
    /// The end: input is ignored, and output that waits can still be sent.
    Closed,
}

/// When the header of an incomplete frame arrived.
#[derive(Clone, Copy, Debug)]
struct Partial {
    wall: i64,
    now: Duration,
}

/// One connection to a server. Requests can be made after [`Event::Welcomed`].
///
/// `wall` is this machine's time in milliseconds since the Unix epoch; `now` is monotonic, since any fixed start.
#[derive(Debug)]
pub struct Conversation {
    settings: Settings,
    state: State,
    welcome: Option<Welcome>,
    decoder: FrameDecoder,
    accepted: Accepted,
    freshness: Option<Freshness>, // set by WELCOME
    stale_count: u32,
    dropped_stale: u64,
    dropped_unknown: u64,
    partial: Option<Partial>,
    requests: Requests,
    streams: ItemStreams,
    calls: ServerCalls,
    output: Output,
    is_output_blocked: bool,
    pong_owed: Option<Token>, // the token of the latest PING without a PONG
    unrequested: FloodLimit,
    keepalive: Keepalive,
    silence: Silence,
    scratch: Vec<u8>, // the body of a request
}

impl Conversation {
    /// Begin a conversation on a new connection.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            state: State::AwaitingWelcome,
            welcome: None,
            decoder: FrameDecoder::default(),
            accepted: Accepted {
                receiver: Side::Client,
                max_length: settings.max_frame.min(MAX_FRAME_BEFORE_SESSION),
                max_item: 0,
                streams: false,
                calls: false,
            },
            freshness: None,
            stale_count: 0,
            dropped_stale: 0,
            dropped_unknown: 0,
            partial: None,
            requests: Requests::new(),
            streams: ItemStreams::default(),
            calls: ServerCalls::default(),
            output: Output::default(),
            is_output_blocked: false,
            pong_owed: None,
            unrequested: FloodLimit::default(),
            keepalive: Keepalive::default(),
            silence: Silence::default(),
            scratch: Vec::new(),
        }
    }

    // --- state -----------------------------------------------------------------------------------

    /// Return the state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Return the settings of the server, once it has sent them.
    #[must_use]
    pub fn welcome(&self) -> Option<&Welcome> {
        self.welcome.as_ref()
    }

    /// Return the salt, which is unique to this connection and part of what a device signs.
    #[must_use]
    pub fn salt(&self) -> u64 {
        self.output.salt
    }

    /// Return the offset of the server's clock from this one, in milliseconds.
    #[must_use]
    pub fn clock_offset(&self) -> i128 {
        self.output.clock_offset
    }

    /// Return the number of requests without an answer, streams of items included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.len()
    }

    /// Return whether a request is in flight: one that was cancelled is, until its answer.
    #[must_use]
    pub fn is_in_flight(&self, stream: u32) -> bool {
        self.requests.has(stream)
    }

    /// Return whether a request can be sent now, as far as the number in flight is concerned.
    #[must_use]
    pub fn may_request(&self) -> bool {
        self.state == State::Open && !self.requests.is_full()
    }

    /// Return the number of calls from the server without an answer.
    #[must_use]
    pub fn calls_in_flight(&self) -> usize {
        self.calls.len()
    }

    /// Return whether the server has accepted a token on this connection.
    #[must_use]
    pub fn has_session(&self) -> bool {
        self.requests.has_session()
    }

    /// Return the largest `length` that can be sent now, in bytes.
    #[must_use]
    pub fn send_limit(&self) -> u32 {
        self.requests.send_limit()
    }

    /// Return the number of stale frames that were dropped.
    #[must_use]
    pub fn dropped_stale(&self) -> u64 {
        self.dropped_stale
    }

    /// Return the number of frames that were dropped because their number was not in flight.
    #[must_use]
    pub fn dropped_unknown(&self) -> u64 {
        self.dropped_unknown
    }

    /// Set the number of the next request. A number in flight is skipped.
    pub fn set_next_stream(&mut self, stream: u32) {
        self.requests.set_next(stream);
    }

    // --- time ------------------------------------------------------------------------------------

    /// Queue a PING.
    pub fn ping(&mut self, wall: i64) {
        if matches!(self.state, State::Open | State::Draining) {
            self.send(Kind::Ping, 0, &Token::NONE, &[], wall);
        }
    }

    /// Return when to call [`handle_timeout`](Self::handle_timeout). It changes only with WELCOME and that call.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.state == State::Closed { None } else { self.keepalive.deadline() }
    }

    /// Send a PING on an idle connection, and end the connection after a PING without an answer. Calling it early has no
    /// effect.
    pub fn handle_timeout(&mut self, wall: i64, now: Duration, events: &mut Vec<Event>) {
        if self.state == State::Closed {
            return;
        }
        match self.keepalive.check(now) {
            keepalive::Due::Unreachable => self.end_with(None, "the server does not respond".to_owned(), events),
            keepalive::Due::Ping if !self.is_output_blocked => {
                self.ping(wall);
                self.keepalive.sent_since_check = false;
            }
            keepalive::Due::Ping | keepalive::Due::Nothing => {}
        }
    }

    // --- silence ---------------------------------------------------------------------------------

    /// Watch for silence from now on, since there is another server.
    pub fn watch(&mut self, now: Duration) {
        self.silence.watch(now, self.output.sent);
    }

    /// Record that a call has timed out: the server may hang.
    pub fn call_timed_out(&mut self) {
        self.silence.timed_out();
    }

    /// Record that bytes have arrived, of which [`receive`](Self::receive) may get none yet. Return whether that ends a silence.
    pub fn heard(&mut self, now: Duration) -> bool {
        self.silence.heard(now, self.output.sent)
    }

    /// Return whether the server hangs with requests of this client.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.silence.is_silent()
    }

    /// Return when the last byte has arrived, and when the last PING asked for one, on a connection that is watched.
    #[must_use]
    pub fn silence_times(&self) -> (Duration, Duration) {
        self.silence.times()
    }

    /// Send a PING to a server that may hang. Return when to call this again, at the latest; call it also after each request and
    /// after bytes were sent. Appends [`Event::Silent`] while the server is silent, from time to time.
    pub fn check_silence(&mut self, wall: i64, now: Duration, events: &mut Vec<Event>) -> Option<Duration> {
        if self.is_output_blocked || !matches!(self.state, State::Open | State::Draining) {
            return None;
        }
        let (due, next) = self.silence.check(self.requests.len() > 0, self.output.sent, now);
        match due {
            Due::Nothing => {}
            Due::Ping => {
                let sent_since_check = self.keepalive.sent_since_check;
                self.ping(wall);
                self.keepalive.sent_since_check = sent_since_check;
            }
            Due::Silent => events.push(Event::Silent),
        }
        next
    }

    // --- the end ---------------------------------------------------------------------------------

    /// Record that the transport has ended, or that it will be closed after the output that waits.
    pub fn end(&mut self) {
        self.state = State::Closed;
    }

    fn end_with(&mut self, code: Option<Code>, reason: String, events: &mut Vec<Event>) {
        self.state = State::Closed;
        events.push(Event::Ended { code, reason });
    }

    // --- output ----------------------------------------------------------------------------------

    fn send(&mut self, kind: Kind, stream: u32, token: &Token, body: &[u8], wall: i64) {
        if self.state != State::Closed {
            self.keepalive.sent_since_check = true;
            self.output.send(kind, stream, token, body, wall);
        }
    }

    /// Record that the transport cannot send. PONG and PING wait.
    pub fn block_output(&mut self) {
        self.is_output_blocked = true;
        self.silence.blocked();
    }

    /// Record that the transport can send again.
    pub fn unblock_output(&mut self, wall: i64) {
        self.is_output_blocked = false;
        self.send_pong(wall);
    }

    fn send_pong(&mut self, wall: i64) {
        if let Some(token) = self.pong_owed.take() {
            self.send(Kind::Pong, 0, &token, &[], wall);
        }
    }

    /// Return the number of bytes that wait to be sent.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.output.buffer.len()
    }

    /// Return the bytes to send now, whole frames. Write them in this order.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output.buffer)
    }

    /// Return the bytes to send now, in exchange for a buffer to reuse, which is cleared.
    pub fn swap_output(&mut self, buffer: &mut Vec<u8>) {
        buffer.clear();
        std::mem::swap(&mut self.output.buffer, buffer);
    }

    // --- states for test vectors -----------------------------------------------------------------

    /// Set what was granted to the server on a stream, what was received of it, and what the server has granted.
    #[doc(hidden)]
    pub fn restore_stream(&mut self, stream: u32, granted: Credit, received: Credit, credit: Credit) {
        if let Some(items) = self.streams.get_mut(stream) {
            items.received = ReceiveCredit::new(granted, granted, received);
            items.sent = SendCredit::new(credit);
        }
    }

    /// Add a call from the server that runs.
    #[doc(hidden)]
    pub fn restore_call(&mut self, number: u32, token: &Token) {
        self.calls.add(number, token.clone());
    }
}
