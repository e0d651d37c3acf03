//! A stream: items as they come, then a result.
//!
//! Decides: when an item is taken, and so when the server may send more; when an item of the application is sent; and that
//! dropping the stream cancels it.
//! Must not know: when connections are made, and which errors are retried.

use super::connection::{ItemQueue, Taken};
use super::user::{Attempts, User, deadline_of, remaining_ms};
use crate::codec;
use crate::error::{CallError, Closed, Code, Error, Result};
use crate::message::{Credit, Meta};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::{Instrument, debug_span};

/// Items and bytes that the server may send ahead of the application.
pub const DEFAULT_WINDOW: Credit = [64, 262_144];

/// Makes the params that continue a stream after an item.
type Reopen = Arc<dyn Fn(&[u8]) -> Result<Vec<u8>> + Send + Sync>;

/// Ends a stream whose task the runtime has dropped.
struct Unfinished(Arc<ItemQueue>);

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
        let items = ItemQueue::new(reopen.is_some());
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
            let span = debug_span!("stream", method);
            let (method, traceparent) = (method.to_owned(), traceparent.map(str::to_owned));
            let work = async move {
                let _unfinished = unfinished;
                let deadline = deadline_of(timeout);
                let attempts = Attempts { deadline, is_idempotent: false, is_registration: false, items: Some(&items) };
                let outcome = user
                    .run(attempts, |connection, slot, token| {
                        let traceparent = traceparent.as_deref();
                        let meta = Meta { deadline_ms: remaining_ms(deadline)?, traceparent, ..Meta::default() };
                        let continued = match (&reopen, items.last()) {
                            (Some(reopen), Some(last)) => Some(reopen(&last)?),
                            _ => None,
                        };
                        let params = continued.as_ref().unwrap_or(&params);
                        connection.send(slot, Some(Arc::clone(&items)), None, |conversation, wall| {
                            let number = conversation.open(&method, params, token, &meta, window, wall)?;
                            if items.has_ended_items() {
                                conversation.end_items(number, wall);
                            }
                            Ok(number)
                        })
                    })
                    .await;
                items.finish(outcome);
            };
            Some(runtime.spawn(work.instrument(span)).abort_handle())
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
    items: Arc<ItemQueue>,
    user: Arc<User>,
    task: Option<AbortHandle>,
    item_timeout: Option<Duration>,
    sending: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("is_over", &self.items.is_over()).finish_non_exhaustive()
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
        let taking = self.take();
        let taken = match self.item_timeout {
            None => taking.await,
            Some(limit) => timeout(limit, taking).await.unwrap_or_else(|_| {
                Err(Error::call(Code::DeadlineExceeded, "no item within the timeout for one item"))
            }),
        };
        match taken {
            Ok(None) => Ok(None),
            Ok(Some(body)) => codec::from_scanned(&body).map(Some).map_err(Error::Type),
            Err(error) => {
                self.leave(error.clone());
                Err(error)
            }
        }
    }

    /// Return the items as a [`futures_core::Stream`], for combinators such as those of `futures::StreamExt`. It ends after the
    /// last item, and after an error other than [`Error::Type`].
    pub fn items<T: DeserializeOwned>(&self) -> Items<'_, T> {
        Items { stream: self, next: None, is_over: false }
    }

    async fn take(&self) -> Result<Option<Vec<u8>>> {
        let Some(Taken { body, number, in_flight }) = self.items.take().await? else { return Ok(None) };
        self.user.touch();
        codec::scan(&body, codec::MAX_DEPTH)
            .map_err(|fault| Error::call(Code::Internal, format!("item {number} is invalid: {}", fault.phrase())))?;
        self.items.set_last(&body);
        if let Some(in_flight) = in_flight {
            in_flight.item_taken(body.len());
        }
        Ok(Some(body))
    }

    /// Wait for the result of the method. Items are not taken for it: a stream with items must be read as well.
    ///
    /// # Errors
    ///
    /// As [`Client::call`](crate::Client::call).
    pub async fn result<T: DeserializeOwned>(&self) -> Result<T> {
        codec::from_scanned(&self.items.result().await?).map_err(Error::Type)
    }

    /// Send an item, once the server wants it.
    ///
    /// # Errors
    ///
    /// INVALID_ARGUMENT for a value that cannot be sent; if the stream ends before, its error, or CANCELLED.
    pub async fn send<T: Serialize + ?Sized>(&self, item: &T) -> Result<()> {
        let body = codec::to_vec(item).map_err(|fault| Error::call(Code::InvalidArgument, fault.phrase()))?;
        let _turn = self.sending.lock().await;
        self.items.send(&body).await
    }

    /// Send no more items. The server's items and its result can still be received.
    pub async fn finish(&self) {
        let _turn = self.sending.lock().await;
        self.items.end_items();
    }

    /// Return whether the server is going away: the stream continues for a while, but open the next one on another connection.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.items.is_draining()
    }

    /// Cancel the stream unless it has ended. Idempotent. Dropping the stream does the same.
    pub fn cancel(&self) {
        self.leave(CallError::new(Code::Cancelled, "the stream was cancelled").into());
    }

    fn leave(&self, error: Error) {
        self.items.leave(error);
        if let Some(task) = &self.task {
            task.abort(); // which drops the request, and so cancels it
        }
    }
}

type Next<'a, T> = Pin<Box<dyn Future<Output = Result<Option<T>>> + Send + 'a>>;

/// The items of a [`Stream`], made by [`Stream::items`].
#[must_use]
pub struct Items<'a, T> {
    stream: &'a Stream,
    next: Option<Next<'a, T>>,
    is_over: bool,
}

impl<T: DeserializeOwned + 'static> futures_core::Stream for Items<'_, T> {
    type Item = Result<T>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let stream = self.stream;
        let next = self.next.get_or_insert_with(|| Box::pin(stream.next()));
        let item = ready!(next.as_mut().poll(cx)).transpose();
        self.next = None;
        self.is_over = !matches!(item, Some(Ok(_) | Err(Error::Type(_))));
        Poll::Ready(item)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}
