//! The targets and their invariants.

#![allow(clippy::missing_panics_doc, reason = "a target panics if an invariant is broken")]

use crate::Corpus;
use crate::memory::allocated;
use crate::random::Random;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::HashMap;
use std::time::Duration;
use zcproto::codec::{self, Bytes, MAX_DEPTH, Value};
use zcproto::core::{Conversation, Event, Settings, State};
use zcproto::frame::{Accepted, Frame, FrameDecoder, Kind, Side, encode_frame};
use zcproto::message::Meta;
use zcproto::{CallError, Code, Token};

/// Memory that a value can take for each byte of its body, and for the rest.
const VALUE_FACTOR: usize = 32;
const VALUE_EXTRA: usize = 64;

/// Some types that an application may ask for.
#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "only decoded")]
struct Wanted {
    token: Option<Bytes>,
    #[serde(default)]
    text: String,
    #[serde(default)]
    values: Vec<Option<Choice>>,
    #[serde(flatten)]
    more: HashMap<String, Value>,
}

#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "only decoded")]
enum Choice {
    #[serde(rename = "a")]
    Unit,
    #[serde(rename = "b")]
    Number(u16),
    #[serde(rename = "c")]
    Pair(i8, f32),
    #[serde(rename = "d")]
    Named { x: char },
}

/// A body is refused without any allocation, or its value is encoded and decoded to the same, in bounded memory.
pub fn body(random: &mut Random, corpus: &Corpus) {
    let mut body = random.choose(&corpus.bodies).clone();
    random.mutate(&mut body, &corpus.bodies);
    let (scanned, used) = allocated(|| codec::scan(&body, MAX_DEPTH));
    assert_eq!(used, 0, "the scan allocates");
    let (decoded, used) = allocated(|| codec::decode(&body));
    assert_eq!(decoded.is_ok(), scanned.is_ok());
    assert_eq!(codec::from_slice::<IgnoredAny>(&body).is_ok(), scanned.is_ok());
    drop((codec::from_slice::<Wanted>(&body), codec::from_slice::<Vec<(String, Vec<u64>)>>(&body)));
    let Ok(value) = decoded else {
        assert_eq!(used, 0, "an invalid body allocates");
        assert_eq!(codec::from_slice::<Value>(&body), Err(scanned.unwrap_err()));
        return;
    };
    assert!(used <= VALUE_FACTOR * body.len() + VALUE_EXTRA, "{used} bytes of memory for {} of a body", body.len());
    // NaN differs from itself, so encodings are compared.
    let encoded = codec::encode(&value).expect("a decoded value can be sent");
    assert!(encoded.len() <= 2 * body.len() + 8);
    assert_eq!(codec::to_vec(&value).expect("a decoded value can be sent"), encoded);
    for again in [codec::decode(&encoded), codec::from_slice(&body)] {
        let again = again.expect("an encoded value can be decoded");
        assert_eq!(codec::encode(&again).expect("a decoded value can be sent"), encoded);
    }
}

/// The frames and the fault of some bytes do not depend on how they are split, and memory is bounded by the bytes.
pub fn frames(random: &mut Random, corpus: &Corpus) {
    let mut bytes = random.choose(&corpus.frames).clone();
    for _ in 0..random.below(4) {
        bytes.extend(random.choose(&corpus.frames));
    }
    random.mutate(&mut bytes, &corpus.frames);
    let accepted = Accepted {
        receiver: if random.once_in(2) { Side::Client } else { Side::Server },
        max_length: if random.once_in(2) { 16_384 } else { u32::MAX },
        max_item: 4_096,
        streams: random.once_in(2),
        calls: random.once_in(2),
    };
    let whole = decoded(&[&bytes], &accepted);
    let pieces = split(random, &bytes);
    assert_eq!(decoded(&pieces, &accepted), whole);
    let ((), used) = allocated(|| {
        let mut decoder = FrameDecoder::new();
        for piece in &pieces {
            decoder.feed(piece);
            while let Ok(Some(_)) = decoder.next(&accepted) {}
        }
    });
    // A buffer that doubles allocates at most four times its content, and a first one.
    assert!(used <= 4 * bytes.len() + 64, "{used} bytes of memory for {} received", bytes.len());
}

fn split<'a>(random: &mut Random, bytes: &'a [u8]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let most = if random.once_in(2) { 8 } else { 200 };
        let (piece, after) = rest.split_at((1 + random.below(most)).min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// Return the frames as bytes, and what is left or the fault.
fn decoded(pieces: &[&[u8]], accepted: &Accepted) -> (Vec<u8>, Result<usize, Code>) {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next(accepted) {
                Ok(Some(frame)) => encode_frame(&mut frames, &frame),
                Ok(None) => break,
                Err(fault) => return (frames, Err(fault.code)),
            }
        }
    }
    (frames, Ok(decoder.buffered()))
}

/// A server with the rights of a peer: it knows the salt, counts its frames, and sends nonsense.
struct Server {
    counter: u64,
    wall: i64,
    now: Duration,
}

/// The client's clock at the beginning.
const CLOCK: i64 = 1_767_225_600_000;
const SALT: u64 = 0x0102_0304_0506_0708;

impl Server {
    /// Return a frame that is mostly fresh.
    fn frame(&mut self, random: &mut Random, kind: Kind, stream: u32, token: &Token, body: &[u8]) -> Vec<u8> {
        self.counter += u64::from(!random.once_in(50));
        let drift = if random.once_in(12) { 40_000 } else { 10 };
        let late = i64::try_from(random.below(drift)).unwrap_or(0);
        let frame = Frame {
            kind,
            stream,
            timestamp: u64::try_from(self.wall - late).unwrap_or(0),
            salt: if random.once_in(200) { random.bits() } else { SALT },
            counter: self.counter,
            token: token.as_bytes(),
            body,
        };
        let mut bytes = Vec::new();
        encode_frame(&mut bytes, &frame);
        bytes
    }

    /// Return a frame of a random kind.
    fn any(&mut self, random: &mut Random, corpus: &Corpus, token: &Token) -> Vec<u8> {
        let (kind, body) = match random.below(13) {
            0 => (Kind::Response, any_body(random, corpus)),
            1 => (Kind::Error, error(random)),
            2 => (Kind::Ping, Vec::new()),
            3 => (Kind::Pong, Vec::new()),
            4 => (Kind::GoAway, encoded(&Value::from([("reason", Value::from("x")), ("retry_after_ms", 1.into())]))),
            5 => (Kind::Event, encoded(&vec!["session.expiring"; 2].into())),
            6 | 7 => (Kind::Item, any_body(random, corpus)),
            8 => {
                let totals = [random.below(20), 64 * random.below(200)].map(|total| Value::from(total as u64));
                (Kind::Credit, encoded(&Value::Array(totals.into())))
            }
            9 => (Kind::Call, call(random)),
            10 => (Kind::Withdraw, Vec::new()),
            11 => (Kind::Welcome, welcome()),
            _ => (*random.choose(Kind::ALL), any_body(random, corpus)),
        };
        let stream = match kind {
            Kind::Ping | Kind::Pong | Kind::GoAway | Kind::Event | Kind::Welcome => 0,
            _ => u32::try_from(random.below(7)).unwrap_or(0),
        };
        // GOAWAY, WELCOME and ERROR on stream 0 end conversations soon: send them rarely.
        let is_end = matches!(kind, Kind::GoAway | Kind::Welcome) || kind == Kind::Error && stream == 0;
        if is_end && !random.once_in(20) {
            return Vec::new();
        }
        self.frame(random, kind, stream, token, &body)
    }
}

fn encoded(value: &Value) -> Vec<u8> {
    codec::encode(value).expect("the value can be sent")
}

fn any_body(random: &mut Random, corpus: &Corpus) -> Vec<u8> {
    let mut body = random.choose(&corpus.bodies).clone();
    if random.once_in(4) {
        random.mutate(&mut body, &corpus.bodies);
    }
    body
}

fn error(random: &mut Random) -> Vec<u8> {
    let code = if random.once_in(5) { random.below(300) } else { usize::from(random.choose(Code::ALL).number()) };
    let details = [("server_time", Value::Int(i128::from(random.bits()))), ("retry_after_ms", 1.into())];
    encoded(&Value::Array(vec![(code as u64).into(), "text".into(), Value::from(details)]))
}

fn call(random: &mut Random) -> Vec<u8> {
    let method = if random.once_in(4) { "other" } else { "approve" };
    let meta = [("deadline_ms", Value::from(random.below(2) as u64 * 1_000))];
    encoded(&Value::Array(vec![method.into(), Value::Map(Vec::new()), Value::from(meta)]))
}

fn welcome() -> Vec<u8> {
    encoded(&Value::from([
        ("server", Value::from("fuzz")),
        ("versions", vec![1].into()),
        ("max_frame", 65_536.into()),
        ("max_streams", 8.into()),
        ("idle_timeout_ms", 30_000.into()),
        ("tolerance_ms", 30_000.into()),
        ("sts", [("max_age", Value::from(0)), ("include_subdomains", false.into())].into()),
        ("streams", [("max_open", 4), ("max_item", 2_048)].into()),
        ("calls", [("max", 4)].into()),
    ]))
}

/// Whatever a server sends and an application does, a conversation ends or goes on, in bounded memory, and the result does
/// not depend on how the bytes are split.
pub fn conversation(random: &mut Random, corpus: &Corpus) {
    let tokens = [Token::new([1; 32]), Token::new([2; 32])];
    let mut server = Server { counter: 0, wall: CLOCK, now: Duration::ZERO };
    let mut first = Vec::new();
    let body = welcome();
    let timestamp = server.wall.unsigned_abs() + random.bits() % 1_000_000;
    let frame =
        Frame { kind: Kind::Welcome, stream: 0, timestamp, salt: SALT, counter: 0, token: &[0; 32], body: &body };
    encode_frame(&mut first, &frame);
    if random.once_in(10) {
        random.mutate(&mut first, &corpus.frames);
    }
    server.wall = i64::try_from(timestamp).unwrap_or(0);

    let mut whole = Conversation::new(Settings::default());
    let mut split_up = Conversation::new(Settings::default());
    receive(random, &mut whole, &mut split_up, &first, CLOCK, server.now);
    for _ in 0..random.below(60) {
        let wall = CLOCK + millis(server.now);
        let token = random.choose(&tokens).clone();
        if random.once_in(3) {
            let seed = random.bits();
            for conversation in [&mut whole, &mut split_up] {
                act(&mut Random::new(seed), conversation, &token, wall);
            }
        } else {
            let mut bytes = Vec::new();
            for _ in 0..=random.below(3) {
                bytes.extend(server.any(random, corpus, &token));
            }
            if random.once_in(30) {
                random.mutate(&mut bytes, &corpus.frames);
            }
            receive(random, &mut whole, &mut split_up, &bytes, wall, server.now);
        }
        assert_eq!(sent(&whole.take_output()), sent(&split_up.take_output()));
        assert_eq!(whole.queued_bytes(), 0);
        if random.once_in(4) {
            pass_time(random, &mut server, [&mut whole, &mut split_up]);
        }
    }
}

/// Return kind, stream and body of the frames that a client has sent. Without PONG, since one answers all PINGs of a read, and
/// without PING, which depends on signs of life, such as an incomplete frame.
fn sent(output: &[u8]) -> Vec<(Kind, u32, Vec<u8>)> {
    let accepted =
        Accepted { receiver: Side::Server, max_length: u32::MAX, max_item: u32::MAX, streams: true, calls: true };
    let mut decoder = FrameDecoder::new();
    decoder.feed(output);
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next(&accepted).expect("a client sends valid frames") {
        if frame.kind.has_body() {
            assert_eq!(codec::scan(frame.body, MAX_DEPTH), Ok(()), "a client sends valid bodies");
        }
        if !matches!(frame.kind, Kind::Ping | Kind::Pong) {
            frames.push((frame.kind, frame.stream, frame.body.to_vec()));
        }
    }
    assert_eq!(decoder.buffered(), 0);
    frames
}

/// Let both conversations receive the same bytes, one of them in pieces.
fn receive(
    random: &mut Random,
    whole: &mut Conversation,
    split_up: &mut Conversation,
    bytes: &[u8],
    wall: i64,
    now: Duration,
) {
    if bytes.is_empty() {
        return;
    }
    let was_closed = whole.state() == State::Closed;
    let mut events = Vec::new();
    whole.receive(bytes, wall, now, &mut events);
    assert!(!was_closed || events.is_empty(), "an event after the end");
    let ends = events.iter().filter(|event| matches!(event, Event::Ended { .. })).count();
    assert_eq!(ends, usize::from(whole.state() == State::Closed && !was_closed), "the end is reported once");
    let mut in_pieces = Vec::new();
    for piece in split(random, bytes) {
        split_up.receive(piece, wall, now, &mut in_pieces);
    }
    assert_eq!(in_pieces, events);
    assert_eq!(split_up.state(), whole.state());
    assert_eq!(split_up.in_flight(), whole.in_flight());
    for event in &events {
        if let Event::Response { body, .. } = event {
            assert_eq!(codec::scan(body, MAX_DEPTH), Ok(()), "a response is valid");
        }
    }
    assert!(whole.in_flight() <= 8 && whole.calls_in_flight() <= 4 && whole.open_streams() <= 4);
}

/// Do what an application does.
fn act(random: &mut Random, conversation: &mut Conversation, token: &Token, wall: i64) {
    let stream = u32::try_from(random.below(7)).unwrap_or(0);
    let params = [0x80];
    // Most of these are refused, which must have no effect.
    match random.below(12) {
        0 | 1 => drop(conversation.request("echo", &params, token, &Meta::default(), wall)),
        2 | 3 => drop(conversation.open("m", &params, token, &Meta::default(), [4, 4_096], wall)),
        4 => conversation.cancel(stream, wall),
        5 if conversation.may_send_item(stream) => drop(conversation.send_item(stream, &params, wall)),
        6 => conversation.end_items(stream, wall),
        7 => conversation.item_taken(stream, random.below(200), wall),
        8 => drop(conversation.handle(token, &["approve"], 2, wall)),
        9 => {
            let error = CallError::new(Code::Aborted, "no");
            let answer = if random.once_in(2) { Ok(&params[..]) } else { Err(&error) };
            conversation.answer(stream, answer, wall);
        }
        10 => conversation.session_ended(token),
        11 if random.once_in(2) => conversation.block_output(),
        _ => conversation.unblock_output(wall),
    }
}

/// Move the clocks, and let both conversations act on it.
fn pass_time(random: &mut Random, server: &mut Server, conversations: [&mut Conversation; 2]) {
    let step = if random.once_in(20) { 400_000 } else { 5_000 };
    let step = Duration::from_millis(random.below(step) as u64);
    server.now += step;
    server.wall += millis(step);
    let results = conversations.map(|conversation| {
        let mut events = Vec::new();
        conversation.handle_timeout(CLOCK + millis(server.now), server.now, &mut events);
        let deadline = conversation.next_deadline();
        assert!(deadline.is_none_or(|deadline| deadline > server.now), "a deadline that has passed");
        assert!(conversation.reading_delay(server.now) < Duration::from_secs(3_600));
        (events, deadline)
    });
    assert_eq!(results[0], results[1]);
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
