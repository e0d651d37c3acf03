//! Streams of items.

use super::{NIL, Pair, WALL, code_of, encoded, ended, failed, token};
use zcproto::core::Event;
use zcproto::frame::Kind;
use zcproto::{Code, Meta, Value};

#[test]
fn items_beyond_the_credit_end_the_connection() {
    let mut pair = Pair::new();
    let number = pair.open();
    for _ in 0..2 {
        assert!(matches!(pair.receive(Kind::Item, number, &token(), NIL)[..], [Event::Item { .. }]));
    }
    assert_eq!(ended(&pair.receive(Kind::Item, number, &token(), NIL)), Some(Code::ProtocolError));
    let mut pair = Pair::new();
    let number = pair.request();
    assert_eq!(ended(&pair.receive(Kind::Item, number, &token(), NIL)), Some(Code::ProtocolError));
}

#[test]
fn a_cancelled_stream_drops_items_and_is_cancelled_once() {
    let mut pair = Pair::new();
    let number = pair.open();
    pair.client.cancel(number, WALL);
    pair.client.cancel(number, WALL);
    let kinds: Vec<Kind> = pair.sent().iter().map(|(kind, ..)| *kind).collect();
    assert_eq!(kinds, [Kind::Open, Kind::Cancel]);
    for _ in 0..10 {
        assert!(pair.receive(Kind::Item, number, &token(), NIL).is_empty());
    }
    pair.error(number, Code::Cancelled, Value::Nil);
    assert_eq!((pair.client.open_streams(), pair.client.in_flight()), (0, 0));
}

#[test]
fn a_stale_item_cancels_its_stream() {
    let mut pair = Pair::new();
    let number = pair.open();
    assert_eq!(failed(&pair.receive_stale(Kind::Item, number, NIL)), (number, Code::DataLoss, true));
    assert!(matches!(pair.sent()[..], [(Kind::Open, ..), (Kind::Cancel, ..)]));
    assert!(pair.client.is_in_flight(number));
}

#[test]
fn items_are_sent_by_credit_and_within_their_size() {
    let mut pair = Pair::new();
    let number = pair.open();
    assert!(!pair.client.may_send_item(number));
    pair.receive(Kind::Credit, number, &token(), &[0x92, 1, 0xcd, 1, 0]);
    assert!(pair.client.may_send_item(number));
    let large = encoded(&"x".repeat(1_000).as_str().into());
    assert_eq!(code_of(&pair.client.send_item(number, &large, WALL).unwrap_err()), Some(Code::InvalidArgument));
    assert_eq!(code_of(&pair.client.send_item(number, &[0xc1], WALL).unwrap_err()), Some(Code::InvalidArgument));
    pair.client.send_item(number, NIL, WALL).unwrap();
    assert!(!pair.client.may_send_item(number));
    pair.client.end_items(number, WALL);
    pair.client.end_items(number, WALL);
    let kinds: Vec<Kind> = pair.sent().iter().map(|(kind, ..)| *kind).collect();
    assert_eq!(kinds, [Kind::Open, Kind::Item, Kind::End]);
}

#[test]
fn streams_are_limited_apart_from_requests() {
    let mut pair = Pair::new();
    pair.open();
    pair.open();
    let refused = pair.client.open("words", NIL, &token(), &Meta::default(), [1, 1], WALL).unwrap_err();
    assert_eq!(refused.as_call().unwrap().details.get("limit"), Some(&Value::Int(2)));
}
