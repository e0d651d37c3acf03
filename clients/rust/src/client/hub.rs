//! The connections of a client, which all its sessions share: one for new calls, and older ones that drain.
//!
//! Decides: when to connect and reconnect, and which session an event or a call from the server belongs to. The first attempt
//! is repeated only while nothing listens, because the server may be starting. After a loss it reconnects with growing,
//! jittered delays; after GOAWAY when the server asks for it; after a close for idleness with the next call; and not at all once
//! all sessions were revoked or replaced.
//! Rules: all who wait for a connection share one attempt. The delays start again once a connection has lasted
//! `STABLE_AFTER`: a server that answers and ends each connection must not make its clients reconnect many times a second.
//! Must not know: calls, retries, and how sessions are opened.

use super::backoff::Backoff;
use super::connection::{Connection, Listener};
use super::dial::Dialer;
use super::options::Warn;
use super::shared::Attempt;
use super::user::User;
use crate::core::{Event, ServerCall};
use crate::error::{CallError, Closed, Code, Error, Result};
use crate::secret::Token;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How long a connection must last to count as a success.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// The longest delay between two attempts to connect to a server that is starting.
const MAX_START_DELAY: Duration = Duration::from_secs(1);
/// The longest delay that a server can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3_600);

pub(crate) struct Hub {
    dialer: Dialer,
    start_timeout: Duration,
    warn: Warn,
    state: Mutex<State>,
    me: Weak<Hub>,
}

#[derive(Default)]
struct State {
    current: Option<Arc<Connection>>,
    /// Connections that drain, and ended ones whose transport is still closing.
    others: Vec<Arc<Connection>>,
    users: Vec<Weak<User>>,
    connecting: Option<Attempt>,
    last_error: Option<Error>,
    not_before: Option<Instant>,
    /// When the current connection counts as a success.
    stable_at: Option<Instant>,
    backoff: Backoff,
    has_connected: bool,
    is_closed: bool,
}

impl Hub {
    pub(crate) fn new(dialer: Dialer, start_timeout: Duration, warn: Warn) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { dialer, start_timeout, warn, state: Mutex::default(), me: me.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arc(&self) -> Arc<Self> {
        self.me.upgrade().expect("a method of a hub runs while it is alive")
    }

    pub(crate) fn address(&self) -> String {
        self.dialer.address.to_string()
    }

    /// Return the connection for new calls, if there is one.
    pub(crate) fn current(&self) -> Option<Arc<Connection>> {
        self.lock().current.clone()
    }

    /// Return why there is no connection.
    pub(crate) fn last_error(&self) -> Option<Error> {
        let state = self.lock();
        if state.current.is_some() { None } else { state.last_error.clone() }
    }

    /// Return the connection for new calls. Without one, connect, and retry while that may succeed.
    pub(crate) async fn get(&self) -> Result<Arc<Connection>> {
        loop {
            let attempt = {
                let mut state = self.lock();
                if let Some(connection) = &state.current {
                    return Ok(Arc::clone(connection));
                }
                if state.is_closed {
                    return Err(Closed::clean("this client is closed").into());
                }
                self.connecting(&mut state)
            };
            attempt.wait().await?;
        }
    }

    fn connecting(&self, state: &mut State) -> Attempt {
        state.connecting.get_or_insert_with(|| Attempt::start(self.arc().connect())).clone()
    }

    async fn connect(self: Arc<Self>) -> Result<()> {
        let result = self.try_connect().await;
        self.lock().connecting = None;
        result
    }

    async fn try_connect(&self) -> Result<()> {
        let starts_until = Instant::now() + self.start_timeout;
        let mut is_starting = false;
        loop {
            let not_before = self.lock().not_before;
            if let Some(time) = not_before {
                sleep_until(time).await;
            }
            let error = match self.dialer.dial(self.arc()).await.and_then(|connection| self.adopt(&connection)) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let mut state = self.lock();
            if state.is_closed || !matches!(error, Error::Closed(_) | Error::CannotConnect { .. } | Error::Tls(_)) {
                return Err(error);
            }
            state.last_error = Some(error.clone());
            let mut delay = state.backoff.next(Duration::ZERO);
            if state.has_connected {
                if matches!(&error, Error::Tls(error) if !error.failure.is_transient()) {
                    return Err(error);
                }
            } else {
                delay = delay.min(MAX_START_DELAY);
                let is_refused = matches!(error, Error::CannotConnect { refused: true, .. });
                if !is_refused || Instant::now() + delay >= starts_until {
                    return Err(error);
                }
                if !is_starting {
                    is_starting = true;
                    (self.warn)(&format!(
                        "{}: nothing listens there yet; waiting up to {} s for the server to start",
                        self.dialer.address,
                        self.start_timeout.as_secs_f64()
                    ));
                }
            }
            state.delay_next_attempt(delay);
        }
    }

    /// Use a new connection for calls, and show it to all sessions.
    fn adopt(&self, connection: &Arc<Connection>) -> Result<()> {
        {
            let mut state = self.lock();
            if state.is_closed {
                connection.close();
                return Err(Closed::clean("this client is closed").into());
            }
            if connection.is_draining() {
                // GOAWAY in the same read as WELCOME
                return Err(Error::CannotConnect { reason: "the server is going away".to_owned(), refused: false });
            }
            if let Some(error) = connection.error() {
                return Err(error.into());
            }
            if !state.has_connected {
                state.has_connected = true;
                state.backoff.reset();
            }
            state.current = Some(Arc::clone(connection));
            state.stable_at = Some(Instant::now() + STABLE_AFTER);
        }
        if connection.error().is_some() {
            self.lost(connection); // it has ended meanwhile
        }
        for user in self.users() {
            let connection = Arc::clone(connection);
            tokio::spawn(async move { user.present(&connection).await });
        }
        Ok(())
    }

    // --- sessions --------------------------------------------------------------------------------

    /// Add a session. The first is the client's own: it also gets events that belong to no session.
    pub(crate) fn add(&self, user: &Arc<User>) {
        self.lock().users.push(Arc::downgrade(user));
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
        state.others.retain(|each| each.id != connection.id);
        let closing = Arc::clone(connection);
        state.others.push(closing);
        state.others.retain(|each| !each.is_closed());
        if state.current.as_ref().is_some_and(|current| current.id == connection.id) {
            state.current = None;
            state.last_error = connection.error().map(Into::into);
            self.reconnect(state, Duration::ZERO);
        }
    }

    /// Delay the next attempt to connect, and start it now if it is wanted.
    fn reconnect(&self, mut state: MutexGuard<'_, State>, retry_after: Duration) {
        if state.stable_at.take().is_some_and(|stable_at| Instant::now() >= stable_at) {
            state.backoff.reset();
        }
        let delay = state.backoff.next(retry_after);
        state.delay_next_attempt(delay);
        let is_possible = state.has_connected && !state.is_closed;
        drop(state);
        if is_possible && self.users().iter().any(|user| !user.has_ended()) {
            let mut state = self.lock();
            if state.current.is_none() && !state.is_closed {
                self.connecting(&mut state);
            }
        }
    }

    /// Begin to close all connections, without waiting.
    pub(crate) fn shut_down(&self) -> Vec<Arc<Connection>> {
        let mut state = self.lock();
        state.is_closed = true;
        if let Some(attempt) = state.connecting.take() {
            attempt.abort();
        }
        let mut connections = std::mem::take(&mut state.others);
        connections.extend(state.current.take());
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
        let connections: Vec<_> = state.current.iter().chain(&state.others).cloned().collect();
        drop(state);
        for connection in connections {
            connection.abort();
        }
    }
}

impl State {
    fn delay_next_attempt(&mut self, delay: Duration) {
        let time = Instant::now() + delay;
        self.not_before = Some(self.not_before.map_or(time, |earlier| earlier.max(time)));
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
            Event::Event { name, body, token } => {
                let user = self.user_of(&token).or_else(|| self.users().into_iter().next());
                if let Some(user) = user {
                    user.event_received(connection, &name, body, &token);
                }
            }
            Event::GoAway { reason, retry_after_ms } => {
                let mut state = self.lock();
                if state.current.as_ref().is_some_and(|current| current.id == connection.id) {
                    let draining = state.current.take();
                    state.others.extend(draining);
                }
                // A connection that was not used: another one would be closed for the same reason.
                if !matches!(reason.as_str(), "idle" | "no_session") {
                    self.reconnect(state, Duration::from_millis(retry_after_ms).min(MAX_RETRY_AFTER));
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
