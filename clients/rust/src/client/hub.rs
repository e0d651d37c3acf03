//! The connections of a client, which all its sessions share: a main one, extra ones, and older ones that drain.
//!
//! Decides: when to connect and reconnect, and which session an event or a call from the server belongs to. The first round of
//! attempts is repeated only while nothing listens or a server goes away, because it may be starting, or be replaced. After a
//! loss, and after GOAWAY, the client connects again: at once to a server that does not rest, else once one is due. After a close
//! for idleness it connects with the next call, and not at all once all sessions were revoked or replaced. While a server hangs, it
//! looks for another one (`beside.rs`).
//! Rules: all who wait for a connection share one attempt. The delays of a server start again once a connection to it has lasted
//! `STABLE_AFTER`: a server that answers and ends each connection must not make its clients reconnect many times a second.
//! Must not know: calls, retries, and how sessions are opened.

mod beside;
mod connecting;
mod extra;

use super::address::Address;
use super::attempt::Attempt;
use super::connection::{Connection, Listener};
use super::dial::Dialer;
use super::endpoints::{Endpoints, Place};
use super::options::{ConnectOptions, OnConnected, Warn};
use super::user::User;
use crate::core::{Event, ServerCall};
use crate::error::{CallError, Closed, Code, Error, Result};
use crate::secret::Token;
use extra::Extra;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout};

/// Timeout of `session.close`, and of all those that end with a client.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection must last to count as a success.
const STABLE_AFTER: Duration = Duration::from_secs(5);

pub(crate) struct Hub {
    /// The runtime of the client, for what is started outside of it.
    pub(crate) runtime: Handle,
    addresses: Vec<Address>,
    dialer: Dialer,
    start_timeout: Duration,
    warn: Warn,
    on_connected: Option<OnConnected>,
    max_connections: usize,
    /// An attempt at an extra connection has ended.
    extra_changed: Notify,
    state: Mutex<State>,
    me: Weak<Hub>,
}

#[allow(clippy::struct_excessive_bools, reason = "independent facts, not a state machine")]
struct State {
    current: Option<Arc<Connection>>,
    extra: Extra,
    /// Connections that drain, and ended ones whose transport is still closing.
    others: Vec<Arc<Connection>>,
    users: Vec<Weak<User>>,
    connecting: Option<Attempt>,
    /// The search for another server while the current one is silent.
    beside: Option<AbortHandle>,
    last_error: Option<Error>,
    endpoints: Endpoints,
    /// When the current connection counts as a success.
    stable_at: Option<Instant>,
    has_connected: bool,
    /// Whether the client's own session is open, or none is wanted.
    is_open: bool,
    /// The connection that the application was last notified of.
    reported: u64,
    /// Whether there were other sessions than the client's own.
    was_shared: bool,
    is_closed: bool,
}

impl Hub {
    pub(crate) fn new(options: &ConnectOptions) -> Result<Arc<Self>> {
        let runtime =
            Handle::try_current().map_err(|_| Error::Config("connect: call it in a runtime of tokio".to_owned()))?;
        let addresses = Address::parse_list(&options.address)?;
        let dialer = Dialer::new(&addresses, options)?;
        let endpoints = Endpoints::new(addresses.clone(), options.address_order, crate::random::fraction);
        Ok(Arc::new_cyclic(|me| Self {
            runtime,
            addresses,
            dialer,
            start_timeout: options.start_timeout,
            warn: Arc::clone(&options.warn),
            on_connected: options.on_connected.clone(),
            max_connections: options.max_connections,
            extra_changed: Notify::new(),
            state: Mutex::new(State::new(endpoints, Extra::new(options.max_connections.saturating_sub(1)))),
            me: me.clone(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arc(&self) -> Arc<Self> {
        self.me.upgrade().expect("a method of a hub runs while it is alive")
    }

    /// Return the addresses of the servers.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.addresses.iter().map(ToString::to_string).collect()
    }

    /// Return the connection for new calls, if there is one.
    pub(crate) fn current(&self) -> Option<Arc<Connection>> {
        self.lock().current.clone()
    }

    /// Record that a call has timed out: a server may hang.
    pub(crate) fn call_timed_out(&self) {
        for connection in self.connections() {
            connection.call_timed_out();
        }
    }

    /// Return all connections that have not ended, those that drain included.
    pub(crate) fn connections(&self) -> Vec<Arc<Connection>> {
        let state = self.lock();
        let all = state.current.iter().chain(state.extra.all()).chain(&state.others);
        all.filter(|connection| connection.error().is_none()).cloned().collect()
    }

    /// Return why there is no connection.
    pub(crate) fn last_error(&self) -> Option<Error> {
        let state = self.lock();
        if state.current.is_some() { None } else { state.last_error.clone() }
    }

    /// Record that the client is open, and notify the application of the connection.
    pub(crate) fn opened(&self) {
        let current = {
            let mut state = self.lock();
            state.is_open = true;
            state.current.clone()
        };
        if let Some(connection) = current {
            self.report(&connection);
        }
    }

    /// Notify the application of a connection, once, if it is in use and the client is open.
    fn report(&self, connection: &Connection) {
        let Some(on_connected) = self.on_connected.clone() else {
            return;
        };
        {
            let mut state = self.lock();
            let is_current = state.current.as_ref().is_some_and(|current| current.id == connection.id);
            if !state.is_open || !is_current || state.reported == connection.id {
                return;
            }
            state.reported = connection.id;
        }
        let endpoint = connection.endpoint.clone();
        tokio::spawn(async move { on_connected(&endpoint) });
    }

    // --- sessions --------------------------------------------------------------------------------

    /// Add a session. The first is the client's own: it also gets events that belong to no session.
    pub(crate) fn add(&self, user: &Arc<User>) {
        let mut state = self.lock();
        state.was_shared |= !state.users.is_empty();
        state.users.push(Arc::downgrade(user));
    }

    pub(crate) fn remove(&self, user: &User) {
        self.lock().users.retain(|each| !std::ptr::eq(each.as_ptr(), user));
    }

    pub(crate) fn users(&self) -> Vec<Arc<User>> {
        self.lock().users.iter().filter_map(Weak::upgrade).collect()
    }

    fn user_of(&self, token: &Token) -> Option<Arc<User>> {
        self.users().into_iter().find(|user| user.owns(token))
    }

    fn call(&self, connection: &Arc<Connection>, call: ServerCall) {
        if let Some(user) = self.user_of(&call.token) {
            user.call_received(connection, call);
        } else {
            let error = CallError::new(Code::Unauthenticated, "no session of this client has this token");
            connection.answer(call.number, Err(&error));
        }
    }

    // --- the end of connections ------------------------------------------------------------------

    fn lost(&self, connection: &Arc<Connection>) {
        let mut state = self.lock();
        state.extra.discard(connection);
        state.others.retain(|each| each.id != connection.id);
        let closing = Arc::clone(connection);
        state.others.push(closing);
        state.others.retain(|each| !each.is_closed());
        if state.current.as_ref().is_some_and(|current| current.id == connection.id) {
            state.current = None;
            state.last_error = connection.error().map(Into::into);
            self.reconnect(state, connection, Duration::ZERO);
        }
    }

    /// Let the server of a connection rest, and connect if that is wanted.
    fn reconnect(&self, mut state: MutexGuard<'_, State>, connection: &Connection, retry_after: Duration) {
        let now = Instant::now();
        if state.stable_at.take().is_some_and(|stable_at| now >= stable_at) {
            state.endpoints.reset(&connection.endpoint);
        }
        state.endpoints.failed(&Place::Endpoint(connection.endpoint.clone()), retry_after, None, now);
        let is_possible = state.has_connected && !state.is_closed;
        drop(state);
        if is_possible && self.users().iter().any(|user| !user.has_ended()) {
            let mut state = self.lock();
            if state.current.is_none() && !state.is_closed {
                self.connecting(&mut state);
            }
        }
    }

    /// Close the sessions of all other users, as many at once as the server allows requests.
    pub(crate) async fn close_others(&self, own: &Arc<User>) {
        let others: Vec<_> = self.users().into_iter().filter(|user| !Arc::ptr_eq(user, own)).collect();
        let mut closing = JoinSet::new();
        for user in &others {
            let user = Arc::clone(user);
            closing.spawn(async move { user.close().await });
        }
        let all = async { while closing.join_next().await.is_some() {} };
        let _ = timeout(CLOSE_TIMEOUT, all).await; // for all of them: there may be thousands
        for user in others {
            user.stop(); // without a request: its session expires on the server
        }
    }

    /// Begin to close all connections, without waiting.
    pub(crate) fn shut_down(&self) -> Vec<Arc<Connection>> {
        let mut state = self.lock();
        state.is_closed = true;
        if let Some(attempt) = state.connecting.take() {
            attempt.abort();
        }
        if let Some(looking) = state.beside.take() {
            looking.abort();
        }
        let mut connections = std::mem::take(&mut state.others);
        connections.extend(state.current.take());
        connections.extend(state.extra.stop());
        drop(state);
        for connection in &connections {
            connection.close();
        }
        connections
    }

    /// Close all connections with close_notify and wait until their transports are closed.
    pub(crate) async fn close(&self) {
        for connection in self.shut_down() {
            connection.closed().await;
        }
    }

    /// Cut all connections, like a network failure.
    pub(crate) fn abort(&self) {
        let state = self.lock();
        let connections: Vec<_> = state.current.iter().chain(state.extra.all()).chain(&state.others).cloned().collect();
        drop(state);
        for connection in connections {
            connection.abort();
        }
    }
}

impl State {
    fn new(endpoints: Endpoints, extra: Extra) -> Self {
        Self {
            current: None,
            extra,
            others: Vec::new(),
            users: Vec::new(),
            connecting: None,
            beside: None,
            last_error: None,
            endpoints,
            stable_at: None,
            has_connected: false,
            is_open: false,
            reported: 0,
            was_shared: false,
            is_closed: false,
        }
    }
}

impl Listener for Hub {
    fn event(&self, connection: &Arc<Connection>, event: Event) {
        match event {
            Event::Call(call) => self.call(connection, call),
            Event::Withdrawn { number } => {
                for user in self.users() {
                    user.call_withdrawn(connection, number);
                }
            }
            Event::Event { name, token, .. }
                if connection.is_extra() && (token.is_none() || name.starts_with("session.")) => {} // it comes on the current one
            Event::Event { name, body, token } => {
                let is_unknown_session = !token.is_none() && self.lock().was_shared; // it may have been closed
                let user = self.user_of(&token);
                let user = user.or_else(|| self.users().into_iter().next().filter(|_| !is_unknown_session));
                if let Some(user) = user {
                    user.event_received(connection, &name, body, &token);
                }
            }
            Event::Silent => self.silent(connection),
            Event::GoAway { reason, .. } => {
                let mut state = self.lock();
                if state.extra.discard(connection) {
                    state.others.push(Arc::clone(connection)); // it drains
                    return;
                }
                if state.current.as_ref().is_none_or(|current| current.id != connection.id) {
                    return; // not in use yet: that failed
                }
                let draining = state.current.take();
                state.others.extend(draining);
                // A connection that was not used: another one would be closed for the same reason.
                if !matches!(reason.as_str(), "idle" | "no_session") {
                    self.reconnect(state, connection, connection.retry_after().unwrap_or_default());
                }
            }
            _ => {}
        }
    }

    fn ended(&self, connection: &Arc<Connection>, error: &Closed) {
        for user in self.users() {
            user.connection_ended(connection, error);
        }
        self.lost(connection);
    }
}
