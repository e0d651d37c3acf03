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
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

/// Makes connections to one server.
pub(crate) struct Dialer {
    pub(crate) address: Address,
    name: ServerName<'static>,
    server_hostname: String,
    trust: Arc<Trust>,
    known_hosts: Option<KnownHosts>,
    connect_timeout: Duration,
    settings: Settings,
    warn: Warn,
}

impl Dialer {
    pub(crate) fn new(options: &ConnectOptions) -> Result<Self> {
        let address = Address::parse(&options.address)?;
        let server_hostname = match &options.server_hostname {
            Some(name) => Address::parse(name)?.host,
            None => address.host.clone(),
        };
        let name = ServerName::try_from(server_hostname.clone())
            .map_err(|_| Error::Config(format!("\"{server_hostname}\": not a name that a certificate can have")))?;
        let home = options.home.clone().or_else(default_home);
        Ok(Self {
            address,
            name,
            server_hostname,
            trust: Arc::new(Trust::new(options.tls.clone(), Arc::clone(&options.warn))?),
            known_hosts: home.map(|home| KnownHosts::new(&home)),
            connect_timeout: options.connect_timeout,
            settings: Settings { max_frame: options.max_frame, ..Settings::default() },
            warn: Arc::clone(&options.warn),
        })
    }

    /// Connect and wait for WELCOME.
    pub(crate) async fn dial(&self, listener: Arc<dyn Listener>) -> Result<Arc<Connection>> {
        if !self.trust.verifies() {
            if let Some(known_hosts) = self.known_hosts.clone() {
                let hosts = [self.address.host.clone(), self.server_hostname.clone()];
                blocking(move || hosts.iter().try_for_each(|host| known_hosts.require(host, wall()))).await?;
            }
        }
        let config = match self.config().await {
            Err(_) if self.trust.missing_ca().is_some() => {
                // A server that is starting writes its CA before it listens.
                self.in_time(self.reach()).await?;
                self.config().await?
            }
            config => config?,
        };
        let connection = self.in_time(self.establish(config, listener)).await.map_err(|error| self.explained(error))?;
        if self.trust.verifies() {
            self.remember(&connection).await;
        }
        Ok(connection)
    }

    async fn config(&self) -> Result<Arc<rustls::ClientConfig>> {
        let trust = Arc::clone(&self.trust);
        blocking(move || trust.config()).await
    }

    /// Limit a part of an attempt by the connect timeout.
    async fn in_time<T>(&self, part: impl Future<Output = Result<T>>) -> Result<T> {
        timeout(self.connect_timeout, part).await.unwrap_or_else(|_| {
            let seconds = self.connect_timeout.as_secs_f64();
            Err(Error::CannotConnect {
                reason: format!("{}: no response within {seconds} s; check the address and the firewall", self.address),
                refused: false,
            })
        })
    }

    async fn reach(&self) -> Result<(TcpStream, Endpoint)> {
        let Address { host, port } = &self.address;
        let addresses = lookup_host((host.as_str(), *port)).await.map_err(|_| Error::CannotConnect {
            reason: format!("{}: the host name cannot be resolved; check the name and DNS", self.address),
            refused: false,
        })?;
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(tcp) => return Ok((tcp, Endpoint::new(&self.address, address.ip()))),
                Err(error) => last = error,
            }
        }
        let refused = last.kind() == io::ErrorKind::ConnectionRefused;
        let missing = match self.trust.missing_ca() {
            Some(path) if refused => format!(", and {} does not exist", text::path(path)),
            _ => String::new(),
        };
        let cure = if refused {
            "start the server, or check the host and the port"
        } else {
            "check the address and the network"
        };
        Err(Error::CannotConnect { reason: format!("{}: {}{missing}; {cure}", self.address, last.kind()), refused })
    }

    async fn establish(
        &self,
        config: Arc<rustls::ClientConfig>,
        listener: Arc<dyn Listener>,
    ) -> Result<Arc<Connection>> {
        let (tcp, endpoint) = self.reach().await?;
        let _ = tcp.set_nodelay(true);
        let tls = ClientConnection::new(config, self.name.clone())
            .map_err(|error| Error::Certificate(format!("cannot configure TLS: {error}")))?;
        let mut transport = Transport::new(tcp, tls);
        let leaf = transport.handshake().await?;
        let connection = Connection::start(transport, endpoint, leaf, self.settings, listener);
        let attempt = AbortOnDrop { connection: Arc::clone(&connection), is_kept: false };
        connection.welcomed().await?;
        attempt.keep();
        Ok(connection)
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
    async fn remember(&self, connection: &Connection) {
        let (Some(known_hosts), Some(welcome)) = (self.known_hosts.clone(), connection.welcome()) else {
            return;
        };
        let host = self.server_hostname.clone();
        if let Err(error) = blocking(move || known_hosts.learn(&host, welcome.sts, wall())).await {
            (self.warn)(&format!("the sts policy of {} was not stored: {error}", self.server_hostname));
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

/// Cuts a connection whose attempt is given up.
struct AbortOnDrop {
    connection: Arc<Connection>,
    is_kept: bool,
}

impl AbortOnDrop {
    fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if !self.is_kept {
            self.connection.abort();
        }
    }
}
