//! What a client does after an error: the table of zcp1.md, section 11.1. This module only decides.

use crate::codec::Value;
use crate::error::{CallError, Code, Error};

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
        _ => Action::Report,
    }
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
}
