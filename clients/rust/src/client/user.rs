//! Calls, streams and handlers of one user, over the connection that the sessions of a client share.
//!
//! Decides: whether a call or a stream is retried after an error, by the table of zcp1.md, section 11.1 (`retry.rs`).
//! Must not know: when connections are made (`hub.rs`).

mod renewal;

use super::connection::{Connection, ItemQueue, PendingCall, Slot};
use super::events::EventQueue;
use super::handlers::Handlers;
use super::hub::Hub;
use super::options::{ConnectOptions, Credentials};
use super::retry::{self, Action, Failed, Once, Outcome, Retries, Shown, Step};
use crate::core::ServerCall;
use crate::error::{CallError, Closed, Code, Error, Result};
use crate::message::Meta;
use crate::secret::Token;
use renewal::Sessions;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{Instrument, debug_span};

/// The tokens of a session. Its lock is held for a moment, and never while another is taken.
#[derive(Default)]
pub(crate) struct Tokens {
    pub(crate) current: Option<Token>,
    /// The token before the last refresh: frames with it may be under way.
    pub(crate) previous: Option<Token>,
    /// The token of an answer that was received and is not in use yet.
    pub(crate) coming: Option<Token>,
}

/// One user of a client.
pub(crate) struct User {
    pub(crate) hub: Arc<Hub>,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) client: String,
    pub(crate) timeout: Option<Duration>,
    pub(crate) handlers: Handlers,
    pub(crate) events: EventQueue,
    pub(crate) tokens: Mutex<Tokens>,
    pub(crate) sessions: Mutex<Sessions>,
    pub(crate) attaching: tokio::sync::Mutex<()>,
    pub(crate) is_closed: AtomicBool,
}

/// What is known of a request apart from its content.
pub(crate) struct Attempts<'a> {
    pub(crate) deadline: Option<Instant>,
    /// Whether it can be sent again even if it may have run.
    pub(crate) is_idempotent: bool,
    /// Whether it belongs to the connection for new calls, and not to an extra one.
    pub(crate) is_registration: bool,
    /// The items of a stream, which is not opened again once it has begun, unless the application can continue it.
    pub(crate) items: Option<&'a ItemQueue>,
}

/// Return when a timeout ends. `None` for one of centuries.
pub(crate) fn deadline_of(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

/// Return the value of `deadline_ms`. Fails at the end of the timeout.
pub(crate) fn remaining_ms(deadline: Option<Instant>) -> Result<Option<u64>> {
    let Some(deadline) = deadline else { return Ok(None) };
    let left = deadline.saturating_duration_since(Instant::now());
    let over = || Error::call(Code::DeadlineExceeded, "no response within the call's timeout");
    retry::deadline_ms(left).map(Some).ok_or_else(over)
}

impl User {
    pub(crate) fn new(hub: Arc<Hub>, credentials: Option<Credentials>, options: &ConnectOptions) -> Arc<Self> {
        let user = Arc::new(Self {
            hub,
            credentials,
            client: options.client.clone(),
            timeout: options.timeout,
            handlers: Handlers::new(options.max_calls),
            events: EventQueue::default(),
            tokens: Mutex::default(),
            sessions: Mutex::default(),
            attaching: tokio::sync::Mutex::default(),
            is_closed: AtomicBool::new(false),
        });
        user.hub.add(&user);
        user
    }

    pub(crate) fn tokens(&self) -> MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Return the token of calls that are sent now.
    pub(crate) fn token(&self) -> Token {
        self.tokens().current.clone().unwrap_or(Token::NONE)
    }

    /// Return whether this is the token of the session, or was its last one.
    pub(crate) fn owns(&self, token: &Token) -> bool {
        let Tokens { current, previous, coming } = &*self.tokens();
        !token.is_none() && [current, previous, coming].into_iter().flatten().any(|own| own == token)
    }

    fn check_open(&self) -> Result<()> {
        if self.is_closed.load(Ordering::Acquire) { Err(Closed::clean("this client is closed").into()) } else { Ok(()) }
    }

    // --- calls -----------------------------------------------------------------------------------

    /// Call a method and return the body of its result.
    pub(crate) async fn call(
        self: &Arc<Self>,
        method: &str,
        params: &[u8],
        meta: Meta<'_>,
        timeout: Option<Duration>,
    ) -> Result<Vec<u8>> {
        let deadline = deadline_of(timeout);
        let is_idempotent = meta.idempotency_key.is_some();
        let attempts = Attempts { deadline, is_idempotent, is_registration: false, items: None };
        self.run(attempts, |connection, slot, token| {
            let meta = Meta { deadline_ms: remaining_ms(deadline)?, ..meta };
            connection.request(slot, method, params, token, &meta)
        })
        .instrument(debug_span!("call", method))
        .await
    }

    /// Send a request until it gets an answer or a definite error, at most until its deadline.
    pub(crate) async fn run<F>(self: &Arc<Self>, attempts: Attempts<'_>, send: F) -> Result<Vec<u8>>
    where
        F: FnMut(&Arc<Connection>, Slot, &Token) -> Result<PendingCall>,
    {
        let Some(deadline) = attempts.deadline else {
            return self.try_until_answered(&attempts, send).await;
        };
        let answered = timeout_at(deadline, self.try_until_answered(&attempts, send)).await;
        answered.unwrap_or_else(|_| {
            self.hub.call_timed_out();
            Err(self.deadline_error())
        })
    }

    pub(crate) fn deadline_error(&self) -> Error {
        let problem = match self.hub.last_error() {
            Some(error) => Some(format!("no connection ({error})")),
            None => self.renewal_problem().map(|problem| format!("no session ({problem})")),
        };
        let what = problem.unwrap_or_else(|| "no response".to_owned());
        Error::call(Code::DeadlineExceeded, format!("{what} within the call's timeout"))
    }

    async fn try_until_answered<F>(self: &Arc<Self>, attempts: &Attempts<'_>, mut send: F) -> Result<Vec<u8>>
    where
        F: FnMut(&Arc<Connection>, Slot, &Token) -> Result<PendingCall>,
    {
        let mut retries = None;
        loop {
            let (connection, slot) = match self.try_ready() {
                Some(ready) => ready,
                None => self.ready(!attempts.is_registration).await?,
            };
            let token = self.begin();
            let (outcome, was_sent) = match send(&connection, slot, &token) {
                Ok(pending) => (pending.await, true),
                Err(error) => (Err(error), false),
            };
            match outcome {
                Ok(body) => return Ok(body),
                Err(error) => {
                    let retries = retries.get_or_insert_with(Retries::default);
                    self.after_failure(error, was_sent, attempts, retries, &connection, &token).await?;
                }
            }
        }
    }

    /// Return a connection and a slot, if a call can be sent at once.
    fn try_ready(&self) -> Option<(Arc<Connection>, Slot)> {
        if self.is_closed.load(Ordering::Acquire) {
            return None;
        }
        let connection = self.hub.current().filter(|connection| self.is_usable_on(connection))?;
        let slot = connection.try_slot()?;
        Some((connection, slot))
    }

    /// Wait until a request can be sent, with a session if one is required.
    pub(crate) async fn ready(self: &Arc<Self>, allows_extra: bool) -> Result<(Arc<Connection>, Slot)> {
        loop {
            self.check_open()?;
            self.wait_usable().await?;
            let connection = self.hub.get().await?;
            let found = if allows_extra {
                self.hub.slot(connection).await
            } else {
                connection.slot().await.map(|slot| (connection, slot))
            };
            let Some((connection, slot)) = found else {
                tokio::task::yield_now().await; // its end is being recorded
                continue;
            };
            if self.is_usable_on(&connection) {
                self.check_open()?;
                return Ok((connection, slot));
            }
            drop(slot); // for another session
            self.prepared(&connection).await;
        }
    }

    // --- retries ---------------------------------------------------------------------------------

    /// Wait until a failed request can be sent again. Return its error if it must not be.
    ///
    /// Boxed: it is rarely needed, and may make calls itself.
    fn after_failure<'a>(
        self: &'a Arc<Self>,
        error: Error,
        was_sent: bool,
        attempts: &'a Attempts<'_>,
        retries: &'a mut Retries,
        connection: &'a Arc<Connection>,
        token: &'a Token,
    ) -> Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>> {
        Box::pin(async move {
            let left = attempts.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let random = crate::random::fraction();
            if let Some(items) = attempts.items {
                if items.can_reopen() && self.check_open().is_ok() && retry::is_interruption(&error, items.was_lost()) {
                    if items.drained().await {
                        *retries = Retries::default();
                    }
                    let asked = error.as_call().map_or(Duration::ZERO, CallError::retry_after);
                    return wait(retries.wait(asked, left, random), error).await;
                }
                if items.has_begun() {
                    return Err(error);
                }
            }
            let outcome = match &error {
                Error::Call(failure) => Outcome::Error(failure),
                Error::Closed(_) if self.check_open().is_err() => return Err(error),
                Error::Closed(_) if connection.unanswered_did_not_run() => Outcome::Ended,
                Error::Closed(_) => Outcome::Lost,
                _ => return Err(error),
            };
            let failed = Failed {
                outcome,
                is_idempotent: attempts.is_idempotent,
                shown: self.shown(token),
                left,
                is_draining: connection.is_draining(),
                can_open: self.credentials.is_some(),
                can_reopen: self.can_reopen(),
                has_device: matches!(self.credentials, Some(Credentials::Device { .. })),
                has_refresh_token: self.has_refresh_token(),
            };
            let step = retries.next(&failed, random);
            match step {
                Step::Send => Ok(()),
                Step::Wait(_) => wait(step, error).await,
                Step::Refresh => {
                    self.mark_expired(token);
                    Ok(())
                }
                Step::Reopen => {
                    self.reopen(token);
                    Ok(())
                }
                Step::Replace => {
                    self.mark_lost(token);
                    Ok(())
                }
                Step::Attach => self.attach_after(error, attempts, retries, connection, token).await,
                Step::Report => match error {
                    Error::Call(failure) => self.reported(failure, was_sent, left, retries, connection, token).await,
                    error => Err(error),
                },
            }
        })
    }

    /// Return which token a request had. After the session has ended, no token counts as earlier.
    fn shown(&self, token: &Token) -> Shown {
        if token.is_none() {
            Shown::None
        } else if *token == self.token() || self.has_ended() {
            Shown::Present
        } else {
            Shown::Earlier
        }
    }

    async fn attach_after(
        self: &Arc<Self>,
        error: Error,
        attempts: &Attempts<'_>,
        retries: &mut Retries,
        connection: &Arc<Connection>,
        token: &Token,
    ) -> Result<()> {
        match self.attach(connection, token).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(error),
            Err(Error::Call(refusal)) if refusal.code != Code::DeadlineExceeded => {
                if retry::action(&refusal) == Action::Later {
                    retries.done.retain(|&once| once != Once::Action(Action::Attach)); // it was not attached
                }
                self.after_failure(refusal.into(), true, attempts, retries, connection, token).await
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// Record what an error that is reported means for the session, and return it.
    async fn reported(
        self: &Arc<Self>,
        failure: CallError,
        was_sent: bool,
        left: Option<Duration>,
        retries: &mut Retries,
        connection: &Arc<Connection>,
        token: &Token,
    ) -> Result<()> {
        if token.is_none() {
            return Err(failure.into());
        }
        if retry::ends_session(failure.code) {
            self.mark_ended(token, &failure);
        } else if failure.code == Code::Unauthenticated {
            self.mark_unknown(token);
        } else if !was_sent && failure.details.get("size").is_some() && retries.is_first(Once::Show) {
            // Too large for a connection without a session: show the token by a small request first, if it was not shown since.
            if connection.has_session() {
                return Ok(());
            }
            return self.call("session.info", &[0xc0], Meta::default(), left).await.map(drop);
        }
        Err(failure.into())
    }

    // --- notifications of the connection ---------------------------------------------------------

    pub(crate) fn call_received(&self, connection: &Arc<Connection>, call: ServerCall) {
        self.handlers.call(connection, call, self.user_name());
    }

    pub(crate) fn call_withdrawn(&self, connection: &Connection, number: u32) {
        self.handlers.withdraw(connection, number);
    }

    pub(crate) fn connection_ended(&self, connection: &Connection, error: &Closed) {
        self.handlers.abort(&error.reason, Some(connection));
        self.forget(connection);
    }
}

/// Wait before a retry, or return the error without one.
async fn wait(step: Step, error: Error) -> Result<()> {
    let Step::Wait(delay) = step else { return Err(error) };
    sleep(delay).await;
    Ok(())
}
