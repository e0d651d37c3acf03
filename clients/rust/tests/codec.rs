//! Bodies: types of serde and values, what is refused, and how errors read.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::net::{IpAddr, Ipv4Addr};
use zcproto::codec::{Bytes, CodecError, MAX_DEPTH, Value, decode, encode, from_slice, scan, to_vec, to_writer};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
    name: String,
    price: f64,
    tags: Vec<String>,
    note: Option<String>,
    data: Bytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<Box<Order>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Shape {
    Empty,
    Circle(f64),
    Line(i32, i32),
    Rect { w: u32, h: u32 },
    Unit(()),
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Flat {
    a: u8,
    #[serde(flatten)]
    more: BTreeMap<String, Value>,
}

fn round_trip<T: Serialize + serde::de::DeserializeOwned + PartialEq + Debug>(value: &T) -> Vec<u8> {
    let body = to_vec(value).unwrap();
    scan(&body, MAX_DEPTH).unwrap();
    assert_eq!(&from_slice::<T>(&body).unwrap(), value);
    // The same through a Value, in both directions.
    let tree = decode(&body).unwrap();
    assert_eq!(&from_slice::<T>(&encode(&tree).unwrap()).unwrap(), value);
    assert_eq!(to_vec(&tree).unwrap(), encode(&tree).unwrap());
    body
}

fn phrase<T: Debug>(result: Result<T, CodecError>) -> String {
    result.unwrap_err().phrase().to_owned()
}

#[test]
fn a_struct_is_a_map_with_its_fields() {
    let order = Order { id: 7, name: "tea".into(), data: vec![1, 2].into(), ..Order::default() };
    let body = round_trip(&order);
    assert_eq!(body[0], 0x86);
    let nested = Order { parent: Some(Box::new(order)), tags: vec!["a".into(), "b".into()], ..Order::default() };
    round_trip(&nested);
}

#[test]
fn an_enum_is_its_name_or_a_map_with_one_key() {
    assert_eq!(round_trip(&Shape::Empty), b"\xa5empty");
    assert_eq!(&round_trip(&Shape::Circle(0.5))[..8], b"\x81\xa6circle");
    round_trip(&Shape::Line(-1, 1));
    round_trip(&vec![Shape::Rect { w: 1, h: 2 }, Shape::Unit(())]);
    for wrong in [
        to_vec(&Value::from([("circle", 1), ("line", 2)])),
        to_vec(&Value::from([("circle", "x")])),
        to_vec(&Value::from([("empty", 1)])),
        to_vec(&7),
        to_vec("square"),
    ] {
        assert!(from_slice::<Shape>(&wrong.unwrap()).is_err());
    }
    assert_eq!(from_slice::<Shape>(&to_vec(&Value::from([("empty", Value::Nil)])).unwrap()), Ok(Shape::Empty));
}

#[test]
fn scalars_have_their_shortest_form() {
    for (value, hex) in [
        (0, "00"),
        (127, "7f"),
        (128, "cc80"),
        (255, "ccff"),
        (256, "cd0100"),
        (65_535, "cdffff"),
        (65_536, "ce00010000"),
        (4_294_967_295, "ceffffffff"),
        (4_294_967_296, "cf0000000100000000"),
        (i128::from(u64::MAX), "cfffffffffffffffff"),
        (-1, "ff"),
        (-32, "e0"),
        (-33, "d0df"),
        (-128, "d080"),
        (-129, "d1ff7f"),
        (-32_768, "d18000"),
        (-32_769, "d2ffff7fff"),
        (-2_147_483_648, "d280000000"),
        (-2_147_483_649, "d3ffffffff7fffffff"),
        (i128::from(i64::MIN), "d38000000000000000"),
    ] {
        let body = encode(&Value::Int(value)).unwrap();
        assert_eq!(body.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}")), hex);
        assert_eq!(decode(&body), Ok(Value::Int(value)));
        assert_eq!(to_vec(&value).unwrap(), body);
        assert_eq!(from_slice::<i128>(&body), Ok(value));
    }
    round_trip(&(true, false, 'x', 'ß', 1.5_f32, f64::INFINITY, ()));
    assert!(from_slice::<f64>(&to_vec(&f64::NAN).unwrap()).unwrap().is_nan());
    assert_eq!(from_slice::<f64>(&to_vec(&7).unwrap()), Ok(7.0));
    assert!(from_slice::<u8>(&to_vec(&256).unwrap()).is_err());
    assert!(from_slice::<u32>(&to_vec(&-1).unwrap()).is_err());
    assert!(from_slice::<i64>(&to_vec(&u64::MAX).unwrap()).is_err());
}

#[test]
fn sizes_have_their_shortest_form() {
    for (size, text, bytes) in [(31, 1, 2), (32, 2, 2), (255, 2, 2), (256, 3, 3), (65_535, 3, 3), (65_536, 5, 5)] {
        assert_eq!(round_trip(&"x".repeat(size)).len(), text + size);
        assert_eq!(round_trip(&Bytes(vec![1; size])).len(), bytes + size);
    }
    for (size, start) in [(15, 1), (16, 3), (255, 3), (256, 3), (65_535, 3), (65_536, 5)] {
        assert_eq!(round_trip(&vec![(); size]).len(), start + size);
        let map: BTreeMap<String, bool> = (0..size).map(|key| (format!("{key:05}"), true)).collect();
        assert_eq!(round_trip(&map).len(), start + 7 * size);
    }
}

#[test]
fn a_container_of_unknown_size_gets_its_size_at_the_end() {
    let flat = Flat { a: 1, more: BTreeMap::from([("b".into(), Value::from(vec![1, 2]))]) };
    let body = round_trip(&flat);
    assert_eq!(body[..5], [0xdf, 0, 0, 0, 2]);
}

#[test]
fn bytes_are_bin_and_types_with_a_text_form_use_it() {
    assert_eq!(to_vec(&Bytes(vec![1, 2])).unwrap(), [0xc4, 2, 1, 2]);
    assert_eq!(to_vec(&vec![1_u8, 2]).unwrap(), [0x92, 1, 2]);
    assert!(from_slice::<Bytes>(&to_vec("ab").unwrap()).is_err());
    assert_eq!(round_trip(&IpAddr::V4(Ipv4Addr::LOCALHOST)), b"\xa9127.0.0.1");
}

#[test]
fn keys_of_maps_must_be_str() {
    assert_eq!(phrase(to_vec(&HashMap::from([(1, 2)]))), "value cannot be sent: map keys must be str");
    assert_eq!(phrase(to_vec(&HashMap::from([(Bytes(vec![1]), 2)]))), "value cannot be sent: map keys must be str");
    round_trip(&HashMap::from([('x', 1)]));
    assert_eq!(phrase(decode(&[0x81, 1, 2])), "map keys must be str");
    assert_eq!(phrase(scan(&[0x82, 0xa0, 0xc0, 0x90, 0xc0], MAX_DEPTH)), "map keys must be str");
}

#[test]
fn values_nested_too_deep_are_refused_in_both_directions() {
    #[derive(Serialize)]
    enum Deep {
        In(Box<Deep>),
        Out,
    }
    let nested = |depth: usize| (0..depth).fold(Value::Nil, |inner, _| Value::Array(vec![inner]));
    let deepest = encode(&nested(MAX_DEPTH)).unwrap();
    assert_eq!(decode(&deepest), Ok(nested(MAX_DEPTH)));
    assert_eq!(to_vec(&nested(MAX_DEPTH)).unwrap(), deepest);
    assert_eq!(phrase(encode(&nested(MAX_DEPTH + 1))), "value cannot be sent: nested too deep");
    assert_eq!(phrase(to_vec(&nested(MAX_DEPTH + 1))), "value cannot be sent: nested too deep");
    let mut body = vec![0x91];
    body.extend(&deepest);
    assert_eq!(phrase(decode(&body)), "nested too deep");
    assert_eq!(phrase(scan(&[0x91, 0x91, 0xc0], 1)), "nested too deep");
    assert_eq!(phrase(scan(&body, 1_000)), "nested too deep");
    // A variant with content is one level, and its own content another.
    let wrapped = |depth: usize| (0..depth).fold(Value::Nil, |inner, _| Value::from([("circle", inner)]));
    assert!(to_vec(&wrapped(MAX_DEPTH)).is_ok());
    let variants = |depth: usize| (0..depth).fold(Deep::Out, |inner, _| Deep::In(Box::new(inner)));
    assert!(decode(&to_vec(&variants(MAX_DEPTH)).unwrap()).is_ok());
    assert_eq!(phrase(to_vec(&variants(MAX_DEPTH + 1))), "value cannot be sent: nested too deep");
    // Levels that have ended do not count.
    assert!(to_vec(&vec![nested(MAX_DEPTH - 1); 3]).is_ok());
    assert!(to_vec(&vec![Shape::Rect { w: 1, h: 1 }; 50]).is_ok());
}

#[test]
fn ints_out_of_range_are_refused() {
    let text = "value cannot be sent: an int must be from -2^63 to 2^64 - 1";
    for value in [i128::from(u64::MAX) + 1, i128::from(i64::MIN) - 1] {
        assert_eq!(phrase(encode(&Value::Int(value))), text);
        assert_eq!(phrase(to_vec(&Value::Int(value))), text);
        assert_eq!(phrase(to_vec(&value)), text);
    }
    assert_eq!(phrase(to_vec(&u128::MAX)), text);
}

#[test]
fn a_failed_value_leaves_nothing_behind() {
    let mut out = vec![1, 2, 3];
    assert!(to_writer(&mut out, &("begun", i128::MAX)).is_err());
    assert_eq!(out, [1, 2, 3]);
    to_writer(&mut out, &true).unwrap();
    assert_eq!(out, [1, 2, 3, 0xc3]);
}

#[test]
fn a_wrong_declared_size_is_refused() {
    struct Liar;
    impl Serialize for Liar {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serde::ser::SerializeSeq::end(serializer.serialize_seq(Some(1))?)
        }
    }
    assert_eq!(phrase(to_vec(&Liar)), "value cannot be sent: its size is not the declared one");
}

#[test]
fn invalid_bodies_are_refused_with_a_phrase() {
    for (body, text) in [
        (&b""[..], "body is empty"),
        (b"\xc0\xc0", "bytes after the value"),
        (b"\xc1", "body is not one msgpack value of the allowed types"),
        (b"\xd4\x01\x00", "body is not one msgpack value of the allowed types"),
        (b"\xcd\x01", "body ends before its value does"),
        (b"\xdd\xff\xff\xff\xff", "body ends before its value does"),
        (b"\xdf\xff\xff\xff\xff\xa0", "body ends before its value does"),
        (b"\xa2\xc3\x28", "str is not UTF-8"),
        (b"\xa3\xed\xa0\x80", "str is not UTF-8"),
    ] {
        assert_eq!(phrase(scan(body, MAX_DEPTH)), text);
        assert_eq!(phrase(decode(body)), text);
        assert_eq!(phrase(from_slice::<serde::de::IgnoredAny>(body)), text);
        assert_eq!(phrase(from_slice::<String>(body)), text);
    }
}

#[test]
fn a_body_of_another_type_is_refused_with_a_bounded_message() {
    assert!(phrase(from_slice::<u32>(&to_vec("seven").unwrap())).contains("invalid type: string"));
    let hostile = phrase(from_slice::<u32>(&to_vec(&format!("\u{1b}[2J{}", "x".repeat(10_000))).unwrap()));
    assert!(hostile.len() < 300 && !hostile.contains('\u{1b}'), "{hostile}");
    assert_eq!(phrase(from_slice::<(u8,)>(&to_vec(&[1, 2]).unwrap())), "more values than the type has");
    assert!(from_slice::<(u8, u8)>(&to_vec(&[1]).unwrap()).is_err());
    assert!(from_slice::<Order>(&to_vec(&Value::from([("id", 1)])).unwrap()).is_err());
}

#[test]
fn unknown_fields_are_skipped_and_borrowing_is_not_needed() {
    #[derive(Debug, PartialEq, Deserialize)]
    struct Small {
        b: u8,
    }
    let body = to_vec(&Value::from([("a", Value::from(vec![[("x", 1)]; 3])), ("b", 2.into()), ("c", "z".into())]));
    assert_eq!(from_slice::<Small>(&body.unwrap()), Ok(Small { b: 2 }));
}

#[test]
fn the_last_of_repeated_keys_counts() {
    let value = decode(b"\x82\xa1a\x01\xa1a\x02").unwrap();
    assert_eq!(value.get("a"), Some(&Value::Int(2)));
    assert_eq!(from_slice::<HashMap<String, u8>>(b"\x82\xa1a\x01\xa1a\x02").unwrap()["a"], 2);
}

#[test]
fn accessors_return_only_their_type() {
    let value =
        Value::from([("list", Value::from(vec!["x"])), ("n", 1.into()), ("f", 1.5.into()), ("nil", Value::Nil)]);
    assert_eq!(value.get("list").and_then(Value::as_array), Some(&["x".into()][..]));
    assert_eq!(value.get("n").and_then(Value::as_int), Some(1));
    assert_eq!(value.get("n").and_then(Value::as_float), None);
    assert_eq!(value.get("f").and_then(Value::as_float), Some(1.5));
    assert!(value.get("nil").is_some_and(Value::is_nil));
    assert_eq!(value.as_map().map(<[_]>::len), Some(4));
    assert_eq!(value.as_str().or(Value::Nil.as_str()), None);
    assert_eq!(Value::from(true).as_bool(), Some(true));
    assert_eq!(Value::from(Bytes(vec![1])).as_bin(), Some(&[1][..]));
    assert_eq!(Value::from(None::<u8>), Value::default());
    assert_eq!(Value::Nil.get("x"), None);
}
