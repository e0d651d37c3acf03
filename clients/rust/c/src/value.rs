//! Values: params, results and items.

use crate::error::{guard, Error, Failure};
use crate::pointer::{free, give, read, text};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value as Json};
use std::ffi::{c_char, CString};
use std::fmt;
use std::sync::OnceLock;
use zcproto_client::codec;

/// The key of a map in JSON that stands for a bin: {"$bin": "00ff"}.
const BIN: &str = "$bin";
/// The key of a map in JSON that stands for a float that JSON does not have: {"$float": "nan"}.
const FLOAT: &str = "$float";

/// A value: params, the result of a call, or an item of a stream. It never changes.
pub struct Value {
    inner: codec::Value,
    json: OnceLock<CString>,
    msgpack: OnceLock<Vec<u8>>,
}

impl Value {
    pub(crate) fn new(value: codec::Value) -> Self {
        Self { inner: value, json: OnceLock::new(), msgpack: OnceLock::new() }
    }

    pub(crate) fn inner(&self) -> &codec::Value {
        &self.inner
    }

    pub(crate) fn json(&self) -> &CString {
        self.json.get_or_init(|| CString::new(to_json(&self.inner).to_string()).unwrap_or_default())
    }
}

/// Return a value as JSON.
pub(crate) fn to_json(value: &codec::Value) -> Json {
    match value {
        codec::Value::Nil => Json::Null,
        codec::Value::Bool(value) => (*value).into(),
        codec::Value::Int(value) => Number::from_i128(*value).map_or(Json::Null, Json::Number),
        codec::Value::Float(value) => Number::from_f64(*value).map_or_else(
            || Json::Object(Map::from_iter([(FLOAT.into(), value.to_string().to_lowercase().into())])),
            Json::Number,
        ),
        codec::Value::Str(text) => text.as_str().into(),
        codec::Value::Bin(bytes) => {
            let hex = bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
            Json::Object(Map::from_iter([(BIN.into(), hex.into())]))
        }
        codec::Value::Array(values) => values.iter().map(to_json).collect(),
        codec::Value::Map(entries) => {
            entries.iter().map(|(key, value)| (key.clone(), to_json(value))).collect::<Map<_, _>>().into()
        }
    }
}

/// A value of JSON that is being read.
struct Parsed(codec::Value);

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Parser).map(Self)
    }
}

struct Parser;

impl<'de> Visitor<'de> for Parser {
    type Value = codec::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<codec::Value, E> {
        Ok(codec::Value::Nil)
    }

    fn visit_bool<E>(self, value: bool) -> Result<codec::Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<codec::Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<codec::Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<codec::Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<codec::Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<codec::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Parsed(value)) = items.next_element()? {
            values.push(value);
        }
        Ok(codec::Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<codec::Value, A::Error> {
        let mut entries: Vec<(String, codec::Value)> = Vec::new();
        while let Some((key, Parsed(value))) = items.next_entry::<String, _>()? {
            entries.push((key, value));
        }
        if let [(key, codec::Value::Str(text))] = &entries[..] {
            match key.as_str() {
                BIN => {
                    return from_hex(text).map(codec::Value::Bin).ok_or(A::Error::custom("$bin must be hexadecimal"))
                }
                FLOAT => {
                    let float = text.parse().map_err(|_| A::Error::custom("$float must be nan, inf or -inf"));
                    return float.map(codec::Value::Float);
                }
                _ => {}
            }
        }
        let mut keys: Vec<&str> = entries.iter().map(|(key, _)| key.as_str()).collect();
        keys.sort_unstable();
        match keys.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(A::Error::custom(format!("the key {:?} is there twice", pair[0]))),
            None => Ok(codec::Value::Map(entries)),
        }
    }
}

fn from_json(json: &str) -> Result<codec::Value, Failure> {
    let Parsed(value) = serde_json::from_str(json).map_err(|error| Failure::argument(&format!("json: {error}")))?;
    match int_out_of_range(json) {
        Some(int) => {
            Err(Failure::argument(&format!("json: {int} does not fit into 64 bits; write {int}.0 for a float")))
        }
        None => Ok(value),
    }
}

/// Return the first int of valid JSON that msgpack cannot represent. `serde_json` makes a float of it.
fn int_out_of_range(json: &str) -> Option<&str> {
    let mut rest = json;
    while let Some(start) = rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit()) {
        rest = &rest[start..];
        if let Some(text) = rest.strip_prefix('"') {
            let mut is_escaped = false;
            let end = text.find(|c| {
                c == '"' && !is_escaped || {
                    is_escaped = c == '\\' && !is_escaped;
                    false
                }
            });
            rest = &text[end? + 1..];
            continue;
        }
        let end = rest.find(|c: char| !(c.is_ascii_digit() || "+-.eE".contains(c))).unwrap_or(rest.len());
        let (number, after) = rest.split_at(end);
        let is_int = !number.contains(['.', 'e', 'E']);
        let range = i128::from(i64::MIN)..=i128::from(u64::MAX);
        if is_int && !number.parse().is_ok_and(|int: i128| range.contains(&int)) {
            return Some(number);
        }
        rest = after;
    }
    None
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    let digits: Vec<u32> = hex.chars().map(|digit| digit.to_digit(16)).collect::<Option<_>>()?;
    let is_whole = digits.len() % 2 == 0;
    is_whole.then(|| digits.chunks(2).map_while(|pair| u8::try_from(16 * pair[0] + pair[1]).ok()).collect())
}

/// Make a value from JSON. {"$bin": "00ff"} is a bin of these bytes, and {"$float": "nan"}, "inf" or "-inf" is that float.
/// A number without a fraction and an exponent is an int, from -2^63 to 2^64 - 1; beyond that it is ZCP_ARGUMENT, and so is a
/// key that a map has twice.
#[no_mangle]
pub unsafe extern "C" fn zcp_value_from_json(
    json: *const c_char,
    value: *mut *mut Value,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a text.
        let json = unsafe { text(json, "json") }?;
        let made = from_json(json)?;
        codec::encode(&made).map_err(|error| Failure::argument(error.phrase()))?;
        // SAFETY: the caller passes a place for a value.
        unsafe { give(value, Value::new(made)) }
    })
}

/// Make a value from msgpack.
#[no_mangle]
pub unsafe extern "C" fn zcp_value_from_msgpack(
    bytes: *const u8,
    size: usize,
    value: *mut *mut Value,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        if bytes.is_null() {
            return Err(Failure::argument("bytes is NULL"));
        }
        // SAFETY: the caller passes `size` bytes.
        let bytes = unsafe { std::slice::from_raw_parts(bytes, size) };
        let made = codec::decode(bytes).map_err(|error| Failure::argument(error.phrase()))?;
        // SAFETY: the caller passes a place for a value.
        unsafe { give(value, Value::new(made)) }
    })
}

/// Return a value as JSON, in the form of `zcp_value_from_json`. Return NULL for NULL.
#[no_mangle]
pub unsafe extern "C" fn zcp_value_json(value: *const Value) -> *const c_char {
    // SAFETY: the caller passes a value.
    unsafe { read(value, |value| value.json().as_ptr()) }
}

/// Return a value as msgpack, and store its number of bytes in `size`. Return NULL for NULL.
#[no_mangle]
pub unsafe extern "C" fn zcp_value_msgpack(value: *const Value, size: *mut usize) -> *const u8 {
    // SAFETY: the caller passes a value.
    unsafe {
        read(value, |value| {
            let bytes = value.msgpack.get_or_init(|| codec::encode(&value.inner).unwrap_or_default());
            if !size.is_null() {
                *size = bytes.len();
            }
            bytes.as_ptr()
        })
    }
}

/// Free a value.
#[no_mangle]
pub unsafe extern "C" fn zcp_value_free(value: *mut Value) {
    // SAFETY: the caller passes a value for the last time.
    unsafe { free(value) }
}
