//! Another server in place of one that hangs (zcp1.md, section 11.2).
//!
//! Decides: when a client whose current connection is silent connects to another address beside it, and when it moves there: once
//! the session was shown on the new connection, while the old one is still silent. A byte on the old one ends the attempt.
//! Rules: one attempt at a time, to one endpoint that does not rest. A client without another address stays: its server may only
//! be busy, and must not get the handshakes of all clients.

use super::super::connection::Connection;
use super::super::dial::Attempted;
use super::super::endpoints::{Place, Step};
use super::Hub;
use crate::error::{Error, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// Why a connection ends whose server hangs.
pub(super) const SILENT: &str = "the server did not respond; another one is used";
/// The pause after all other endpoints have failed or rest.
const PAUSE: Duration = Duration::from_secs(1);

impl Hub {
    /// Look for another server in place of that of a silent connection.
    pub(super) fn silent(&self, connection: &Arc<Connection>) {
        let mut state = self.lock();
        match &state.current {
            Some(current) if current.id != connection.id => {
                let current = Arc::clone(current);
                drop(state);
                let is_elsewhere = current.endpoint != connection.endpoint && !current.is_silent();
                if is_elsewhere || current.has_answered_since(connection) {
                    connection.give_up(SILENT);
                } else {
                    current.call_timed_out(); // does it hang, too?
                }
            }
            Some(_) if state.beside.is_none() && !state.is_closed => {
                let (hub, old) = (self.arc(), Arc::clone(connection));
                let looking = tokio::spawn(async move {
                    tokio::select! {
                        () = old.heard() => {}
                        () = hub.move_from(&old) => {}
                    }
                    hub.lock().beside = None;
                });
                state.beside = Some(looking.abort_handle());
            }
            _ => {}
        }
    }

    /// Connect to other endpoints until one is in use.
    async fn move_from(self: &Arc<Self>, old: &Arc<Connection>) {
        loop {
            let mut round = self.lock().endpoints.round();
            round.exclude(&old.endpoint);
            for address in round.addresses().cloned().collect::<Vec<_>>() {
                let found = self.dialer.resolve(&address).await.unwrap_or_default();
                round.resolved(&mut self.lock().endpoints, &address, found, Instant::now());
            }
            loop {
                let step = round.next(&self.lock().endpoints, Instant::now());
                match step {
                    Step::Start(endpoint) => {
                        let attempted = self.dialer.dial(&endpoint, self.arc(), || {}).await;
                        let place = Place::Endpoint(endpoint.clone());
                        match self.replace(old, attempted).await {
                            Ok(None) => return,
                            Ok(retry_after) => drop(self.failed(place, going_away(), retry_after)),
                            Err(error) => drop(self.failed(place, error, None)),
                        }
                        round.failed(&endpoint);
                    }
                    Step::Wait(Some(until)) => sleep_until(until).await,
                    Step::Wait(None) | Step::Over => break,
                }
            }
            sleep(PAUSE).await;
        }
    }

    /// Show the session on a new connection, and use it in place of a silent one. If its server is going away, return for how
    /// long.
    async fn replace(&self, old: &Arc<Connection>, attempted: Result<Attempted>) -> Result<Option<Duration>> {
        let attempted = attempted?;
        let connection = Arc::clone(attempted.connection());
        for user in self.users() {
            if user.prove(&connection).await? {
                break;
            }
        }
        let is_wanted = {
            let mut state = self.lock();
            let is_current = state.current.as_ref().is_some_and(|current| current.id == old.id);
            if is_current && old.is_silent() {
                state.endpoints.failed(&Place::Endpoint(old.endpoint.clone()), Duration::ZERO, None, Instant::now());
            }
            is_current && old.is_silent()
        };
        if !is_wanted {
            return Ok(None);
        }
        self.adopt(attempted)
    }
}

fn going_away() -> Error {
    Error::CannotConnect { reason: "the server is going away; try again later".to_owned(), refused: false }
}
