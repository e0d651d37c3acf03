//! What a conversation reports.

use crate::error::{CallError, Code};
use crate::secret::Token;

/// A call from the server. Answer it once, by its number.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerCall {
    /// The number of the call on this connection.
    pub number: u32,
    /// The token of the session that is called.
    pub token: Token,
    /// The name of the method.
    pub method: String,
    /// A map.
    pub params: crate::codec::Value,
    /// How long the server waits for the answer, in milliseconds from its arrival.
    pub deadline_ms: u64,
    /// W3C Trace Context.
    pub traceparent: Option<String>,
}

/// What has happened on a connection. Bodies are valid msgpack, except that of an item.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// WELCOME was received: requests can be made from now on.
    Welcomed,
    /// A request was answered with a result.
    Response {
        /// The number of the request.
        stream: u32,
        /// The result, one value of msgpack.
        body: Vec<u8>,
    },
    /// A request failed. The connection continues.
    Failed {
        /// The number of the request.
        stream: u32,
        /// The error of the server, or of this end.
        error: CallError,
        /// Whether it failed at this end because a frame of it was stale.
        lost: bool,
    },
    /// An item of a stream has arrived. Decode it when the application takes it, and call `item_taken` then. If it is
    /// invalid, `cancel` the stream.
    Item {
        /// The number of the stream.
        stream: u32,
        /// The item, not yet checked.
        body: Vec<u8>,
    },
    /// The server allows more items on a stream.
    Credit {
        /// The number of the stream.
        stream: u32,
    },
    /// The server calls a method of this client.
    Call(ServerCall),
    /// The server has withdrawn a call, which was answered: stop its handler.
    Withdrawn {
        /// The number of the call.
        number: u32,
    },
    /// The server accepts no new requests on this connection. Requests in flight may still be answered.
    GoAway {
        /// Why, such as `draining`.
        reason: String,
        /// When to connect again, in milliseconds.
        retry_after_ms: u64,
    },
    /// An event of the server.
    Event {
        /// The name, such as `session.expiring`.
        name: String,
        /// The whole body, `[name, data]`, which takes less memory than its values.
        body: Vec<u8>,
        /// The token of the session that it concerns; zeros for the server.
        token: Token,
    },
    /// The server hangs with requests of this client. The connection continues.
    Silent,
    /// The connection has ended. Send the output that is left, then close.
    Ended {
        /// The fatal error, if any.
        code: Option<Code>,
        /// Why.
        reason: String,
    },
}
