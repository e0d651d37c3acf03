//! Which servers a client trusts: CAs, pins, and the hosts that require verification; and the keys of devices.

mod certificate;
mod device;
pub(crate) mod known_hosts;
mod pins;
mod private_file;
pub(crate) mod tls;

pub use device::{Channel, Device};
pub(crate) use tls::{TlsOptions, Trust};
