//! Bodies: one msgpack value each (zcp1.md, section 12).
//!
//! Rules: exactly one value, str keys, valid UTF-8, no ext types, at most [`MAX_DEPTH`] levels of nesting (the outermost
//! container is level 1), and memory in proportion to the bytes present. A body is scanned before anything is made of it, so
//! an invalid one allocates nothing; the declared size of a container is never trusted beyond the bytes that follow it.
//!
//! A value is either a [`Value`] or any type of serde. An int is any integer from -2^63 to 2^64 - 1, a struct is a map with
//! its fields, an option is its value or nil, an enum is its variant's name or a map with that one key, and bytes are
//! [`Bytes`] (a `Vec<u8>` is an array of ints). Types with a text form, such as `IpAddr`, use it: the other side can be in any
//! language.

mod de;
mod error;
mod read;
mod ser;
mod value;
mod write;

pub use error::CodecError;
pub use value::{Bytes, Value};
pub(crate) use write::{write_array, write_bin, write_int, write_map, write_str};

use read::Reader;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How deep arrays and maps can be nested.
pub const MAX_DEPTH: usize = 32;

type Result<T> = std::result::Result<T, CodecError>;

/// Check that a body is one valid value, nested at most `max_depth` deep. Allocates nothing.
///
/// # Errors
///
/// The first fault, in the order of the bytes.
pub fn scan(body: &[u8], max_depth: usize) -> Result<()> {
    if body.is_empty() {
        return Err(CodecError::new("body is empty"));
    }
    let mut reader = Reader::new(body);
    reader.skip(max_depth)?;
    reader.finish()
}

/// Decode a body.
///
/// # Errors
///
/// The body is invalid.
pub fn decode(body: &[u8]) -> Result<Value> {
    decode_within(body, MAX_DEPTH)
}

/// Decode a body that is nested at most `max_depth` deep.
pub(crate) fn decode_within(body: &[u8], max_depth: usize) -> Result<Value> {
    scan(body, max_depth)?;
    value::build(&mut Reader::new(body))
}

/// Encode a value.
///
/// # Errors
///
/// An int is out of range, or the value is nested too deep.
pub fn encode(value: &Value) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    write_value(&mut out, value)?;
    Ok(out)
}

/// Append the encoding of a value. After an error `out` has a part of it.
pub(crate) fn write_value(out: &mut Vec<u8>, value: &Value) -> Result<()> {
    value.serialize(&mut ser::Serializer::new(out, MAX_DEPTH))
}

/// Decode a body into a type of serde.
///
/// # Errors
///
/// The body is invalid, or does not match the type.
pub fn from_slice<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    scan(body, MAX_DEPTH)?;
    from_scanned(body)
}

/// Decode a body that was found valid.
pub(crate) fn from_scanned<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    let mut deserializer = de::Deserializer::new(body);
    let value = T::deserialize(&mut deserializer)?;
    deserializer.finish()?;
    Ok(value)
}

/// Encode a value of serde.
///
/// # Errors
///
/// An int is out of range, a key of a map is not a str, the value is nested too deep, or its `Serialize` failed.
pub fn to_vec<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(64);
    to_writer(&mut out, value)?;
    Ok(out)
}

/// Append the encoding of a value of serde. After an error `out` is as before.
///
/// # Errors
///
/// Those of [`to_vec`].
pub fn to_writer<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) -> Result<()> {
    let start = out.len();
    let done = value.serialize(&mut ser::Serializer::new(out, MAX_DEPTH));
    if done.is_err() {
        out.truncate(start);
    }
    done
}
