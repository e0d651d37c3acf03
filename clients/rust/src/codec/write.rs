//! Writes msgpack, in the shortest form of each value.
//!
//! Sizes are at most 2^32 - 1: functions that take values of the application check that with [`check_size`].

use super::{CodecError, Result};

pub(super) const TOO_DEEP: CodecError = CodecError::new("value cannot be sent: nested too deep");
pub(super) const OUT_OF_RANGE: CodecError =
    CodecError::new("value cannot be sent: an int must be from -2^63 to 2^64 - 1");
const TOO_LARGE: CodecError = CodecError::new("value cannot be sent: too large");

/// Check the size of a str, bin, array or map.
pub(super) fn check_size(size: usize) -> Result<()> {
    u32::try_from(size).map(drop).map_err(|_| TOO_LARGE)
}

pub(super) fn write_nil(out: &mut Vec<u8>) {
    out.push(0xc0);
}

pub(super) fn write_bool(out: &mut Vec<u8>, value: bool) {
    out.push(if value { 0xc3 } else { 0xc2 });
}

/// Append an int from -2^63 to 2^64 - 1.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "each arm has a range that fits")]
pub(crate) fn write_int(out: &mut Vec<u8>, value: i128) {
    match value {
        -0x20..=0x7f => out.push(value as u8),
        0x80..=0xff => out.extend([0xcc, value as u8]),
        0x100..=0xffff => sized(out, 0xcd, &(value as u16).to_be_bytes()),
        0x1_0000..=0xffff_ffff => sized(out, 0xce, &(value as u32).to_be_bytes()),
        0x1_0000_0000.. => sized(out, 0xcf, &(value as u64).to_be_bytes()),
        -0x80..=-0x21 => out.extend([0xd0, value as u8]),
        -0x8000..=-0x81 => sized(out, 0xd1, &(value as i16).to_be_bytes()),
        -0x8000_0000..=-0x8001 => sized(out, 0xd2, &(value as i32).to_be_bytes()),
        ..=-0x8000_0001 => sized(out, 0xd3, &(value as i64).to_be_bytes()),
    }
}

/// Append an int of the application.
pub(super) fn write_checked_int(out: &mut Vec<u8>, value: i128) -> Result<()> {
    if value < i64::MIN.into() || value > u64::MAX.into() {
        return Err(OUT_OF_RANGE);
    }
    write_int(out, value);
    Ok(())
}

pub(super) fn write_f32(out: &mut Vec<u8>, value: f32) {
    sized(out, 0xca, &value.to_be_bytes());
}

pub(super) fn write_f64(out: &mut Vec<u8>, value: f64) {
    sized(out, 0xcb, &value.to_be_bytes());
}

pub(crate) fn write_str(out: &mut Vec<u8>, text: &str) {
    match size_of(text.len()) {
        Size::Tiny(size) if size < 0x20 => out.push(0xa0 | size),
        Size::Tiny(size) => out.extend([0xd9, size]),
        Size::Short(size) => sized(out, 0xda, &size.to_be_bytes()),
        Size::Long(size) => sized(out, 0xdb, &size.to_be_bytes()),
    }
    out.extend_from_slice(text.as_bytes());
}

pub(crate) fn write_bin(out: &mut Vec<u8>, bytes: &[u8]) {
    match size_of(bytes.len()) {
        Size::Tiny(size) => out.extend([0xc4, size]),
        Size::Short(size) => sized(out, 0xc5, &size.to_be_bytes()),
        Size::Long(size) => sized(out, 0xc6, &size.to_be_bytes()),
    }
    out.extend_from_slice(bytes);
}

/// Append the start of an array; its elements follow.
pub(crate) fn write_array(out: &mut Vec<u8>, size: usize) {
    match size_of(size) {
        Size::Tiny(size) if size < 0x10 => out.push(0x90 | size),
        Size::Tiny(size) => sized(out, 0xdc, &u16::from(size).to_be_bytes()),
        Size::Short(size) => sized(out, 0xdc, &size.to_be_bytes()),
        Size::Long(size) => sized(out, 0xdd, &size.to_be_bytes()),
    }
}

/// Append the start of a map; its keys and values follow in turn.
pub(crate) fn write_map(out: &mut Vec<u8>, size: usize) {
    match size_of(size) {
        Size::Tiny(size) if size < 0x10 => out.push(0x80 | size),
        Size::Tiny(size) => sized(out, 0xde, &u16::from(size).to_be_bytes()),
        Size::Short(size) => sized(out, 0xde, &size.to_be_bytes()),
        Size::Long(size) => sized(out, 0xdf, &size.to_be_bytes()),
    }
}

/// A size in the number of bytes that it needs.
enum Size {
    Tiny(u8),
    Short(u16),
    Long(u32),
}

fn size_of(size: usize) -> Size {
    if let Ok(size) = u8::try_from(size) {
        Size::Tiny(size)
    } else if let Ok(size) = u16::try_from(size) {
        Size::Short(size)
    } else {
        Size::Long(u32::try_from(size).unwrap_or(u32::MAX))
    }
}

fn sized(out: &mut Vec<u8>, first: u8, bytes: &[u8]) {
    out.push(first);
    out.extend_from_slice(bytes);
}
