//! The messages that a device signs (zcp1.md, sections 9.4 and 9.5).
//!
//! They include the connection's salt and the SHA-256 of the server's certificate (DER), so a signature is useless on another
//! connection or when relayed through another server.

use crate::secret::Token;

/// The properties of a connection that a signature is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// The salt of WELCOME.
    pub salt: u64,
    /// SHA-256 of the server's certificate (DER).
    pub leaf: [u8; 32],
}

impl Channel {
    /// Return the message for `session.open`.
    #[must_use]
    pub fn open_message(&self, device: &str) -> Vec<u8> {
        self.message(b"zcp/1 open\0", device.as_bytes())
    }

    /// Return the message for `session.attach`.
    #[must_use]
    pub fn attach_message(&self, token: &Token) -> Vec<u8> {
        self.message(b"zcp/1 attach\0", token.as_bytes())
    }

    fn message(&self, what: &[u8], last: &[u8]) -> Vec<u8> {
        [what, &self.salt.to_be_bytes(), &self.leaf, last].concat()
    }
}
