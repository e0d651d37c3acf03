//! How a client gets a connection: rounds of attempts at its servers, until one of them sends WELCOME.

use super::super::address::{Address, Endpoint};
use super::super::attempt::Attempt;
use super::super::connection::Connection;
use super::super::dial::Attempted;
use super::super::endpoints::{Place, Step};
use super::beside::SILENT;
use super::{Hub, STABLE_AFTER, State};
use crate::error::{Closed, Error, Result};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

/// The longest delay between two attempts to connect to a server that is starting.
const MAX_START_DELAY: Duration = Duration::from_secs(1);
/// The pause after a round without an attempt.
const MIN_ROUND: Duration = Duration::from_millis(50);

/// What has happened in a round.
enum Progress {
    Resolved(Address, Result<Vec<IpAddr>>),
    Connected(Endpoint), // TCP
    Ended(Endpoint, Result<Attempted>),
}

/// A failure in a round.
pub(super) struct Failure {
    place: Place,
    error: Error,
    /// Whether another attempt may succeed soon: nothing listens there yet, or the server is being replaced.
    may_be_starting: bool,
}

impl Failure {
    fn is_permanent(&self) -> bool {
        matches!(&self.error, Error::Tls(error) if !error.failure.is_transient())
    }

    /// Return how much the error says: permanent ones, others, refusals.
    fn rank(&self) -> u8 {
        match &self.error {
            _ if self.is_permanent() => 0,
            Error::CannotConnect { refused: true, .. } => 2,
            _ => 1,
        }
    }
}

impl Hub {
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

    /// Return the attempt to connect that runs, or start one.
    pub(super) fn connecting(&self, state: &mut State) -> Attempt {
        state.connecting.get_or_insert_with(|| Attempt::start(self.arc().connect())).clone()
    }

    async fn connect(self: Arc<Self>) -> Result<()> {
        let result = self.repeat_rounds().await;
        self.lock().connecting = None;
        result
    }

    async fn repeat_rounds(self: &Arc<Self>) -> Result<()> {
        let starts_until = Instant::now() + self.start_timeout;
        let mut is_starting = false;
        loop {
            let due_at = self.lock().endpoints.due_at();
            if let Some(time) = due_at {
                sleep_until(time).await;
            }
            let Some(failures) = self.round().await? else {
                return Ok(());
            };
            let Some(worst) = failures.iter().min_by_key(|failure| failure.rank()) else {
                sleep(MIN_ROUND).await; // nothing was due any more, once all names were resolved
                continue;
            };
            let error = self.explained(worst.error.clone());
            let mut state = self.lock();
            if state.is_closed {
                return Err(error);
            }
            state.last_error = Some(error.clone());
            if state.has_connected {
                if state.endpoints.are_all_permanent() {
                    state.endpoints.end_rests(); // the next call tries again
                    return Err(error);
                }
                continue;
            }
            let may_be_starting = failures.iter().any(|failure| failure.may_be_starting);
            let begins_at = state.endpoints.due_at().unwrap_or_else(Instant::now);
            if !may_be_starting || failures.iter().any(Failure::is_permanent) || begins_at >= starts_until {
                return Err(error);
            }
            drop(state);
            let is_refused = |failure: &Failure| matches!(failure.error, Error::CannotConnect { refused: true, .. });
            if !is_starting && failures.iter().any(is_refused) {
                is_starting = true;
                (self.warn)(&format!(
                    "{}: nothing listens there yet; waiting up to {} s for the server to start",
                    self.addresses().join(","),
                    self.start_timeout.as_secs_f64()
                ));
            }
        }
    }

    /// Say so if none of several servers can be reached.
    fn explained(&self, mut error: Error) -> Error {
        let count = self.addresses().len();
        if count > 1 {
            let text = match &mut error {
                Error::CannotConnect { reason, .. } => reason,
                Error::Closed(closed) => &mut closed.reason,
                Error::Tls(error) => &mut error.detail,
                _ => return error,
            };
            text.insert_str(0, &format!("none of {count} addresses can be reached: "));
        }
        error
    }

    /// Try the servers until one is in use. Return `None` then, else the failures in order. An error is one of this side, such as
    /// an unusable file.
    async fn round(self: &Arc<Self>) -> Result<Option<Vec<Failure>>> {
        let mut round = self.lock().endpoints.round();
        let (sender, mut progress) = mpsc::unbounded_channel();
        let mut work = JoinSet::new(); // ends with the round
        let mut failures = Vec::new();
        for address in round.addresses().cloned().collect::<Vec<_>>() {
            let (hub, sender) = (Arc::clone(self), sender.clone());
            work.spawn(async move {
                let ips = hub.dialer.resolve(&address).await;
                let _ = sender.send(Progress::Resolved(address, ips)); // or the round is over
            });
        }
        loop {
            let step = round.next(&self.lock().endpoints, Instant::now());
            let event = match step {
                Step::Over => break,
                Step::Start(endpoint) => {
                    let (hub, sender) = (Arc::clone(self), sender.clone());
                    work.spawn(async move {
                        let connected = || drop(sender.send(Progress::Connected(endpoint.clone())));
                        let listener = hub.arc();
                        let ended = hub.dialer.dial(&endpoint, listener, connected).await;
                        let _ = sender.send(Progress::Ended(endpoint, ended));
                    });
                    continue;
                }
                Step::Wait(None) => progress.recv().await,
                Step::Wait(Some(until)) => timeout_at(until, progress.recv()).await.unwrap_or(None),
            };
            match event {
                None => {}
                Some(Progress::Connected(endpoint)) => round.connected(&endpoint, Instant::now()),
                Some(Progress::Resolved(address, ips)) => {
                    let found = ips.as_ref().map_or_else(|_| Vec::new(), Clone::clone);
                    round.resolved(&mut self.lock().endpoints, &address, found, Instant::now());
                    if let Err(error) = ips {
                        failures.push(self.failed(Place::Name(address), error, None));
                    }
                }
                Some(Progress::Ended(endpoint, ended)) => {
                    let place = Place::Endpoint(endpoint.clone());
                    match ended.and_then(|attempted| self.adopt(attempted)) {
                        Ok(None) => return Ok(None),
                        Ok(Some(retry_after)) => {
                            let reason = format!("{endpoint}: the server is going away; try again later");
                            let error = Error::CannotConnect { reason, refused: false };
                            failures.push(self.failed(place, error, Some(retry_after)));
                        }
                        Err(error @ (Error::Closed(_) | Error::CannotConnect { .. } | Error::Tls(_))) => {
                            failures.push(self.failed(place, error, None));
                        }
                        Err(error) => return Err(error),
                    }
                    round.failed(&endpoint);
                }
            }
        }
        failures.sort_by_key(|failure| round.position(&failure.place));
        Ok(Some(failures))
    }

    /// Let a place rest after a failure.
    pub(super) fn failed(&self, place: Place, error: Error, retry_after: Option<Duration>) -> Failure {
        let is_refused = matches!(error, Error::CannotConnect { refused: true, .. });
        let failure = Failure { place, error, may_be_starting: is_refused || retry_after.is_some() };
        let mut state = self.lock();
        let limit = (!state.has_connected).then_some(MAX_START_DELAY);
        state.endpoints.failed(&failure.place, retry_after.unwrap_or_default(), limit, Instant::now());
        state.endpoints.set_permanent(&failure.place, failure.is_permanent());
        failure
    }

    /// Use a new connection for calls, and show all sessions on it. If its server is going away, return for how long.
    pub(super) fn adopt(&self, attempted: Attempted) -> Result<Option<Duration>> {
        let connection = attempted.keep();
        if let Some(retry_after) = connection.retry_after() {
            return Ok(Some(retry_after)); // GOAWAY in the same read as WELCOME
        }
        if let Some(error) = connection.error() {
            return Err(error.into());
        }
        // Before calls are sent there: their methods may call back.
        let users = self.users().into_iter().filter(|user| user.can_present());
        let showing: Vec<_> = users.map(|user| user.introduce(&connection)).collect();
        let replaced = {
            let mut state = self.lock();
            if state.is_closed {
                connection.abort();
                return Err(Closed::clean("this client is closed").into());
            }
            state.endpoints.used(&connection.endpoint);
            if !std::mem::replace(&mut state.has_connected, true) {
                state.endpoints.reset(&connection.endpoint);
            }
            if state.endpoints.are_several() {
                connection.watch();
            }
            state.stable_at = Some(Instant::now() + STABLE_AFTER);
            let silent = state.current.replace(Arc::clone(&connection));
            let extra: Vec<_> = state.extra.all().cloned().collect();
            state.others.extend(silent.clone());
            silent.map_or_else(Vec::new, |silent| {
                let mut lost = extra;
                lost.retain(|each| !each.has_answered_since(&silent));
                lost.push(silent);
                lost
            })
        };
        for silent in replaced {
            silent.give_up(SILENT);
        }
        if connection.error().is_some() {
            self.lost(&connection); // it has ended meanwhile
        }
        let hub = self.arc();
        tokio::spawn(async move {
            for shown in showing {
                let _ = shown.wait().await; // which does not fail
            }
            hub.report(&connection);
        });
        Ok(None)
    }
}
