//! Certificate pins: the SHA-256 of a public key (RFC 7469 section 2.4) or of a whole certificate.

use crate::base64;
use crate::error::{TlsError, TlsFailure};
use crate::text;
use ring::digest::{SHA256, digest};
use std::collections::BTreeSet;

pub(crate) const KEY_PREFIX: &str = "sha256/";
pub(crate) const CERTIFICATE_PREFIX: &str = "cert-sha256/";
pub(crate) const MAX_PINS: usize = 64;
const DIGEST_SIZE: usize = 32;
const SHOWN_PINS: usize = 8;

/// A set of valid pins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pins(BTreeSet<String>);

/// Return the pin of a public key, from its SubjectPublicKeyInfo.
pub(crate) fn key_pin(spki: &[u8]) -> String {
    format!("{KEY_PREFIX}{}", base64::encode_padded(digest(&SHA256, spki).as_ref()))
}

/// Return the pin of a certificate, from its DER.
pub(crate) fn certificate_pin(certificate: &[u8]) -> String {
    format!("{CERTIFICATE_PREFIX}{}", base64::encode_padded(digest(&SHA256, certificate).as_ref()))
}

impl Pins {
    /// Validate pins. A malformed one is an error: a pin is never ignored.
    pub(crate) fn parse(pins: &[String]) -> Result<Self, TlsError> {
        let parsed: BTreeSet<String> = pins.iter().cloned().collect();
        if parsed.len() > MAX_PINS {
            let fault = format!("more than {MAX_PINS} pins; remove old ones");
            return Err(TlsError::new(TlsFailure::PinMalformed, fault));
        }
        if let Some(wrong) = parsed.iter().find(|pin| !is_pin(pin)) {
            let fault = format!("\"{}\" is not sha256/BASE64 or cert-sha256/BASE64", text::escape(wrong, 80));
            return Err(TlsError::new(TlsFailure::PinMalformed, fault));
        }
        Ok(Self(parsed))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Return the pin, if there is one without a backup.
    pub(crate) fn only(&self) -> Option<&str> {
        if self.0.len() == 1 { self.0.first().map(String::as_str) } else { None }
    }

    /// Check a server's certificate, if there are pins.
    pub(crate) fn check(&self, certificate: &[u8], spki: &[u8]) -> Result<(), TlsError> {
        let (key, whole) = (key_pin(spki), certificate_pin(certificate));
        if self.0.is_empty() || self.0.contains(&key) || self.0.contains(&whole) {
            return Ok(());
        }
        let shown: Vec<&str> = self.0.iter().take(SHOWN_PINS).map(String::as_str).collect();
        let more =
            if self.0.len() > SHOWN_PINS { format!(" or {} more", self.0.len() - SHOWN_PINS) } else { String::new() };
        let fault = format!(
            "the server does not match any pin. It has {key} (key) and {whole} (certificate); expected: {}{more}. If the \
             operator confirms that the key has changed, replace the pin; otherwise the connection may be intercepted",
            shown.join(" or ")
        );
        Err(TlsError::new(TlsFailure::PinMismatch, fault))
    }
}

/// Pins are compared as text: another encoding of the same digest would never match.
fn is_pin(pin: &str) -> bool {
    let digest = pin.strip_prefix(KEY_PREFIX).or_else(|| pin.strip_prefix(CERTIFICATE_PREFIX));
    digest.and_then(base64::decode_padded).is_some_and(|digest| digest.len() == DIGEST_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pins: &[&str]) -> Result<Pins, TlsError> {
        Pins::parse(&pins.iter().map(|&pin| pin.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn malformed_pins_are_refused() {
        let good = key_pin(b"key");
        assert!(parse(&[&good, &certificate_pin(b"certificate")]).is_ok());
        let digest = &good[KEY_PREFIX.len()..];
        for bad in
            ["", "sha256/", digest, &format!("sha1/{digest}"), &format!("sha256/{}", &digest[..40]), "sha256/Zm8="]
        {
            assert_eq!(parse(&[&good, bad]).unwrap_err().failure, TlsFailure::PinMalformed, "{bad}");
        }
        let many: Vec<String> = (0..65u8).map(|index| key_pin(&[index])).collect();
        assert_eq!(Pins::parse(&many).unwrap_err().failure, TlsFailure::PinMalformed);
    }

    #[test]
    fn one_of_several_pins_must_match_key_or_certificate() {
        let pins = parse(&[&key_pin(b"key"), &key_pin(b"next key")]).unwrap();
        assert!(pins.check(b"certificate", b"key").is_ok());
        assert!(pins.check(b"certificate", b"next key").is_ok());
        assert_eq!(pins.check(b"certificate", b"other").unwrap_err().failure, TlsFailure::PinMismatch);
        assert!(parse(&[&certificate_pin(b"certificate")]).unwrap().check(b"certificate", b"other").is_ok());
        assert!(Pins::default().check(b"any", b"any").is_ok());
    }
}
