//! Devices: Ed25519 key pairs in files, which open sessions without a shared secret.

use super::private_file::{read, unusable, write_new};
use crate::error::{Error, Result};
use crate::secret::Token;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use zeroize::Zeroizing;

/// PKCS#8 of an Ed25519 key, up to the 32 bytes of its seed (RFC 8410 section 7).
const SEED_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// The properties of a connection that a device's signature is bound to (zcp1.md, sections 9.4 and 9.5): it is useless on another
/// connection, or when relayed through another server.
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

/// The key of a device. Create it once with [`create`](Self::create), and read it with [`load`](Self::load) from then on.
///
/// The file is PKCS#8 in PEM without a passphrase. It is created with mode 0600, and refused if others can read it. The
/// private key never leaves this value, and is hidden from `Debug`.
#[derive(Clone)]
pub struct Device {
    key: Arc<Ed25519KeyPair>,
}

impl Device {
    /// Create a device and write its key to a new file.
    ///
    /// # Errors
    ///
    /// [`Error::Certificate`] if the file exists or cannot be written.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let mut seed = Zeroizing::new([0; 32]);
        SystemRandom::new()
            .fill(seed.as_mut_slice())
            .map_err(|_| Error::Certificate("the system's source of randomness failed".to_owned()))?;
        let der = Zeroizing::new([SEED_PREFIX.as_slice(), seed.as_slice()].concat());
        let base64 = Zeroizing::new(crate::base64::encode_padded(&der));
        let pem = Zeroizing::new(format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", *base64));
        write_new(path.as_ref(), pem.as_bytes())?;
        Ok(Self::from_seed(&seed))
    }

    /// Read the key of a device from a file.
    ///
    /// # Errors
    ///
    /// [`Error::Certificate`] if the file is not the key of a device, or if other users can access it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let pem = read(path)?;
        if pem.windows(9).any(|text| text == b"ENCRYPTED") {
            return Err(unusable(path, "is encrypted; the key of a device must not have a passphrase"));
        }
        let der = PrivatePkcs8KeyDer::from_pem_slice(&pem)
            .map_err(|_| unusable(path, "is not a private key in PEM; create one with Device::create"))?;
        let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|_| unusable(path, "is not an Ed25519 key; create one with Device::create"))?;
        Ok(Self { key: Arc::new(key) })
    }

    /// Make a device from the 32 bytes of a private key (RFC 8032), for keys that are not in files.
    #[must_use]
    #[allow(clippy::missing_panics_doc, reason = "a seed of 32 bytes is always valid")]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let key = Ed25519KeyPair::from_seed_unchecked(seed).expect("a seed has 32 bytes");
        Self { key: Arc::new(key) }
    }

    /// Return the public key, which identifies the device.
    #[must_use]
    pub fn public_key(&self) -> &[u8] {
        self.key.public_key().as_ref()
    }

    /// Return the signature of 64 bytes (RFC 8032).
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.key.sign(message).as_ref().to_vec()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Device(")?;
        for byte in self.public_key() {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}
