//! Secrets: memory that is cleared when it is dropped, and never shown.

use std::fmt;
use zeroize::{Zeroize, Zeroizing};

/// The token of a session: 32 bytes that are cleared when dropped, and hidden from `Debug`.
///
/// A token gives access to everything that its user may do. Keep it as carefully as a password.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token([u8; 32]);

impl Token {
    /// The 32 zero bytes of a frame without a session.
    pub const NONE: Token = Token([0; 32]);

    /// Make a token from its bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Parse the 43 characters of base64url without padding. Return `None` for any other text.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let bytes = Zeroizing::new(crate::base64::decode_url(text)?);
        Some(Self(<[u8; 32]>::try_from(bytes.as_slice()).ok()?))
    }

    /// Return the token as text, as in the HTTP header `Authorization: Bearer`.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(crate::base64::encode_url(&self.0))
    }

    /// Return the bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Return whether these are the zero bytes of a frame without a session.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.0 == [0; 32]
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A text such as an API key: cleared when dropped, and hidden from `Debug`.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Return the text.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_hides_secrets() {
        assert_eq!(format!("{:?}", Token::new([7; 32])), "Token(..)");
        assert_eq!(format!("{:?}", Secret::from("hunter2")), "Secret(..)");
    }

    #[test]
    fn token_text_is_canonical_base64url() {
        let token = Token::new(std::array::from_fn(|index| u8::try_from(index * 8).unwrap()));
        let text = token.to_text();
        assert_eq!(text.len(), 43);
        assert_eq!(Token::from_text(&text), Some(token));
        let mut other = text.to_string();
        other.pop();
        other.push('B'); // the same bytes with other unused bits
        assert_eq!(Token::from_text(&other), None);
        assert_eq!(Token::from_text(&format!("{}=", *text)), None);
    }
}
