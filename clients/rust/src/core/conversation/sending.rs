//! What the application sends: requests, and the items of streams.

use super::{Conversation, State};
use crate::codec::{self, MAX_DEPTH};
use crate::core::streams::{ItemStream, StreamState, length_of};
use crate::error::{CallError, Closed, Code, Error};
use crate::frame::{Kind, MIN_LENGTH};
use crate::message::{self, Credit, Meta, Welcome};
use crate::secret::Token;
use zeroize::Zeroize;

const NIL: &[u8] = &[0xc0];

/// The largest buffer that is kept between requests, in bytes.
const MAX_SCRATCH: usize = 65_536;

impl Conversation {
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
        self.require_room()?;
        self.send_request(Kind::Request, method, params, token, meta, None, wall)
    }

    /// Queue a `session.info` that shows a new token, and return its number. Its answer does not matter: it can be sent on a
    /// connection that drains or has no room, too. Return `None` if it cannot be sent.
    pub fn show(&mut self, token: &Token, wall: i64) -> Option<u32> {
        let is_open = matches!(self.state, State::Open | State::Draining);
        let has_room = self.requests.len() < 2 * self.requests.max_streams as usize; // for a server that answers nothing
        if !is_open || !has_room {
            return None;
        }
        self.send_request(Kind::Request, "session.info", NIL, token, &Meta::default(), None, wall).ok()
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
        self.require_room()?;
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

    fn require_room(&self) -> Result<(), Error> {
        if self.requests.is_full() {
            return Err(Error::call(Code::ResourceExhausted, "too many requests in flight on this connection"));
        }
        Ok(())
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
        let is_allowed = |stream: &ItemStream| stream.state == StreamState::Open && stream.sent.may_send();
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
