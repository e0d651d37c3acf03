//! Makes one connection: TCP, TLS, WELCOME, and the `sts` policy of the host.

use super::address::{Address, Endpoint};
use super::connection::{Connection, Listener, wall};
use super::options::{ConnectOptions, Warn};
use super::transport::Transport;
use crate::core::Settings;
use crate::error::{Closed, Error, Result};
use crate::text;
use crate::trust::Trust;
use crate::trust::known_hosts::KnownHosts;
use rustls::ClientConnection;
use rustls::pki_types::ServerName;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tracing::{Instrument, debug_span};

/// Makes connections to the servers of a client.
pub(crate) struct Dialer {
    servers: Vec<Server>,
    trust: Arc<Trust>,
    known_hosts: Option<KnownHosts>,
    connect_timeout: Duration,
    settings: Settings,
    warn: Warn,
}

/// A server: its address, and the name in its certificate.
struct Server {
    address: Address,
    name: ServerName<'static>,
    hostname: String,
}

impl Server {
    fn new(address: Address, hostname: Option<&str>) -> Result<Self> {
        let hostname = match hostname {
            Some(name) => Address::parse(name)?.host,
            None => address.host.clone(),
        };
        let name = ServerName::try_from(hostname.clone())
            .map_err(|_| Error::Config(format!("\"{hostname}\": not a name that a certificate can have")))?;
        Ok(Self { address, name, hostname })
    }
}

impl Dialer {
    pub(crate) fn new(addresses: &[Address], options: &ConnectOptions) -> Result<Self> {
        let hostname = options.server_hostname.as_deref();
        let servers = addresses.iter().map(|address| Server::new(address.clone(), hostname)).collect::<Result<_>>()?;
        let home = options.home.clone().or_else(default_home);
        Ok(Self {
            servers,
            trust: Arc::new(Trust::new(options.tls.clone(), Arc::clone(&options.warn))?),
            known_hosts: home.map(|home| KnownHosts::new(&home)),
            connect_timeout: options.connect_timeout,
            settings: Settings { max_frame: options.max_frame, ..Settings::default() },
            warn: Arc::clone(&options.warn),
        })
    }

    /// Return the IP addresses of an address.
    pub(crate) async fn resolve(&self, address: &Address) -> Result<Vec<IpAddr>> {
        if let Ok(ip) = address.host.parse() {
            return Ok(vec![ip]);
        }
        let unresolved = Err(Error::CannotConnect {
            reason: format!("{address}: the host name cannot be resolved; check the name and DNS"),
            refused: false,
        });
        let ips = self.in_time(address, async { Ok(lookup_host((address.host.as_str(), address.port)).await) }).await?;
        match ips {
            Ok(found) => {
                let ips: Vec<_> = found.map(|found| found.ip()).collect();
                if ips.is_empty() { unresolved } else { Ok(ips) }
            }
            Err(_) => unresolved,
        }
    }

    /// Connect to an endpoint and wait for WELCOME. `connected` is called once TCP is.
    pub(crate) async fn dial(
        &self,
        endpoint: &Endpoint,
        listener: Arc<dyn Listener>,
        connected: impl FnOnce(),
    ) -> Result<Attempted> {
        let dialing = async {
            let server = self.servers.iter().find(|server| endpoint.is_of(&server.address));
            let server = server.ok_or_else(|| Error::Config(format!("{endpoint}: not an address of this client")))?;
            if !self.trust.verifies() {
                if let Some(known_hosts) = self.known_hosts.clone() {
                    let hosts = [server.address.host.clone(), server.hostname.clone()];
                    blocking(move || hosts.iter().try_for_each(|host| known_hosts.require(host, wall()))).await?;
                }
            }
            let config = match self.config().await {
                Err(_) if self.trust.missing_ca().is_some() => {
                    // A server that is starting writes its CA before it listens.
                    self.in_time(&server.address, self.reach(endpoint)).await?;
                    self.config().await?
                }
                config => config?,
            };
            let establishing = self.establish(server, endpoint, config, listener, connected);
            let attempted = self.in_time(&server.address, establishing).await.map_err(|error| self.explained(error))?;
            if self.trust.verifies() {
                self.remember(server, &attempted.connection).await;
            }
            Ok(attempted)
        };
        dialing.instrument(debug_span!("connect", %endpoint)).await
    }

    async fn config(&self) -> Result<Arc<rustls::ClientConfig>> {
        let trust = Arc::clone(&self.trust);
        blocking(move || trust.config()).await
    }

    /// Limit a part of an attempt by the connect timeout.
    async fn in_time<T>(&self, address: &Address, part: impl Future<Output = Result<T>>) -> Result<T> {
        timeout(self.connect_timeout, part).await.unwrap_or_else(|_| {
            let seconds = self.connect_timeout.as_secs_f64();
            Err(Error::CannotConnect {
                reason: format!("{address}: no response within {seconds} s; check the address and the firewall"),
                refused: false,
            })
        })
    }

    async fn reach(&self, endpoint: &Endpoint) -> Result<TcpStream> {
        let error = match TcpStream::connect((endpoint.ip, endpoint.port)).await {
            Ok(tcp) => return Ok(tcp),
            Err(error) => error.kind(),
        };
        let refused = error == ErrorKind::ConnectionRefused;
        let missing = match self.trust.missing_ca() {
            Some(path) if refused => format!(", and {} does not exist", text::path(path)),
            _ => String::new(),
        };
        let cure = if refused {
            "start the server, or check the host and the port"
        } else {
            "check the address and the network"
        };
        Err(Error::CannotConnect { reason: format!("{endpoint}: {error}{missing}; {cure}"), refused })
    }

    async fn establish(
        &self,
        server: &Server,
        endpoint: &Endpoint,
        config: Arc<rustls::ClientConfig>,
        listener: Arc<dyn Listener>,
        connected: impl FnOnce(),
    ) -> Result<Attempted> {
        let tcp = self.reach(endpoint).await?;
        connected();
        let _ = tcp.set_nodelay(true);
        let tls = ClientConnection::new(config, server.name.clone())
            .map_err(|error| Error::Certificate(format!("cannot configure TLS: {error}")))?;
        let mut transport = Transport::new(tcp, tls);
        let leaf = transport.handshake().await?;
        let connection = Connection::start(transport, endpoint.clone(), leaf, self.settings, listener);
        let attempted = Attempted { connection, is_kept: false };
        attempted.connection.welcomed().await?;
        Ok(attempted)
    }

    /// Explain an error after the handshake: in TLS 1.3 a server refuses a client certificate only then, by an alert or by a
    /// plain close.
    fn explained(&self, error: Error) -> Error {
        match error {
            Error::Closed(Closed { tls: Some(tls), .. }) if !tls.failure.is_transient() => tls.into(),
            Error::Closed(closed) if closed.clean && self.trust.has_certificate() => Closed::clean(format!(
                "{} before its WELCOME; it may have refused this client's certificate",
                closed.reason
            ))
            .into(),
            error => error,
        }
    }

    /// Store the server's policy. Failing to write the file only causes a warning.
    async fn remember(&self, server: &Server, connection: &Connection) {
        let (Some(known_hosts), Some(welcome)) = (self.known_hosts.clone(), connection.welcome()) else {
            return;
        };
        let host = server.hostname.clone();
        if let Err(error) = blocking(move || known_hosts.learn(&host, welcome.sts, wall())).await {
            (self.warn)(&format!("the sts policy of {} was not stored: {error}", server.hostname));
        }
    }
}

fn default_home() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("ZCPROTO_HOME").or_else(|| set("HOME").or_else(|| set("USERPROFILE")).map(|home| home.join(".zeroclaw")))
}

/// Run a function that reads or writes files.
async fn blocking<T: Send + 'static>(function: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(function).await {
        Ok(result) => result,
        Err(_) => Err(Closed::broken("the runtime is shutting down").into()),
    }
}

/// A connection that is cut unless it is kept: another attempt may have been faster.
pub(crate) struct Attempted {
    connection: Arc<Connection>,
    is_kept: bool,
}

impl Attempted {
    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    pub(crate) fn keep(mut self) -> Arc<Connection> {
        self.is_kept = true;
        Arc::clone(&self.connection)
    }
}

impl Drop for Attempted {
    fn drop(&mut self) {
        if !self.is_kept {
            self.connection.abort();
        }
    }
}
