//! Base64 of RFC 4648: base64url without padding for tokens, base64 with padding for pins.

const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Encode bytes in base64url without padding.
pub(crate) fn encode_url(data: &[u8]) -> String {
    encode(data, URL)
}

/// Encode bytes in base64 with padding.
pub(crate) fn encode_padded(data: &[u8]) -> String {
    let mut text = encode(data, STANDARD);
    while text.len() % 4 != 0 {
        text.push('=');
    }
    text
}

/// Decode canonical base64url without padding.
pub(crate) fn decode_url(text: &str) -> Option<Vec<u8>> {
    decode(text, URL)
}

/// Decode canonical base64 with padding.
pub(crate) fn decode_padded(text: &str) -> Option<Vec<u8>> {
    let data = decode(text.trim_end_matches('='), STANDARD)?;
    (encode_padded(&data) == text).then_some(data)
}

fn encode(data: &[u8], alphabet: &[u8; 64]) -> String {
    let mut text = String::with_capacity(data.len().div_ceil(3) * 4);
    for group in data.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, &byte| (bits << 8) | u32::from(byte)) << (8 * (3 - group.len()));
        for index in 0..=group.len() {
            text.push(char::from(alphabet[((bits >> (18 - 6 * index)) & 63) as usize]));
        }
    }
    text
}

fn decode(text: &str, alphabet: &[u8; 64]) -> Option<Vec<u8>> {
    if text.len() % 4 == 1 {
        return None;
    }
    let mut data = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.bytes() {
        let value = alphabet.iter().position(|&each| each == byte)?;
        bits = (bits << 6) | u32::try_from(value).ok()?;
        count += 6;
        if count >= 8 {
            count -= 8;
            data.push(((bits >> count) & 0xff) as u8);
        }
    }
    (bits & ((1 << count) - 1) == 0).then_some(data) // the unused bits must be zero
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_the_examples_of_rfc_4648() {
        for (data, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            assert_eq!(encode_padded(data.as_bytes()), text);
            assert_eq!(decode_padded(text).as_deref(), Some(data.as_bytes()));
        }
    }

    #[test]
    fn refuses_text_that_is_not_canonical() {
        for text in ["Zg", "Zg=", "Zh==", "Z", "Zg==\n", "Zm9v===="] {
            assert_eq!(decode_padded(text), None, "{text:?}");
        }
        assert_eq!(decode_url("_-8"), Some(vec![0xff, 0xef]));
        assert_eq!(decode_url("_-9"), None);
    }
}
