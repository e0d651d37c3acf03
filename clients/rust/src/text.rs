//! Untrusted text in messages.

use std::fmt::Write;

/// The longest message of a server that the application gets, in characters.
pub(crate) const MAX_MESSAGE: usize = 1_000;

/// Escape unprintable characters as `\xNN`, `\uNNNN` or `\UNNNNNNNN`, and truncate the text, so that it stays on one line
/// and moves no cursor of a terminal.
pub(crate) fn escape(text: &str, max_length: usize) -> String {
    let mut escaped = String::with_capacity(text.len().min(max_length));
    for (index, character) in text.chars().enumerate() {
        if index == max_length {
            escaped.push_str("...");
            break;
        }
        let _ = match (character, u32::from(character)) {
            ('\t', _) => escaped.write_str("\\t"),
            ('\n', _) => escaped.write_str("\\n"),
            ('\r', _) => escaped.write_str("\\r"),
            _ if is_printable(character) => escaped.write_char(character),
            (_, code @ ..=0xff) => write!(escaped, "\\x{code:02x}"),
            (_, code @ ..=0xffff) => write!(escaped, "\\u{code:04x}"),
            (_, code) => write!(escaped, "\\U{code:08x}"),
        };
    }
    escaped
}

/// Return whether a character has a form of its own: no control, format, private or unassigned character, and no separator
/// but the space. The standard library's own table is behind `escape_debug`.
fn is_printable(character: char) -> bool {
    matches!(character, ' ' | '\'' | '"' | '\\') || character.escape_debug().count() == 1
}

/// Escape a path for a message.
pub(crate) fn path(path: &std::path::Path) -> String {
    escape(&path.display().to_string(), 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escape("a\x1b[2Jb\n\u{202e}é\u{1f600}\u{a0}'\"\\", 100), "a\\x1b[2Jb\\n\\u202eé\u{1f600}\\xa0'\"\\");
        assert_eq!(escape("\u{f0000}", 100), "\\U000f0000");
    }

    #[test]
    fn long_text_is_truncated() {
        assert_eq!(escape("abcdef", 3), "abc...");
        assert_eq!(escape("abc", 3), "abc");
    }
}
