//! Values: params, results and items.

use crate::error::{guard, Error, Failure};
use crate::pointer::{free, give, read, text};
use serde_json::{Map, Number, Value as Json};
use std::ffi::{c_char, CString};
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

fn from_json(json: Json) -> Result<codec::Value, Failure> {
    Ok(match json {
        Json::Null => codec::Value::Nil,
        Json::Bool(value) => value.into(),
        Json::Number(number) => match (number.as_i128(), number.as_f64()) {
            (Some(value), _) => codec::Value::Int(value),
            (_, Some(value)) => value.into(),
            _ => return Err(Failure::argument("a number is out of range")),
        },
        Json::String(text) => text.into(),
        Json::Array(values) => codec::Value::Array(values.into_iter().map(from_json).collect::<Result<_, _>>()?),
        Json::Object(entries) => match single(&entries) {
            Some((BIN, hex)) => codec::Value::Bin(from_hex(hex)?),
            Some((FLOAT, name)) => {
                codec::Value::Float(name.parse().map_err(|_| Failure::argument("$float must be nan, inf or -inf"))?)
            }
            _ => {
                let entries = entries.into_iter().map(|(key, value)| Ok((key, from_json(value)?)));
                codec::Value::Map(entries.collect::<Result<_, Failure>>()?)
            }
        },
    })
}

/// Return the key and text of a map that has just one key.
fn single(entries: &Map<String, Json>) -> Option<(&str, &str)> {
    let (key, value) = entries.iter().next()?;
    Some((key, value.as_str().filter(|_| entries.len() == 1)?))
}

fn from_hex(hex: &str) -> Result<Vec<u8>, Failure> {
    let invalid = || Failure::argument("$bin must be hexadecimal");
    let digits: Option<Vec<u32>> = hex.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0).ok_or_else(invalid)?;
    digits.chunks(2).map(|pair| u8::try_from(16 * pair[0] + pair[1]).map_err(|_| invalid())).collect()
}

/// Make a value from JSON. {"$bin": "00ff"} is a bin of these bytes, and {"$float": "nan"}, "inf" or "-inf" is that float;
/// a number without a fraction is an int.
#[no_mangle]
pub unsafe extern "C" fn zcp_value_from_json(
    json: *const c_char,
    value: *mut *mut Value,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a text.
        let json = unsafe { text(json, "json") }?;
        let json = serde_json::from_str(json).map_err(|error| Failure::argument(&format!("json: {error}")))?;
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
