//! How to reach a server, and how to open a session there.

use super::address::Endpoint;
use super::endpoints::AddressOrder;
use crate::codec::{self, Value};
use crate::error::{Error, Result};
use crate::secret::Secret;
use crate::trust::{Device, TlsOptions};
use rustls::RootCertStore;
use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// The most connections to a server.
const MAX_CONNECTIONS: usize = 64;

/// A function that receives warnings, such as that a pin has no backup.
pub(crate) type Warn = Arc<dyn Fn(&str) + Send + Sync>;
pub(crate) type OnConnected = Arc<dyn Fn(&Endpoint) + Send + Sync>;

type LoginError = Box<dyn std::error::Error + Send + Sync>;
type LoginFuture = Pin<Box<dyn Future<Output = Result<Value, LoginError>> + Send>>;
pub(crate) type LoginFunction = Arc<dyn Fn() -> LoginFuture + Send + Sync>;

/// What opens a session.
#[derive(Clone)]
#[non_exhaustive]
pub enum Credentials {
    /// The API key of a user.
    ApiKey {
        /// The user.
        user: String,
        /// The key.
        key: Secret,
    },
    /// An enrolled device.
    Device {
        /// The key of the device.
        device: Device,
        /// The name under which the device was enrolled.
        name: String,
    },
    /// The client certificate of the connection.
    Certificate {
        /// The user that the certificate must name, if given.
        user: Option<String>,
    },
    /// A scheme of the server's application. Make it with [`Credentials::login`].
    Login(Login),
}

/// A login by a scheme of the server's application. Make it with [`Credentials::login`].
#[derive(Clone)]
pub struct Login(pub(crate) LoginFunction);

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login(..)")
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ApiKey { user, .. } => f.debug_struct("ApiKey").field("user", user).finish_non_exhaustive(),
            Self::Device { device, name } => {
                f.debug_struct("Device").field("device", device).field("name", name).finish()
            }
            Self::Certificate { user } => f.debug_struct("Certificate").field("user", user).finish(),
            Self::Login(_) => f.write_str("Login(..)"),
        }
    }
}

impl Credentials {
    /// Make the credentials of a user with an API key.
    pub fn api_key(user: impl Into<String>, key: impl Into<Secret>) -> Self {
        Self::ApiKey { user: user.into(), key: key.into() }
    }

    /// Make the credentials of a device that was enrolled under a name.
    pub fn device(device: Device, name: impl Into<String>) -> Self {
        Self::Device { device, name: name.into() }
    }

    /// Make a login by a scheme of the server's application: a map with `scheme` and its fields. The function is called for
    /// each session that is opened, because a login may be valid once.
    pub fn login<F, R>(function: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = Result<Value, LoginError>> + Send + 'static,
    {
        Self::Login(Login(Arc::new(move || Box::pin(function()))))
    }

    /// Return whether they can open a session in place of one that belongs to another certificate.
    pub(crate) fn can_reopen(&self) -> bool {
        matches!(self, Self::Certificate { .. } | Self::Login(_))
    }
}

/// Return why a login cannot be sent, without its values, if it cannot.
pub(crate) fn login_fault(login: &Value) -> Option<String> {
    if !matches!(login, Value::Map(_)) {
        return Some("give a map with `scheme` and its fields".to_owned());
    }
    if login.get("scheme").and_then(Value::as_str).is_none() {
        return Some("`scheme` is missing; give the name of the server's scheme".to_owned());
    }
    if login.get("client").is_some() {
        return Some("`client` is the product and version of the client; give it to ConnectOptions".to_owned());
    }
    codec::encode(login).err().map(|fault| fault.phrase().to_owned())
}

/// How to reach and verify a server, and how to open a session there.
///
/// ```no_run
/// # async fn run() -> zcproto::Result<()> {
/// use zcproto::{Client, ConnectOptions};
/// let options = ConnectOptions::new("host:7443").api_key("ada", "the key").ca_file("ca.crt");
/// let client = Client::connect(options).await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
#[must_use]
pub struct ConnectOptions {
    pub(crate) address: String,
    pub(crate) address_order: AddressOrder,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) tls: TlsOptions,
    pub(crate) server_hostname: Option<String>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) connect_timeout: Duration,
    pub(crate) start_timeout: Duration,
    pub(crate) home: Option<PathBuf>,
    pub(crate) opens_session: bool,
    pub(crate) client: String,
    pub(crate) max_calls: u32,
    pub(crate) max_connections: usize,
    pub(crate) max_frame: u32,
    pub(crate) warn: Warn,
    pub(crate) on_connected: Option<OnConnected>,
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("address", &self.address)
            .field("credentials", &self.credentials)
            .field("tls", &self.tls)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl ConnectOptions {
    /// Begin with the address of a server: `host`, `host:port` or `[::1]:port`; the port is 7443 by default. Several servers that
    /// share their sessions are separated by commas, at most 32. The client uses one of them, stays there, and goes to another one
    /// at once when that fails or goes away. Each proves the name of its own address.
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            address_order: AddressOrder::default(),
            credentials: None,
            tls: TlsOptions {
                ca_file: None,
                ca_pem: None,
                roots: None,
                system_store: false,
                pins: Vec::new(),
                verify: true,
                certificate: None,
                key_file: None,
                key_log: None,
            },
            server_hostname: None,
            timeout: Some(Duration::from_secs(30)),
            connect_timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(10),
            home: None,
            opens_session: true,
            client: concat!("zcproto-rust/", env!("CARGO_PKG_VERSION")).to_owned(),
            max_calls: 16,
            max_connections: 1,
            max_frame: 1_048_576,
            warn: Arc::new(|_| {}),
            on_connected: None,
        }
    }

    /// Open the session by these credentials. Without any, only public methods work, or a client certificate is used.
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// Open the session by the API key of a user.
    pub fn api_key(self, user: impl Into<String>, key: impl Into<Secret>) -> Self {
        self.credentials(Credentials::api_key(user, key))
    }

    /// Open the session by a device that was enrolled under a name.
    pub fn device(self, device: Device, name: impl Into<String>) -> Self {
        self.credentials(Credentials::device(device, name))
    }

    /// Trust the CAs of a PEM file. Without any CAs and pins, those of the system are trusted.
    pub fn ca_file(mut self, path: impl AsRef<Path>) -> Self {
        self.tls.ca_file = Some(path.as_ref().to_owned());
        self
    }

    /// Trust the CAs in a text in PEM.
    pub fn ca_pem(mut self, pem: impl AsRef<[u8]>) -> Self {
        self.tls.ca_pem = Some(pem.as_ref().into());
        self
    }

    /// Trust these CAs, for example those of `rustls-native-certs` or `webpki-roots`.
    pub fn roots(mut self, roots: impl Into<Arc<RootCertStore>>) -> Self {
        self.tls.roots = Some(roots.into());
        self
    }

    /// Trust the CAs of the system in addition to pins. Without any CAs and pins that is the default.
    pub fn system_store(mut self) -> Self {
        self.tls.system_store = true;
        self
    }

    /// Accept only servers with one of these pins: `sha256/BASE64` of the public key, also of future ones, or
    /// `cert-sha256/BASE64` of the certificate. With CAs both must match; without them a pin replaces the CA, and validity
    /// period and name are still verified.
    pub fn pins(mut self, pins: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.tls.pins = pins.into_iter().map(Into::into).collect();
        self
    }

    /// False trusts any server. Refused for hosts with an `sts` policy.
    pub fn verify(mut self, verify: bool) -> Self {
        self.tls.verify = verify;
        self
    }

    /// The name to verify in the server's certificate, instead of the host.
    pub fn server_hostname(mut self, name: impl Into<String>) -> Self {
        self.server_hostname = Some(name.into());
        self
    }

    /// Show a client certificate: a PEM file with its issuers, read for each connection. It opens the session if there are no
    /// other credentials.
    pub fn certificate(mut self, path: impl AsRef<Path>) -> Self {
        self.tls.certificate = Some(path.as_ref().to_owned());
        self
    }

    /// The key file of the certificate, which only its owner can read. By default the key is in the certificate's file.
    pub fn key_file(mut self, path: impl AsRef<Path>) -> Self {
        self.tls.key_file = Some(path.as_ref().to_owned());
        self
    }

    /// Append the secrets of TLS to a file, with which captured connections can be decrypted. For debugging alone; the
    /// environment variable SSLKEYLOGFILE is ignored.
    pub fn key_log(mut self, path: impl AsRef<Path>) -> Self {
        self.tls.key_log = Some(path.as_ref().to_owned());
        self
    }

    /// Default timeout of calls, retries included; `None` for none. 30 seconds by default.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// In which order several addresses, and those of a name, are tried. Random by default.
    pub fn address_order(mut self, order: AddressOrder) -> Self {
        self.address_order = order;
        self
    }

    /// Timeout of one attempt to connect to one IP address, from TCP to WELCOME, and of the resolution of names. 10 seconds by
    /// default.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long to wait for a server that is starting: while nothing listens at its address, or the server is going away, the
    /// first attempt is repeated, and a missing CA file may still be created. 10 seconds by default; zero fails at once.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// The folder of the file of hosts with an `sts` policy. `ZCPROTO_HOME` or `~/.zeroclaw` by default.
    pub fn home(mut self, path: impl AsRef<Path>) -> Self {
        self.home = Some(path.as_ref().to_owned());
        self
    }

    /// Open no session on connect; call `open_session` later.
    pub fn without_session(mut self) -> Self {
        self.opens_session = false;
        self
    }

    /// The application as `product/version`, listed by the server.
    pub fn client(mut self, name: impl Into<String>) -> Self {
        self.client = name.into();
        self
    }

    /// How many calls from the server are handled at once in a session. 16 by default.
    pub fn max_calls(mut self, max: u32) -> Self {
        self.max_calls = max;
        self
    }

    /// How many connections are made to a server at once: 1 by default, at most 64. With more, a further one is made while calls
    /// wait because the server's `max_streams` are in flight on all others, and is closed after 30 seconds without a call.
    pub fn max_connections(mut self, max: usize) -> Self {
        self.max_connections = max;
        self
    }

    /// The largest frame accepted from the server, in bytes. 1 MiB by default.
    pub fn max_frame(mut self, bytes: u32) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Receive warnings: a pin without a backup, a server that does not listen yet, an `sts` policy that cannot be stored.
    pub fn on_warning(mut self, warn: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.warn = Arc::new(warn);
        self
    }

    /// Call a function once the client has connected and opened its session, and again after each reconnect when all sessions
    /// are known to the server: a good place to open long streams again. It runs in a task of its own, and must not block.
    pub fn on_connected(mut self, function: impl Fn(&Endpoint) + Send + Sync + 'static) -> Self {
        self.on_connected = Some(Arc::new(function));
        self
    }

    /// Return the credentials that open the client's own session.
    pub(crate) fn own_credentials(&self) -> Result<Option<Credentials>> {
        let has_certificate = self.tls.certificate.is_some();
        match &self.credentials {
            Some(Credentials::Certificate { .. }) if !has_certificate => {
                Err(Error::Config("credentials: certificate is missing; give its file".to_owned()))
            }
            Some(credentials) => Ok(Some(credentials.clone())),
            None if has_certificate => Ok(Some(Credentials::Certificate { user: None })),
            None => Ok(None),
        }
    }

    /// Check the numbers.
    pub(crate) fn check(&self) -> Result<()> {
        let zeros = [
            ("timeout", self.timeout.is_some_and(|timeout| timeout.is_zero())),
            ("connect_timeout", self.connect_timeout.is_zero()),
            ("max_calls", self.max_calls == 0),
            ("max_frame", self.max_frame == 0),
        ];
        if let Some((name, _)) = zeros.iter().find(|(_, is_zero)| *is_zero) {
            return Err(Error::Config(format!("{name}: must be above 0")));
        }
        if !(1..=MAX_CONNECTIONS).contains(&self.max_connections) {
            return Err(Error::Config(format!(
                "max_connections: {} is out of range; give from 1 to {MAX_CONNECTIONS}",
                self.max_connections
            )));
        }
        Ok(())
    }
}
