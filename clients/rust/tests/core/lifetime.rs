//! Keepalive, floods, broken frames and GOAWAY.

use super::{NIL, NOW, Pair, WALL, code_of, encoded, ended, map, token};
use std::time::Duration;
use zcproto::core::{Conversation, Event, PONG_TIMEOUT, Settings};
use zcproto::frame::Kind;
use zcproto::{Code, Meta, Token};

#[test]
fn a_silent_server_gets_a_ping_and_is_then_unreachable() {
    let mut pair = Pair::new();
    let mut events = Vec::new();
    let deadline = pair.client.next_deadline().unwrap();
    assert_eq!(deadline, NOW + Duration::from_secs(10));
    pair.client.handle_timeout(WALL, deadline, &mut events);
    assert_eq!(pair.sent(), [(Kind::Ping, 0, Vec::new())]);
    pair.client.handle_timeout(WALL, deadline + PONG_TIMEOUT, &mut events);
    assert_eq!(ended(&events), None);
    assert_eq!(pair.client.next_deadline(), None);
}

#[test]
fn a_server_that_sends_pings_and_reads_nothing_gets_one_pong() {
    let mut pair = Pair::new();
    pair.client.block_output();
    for _ in 0..1_000 {
        assert!(pair.receive(Kind::Ping, 0, &Token::NONE, &[]).is_empty());
    }
    assert!(pair.sent().is_empty());
    pair.client.unblock_output(WALL);
    assert_eq!(pair.sent(), [(Kind::Pong, 0, Vec::new())]);
}

#[test]
fn a_flood_of_frames_that_answer_nothing_pauses_reading() {
    let mut pair = Pair::new();
    for _ in 0..9_000 {
        pair.receive(Kind::Ping, 0, &Token::NONE, &[]);
    }
    assert!(pair.client.reading_delay(pair.now) > Duration::from_millis(200));
    assert_eq!(pair.client.reading_delay(pair.now + Duration::from_secs(1)), Duration::ZERO);
}

#[test]
fn broken_frames_end_the_connection() {
    for (kind, stream, body) in [
        (Kind::Welcome, 0, NIL),
        (Kind::Event, 0, &[0x91, 0xa1, b'a'][..]),
        (Kind::GoAway, 0, &[0x80][..]),
        (Kind::Ping, 0, NIL),
    ] {
        let mut pair = Pair::new();
        assert_eq!(ended(&pair.receive(kind, stream, &Token::NONE, body)), Some(Code::ProtocolError), "{kind:?}");
    }
    let mut client = Conversation::new(Settings::default());
    let mut events = Vec::new();
    client.receive(b"HTTP/1.1 400 Bad Request\r\n", WALL, NOW, &mut events);
    assert_eq!(ended(&events), Some(Code::FrameTooLarge));
}

#[test]
fn goaway_ends_new_requests_and_not_those_in_flight() {
    let mut pair = Pair::new();
    let number = pair.request();
    let body = encoded(&map(&[("reason", "draining".into()), ("retry_after_ms", 5.into())]));
    let goaway = Event::GoAway { reason: "draining".to_owned(), retry_after_ms: 5 };
    assert_eq!(pair.receive(Kind::GoAway, 0, &Token::NONE, &body), [goaway]);
    let refused = pair.client.request("echo", NIL, &token(), &Meta::default(), WALL).unwrap_err();
    assert_eq!(code_of(&refused), Some(Code::Unavailable));
    assert!(matches!(pair.receive(Kind::Response, number, &token(), NIL)[..], [Event::Response { .. }]));
}
