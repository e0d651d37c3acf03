//! The session of one user: when to open, refresh and attach it, and when it has ended.
//!
//! Rules: all waiting calls share one attempt. No call is sent during a refresh, since the server revokes the old token with
//! its answer. A refresh token works once; if the answer was lost, it can be sent again for a few seconds after the first
//! attempt and never later: repetitions do not extend the server's grace. After TOKEN_REVOKED, SESSION_REPLACED or a refused `session.open`, every call gets that error until the application asks
//! for a new session. The server cannot cause a storm of requests: early refreshes have a minimum interval, a session that
//! has already expired is renewed with growing delays, and one `session.revoked` per token and connection is checked.

mod presence;

use super::super::attempt::Attempt;
use super::super::backoff::Backoff;
use super::super::connection::{Connection, PendingCall};
use super::super::hub::CLOSE_TIMEOUT;
use super::super::options::{Credentials, login_fault};
use super::super::retry::{self, Action};
use super::super::session::{Session, SessionInfo};
use super::User;
use crate::codec::{self, Value};
use crate::core::issued_token;
use crate::error::{CallError, Code, Error, Result};
use crate::message::Meta;
use crate::secret::Token;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{Instrument, debug_span};
use zeroize::Zeroizing;

/// Timeout of requests of `session.*`.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Consecutive lost answers to `session.open`. Each may have left a session that counts against the limit.
const MAX_LOST: u32 = 3;
/// Minimum interval between early refreshes, and from a session that is usable for less than that to the next one.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// How long a session must last until the delay after it was lost starts again.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// How long a login that a function has returned can wait for a connection: it may be short-lived.
const LOGIN_HOLDS: Duration = Duration::from_secs(10);

/// The state of the session of one user.
#[derive(Default)]
pub(crate) struct Sessions {
    session: Option<Session>,
    is_required: bool,
    unknown_token: Option<Token>, // refused with UNAUTHENTICATED
    ended_by: Option<CallError>,
    renewing: Option<Attempt>,
    attached_to: HashSet<u64>,     // the connections where the session of a device was attached
    registered: HashMap<u64, u64>, // by connection: the version of the handlers that were registered there
    preparing: HashMap<u64, Attempt>, // where they are being registered: other requests wait
    refreshed_early_at: Option<Instant>,
    not_before: Option<Instant>, // of the next renewal
    backoff: Backoff,            // of sessions that expire at once
    is_lost: bool,               // the server does not know the token, and no other session was opened yet
    opened_at: Option<Instant>,
    lost_backoff: Backoff, // of sessions that the server has lost
    checked_revocation: Option<(u64, Token)>,
    login: Option<(Value, Instant)>, // fetched, and until when it holds
    is_fetching_login: bool,
    refresh_timer: Option<AbortHandle>,
    keeper: Option<AbortHandle>,
}

impl Sessions {
    fn is_usable(&self, now: Instant) -> bool {
        if self.ended_by.is_some() || self.renewing.is_some() {
            return false;
        }
        self.session.as_ref().map_or(!self.is_required, |session| now < session.usable_until)
    }

    fn has_refresh_token(&self, now: Instant) -> bool {
        self.session.as_ref().is_some_and(|session| session.refresh_token(now).is_some())
    }

    /// Delay the opening of the next session, since the server has lost this one (section 11.2).
    fn delay_opening(&mut self, now: Instant) {
        if self.opened_at.is_none_or(|at| now.saturating_duration_since(at) >= STABLE_AFTER) {
            self.lost_backoff.reset();
        }
        self.is_lost = true;
        self.not_before = Some(now + self.lost_backoff.next(Duration::ZERO));
    }
}

/// The state of one renewal.
struct Renewal {
    /// Whether calls wait for it. Otherwise the old token still works: give up at the first error.
    must: bool,
    backoff: Backoff,
    done: Vec<Action>,
    lost: u32,
}

impl User {
    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Return the open session, if any.
    pub(crate) fn session(&self) -> Option<SessionInfo> {
        self.lock().session.as_ref().map(|session| session.info.clone())
    }

    pub(crate) fn user_name(&self) -> String {
        self.session().map(|session| session.user).unwrap_or_default()
    }

    /// Return whether the session was revoked, replaced or refused. Only the application can open a new one.
    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended_by.is_some()
    }

    /// Return whether a call can be sent on a connection now, as far as the session is concerned.
    pub(crate) fn is_usable_on(&self, connection: &Connection) -> bool {
        let sessions = self.lock();
        sessions.is_usable(Instant::now()) && !sessions.preparing.contains_key(&connection.id)
    }

    /// Return why the renewal takes its time, if there is a reason.
    pub(crate) fn renewal_problem(&self) -> Option<&'static str> {
        let sessions = self.lock();
        if sessions.is_lost {
            Some("the server has lost it, and no other one was opened")
        } else if sessions.not_before.is_some_and(|time| Instant::now() < time) {
            Some("the server opens only expired sessions; report it to its operator")
        } else if sessions.is_fetching_login {
            Some("the function given as login has not returned")
        } else {
            None
        }
    }

    /// Require a session for calls, and forget one that has ended or was refused.
    pub(crate) fn require_session(&self) -> Result<()> {
        if self.credentials.is_none() {
            return Err(Error::call(
                Code::Unauthenticated,
                "this client has no credentials; give a key, a device, a certificate or a login to connect",
            ));
        }
        let mut sessions = self.lock();
        sessions.is_required = true;
        sessions.ended_by = None;
        let is_unknown =
            sessions.session.as_ref().is_some_and(|session| sessions.unknown_token.as_ref() == Some(session.token()));
        if is_unknown {
            sessions.session = None;
            drop(sessions);
            self.tokens().current = None;
        }
        Ok(())
    }

    /// Wait until calls can be sent: with a valid session, or without one if none is required.
    pub(crate) async fn wait_usable(self: &Arc<Self>) -> Result<()> {
        loop {
            let attempt = {
                let mut sessions = self.lock();
                if let Some(error) = &sessions.ended_by {
                    return Err(error.clone().into());
                }
                if sessions.is_usable(Instant::now()) {
                    return Ok(());
                }
                self.renewing(&mut sessions, true)
            };
            attempt.wait().await?;
        }
    }

    /// Return the token for a call that is sent now, and record that it is used.
    pub(crate) fn begin(&self) -> Token {
        self.touch();
        self.token()
    }

    pub(crate) fn touch(&self) {
        if let Some(session) = &mut self.lock().session {
            session.touch(Instant::now());
        }
    }

    // --- errors of calls -------------------------------------------------------------------------

    fn is_current(&self, token: &Token) -> bool {
        self.tokens().current.as_ref() == Some(token)
    }

    /// Handle TOKEN_EXPIRED for a token.
    pub(crate) fn mark_expired(&self, token: &Token) {
        if self.is_current(token) {
            if let Some(session) = &mut self.lock().session {
                session.expire(Instant::now());
            }
        }
    }

    pub(crate) fn has_refresh_token(&self) -> bool {
        self.lock().has_refresh_token(Instant::now())
    }

    /// Return whether another session can be opened in place of one that belongs to another certificate.
    pub(crate) fn can_reopen(&self) -> bool {
        self.credentials.as_ref().is_some_and(Credentials::can_reopen)
    }

    /// Open another session in place of that of a token.
    pub(crate) fn reopen(&self, token: &Token) {
        if self.is_current(token) {
            self.drop_refresh_token();
            self.mark_expired(token);
        }
    }

    /// Handle a token that the server does not know: open another session after a delay, once for all calls. The store has lost
    /// the refresh token as well.
    pub(crate) fn mark_lost(&self, token: &Token) {
        if self.is_current(token) {
            let mut sessions = self.lock();
            if !sessions.is_lost {
                let now = Instant::now();
                sessions.delay_opening(now);
                // Under one lock: a call in another thread must not be sent again before the token counts as expired.
                if let Some(session) = &mut sessions.session {
                    session.drop_refresh_token();
                    session.expire(now);
                }
            }
        }
    }

    /// Handle UNAUTHENTICATED for a token. It stays in use until the application asks for a new session.
    pub(crate) fn mark_unknown(&self, token: &Token) {
        self.lock().unknown_token = Some(token.clone());
    }

    /// Handle TOKEN_REVOKED or SESSION_REPLACED for a token.
    pub(crate) fn mark_ended(&self, token: &Token, error: &CallError) {
        if self.is_current(token) {
            self.end_session(error);
        }
    }

    fn end_session(&self, error: &CallError) {
        {
            let mut sessions = self.lock();
            sessions.ended_by = Some(error.clone());
            sessions.session = None;
            sessions.is_lost = false;
            stop(&mut sessions.refresh_timer);
            stop(&mut sessions.keeper);
        }
        {
            let mut tokens = self.tokens();
            tokens.previous = tokens.current.take();
        }
        self.handlers.abort(&error.message, None);
    }

    // --- renewing --------------------------------------------------------------------------------

    /// Return the renewal that runs, or start one.
    fn renewing(self: &Arc<Self>, sessions: &mut Sessions, must: bool) -> Attempt {
        sessions.renewing.get_or_insert_with(|| Attempt::start(Arc::clone(self).renew(must))).clone()
    }

    fn refresh_early(self: &Arc<Self>) {
        let mut sessions = self.lock();
        let now = Instant::now();
        if !sessions.has_refresh_token(now) || sessions.renewing.is_some() || self.is_closed.load(Ordering::Acquire) {
            return;
        }
        if let Some(allowed_at) = sessions.refreshed_early_at.map(|at| at + MIN_REFRESH_INTERVAL).filter(|&at| now < at)
        {
            self.refresh_at(&mut sessions, allowed_at);
            return;
        }
        sessions.refreshed_early_at = Some(now);
        self.renewing(&mut sessions, false);
    }

    /// Renew the session now if it cannot be used, although no call waits for it.
    fn renew_soon(self: &Arc<Self>) {
        let mut sessions = self.lock();
        let is_over = sessions.ended_by.is_some() || self.is_closed.load(Ordering::Acquire);
        if !is_over && !sessions.is_usable(Instant::now()) {
            self.renewing(&mut sessions, true);
        }
    }

    fn refresh_at(self: &Arc<Self>, sessions: &mut Sessions, at: Instant) {
        stop(&mut sessions.refresh_timer);
        let user = Arc::downgrade(self);
        let timer = tokio::spawn(async move {
            sleep_until(at).await;
            if let Some(user) = user.upgrade() {
                user.refresh_early();
            }
        });
        sessions.refresh_timer = Some(timer.abort_handle());
    }

    async fn renew(self: Arc<Self>, must: bool) -> Result<()> {
        let result = self.try_renew(must).instrument(debug_span!("renew_session")).await;
        self.lock().renewing = None;
        self.tokens().coming = None;
        self.keep();
        result
    }

    /// Refresh or open the session.
    async fn try_renew(self: &Arc<Self>, must: bool) -> Result<()> {
        self.delayed().await;
        let mut renewal = Renewal { must, backoff: Backoff::default(), done: Vec::new(), lost: 0 };
        loop {
            let connection = self.hub.get().await?;
            if self.needs_login(Instant::now()) {
                self.fetch_login().await?;
                continue; // with the connection that is current now
            }
            let Some((connection, slot)) = self.hub.slot(connection).await else {
                tokio::task::yield_now().await; // its end is being recorded
                continue;
            };
            let sent_at = Instant::now();
            if self.needs_login(sent_at) {
                continue;
            }
            let (method, params) = self.next_request(&connection, sent_at)?;
            let is_refresh = method == "session.refresh";
            let token = self.token();
            let me = Arc::clone(self);
            // A call or an event with the new token may be in the same read.
            let on_result = move |body: &[u8]| me.tokens().coming = issued_token(body);
            let sent = connection.send(slot, None, Some(Box::new(on_result)), |conversation, wall| {
                conversation.request(method, &params, &token, &Meta::default(), wall)
            });
            let outcome = match sent {
                Ok(pending) => in_time(REQUEST_TIMEOUT, pending).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(body) => return self.adopt(&body, &connection, is_refresh),
                Err(Error::Closed(closed)) => {
                    if is_refresh && !connection.unanswered_did_not_run() {
                        renewal.must = true; // the old token may be revoked
                        if let Some(session) = &mut self.lock().session {
                            session.refresh_lost(sent_at);
                        }
                    }
                    renewal.lost += 1;
                    if renewal.lost > MAX_LOST {
                        return Err(closed.into());
                    }
                }
                Err(Error::Call(error)) => {
                    if !self.should_retry(error, is_refresh, &connection, &mut renewal).await? {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Wait until the next session may be opened.
    async fn delayed(&self) {
        let not_before = self.lock().not_before;
        if let Some(time) = not_before {
            sleep_until(time).await;
        }
    }

    /// Return whether a login must be fetched before the next request.
    fn needs_login(&self, now: Instant) -> bool {
        let sessions = self.lock();
        let is_fetched = sessions.login.as_ref().is_some_and(|(_, until)| now < *until);
        matches!(self.credentials, Some(Credentials::Login(_))) && !sessions.has_refresh_token(now) && !is_fetched
    }

    /// Call the function that returns a login.
    async fn fetch_login(&self) -> Result<()> {
        let Some(Credentials::Login(login)) = &self.credentials else {
            return Ok(());
        };
        self.lock().is_fetching_login = true;
        let result = (login.0)().await;
        let mut sessions = self.lock();
        sessions.is_fetching_login = false;
        let login = result.map_err(|error| Error::Login(Arc::from(error)))?;
        if let Some(fault) = login_fault(&login) {
            return Err(Error::Login(Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(format!(
                "it returned what cannot be sent: {fault}"
            )))));
        }
        sessions.login = Some((login, Instant::now() + LOGIN_HOLDS));
        Ok(())
    }

    /// Return the method and the params of the next request.
    fn next_request(&self, connection: &Connection, now: Instant) -> Result<(&'static str, Zeroizing<Vec<u8>>)> {
        let mut sessions = self.lock();
        let mut params = Zeroizing::new(Vec::with_capacity(512)); // not moved while it grows, as a rule
        let text = |params: &mut Vec<u8>, key: &str, value: &str| {
            codec::write_str(params, key);
            codec::write_str(params, value);
        };
        if let Some(token) = sessions.session.as_ref().and_then(|session| session.refresh_token(now)) {
            codec::write_map(&mut params, 2);
            codec::write_str(&mut params, "refresh_token");
            codec::write_bin(&mut params, token.as_bytes());
            text(&mut params, "client", &self.client);
            return Ok(("session.refresh", params));
        }
        match &self.credentials {
            None => codec::write_map(&mut params, 1),
            Some(Credentials::ApiKey { user, key }) => {
                codec::write_map(&mut params, 4);
                text(&mut params, "scheme", "api_key");
                text(&mut params, "user", user);
                text(&mut params, "key", key.expose());
            }
            Some(Credentials::Device { device, name }) => {
                codec::write_map(&mut params, 4);
                text(&mut params, "scheme", "ed25519");
                text(&mut params, "device", name);
                codec::write_str(&mut params, "signature");
                codec::write_bin(&mut params, &device.sign(&connection.channel().open_message(name)));
            }
            Some(Credentials::Certificate { user }) => {
                codec::write_map(&mut params, 2 + usize::from(user.is_some()));
                text(&mut params, "scheme", "tls");
                if let Some(user) = user {
                    text(&mut params, "user", user);
                }
            }
            Some(Credentials::Login(_)) => {
                // Each login is sent once.
                let login = sessions.login.take().map_or(Value::Nil, |(login, _)| login);
                let Value::Map(fields) = login else {
                    return Err(Error::call(Code::Internal, "the login is missing"));
                };
                codec::write_map(&mut params, fields.len() + 1);
                for (key, value) in &fields {
                    codec::write_str(&mut params, key);
                    codec::write_value(&mut params, value)
                        .map_err(|fault| Error::call(Code::InvalidArgument, fault.phrase()))?;
                }
            }
        }
        text(&mut params, "client", &self.client);
        Ok(("session.open", params))
    }

    fn drop_refresh_token(&self) {
        if let Some(session) = &mut self.lock().session {
            session.drop_refresh_token();
        }
    }

    /// Return whether to retry; false if the old token still works. Return the error if a retry cannot help.
    async fn should_retry(
        self: &Arc<Self>,
        error: CallError,
        is_refresh: bool,
        connection: &Arc<Connection>,
        renewal: &mut Renewal,
    ) -> Result<bool> {
        let action = retry::action(&error);
        let is_first = !renewal.done.contains(&action);
        renewal.done.push(action);
        match action {
            Action::Later if renewal.must => {
                sleep(renewal.backoff.next(error.retry_after())).await;
                return Ok(true);
            }
            Action::AtOnce if is_first => return Ok(true),
            Action::Attach if is_first => {
                return match self.attach(connection, &self.token()).await {
                    Ok(_) | Err(Error::Call(_)) => Ok(true), // the next answer reports a refusal, too
                    Err(error) => Err(error),
                };
            }
            _ => {}
        }
        if is_refresh && self.should_open_instead(&error, renewal.must) {
            self.drop_refresh_token();
            renewal.must = true;
            self.delayed().await;
            return Ok(true);
        }
        if !renewal.must && !retry::ends_session(error.code) {
            let mut sessions = self.lock();
            let now = Instant::now();
            let left = sessions.session.as_ref().map_or(Duration::ZERO, |session| session.usable_until - now);
            let pause = left.mul_f64(0.25 + crate::random::fraction() / 4.0).max(MIN_REFRESH_INTERVAL);
            self.refresh_at(&mut sessions, now + pause);
            return Ok(false);
        }
        if retry::refuses(error.code) {
            self.end_session(&error);
        }
        Err(error.into())
    }

    /// Return whether to open a new session instead: the refresh token has expired, may have been used, belongs to a previous
    /// certificate, or is unknown when the token is no longer valid.
    fn should_open_instead(&self, error: &CallError, must: bool) -> bool {
        match retry::action(error) {
            Action::Reopen => self.can_reopen(),
            Action::Report | Action::Replace if error.code == Code::Unauthenticated => {
                if must {
                    self.lock().delay_opening(Instant::now());
                }
                must
            }
            _ => error.code == Code::TokenExpired || retry::may_have_run(error.code),
        }
    }

    /// Use the session of an answer.
    fn adopt(self: &Arc<Self>, body: &[u8], connection: &Arc<Connection>, is_refresh: bool) -> Result<()> {
        let now = Instant::now();
        let session = Session::parse(body, connection.server_wall(), now, crate::random::fraction())?;
        let old = {
            let mut tokens = self.tokens();
            let old = tokens.current.replace(session.token().clone());
            if is_refresh {
                tokens.previous.clone_from(&old);
            }
            tokens.coming = None;
            old
        };
        let token = session.token().clone();
        if let Some(old) = old.as_ref().filter(|_| !is_refresh) {
            connection.session_ended(old);
        }
        {
            let mut sessions = self.lock();
            sessions.is_lost = false;
            if !is_refresh {
                sessions.opened_at = Some(now);
                sessions.registered.clear();
                sessions.attached_to = HashSet::from([connection.id]);
            }
            if session.usable_until < now + MIN_REFRESH_INTERVAL {
                let delay = MIN_REFRESH_INTERVAL + sessions.backoff.next(Duration::ZERO);
                sessions.not_before = Some(now + delay);
            } else {
                sessions.not_before = None;
                sessions.backoff.reset();
            }
            stop(&mut sessions.refresh_timer);
            let refresh_at = session.refresh_token(now).map(|_| session.refresh_at);
            sessions.session = Some(session);
            if let Some(at) = refresh_at {
                self.refresh_at(&mut sessions, at);
            }
        }
        for other in self.hub.connections().into_iter().filter(|other| other.id != connection.id) {
            if is_refresh && !self.needs_proof(&other) {
                other.show(old.as_ref(), &token); // at once: the server waits for it (section 9.6)
                self.catch_up(&other, Some(&token));
            } else {
                if let Some(old) = &old {
                    other.session_ended(old);
                }
                self.introduce(&other);
            }
        }
        if self.needs_proof(connection) {
            self.introduce(connection);
        } else if self.needs_registration(connection) {
            // Before the calls that wait for this session: their methods may call back.
            let slot = connection.try_slot();
            let sent = slot.and_then(|slot| self.register(connection, slot, &token).ok());
            let (user, connection) = (Arc::clone(self), Arc::clone(connection));
            tokio::spawn(async move {
                let _ = user.register_if_any(&connection, sent).await; // or the next connection registers them
            });
        }
        Ok(())
    }

    /// Show the present token on a connection in use, unless it was shown there already and nothing else is missing.
    pub(crate) fn catch_up(self: &Arc<Self>, connection: &Arc<Connection>, shown: Option<&Token>) {
        if shown != Some(&self.token()) || self.needs_registration(connection) {
            self.introduce(connection);
        }
    }

    /// Wait until no renewal runs.
    async fn after_renewal(&self) {
        let attempt = self.lock().renewing.clone();
        if let Some(attempt) = attempt {
            let _ = attempt.wait().await; // reported to those who need it
        }
    }

    // --- the end ---------------------------------------------------------------------------------

    /// Stop all work in the background. Return the attempt to renew the session, if one runs.
    pub(crate) fn stop(&self) {
        self.is_closed.store(true, Ordering::Release);
        {
            let mut sessions = self.lock();
            if let Some(renewing) = sessions.renewing.take() {
                renewing.abort();
            }
            stop(&mut sessions.refresh_timer);
            stop(&mut sessions.keeper);
        }
        self.handlers.abort("this session is closed", None);
        self.events.close();
        self.hub.remove(self);
    }

    /// Close the session on the server if there is a connection, since the server limits sessions per user.
    pub(crate) async fn close(self: &Arc<Self>) {
        if self.is_closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let session = self.lock().session.take();
        self.stop();
        let Some((session, connection)) = session.zip(self.hub.current()) else {
            return;
        };
        let token = session.token();
        let closing = async {
            let slot = connection.slot().await?; // other sessions may be closing, too
            connection.request(slot, "session.close", &[0xc0], token, &Meta::default()).ok()?.await.ok()
        };
        let _ = timeout(CLOSE_TIMEOUT, closing).await; // otherwise the session expires on the server
        for connection in [connection].into_iter().chain(self.hub.extra()) {
            connection.session_ended(token);
        }
    }
}

fn stop(task: &mut Option<AbortHandle>) {
    if let Some(task) = task.take() {
        task.abort();
    }
}

/// Wait for an answer, at most for a time.
async fn in_time(limit: Duration, pending: PendingCall) -> Result<Vec<u8>> {
    timeout(limit, pending)
        .await
        .unwrap_or_else(|_| Err(Error::call(Code::DeadlineExceeded, "no response within the call's timeout")))
}
