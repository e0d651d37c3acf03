//! The streams of items of one connection at the client (zcp1.md, section 18.10).
//!
//! ```text
//! open, half   in flight; half: this end has ended its items
//! leaving      CANCEL was sent; its answer is awaited, and items are dropped
//! ```

use super::credit::{ReceiveCredit, SendCredit};
use super::events::Event;
use crate::error::ProtocolError;
use crate::frame::{Frame, Kind, MIN_LENGTH};
use crate::message::Credit;
use crate::secret::Token;
use std::collections::HashMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamState {
    Open,
    Half,
    Leaving,
}

#[derive(Debug)]
pub(crate) struct ItemStream {
    pub(crate) state: StreamState,
    pub(crate) token: Token,
    pub(crate) sent: SendCredit,
    pub(crate) received: ReceiveCredit,
}

/// The streams in flight.
#[derive(Debug, Default)]
pub(crate) struct ItemStreams {
    /// The largest `length` of an ITEM that the server accepts.
    pub(crate) max_item: u32,
    streams: HashMap<u32, ItemStream>,
}

/// Return the `length` of a frame.
pub(crate) fn length_of(body_size: usize) -> u64 {
    u64::from(MIN_LENGTH) + body_size as u64
}

impl ItemStreams {
    pub(crate) fn len(&self) -> usize {
        self.streams.len()
    }

    pub(crate) fn get(&self, number: u32) -> Option<&ItemStream> {
        self.streams.get(&number)
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut ItemStream> {
        self.streams.get_mut(&number)
    }

    /// Add a stream whose OPEN grants `window`.
    pub(crate) fn add(&mut self, number: u32, token: Token, window: Credit) {
        let received = ReceiveCredit::new(window, window, [0, 0]);
        self.streams
            .insert(number, ItemStream { state: StreamState::Open, token, sent: SendCredit::default(), received });
    }

    /// Process an ITEM or CREDIT on a number in flight. Return `None` if it is dropped.
    pub(crate) fn receive(&mut self, frame: &Frame<'_>) -> Result<Option<Event>, ProtocolError> {
        let number = frame.stream;
        let Some(stream) = self.streams.get_mut(&number) else {
            return Err(ProtocolError::new("ITEM or CREDIT on the stream of a REQUEST"));
        };
        if stream.state == StreamState::Leaving {
            return Ok(None);
        }
        if frame.kind == Kind::Item {
            stream.received.receive(length_of(frame.body.len()))?;
            return Ok(Some(Event::Item { stream: number, body: frame.body.to_vec() }));
        }
        stream.sent.read(frame.body)?;
        Ok(Some(Event::Credit { stream: number }))
    }

    /// Return whether a stream is in flight and was not left.
    pub(crate) fn is_read(&self, number: u32) -> bool {
        self.get(number).is_some_and(|stream| stream.state != StreamState::Leaving)
    }

    /// Forget a stream that was answered.
    pub(crate) fn answered(&mut self, number: u32) {
        self.streams.remove(&number);
    }

    /// Drop the items to come of a number that is cancelled. Return false if it was left before.
    pub(crate) fn leave(&mut self, number: u32) -> bool {
        let Some(stream) = self.streams.get_mut(&number) else {
            return true; // a REQUEST
        };
        let is_first = stream.state != StreamState::Leaving;
        stream.state = StreamState::Leaving;
        is_first
    }
}
