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

use super::calls::{MAX_BLOCKED_REFUSALS, ServerCalls};
use super::credit::{ReceiveCredit, SendCredit};
use super::events::Event;
use super::flood::FloodLimit;
use super::freshness::{Freshness, MAX_CONSECUTIVE_STALE, Verdict};
use super::keepalive::{Due, Keepalive};
use super::output::Output;
use super::requests::{MAX_FRAME_BEFORE_SESSION, Requests};
use super::streams::{ItemStreams, StreamState, length_of};
use crate::codec::{self, MAX_DEPTH, Value};
use crate::error::{CallError, Closed, Code, Error, ProtocolError};
use crate::frame::{Accepted, Frame, FrameDecoder, HEADER_SIZE, Kind, MIN_LENGTH, Side};
use crate::message::{self, Credit, ErrorMessage, Meta, Welcome};
use crate::secret::Token;
use std::time::Duration;
use zeroize::Zeroize;

/// The time from the header of a frame to its last byte, after which the connection counts as lost.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(300);

/// The largest accepted server time: timestamps derived from a larger one could exceed 64 bits.
pub const MAX_SERVER_TIME: u64 = 1 << 62;

/// The largest buffer that is kept between requests, in bytes.
const MAX_SCRATCH: usize = 65_536;

const STALE_ANSWER: &str = "the answer was delayed for too long; check whether the request took effect";
const STALE_ITEM: &str = "an item was delayed for too long; the stream is incomplete";

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

    // --- receiving -------------------------------------------------------------------------------

    /// Process decrypted bytes, and append what has happened. Bytes after the end are ignored.
    pub fn receive(&mut self, data: &[u8], wall: i64, now: Duration, events: &mut Vec<Event>) {
        if self.state == State::Closed {
            return;
        }
        let mut decoder = std::mem::take(&mut self.decoder);
        decoder.feed(data);
        if let Err(error) = self.receive_frames(&mut decoder, wall, now, events) {
            self.end_with(Some(error.code), error.reason.to_owned(), events);
        }
        self.decoder = decoder;
        if !self.is_output_blocked {
            self.send_pong(wall);
        }
    }

    fn receive_frames(
        &mut self,
        decoder: &mut FrameDecoder,
        wall: i64,
        now: Duration,
        events: &mut Vec<Event>,
    ) -> Result<(), ProtocolError> {
        // Before the frames, so that the result does not depend on how the bytes are split.
        if self.partial.is_some_and(|partial| now >= partial.now + FRAME_TIMEOUT) {
            self.end_with(None, "a frame of the server took too long to arrive".to_owned(), events);
            return Ok(());
        }
        let mut judged_at = self.partial.map_or(wall, |partial| partial.wall);
        while let Some(frame) = decoder.next(&self.accepted)? {
            self.received(&frame, judged_at, wall, now, events)?;
            self.partial = None;
            judged_at = wall;
            if self.state == State::Closed {
                return Ok(());
            }
        }
        if decoder.buffered() >= HEADER_SIZE {
            self.partial.get_or_insert(Partial { wall, now });
            self.keepalive.received(now);
        }
        Ok(())
    }

    fn received(
        &mut self,
        frame: &Frame<'_>,
        judged_at: i64,
        wall: i64,
        now: Duration,
        events: &mut Vec<Event>,
    ) -> Result<(), ProtocolError> {
        let Some(freshness) = &mut self.freshness else {
            self.receive_first(frame, wall, now)?;
            events.push(Event::Welcomed);
            return Ok(());
        };
        self.keepalive.received(now); // of stale frames too: the server is not silent
        let server_time = i128::from(judged_at) + self.output.clock_offset;
        let replayed = |reason| ProtocolError { code: Code::Replayed, reason };
        match freshness.check(frame.salt, frame.counter, frame.timestamp, server_time) {
            Verdict::Fresh => {}
            Verdict::WrongSalt => return Err(replayed("nonce belongs to another connection")),
            Verdict::CounterUsed => return Err(replayed("nonce counter did not increase")),
            Verdict::Stale if self.corrects_clock(frame) => {}
            Verdict::Stale => return self.receive_stale(frame, wall, events),
        }
        self.stale_count = 0;
        let is_of_call = matches!(frame.kind, Kind::Call | Kind::Withdraw); // their numbers are the server's
        if is_of_call || !self.requests.has(frame.stream) {
            self.unrequested.count(frame.body.len(), now);
        }
        self.receive_fresh(frame, wall, events)
    }

    /// Return whether a stale frame is an ERROR STALE_TIMESTAMP, which is processed all the same.
    fn corrects_clock(&self, frame: &Frame<'_>) -> bool {
        frame.kind == Kind::Error
            && message::decode_error(frame.body, self.settings.max_depth)
                .is_ok_and(|error| error.code == i128::from(Code::StaleTimestamp.number()))
    }

    fn receive_stale(&mut self, frame: &Frame<'_>, wall: i64, events: &mut Vec<Event>) -> Result<(), ProtocolError> {
        let stream = frame.stream;
        self.stale_count += 1;
        if self.stale_count >= MAX_CONSECUTIVE_STALE {
            return Err(ProtocolError { code: Code::StaleTimestamp, reason: "ten consecutive stale frames" });
        }
        let failed = |text| Event::Failed { stream, error: CallError::new(Code::DataLoss, text), lost: true };
        match frame.kind {
            Kind::Call => return self.receive_call(frame, true, wall, events),
            Kind::Withdraw => return self.receive_withdraw(frame, wall, events),
            Kind::Response | Kind::Error if self.requests.remove(stream) => {
                self.streams.answered(stream);
                events.push(failed(STALE_ANSWER));
            }
            Kind::Item | Kind::Credit if self.streams.is_read(stream) => {
                self.cancel(stream, wall); // a lost item would go unnoticed, and lost credit would block the stream
                events.push(failed(STALE_ITEM));
            }
            _ => self.dropped_stale += 1,
        }
        Ok(())
    }

    fn receive_fresh(&mut self, frame: &Frame<'_>, wall: i64, events: &mut Vec<Event>) -> Result<(), ProtocolError> {
        let max_depth = self.settings.max_depth;
        match frame.kind {
            Kind::Response => self.receive_response(frame, events),
            Kind::Error => self.receive_error(frame, wall, events)?,
            Kind::Item | Kind::Credit if self.requests.has(frame.stream) => {
                events.extend(self.streams.receive(frame)?);
            }
            Kind::Item | Kind::Credit => self.dropped_unknown += 1,
            Kind::Event => {
                let (name, _) = message::decode_event(frame.body, max_depth)
                    .map_err(|_| ProtocolError::new("EVENT is not [name, data]"))?;
                let token = Token::new(*frame.token);
                if name == "session.revoked" {
                    self.requests.session_ended(&token);
                }
                events.push(Event::Event { name, body: frame.body.to_vec(), token });
            }
            Kind::Call => self.receive_call(frame, false, wall, events)?,
            Kind::Withdraw => self.receive_withdraw(frame, wall, events)?,
            Kind::GoAway => {
                let (reason, retry_after_ms) = message::decode_goaway(frame.body, max_depth)?;
                self.state = State::Draining;
                events.push(Event::GoAway { reason, retry_after_ms });
            }
            Kind::Ping => {
                require_no_body(frame)?;
                self.pong_owed = Some(Token::new(*frame.token));
            }
            Kind::Pong => {
                require_no_body(frame)?;
                self.keepalive.pong_received();
            }
            Kind::Welcome => return Err(ProtocolError::new("WELCOME was sent twice")),
            // The decoder accepts no kind that only a client sends.
            _ => return Err(ProtocolError::new("this kind of frame is not for a client")),
        }
        Ok(())
    }

    fn receive_response(&mut self, frame: &Frame<'_>, events: &mut Vec<Event>) {
        let stream = frame.stream;
        if !self.requests.has(stream) {
            self.dropped_unknown += 1;
            return;
        }
        self.streams.answered(stream);
        if let Err(fault) = codec::scan(frame.body, self.settings.max_depth) {
            self.requests.remove(stream);
            let error = CallError::new(Code::Internal, format!("the response is invalid: {}", fault.phrase()));
            events.push(Event::Failed { stream, error, lost: false });
            return;
        }
        if let Some((old, token)) = self.requests.succeeded(stream, frame.body) {
            self.calls.token_renewed(&old, &token); // a CALL with the new token may be in the same read
        }
        events.push(Event::Response { stream, body: frame.body.to_vec() });
    }

    fn receive_error(&mut self, frame: &Frame<'_>, wall: i64, events: &mut Vec<Event>) -> Result<(), ProtocolError> {
        let stream = frame.stream;
        let message = match message::decode_error(frame.body, self.settings.max_depth) {
            Ok(message) => message,
            Err(_) if stream == 0 => return Err(ProtocolError::new("ERROR on stream 0 is invalid")),
            Err(fault) => ErrorMessage {
                code: i128::from(Code::Internal.number()),
                message: format!("the response is invalid: {}", fault.phrase()),
                details: Value::Map(Vec::new()),
            },
        };
        let error = message.into_error();
        if error.code == Code::StaleTimestamp {
            let time = error.details.get("server_time").and_then(Value::as_int);
            if let Some(time) = time.filter(|time| (0..=i128::from(MAX_SERVER_TIME)).contains(time)) {
                self.output.clock_offset = time - i128::from(wall);
            }
        }
        if stream == 0 {
            self.end_with(Some(error.code), error.message, events);
        } else if self.requests.has(stream) {
            self.requests.failed(stream, error.code);
            self.streams.answered(stream);
            events.push(Event::Failed { stream, error, lost: false });
        } else {
            self.dropped_unknown += 1;
        }
        Ok(())
    }

    fn receive_first(&mut self, frame: &Frame<'_>, wall: i64, now: Duration) -> Result<(), ProtocolError> {
        if frame.kind != Kind::Welcome {
            return Err(ProtocolError::new("the first frame is not WELCOME"));
        }
        if frame.counter != 0 {
            return Err(ProtocolError::new("WELCOME must have counter 0"));
        }
        if frame.timestamp > MAX_SERVER_TIME {
            return Err(ProtocolError::new("the server's time is out of range"));
        }
        let welcome = message::decode_welcome(frame.body, self.settings.max_depth)?;
        self.freshness = Some(Freshness::new(frame.salt, 0, self.settings.tolerance_ms));
        self.output.salt = frame.salt;
        self.output.clock_offset = i128::from(frame.timestamp) - i128::from(wall);
        self.accepted.max_length = self.settings.max_frame;
        self.accepted.streams = welcome.streams.is_some();
        self.accepted.max_item = welcome.streams.map_or(0, |streams| streams.max_item);
        self.streams.max_item = self.accepted.max_item;
        self.requests.max_frame = welcome.max_frame;
        self.requests.max_streams = welcome.max_streams;
        self.keepalive.start(welcome.idle_timeout_ms, now);
        self.welcome = Some(welcome);
        self.state = State::Open;
        Ok(())
    }

    /// Return for how long to stop reading, because of a flood of frames that answer no request.
    #[must_use]
    pub fn reading_delay(&self, now: Duration) -> Duration {
        self.unrequested.delay(now)
    }

    // --- requests --------------------------------------------------------------------------------

    /// Queue a REQUEST and return its number, which identifies the answer. `params` is an encoded map or nil.
    ///
    /// `session.open` and `session.refresh` are sent without a token; that of `session.refresh` is the one that its answer
    /// replaces.
    ///
    /// # Errors
    ///
    /// INVALID_ARGUMENT for a request that cannot be sent (if it is too large, details have `size` and `limit`),
    /// RESOURCE_EXHAUSTED if `max_streams` are in flight, UNAVAILABLE after GOAWAY, [`Error::Closed`] after the end.
    pub fn request(
        &mut self,
        method: &str,
        params: &[u8],
        token: &Token,
        meta: &Meta<'_>,
        wall: i64,
    ) -> Result<u32, Error> {
        self.require_open()?;
        self.send_request(Kind::Request, method, params, token, meta, None, wall)
    }

    /// Queue an OPEN that grants `window`: how many items and bytes the server may send ahead of the application.
    ///
    /// # Errors
    ///
    /// As [`request`](Self::request), and UNIMPLEMENTED if the server has no streams, RESOURCE_EXHAUSTED if its `max_open`
    /// are in flight.
    pub fn open(
        &mut self,
        method: &str,
        params: &[u8],
        token: &Token,
        meta: &Meta<'_>,
        window: Credit,
        wall: i64,
    ) -> Result<u32, Error> {
        let Some(limits) = self.require_open()?.streams else {
            return Err(Error::call(Code::Unimplemented, "this server has no streams"));
        };
        if self.streams.len() >= limits.max_open as usize {
            let error = CallError::new(Code::ResourceExhausted, "too many streams on this connection; close some");
            return Err(error.with("limit", i64::from(limits.max_open)).into());
        }
        let number = self.send_request(Kind::Open, method, params, token, meta, Some(window), wall)?;
        self.streams.add(number, token.clone(), window);
        Ok(number)
    }

    /// Queue a `session.handle`, which registers methods for calls from the server in the session of a token. `max` of them
    /// may run at once.
    ///
    /// # Errors
    ///
    /// As [`request`](Self::request), and UNIMPLEMENTED if the server calls no clients.
    pub fn handle(&mut self, token: &Token, methods: &[&str], max: u32, wall: i64) -> Result<u32, Error> {
        if self.require_open()?.max_calls.is_none() {
            return Err(Error::call(Code::Unimplemented, "this server does not call clients"));
        }
        let mut params = Vec::new();
        codec::write_map(&mut params, 2);
        codec::write_str(&mut params, "methods");
        codec::write_array(&mut params, methods.len());
        for method in methods {
            codec::write_str(&mut params, method);
        }
        codec::write_str(&mut params, "max");
        codec::write_int(&mut params, i128::from(max));
        let number = self.request("session.handle", &params, token, &Meta::default(), wall)?;
        self.calls.register(token, methods);
        self.accepted.calls = true;
        Ok(number)
    }

    fn require_open(&self) -> Result<&Welcome, Error> {
        match (self.state, &self.welcome) {
            (State::Open, Some(welcome)) => Ok(welcome),
            (State::Draining, _) => {
                Err(Error::call(Code::Unavailable, "the server accepts no new requests on this connection"))
            }
            (State::Closed, _) => Err(Closed::broken("the connection has ended").into()),
            _ => Err(Error::call(Code::Unavailable, "the server has not sent its WELCOME yet")),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one frame")]
    fn send_request(
        &mut self,
        kind: Kind,
        method: &str,
        params: &[u8],
        token: &Token,
        meta: &Meta<'_>,
        credit: Option<Credit>,
        wall: i64,
    ) -> Result<u32, Error> {
        if self.requests.is_full() {
            return Err(Error::call(Code::ResourceExhausted, "too many requests in flight on this connection"));
        }
        self.scratch.clear();
        message::encode_request(&mut self.scratch, method, params, meta, credit)
            .map_err(|fault| Error::call(Code::InvalidArgument, fault.phrase()))?;
        check_size("request", self.scratch.len(), self.send_limit())?;
        let number = self.requests.add(method, token);
        let sent = self.requests.sent_token(number).unwrap_or(token);
        self.output.send(kind, number, sent, &self.scratch, wall);
        self.keepalive.sent_since_check = true;
        if method.starts_with("session.") {
            self.scratch.as_mut_slice().zeroize(); // may hold a key or a refresh token
        }
        if self.scratch.capacity() > MAX_SCRATCH {
            self.scratch = Vec::new();
        }
        Ok(number)
    }

    /// Queue a CANCEL, once for a stream of items. The request stays in flight until its answer.
    pub fn cancel(&mut self, stream: u32, wall: i64) {
        if let Some(token) = self.requests.sent_token(stream).cloned() {
            if self.streams.leave(stream) {
                self.send(Kind::Cancel, stream, &token, &[], wall);
            }
        }
    }

    // --- streams of items ------------------------------------------------------------------------

    /// Return the number of streams of items in flight.
    #[must_use]
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// Return whether an item can be sent on a stream now.
    #[must_use]
    pub fn may_send_item(&self, stream: u32) -> bool {
        let is_allowed =
            |stream: &super::streams::ItemStream| stream.state == StreamState::Open && stream.sent.may_send();
        self.streams.get(stream).is_some_and(is_allowed)
    }

    /// Queue an ITEM, which needs [`may_send_item`](Self::may_send_item). Without it nothing is sent.
    ///
    /// # Errors
    ///
    /// INVALID_ARGUMENT for an item that is too large or not one value.
    pub fn send_item(&mut self, stream: u32, body: &[u8], wall: i64) -> Result<(), Error> {
        codec::scan(body, MAX_DEPTH).map_err(|fault| Error::call(Code::InvalidArgument, fault.phrase()))?;
        check_size("item", body.len(), self.streams.max_item)?;
        if !self.may_send_item(stream) {
            return Ok(());
        }
        if let Some(items) = self.streams.get_mut(stream) {
            items.sent.count(length_of(body.len()));
            let token = items.token.clone();
            self.send(Kind::Item, stream, &token, body, wall);
        }
        Ok(())
    }

    /// Queue an END: no more items follow. Does nothing after the first one.
    pub fn end_items(&mut self, stream: u32, wall: i64) {
        if let Some(items) = self.streams.get_mut(stream).filter(|items| items.state == StreamState::Open) {
            items.state = StreamState::Half;
            let token = items.token.clone();
            self.send(Kind::End, stream, &token, &[], wall);
        }
    }

    /// Record that the application has taken an item with a body of `size` bytes, and queue the credit that is due then.
    pub fn item_taken(&mut self, stream: u32, size: usize, wall: i64) {
        let Some(items) = self.streams.get_mut(stream).filter(|items| items.state != StreamState::Leaving) else {
            return;
        };
        if let Some(granted) = items.received.take(length_of(size)) {
            let token = items.token.clone();
            let mut body = Vec::with_capacity(19);
            message::encode_credit(&mut body, granted);
            self.send(Kind::Credit, stream, &token, &body, wall);
        }
    }

    // --- calls from the server -------------------------------------------------------------------

    fn receive_call(
        &mut self,
        frame: &Frame<'_>,
        is_stale: bool,
        wall: i64,
        events: &mut Vec<Event>,
    ) -> Result<(), ProtocolError> {
        if self.calls.token_of(frame.stream).is_some() || !self.calls.add(frame.stream, Token::new(*frame.token)) {
            return Err(ProtocolError::new("the number of this CALL is in flight"));
        }
        let call = if is_stale {
            Err(CallError::new(Code::StaleTimestamp, "the call was delayed for too long"))
        } else {
            self.calls.parse(frame, self.settings.max_depth)
        };
        match call {
            Ok(call) => events.push(Event::Call(call)),
            Err(error) => self.refuse_call(frame.stream, &error, wall)?,
        }
        Ok(())
    }

    fn receive_withdraw(&mut self, frame: &Frame<'_>, wall: i64, events: &mut Vec<Event>) -> Result<(), ProtocolError> {
        require_no_body(frame)?;
        if self.calls.token_of(frame.stream).is_none_or(|token| token.as_bytes() != frame.token) {
            self.dropped_unknown += 1;
            return Ok(());
        }
        let error = CallError::new(Code::Cancelled, "the server has withdrawn the call");
        self.refuse_call(frame.stream, &error, wall)?;
        events.push(Event::Withdrawn { number: frame.stream });
        Ok(())
    }

    /// Send a FAILURE that the server causes.
    fn refuse_call(&mut self, number: u32, error: &CallError, wall: i64) -> Result<(), ProtocolError> {
        let blocked = if self.is_output_blocked { self.calls.blocked_refusals + 1 } else { 0 };
        self.calls.blocked_refusals = blocked;
        if blocked > MAX_BLOCKED_REFUSALS {
            return Err(ProtocolError::new("the server calls, but reads no answers"));
        }
        self.answer(number, Err(error), wall);
        Ok(())
    }

    /// Answer a call with its result, one encoded value, or with an error. A result that cannot be sent becomes INTERNAL.
    /// Return false if the call was answered before.
    pub fn answer(&mut self, number: u32, answer: Result<&[u8], &CallError>, wall: i64) -> bool {
        let Some(token) = self.calls.remove(number) else {
            return false;
        };
        let limit = self.requests.max_frame as usize;
        let unsendable;
        let error = match answer {
            Ok(body) if codec::scan(body, MAX_DEPTH).is_err() => {
                unsendable = CallError::new(Code::Internal, "the result cannot be sent");
                &unsendable
            }
            Ok(body) if MIN_LENGTH as usize + body.len() > limit => {
                unsendable = CallError::new(Code::Internal, "the result is too large");
                &unsendable
            }
            Ok(body) => {
                self.send(Kind::Result, number, &token, body, wall);
                return true;
            }
            Err(error) => error,
        };
        self.send(Kind::Failure, number, &token, &message::encode_failure(error, limit), wall);
        true
    }

    /// Forget the token of a session that has ended.
    pub fn session_ended(&mut self, token: &Token) {
        self.requests.session_ended(token);
        self.calls.session_ended(token);
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
            Due::Unreachable => self.end_with(None, "the server does not respond".to_owned(), events),
            Due::Ping if !self.is_output_blocked => {
                self.ping(wall);
                self.keepalive.sent_since_check = false;
            }
            Due::Ping | Due::Nothing => {}
        }
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
}

fn require_no_body(frame: &Frame<'_>) -> Result<(), ProtocolError> {
    if frame.body.is_empty() {
        return Ok(());
    }
    Err(ProtocolError::new("this kind of frame must not have a body"))
}

fn check_size(what: &str, body_size: usize, limit: u32) -> Result<(), Error> {
    let size = MIN_LENGTH as usize + body_size;
    if size <= limit as usize {
        return Ok(());
    }
    let error =
        CallError::new(Code::InvalidArgument, format!("the {what} has {size} bytes; the server accepts {limit}"));
    let shown = i64::try_from(size).unwrap_or(i64::MAX);
    Err(error.with("size", shown).with("limit", i64::from(limit)).into())
}
