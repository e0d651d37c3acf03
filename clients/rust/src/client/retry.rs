//! What a client does after an error: the table of zcp1.md, section 11.1. This module only decides.

use super::backoff;
use crate::codec::Value;
use crate::error::{CallError, Code, Error};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// To the application; no retry.
    Report,
    /// Retry after `retry_after_ms` with jitter, until the deadline.
    Later,
    /// Retry at once, one time.
    AtOnce,
    /// Refresh or open the session, then retry one time.
    Renew,
    /// Open a new session, then retry one time.
    Reopen,
    /// The server has lost the session: open a new one after a delay, then retry one time.
    Replace,
    /// Attach the session to this connection, then retry one time.
    Attach,
}

/// Return what a client does after an error of a call.
pub(crate) fn action(error: &CallError) -> Action {
    let is_true = |key: &str| error.details.get(key) == Some(&Value::Bool(true));
    match error.code {
        Code::ResourceExhausted if error.details.get("limit").is_some() => Action::Report, // waiting does not help
        Code::Unavailable | Code::ResourceExhausted => Action::Later,
        Code::StaleTimestamp => Action::AtOnce,
        Code::TokenExpired => Action::Renew,
        Code::Unauthenticated if is_true("attach") => Action::Attach,
        Code::Unauthenticated if is_true("certificate") => Action::Reopen, // the session of a previous certificate
        Code::Unauthenticated if error.details.get("reason").and_then(Value::as_str) == Some("unknown_token") => {
            Action::Replace
        }
        _ => Action::Report,
    }
}

/// Which token a request had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Present,
    /// Of an earlier session, or before a refresh.
    Earlier,
    None,
}

/// Why a request has failed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome<'a> {
    Error(&'a CallError),
    Lost,
    /// In order and after GOAWAY: it did not run.
    Ended,
}

/// What the next step after a failure depends on, apart from the call's earlier steps.
#[allow(clippy::struct_excessive_bools, reason = "independent facts, not a state machine")]
#[derive(Debug)]
pub(crate) struct Failed<'a> {
    pub(crate) outcome: Outcome<'a>,
    pub(crate) is_idempotent: bool,
    pub(crate) shown: Shown,
    /// Until the call's timeout.
    pub(crate) left: Option<Duration>,
    /// Whether the server goes away. What it asks for concerns its own return, which connecting observes.
    pub(crate) is_draining: bool,
    /// Whether the client can open another session, and whether it can do so for one of a previous certificate.
    pub(crate) can_open: bool,
    pub(crate) can_reopen: bool,
    pub(crate) has_device: bool,
    pub(crate) has_refresh_token: bool,
}

/// The next step of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send the request again at once, with the present token.
    Send,
    /// Send it again after a delay.
    Wait(Duration),
    Refresh,
    /// Open another session.
    Reopen,
    /// Open another session after the delay of `Sessions`, which is that of the client and not of the call.
    Replace,
    Attach,
    Report,
}

/// What a call does once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Once {
    Action(Action),
    /// Send the request again with the present token.
    CatchUp,
    /// Show the token by a small request.
    Show,
}

/// The steps of a call so far. Created at its first error, which most calls never have.
#[derive(Debug, Default)]
pub(crate) struct Retries {
    pub(crate) delays: u32,
    pub(crate) done: Vec<Once>,
}

impl Retries {
    /// Return whether this is the first time that something is due.
    pub(crate) fn is_first(&mut self, once: Once) -> bool {
        let is_first = !self.done.contains(&once);
        if is_first {
            self.done.push(once);
        }
        is_first
    }

    /// Return the next step after a failure. `random` is from 0 to 1.
    pub(crate) fn next(&mut self, failed: &Failed<'_>, random: f64) -> Step {
        let error = match failed.outcome {
            Outcome::Error(error) => error,
            Outcome::Lost if !failed.is_idempotent => return Step::Report,
            // Back off: the call itself may be what crashes the server.
            Outcome::Lost | Outcome::Ended => return self.wait(Duration::ZERO, failed.left, random),
        };
        let action = action(error);
        let step = match action {
            Action::Later => {
                let asked = if failed.is_draining { Duration::ZERO } else { error.retry_after() };
                return self.wait(asked, failed.left, random);
            }
            Action::AtOnce => Step::Send,
            _ if failed.shown == Shown::None => return Step::Report,
            Action::Report if !ends_session(error.code) => return Step::Report,
            _ if failed.shown == Shown::Earlier => {
                return if self.is_first(Once::CatchUp) { Step::Send } else { Step::Report };
            }
            Action::Renew if failed.has_refresh_token => Step::Refresh,
            Action::Renew => Step::Reopen,
            Action::Attach if failed.has_device => Step::Attach,
            Action::Reopen if failed.can_reopen => Step::Reopen,
            Action::Replace if failed.can_open => Step::Replace,
            Action::Report | Action::Attach | Action::Reopen | Action::Replace => return Step::Report,
        };
        if self.is_first(Once::Action(action)) { step } else { Step::Report }
    }

    /// Return the step of a retry after a delay, which must end before the call's timeout.
    pub(crate) fn wait(&mut self, asked: Duration, left: Option<Duration>, random: f64) -> Step {
        let delay = asked + backoff::delay(self.delays, random);
        self.delays += 1;
        if left.is_some_and(|left| delay >= left) { Step::Report } else { Step::Wait(delay) }
    }
}

/// Return `deadline_ms` of a request with so much time until the timeout of its call; `None` at the end.
pub(crate) fn deadline_ms(left: Duration) -> Option<u64> {
    let left = u64::try_from(left.as_micros().div_ceil(1_000)).unwrap_or(u64::MAX);
    (left > 0).then_some(left)
}

/// Return whether the session has ended. After that a client neither opens one nor reconnects on its own: two clients of
/// one user would replace each other's session endlessly.
pub(crate) fn ends_session(code: Code) -> bool {
    matches!(code, Code::TokenRevoked | Code::SessionReplaced)
}

/// Return whether a refused renewal ends the session.
pub(crate) fn refuses(code: Code) -> bool {
    ends_session(code) || matches!(code, Code::Unauthenticated | Code::TokenExpired)
}

/// Return whether a request with this error may have run.
pub(crate) fn may_have_run(code: Code) -> bool {
    matches!(code, Code::DeadlineExceeded | Code::Cancelled | Code::Internal | Code::Unknown)
}

/// Return whether a stream ended because of its connection, and not because of its method or session. `was_lost`: this end
/// found a frame of the stream stale. A method may answer with DATA_LOSS, too.
pub(crate) fn is_interruption(error: &Error, was_lost: bool) -> bool {
    match error {
        Error::Call(CallError { code: Code::DataLoss, .. }) => was_lost,
        Error::Call(CallError { code: Code::Cancelled, details, .. }) => {
            matches!(details.get("reason").and_then(Value::as_str), Some("draining" | "stale"))
        }
        Error::Closed(_) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Closed;
    use serde_json::Value as Json;

    #[test]
    fn only_the_connection_interrupts_a_stream() {
        let call = |code, reason: &str| Error::Call(CallError::new(code, "").with("reason", reason));
        for (error, was_lost, expected) in [
            (call(Code::Cancelled, "draining"), false, true),
            (call(Code::Cancelled, "stale"), false, true),
            (call(Code::Cancelled, "slow"), false, false),
            (call(Code::DataLoss, ""), true, true),
            (call(Code::DataLoss, ""), false, false),
            (Closed::broken("cut").into(), false, true),
            (call(Code::NotFound, ""), true, false),
        ] {
            assert_eq!(is_interruption(&error, was_lost), expected, "{error:?}");
        }
    }

    #[test]
    fn follows_the_table_of_the_specification() {
        let error = |code| CallError::new(code, "");
        for (error, expected) in [
            (error(Code::Unavailable).with("retry_after_ms", 5), Action::Later),
            (error(Code::ResourceExhausted), Action::Later),
            (error(Code::ResourceExhausted).with("limit", 5), Action::Report),
            (error(Code::Unauthenticated).with("attach", true), Action::Attach),
            (error(Code::Unauthenticated).with("attach", 1), Action::Report),
            (error(Code::Unauthenticated).with("certificate", true), Action::Reopen),
            (error(Code::Unauthenticated).with("reason", "unknown_token"), Action::Replace),
            (error(Code::Unauthenticated), Action::Report),
            (error(Code::StaleTimestamp), Action::AtOnce),
            (error(Code::TokenExpired), Action::Renew),
        ] {
            assert_eq!(action(&error), expected, "{error:?}");
        }
        let handled = [Code::Unavailable, Code::ResourceExhausted, Code::StaleTimestamp, Code::TokenExpired];
        for &code in Code::ALL.iter().filter(|code| !handled.contains(code)) {
            assert_eq!(action(&error(code)), Action::Report, "{code}");
        }
    }

    /// Return the vectors of a type.
    fn vectors(kind: &str) -> Vec<Json> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../spec/vectors/retry.json");
        let mut json: Json = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let Json::Array(mut vectors) = json["vectors"].take() else { panic!("no vectors") };
        vectors.retain(|vector| vector["type"] == kind);
        assert!(!vectors.is_empty());
        vectors
    }

    fn untyped(json: &Json) -> Value {
        match json {
            Json::Bool(value) => (*value).into(),
            Json::Number(number) => number.as_i64().unwrap().into(),
            Json::String(text) => text.as_str().into(),
            Json::Object(entries) => {
                Value::Map(entries.iter().map(|(key, value)| (key.clone(), untyped(value))).collect())
            }
            other => panic!("{other}"),
        }
    }

    fn number(json: &Json) -> u32 {
        json.as_u64().unwrap().try_into().unwrap()
    }

    #[test]
    fn follows_the_vectors_of_decisions() {
        for vector in vectors("decision") {
            let (request, client, outcome) = (&vector["request"], &vector["client"], &vector["outcome"]);
            let random = vector["random"].as_f64().unwrap();
            let error = outcome.get("error").map(|error| CallError {
                code: Code::from_wire(error["code"].as_i64().unwrap().into()).unwrap_or(Code::Unknown),
                message: String::new(),
                details: untyped(&error["details"]),
            });
            let credentials = client["credentials"].as_str();
            let failed = Failed {
                outcome: match (&error, outcome["connection"].as_str()) {
                    (Some(error), None) => Outcome::Error(error),
                    (None, Some("lost")) => Outcome::Lost,
                    (None, Some("ended")) => Outcome::Ended,
                    other => panic!("{other:?}"),
                },
                is_idempotent: request["idempotent"].as_bool().unwrap(),
                shown: match request["token"].as_str().unwrap() {
                    "present" => Shown::Present,
                    "earlier" => Shown::Earlier,
                    "none" => Shown::None,
                    other => panic!("{other}"),
                },
                left: request["time_left_ms"].as_u64().map(Duration::from_millis),
                is_draining: request["draining"].as_bool().unwrap(),
                can_open: credentials.is_some(),
                can_reopen: matches!(credentials, Some("certificate" | "scheme")),
                has_device: credentials == Some("device"),
                has_refresh_token: client["refresh_token"].as_bool().unwrap(),
            };
            let mut retries = Retries { delays: number(&request["delays"]), done: Vec::new() };
            for done in request["done"].as_array().unwrap() {
                retries.done.extend(match done.as_str().unwrap() {
                    "send" => vec![Once::Action(Action::AtOnce), Once::CatchUp],
                    "refresh" => vec![Once::Action(Action::Renew)],
                    "reopen" => [Action::Renew, Action::Reopen, Action::Replace].map(Once::Action).into(),
                    "attach" => vec![Once::Action(Action::Attach)],
                    other => panic!("{other}"),
                });
            }
            let (step, after) = match retries.next(&failed, random) {
                Step::Send => ("send", None),
                Step::Wait(delay) => ("wait", Some(delay)),
                Step::Refresh => ("refresh", None),
                Step::Reopen => ("reopen", Some(Duration::ZERO)),
                Step::Replace => ("reopen", Some(backoff::delay(number(&client["reopenings"]), random))),
                Step::Attach => ("attach", None),
                Step::Report => ("report", None),
            };
            let expected = &vector["expect"];
            assert_eq!(step, expected["step"], "{}", vector["name"]);
            let expected = expected.get("after_ms").map(|after| Duration::from_millis(number(after).into()));
            assert_eq!(after, expected, "{}", vector["name"]);
        }
    }

    #[test]
    fn the_deadline_of_each_attempt_is_what_is_left() {
        for vector in vectors("deadline") {
            let timeout = vector["timeout_ms"].as_u64().map(Duration::from_millis);
            let expected = vector["expect"]["deadline_ms"].as_array().unwrap();
            for (at, expected) in vector["attempts_at_ms"].as_array().unwrap().iter().zip(expected) {
                let at = Duration::from_secs_f64(at.as_f64().unwrap() / 1_000.0);
                let sent = timeout.and_then(|timeout| deadline_ms(timeout.saturating_sub(at)));
                assert_eq!(sent, expected.as_u64(), "{}", vector["name"]);
            }
        }
    }
}
