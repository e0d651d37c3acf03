//! A client of zcproto: RPC over TLS 1.3, with sessions, streams of items and calls from the server.
//!
//! ```no_run
//! use zcproto::{Client, ConnectOptions, Value};
//!
//! # async fn run() -> zcproto::Result<()> {
//! let client = Client::connect(ConnectOptions::new("host:7443").api_key("ada", "the key").ca_file("ca.crt")).await?;
//! let answer: Value = client.call("echo", &Value::Map(vec![("word".into(), "hello".into())])).await?;
//! client.close().await;
//! # Ok(()) }
//! ```
//!
//! [`Client`] runs on tokio. The protocol itself is in [`core`], without I/O, for other runtimes and for tests.
//! Secrets are cleared when they are dropped, and hidden from `Debug`. The private key of a device, and the secrets of TLS, are
//! in the memory of ring and rustls, which do not clear all of it.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod base64;
mod client;
pub mod codec;
pub mod core;
mod error;
pub mod frame;
pub mod message;
mod random;
mod secret;
mod text;
mod trust;

pub use client::{
    AddressOrder, Call, Client, ConnectOptions, Credentials, DEFAULT_PORT, DEFAULT_WINDOW, Endpoint, Items, Login,
    Request, ServerEvent, SessionInfo, Stream, StreamBuilder, enroll,
};
pub use codec::Value;
pub use error::{CallError, Closed, Code, Error, ProtocolError, Result, TlsError, TlsFailure};
pub use message::{Credit, Meta, StreamLimits, StsPolicy, Welcome};
pub use secret::{Secret, Token};
pub use trust::{Channel, Device};
