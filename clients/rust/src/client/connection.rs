//! One connection, driven by one task: transport <-> conversation <-> calls that wait.
//!
//! Decides: which call gets which answer, when a call can be sent (requests in flight, back-pressure), how a call is abandoned
//! without affecting others, keepalive, and the error of calls that wait at the end.
//! Must not know: retries and sessions.

mod driving;
mod items;

pub(crate) use items::{ItemQueue, Taken};

use super::address::Endpoint;
use super::transport::Transport;
use crate::core::{Conversation, Event, Settings, State as Phase};
use crate::error::{CallError, Closed, Error, Result};
use crate::message::{Meta, Welcome};
use crate::secret::Token;
use crate::trust::Channel;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

/// Bytes that wait to be sent, beyond which no further items are queued.
const MAX_QUEUED_ITEMS: usize = 65_536;

/// Receives what concerns more than one call. Called without locks.
pub(crate) trait Listener: Send + Sync {
    fn event(&self, connection: &Arc<Connection>, event: Event);
    fn ended(&self, connection: &Arc<Connection>, error: &Closed);
}

/// The permission to send one request. It is returned with the answer.
pub(crate) type Slot = OwnedSemaphorePermit;

type OnResult = Box<dyn FnOnce(&[u8]) + Send>;

struct Waiter {
    sender: oneshot::Sender<Result<Vec<u8>>>,
    items: Option<Arc<ItemQueue>>,
    /// Called with the result before anything else of the same read is processed.
    on_result: Option<OnResult>,
}

/// A request in flight; without a waiter it was abandoned.
struct Entry {
    waiter: Option<Waiter>,
    _slot: Option<Slot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    Graceful,
    Abort,
}

#[allow(clippy::struct_excessive_bools, reason = "independent facts, not a state machine")]
struct State {
    conversation: Conversation,
    pending: BTreeMap<u32, Entry>,
    error: Option<Closed>,
    /// What the server has asked to wait before the next connection, after GOAWAY.
    draining: Option<Duration>,
    unanswered_did_not_run: bool,
    is_blocked: bool,
    /// Whether an item waits until what is queued was sent.
    has_waiting_items: bool,
    closing: Option<Closing>,
    /// Why this end cuts the connection.
    reason: Option<&'static str>,
    is_woken: bool,
    waker: Option<Waker>,
}

/// One connection to a server.
pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) endpoint: Endpoint,
    leaf: [u8; 32],
    started: Instant,
    slots: Arc<Semaphore>,
    /// WELCOME, room to send, the end of the transport.
    changed: Notify,
    state: Mutex<State>,
    is_extra: AtomicBool,
    is_watched: AtomicBool,
    is_closed: AtomicBool,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// Return this machine's time in milliseconds since the Unix epoch.
pub(crate) fn wall() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

impl Connection {
    /// Start a connection over a transport whose handshake is complete.
    pub(crate) fn start(
        transport: Transport,
        endpoint: Endpoint,
        leaf: [u8; 32],
        settings: Settings,
        listener: Arc<dyn Listener>,
    ) -> Arc<Self> {
        let connection = Arc::new(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            endpoint,
            leaf,
            started: Instant::now(),
            slots: Arc::new(Semaphore::new(0)), // until WELCOME
            changed: Notify::new(),
            state: Mutex::new(State {
                conversation: Conversation::new(settings),
                pending: BTreeMap::new(),
                error: None,
                draining: None,
                unanswered_did_not_run: false,
                is_blocked: false,
                has_waiting_items: false,
                closing: None,
                reason: None,
                is_woken: false,
                waker: None,
            }),
            is_extra: false.into(),
            is_watched: false.into(),
            is_closed: false.into(),
        });
        tokio::spawn(Arc::clone(&connection).run(transport, listener));
        connection
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    // --- state -----------------------------------------------------------------------------------

    /// Wait for WELCOME.
    pub(crate) async fn welcomed(&self) -> Result<Welcome> {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.lock();
                if let Some(welcome) = state.conversation.welcome() {
                    return Ok(welcome.clone()); // the connection may have ended since
                }
                if let Some(error) = &state.error {
                    return Err(error.clone().into());
                }
            }
            changed.await;
        }
    }

    pub(crate) fn welcome(&self) -> Option<Welcome> {
        self.lock().conversation.welcome().cloned()
    }

    /// Return what a signature is bound to.
    pub(crate) fn channel(&self) -> Channel {
        Channel { salt: self.lock().conversation.salt(), leaf: self.leaf }
    }

    /// Return the server's time in milliseconds since the Unix epoch.
    pub(crate) fn server_wall(&self) -> i64 {
        let time = i128::from(wall()) + self.lock().conversation.clock_offset();
        i64::try_from(time).unwrap_or(i64::MAX)
    }

    pub(crate) fn error(&self) -> Option<Closed> {
        self.lock().error.clone()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.lock().draining.is_some()
    }

    /// Return what the server has asked to wait before the next connection, if it is going away.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        self.lock().draining
    }

    /// Return whether new requests can be sent, perhaps after a wait for a slot.
    pub(crate) fn is_open(&self) -> bool {
        !self.slots.is_closed()
    }

    /// Return whether the server allows no more requests in flight.
    pub(crate) fn is_full(&self) -> bool {
        self.slots.available_permits() == 0
    }

    /// Record that this is a connection beside another one, for calls alone.
    pub(crate) fn mark_extra(&self) {
        self.is_extra.store(true, Ordering::Release);
    }

    pub(crate) fn is_extra(&self) -> bool {
        self.is_extra.load(Ordering::Acquire)
    }

    /// Watch for silence, since there is another server.
    pub(crate) fn watch(&self) {
        self.lock().conversation.watch(self.now());
        self.is_watched.store(true, Ordering::Release);
    }

    /// Record that a call has timed out: the server may hang.
    pub(crate) fn call_timed_out(&self) {
        if self.is_watched.load(Ordering::Acquire) {
            let mut state = self.lock();
            state.conversation.call_timed_out();
            state.is_woken = true;
            wake(state);
        }
    }

    /// Return whether a byte has arrived here since the PING to another server, which is silent.
    pub(crate) fn has_answered_since(&self, silent: &Self) -> bool {
        let (heard_at, _) = self.lock().conversation.silence_times();
        let (_, asked_at) = silent.lock().conversation.silence_times();
        self.started + heard_at > silent.started + asked_at
    }

    pub(crate) fn is_silent(&self) -> bool {
        self.lock().conversation.is_silent()
    }

    /// Wait until a silent connection has received a byte, or has ended.
    pub(crate) async fn heard(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.is_silent() || self.error().is_some() {
                return;
            }
            changed.await;
        }
    }

    pub(crate) fn has_session(&self) -> bool {
        self.lock().conversation.has_session()
    }

    /// Return whether the server calls clients.
    pub(crate) fn has_calls(&self) -> bool {
        self.lock().conversation.welcome().is_some_and(|welcome| welcome.max_calls.is_some())
    }

    /// Return, after the end, whether requests without an answer certainly did not run: the server sent GOAWAY and then
    /// closed cleanly.
    pub(crate) fn unanswered_did_not_run(&self) -> bool {
        self.lock().unanswered_did_not_run
    }

    // --- requests --------------------------------------------------------------------------------

    /// Wait until a request can be sent, first come, first served. Return `None` if no more can be sent here.
    pub(crate) async fn slot(&self) -> Option<Slot> {
        if let Some(slot) = self.try_slot() {
            return Some(slot);
        }
        let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
        self.writable().await;
        Some(slot)
    }

    /// Return a slot, if a request can be sent now.
    pub(crate) fn try_slot(&self) -> Option<Slot> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        (!self.lock().is_blocked).then_some(slot)
    }

    /// Wait until the transport can send, or has ended.
    pub(crate) async fn writable(&self) {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.lock();
                if !state.is_blocked || state.error.is_some() {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Send a REQUEST.
    pub(crate) fn request(
        self: &Arc<Self>,
        slot: Slot,
        method: &str,
        params: &[u8],
        token: &Token,
        meta: &Meta<'_>,
    ) -> Result<PendingCall> {
        self.send(slot, None, None, |conversation, wall| conversation.request(method, params, token, meta, wall))
    }

    /// Send a request in a way of its own.
    pub(crate) fn send(
        self: &Arc<Self>,
        slot: Slot,
        items: Option<Arc<ItemQueue>>,
        on_result: Option<OnResult>,
        send: impl FnOnce(&mut Conversation, i64) -> Result<u32>,
    ) -> Result<PendingCall> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.lock();
        if let Some(error) = &state.error {
            return Err(error.clone().into());
        }
        let number = send(&mut state.conversation, wall())?;
        if let Some(items) = &items {
            items.opened(self, number);
        }
        state.pending.insert(number, Entry { waiter: Some(Waiter { sender, items, on_result }), _slot: Some(slot) });
        wake(state);
        Ok(PendingCall { connection: Arc::clone(self), number, receiver, is_done: false })
    }

    /// Show the new token of a refreshed session, without waiting for room or for the answer.
    pub(crate) fn show(&self, old: Option<&Token>, token: &Token) {
        let mut state = self.lock();
        if state.error.is_some() {
            return;
        }
        if let Some(old) = old {
            state.conversation.session_renewed(old, token);
        }
        if let Some(number) = state.conversation.show(token, wall()) {
            state.pending.insert(number, Entry { waiter: None, _slot: None });
            wake(state);
        }
    }

    /// Run a step of the conversation and send its frames.
    fn with<T>(&self, step: impl FnOnce(&mut Conversation, i64) -> T) -> T {
        let mut state = self.lock();
        let result = step(&mut state.conversation, wall());
        wake(state);
        result
    }

    /// Answer a call from the server. Does nothing if it was answered before.
    pub(crate) fn answer(&self, number: u32, answer: Result<&[u8], &CallError>) {
        let mut state = self.lock();
        state.conversation.answer(number, answer, wall());
        state.close_if_drained();
        wake(state);
    }

    /// Cancel a request on the server, and forget who waits for it. Does nothing after its answer.
    fn abandon(&self, number: u32) {
        let mut state = self.lock();
        if state.pending.get_mut(&number).is_some_and(|entry| entry.waiter.take().is_some()) {
            state.conversation.cancel(number, wall());
            state.close_if_drained();
            wake(state);
        }
    }

    /// Forget the token of a session that has ended: the limits of a connection without a session may apply again.
    pub(crate) fn session_ended(&self, token: &Token) {
        self.lock().conversation.session_ended(token);
    }

    // --- the end ---------------------------------------------------------------------------------

    /// Send what waits and close_notify, then close.
    pub(crate) fn close(&self) {
        self.closing(Closing::Graceful);
    }

    /// Close the connection if no request and no call of the server is in flight. Return whether it closes.
    pub(crate) fn close_if_unused(&self) -> bool {
        let (slots, calls) = {
            let state = self.lock();
            let slots = state.conversation.welcome().map_or(0, |welcome| welcome.max_streams);
            (slots, state.conversation.calls_in_flight())
        };
        let Ok(_all) = self.slots.try_acquire_many(slots) else { return false };
        if calls == 0 {
            self.close();
        }
        calls == 0
    }

    /// Cut the connection, like a network failure.
    pub(crate) fn abort(&self) {
        self.closing(Closing::Abort);
    }

    /// Cut the connection for a reason that its calls get.
    pub(crate) fn give_up(&self, reason: &'static str) {
        self.lock().reason = Some(reason);
        self.abort();
    }

    fn closing(&self, how: Closing) {
        let mut state = self.lock();
        if state.closing != Some(Closing::Abort) {
            state.closing = Some(how);
        }
        state.is_woken = true;
        self.slots.close();
        wake(state);
    }

    /// Return whether the transport is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Wait until the transport is closed.
    pub(crate) async fn closed(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is_closed() {
                return;
            }
            changed.await;
        }
    }

    /// End the connection. Only the first error counts.
    fn end(self: &Arc<Self>, error: &Closed, listener: &dyn Listener) {
        let pending = {
            let mut state = self.lock();
            if state.error.is_some() {
                return;
            }
            state.error = Some(error.clone());
            state.conversation.end();
            std::mem::take(&mut state.pending)
        };
        self.slots.close();
        for waiter in pending.into_values().filter_map(|entry| entry.waiter) {
            waiter.fail(error.clone().into());
        }
        self.changed.notify_waiters();
        listener.ended(self, error);
    }
}

/// Wake the task if it has something to send.
fn wake(mut state: MutexGuard<'_, State>) {
    if state.is_woken || state.conversation.queued_bytes() > 0 || state.closing.is_some() {
        state.is_woken = true;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl State {
    /// Close the connection after GOAWAY, once all requests and calls are answered.
    fn close_if_drained(&mut self) {
        let is_waiting = || self.pending.values().any(|entry| entry.waiter.is_some());
        if self.draining.is_some()
            && self.closing.is_none()
            && self.conversation.state() != Phase::Closed
            && self.conversation.calls_in_flight() == 0
            && !is_waiting()
        {
            self.closing = Some(Closing::Graceful);
            self.is_woken = true;
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
    }
}

impl Waiter {
    fn fail(self, error: Error) {
        if let Some(items) = &self.items {
            items.ended(false);
        }
        let _ = self.sender.send(Err(error));
    }
}

/// A request in flight, which resolves to the body of its result. Dropping it cancels the request.
pub(crate) struct PendingCall {
    connection: Arc<Connection>,
    number: u32,
    receiver: oneshot::Receiver<Result<Vec<u8>>>,
    is_done: bool,
}

impl Future for PendingCall {
    type Output = Result<Vec<u8>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = std::task::ready!(Pin::new(&mut self.receiver).poll(cx));
        self.is_done = true;
        Poll::Ready(outcome.unwrap_or_else(|_| Err(Closed::broken("the connection has ended").into())))
    }
}

impl Drop for PendingCall {
    fn drop(&mut self) {
        if !self.is_done {
            self.connection.abandon(self.number);
        }
    }
}
