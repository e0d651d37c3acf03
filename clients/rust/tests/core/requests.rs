//! Requests and their answers: limits, numbers, stale and replayed frames.

use super::{NIL, Pair, WALL, code_of, encoded, ended, failed, map, token};
use std::time::Duration;
use zcproto::core::{Conversation, Event, FRAME_TIMEOUT, Settings, State};
use zcproto::frame::Kind;
use zcproto::{Code, Error, Meta, Token, Value};

#[test]
fn nothing_can_be_sent_before_welcome_and_after_the_end() {
    let mut client = Conversation::new(Settings::default());
    let refused = client.request("echo", NIL, &token(), &Meta::default(), WALL).unwrap_err();
    assert_eq!(code_of(&refused), Some(Code::Unavailable));
    client.ping(WALL);
    assert!(client.take_output().is_empty());
    let mut pair = Pair::new();
    pair.client.end();
    assert!(matches!(pair.client.request("echo", NIL, &token(), &Meta::default(), WALL), Err(Error::Closed(_))));
    assert!(pair.receive(Kind::Ping, 0, &Token::NONE, &[]).is_empty());
}

#[test]
fn requests_are_limited_by_number_and_by_size() {
    let mut pair = Pair::new();
    let large = encoded(&map(&[("text", "x".repeat(20_000).into())]));
    let send = |pair: &mut Pair| pair.client.request("echo", &large, &token(), &Meta::default(), WALL);
    let error = send(&mut pair).unwrap_err();
    assert_eq!(error.as_call().unwrap().details.get("limit"), Some(&Value::Int(16_384)));
    let number = pair.request();
    pair.receive(Kind::Response, number, &token(), NIL); // the server has accepted the token
    assert!(pair.client.has_session());
    send(&mut pair).unwrap();
    for _ in 0..3 {
        pair.request();
    }
    assert!(!pair.client.may_request());
    assert_eq!(code_of(&send(&mut pair).unwrap_err()), Some(Code::ResourceExhausted));
    pair.client.cancel(2, WALL);
    assert!(!pair.client.may_request(), "a cancelled request is in flight until its answer");
    pair.error(2, Code::Cancelled, Value::Nil);
    assert!(pair.client.may_request());
}

#[test]
fn numbers_in_flight_are_skipped() {
    let mut pair = Pair::new();
    pair.client.set_next_stream(u32::MAX);
    assert_eq!([pair.request(), pair.request()], [u32::MAX, 1]);
    pair.client.set_next_stream(u32::MAX);
    assert_eq!(pair.request(), 2);
}

#[test]
fn malformed_requests_are_refused_and_not_sent() {
    let mut pair = Pair::new();
    let key = "k".repeat(65);
    for (method, params, key) in
        [("No", NIL, None), ("", NIL, None), ("a", &[0x90][..], None), ("a", NIL, Some("")), ("a", NIL, Some(&*key))]
    {
        let meta = Meta { idempotency_key: key, ..Meta::default() };
        let error = pair.client.request(method, params, &token(), &meta, WALL).unwrap_err();
        assert_eq!(code_of(&error), Some(Code::InvalidArgument), "{method}");
    }
    assert!(pair.sent().is_empty());
    assert_eq!(pair.client.in_flight(), 0);
}

#[test]
fn an_answer_that_cannot_be_read_fails_its_call_alone() {
    let mut pair = Pair::new();
    let number = pair.request();
    assert_eq!(failed(&pair.receive(Kind::Response, number, &token(), &[0xc1])), (number, Code::Internal, false));
    let number = pair.request();
    assert_eq!(failed(&pair.receive(Kind::Error, number, &token(), &[0x90])), (number, Code::Internal, false));
    assert_eq!(pair.client.state(), State::Open);
    assert_eq!(ended(&pair.receive(Kind::Error, 0, &Token::NONE, &[0x90])), Some(Code::ProtocolError));
}

#[test]
fn answers_to_nothing_are_dropped_and_counted() {
    let mut pair = Pair::new();
    assert!(pair.receive(Kind::Response, 9, &token(), NIL).is_empty());
    assert!(pair.receive(Kind::Item, 9, &token(), NIL).is_empty());
    assert!(pair.error(9, Code::NotFound, Value::Nil).is_empty());
    assert_eq!(pair.client.dropped_unknown(), 3);
}

#[test]
fn an_unknown_code_is_an_error_of_the_call() {
    let mut pair = Pair::new();
    let number = pair.request();
    let body = encoded(&Value::Array(vec![Value::Int(99), "new".into()]));
    match &pair.receive(Kind::Error, number, &token(), &body)[..] {
        [Event::Failed { error, .. }] => {
            assert_eq!((error.code, error.message.as_str()), (Code::Unknown, "new (code 99)"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_stale_answer_fails_its_call_at_once() {
    let mut pair = Pair::new();
    let number = pair.request();
    assert_eq!(failed(&pair.receive_stale(Kind::Response, number, NIL)), (number, Code::DataLoss, true));
    assert!(pair.receive_stale(Kind::Response, number, NIL).is_empty());
    assert_eq!(pair.client.dropped_stale(), 1);
}

#[test]
fn the_tenth_stale_frame_in_a_row_ends_the_connection() {
    let mut pair = Pair::new();
    for _ in 0..9 {
        assert!(pair.receive_stale(Kind::Ping, 0, &[]).is_empty());
    }
    pair.receive(Kind::Ping, 0, &Token::NONE, &[]); // which resets the count
    for _ in 0..9 {
        assert!(pair.receive_stale(Kind::Ping, 0, &[]).is_empty());
    }
    assert_eq!(ended(&pair.receive_stale(Kind::Ping, 0, &[])), Some(Code::StaleTimestamp));
}

#[test]
fn a_stale_error_with_the_servers_time_corrects_the_clock() {
    let mut pair = Pair::new();
    let number = pair.request();
    pair.wall += 7_200_000; // this machine's clock jumps
    let time = map(&[("server_time", WALL.into())]);
    let body = encoded(&Value::Array(vec![Value::Int(67), "stale".into(), time]));
    let bytes = pair.frame(Kind::Error, number, &token(), &body, 7_200_000);
    assert_eq!(failed(&pair.receive_bytes(&bytes)), (number, Code::StaleTimestamp, false));
    assert_eq!(pair.client.clock_offset(), -7_200_000);
}

#[test]
fn replayed_frames_end_the_connection() {
    let mut pair = Pair::new();
    let ping = pair.frame(Kind::Ping, 0, &Token::NONE, &[], 0);
    assert!(pair.receive_bytes(&ping).is_empty());
    assert_eq!(ended(&pair.receive_bytes(&ping)), Some(Code::Replayed));
    let mut pair = Pair::new();
    let mut other = pair.frame(Kind::Ping, 0, &Token::NONE, &[], 0);
    other[20] ^= 1;
    assert_eq!(ended(&pair.receive_bytes(&other)), Some(Code::Replayed));
}

#[test]
fn a_frame_is_judged_by_the_arrival_of_its_header_and_limited_in_time() {
    let mut pair = Pair::new();
    let number = pair.request();
    let bytes = pair.frame(Kind::Response, number, &token(), NIL, 0);
    assert!(pair.receive_bytes(&bytes[..68]).is_empty());
    pair.wall += 200_000;
    pair.now += Duration::from_secs(200);
    assert!(matches!(pair.receive_bytes(&bytes[68..])[..], [Event::Response { .. }]));

    let mut pair = Pair::new();
    let bytes = pair.frame(Kind::Event, 0, &Token::NONE, &[0; 100], 0);
    assert!(pair.receive_bytes(&bytes[..100]).is_empty());
    pair.now += FRAME_TIMEOUT;
    assert_eq!(ended(&pair.receive_bytes(&bytes[100..101])), None);
}
