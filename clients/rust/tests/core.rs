//! The conversation without I/O: the examples of the specification, and what a hostile or slow server can cause.

use std::path::Path;
use std::time::Duration;
use zcproto::core::{Conversation, Event, FRAME_TIMEOUT, PONG_TIMEOUT, Settings, State};
use zcproto::frame::{Accepted, Frame, FrameDecoder, Kind, Side, encode_frame};
use zcproto::{CallError, Code, Error, Meta, Token, Value, codec};

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

// --- the examples of the specification -----------------------------------------------------------

struct Step {
    is_server: bool,
    title: String,
    bytes: Vec<u8>,
}

fn steps(file: &str) -> Vec<Step> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../spec/vectors").join(file);
    let vectors: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let text = |step: &serde_json::Value, key: &str| step[key].as_str().unwrap().to_owned();
    let hex = |text: String| {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    let steps = vectors["vectors"].as_array().unwrap().iter();
    steps
        .map(|step| Step {
            is_server: text(step, "from") == "server",
            title: text(step, "title"),
            bytes: hex(text(step, "bytes")),
        })
        .collect()
}

/// Return the body of a frame.
fn body(bytes: &[u8]) -> &[u8] {
    &bytes[68..]
}

/// Return the method and the encoded params of a request.
fn request(bytes: &[u8]) -> (String, Vec<u8>) {
    let Value::Array(parts) = codec::decode(body(bytes)).unwrap() else { panic!() };
    (parts[0].as_str().unwrap().to_owned(), encoded(&parts[1]))
}

/// Replay an example from the client's side, with a clock that is an hour behind. The server's bytes arrive one by one.
fn replay(file: &str, mut act: impl FnMut(&mut Conversation, &Step, i64)) -> Vec<Event> {
    let mut conversation = Conversation::new(Settings::default());
    let mut events = Vec::new();
    for step in steps(file) {
        let timestamp = i64::from_be_bytes(step.bytes[12..20].try_into().unwrap());
        let wall = timestamp - BEHIND;
        if step.is_server {
            for byte in &step.bytes {
                conversation.receive(&[*byte], wall, NOW, &mut events);
            }
        } else {
            act(&mut conversation, &step, wall);
            // How much credit is granted is the client's choice.
            let compared = if step.title.starts_with("CREDIT") { 68 } else { step.bytes.len() };
            assert_eq!(conversation.take_output()[..compared], step.bytes[..compared], "{}", step.title);
        }
    }
    assert!(!events.iter().any(|event| matches!(event, Event::Ended { .. })), "{events:?}");
    events
}

#[test]
fn the_example_conversation_is_repeated_byte_for_byte() {
    let events = replay("conversation.json", |conversation, step, wall| {
        let stream = u32::from_be_bytes(step.bytes[8..12].try_into().unwrap());
        match step.title.split(' ').next().unwrap() {
            "REQUEST" => {
                let (method, params) = request(&step.bytes);
                let opens = method == "session.open";
                let deadline_ms = (method == "sleep").then_some(2_000);
                let meta = Meta { deadline_ms, ..Meta::default() };
                let token = if opens { Token::NONE } else { token() };
                assert_eq!(conversation.request(&method, &params, &token, &meta, wall).unwrap(), stream);
            }
            "CANCEL" => conversation.cancel(stream, wall),
            "PING" => conversation.ping(wall),
            other => panic!("{other}"),
        }
    });
    let answered: Vec<u32> = events
        .iter()
        .filter_map(|event| match event {
            Event::Response { stream, .. } | Event::Failed { stream, .. } => Some(*stream),
            _ => None,
        })
        .collect();
    assert_eq!(answered, [1, 3, 2, 4]);
}

#[test]
fn the_example_of_streams_and_calls_is_repeated_byte_for_byte() {
    let events =
        replay("streaming/conversation.json", |conversation, step, wall| match step.title.split(' ').next().unwrap() {
            "REQUEST" => {
                assert_eq!(conversation.handle(&token(), &["approve"], 4, wall).unwrap(), 1);
            }
            "OPEN" => {
                let (method, params) = request(&step.bytes);
                let opened = conversation.open(&method, &params, &token(), &Meta::default(), [2, 65_536], wall);
                assert_eq!(opened.unwrap(), 2);
            }
            "CREDIT" => conversation.item_taken(2, 4, wall),
            "RESULT" => assert!(conversation.answer(2, Ok(&[0xc3]), wall)),
            other => panic!("{other}"),
        });
    assert_eq!(events.iter().filter(|event| matches!(event, Event::Item { stream: 2, .. })).count(), 3);
    let call = events.iter().find_map(|event| if let Event::Call(call) = event { Some(call) } else { None }).unwrap();
    assert_eq!((call.method.as_str(), call.deadline_ms), ("approve", 120_000));
}

// --- a server that tests script ------------------------------------------------------------------

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

// --- requests ------------------------------------------------------------------------------------

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

// --- freshness -----------------------------------------------------------------------------------

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

// --- keepalive and floods ------------------------------------------------------------------------

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

// --- streams of items ----------------------------------------------------------------------------

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

// --- calls from the server -----------------------------------------------------------------------

/// Register a method, and forget the frame.
fn register(pair: &mut Pair) {
    let number = pair.client.handle(&token(), &["approve"], 4, WALL).unwrap();
    pair.receive(Kind::Response, number, &token(), &[0x80]);
    pair.sent();
}

fn failure_code(sent: &Sent) -> i128 {
    match &sent[..] {
        [(Kind::Failure, _, body)] => {
            codec::decode(body).unwrap().as_array().unwrap().first().and_then(Value::as_int).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn calls_are_accepted_after_a_registration_alone() {
    let mut pair = Pair::new();
    assert_eq!(ended(&pair.call(1)), Some(Code::ProtocolError));
    let mut pair = Pair::new();
    register(&mut pair);
    assert!(matches!(pair.call(1)[..], [Event::Call(_)]));
    assert_eq!(ended(&pair.call(1)), Some(Code::ProtocolError), "the number is in flight");
}

#[test]
fn a_withdrawn_call_is_answered_once() {
    let mut pair = Pair::new();
    register(&mut pair);
    pair.call(1);
    assert_eq!(pair.receive(Kind::Withdraw, 1, &token(), &[]), [Event::Withdrawn { number: 1 }]);
    assert_eq!(failure_code(&pair.sent()), 1);
    assert!(!pair.client.answer(1, Ok(NIL), WALL));
    assert!(pair.receive(Kind::Withdraw, 1, &token(), &[]).is_empty());
    assert!(pair.sent().is_empty());
}

#[test]
fn calls_that_cannot_run_are_refused() {
    let mut pair = Pair::new();
    register(&mut pair);
    let body = |method: &str, meta: Value| encoded(&Value::Array(vec![method.into(), Value::Nil, meta]));
    let deadline = |ms: i64| map(&[("deadline_ms", ms.into())]);
    for (method, meta, code) in [
        ("other", deadline(1), 12),
        ("approve", deadline(0), 4),
        ("approve", map(&[]), 3),
        ("approve", map(&[("deadline_ms", "1".into())]), 3),
    ] {
        assert!(pair.receive(Kind::Call, 1, &token(), &body(method, meta)).is_empty());
        assert_eq!(failure_code(&pair.sent()), code);
    }
    assert!(pair.receive(Kind::Call, 1, &Token::new([9; 32]), &body("approve", deadline(1))).is_empty());
    assert_eq!(failure_code(&pair.sent()), 16);
    assert!(pair.receive_stale(Kind::Call, 1, &body("approve", deadline(1))).is_empty());
    assert_eq!(failure_code(&pair.sent()), 67);
}

#[test]
fn results_that_cannot_be_sent_become_internal() {
    let mut pair = Pair::new();
    register(&mut pair);
    for answer in [Ok(&[0xc1][..]), Err(&CallError::new(Code::TokenRevoked, "of the protocol"))] {
        pair.call(1);
        assert!(pair.client.answer(1, answer, WALL));
        assert_eq!(failure_code(&pair.sent()), if answer.is_ok() { 13 } else { 2 });
    }
}

#[test]
fn a_server_that_calls_and_reads_no_refusals_is_cut() {
    let mut pair = Pair::new();
    register(&mut pair);
    pair.client.block_output();
    let body = encoded(&Value::Array(vec!["other".into(), Value::Nil, map(&[("deadline_ms", 1.into())])]));
    for number in 1..=1_000 {
        assert!(pair.receive(Kind::Call, number, &token(), &body).is_empty());
    }
    assert_eq!(ended(&pair.receive(Kind::Call, 1_001, &token(), &body)), Some(Code::ProtocolError));
}

#[test]
fn calls_with_the_old_and_the_new_token_are_accepted_after_a_refresh() {
    let mut pair = Pair::new();
    register(&mut pair);
    let number = pair.client.request("session.refresh", NIL, &token(), &Meta::default(), WALL).unwrap();
    let newer = Token::new([9; 32]);
    let result = map(&[("token", Value::Bin(newer.as_bytes().to_vec()))]);
    pair.receive(Kind::Response, number, &Token::NONE, &encoded(&result));
    let body = encoded(&Value::Array(vec!["approve".into(), Value::Nil, map(&[("deadline_ms", 1.into())])]));
    assert!(matches!(pair.call(1)[..], [Event::Call(_)]));
    assert!(matches!(pair.receive(Kind::Call, 2, &newer, &body)[..], [Event::Call(_)]));
    pair.client.session_ended(&newer);
    assert!(pair.receive(Kind::Call, 3, &newer, &body).is_empty());
}
