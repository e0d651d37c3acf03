//! Bodies out of types of serde.

use serde::ser::{self, Serialize};

use super::write::{
    OUT_OF_RANGE, TOO_DEEP, check_size, write_array, write_bin, write_bool, write_checked_int, write_f32, write_f64,
    write_int, write_map, write_nil, write_str,
};
use super::{CodecError, Result};

/// Appends values to `out`.
pub(super) struct Serializer<'a> {
    out: &'a mut Vec<u8>,
    depth: usize, // how many levels can still be entered
}

impl<'a> Serializer<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>, depth: usize) -> Self {
        Self { out, depth }
    }

    fn enter(&mut self) -> Result<()> {
        self.depth = self.depth.checked_sub(1).ok_or(TOO_DEEP)?;
        Ok(())
    }

    /// Start an array or map.
    fn container(&mut self, size: Option<usize>, is_map: bool) -> Result<Container<'_, 'a>> {
        self.enter()?;
        let start = self.out.len();
        if let Some(size) = size {
            check_size(size)?;
            if is_map {
                write_map(self.out, size);
            } else {
                write_array(self.out, size);
            }
        } else {
            // The form of 32 bits, with its size filled in at the end.
            self.out.extend([if is_map { 0xdf } else { 0xdd }, 0, 0, 0, 0]);
        }
        Ok(Container { to: self, size, count: 0, start, levels: 1 })
    }

    /// Start a variant with content: a map with its name as the one key.
    fn variant(&mut self, name: &str) -> Result<()> {
        self.enter()?;
        write_map(self.out, 1);
        write_str(self.out, name);
        Ok(())
    }
}

macro_rules! serialize_int {
    ($($method:ident: $int:ty,)*) => {$(
        fn $method(self, value: $int) -> Result<()> {
            write_int(self.out, value.into());
            Ok(())
        }
    )*};
}

impl<'s, 'a> ser::Serializer for &'s mut Serializer<'a> {
    type Ok = ();
    type Error = CodecError;
    type SerializeSeq = Container<'s, 'a>;
    type SerializeTuple = Container<'s, 'a>;
    type SerializeTupleStruct = Container<'s, 'a>;
    type SerializeTupleVariant = Container<'s, 'a>;
    type SerializeMap = Container<'s, 'a>;
    type SerializeStruct = Container<'s, 'a>;
    type SerializeStructVariant = Container<'s, 'a>;

    serialize_int! {
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64,
    }

    fn serialize_i128(self, value: i128) -> Result<()> {
        write_checked_int(self.out, value)
    }

    fn serialize_u128(self, value: u128) -> Result<()> {
        write_checked_int(self.out, i128::try_from(value).map_err(|_| OUT_OF_RANGE)?)
    }

    fn serialize_bool(self, value: bool) -> Result<()> {
        write_bool(self.out, value);
        Ok(())
    }

    fn serialize_f32(self, value: f32) -> Result<()> {
        write_f32(self.out, value);
        Ok(())
    }

    fn serialize_f64(self, value: f64) -> Result<()> {
        write_f64(self.out, value);
        Ok(())
    }

    fn serialize_char(self, value: char) -> Result<()> {
        self.serialize_str(value.encode_utf8(&mut [0; 4]))
    }

    fn serialize_str(self, text: &str) -> Result<()> {
        check_size(text.len())?;
        write_str(self.out, text);
        Ok(())
    }

    fn serialize_bytes(self, bytes: &[u8]) -> Result<()> {
        check_size(bytes.len())?;
        write_bin(self.out, bytes);
        Ok(())
    }

    fn serialize_unit(self) -> Result<()> {
        write_nil(self.out);
        Ok(())
    }

    fn serialize_none(self) -> Result<()> {
        self.serialize_unit()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<()> {
        value.serialize(self)
    }

    fn serialize_unit_struct(self, _name: &'static str) -> Result<()> {
        self.serialize_unit()
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _name: &'static str, value: &T) -> Result<()> {
        value.serialize(self)
    }

    fn serialize_unit_variant(self, _name: &'static str, _index: u32, variant: &'static str) -> Result<()> {
        self.serialize_str(variant)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<()> {
        self.variant(variant)?;
        value.serialize(&mut *self)?;
        self.depth += 1;
        Ok(())
    }

    fn serialize_seq(self, size: Option<usize>) -> Result<Container<'s, 'a>> {
        self.container(size, false)
    }

    fn serialize_tuple(self, size: usize) -> Result<Container<'s, 'a>> {
        self.container(Some(size), false)
    }

    fn serialize_tuple_struct(self, _name: &'static str, size: usize) -> Result<Container<'s, 'a>> {
        self.container(Some(size), false)
    }

    fn serialize_tuple_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        size: usize,
    ) -> Result<Container<'s, 'a>> {
        self.variant(variant)?;
        Ok(Container { levels: 2, ..self.container(Some(size), false)? })
    }

    fn serialize_map(self, size: Option<usize>) -> Result<Container<'s, 'a>> {
        self.container(size, true)
    }

    fn serialize_struct(self, _name: &'static str, size: usize) -> Result<Container<'s, 'a>> {
        self.container(Some(size), true)
    }

    fn serialize_struct_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        size: usize,
    ) -> Result<Container<'s, 'a>> {
        self.variant(variant)?;
        Ok(Container { levels: 2, ..self.container(Some(size), true)? })
    }
}

/// An array or map that has begun.
pub(super) struct Container<'s, 'a> {
    to: &'s mut Serializer<'a>,
    size: Option<usize>, // as declared
    count: usize,
    start: usize,
    levels: usize, // how many end with it
}

impl Container<'_, '_> {
    fn value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        value.serialize(&mut *self.to)
    }

    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        self.count += 1;
        self.value(value)
    }

    fn key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<()> {
        self.count += 1;
        let at = self.to.out.len();
        self.value(key)?;
        match self.to.out.get(at) {
            Some(0xa0..=0xbf | 0xd9..=0xdb) => Ok(()),
            _ => Err(CodecError::new("value cannot be sent: map keys must be str")),
        }
    }

    fn finish(self) -> Result<()> {
        self.to.depth += self.levels;
        match self.size {
            None => {
                check_size(self.count)?;
                let size = u32::try_from(self.count).unwrap_or(u32::MAX);
                self.to.out[self.start + 1..self.start + 5].copy_from_slice(&size.to_be_bytes());
                Ok(())
            }
            Some(size) if size == self.count => Ok(()),
            Some(_) => Err(CodecError::new("value cannot be sent: its size is not the declared one")),
        }
    }
}

macro_rules! serialize_elements {
    ($($trait:ident::$method:ident)*) => {$(
        impl ser::$trait for Container<'_, '_> {
            type Ok = ();
            type Error = CodecError;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
                self.element(value)
            }

            fn end(self) -> Result<()> {
                self.finish()
            }
        }
    )*};
}
serialize_elements! {
    SerializeSeq::serialize_element SerializeTuple::serialize_element SerializeTupleStruct::serialize_field
    SerializeTupleVariant::serialize_field
}

impl ser::SerializeMap for Container<'_, '_> {
    type Ok = ();
    type Error = CodecError;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<()> {
        self.key(key)
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        self.value(value)
    }

    fn end(self) -> Result<()> {
        self.finish()
    }
}

macro_rules! serialize_fields {
    ($($trait:ident)*) => {$(
        impl ser::$trait for Container<'_, '_> {
            type Ok = ();
            type Error = CodecError;

            fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<()> {
                self.key(name)?;
                self.value(value)
            }

            fn end(self) -> Result<()> {
                self.finish()
            }
        }
    )*};
}
serialize_fields! { SerializeStruct SerializeStructVariant }
