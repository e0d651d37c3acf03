//! The client's end of a connection, without I/O: bytes and time go in; events, bytes and the next deadline come out.
//!
//! No socket, no TLS, no clock and no source of randomness is known here, so every rule can be tested without waiting.
//! [`Client`](crate::Client) drives it over tokio; another runtime can do the same:
//!
//! ```
//! use std::time::Duration;
//! use zcproto::core::{Conversation, Event, Settings};
//!
//! let mut conversation = Conversation::new(Settings::default());
//! let (wall, now) = (1_767_225_600_000, Duration::ZERO); // the time in ms since 1970, and a monotonic one
//! let mut events = Vec::new();
//! conversation.receive(b"bytes that TLS has decrypted", wall, now, &mut events);
//! assert!(matches!(events[..], [Event::Ended { .. }])); // these were not a frame
//! assert!(conversation.take_output().is_empty()); // what to encrypt and send
//! ```

mod calls;
mod conversation;
pub mod credit;
mod events;
mod flood;
mod freshness;
mod keepalive;
mod output;
mod requests;
mod silence;
mod streams;

pub use conversation::{Conversation, FRAME_TIMEOUT, MAX_SERVER_TIME, Settings, State};
pub use events::{Event, ServerCall};
pub use freshness::{Freshness, MAX_CONSECUTIVE_STALE, Verdict};
pub use keepalive::{Keepalive, PONG_TIMEOUT};
pub use requests::MAX_FRAME_BEFORE_SESSION;
pub(crate) use requests::issued_token;
