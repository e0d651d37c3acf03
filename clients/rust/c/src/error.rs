//! Errors: codes, and objects that describe them.

use crate::pointer::{free, read};
use crate::value::Value;
use std::ffi::{c_char, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;
use zcproto_client::codec;

/// Success.
pub const ZCP_OK: i32 = 0;
/// The call was cancelled.
pub const ZCP_CANCELLED: i32 = 1;
/// An error without further information, or with an unknown code.
pub const ZCP_UNKNOWN: i32 = 2;
/// The body, the method's name, params or meta are invalid.
pub const ZCP_INVALID_ARGUMENT: i32 = 3;
/// The timeout of the call has passed. It may have run.
pub const ZCP_DEADLINE_EXCEEDED: i32 = 4;
/// There is no such thing.
pub const ZCP_NOT_FOUND: i32 = 5;
/// The thing exists already.
pub const ZCP_ALREADY_EXISTS: i32 = 6;
/// The user is not allowed to do this.
pub const ZCP_PERMISSION_DENIED: i32 = 7;
/// Too many requests, sessions or attempts.
pub const ZCP_RESOURCE_EXHAUSTED: i32 = 8;
/// The state does not permit this.
pub const ZCP_FAILED_PRECONDITION: i32 = 9;
/// The operation was aborted.
pub const ZCP_ABORTED: i32 = 10;
/// A value is out of range.
pub const ZCP_OUT_OF_RANGE: i32 = 11;
/// There is no such method.
pub const ZCP_UNIMPLEMENTED: i32 = 12;
/// A fault of the server, or an answer that cannot be read.
pub const ZCP_INTERNAL: i32 = 13;
/// Not now: the server is draining or a part of it is down.
pub const ZCP_UNAVAILABLE: i32 = 14;
/// The answer was delayed for too long. The call may have run.
pub const ZCP_DATA_LOSS: i32 = 15;
/// There is no session, or the credentials are wrong.
pub const ZCP_UNAUTHENTICATED: i32 = 16;
/// The peer violated the protocol.
pub const ZCP_PROTOCOL_ERROR: i32 = 64;
/// A frame is longer than the limit.
pub const ZCP_FRAME_TOO_LARGE: i32 = 65;
/// A frame has the wrong salt, or a counter that did not grow.
pub const ZCP_REPLAYED: i32 = 66;
/// The timestamp of a frame is off by more than the tolerance.
pub const ZCP_STALE_TIMESTAMP: i32 = 67;
/// The token has expired.
pub const ZCP_TOKEN_EXPIRED: i32 = 68;
/// The token was revoked.
pub const ZCP_TOKEN_REVOKED: i32 = 69;
/// The session made room for a newer one.
pub const ZCP_SESSION_REPLACED: i32 = 70;
/// The options are invalid or contradictory. Nothing was started.
pub const ZCP_CONFIG: i32 = -1;
/// A certificate or a key is unusable.
pub const ZCP_CERTIFICATE: i32 = -2;
/// The TLS handshake failed, or the server is not trusted.
pub const ZCP_TLS: i32 = -3;
/// Connecting failed: unknown host, refused, unreachable, or timeout.
pub const ZCP_CANNOT_CONNECT: i32 = -4;
/// The connection ended. A call that was in flight may have run.
pub const ZCP_CLOSED: i32 = -5;
/// A parameter is invalid: NULL, not UTF-8, out of range, or not allowed here.
pub const ZCP_ARGUMENT: i32 = -6;
/// A fault of this library. Please report it.
pub const ZCP_PANIC: i32 = -7;
/// There is nothing more: the stream has no further item, or no event has come in time.
pub const ZCP_END: i32 = -8;

/// What went wrong.
pub(crate) struct Failure {
    code: i32,
    message: String,
    details: zcproto_client::Value,
    is_clean: bool,
}

impl Failure {
    fn new(code: i32, message: String) -> Self {
        Self { code, message, details: zcproto_client::Value::Map(Vec::new()), is_clean: false }
    }

    pub(crate) fn argument(message: &str) -> Self {
        Self::new(ZCP_ARGUMENT, message.into())
    }

    pub(crate) fn internal(message: &str) -> Self {
        Self::new(ZCP_INTERNAL, message.into())
    }

    pub(crate) fn cancelled() -> Self {
        Self::new(ZCP_CANCELLED, "cancelled by the caller".into())
    }

    pub(crate) fn end(message: &str) -> Self {
        Self::new(ZCP_END, message.into())
    }

    /// Return an object for the caller.
    pub(crate) fn into_object(self) -> *mut Error {
        Box::into_raw(Box::new(Error {
            code: self.code,
            message: CString::new(self.message.replace('\0', "\\0")).unwrap_or_default(),
            details: Value::new(self.details),
            is_clean: self.is_clean,
        }))
    }
}

impl From<zcproto_client::Error> for Failure {
    fn from(error: zcproto_client::Error) -> Self {
        let message = error.to_string();
        match error {
            zcproto_client::Error::Call(call) => {
                Self { details: call.details, ..Self::new(call.code.number().into(), call.message) }
            }
            zcproto_client::Error::Config(_) => Self::new(ZCP_CONFIG, message),
            zcproto_client::Error::Certificate(_) => Self::new(ZCP_CERTIFICATE, message),
            zcproto_client::Error::Tls(error) => {
                let details = codec::Value::from([("failure", error.failure.name())]);
                Self { details, ..Self::new(ZCP_TLS, message) }
            }
            zcproto_client::Error::CannotConnect { .. } => Self::new(ZCP_CANNOT_CONNECT, message),
            zcproto_client::Error::Closed(closed) => {
                let code = closed.code.map(|code| ("code".to_owned(), i32::from(code.number()).into()));
                let details = codec::Value::Map(code.into_iter().collect());
                Self { details, is_clean: closed.clean, ..Self::new(ZCP_CLOSED, message) }
            }
            zcproto_client::Error::Protocol(error) => Self::new(error.code.number().into(), message),
            _ => Self::new(ZCP_UNKNOWN, message),
        }
    }
}

/// The description of an error.
pub struct Error {
    code: i32,
    message: CString,
    details: Value,
    is_clean: bool,
}

/// Run the body of a function that can fail: return its code, and give its error to the caller. A panic is ZCP_PANIC.
pub(crate) fn guard(error: *mut *mut Error, work: impl FnOnce() -> Result<(), Failure>) -> i32 {
    let result = catch_unwind(AssertUnwindSafe(work));
    let result = result.unwrap_or_else(|_| Err(Failure::new(ZCP_PANIC, "a fault of this library; report it".into())));
    let code = result.as_ref().err().map_or(ZCP_OK, |failure| failure.code);
    if !error.is_null() {
        let object = result.err().map_or(ptr::null_mut(), Failure::into_object);
        // SAFETY: the caller passes NULL, or a place for an error.
        unsafe { *error = object };
    }
    code
}

/// Return the code of an error; ZCP_OK for NULL.
#[no_mangle]
pub unsafe extern "C" fn zcp_error_code(error: *const Error) -> i32 {
    // SAFETY: the caller passes an error.
    unsafe { error.as_ref() }.map_or(ZCP_OK, |error| error.code)
}

/// Return the message of an error: what failed, and how to fix it. Return NULL for NULL.
#[no_mangle]
pub unsafe extern "C" fn zcp_error_message(error: *const Error) -> *const c_char {
    // SAFETY: the caller passes an error.
    unsafe { read(error, |error| error.message.as_ptr()) }
}

/// Return the details of an error, a map that can be empty. It belongs to the error. Return NULL for NULL. Those of ZCP_TLS have
/// `failure`, such as `certificate_expired` or `pin_mismatch`; those of ZCP_CLOSED have `code` after an error of the protocol.
#[no_mangle]
pub unsafe extern "C" fn zcp_error_details(error: *const Error) -> *const Value {
    // SAFETY: the caller passes an error.
    unsafe { read(error, |error| ptr::from_ref(&error.details)) }
}

/// Return 1 if the connection ended cleanly, 0 after a reset or a truncation and for any other error.
#[no_mangle]
pub unsafe extern "C" fn zcp_error_is_clean(error: *const Error) -> i32 {
    // SAFETY: the caller passes an error.
    unsafe { error.as_ref() }.is_some_and(|error| error.is_clean).into()
}

/// Return the name of a code, such as NOT_FOUND. Return NULL for an unknown code.
#[no_mangle]
pub extern "C" fn zcp_code_name(code: i32) -> *const c_char {
    let name = match code {
        ZCP_OK => c"OK",
        ZCP_CANCELLED => c"CANCELLED",
        ZCP_UNKNOWN => c"UNKNOWN",
        ZCP_INVALID_ARGUMENT => c"INVALID_ARGUMENT",
        ZCP_DEADLINE_EXCEEDED => c"DEADLINE_EXCEEDED",
        ZCP_NOT_FOUND => c"NOT_FOUND",
        ZCP_ALREADY_EXISTS => c"ALREADY_EXISTS",
        ZCP_PERMISSION_DENIED => c"PERMISSION_DENIED",
        ZCP_RESOURCE_EXHAUSTED => c"RESOURCE_EXHAUSTED",
        ZCP_FAILED_PRECONDITION => c"FAILED_PRECONDITION",
        ZCP_ABORTED => c"ABORTED",
        ZCP_OUT_OF_RANGE => c"OUT_OF_RANGE",
        ZCP_UNIMPLEMENTED => c"UNIMPLEMENTED",
        ZCP_INTERNAL => c"INTERNAL",
        ZCP_UNAVAILABLE => c"UNAVAILABLE",
        ZCP_DATA_LOSS => c"DATA_LOSS",
        ZCP_UNAUTHENTICATED => c"UNAUTHENTICATED",
        ZCP_PROTOCOL_ERROR => c"PROTOCOL_ERROR",
        ZCP_FRAME_TOO_LARGE => c"FRAME_TOO_LARGE",
        ZCP_REPLAYED => c"REPLAYED",
        ZCP_STALE_TIMESTAMP => c"STALE_TIMESTAMP",
        ZCP_TOKEN_EXPIRED => c"TOKEN_EXPIRED",
        ZCP_TOKEN_REVOKED => c"TOKEN_REVOKED",
        ZCP_SESSION_REPLACED => c"SESSION_REPLACED",
        ZCP_CONFIG => c"CONFIG",
        ZCP_CERTIFICATE => c"CERTIFICATE",
        ZCP_TLS => c"TLS",
        ZCP_CANNOT_CONNECT => c"CANNOT_CONNECT",
        ZCP_CLOSED => c"CLOSED",
        ZCP_ARGUMENT => c"ARGUMENT",
        ZCP_PANIC => c"PANIC",
        ZCP_END => c"END",
        _ => return ptr::null(),
    };
    name.as_ptr()
}

/// Free an error.
#[no_mangle]
pub unsafe extern "C" fn zcp_error_free(error: *mut Error) {
    // SAFETY: the caller passes an error for the last time.
    unsafe { free(error) }
}
