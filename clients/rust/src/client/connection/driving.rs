//! The task of a connection: it reads, decrypts, hands out what has happened, encrypts and writes, until the end.

use super::super::transport::{End, Transport, reset};
use super::{Closing, Connection, ItemQueue, Listener, State, Waiter, wall};
use crate::core::Event;
use crate::error::{Closed, Result};
use crate::text;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};
use zeroize::Zeroizing;

/// The longest delay that a server can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3_600);
/// The shortest pause of reading: flooding servers are read in batches, not frame by frame.
const MIN_READING_PAUSE: Duration = Duration::from_millis(50);
const FOREVER: Duration = Duration::from_secs(365 * 86_400);

impl Connection {
    pub(super) async fn run(self: Arc<Self>, mut transport: Transport, listener: Arc<dyn Listener>) {
        let how = self.drive(&mut transport, &*listener).await;
        let reason = self.lock().reason.unwrap_or("the connection was closed by this client");
        let error = if how == Closing::Abort { Closed::broken(reason) } else { Closed::clean(reason) };
        self.end(&error, &*listener);
        if how == Closing::Graceful {
            transport.close().await;
        } else {
            drop(transport);
        }
        self.is_closed.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Drive the connection until it ends, and return how to close it.
    async fn drive(self: &Arc<Self>, transport: &mut Transport, listener: &dyn Listener) -> Closing {
        let mut output = Zeroizing::new(Vec::new());
        let mut events = Vec::new();
        let mut is_blocked = false;
        let mut reading_pause: Option<Instant> = None;
        let mut timer = pin!(sleep_until(self.started + FOREVER));
        let mut end = None; // of the bytes that were read with the handshake
        loop {
            if !transport.plaintext.is_empty() {
                let pause = self.receive(&transport.plaintext, &mut events, listener);
                transport.plaintext.clear();
                if pause > Duration::ZERO {
                    reading_pause = Some(Instant::now() + pause.max(MIN_READING_PAUSE));
                }
            }
            if let Some(end) = end.take() {
                return self.ended_by_peer(end, listener);
            }
            let (closing, deadline) = {
                let mut state = self.lock();
                state.is_woken = false;
                let next = if self.is_watched.load(Ordering::Acquire) {
                    state.conversation.check_silence(wall(), self.now(), &mut events)
                } else {
                    None
                };
                if !is_blocked {
                    state.conversation.swap_output(&mut output);
                    state.wake_waiting_items();
                }
                (state.closing, [next, state.conversation.next_deadline()].into_iter().flatten().min())
            };
            for event in events.drain(..) {
                listener.event(self, event); // Silent
            }
            if closing == Some(Closing::Abort) {
                return Closing::Abort;
            }
            if !output.is_empty() {
                transport.encrypt(&output);
                output.clear();
            }
            match transport.try_flush() {
                Ok(is_flushed) => {
                    if is_blocked == is_flushed {
                        is_blocked = !is_flushed;
                        self.set_blocked(is_blocked);
                        if !is_blocked {
                            continue; // with what has waited
                        }
                    }
                }
                Err(error) => return self.ended_by_peer(End::Broken(reset(&error)), listener),
            }
            if closing.is_some() {
                return Closing::Graceful;
            }
            let deadline = deadline.map_or(self.started + FOREVER, |deadline| self.started + deadline);
            let wake_at = reading_pause.map_or(deadline, |until| until.min(deadline));
            if timer.deadline() != wake_at {
                timer.as_mut().reset(wake_at);
            }
            let turn = poll_fn(|cx| self.poll_turn(cx, transport, is_blocked, reading_pause.is_some(), timer.as_mut()));
            match turn.await {
                Turn::Woken => {}
                Turn::Read(Ok(size)) => {
                    if size > 0 && self.is_watched.load(Ordering::Acquire) {
                        self.has_heard();
                    }
                    end = transport.decrypt(size);
                }
                Turn::Read(Err(error)) => end = Some(End::Broken(reset(&error))),
                Turn::Time => {
                    reading_pause = reading_pause.filter(|&until| Instant::now() < until);
                    self.lock().conversation.handle_timeout(wall(), self.now(), &mut events);
                    if let Some(Event::Ended { reason, .. }) = events.pop() {
                        self.end(&Closed::broken(reason), listener);
                        return Closing::Abort; // the server is unreachable: skip close_notify
                    }
                }
            }
        }
    }

    fn poll_turn(
        &self,
        cx: &mut Context<'_>,
        transport: &mut Transport,
        is_blocked: bool,
        is_paused: bool,
        timer: Pin<&mut tokio::time::Sleep>,
    ) -> Poll<Turn> {
        {
            let mut state = self.lock();
            if state.is_woken {
                return Poll::Ready(Turn::Woken);
            }
            if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                state.waker = Some(cx.waker().clone());
            }
        }
        if is_blocked && transport.poll_writable(cx).is_ready() {
            return Poll::Ready(Turn::Woken);
        }
        if !is_paused {
            if let Poll::Ready(size) = transport.poll_read(cx) {
                return Poll::Ready(Turn::Read(size));
            }
        }
        timer.poll(cx).map(|()| Turn::Time)
    }

    /// Record that bytes have arrived, perhaps too few for a record of TLS.
    fn has_heard(&self) {
        if self.lock().conversation.heard(self.now()) {
            self.changed.notify_waiters();
        }
    }

    fn set_blocked(&self, is_blocked: bool) {
        let mut state = self.lock();
        state.is_blocked = is_blocked;
        if is_blocked {
            state.conversation.block_output();
            return;
        }
        state.conversation.unblock_output(wall());
        drop(state);
        self.changed.notify_waiters();
    }

    fn ended_by_peer(self: &Arc<Self>, end: End, listener: &dyn Listener) -> Closing {
        let (error, how) = match end {
            End::Clean => {
                let mut state = self.lock();
                state.unanswered_did_not_run = state.draining.is_some() && state.error.is_none();
                (Closed::clean("the server closed the connection"), Closing::Graceful)
            }
            End::Broken(error) => {
                (Closed { tls: Some(error.clone()), ..Closed::broken(error.detail) }, Closing::Graceful)
            }
        };
        self.end(&error, listener);
        how
    }

    /// Process decrypted bytes. Return for how long to stop reading.
    fn receive(self: &Arc<Self>, data: &[u8], events: &mut Vec<Event>, listener: &dyn Listener) -> Duration {
        let now = self.now();
        let mut others = Vec::new();
        let delay = {
            let mut state = self.lock();
            if state.error.is_some() {
                return Duration::ZERO; // what arrives after the end is discarded
            }
            state.conversation.receive(data, wall(), now, events);
            for event in events.drain(..) {
                match event {
                    Event::Response { stream, body } => state.answered(stream, Ok(body), false),
                    Event::Failed { stream, mut error, lost } => {
                        error.message = text::escape(&error.message, text::MAX_MESSAGE);
                        state.answered(stream, Err(error.into()), lost);
                    }
                    Event::Item { stream, body } => state.with_items(stream, |items| items.received(body)),
                    Event::Credit { stream } => state.with_items(stream, ItemQueue::credited),
                    Event::Welcomed => {
                        let max = state.conversation.welcome().map_or(0, |welcome| welcome.max_streams);
                        self.slots.add_permits((max as usize).min(Semaphore::MAX_PERMITS));
                        self.changed.notify_waiters();
                    }
                    Event::GoAway { .. } if state.draining.is_some() => {} // sent twice
                    Event::GoAway { retry_after_ms, .. } => {
                        // Before WELCOME of the same read is noticed.
                        state.draining = Some(Duration::from_millis(retry_after_ms).min(MAX_RETRY_AFTER));
                        self.slots.close();
                        others.push(event);
                    }
                    event => others.push(event),
                }
            }
            state.close_if_drained();
            state.conversation.reading_delay(now)
        };
        for event in others {
            match event {
                Event::Ended { code, reason } => {
                    let error = Closed { code, ..Closed::broken(text::escape(&reason, text::MAX_MESSAGE)) };
                    self.end(&error, listener);
                    self.closing(Closing::Graceful);
                }
                event => listener.event(self, event),
            }
        }
        delay
    }
}

enum Turn {
    Woken,
    Read(std::io::Result<usize>),
    Time,
}

impl State {
    fn answered(&mut self, number: u32, outcome: Result<Vec<u8>>, was_lost: bool) {
        let waiter = if self.conversation.is_in_flight(number) {
            // A stream that this end has cancelled keeps its slot until the answer.
            self.pending.get_mut(&number).and_then(|entry| entry.waiter.take())
        } else {
            self.pending.remove(&number).and_then(|entry| entry.waiter)
        };
        let Some(mut waiter) = waiter else {
            return;
        };
        if let (Some(on_result), Ok(body)) = (waiter.on_result.take(), &outcome) {
            on_result(body);
        }
        if let Some(items) = &waiter.items {
            items.ended(was_lost);
        }
        let _ = waiter.sender.send(outcome);
    }

    fn with_items(&mut self, number: u32, step: impl FnOnce(&ItemQueue)) {
        if let Some(Waiter { items: Some(items), .. }) =
            self.pending.get(&number).and_then(|entry| entry.waiter.as_ref())
        {
            step(items);
        }
    }

    fn wake_waiting_items(&mut self) {
        if std::mem::take(&mut self.has_waiting_items) {
            for items in self.pending.values().filter_map(|entry| entry.waiter.as_ref()?.items.as_ref()) {
                items.changed();
            }
        }
    }
}
