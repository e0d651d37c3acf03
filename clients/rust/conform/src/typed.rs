//! The typed JSON of the test vectors.

use serde_json::{Value as Json, json};
use zcproto::codec::Value;

const MAX_EXACT: i128 = (1 << 53) - 1;

/// Encode a value as typed JSON.
#[must_use]
pub fn typed(value: &Value) -> Json {
    match value {
        Value::Nil => Json::Null,
        Value::Bool(value) => json!(value),
        Value::Int(value) => match i64::try_from(*value) {
            Ok(small) if value.abs() <= MAX_EXACT => json!(small),
            _ => json!({"int": value.to_string()}),
        },
        Value::Float(value) => json!({"float64": format!("{:016x}", value.to_bits())}),
        Value::Str(text) => json!(text),
        Value::Bin(bytes) => json!({"bin": to_hex(bytes)}),
        Value::Array(values) => values.iter().map(typed).collect(),
        Value::Map(entries) => {
            let entries: serde_json::Map<String, Json> =
                entries.iter().map(|(key, value)| (key.clone(), typed(value))).collect();
            json!({"map": entries})
        }
    }
}

/// Decode a value from typed JSON. Return `None` for any other JSON.
#[must_use]
pub fn untyped(json: &Json) -> Option<Value> {
    Some(match json {
        Json::Null => Value::Nil,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => Value::Int(number.as_i64().map(i128::from).or(number.as_u64().map(i128::from))?),
        Json::String(text) => Value::Str(text.clone()),
        Json::Array(values) => Value::Array(values.iter().map(untyped).collect::<Option<_>>()?),
        Json::Object(object) => {
            let (name, content) = object.iter().next()?;
            match (name.as_str(), content) {
                ("int", Json::String(text)) => Value::Int(text.parse().ok()?),
                ("float64", Json::String(bits)) => Value::Float(f64::from_bits(u64::from_str_radix(bits, 16).ok()?)),
                ("bin", Json::String(hex)) => Value::Bin(from_hex(hex)?),
                ("map", Json::Object(entries)) => Value::Map(
                    entries.iter().map(|(key, value)| Some((key.clone(), untyped(value)?))).collect::<Option<_>>()?,
                ),
                _ => return None,
            }
        }
    })
}

/// Encode bytes in hexadecimal.
#[must_use]
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// Decode hexadecimal. Return `None` for any other text.
#[must_use]
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    digits.chunks(2).map(|pair| u8::try_from(16 * pair[0] + pair[1]).ok()).collect()
}
