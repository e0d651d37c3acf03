//! What an application meets: a client, its calls, and the enrolment of devices.

use super::address::Endpoint;
use super::events::ServerEvent;
use super::handlers::Call;
use super::hub::Hub;
use super::options::{ConnectOptions, Credentials};
use super::session::SessionInfo;
use super::stream::StreamBuilder;
use super::user::{Attempts, User, deadline_of};
use crate::codec::{self, Value};
use crate::error::{CallError, Code, Error, ProtocolError, Result};
use crate::message::{Meta, Welcome};
use crate::trust::Device;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// A client of one server, with the session of one user.
///
/// It is cheap to clone, and all methods can be called by many tasks at once. It reconnects and renews its session by itself.
/// [`close`](Self::close) it at the end: dropping the last clone closes the connection too, and leaves the session to expire.
///
/// # Panics
///
/// Async functions with a timeout panic if they are awaited outside of a runtime of tokio, or in one without its clock.
#[derive(Clone)]
pub struct Client {
    user: Arc<User>,
    handle: Arc<Handle>,
}

/// Stops the work in the background with the last clone of a client.
struct Handle {
    user: Arc<User>,
    options: ConnectOptions,
    /// Whether the connection belongs to this session.
    is_owner: bool,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.user.stop();
        if self.is_owner {
            self.user.hub.shut_down();
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("addresses", &self.addresses()).field("session", &self.session()).finish()
    }
}

impl Client {
    /// Connect to a server, and open a session if there are credentials.
    ///
    /// Waits for a server that is starting. Any other error of the first attempt is not retried.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for contradictory options and outside of a runtime of tokio, [`Error::Certificate`] for unusable files, [`Error::Tls`] for a malformed pin
    /// or a server that is not trusted, [`Error::CannotConnect`], [`Error::Closed`], and [`Error::Call`] of `session.open`.
    pub async fn connect(options: ConnectOptions) -> Result<Self> {
        options.check()?;
        let credentials = options.own_credentials()?;
        let hub = Hub::new(&options)?;
        let opens_session = options.opens_session && credentials.is_some();
        let client = Self::new(&hub, credentials, options, true);
        hub.get().await?; // limited by the start and connect timeouts
        client.open(opens_session).await?;
        hub.opened();
        Ok(client)
    }

    fn new(hub: &Arc<Hub>, credentials: Option<Credentials>, options: ConnectOptions, is_owner: bool) -> Self {
        let user = User::new(Arc::clone(hub), credentials, &options);
        let handle = Arc::new(Handle { user: Arc::clone(&user), options, is_owner });
        Self { user, handle }
    }

    async fn open(&self, opens_session: bool) -> Result<()> {
        if opens_session {
            self.user.require_session()?;
        }
        let wait = async { self.user.ready(false).await.map(drop) };
        match self.user.timeout {
            None => wait.await,
            Some(limit) => tokio::time::timeout(limit, wait).await.unwrap_or_else(|_| Err(self.user.deadline_error())),
        }
    }

    /// Open a session of another user on the connection of this client. It has its own calls, streams, handlers and events, and
    /// is renewed independently.
    ///
    /// # Errors
    ///
    /// As [`open_session`](Self::open_session); [`Error::Config`] for a certificate, which belongs to the connection.
    pub async fn session_for(&self, credentials: Credentials) -> Result<Self> {
        if matches!(credentials, Credentials::Certificate { .. }) {
            return Err(Error::Config(
                "credentials: a certificate belongs to the connection; connect with it".to_owned(),
            ));
        }
        let client = Self::new(&self.user.hub, Some(credentials), self.handle.options.clone(), false);
        client.open(true).await?;
        Ok(client)
    }

    /// Open a session unless there is a valid one, for example after TOKEN_REVOKED, SESSION_REPLACED or UNAUTHENTICATED.
    ///
    /// # Errors
    ///
    /// UNAUTHENTICATED without credentials, otherwise as [`call`](Self::call).
    pub async fn open_session(&self) -> Result<SessionInfo> {
        self.open(true).await?;
        self.user.session().ok_or_else(|| Error::call(Code::Unauthenticated, "the session has ended already"))
    }

    /// Return the open session, if any.
    #[must_use]
    pub fn session(&self) -> Option<SessionInfo> {
        self.user.session()
    }

    /// Call a method of the server and return its result. `params` serialises as a map, or as nil for none: `&()`.
    ///
    /// Dropping the future cancels the call on the server.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] for an error of the server and for a timeout (DEADLINE_EXCEEDED); [`Error::Closed`] if the connection was
    /// lost and the call may have run; [`Error::CannotConnect`] or [`Error::Tls`] if connecting fails; [`Error::Type`] if the
    /// result has another type than `R`.
    pub async fn call<R: DeserializeOwned>(&self, method: &str, params: &(impl Serialize + ?Sized)) -> Result<R> {
        self.request(method).params(params).send().await
    }

    /// Begin a call with options.
    pub fn request<'a>(&'a self, method: &'a str) -> Request<'a> {
        let timeout = self.user.timeout;
        Request { user: &self.user, method, params: Ok(vec![0xc0]), meta: Meta::default(), timeout }
    }

    /// Begin a stream of items of a method.
    pub fn stream<'a>(&self, method: &'a str, params: &(impl Serialize + ?Sized)) -> StreamBuilder<'a> {
        StreamBuilder::new(Arc::clone(&self.user), method, encode(params))
    }

    /// Handle calls from the server to a method, in this session and on each later connection. The result of the handler is the
    /// answer. Its future is dropped if the server withdraws the call.
    ///
    /// ```no_run
    /// # async fn run(client: zcproto::Client) -> zcproto::Result<()> {
    /// client.handle("approve", |call: zcproto::Call| async move { Ok(call.raw_params.get("tool").is_some()) }).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// UNIMPLEMENTED if the server does not call clients, otherwise as [`call`](Self::call).
    pub async fn handle<F, R, T>(&self, method: &str, handler: F) -> Result<()>
    where
        F: Fn(Call) -> R + Send + Sync + 'static,
        R: Future<Output = Result<T, CallError>> + Send + 'static,
        T: Serialize,
    {
        self.user.handlers.add(method, handler);
        self.register().await
    }

    /// Handle a method no longer, and withdraw its registration. Calls that run go on.
    ///
    /// # Errors
    ///
    /// As [`handle`](Self::handle). The handler is removed in any case; the server's calls get UNIMPLEMENTED.
    pub async fn remove_handler(&self, method: &str) -> Result<()> {
        if self.user.handlers.remove(method) { self.register().await } else { Ok(()) }
    }

    async fn register(&self) -> Result<()> {
        let deadline = deadline_of(self.user.timeout);
        let attempts = Attempts { deadline, is_idempotent: true, is_registration: true, items: None };
        let registered =
            self.user.run(attempts, |connection, slot, token| self.user.register(connection, slot, token)).await;
        match registered {
            Ok(_) => self.user.register_on_others().await,
            Err(_) => self.user.forget_registrations(),
        }
        registered.map(drop)
    }

    /// Wait for the next event of the server. Return `None` after `close`.
    ///
    /// At most 1,000 events of together 4 MiB are queued; beyond that the oldest are dropped.
    pub async fn next_event(&self) -> Option<ServerEvent> {
        self.user.events.next().await
    }

    /// Return the number of events that were dropped because the application did not read them.
    #[must_use]
    pub fn dropped_events(&self) -> u64 {
        self.user.events.dropped()
    }

    /// Return the settings of the server on the current connection, if there is one.
    #[must_use]
    pub fn welcome(&self) -> Option<Welcome> {
        self.user.hub.current()?.welcome()
    }

    /// Return where the current connection is, if there is one.
    #[must_use]
    pub fn endpoint(&self) -> Option<Endpoint> {
        Some(self.user.hub.current()?.endpoint.clone())
    }

    /// Return the address of the server as `host:port`; the first one of several.
    #[must_use]
    pub fn address(&self) -> String {
        self.addresses().into_iter().next().unwrap_or_default()
    }

    /// Return the addresses of the servers as `host:port`, in the order given.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        self.user.hub.addresses()
    }

    /// Close the session, and the connection if it belongs to it. Calls that wait get [`Error::Closed`], and handlers are
    /// dropped. Idempotent.
    pub async fn close(&self) {
        if self.handle.is_owner {
            self.user.hub.close_others(&self.user).await;
        }
        self.user.close().await;
        if self.handle.is_owner {
            self.user.hub.close().await;
        }
    }

    /// Cut the connection like a network failure, for tests. The client reconnects.
    pub fn cut(&self) {
        self.user.hub.abort();
    }
}

/// A call with options, made by [`Client::request`].
#[must_use]
pub struct Request<'a> {
    user: &'a Arc<User>,
    method: &'a str,
    params: Result<Vec<u8>>,
    meta: Meta<'a>,
    timeout: Option<Duration>,
}

impl<'a> Request<'a> {
    /// The params: a map, or nil for none.
    pub fn params(mut self, params: &(impl Serialize + ?Sized)) -> Self {
        self.params = encode(params);
        self
    }

    /// How long the application waits, retries included; `None` for ever. That of the options by default.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// 1 to 64 characters. The server runs calls with the same key once, and the call is sent again if its connection was lost.
    pub fn idempotency_key(mut self, key: &'a str) -> Self {
        self.meta.idempotency_key = Some(key);
        self
    }

    /// The `traceparent` of W3C Trace Context.
    pub fn traceparent(mut self, traceparent: &'a str) -> Self {
        self.meta.traceparent = Some(traceparent);
        self
    }

    /// Make the call.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub async fn send<R: DeserializeOwned>(self) -> Result<R> {
        let Self { user, method, params, meta, timeout } = self;
        let body = user.call(method, &params?, meta, timeout).await?;
        codec::from_scanned(&body).map_err(Error::Type)
    }
}

fn encode(params: &(impl Serialize + ?Sized)) -> Result<Vec<u8>> {
    codec::to_vec(params).map_err(|fault| Error::call(Code::InvalidArgument, fault.phrase()))
}

/// Enrol a device under a name with a code of `zcproto pair`, and return the user of the device. From then on
/// [`ConnectOptions::device`] opens sessions of that user.
///
/// # Errors
///
/// UNAUTHENTICATED for an invalid code, ALREADY_EXISTS for a name in use (the code stays valid), and as [`Client::connect`].
pub async fn enroll(options: ConnectOptions, code: &str, device: &Device, name: &str) -> Result<String> {
    let client = Client::connect(options.without_session()).await?;
    let params = Value::Map(vec![
        ("code".to_owned(), code.into()),
        ("public_key".to_owned(), Value::Bin(device.public_key().to_vec())),
        ("name".to_owned(), name.into()),
    ]);
    let result: Result<Value> = client.call("device.enroll", &params).await;
    client.close().await;
    match result?.get("user").and_then(Value::as_str) {
        Some(user) => Ok(user.to_owned()),
        None => Err(ProtocolError::new("the server's answer to device.enroll is invalid").into()),
    }
}
