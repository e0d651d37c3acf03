//! Types of serde out of a body that was found valid.

use serde::de::{
    self, DeserializeSeed, EnumAccess, Error as _, MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};

use super::read::{Head, Reader};
use super::{CodecError, MAX_DEPTH, Result};

pub(super) struct Deserializer<'de> {
    reader: Reader<'de>,
}

impl<'de> Deserializer<'de> {
    pub(super) fn new(body: &'de [u8]) -> Self {
        Self { reader: Reader::new(body) }
    }

    pub(super) fn finish(&self) -> Result<()> {
        self.reader.finish()
    }
}

impl<'de> de::Deserializer<'de> for &mut Deserializer<'de> {
    type Error = CodecError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.reader.head()? {
            Head::Nil => visitor.visit_unit(),
            Head::Bool(value) => visitor.visit_bool(value),
            Head::Int(value) => match (u64::try_from(value), i64::try_from(value)) {
                (Ok(value), _) => visitor.visit_u64(value),
                (_, Ok(value)) => visitor.visit_i64(value),
                _ => visitor.visit_i128(value),
            },
            Head::Float(value) => visitor.visit_f64(value),
            Head::Str(size) => visitor.visit_borrowed_str(self.reader.text(size)?),
            Head::Bin(size) => visitor.visit_borrowed_bytes(self.reader.bytes(size)?),
            Head::Array(size) => {
                let mut values = Values { from: self, left: size };
                let value = visitor.visit_seq(&mut values)?;
                values.finish()?;
                Ok(value)
            }
            Head::Map(size) => {
                let mut entries = Values { from: self, left: size };
                let value = visitor.visit_map(&mut entries)?;
                entries.finish()?;
                Ok(value)
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.reader.nil() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        match self.reader.head()? {
            Head::Str(size) => {
                let name: de::value::BorrowedStrDeserializer<'_, CodecError> =
                    de::value::BorrowedStrDeserializer::new(self.reader.text(size)?);
                visitor.visit_enum(name)
            }
            Head::Map(1) => visitor.visit_enum(Variant(self)),
            _ => Err(CodecError::new("expected the name of a variant, or a map with one variant")),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.reader.skip(MAX_DEPTH)?;
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier
    }
}

/// The values of an array, or the entries of a map.
struct Values<'a, 'de> {
    from: &'a mut Deserializer<'de>,
    left: u32,
}

impl Values<'_, '_> {
    fn finish(&self) -> Result<()> {
        if self.left == 0 { Ok(()) } else { Err(CodecError::new("more values than the type has")) }
    }

    fn take(&mut self) -> bool {
        let has_next = self.left > 0;
        self.left -= u32::from(has_next);
        has_next
    }
}

impl<'de> SeqAccess<'de> for &mut Values<'_, 'de> {
    type Error = CodecError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>> {
        if self.take() { seed.deserialize(&mut *self.from).map(Some) } else { Ok(None) }
    }

    fn size_hint(&self) -> Option<usize> {
        usize::try_from(self.left).ok()
    }
}

impl<'de> MapAccess<'de> for &mut Values<'_, 'de> {
    type Error = CodecError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>> {
        if self.take() { seed.deserialize(&mut *self.from).map(Some) } else { Ok(None) }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value> {
        seed.deserialize(&mut *self.from)
    }

    fn size_hint(&self) -> Option<usize> {
        usize::try_from(self.left).ok()
    }
}

/// A variant with content: a map with its name as the one key.
struct Variant<'a, 'de>(&'a mut Deserializer<'de>);

impl<'de> EnumAccess<'de> for Variant<'_, 'de> {
    type Error = CodecError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self)> {
        Ok((seed.deserialize(&mut *self.0)?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_, 'de> {
    type Error = CodecError;

    fn unit_variant(self) -> Result<()> {
        if self.0.reader.nil() {
            return Ok(());
        }
        Err(CodecError::invalid_type(Unexpected::Other("a variant with content"), &"a unit variant"))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value> {
        seed.deserialize(self.0)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value> {
        de::Deserializer::deserialize_any(self.0, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, _fields: &'static [&'static str], visitor: V) -> Result<V::Value> {
        de::Deserializer::deserialize_any(self.0, visitor)
    }
}
