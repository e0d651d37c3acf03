//! What a connection does with each frame of the server.

use super::{Conversation, FRAME_TIMEOUT, MAX_SERVER_TIME, Partial, State};
use crate::codec::{self, Value};
use crate::core::events::Event;
use crate::core::freshness::{Freshness, MAX_CONSECUTIVE_STALE, Verdict};
use crate::error::{CallError, Code, ProtocolError};
use crate::frame::{Frame, FrameDecoder, HEADER_SIZE, Kind};
use crate::message::{self, ErrorMessage};
use crate::secret::Token;
use std::time::Duration;

const STALE_ANSWER: &str = "the answer was delayed for too long; check whether the request took effect";
const STALE_ITEM: &str = "an item was delayed for too long; the stream is incomplete";

impl Conversation {
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
}

pub(super) fn require_no_body(frame: &Frame<'_>) -> Result<(), ProtocolError> {
    if frame.body.is_empty() {
        return Ok(());
    }
    Err(ProtocolError::new("this kind of frame must not have a body"))
}
