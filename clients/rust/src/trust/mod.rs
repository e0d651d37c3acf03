//! Which servers a client trusts: CAs, pins, and the hosts that require verification; and the keys of devices.

mod certificate;
mod device;
pub(crate) mod known_hosts;
mod pins;
mod private_file;
mod signing;
pub(crate) mod tls;

pub use device::Device;
pub use signing::Channel;
pub(crate) use tls::{TlsOptions, Trust};
