//! The conversation without I/O: the examples of the specification, and what a hostile or slow server can cause.

mod examples;
mod lifetime;
mod requests;
mod server_calls;
mod streams;

use std::time::Duration;
use zcproto::core::{Conversation, Event, Settings};
use zcproto::frame::{Accepted, Frame, FrameDecoder, Kind, Side, encode_frame};
use zcproto::{Code, Error, Meta, Token, Value, codec};

/// 2026-01-01T00:00:00Z, by the server's clock and in the examples.
const WALL: i64 = 1_767_225_600_000;
/// How far this machine's clock is behind in these tests.
const BEHIND: i64 = 3_600_000;
const SALT: u64 = 0xa1b2_c3d4_e5f6_0718;
const NOW: Duration = Duration::from_secs(1_000);
const NIL: &[u8] = &[0xc0];

fn token() -> Token {
    Token::new(std::array::from_fn(|index| u8::try_from(index + 1).unwrap()))
}

fn map(entries: &[(&str, Value)]) -> Value {
    Value::Map(entries.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect())
}

fn encoded(value: &Value) -> Vec<u8> {
    codec::encode(value).unwrap()
}

/// A conversation that has read WELCOME, and its server.
struct Pair {
    client: Conversation,
    counter: u64,
    wall: i64,
    now: Duration,
    sent: FrameDecoder,
}

const WELCOME: [(&str, i64); 4] =
    [("max_frame", 1_048_576), ("max_streams", 4), ("idle_timeout_ms", 30_000), ("tolerance_ms", 30_000)];

/// What the client has sent: kind, number and body.
type Sent = Vec<(Kind, u32, Vec<u8>)>;

impl Pair {
    fn new() -> Self {
        let mut pair = Self {
            client: Conversation::new(Settings::default()),
            counter: 0,
            wall: WALL,
            now: NOW,
            sent: FrameDecoder::default(),
        };
        let mut entries: Vec<(&str, Value)> = WELCOME.iter().map(|&(key, value)| (key, value.into())).collect();
        entries.push(("server", "fake".into()));
        entries.push(("versions", Value::Array(vec![Value::Int(1)])));
        entries.push(("sts", map(&[("max_age", 0.into()), ("include_subdomains", false.into())])));
        entries.push(("streams", map(&[("max_open", 2.into()), ("max_item", 1_000.into())])));
        entries.push(("calls", map(&[("max", 32.into())])));
        assert_eq!(pair.receive(Kind::Welcome, 0, &Token::NONE, &encoded(&map(&entries))), [Event::Welcomed]);
        pair
    }

    fn frame(&mut self, kind: Kind, stream: u32, token: &Token, body: &[u8], age: i64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let timestamp = u64::try_from(self.wall - age).unwrap();
        let (counter, token) = (self.counter, token.as_bytes());
        encode_frame(&mut bytes, &Frame { kind, stream, timestamp, salt: SALT, counter, token, body });
        self.counter += 1;
        bytes
    }

    fn receive_bytes(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        self.client.receive(bytes, self.wall, self.now, &mut events);
        events
    }

    fn receive(&mut self, kind: Kind, stream: u32, token: &Token, body: &[u8]) -> Vec<Event> {
        let bytes = self.frame(kind, stream, token, body, 0);
        self.receive_bytes(&bytes)
    }

    fn receive_stale(&mut self, kind: Kind, stream: u32, body: &[u8]) -> Vec<Event> {
        let bytes = self.frame(kind, stream, &token(), body, 30_001);
        self.receive_bytes(&bytes)
    }

    fn error(&mut self, stream: u32, code: Code, details: Value) -> Vec<Event> {
        let body = Value::Array(vec![Value::Int(code.number().into()), "failed".into(), details]);
        self.receive(Kind::Error, stream, &token(), &encoded(&body))
    }

    fn request(&mut self) -> u32 {
        self.client.request("echo", NIL, &token(), &Meta::default(), self.wall).unwrap()
    }

    fn open(&mut self) -> u32 {
        self.client.open("words", NIL, &token(), &Meta::default(), [2, 10_000], self.wall).unwrap()
    }

    fn sent(&mut self) -> Sent {
        self.sent.feed(&self.client.take_output());
        let accepted =
            Accepted { receiver: Side::Server, max_length: u32::MAX, max_item: u32::MAX, streams: true, calls: true };
        let mut found = Vec::new();
        while let Some(frame) = self.sent.next(&accepted).unwrap() {
            found.push((frame.kind, frame.stream, frame.body.to_vec()));
        }
        found
    }

    fn call(&mut self, number: u32) -> Vec<Event> {
        let meta = map(&[("deadline_ms", 1_000.into())]);
        let body = Value::Array(vec!["approve".into(), Value::Nil, meta]);
        self.receive(Kind::Call, number, &token(), &encoded(&body))
    }
}

fn code_of(error: &Error) -> Option<Code> {
    error.code()
}

fn ended(events: &[Event]) -> Option<Code> {
    match events {
        [.., Event::Ended { code, .. }] => *code,
        _ => panic!("{events:?}"),
    }
}

fn failed(events: &[Event]) -> (u32, Code, bool) {
    match events {
        [Event::Failed { stream, error, lost }] => (*stream, error.code, *lost),
        _ => panic!("{events:?}"),
    }
}
