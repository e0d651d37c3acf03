//! Reads msgpack: the one place that knows the first byte of each type. Nothing here allocates.

use super::{CodecError, MAX_DEPTH, Result};

const ENDS_EARLY: CodecError = CodecError::new("body ends before its value does");
const NOT_ALLOWED: CodecError = CodecError::new("body is not one msgpack value of the allowed types");
const TOO_DEEP: CodecError = CodecError::new("nested too deep");
pub(super) const KEYS: CodecError = CodecError::new("map keys must be str");
const NOT_UTF8: CodecError = CodecError::new("str is not UTF-8");
const TRAILING: CodecError = CodecError::new("bytes after the value");

/// The start of a value: all of a scalar, and the size of what follows.
pub(super) enum Head {
    Nil,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(u32),
    Bin(u32),
    Array(u32),
    Map(u32),
}

/// An array or map of which some values are still to be read.
#[derive(Clone, Copy)]
struct Level {
    left: u64, // a map has two values for each key
    is_map: bool,
}

pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    /// Check that nothing follows.
    pub(super) fn finish(&self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(TRAILING) }
    }

    /// Consume a nil, if it is next.
    pub(super) fn nil(&mut self) -> bool {
        let is_nil = self.rest.first() == Some(&0xc0);
        if is_nil {
            self.rest = &self.rest[1..];
        }
        is_nil
    }

    /// Consume the start of a value.
    pub(super) fn head(&mut self) -> Result<Head> {
        let [first] = self.fixed()?;
        Ok(match first {
            0x00..=0x7f => Head::Int(first.into()),
            0x80..=0x8f => Head::Map((first & 0x0f).into()),
            0x90..=0x9f => Head::Array((first & 0x0f).into()),
            0xa0..=0xbf => Head::Str((first & 0x1f).into()),
            0xc0 => Head::Nil,
            0xc2 => Head::Bool(false),
            0xc3 => Head::Bool(true),
            0xc4 => Head::Bin(self.size8()?),
            0xc5 => Head::Bin(self.size16()?),
            0xc6 => Head::Bin(self.size32()?),
            0xca => Head::Float(f32::from_be_bytes(self.fixed()?).into()),
            0xcb => Head::Float(f64::from_be_bytes(self.fixed()?)),
            0xcc => Head::Int(u8::from_be_bytes(self.fixed()?).into()),
            0xcd => Head::Int(u16::from_be_bytes(self.fixed()?).into()),
            0xce => Head::Int(u32::from_be_bytes(self.fixed()?).into()),
            0xcf => Head::Int(u64::from_be_bytes(self.fixed()?).into()),
            0xd0 => Head::Int(i8::from_be_bytes(self.fixed()?).into()),
            0xd1 => Head::Int(i16::from_be_bytes(self.fixed()?).into()),
            0xd2 => Head::Int(i32::from_be_bytes(self.fixed()?).into()),
            0xd3 => Head::Int(i64::from_be_bytes(self.fixed()?).into()),
            0xd9 => Head::Str(self.size8()?),
            0xda => Head::Str(self.size16()?),
            0xdb => Head::Str(self.size32()?),
            0xdc => Head::Array(self.size16()?),
            0xdd => Head::Array(self.size32()?),
            0xde => Head::Map(self.size16()?),
            0xdf => Head::Map(self.size32()?),
            0xe0..=0xff => Head::Int(i8::from_be_bytes([first]).into()),
            // 0xc1, which msgpack never uses, and the ext types
            0xc1 | 0xc7..=0xc9 | 0xd4..=0xd8 => return Err(NOT_ALLOWED),
        })
    }

    /// Consume the bytes of a bin.
    pub(super) fn bytes(&mut self, size: u32) -> Result<&'a [u8]> {
        let size = usize::try_from(size).map_err(|_| ENDS_EARLY)?;
        let (bytes, rest) = self.rest.split_at_checked(size).ok_or(ENDS_EARLY)?;
        self.rest = rest;
        Ok(bytes)
    }

    /// Consume the text of a str.
    pub(super) fn text(&mut self, size: u32) -> Result<&'a str> {
        std::str::from_utf8(self.bytes(size)?).map_err(|_| NOT_UTF8)
    }

    /// Consume one value of any type, and check it.
    pub(super) fn skip(&mut self, max_depth: usize) -> Result<()> {
        let max_depth = max_depth.min(MAX_DEPTH);
        let mut levels = [Level { left: 1, is_map: false }; MAX_DEPTH + 1];
        let mut depth = 0;
        loop {
            let level = &mut levels[depth];
            if level.left == 0 {
                if depth == 0 {
                    return Ok(());
                }
                depth -= 1;
                continue;
            }
            let is_key = level.is_map && level.left % 2 == 0;
            level.left -= 1;
            let inner = match self.head()? {
                Head::Str(size) => {
                    self.text(size)?;
                    continue;
                }
                _ if is_key => return Err(KEYS),
                Head::Nil | Head::Bool(_) | Head::Int(_) | Head::Float(_) => continue,
                Head::Bin(size) => {
                    self.bytes(size)?;
                    continue;
                }
                Head::Array(size) => Level { left: size.into(), is_map: false },
                Head::Map(size) => Level { left: 2 * u64::from(size), is_map: true },
            };
            if depth == max_depth {
                return Err(TOO_DEEP);
            }
            // Each value needs at least one byte.
            if inner.left > self.rest.len() as u64 {
                return Err(ENDS_EARLY);
            }
            depth += 1;
            levels[depth] = inner;
        }
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(ENDS_EARLY)?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn size8(&mut self) -> Result<u32> {
        Ok(u8::from_be_bytes(self.fixed()?).into())
    }

    fn size16(&mut self) -> Result<u32> {
        Ok(u16::from_be_bytes(self.fixed()?).into())
    }

    fn size32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.fixed()?))
    }
}
