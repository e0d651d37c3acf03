//! The items of a stream, on their way between a connection and the application.

use super::{Connection, MAX_QUEUED_ITEMS};
use crate::error::{Code, Error, Result};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// A stream in flight: a number on a connection.
#[derive(Clone)]
pub(crate) struct InFlight {
    connection: Arc<Connection>,
    number: u32,
}

impl InFlight {
    /// Let the server send more, in place of an item that the application has taken.
    pub(crate) fn item_taken(&self, size: usize) {
        self.connection.with(|conversation, wall| conversation.item_taken(self.number, size, wall));
    }

    /// Send an item if that is possible now. Otherwise the items are notified when it is.
    fn try_send(&self, body: &[u8]) -> Option<Result<()>> {
        let may_send = {
            let mut state = self.connection.lock();
            let is_full = state.is_blocked || state.conversation.queued_bytes() >= MAX_QUEUED_ITEMS;
            state.has_waiting_items |= is_full;
            !is_full && state.conversation.may_send_item(self.number)
        };
        may_send.then(|| self.connection.with(|conversation, wall| conversation.send_item(self.number, body, wall)))
    }
}

/// What connection and application share of a stream.
#[derive(Default)]
pub(crate) struct ItemQueue {
    state: Mutex<State>,
    notify: Notify,
}

#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts, not a state machine")]
struct State {
    in_flight: Option<InFlight>,
    bodies: VecDeque<Vec<u8>>,
    /// Whether an ITEM or CREDIT was received: the method has begun, so the stream must not be opened again.
    has_begun: bool,
    has_ended_items: bool,
    outcome: Option<Result<Vec<u8>>>,
    taken: u64,
    /// Whether the application can continue the stream after an interruption. Then `last` is the last item that it took.
    can_reopen: bool,
    last: Option<Vec<u8>>,
    has_progressed: bool,
    was_lost: bool,
}

/// An item that the application takes.
pub(crate) struct Taken {
    pub(crate) body: Vec<u8>,
    /// The count of those before it.
    pub(crate) number: u64,
    pub(crate) in_flight: Option<InFlight>,
}

impl ItemQueue {
    pub(crate) fn new(can_reopen: bool) -> Arc<Self> {
        let state = State { can_reopen, ..State::default() };
        Arc::new(Self { state: Mutex::new(state), notify: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, step: impl FnOnce(&mut State)) {
        step(&mut self.lock());
        self.changed();
    }

    /// Wait until a step returns something.
    async fn wait<T>(&self, mut step: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let notified = self.notify.notified();
            if let Some(found) = step(&mut self.lock()) {
                return found;
            }
            notified.await;
        }
    }

    // --- called by the connection, under its lock ------------------------------------------------

    pub(super) fn opened(&self, connection: &Arc<Connection>, number: u32) {
        self.change(|state| {
            state.in_flight = Some(InFlight { connection: Arc::clone(connection), number });
            state.has_begun = false;
            state.was_lost = false;
        });
    }

    pub(super) fn received(&self, body: Vec<u8>) {
        self.change(|state| {
            state.has_begun = true;
            state.bodies.push_back(body);
        });
    }

    pub(super) fn credited(&self) {
        self.change(|state| state.has_begun = true);
    }

    /// Record that the stream is not in flight any more. If a frame of it was stale, it has begun.
    pub(super) fn ended(&self, was_lost: bool) {
        self.change(|state| {
            state.in_flight = None;
            state.has_begun |= was_lost;
            state.was_lost = was_lost;
        });
    }

    pub(super) fn changed(&self) {
        self.notify.notify_waiters();
    }

    // --- called between two attempts -------------------------------------------------------------

    pub(crate) fn has_begun(&self) -> bool {
        self.lock().has_begun
    }

    pub(crate) fn can_reopen(&self) -> bool {
        self.lock().can_reopen
    }

    pub(crate) fn was_lost(&self) -> bool {
        self.lock().was_lost
    }

    /// Return the last item that the application has taken, of a stream that can be opened again.
    pub(crate) fn last(&self) -> Option<Vec<u8>> {
        self.lock().last.clone()
    }

    /// Wait until the application has taken all items. Return whether it has taken any since the last attempt.
    pub(crate) async fn drained(&self) -> bool {
        self.wait(|state| state.bodies.is_empty().then(|| std::mem::take(&mut state.has_progressed))).await
    }

    // --- called by the application ---------------------------------------------------------------

    /// Take the next item; `None` after the last one.
    pub(crate) async fn take(&self) -> Result<Option<Taken>> {
        self.wait(|state| match (state.bodies.pop_front(), &state.outcome) {
            (Some(body), _) => {
                state.taken += 1;
                Some(Ok(Some(Taken { body, number: state.taken - 1, in_flight: state.in_flight.clone() })))
            }
            (None, Some(outcome)) => Some(outcome.clone().map(|_| None)),
            (None, None) => None,
        })
        .await
    }

    /// Remember an item that was taken, if the stream can be opened again behind it.
    pub(crate) fn set_last(&self, body: &[u8]) {
        if self.can_reopen() {
            self.change(|state| {
                state.last = Some(body.to_vec());
                state.has_progressed = true;
            });
        }
    }

    /// Wait for the result.
    pub(crate) async fn result(&self) -> Result<Vec<u8>> {
        self.wait(|state| state.outcome.clone()).await
    }

    pub(crate) fn is_over(&self) -> bool {
        self.lock().outcome.is_some()
    }

    /// Send an item, once the server wants it.
    pub(crate) async fn send(&self, body: &[u8]) -> Result<()> {
        loop {
            let notified = self.notify.notified();
            let in_flight = {
                let state = self.lock();
                match &state.outcome {
                    Some(Err(error)) => return Err(error.clone()),
                    Some(Ok(_)) => return Err(Error::call(Code::Cancelled, "the server has ended the stream")),
                    None if state.has_ended_items || state.can_reopen => {
                        return Err(Error::Config("no more items can be sent on this stream".to_owned()));
                    }
                    None => state.in_flight.clone(),
                }
            };
            if let Some(sent) = in_flight.and_then(|in_flight| in_flight.try_send(body)) {
                return sent;
            }
            notified.await;
        }
    }

    /// Send no more items.
    pub(crate) fn end_items(&self) {
        let in_flight = {
            let mut state = self.lock();
            state.has_ended_items = true;
            state.in_flight.clone()
        };
        if let Some(InFlight { connection, number }) = in_flight {
            connection.with(|conversation, wall| conversation.end_items(number, wall));
        }
    }

    pub(crate) fn has_ended_items(&self) -> bool {
        self.lock().has_ended_items
    }

    /// Return whether the server of the connection is going away.
    pub(crate) fn is_draining(&self) -> bool {
        let in_flight = self.lock().in_flight.clone();
        in_flight.is_some_and(|in_flight| in_flight.connection.is_draining())
    }

    /// End the stream. Only the first outcome counts.
    pub(crate) fn finish(&self, outcome: Result<Vec<u8>>) {
        self.change(|state| {
            state.outcome.get_or_insert(outcome);
        });
    }

    /// End the stream, and drop the items that were not taken.
    pub(crate) fn leave(&self, error: Error) {
        self.change(|state| {
            state.bodies.clear();
            state.outcome.get_or_insert(Err(error));
        });
    }
}
