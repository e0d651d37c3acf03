//! A stream: items as they come, then a result.
//!
//! Decides: when an item is taken, and so when the server may send more; when an item of the application is sent; and that
//! dropping the stream cancels it.
//! Must not know: when connections are made, and which errors are retried.

use super::connection::Connection;
use super::user::{Attempts, User, deadline_of, remaining_ms};
use crate::codec;
use crate::error::{CallError, Closed, Code, Error, Result};
use crate::message::{Credit, Meta};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// Items and bytes that the server may send ahead of the application.
pub const DEFAULT_WINDOW: Credit = [64, 262_144];

/// What connection and application share of a stream.
#[derive(Default)]
pub(crate) struct Items {
    state: Mutex<State>,
    notify: Notify,
}

#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts, not a state machine")]
struct State {
    /// Where the stream is in flight, and its number there.
    place: Option<(Arc<Connection>, u32)>,
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

/// Makes the params that continue a stream after an item.
type Reopen = Arc<dyn Fn(&[u8]) -> Result<Vec<u8>> + Send + Sync>;

impl Items {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Record that the stream was opened. Called under the lock of the connection, like the next three.
    pub(crate) fn opened(&self, connection: &Arc<Connection>, number: u32) {
        let mut state = self.lock();
        state.place = Some((Arc::clone(connection), number));
        state.has_begun = false;
        state.was_lost = false;
        drop(state);
        self.changed();
    }

    pub(crate) fn received(&self, body: Vec<u8>) {
        let mut state = self.lock();
        state.has_begun = true;
        state.bodies.push_back(body);
        drop(state);
        self.changed();
    }

    pub(crate) fn credited(&self) {
        self.lock().has_begun = true;
        self.changed();
    }

    /// Record that the stream is not in flight any more. If a frame of it was stale, it has begun.
    pub(crate) fn ended(&self, was_lost: bool) {
        let mut state = self.lock();
        state.place = None;
        state.has_begun |= was_lost;
        state.was_lost = was_lost;
        drop(state);
        self.changed();
    }

    pub(crate) fn changed(&self) {
        self.notify.notify_waiters();
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.lock().has_begun
    }

    pub(crate) fn can_reopen(&self) -> bool {
        self.lock().can_reopen
    }

    pub(crate) fn was_lost(&self) -> bool {
        self.lock().was_lost
    }

    /// Wait until the application has taken all items. Return whether it has taken any since the last attempt.
    pub(crate) async fn drained(&self) -> bool {
        loop {
            let notified = self.notify.notified();
            {
                let mut state = self.lock();
                if state.bodies.is_empty() {
                    return std::mem::take(&mut state.has_progressed);
                }
            }
            notified.await;
        }
    }

    fn finish(&self, outcome: Result<Vec<u8>>) {
        self.lock().outcome.get_or_insert(outcome);
        self.changed();
    }

    fn place(&self) -> Option<(Arc<Connection>, u32)> {
        self.lock().place.clone()
    }
}

/// Ends a stream whose task the runtime has dropped.
struct Unfinished(Arc<Items>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.0.finish(Err(Closed::broken("the runtime of this client is shut down").into()));
    }
}

/// What to ask of a stream, before it is opened.
#[must_use]
pub struct StreamBuilder<'a> {
    user: Arc<User>,
    method: &'a str,
    params: Result<Vec<u8>>,
    window: Credit,
    timeout: Option<Duration>,
    item_timeout: Option<Duration>,
    traceparent: Option<&'a str>,
    reopen: Option<Reopen>,
}

impl<'a> StreamBuilder<'a> {
    pub(crate) fn new(user: Arc<User>, method: &'a str, params: Result<Vec<u8>>) -> Self {
        let window = DEFAULT_WINDOW;
        Self { user, method, params, window, timeout: None, item_timeout: None, traceparent: None, reopen: None }
    }

    /// How many items and bytes the server may send ahead of the application: 64 and 262,144 by default.
    pub fn window(mut self, items: u64, bytes: u64) -> Self {
        self.window = [items, bytes];
        self
    }

    /// Timeout of the whole stream. None by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Timeout of the wait for one item. None by default.
    pub fn item_timeout(mut self, timeout: Duration) -> Self {
        self.item_timeout = Some(timeout);
        self
    }

    /// The `traceparent` of W3C Trace Context.
    pub fn traceparent(mut self, traceparent: &'a str) -> Self {
        self.traceparent = Some(traceparent);
        self
    }

    /// Open the stream again if its connection has interrupted it: the function gets the last item that the application has
    /// taken, and returns the params that continue behind it. Without it, a stream that has begun is never opened again. Such a
    /// stream sends no items.
    pub fn reopen<T, P>(mut self, params_after: impl Fn(T) -> P + Send + Sync + 'static) -> Self
    where
        T: DeserializeOwned,
        P: Serialize,
    {
        self.reopen = Some(Arc::new(move |last| {
            let last = codec::from_scanned(last).map_err(Error::Type)?;
            codec::to_vec(&params_after(last)).map_err(|fault| Error::call(Code::InvalidArgument, fault.phrase()))
        }));
        self
    }

    /// Begin to open the stream. Its errors are those of [`Client::call`](crate::Client::call), and are returned by its methods.
    /// It can be called outside of a runtime: the stream runs in that of the client.
    #[must_use]
    pub fn open(self) -> Stream {
        let Self { user, method, params, window, timeout, item_timeout, traceparent, reopen } = self;
        let items = Arc::new(Items::default());
        items.lock().can_reopen = reopen.is_some();
        let params = match params {
            Ok(params) => params,
            Err(error) => {
                items.finish(Err(error));
                Vec::new()
            }
        };
        let task = if params.is_empty() {
            None
        } else {
            let (user, items, runtime) = (Arc::clone(&user), Arc::clone(&items), user.hub.runtime.clone());
            let unfinished = Unfinished(Arc::clone(&items));
            let (method, traceparent) = (method.to_owned(), traceparent.map(str::to_owned));
            let task = runtime.spawn(async move {
                let _unfinished = unfinished;
                let deadline = deadline_of(timeout);
                let attempts = Attempts { deadline, is_idempotent: false, is_registration: false, items: Some(&items) };
                let outcome = user
                    .run(attempts, |connection, slot, token| {
                        let traceparent = traceparent.as_deref();
                        let meta = Meta { deadline_ms: remaining_ms(deadline)?, traceparent, ..Meta::default() };
                        let (has_ended_items, last) = {
                            let state = items.lock();
                            (state.has_ended_items, state.last.clone())
                        };
                        let continued = match (&reopen, last) {
                            (Some(reopen), Some(last)) => Some(reopen(&last)?),
                            _ => None,
                        };
                        let params = continued.as_ref().unwrap_or(&params);
                        connection.send(slot, Some(Arc::clone(&items)), None, |conversation, wall| {
                            let number = conversation.open(&method, params, token, &meta, window, wall)?;
                            if has_ended_items {
                                conversation.end_items(number, wall);
                            }
                            Ok(number)
                        })
                    })
                    .await;
                items.finish(outcome);
            });
            Some(task.abort_handle())
        };
        Stream { items, user, task, item_timeout, sending: tokio::sync::Mutex::default() }
    }
}

/// A stream of items. Dropping it cancels it.
///
/// ```no_run
/// # async fn run(client: zcproto::Client) -> zcproto::Result<()> {
/// let stream = client.stream("tokens", &[("prompt", "hi")].into_iter().collect::<std::collections::HashMap<_, _>>()).open();
/// while let Some(piece) = stream.next::<String>().await? {
///     print!("{piece}");
/// }
/// let count: zcproto::Value = stream.result().await?;
/// # Ok(()) }
/// ```
pub struct Stream {
    items: Arc<Items>,
    user: Arc<User>,
    task: Option<AbortHandle>,
    item_timeout: Option<Duration>,
    sending: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("is_over", &self.items.lock().outcome.is_some()).finish_non_exhaustive()
    }
}

impl Stream {
    /// Return the next item, or `None` after the last one. Items that have arrived are returned before an error.
    ///
    /// # Errors
    ///
    /// As [`Client::call`](crate::Client::call); DEADLINE_EXCEEDED after the timeout for one item. An item that is not one valid
    /// value of msgpack is INTERNAL, and cancels the stream. One of another type is [`Error::Type`]; the stream goes on.
    pub async fn next<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let wait = self.wait_next();
        let next = match self.item_timeout {
            None => wait.await,
            Some(limit) => timeout(limit, wait).await.unwrap_or_else(|_| {
                Err(Error::call(Code::DeadlineExceeded, "no item within the timeout for one item"))
            }),
        };
        let body = match next {
            Ok(Some(body)) => body,
            Ok(None) => return Ok(None),
            Err(error) => {
                self.leave(error.clone());
                return Err(error);
            }
        };
        codec::from_scanned(&body).map(Some).map_err(Error::Type)
    }

    async fn wait_next(&self) -> Result<Option<Vec<u8>>> {
        loop {
            let notified = self.items.notify.notified();
            let taken = {
                let mut state = self.items.lock();
                match state.bodies.pop_front() {
                    Some(body) => {
                        state.taken += 1;
                        Some((body, state.taken - 1, state.place.clone()))
                    }
                    None => match &state.outcome {
                        Some(Ok(_)) => return Ok(None),
                        Some(Err(error)) => return Err(error.clone()),
                        None => None,
                    },
                }
            };
            if let Some((body, number, place)) = taken {
                self.user.touch();
                codec::scan(&body, codec::MAX_DEPTH).map_err(|fault| {
                    Error::call(Code::Internal, format!("item {number} is invalid: {}", fault.phrase()))
                })?;
                self.taken(&body);
                if let Some((connection, stream)) = place {
                    connection.with(|conversation, wall| conversation.item_taken(stream, body.len(), wall));
                }
                return Ok(Some(body));
            }
            notified.await;
        }
    }

    /// Remember the last item, if the stream can be opened again behind it.
    fn taken(&self, body: &[u8]) {
        let mut state = self.items.lock();
        if state.can_reopen {
            state.last = Some(body.to_vec());
            state.has_progressed = true;
            drop(state);
            self.items.changed();
        }
    }

    /// Wait for the result of the method. Items are not taken for it: a stream with items must be read as well.
    ///
    /// # Errors
    ///
    /// As [`Client::call`](crate::Client::call).
    pub async fn result<T: DeserializeOwned>(&self) -> Result<T> {
        loop {
            let notified = self.items.notify.notified();
            if let Some(outcome) = &self.items.lock().outcome {
                return codec::from_scanned(outcome.as_ref().map_err(Clone::clone)?).map_err(Error::Type);
            }
            notified.await;
        }
    }

    /// Send an item, once the server wants it.
    ///
    /// # Errors
    ///
    /// INVALID_ARGUMENT for a value that cannot be sent; if the stream ends before, its error, or CANCELLED.
    pub async fn send<T: Serialize + ?Sized>(&self, item: &T) -> Result<()> {
        let body = codec::to_vec(item).map_err(|fault| Error::call(Code::InvalidArgument, fault.phrase()))?;
        let _turn = self.sending.lock().await;
        loop {
            let notified = self.items.notify.notified();
            {
                let state = self.items.lock();
                match &state.outcome {
                    Some(Err(error)) => return Err(error.clone()),
                    Some(Ok(_)) => return Err(Error::call(Code::Cancelled, "the server has ended the stream")),
                    None if state.has_ended_items || state.can_reopen => {
                        return Err(Error::Config("no more items can be sent on this stream".to_owned()));
                    }
                    None => {}
                }
            }
            if let Some((connection, stream)) = self.items.place() {
                if connection.may_send_item(stream) {
                    return connection.with(|conversation, wall| conversation.send_item(stream, &body, wall));
                }
            }
            notified.await;
        }
    }

    /// Send no more items. The server's items and its result can still be received.
    pub async fn finish(&self) {
        let _turn = self.sending.lock().await;
        self.items.lock().has_ended_items = true;
        if let Some((connection, stream)) = self.items.place() {
            connection.with(|conversation, wall| conversation.end_items(stream, wall));
        }
    }

    /// Return whether the server is going away: the stream continues for a while, but open the next one on another connection.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.items.place().is_some_and(|(connection, _)| connection.is_draining())
    }

    /// Cancel the stream unless it has ended. Idempotent. Dropping the stream does the same.
    pub fn cancel(&self) {
        self.leave(CallError::new(Code::Cancelled, "the stream was cancelled").into());
    }

    fn leave(&self, error: Error) {
        self.items.lock().bodies.clear();
        self.items.finish(Err(error));
        if let Some(task) = &self.task {
            task.abort(); // which drops the request, and so cancels it
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}
