//! The requests that open and refresh a session, and the logins of the application.

use super::super::connection::Connection;
use super::super::options::{Credentials, login_fault};
use super::super::user::User;
use crate::codec::{self, Value};
use crate::error::{Code, Error, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use zeroize::Zeroizing;

/// How long a login that a function has returned can wait for a connection: it may be short-lived.
const LOGIN_HOLDS: Duration = Duration::from_secs(10);

impl User {
    /// Return whether a login must be fetched before the next request.
    pub(super) fn needs_login(&self, now: Instant) -> bool {
        let sessions = self.lock();
        let is_fetched = sessions.login.as_ref().is_some_and(|(_, until)| now < *until);
        matches!(self.credentials, Some(Credentials::Login(_))) && !sessions.has_refresh_token(now) && !is_fetched
    }

    /// Call the function that returns a login.
    pub(super) async fn fetch_login(&self) -> Result<()> {
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
    pub(super) fn next_request(
        &self,
        connection: &Connection,
        now: Instant,
    ) -> Result<(&'static str, Zeroizing<Vec<u8>>)> {
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
}
