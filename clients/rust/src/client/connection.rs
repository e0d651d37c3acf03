//! One connection, driven by one task: transport <-> conversation <-> calls that wait.
//!
//! Decides: which call gets which answer, when a call can be sent (requests in flight, back-pressure), how a call is abandoned
//! without affecting others, keepalive, and the error of calls that wait at the end.
//! Must not know: retries and sessions.

use super::stream::Items;
use super::transport::{End, Transport, reset};
use crate::core::{Conversation, Event, Settings, State as Phase};
use crate::error::{CallError, Closed, Error, Result};
use crate::message::{Meta, Welcome};
use crate::secret::Token;
use crate::text;
use crate::trust::Channel;
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, sleep_until};
use zeroize::Zeroizing;

/// The shortest pause of reading: flooding servers are read in batches, not frame by frame.
const MIN_READING_PAUSE: Duration = Duration::from_millis(50);
/// Bytes that wait to be sent, beyond which no further items are queued.
const MAX_QUEUED_ITEMS: usize = 65_536;
const FOREVER: Duration = Duration::from_secs(365 * 86_400);

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
    items: Option<Arc<Items>>,
    /// Called with the result before anything else of the same read is processed.
    on_result: Option<OnResult>,
}

/// A request in flight; without a waiter it was abandoned.
struct Entry {
    waiter: Option<Waiter>,
    _slot: Slot,
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
    is_draining: bool,
    unanswered_did_not_run: bool,
    is_blocked: bool,
    /// Whether an item waits until what is queued was sent.
    has_waiting_items: bool,
    closing: Option<Closing>,
    is_woken: bool,
    waker: Option<Waker>,
}

/// One connection to a server.
pub(crate) struct Connection {
    pub(crate) id: u64,
    leaf: [u8; 32],
    started: Instant,
    slots: Arc<Semaphore>,
    /// WELCOME, room to send, the end of the transport.
    changed: Notify,
    state: Mutex<State>,
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
        leaf: [u8; 32],
        settings: Settings,
        listener: Arc<dyn Listener>,
    ) -> Arc<Self> {
        let connection = Arc::new(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            leaf,
            started: Instant::now(),
            slots: Arc::new(Semaphore::new(0)), // until WELCOME
            changed: Notify::new(),
            state: Mutex::new(State {
                conversation: Conversation::new(settings),
                pending: BTreeMap::new(),
                error: None,
                is_draining: false,
                unanswered_did_not_run: false,
                is_blocked: false,
                has_waiting_items: false,
                closing: None,
                is_woken: false,
                waker: None,
            }),
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
                if let Some(error) = &state.error {
                    return Err(error.clone().into());
                }
                if let Some(welcome) = state.conversation.welcome() {
                    return Ok(welcome.clone());
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
        self.lock().is_draining
    }

    /// Return whether new requests can be sent, perhaps after a wait for a slot.
    pub(crate) fn is_open(&self) -> bool {
        !self.slots.is_closed()
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
        items: Option<Arc<Items>>,
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
        state.pending.insert(number, Entry { waiter: Some(Waiter { sender, items, on_result }), _slot: slot });
        wake(state);
        Ok(PendingCall { connection: Arc::clone(self), number, receiver, is_done: false })
    }

    /// Run a step of the conversation and send its frames.
    pub(crate) fn with<T>(&self, step: impl FnOnce(&mut Conversation, i64) -> T) -> T {
        let mut state = self.lock();
        let result = step(&mut state.conversation, wall());
        wake(state);
        result
    }

    /// Return whether an item can be sent on a stream now. Its items are notified when that changes.
    pub(crate) fn may_send_item(&self, number: u32) -> bool {
        let mut state = self.lock();
        if state.is_blocked || state.conversation.queued_bytes() >= MAX_QUEUED_ITEMS {
            state.has_waiting_items = true;
            return false;
        }
        state.conversation.may_send_item(number)
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

    /// Cut the connection, like a network failure.
    pub(crate) fn abort(&self) {
        self.closing(Closing::Abort);
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

    // --- the task --------------------------------------------------------------------------------

    async fn run(self: Arc<Self>, mut transport: Transport, listener: Arc<dyn Listener>) {
        let how = self.drive(&mut transport, &*listener).await;
        let reason = "the connection was closed by this client";
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
                if !is_blocked {
                    state.conversation.swap_output(&mut output);
                    state.wake_waiting_items();
                }
                (state.closing, state.conversation.next_deadline())
            };
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
                Turn::Read(Ok(size)) => end = transport.decrypt(size),
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
                state.unanswered_did_not_run = state.is_draining && state.error.is_none();
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
                    Event::Credit { stream } => state.with_items(stream, Items::credited),
                    Event::Welcomed => {
                        let max = state.conversation.welcome().map_or(0, |welcome| welcome.max_streams);
                        self.slots.add_permits((max as usize).min(Semaphore::MAX_PERMITS));
                        self.changed.notify_waiters();
                    }
                    other => {
                        if let Event::GoAway { .. } = other {
                            self.slots.close();
                        }
                        others.push(other);
                    }
                }
            }
            state.close_if_drained();
            state.conversation.reading_delay(now)
        };
        for event in others {
            match event {
                Event::GoAway { .. } => {
                    let is_first = !std::mem::replace(&mut self.lock().is_draining, true);
                    if is_first {
                        listener.event(self, event);
                    }
                    self.lock().close_if_drained();
                }
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

    fn with_items(&mut self, number: u32, step: impl FnOnce(&Items)) {
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

    /// Close the connection after GOAWAY, once all requests and calls are answered.
    fn close_if_drained(&mut self) {
        let is_waiting = || self.pending.values().any(|entry| entry.waiter.is_some());
        if self.is_draining
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
