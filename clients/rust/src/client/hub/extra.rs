//! Extra connections to the server of the main one, for requests that it has no room for (zcp1.md, section 11.3).
//!
//! Decides: when one is made and closed, and which connection a request that waits gets: it waits in the queues of all, and takes
//! the first room.
//! Must not know: sessions, except that it shows and registers them on a new connection before requests are sent there.

use super::super::address::Endpoint;
use super::super::backoff::Backoff;
use super::super::connection::{Connection, Slot};
use super::{Hub, State};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};

/// How long a connection is kept without requests.
const IDLE_AFTER: Duration = Duration::from_secs(30);

/// The extra connections of a client.
pub(super) struct Extra {
    /// The most of them.
    most: usize,
    /// Each with the time of its last use.
    used: Vec<(Arc<Connection>, Instant)>,
    connecting: Option<AbortHandle>,
    backoff: Backoff,
    not_before: Option<Instant>,
    closer: Option<AbortHandle>,
}

impl Extra {
    pub(super) fn new(most: usize) -> Self {
        Self { most, used: Vec::new(), connecting: None, backoff: Backoff::default(), not_before: None, closer: None }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Connection>> {
        self.used.iter().map(|(connection, _)| connection)
    }

    fn touch(&mut self, id: u64) {
        if let Some((_, used_at)) = self.used.iter_mut().find(|(connection, _)| connection.id == id) {
            *used_at = Instant::now();
        }
    }

    /// Return whether another one may be made: all are full, and no attempt is under way or has failed lately.
    fn may_grow(&self, main: &Connection) -> bool {
        self.connecting.is_none()
            && self.used.len() < self.most
            && self.not_before.is_none_or(|time| time <= Instant::now())
            && main.is_full()
            && self.all().all(|connection| connection.is_full())
    }

    fn delay(&mut self, retry_after: Option<Duration>) {
        self.not_before = Some(Instant::now() + self.backoff.next(retry_after.unwrap_or_default()));
    }

    /// Use a connection no more: it was lost, or the server goes away. Return whether it was used.
    pub(super) fn discard(&mut self, connection: &Connection) -> bool {
        let count = self.used.len();
        self.used.retain(|(used, _)| used.id != connection.id);
        let was_used = self.used.len() < count;
        if was_used {
            self.delay(connection.retry_after());
        }
        was_used
    }

    /// Take the connections that were not used lately. They are closing.
    fn take_idle(&mut self) -> Vec<Arc<Connection>> {
        let now = Instant::now();
        let is_idle = |used_at: Instant| now.saturating_duration_since(used_at) >= IDLE_AFTER;
        let (idle, used) = std::mem::take(&mut self.used)
            .into_iter()
            .partition(|(connection, used_at)| is_idle(*used_at) && connection.close_if_unused());
        self.used = used;
        let idle: Vec<_> = idle.into_iter().map(|(connection, _)| connection).collect();
        if !idle.is_empty() {
            self.backoff.reset();
        }
        idle
    }

    /// Stop all work in the background. Return the connections.
    pub(super) fn stop(&mut self) -> Vec<Arc<Connection>> {
        for task in [self.connecting.take(), self.closer.take()].into_iter().flatten() {
            task.abort();
        }
        self.take()
    }

    fn take(&mut self) -> Vec<Arc<Connection>> {
        std::mem::take(&mut self.used).into_iter().map(|(connection, _)| connection).collect()
    }
}

/// The place of a call in the queue of one connection.
struct Place {
    connection: Arc<Connection>,
    slot: Pin<Box<dyn Future<Output = Option<Slot>> + Send>>,
}

impl Place {
    fn new(connection: &Arc<Connection>) -> Self {
        let waiting = Arc::clone(connection);
        Self { connection: Arc::clone(connection), slot: Box::pin(async move { waiting.slot().await }) }
    }
}

impl Hub {
    /// Return the extra connections.
    pub(crate) fn extra(&self) -> Vec<Arc<Connection>> {
        self.lock().extra.all().cloned().collect()
    }

    /// Wait until a request can be sent on the current connection, or on an extra one. Return `None` if the current one takes no
    /// more.
    pub(crate) async fn slot(&self, main: Arc<Connection>) -> Option<(Arc<Connection>, Slot)> {
        if self.max_connections == 1 {
            let slot = main.slot().await?;
            return Some((main, slot));
        }
        let mut places = vec![Place::new(&main)];
        loop {
            let mut changed = pin!(self.extra_changed.notified());
            changed.as_mut().enable();
            for connection in self.extra() {
                if connection.is_open() && !places.iter().any(|place| place.connection.id == connection.id) {
                    places.push(Place::new(&connection));
                }
            }
            let mut has_grown = false;
            let found = poll_fn(|cx| {
                for (index, place) in places.iter_mut().enumerate() {
                    if let Poll::Ready(slot) = place.slot.as_mut().poll(cx) {
                        return Poll::Ready(Some((index, slot)));
                    }
                }
                if !std::mem::replace(&mut has_grown, true) {
                    self.grow(&main);
                }
                changed.as_mut().poll(cx).map(|()| None)
            })
            .await;
            let Some((index, slot)) = found else {
                continue; // there is another connection
            };
            let place = places.swap_remove(index);
            let is_main = place.connection.id == main.id;
            match slot {
                Some(slot) => {
                    if !is_main {
                        self.lock().extra.touch(place.connection.id);
                    }
                    return Some((place.connection, slot));
                }
                None if is_main => return None,
                None => {} // it has ended
            }
        }
    }

    fn grow(&self, main: &Connection) {
        let mut state = self.lock();
        if !state.is_closed && state.extra.may_grow(main) {
            let work = self.arc().connect_extra(main.endpoint.clone());
            state.extra.connecting = Some(tokio::spawn(work).abort_handle());
        }
    }

    async fn connect_extra(self: Arc<Self>, endpoint: Endpoint) {
        let attempted = self.dialer.dial(&endpoint, self.arc(), || {}).await.ok(); // whatever it is, the current one goes on
        let mut shown = Vec::new();
        if let Some(attempted) = &attempted {
            let connection = attempted.connection();
            connection.mark_extra();
            let mut showing = JoinSet::new();
            for user in self.users() {
                let connection = Arc::clone(connection);
                showing.spawn(async move { (user.present(&connection, None).await, user) });
            }
            while let Some(showed) = showing.join_next().await {
                shown.extend(showed);
            }
        }
        {
            let mut state = self.lock();
            state.extra.connecting = None;
            match attempted {
                Some(attempted) if attempted.connection().is_open() && !state.is_closed => {
                    let connection = attempted.keep();
                    if state.endpoints.are_several() {
                        connection.watch();
                    }
                    state.extra.used.push((Arc::clone(&connection), Instant::now()));
                    self.close_idle_later(&mut state);
                    drop(state);
                    for (token, user) in shown {
                        user.catch_up(&connection, token.as_ref());
                    }
                }
                attempted => {
                    state.extra.delay(attempted.and_then(|attempted| attempted.connection().retry_after()));
                }
            }
        }
        self.extra_changed.notify_waiters();
    }

    fn close_idle_later(&self, state: &mut State) {
        if state.extra.closer.is_some() {
            return;
        }
        let hub = self.me.clone();
        let closer = tokio::spawn(async move {
            loop {
                sleep(IDLE_AFTER).await;
                let Some(hub) = hub.upgrade() else { return };
                let mut state = hub.lock();
                let idle = state.extra.take_idle();
                state.others.extend(idle);
                if state.extra.used.is_empty() {
                    state.extra.closer = None;
                    return;
                }
            }
        });
        state.extra.closer = Some(closer.abort_handle());
    }
}
