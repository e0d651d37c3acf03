//! Calls from the server: what happens to each, and how it is answered.

use super::Conversation;
use super::receiving::require_no_body;
use crate::codec::{self, MAX_DEPTH};
use crate::core::calls::MAX_BLOCKED_REFUSALS;
use crate::core::events::Event;
use crate::error::{CallError, Code, ProtocolError};
use crate::frame::{Frame, Kind, MIN_LENGTH};
use crate::message;
use crate::secret::Token;

impl Conversation {
    pub(super) fn receive_call(
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

    pub(super) fn receive_withdraw(
        &mut self,
        frame: &Frame<'_>,
        wall: i64,
        events: &mut Vec<Event>,
    ) -> Result<(), ProtocolError> {
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

    /// Accept calls with a newer token of a session that was refreshed on another connection.
    pub fn session_renewed(&mut self, old: &Token, token: &Token) {
        self.requests.session_ended(old);
        self.calls.token_renewed(old, token);
    }

    /// Forget the token of a session that has ended.
    pub fn session_ended(&mut self, token: &Token) {
        self.requests.session_ended(token);
        self.calls.session_ended(token);
    }
}
