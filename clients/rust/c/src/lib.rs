//! The C interface of the crate `zcproto`; `include/zcproto.h` documents it.
//!
//! Rules: no panic crosses the border, each function checks its pointers for NULL, and objects are boxes that the caller
//! frees. What cannot be checked is the contract of every function, which the head of the header states.

#![allow(clippy::missing_safety_doc, reason = "the head of the header has the contract of all functions")]

mod client;
mod device;
mod error;
mod handler;
mod options;
mod pointer;
mod runtime;
mod stream;
mod value;
