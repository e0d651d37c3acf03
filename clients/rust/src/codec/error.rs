use std::borrow::Cow;
use std::fmt;

/// The longest text of an error made from a message of serde, in characters: such messages repeat received values.
const MAX_MESSAGE: usize = 200;

/// An invalid body, a value that cannot be sent, or a body that does not match the requested type.
///
/// The phrase is safe to log: it is fixed, or a message of serde, shortened and with control characters escaped.
#[derive(Clone, PartialEq, Eq)]
pub struct CodecError(Cow<'static, str>);

impl CodecError {
    pub(crate) const fn new(phrase: &'static str) -> Self {
        Self(Cow::Borrowed(phrase))
    }

    /// Return what is wrong, as a phrase without a final stop.
    #[must_use]
    pub fn phrase(&self) -> &str {
        &self.0
    }

    fn custom(message: &dyn fmt::Display) -> Self {
        let message = message.to_string();
        let mut text: String = message.chars().take(MAX_MESSAGE).flat_map(escaped).collect();
        if message.chars().nth(MAX_MESSAGE).is_some() {
            text.push('…');
        }
        Self(Cow::Owned(text))
    }
}

/// Return a character as it may be shown on a terminal.
fn escaped(character: char) -> impl Iterator<Item = char> {
    let (shown, code) =
        if character.is_control() { (None, Some(character.escape_default())) } else { (Some(character), None) };
    shown.into_iter().chain(code.into_iter().flatten())
}

impl fmt::Debug for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CodecError").field(&self.0).finish()
    }
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CodecError {}

impl serde::de::Error for CodecError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::custom(&message)
    }
}

impl serde::ser::Error for CodecError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::custom(&message)
    }
}
