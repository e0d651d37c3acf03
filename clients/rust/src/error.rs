//! The errors of this crate as one enum, and the codes on the wire.
//!
//! No error ever contains a token or a key.

use crate::codec::{CodecError, Value};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The result of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal;)*) => {
        /// Error codes of ZCP/1. 1 to 16 are the canonical codes of gRPC, 64 and above are specific to the protocol.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Code {
            $($(#[$doc])* $variant = $number,)*
        }

        impl Code {
            /// All codes.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// Return the name of the protocol, such as `NOT_FOUND`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Code::$variant => $name,)*
                }
            }
        }
    };
}

codes! {
    /// The call was cancelled.
    Cancelled = 1, "CANCELLED";
    /// An error without further information, or with an unknown code.
    Unknown = 2, "UNKNOWN";
    /// The body, the method's name, params or meta are invalid.
    InvalidArgument = 3, "INVALID_ARGUMENT";
    /// The timeout of the call has passed. It may have run.
    DeadlineExceeded = 4, "DEADLINE_EXCEEDED";
    /// There is no such thing.
    NotFound = 5, "NOT_FOUND";
    /// The thing exists already.
    AlreadyExists = 6, "ALREADY_EXISTS";
    /// The user is not allowed to do this.
    PermissionDenied = 7, "PERMISSION_DENIED";
    /// Too many requests, sessions or attempts.
    ResourceExhausted = 8, "RESOURCE_EXHAUSTED";
    /// The state does not permit this.
    FailedPrecondition = 9, "FAILED_PRECONDITION";
    /// The operation was aborted.
    Aborted = 10, "ABORTED";
    /// A value is out of range.
    OutOfRange = 11, "OUT_OF_RANGE";
    /// There is no such method.
    Unimplemented = 12, "UNIMPLEMENTED";
    /// A fault of the server, or an answer that cannot be read.
    Internal = 13, "INTERNAL";
    /// Not now: the server is draining or a part of it is down.
    Unavailable = 14, "UNAVAILABLE";
    /// The answer was delayed for too long. The call may have run.
    DataLoss = 15, "DATA_LOSS";
    /// There is no session, or the credentials are wrong.
    Unauthenticated = 16, "UNAUTHENTICATED";
    /// The peer violated the protocol.
    ProtocolError = 64, "PROTOCOL_ERROR";
    /// A frame is longer than the limit.
    FrameTooLarge = 65, "FRAME_TOO_LARGE";
    /// A frame has the wrong salt, or a counter that did not grow.
    Replayed = 66, "REPLAYED";
    /// The timestamp of a frame is off by more than the tolerance.
    StaleTimestamp = 67, "STALE_TIMESTAMP";
    /// The token has expired.
    TokenExpired = 68, "TOKEN_EXPIRED";
    /// The token was revoked.
    TokenRevoked = 69, "TOKEN_REVOKED";
    /// The session made room for a newer one.
    SessionReplaced = 70, "SESSION_REPLACED";
}

impl Code {
    /// Return the number on the wire.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Return the code of a number on the wire, if it is known.
    #[must_use]
    pub fn from_wire(number: i128) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| i128::from(code.number()) == number)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The peer violated the protocol. `reason` is a fixed phrase, safe to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProtocolError {
    /// The code of the fault.
    pub code: Code,
    /// What the peer did.
    pub reason: &'static str,
}

impl ProtocolError {
    /// Make an error with the code `PROTOCOL_ERROR`.
    #[must_use]
    pub const fn new(reason: &'static str) -> Self {
        Self { code: Code::ProtocolError, reason }
    }
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.reason)
    }
}

impl std::error::Error for ProtocolError {}

/// A call failed with an error, of the server or of this client.
#[derive(Clone, Debug, PartialEq)]
pub struct CallError {
    /// The code; UNKNOWN for one that this client does not know.
    pub code: Code,
    /// A sentence for people. Do not base decisions on it.
    pub message: String,
    /// A map, which may be empty.
    pub details: Value,
}

impl CallError {
    /// Make an error without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: Value::Map(Vec::new()) }
    }

    /// Add a detail.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        if let Value::Map(details) = &mut self.details {
            details.push((key.to_owned(), value.into()));
        }
        self
    }

    /// Return the delay that the server asks for before a retry, at most an hour; zero without one.
    #[must_use]
    pub fn retry_after(&self) -> Duration {
        let asked = self.details.get("retry_after_ms").and_then(Value::as_int).unwrap_or(0);
        Duration::from_millis(asked.clamp(0, 3_600_000).try_into().unwrap_or(0))
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for CallError {}

macro_rules! failures {
    ($($(#[$doc:meta])* $variant:ident = $name:literal;)*) => {
        /// Why a TLS handshake failed or a server is not trusted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum TlsFailure {
            $($(#[$doc])* $variant,)*
        }

        impl TlsFailure {
            /// Return the name for logs, such as `pin_mismatch`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(TlsFailure::$variant => $name,)*
                }
            }
        }
    };
}

failures! {
    /// The server at the address does not use TLS.
    NotTls = "not_tls";
    /// The server does not support TLS 1.3.
    UnsupportedVersion = "unsupported_version";
    /// The server supports no cipher suite, key-exchange group or signature algorithm of the client: the alert is the same.
    NoSharedParameters = "no_shared_parameters";
    /// The server uses TLS and does not support `zcp/1`.
    NoApplicationProtocol = "no_application_protocol";
    /// The server selected a version or a suite that is not allowed.
    WrongParameters = "wrong_parameters";
    /// The connection ended during the handshake.
    Disconnected = "disconnected";
    /// A TLS record was damaged.
    BadRecord = "bad_record";
    /// The server refused the client's certificate.
    PeerRejectedCertificate = "peer_rejected_certificate";
    /// The server ended the handshake with another alert.
    PeerAlert = "peer_alert";
    /// The server requires a client certificate.
    CertificateRequired = "certificate_required";
    /// The server's certificate is not trusted.
    CertificateUntrusted = "certificate_untrusted";
    /// The server's certificate has expired or is not valid yet.
    CertificateExpired = "certificate_expired";
    /// The server's certificate was revoked.
    CertificateRevoked = "certificate_revoked";
    /// The server's certificate is for another name.
    CertificateNameMismatch = "certificate_name_mismatch";
    /// The server matches no pin.
    PinMismatch = "pin_mismatch";
    /// A pin is malformed.
    PinMalformed = "pin_malformed";
    /// Verification is disabled for a host that requires it.
    StsPolicy = "sts_policy";
    /// The connection ended without close_notify.
    Truncated = "truncated";
    /// The connection was reset.
    ConnectionReset = "connection_reset";
    /// Any other failure.
    Other = "other";
}

impl TlsFailure {
    /// Return whether another attempt may succeed. It does not for a wrong certificate, pin or peer.
    #[must_use]
    pub fn is_transient(self) -> bool {
        use TlsFailure::{BadRecord, ConnectionReset, Disconnected, Other, PeerAlert, Truncated};
        matches!(self, Disconnected | ConnectionReset | Truncated | BadRecord | PeerAlert | Other)
    }
}

/// The TLS handshake failed, or the server is not trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsError {
    /// Why.
    pub failure: TlsFailure,
    /// What failed, and how to fix it.
    pub detail: String,
}

impl TlsError {
    pub(crate) fn new(failure: TlsFailure, detail: impl Into<String>) -> Self {
        Self { failure, detail: detail.into() }
    }
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for TlsError {}

/// The connection ended before the operation was complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    /// Why.
    pub reason: String,
    /// True after a close_notify, false after a reset or a truncation (RFC 8446 section 6.1).
    pub clean: bool,
    /// The fatal error that the server sent, or that was detected in its frames.
    pub code: Option<Code>,
    /// The failure of TLS that ended the connection.
    pub tls: Option<TlsError>,
}

impl Closed {
    /// Make an error for a clean end.
    pub(crate) fn clean(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), clean: true, code: None, tls: None }
    }

    /// Make an error for any other end.
    pub(crate) fn broken(reason: impl Into<String>) -> Self {
        Self { clean: false, ..Self::clean(reason) }
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Closed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.tls.as_ref().map(|error| error as _)
    }
}

/// Everything that can fail.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// The options are invalid or contradictory. Nothing was started.
    Config(String),
    /// A certificate or a key is unusable. The message names the file and how to fix it, never the key.
    Certificate(String),
    /// The server violated the protocol.
    Protocol(ProtocolError),
    /// The TLS handshake failed, or the server is not trusted.
    Tls(TlsError),
    /// The function given as login failed. The next call runs it again.
    Login(Arc<dyn std::error::Error + Send + Sync>),
    /// The connection ended.
    Closed(Closed),
    /// Connecting failed: unknown host, refused, unreachable, or timeout.
    CannotConnect {
        /// What failed, and how to fix it.
        reason: String,
        /// Whether nothing listens at the address: the server may be starting.
        refused: bool,
    },
    /// A call failed with an error of the server or of this client.
    Call(CallError),
    /// The result of a call, or an item, does not have the type that the application asked for.
    Type(CodecError),
}

impl Error {
    /// Return the code of a failed call, or of the fatal error that ended the connection.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Error::Call(error) => Some(error.code),
            Error::Protocol(error) => Some(error.code),
            Error::Closed(closed) => closed.code,
            _ => None,
        }
    }

    /// Return the error of a failed call.
    #[must_use]
    pub fn as_call(&self) -> Option<&CallError> {
        match self {
            Error::Call(error) => Some(error),
            _ => None,
        }
    }

    pub(crate) fn call(code: Code, message: impl Into<String>) -> Self {
        Error::Call(CallError::new(code, message))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Config(text) | Error::Certificate(text) | Error::CannotConnect { reason: text, .. } => {
                f.write_str(text)
            }
            Error::Protocol(error) => error.fmt(f),
            Error::Tls(error) => error.fmt(f),
            Error::Login(error) => write!(f, "the function given as login failed: {error}"),
            Error::Closed(error) => error.fmt(f),
            Error::Call(error) => error.fmt(f),
            Error::Type(error) => write!(f, "the value has another type: {error}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Login(error) => Some(error.as_ref()),
            Error::Closed(error) => error.source(),
            Error::Type(error) => Some(error),
            _ => None,
        }
    }
}

macro_rules! from {
    ($($kind:ident => $variant:ident;)*) => {
        $(impl From<$kind> for Error {
            fn from(error: $kind) -> Self {
                Error::$variant(error)
            }
        })*
    };
}

from! {
    ProtocolError => Protocol;
    TlsError => Tls;
    Closed => Closed;
    CallError => Call;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_numbers_of_the_wire() {
        assert_eq!(Code::from_wire(16), Some(Code::Unauthenticated));
        assert_eq!(Code::from_wire(70), Some(Code::SessionReplaced));
        for unknown in [0, 17, 71, 257, -1, 1 << 64] {
            assert_eq!(Code::from_wire(unknown), None);
        }
    }

    #[test]
    fn retry_after_is_bounded_and_ignores_other_types() {
        let error = |value: Value| CallError::new(Code::Unavailable, "busy").with("retry_after_ms", value);
        assert_eq!(error(250.into()).retry_after(), Duration::from_millis(250));
        assert_eq!(error(Value::Int(1 << 60)).retry_after(), Duration::from_secs(3600));
        assert_eq!(error((-1).into()).retry_after(), Duration::ZERO);
        assert_eq!(error("soon".into()).retry_after(), Duration::ZERO);
    }
}
