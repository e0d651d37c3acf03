//! The outcomes of decoding the bytes of a vector, in the form of the vectors.
//!
//! For receiver "client" the bytes run through a [`Conversation`] in the state of the context; for receiver "server" only
//! through the decoder and the parser of bodies, since a client does not implement a server.

use crate::typed::{from_hex, to_hex, typed};
use serde_json::{Value as Json, json};
use std::time::Duration;
use zcproto::codec::{self, Value};
use zcproto::core::{Conversation, Event, Settings, State};
use zcproto::frame::{Accepted, Frame, FrameDecoder, HEADER_SIZE, Kind, Side, encode_frame};
use zcproto::message::{Credit, Meta, decode_credit, encode_request, is_traceparent};
use zcproto::{Code, ProtocolError, Token};

/// The state of the receiver when the bytes of a vector arrive. spec/vectors/README.md explains each key.
pub struct Context {
    limit: u32,
    max_depth: usize,
    salt: Option<u64>,
    last_counter: u64,
    now: i64,
    tolerance_ms: u64,
    token: [u8; 32],
    in_flight: Vec<u32>,
    streams: Option<Value>,
    max_item: u32,
    calls: Option<Value>,
    open: Vec<OpenStream>,
    running: Vec<u32>,
    handles: Option<Vec<String>>,
    has_calls: bool, // whether CALL is accepted
}

struct OpenStream {
    number: u32,
    granted: Credit,
    received: Credit,
    credit: Credit,
}

impl Context {
    /// Parse the context of a vector. Return `None` if it is malformed.
    #[must_use]
    pub fn parse(json: &Json) -> Option<Self> {
        let announced = |name: &str| json.pointer(&format!("/announced/{name}")).filter(|limits| !limits.is_null());
        // The limits are plain JSON, not typed.
        let limits = |json: &Json| -> Option<Value> {
            json.as_object()?.iter().map(|(key, value)| Some((key.clone(), Value::from(value.as_i64()?)))).collect()
        };
        let handles = match &json["handles"] {
            Json::Null => None,
            names => Some(names.as_array()?.iter().map(|name| Some(name.as_str()?.to_owned())).collect::<Option<_>>()?),
        };
        // Streams were opened with the first token of the context, or with this one.
        let token = match json["tokens"].get(0) {
            Some(token) => from_hex(token.as_str()?)?.try_into().ok()?,
            None => std::array::from_fn(|index| u8::try_from(index + 1).unwrap_or(0)),
        };
        let open = json["open"].as_array().map(Vec::as_slice).unwrap_or_default();
        Some(Self {
            limit: number(&json["limit"])?,
            max_depth: json["max_depth"].as_u64()?.try_into().ok()?,
            salt: json["salt"].as_str().map(|hex| u64::from_str_radix(hex, 16)).transpose().ok()?,
            last_counter: json["last_counter"].as_str()?.parse().ok()?,
            now: json["now"].as_str().unwrap_or("0").parse().ok()?,
            tolerance_ms: json["tolerance_ms"].as_u64()?,
            token,
            in_flight: numbers(&json["in_flight"])?,
            streams: announced("streams").and_then(limits),
            max_item: announced("streams").map_or(Some(u32::MAX), |limits| number(&limits["max_item"]))?,
            calls: announced("calls").and_then(limits),
            open: open.iter().map(OpenStream::parse).collect::<Option<_>>()?,
            running: numbers(&json["calls"])?,
            has_calls: announced("calls").is_some() && json.get("handles").is_none_or(|names| !names.is_null()),
            handles,
        })
    }

    fn accepted(&self, receiver: Side) -> Accepted {
        Accepted {
            receiver,
            max_length: self.limit,
            max_item: self.max_item,
            streams: self.streams.is_some(),
            calls: self.has_calls,
        }
    }
}

impl OpenStream {
    fn parse(json: &Json) -> Option<Self> {
        let credit = |name: &str| Some([json[name][0].as_u64()?, json[name][1].as_u64()?]);
        Some(Self {
            number: number(&json["stream"])?,
            granted: credit("granted")?,
            received: credit("received")?,
            credit: credit("credit")?,
        })
    }
}

fn number(json: &Json) -> Option<u32> {
    json.as_u64()?.try_into().ok()
}

fn numbers(json: &Json) -> Option<Vec<u32>> {
    json.as_array().map(Vec::as_slice).unwrap_or_default().iter().map(number).collect()
}

/// Bytes, and the receiver's clock at their arrival.
pub type Piece = (Vec<u8>, i64);

/// Return the outcomes of bytes that arrive in pieces. A piece without a time arrives at `now` of the context.
///
/// # Panics
///
/// If a rule of the crate is broken that no outcome can express, such as that the result does not depend on the pieces.
#[must_use]
pub fn outcomes_of(receiver: Side, context: &Context, pieces: &[(Vec<u8>, Option<i64>)]) -> Vec<Json> {
    let pieces: Vec<Piece> = pieces.iter().map(|(bytes, time)| (bytes.clone(), time.unwrap_or(context.now))).collect();
    match receiver {
        Side::Client => as_client(context, &pieces),
        Side::Server => as_server(context, &pieces),
    }
}

// --- receiver "client": through a Conversation -----------------------------------------------------------------------

fn as_client(context: &Context, pieces: &[Piece]) -> Vec<Json> {
    let mut in_pieces = Receiver::new(context);
    let events: Vec<Event> = pieces.iter().flat_map(|(bytes, now)| in_pieces.receive(bytes, *now)).collect();
    // Once more frame by frame, for the outcome of each.
    let mut by_frame = Receiver::new(context);
    let mut events_by_frame = Vec::new();
    let mut outcomes = Vec::new();
    let found = frames_of(&context.accepted(Side::Client), pieces);
    let mut end = 0;
    for frame in &found.frames {
        let before = by_frame.dropped();
        let now = time_of(end + HEADER_SIZE, pieces);
        end += frame.bytes.len();
        let events = by_frame.receive(&frame.bytes, now);
        let message = frame.message(context.max_depth);
        let outcome = match events.first() {
            // A valid ERROR on stream 0 is itself a frame, which ends the connection.
            Some(Event::Ended { .. }) if frame.kind == Kind::Error && frame.stream() == 0 && message.is_some() => {
                frame.outcome(message.clone())
            }
            Some(Event::Ended { code, .. }) => error_outcome(*code, true),
            Some(Event::Failed { error, .. }) if code_of(message.as_ref()) != Some(error.code) => {
                error_outcome(Some(error.code), false)
            }
            _ if by_frame.dropped() > before => json!({"result": "dropped"}),
            _ => frame.outcome(message),
        };
        outcomes.push(outcome);
        events_by_frame.extend(events);
        if by_frame.has_ended() {
            break;
        }
    }
    if !by_frame.has_ended() {
        if let Some(fault) = found.fault {
            events_by_frame.push(Event::Ended { code: Some(fault.code), reason: fault.reason.into() });
            outcomes.push(error_outcome(Some(fault.code), true));
        } else if found.left > 0 {
            outcomes.push(json!({"result": "incomplete", "have": found.left}));
        }
    }
    assert_eq!(events, events_by_frame, "the events depend on how the bytes are split");
    outcomes
}

/// A conversation whose application takes each item at once. Calls that it refuses are events, too.
struct Receiver {
    conversation: Conversation,
    max_depth: usize,
}

impl Receiver {
    fn new(context: &Context) -> Self {
        let mut conversation = conversation_in(context).expect("the conversation reaches the state of the context");
        conversation.take_output();
        Self { conversation, max_depth: context.max_depth }
    }

    fn dropped(&self) -> u64 {
        self.conversation.dropped_stale() + self.conversation.dropped_unknown()
    }

    fn has_ended(&self) -> bool {
        self.conversation.state() == State::Closed
    }

    fn receive(&mut self, bytes: &[u8], now: i64) -> Vec<Event> {
        let mut events = Vec::new();
        self.conversation.receive(bytes, now, Duration::ZERO, &mut events);
        for event in &mut events {
            if let Event::Item { stream, body } = event {
                if let Err(error) = codec::scan(body, self.max_depth) {
                    let stream = *stream;
                    self.conversation.cancel(stream, now);
                    let error = zcproto::CallError::new(Code::Internal, error.phrase());
                    *event = Event::Failed { stream, error, lost: false };
                }
            }
        }
        let refused = self.refused();
        if !events.iter().any(|event| matches!(event, Event::Withdrawn { .. })) {
            events.extend(refused);
        }
        events
    }

    /// Return an error for each FAILURE that was sent.
    fn refused(&mut self) -> Vec<Event> {
        let accepted =
            Accepted { receiver: Side::Server, max_length: u32::MAX, max_item: u32::MAX, streams: true, calls: true };
        let sent = frames_of(&accepted, &[(self.conversation.take_output(), 0)]);
        let refused = sent.frames.iter().filter(|frame| frame.kind == Kind::Failure);
        refused
            .filter_map(|frame| {
                let code = frame.message(codec::MAX_DEPTH)?["code"].as_u64()?;
                let error = zcproto::CallError::new(Code::from_wire(code.into())?, "");
                Some(Event::Failed { stream: frame.stream(), error, lost: false })
            })
            .collect()
    }
}

/// Return the code that the client reports for the message of an ERROR.
fn code_of(message: Option<&Json>) -> Option<Code> {
    let code = message?["code"].as_i64()?;
    Some(Code::from_wire(code.into()).unwrap_or(Code::Unknown))
}

/// Return the time at which a number of bytes have arrived.
fn time_of(count: usize, pieces: &[Piece]) -> i64 {
    let mut arrived = 0;
    let piece = pieces.iter().find(|(bytes, _)| {
        arrived += bytes.len();
        arrived >= count
    });
    piece.map_or(0, |(_, now)| *now)
}

/// Return a conversation in the state of a context.
fn conversation_in(context: &Context) -> zcproto::Result<Conversation> {
    let mut conversation = Conversation::new(Settings {
        max_frame: context.limit,
        tolerance_ms: context.tolerance_ms,
        max_depth: context.max_depth,
    });
    let Some(salt) = context.salt else { return Ok(conversation) };
    let now = context.now;
    let mut events = Vec::new();
    let mut receive = |conversation: &mut Conversation, kind: Kind, counter: u64, body: &[u8]| {
        let timestamp = u64::try_from(now).unwrap_or(0);
        let mut bytes = Vec::new();
        encode_frame(&mut bytes, &Frame { kind, stream: 0, timestamp, salt, counter, token: &[0; 32], body });
        conversation.receive(&bytes, now, Duration::ZERO, &mut events);
    };
    receive(&mut conversation, Kind::Welcome, 0, &welcome(context));
    if context.last_counter > 0 {
        receive(&mut conversation, Kind::Ping, context.last_counter, &[]);
    }
    let token = Token::new(context.token);
    let params = [0x80];
    for stream in &context.in_flight {
        conversation.set_next_stream(*stream);
        conversation.request("echo", &params, &token, &Meta::default(), now)?;
    }
    for OpenStream { number, granted, received, credit } in &context.open {
        conversation.set_next_stream(*number);
        conversation.open("m", &params, &token, &Meta::default(), *granted, now)?;
        conversation.restore_stream(*number, *granted, *received, *credit);
    }
    if let Some(handles) = &context.handles {
        conversation.set_next_stream(u32::MAX);
        let names: Vec<&str> = handles.iter().map(String::as_str).collect();
        conversation.handle(&token, &names, 1, now)?;
    }
    for call in &context.running {
        conversation.restore_call(*call, &token);
    }
    let in_flight = context.in_flight.len() + context.open.len() + usize::from(context.handles.is_some());
    assert!(conversation.state() == State::Open && conversation.in_flight() == in_flight);
    Ok(conversation)
}

fn welcome(context: &Context) -> Vec<u8> {
    let mut welcome: Vec<(String, Value)> = vec![
        ("server".into(), "vectors".into()),
        ("versions".into(), vec![1].into()),
        ("max_frame".into(), 1_048_576.into()),
        ("max_streams".into(), 128.into()),
        ("idle_timeout_ms".into(), 0.into()),
        ("tolerance_ms".into(), 30_000.into()),
        ("sts".into(), [("max_age", Value::from(0)), ("include_subdomains", false.into())].into()),
    ];
    for (name, limits) in [("streams", &context.streams), ("calls", &context.calls)] {
        welcome.extend(limits.iter().map(|limits| (name.into(), limits.clone())));
    }
    codec::encode(&Value::Map(welcome)).expect("WELCOME is valid")
}

// --- receiver "server": decoder and bodies only ----------------------------------------------------------------------

fn as_server(context: &Context, pieces: &[Piece]) -> Vec<Json> {
    let found = frames_of(&context.accepted(Side::Server), pieces);
    let mut outcomes = Vec::new();
    for frame in &found.frames {
        let message = frame.message(context.max_depth);
        let is_valid = if frame.kind.has_body() { message.is_some() } else { frame.body().is_empty() };
        if is_valid {
            outcomes.push(frame.outcome(message));
        } else if frame.kind.has_body() && frame.kind != Kind::Credit {
            outcomes.push(error_outcome(Some(Code::InvalidArgument), false));
        } else {
            outcomes.push(error_outcome(Some(Code::ProtocolError), true));
            return outcomes;
        }
    }
    if let Some(fault) = found.fault {
        outcomes.push(error_outcome(Some(fault.code), true));
    } else if found.left > 0 {
        outcomes.push(json!({"result": "incomplete", "have": found.left}));
    }
    outcomes
}

// --- frames ----------------------------------------------------------------------------------------------------------

/// What a decoder found.
struct Found {
    frames: Vec<Decoded>,
    left: usize,
    fault: Option<ProtocolError>,
}

/// A frame of its own bytes.
struct Decoded {
    kind: Kind,
    bytes: Vec<u8>,
}

fn frames_of(accepted: &Accepted, pieces: &[Piece]) -> Found {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    for (piece, _) in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next(accepted) {
                Ok(Some(frame)) => {
                    let mut bytes = Vec::new();
                    encode_frame(&mut bytes, &frame);
                    frames.push(Decoded { kind: frame.kind, bytes });
                }
                Ok(None) => break,
                Err(fault) => return Found { frames, left: 0, fault: Some(fault) },
            }
        }
    }
    Found { frames, left: decoder.buffered(), fault: None }
}

impl Decoded {
    fn body(&self) -> &[u8] {
        &self.bytes[HEADER_SIZE..]
    }

    fn stream(&self) -> u32 {
        u32::try_from(self.integer(8, 4)).expect("four bytes")
    }

    fn integer(&self, at: usize, size: usize) -> u64 {
        self.bytes[at..at + size].iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
    }

    fn outcome(&self, message: Option<Json>) -> Json {
        let mut outcome = json!({
            "result": "frame",
            "length": self.integer(0, 4),
            "version": self.integer(4, 1),
            "kind": self.kind.name(),
            "flags": self.integer(6, 2),
            "stream": self.stream(),
            "timestamp": self.integer(12, 8).to_string(),
            "salt": to_hex(&self.bytes[20..28]),
            "counter": self.integer(28, 8).to_string(),
            "token": to_hex(&self.bytes[36..68]),
            "body": to_hex(self.body()),
        });
        if let Some(message) = message {
            outcome["message"] = message;
        }
        outcome
    }

    /// Decode the body. Return `None` for a kind without one, or if it is invalid for its kind.
    fn message(&self, max_depth: usize) -> Option<Json> {
        codec::scan(self.body(), max_depth).ok()?;
        let value = codec::decode(self.body()).ok()?;
        match self.kind {
            Kind::Response | Kind::Item | Kind::Result => Some(json!({"value": typed(&value)})),
            Kind::Credit => decode_credit(self.body()).ok().map(|credit| json!({"credit": credit})),
            Kind::Welcome | Kind::GoAway => value.as_map().map(|_| json!({"map": typed(&value)})),
            Kind::Request | Kind::Open | Kind::Call => request_of(value.as_array()?, self.kind),
            Kind::Error | Kind::Failure => error_of(value.as_array()?),
            Kind::Event => match value.as_array()? {
                [Value::Str(name), data] => Some(json!({"name": name, "data": typed(data)})),
                _ => None,
            },
            Kind::Cancel | Kind::Ping | Kind::Pong | Kind::End | Kind::Withdraw => None,
        }
    }
}

fn error_outcome(code: Option<Code>, fatal: bool) -> Json {
    json!({"result": "error", "code": code.map_or(0, Code::number), "fatal": fatal})
}

fn error_of(parts: &[Value]) -> Option<Json> {
    let (code, message, details) = match parts {
        [Value::Int(code), Value::Str(message)] | [Value::Int(code), Value::Str(message), Value::Nil] => {
            (code, message, json!({"map": {}}))
        }
        [Value::Int(code), Value::Str(message), details @ Value::Map(_)] => (code, message, typed(details)),
        _ => return None,
    };
    Some(json!({"code": typed(&Value::Int(*code)), "message": message, "details": details}))
}

fn request_of(parts: &[Value], kind: Kind) -> Option<Json> {
    let (method, params, meta) = match parts {
        [Value::Str(method), params] => (method, params, None),
        [Value::Str(method), params, meta @ Value::Map(_)] => (method, params, Some(meta)),
        _ => return None,
    };
    // The name is checked by the encoder of requests, and params are a map or nil.
    encode_request(&mut Vec::new(), method, &codec::encode(params).ok()?, &Meta::default(), None).ok()?;
    let mut message = json!({"method": method, "params": typed(params)});
    if let Some(meta) = meta {
        message["meta"] = meta_of(meta, kind)?;
    }
    Some(message)
}

/// Return the keys of meta that the protocol defines. Return `None` if one is invalid.
fn meta_of(meta: &Value, kind: Kind) -> Option<Json> {
    let present = |key: &str| meta.get(key).filter(|value| !value.is_nil());
    let mut known = json!({});
    if let Some(deadline) = present("deadline_ms") {
        deadline.as_int()?;
        known["deadline_ms"] = typed(deadline);
    }
    if let Some(key) = present("idempotency_key") {
        let has_size = (1..=64).contains(&key.as_str()?.chars().count());
        if kind == Kind::Open || !has_size {
            return None;
        }
        known["idempotency_key"] = typed(key);
    }
    if let Some(text) = present("traceparent").and_then(Value::as_str).filter(|text| is_traceparent(text)) {
        known["traceparent"] = json!(text);
    }
    if let Some(credit) = present("credit").filter(|_| kind == Kind::Open) {
        known["credit"] = json!(decode_credit(&codec::encode(credit).ok()?).ok()?);
    }
    Some(known)
}
