//! The C interface of the crate `zcproto`; `include/zcproto.h` documents it.
//!
//! Rules: no panic crosses the border, each function checks its pointers for NULL, and objects are boxes that the caller
//! frees. What cannot be checked is the contract of every function, which the head of the header states.

#![allow(clippy::missing_safety_doc, reason = "the head of the header has the contract of all functions")]

mod client;
mod device;
mod error;
mod gate;
mod handler;
mod options;
mod pointer;
mod runtime;
mod stream;
mod value;

use std::ffi::{c_char, CStr};

const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => panic!("a version has no zero byte"),
};

/// Return the version of the library, such as "0.1.0". ZCP_VERSION is that of the header.
#[no_mangle]
pub extern "C" fn zcp_version() -> *const c_char {
    VERSION.as_ptr()
}
