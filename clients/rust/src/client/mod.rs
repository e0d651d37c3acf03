//! The client over tokio. It drives [`core`](crate::core).

mod address;
mod api;
mod attempt;
mod backoff;
mod connection;
mod dial;
mod endpoints;
mod events;
mod handlers;
mod hub;
mod options;
mod retry;
mod session;
mod stream;
mod transport;
mod user;

pub use address::{DEFAULT_PORT, Endpoint};
pub use api::{Client, Request, enroll};
pub use endpoints::AddressOrder;
pub use events::ServerEvent;
pub use handlers::Call;
pub use options::{ConnectOptions, Credentials, Login};
pub use session::SessionInfo;
pub use stream::{DEFAULT_WINDOW, Items, Stream, StreamBuilder};
