//! A session on connections: it is shown on each new one, with the application's handlers, and kept in use while only the server
//! calls.

use super::super::super::attempt::Attempt;
use super::super::super::backoff::Backoff;
use super::super::super::connection::{Connection, PendingCall, Slot};
use super::super::super::options::Credentials;
use super::super::super::retry::{self, Action};
use super::{MIN_REFRESH_INTERVAL, REQUEST_TIMEOUT, User, in_time};
use crate::codec;
use crate::error::{CallError, Closed, Code, Error, Result};
use crate::message::Meta;
use crate::secret::Token;
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Maximum interval between two attempts to renew a session that only waits for calls from the server.
const MAX_KEEP_INTERVAL: Duration = Duration::from_secs(30);

impl User {
    /// Show the token on a connection, so that events and calls of the session arrive there, and return it. Attach a session
    /// that is bound to a device, and register the application's handlers. `registering` is the registration if it was sent
    /// already. The request is small: a large one is refused on a connection without a session.
    pub(crate) async fn present(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        registering: Option<PendingCall>,
    ) -> Option<Token> {
        if !self.can_present() {
            return None;
        }
        let token = self.token();
        let shown = if self.needs_proof(connection) {
            match self.attach(connection, &token).await {
                Ok(_) => self.register_if_any(connection, None).await,
                Err(error) => Err(error),
            }
        } else if registering.is_some() || self.needs_registration(connection) {
            self.register_if_any(connection, registering).await
        } else {
            self.request(connection, "session.info", &[0xc0], &token).await.map(drop)
        };
        if let Err(Error::Call(error)) = shown {
            self.handle_refusal(&token, &error);
        } // otherwise the next connection shows the token
        Some(token)
    }

    /// Show the session on a connection, once no renewal runs. The application's handlers are registered at once if that is
    /// possible. Otherwise other requests of the session wait for it there: methods call back where they were called.
    pub(crate) fn introduce(self: &Arc<Self>, connection: &Arc<Connection>) -> Attempt {
        let registering = self.begin_registration(connection);
        let is_awaited = registering.is_none() && self.needs_registration(connection);
        let (user, to) = (Arc::clone(self), Arc::clone(connection));
        let mut sessions = self.lock();
        let attempt = Attempt::start(async move {
            user.after_renewal().await;
            user.present(&to, registering).await;
            user.lock().preparing.remove(&to.id);
            Ok(())
        });
        if is_awaited {
            sessions.preparing.insert(connection.id, attempt.clone());
        }
        attempt
    }

    /// Wait until the application's handlers are registered on a connection, or that has failed.
    pub(crate) async fn prepared(&self, connection: &Connection) {
        let preparing = self.lock().preparing.get(&connection.id).cloned();
        if let Some(attempt) = preparing {
            let _ = attempt.wait().await; // which does not fail
        }
    }

    /// Show the token on a connection that may replace another one, and wait for any answer. Return false without a token to show.
    pub(crate) async fn prove(&self, connection: &Arc<Connection>) -> Result<bool> {
        if !self.can_present() {
            return Ok(false);
        }
        let token = self.token();
        let shown = if self.needs_proof(connection) {
            self.attach(connection, &token).await.map(drop)
        } else {
            self.request(connection, "session.info", &[0xc0], &token).await.map(drop)
        };
        match shown {
            Err(Error::Call(error)) if error.code != Code::DeadlineExceeded => Ok(true),
            shown => shown.map(|()| true),
        }
    }

    /// Return whether there is a token to show. During a renewal there will be another one.
    pub(crate) fn can_present(&self) -> bool {
        let sessions = self.lock();
        sessions.session.is_some() && sessions.renewing.is_none()
    }

    /// Return whether the session must be attached to a connection by the key of its device.
    pub(super) fn needs_proof(&self, connection: &Connection) -> bool {
        let sessions = self.lock();
        let is_bound = sessions.session.as_ref().is_some_and(|session| session.info.bound);
        let is_device = matches!(self.credentials, Some(Credentials::Device { .. }));
        is_bound && is_device && !sessions.attached_to.contains(&connection.id)
    }

    /// Return whether the application's handlers are not registered on a connection.
    pub(super) fn needs_registration(&self, connection: &Connection) -> bool {
        let Some(version) = self.handlers.version().filter(|_| connection.has_calls()) else { return false };
        self.lock().registered.get(&connection.id) != Some(&version)
    }

    /// Register the handlers again when the session is shown next: the last registration has failed.
    pub(crate) fn forget_registrations(&self) {
        self.lock().registered.clear();
    }

    /// Forget a connection that has ended.
    pub(crate) fn forget(&self, connection: &Connection) {
        let mut sessions = self.lock();
        sessions.attached_to.remove(&connection.id);
        sessions.registered.remove(&connection.id);
    }

    /// Send a small request of the session, and wait for its result.
    async fn request(
        &self,
        connection: &Arc<Connection>,
        method: &str,
        params: &[u8],
        token: &Token,
    ) -> Result<Vec<u8>> {
        let Some(slot) = connection.slot().await else {
            return Err(Closed::broken("the connection accepts no requests").into());
        };
        let pending = connection.request(slot, method, params, token, &Meta::default())?;
        in_time(REQUEST_TIMEOUT, pending).await
    }

    /// Send the registration of the application's handlers for the session.
    pub(crate) fn register(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        slot: Slot,
        token: &Token,
    ) -> Result<PendingCall> {
        self.touch();
        self.keep();
        let (methods, version) = self.handlers.methods();
        let methods: Vec<&str> = methods.iter().map(String::as_str).collect();
        let max = self.handlers.max;
        let sent =
            connection.send(slot, None, None, |conversation, wall| conversation.handle(token, &methods, max, wall))?;
        self.lock().registered.insert(connection.id, version);
        Ok(sent)
    }

    /// Send the registration of the application's handlers on a connection that is not in use yet, if that can be done at once.
    fn begin_registration(self: &Arc<Self>, connection: &Arc<Connection>) -> Option<PendingCall> {
        if !self.can_present() || self.needs_proof(connection) || !self.needs_registration(connection) {
            return None;
        }
        self.register(connection, connection.try_slot()?, &self.token()).ok()
    }

    /// Register the application's handlers if they are not registered on a connection. `sent` is the registration if it was sent
    /// already. Retries while that may succeed on this connection.
    pub(super) async fn register_if_any(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        mut sent: Option<PendingCall>,
    ) -> Result<()> {
        let mut backoff = Backoff::default();
        loop {
            let registering = match sent.take() {
                Some(sent) => sent,
                None if self.has_ended() || !self.needs_registration(connection) => return Ok(()),
                None => match connection.slot().await {
                    Some(slot) => self.register(connection, slot, &self.token())?,
                    None => return Ok(()), // the next connection registers them
                },
            };
            let Err(error) = in_time(REQUEST_TIMEOUT, registering).await else { return Ok(()) };
            self.lock().registered.remove(&connection.id);
            match error {
                Error::Call(error) if may_succeed_later(&error) => sleep(backoff.next(error.retry_after())).await,
                error => return Err(error),
            }
        }
    }

    /// Register the handlers on extra connections, too, after they have changed: before later requests there, since slots are
    /// given in order.
    pub(crate) async fn register_on_others(self: &Arc<Self>) {
        for connection in self.hub.extra() {
            let user = Arc::clone(self);
            let mut registering = Box::pin(async move {
                let slot = connection.slot().await?;
                let sent = user.register(&connection, slot, &user.token()).ok()?;
                let registered = in_time(REQUEST_TIMEOUT, sent).await;
                registered.inspect_err(|_| user.forget(&connection)).ok()
            });
            if poll_fn(|cx| Poll::Ready(registering.as_mut().poll(cx).is_pending())).await {
                tokio::spawn(registering);
            }
        }
    }

    /// Attach the session of a token to a connection if both are still in use. Return false without a device. Concurrent
    /// callers share one request.
    pub(crate) async fn attach(&self, connection: &Arc<Connection>, token: &Token) -> Result<bool> {
        let Some(Credentials::Device { device, .. }) = &self.credentials else {
            return Ok(false);
        };
        let is_first = self.attaching.try_lock().is_ok_and(|_guard| true);
        let _guard = self.attaching.lock().await;
        let is_attached = self.lock().attached_to.contains(&connection.id);
        if !self.is_current(token) || !connection.is_open() || (is_attached && !is_first) {
            return Ok(true);
        }
        self.lock().attached_to.remove(&connection.id);
        let mut params = Vec::new();
        codec::write_map(&mut params, 1);
        codec::write_str(&mut params, "signature");
        codec::write_bin(&mut params, &device.sign(&connection.channel().attach_message(token)));
        match self.request(connection, "session.attach", &params, token).await {
            Ok(_) => drop(self.lock().attached_to.insert(connection.id)),
            Err(Error::Closed(_)) => {} // the next connection attaches it
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Handle the error of a request that only shows a token.
    fn handle_refusal(self: &Arc<Self>, token: &Token, error: &CallError) {
        let action = retry::action(error);
        if action == Action::Reopen && self.can_reopen() {
            self.reopen(token);
        } else if action == Action::Replace && self.credentials.is_some() {
            self.mark_lost(token);
            self.renew_soon();
        } else if error.code == Code::Unauthenticated {
            self.mark_unknown(token);
        } else if error.code == Code::TokenExpired {
            self.mark_expired(token);
        } else if retry::ends_session(error.code) {
            self.mark_ended(token, error);
        }
    }

    /// Handle an event of the session or of the server.
    pub(crate) fn event_received(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        name: &str,
        body: Vec<u8>,
        token: &Token,
    ) {
        if self.is_current(token) {
            match name {
                "session.revoked" => {
                    self.handlers.abort("the session has ended", None);
                    let key = (connection.id, token.clone());
                    let mut sessions = self.lock();
                    if sessions.checked_revocation.as_ref() != Some(&key) {
                        sessions.checked_revocation = Some(key);
                        drop(sessions);
                        let (user, connection) = (Arc::clone(self), Arc::clone(connection));
                        // The answer has the code: revoked or replaced.
                        tokio::spawn(async move { user.present(&connection, None).await });
                    }
                }
                "session.expiring" => self.refresh_early(),
                _ => {}
            }
        }
        self.events.put(body);
    }

    // --- a session that only waits for calls from the server -------------------------------------

    /// Keep the session in use if there are handlers: show it again before its idle timeout, and renew it after it has
    /// expired.
    pub(crate) fn keep(self: &Arc<Self>) {
        if self.handlers.is_empty() || self.is_closed.load(Ordering::Acquire) {
            return;
        }
        let mut sessions = self.lock();
        if sessions.session.is_none() || sessions.keeper.as_ref().is_some_and(|keeper| !keeper.is_finished()) {
            return;
        }
        let me = Arc::downgrade(self);
        let keeper = tokio::spawn(async move {
            let mut interval = MIN_REFRESH_INTERVAL;
            loop {
                let user = me.upgrade().filter(|user| !user.handlers.is_empty());
                let Some(left) = user.and_then(|user| user.time_left()) else {
                    return;
                };
                if left > Duration::ZERO {
                    interval = MIN_REFRESH_INTERVAL;
                }
                sleep((left / 2).max(interval)).await;
                let Some(user) = me.upgrade() else {
                    return;
                };
                let Some((left, idle)) = user.time_left().zip(user.session().map(|info| info.idle_timeout_ms)) else {
                    return;
                };
                if left.is_zero() {
                    interval = (interval * 2).min(MAX_KEEP_INTERVAL);
                    let _ = user.wait_usable().await; // the next round tries again
                } else if left < Duration::from_millis(idle) / 2 {
                    if let Ok(connection) = user.hub.get().await {
                        user.touch();
                        user.present(&connection, None).await;
                    }
                }
            }
        });
        sessions.keeper = Some(keeper.abort_handle());
    }

    /// Return for how long the session can be used, if there is one.
    fn time_left(&self) -> Option<Duration> {
        let sessions = self.lock();
        Some(sessions.session.as_ref()?.usable_until.saturating_duration_since(Instant::now()))
    }
}

fn may_succeed_later(error: &CallError) -> bool {
    matches!(retry::action(error), Action::Later | Action::AtOnce) || error.code == Code::DeadlineExceeded
}
