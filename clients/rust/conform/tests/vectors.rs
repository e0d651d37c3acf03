//! All vectors of the specification: whole, byte by byte, cut in two, and with trailing bytes.

use serde_json::{Value as Json, json};
use std::fs;
use std::path::{Path, PathBuf};
use zcproto::codec::{self, Value};
use zcproto::core::{Conversation, Event, Settings};
use zcproto::frame::{Frame, HEADER_SIZE, Kind, Side, encode_frame};
use zcproto::message::{Meta, encode_request};
use zcproto::{Channel, Code, Device, Token};
use zcproto_conform::outcomes::{Context, outcomes_of};
use zcproto_conform::typed::{from_hex, to_hex, typed, untyped};

/// Files with vectors of frames.
const FRAME_FILES: [&str; 9] = [
    "frames",
    "headers",
    "freshness",
    "streams",
    "bodies",
    "bodies-invalid",
    "segments",
    "streaming/items",
    "streaming/calls",
];
/// The other files, each with its own test below.
const OTHER_FILES: [&str; 7] =
    ["arrival", "text", "signatures", "conversation", "streaming/conversation", "tables", "streaming/tables"];
/// Longer vectors are cut near the boundaries of fields and at the end.
const CUT_EVERYWHERE: usize = 700; // bytes

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../spec/vectors")
}

fn file(name: &str) -> Json {
    let text = fs::read_to_string(folder().join(format!("{name}.json"))).expect("the file of vectors exists");
    serde_json::from_str(&text).expect("the file is JSON")
}

fn vectors(name: &str) -> Vec<Json> {
    let file = file(name);
    let vectors = file["vectors"].as_array().expect("the file has vectors").clone();
    assert_eq!(file["count"].as_u64(), Some(vectors.len() as u64), "{name}: number of vectors");
    vectors
}

fn hex(json: &Json) -> Vec<u8> {
    from_hex(json.as_str().expect("bytes in hexadecimal")).expect("bytes in hexadecimal")
}

fn big(json: &Json) -> u64 {
    json.as_str().and_then(|digits| digits.parse().ok()).expect("an integer in decimal")
}

fn receiver(vector: &Json) -> Side {
    if vector["receiver"] == "client" { Side::Client } else { Side::Server }
}

/// The outcomes that this client can detect: `None` for one that only a server detects.
fn expected(vector: &Json) -> Vec<Option<Json>> {
    let outcomes = vector["expect"].as_array().expect("expected outcomes").iter();
    outcomes
        .map(|outcome| {
            let is_client = receiver(vector) == Side::Client;
            let stage = outcome["stage"].as_str();
            let is_seen =
                is_client || outcome["result"] != "dropped" && matches!(stage, None | Some("header" | "body"));
            is_seen.then(|| match outcome["result"].as_str() {
                Some("error") => json!({"result": "error", "code": outcome["code"], "fatal": outcome["fatal"]}),
                Some("dropped") => json!({"result": "dropped"}),
                _ => comparable(outcome),
            })
        })
        .collect()
}

/// Normalize NaN and an empty `meta`.
fn comparable(outcome: &Json) -> Json {
    let mut outcome = outcome.clone();
    if let Some(message) = outcome.get_mut("message").and_then(Json::as_object_mut) {
        if message.get("meta") == Some(&json!({})) {
            message.remove("meta");
        }
    }
    normalize(&mut outcome);
    outcome
}

fn normalize(json: &mut Json) {
    match json {
        Json::Array(values) => values.iter_mut().for_each(normalize),
        Json::Object(object) => {
            if let Some(Json::String(bits)) = object.get_mut("float64") {
                if u64::from_str_radix(bits, 16).is_ok_and(|bits| f64::from_bits(bits).is_nan()) {
                    *bits = "NaN".into();
                }
            }
            object.values_mut().for_each(normalize);
        }
        _ => {}
    }
}

fn check(name: &str, actual: &[Json], vector: &Json) {
    let wanted = expected(vector);
    let is_ended_elsewhere =
        receiver(vector) == Side::Server && vector["expect"].as_array().unwrap().iter().any(|one| one["fatal"] == true);
    let has_number = if is_ended_elsewhere { actual.len() >= wanted.len() } else { actual.len() == wanted.len() };
    assert!(has_number, "{name}: {} outcomes, expected {}: {actual:?}", actual.len(), wanted.len());
    for (found, wanted) in actual.iter().zip(&wanted) {
        if let Some(wanted) = wanted {
            assert_eq!(&comparable(found), wanted, "{name}");
        }
    }
}

fn cuts_of(data: &[u8]) -> Vec<Vec<&[u8]>> {
    let boundaries = [0, 3, 4, 5, 8, 12, 20, 28, 36, 67, 68, 69, data.len().saturating_sub(1), data.len()];
    let positions = (0..=data.len()).filter(|at| data.len() <= CUT_EVERYWHERE || boundaries.contains(at));
    let mut cuts: Vec<Vec<&[u8]>> = positions.map(|at| vec![&data[..at], &data[at..]]).collect();
    cuts.push(data.chunks(1).collect());
    cuts
}

fn run(vector: &Json, context: &Context, pieces: &[&[u8]]) -> Vec<Json> {
    let pieces: Vec<_> = pieces.iter().map(|piece| (piece.to_vec(), None)).collect();
    outcomes_of(receiver(vector), context, &pieces)
}

#[test]
fn frames_have_their_outcomes_however_they_are_cut() {
    let mut count = 0;
    for name in FRAME_FILES {
        for vector in vectors(name) {
            let name = format!("{name}: {}", vector["name"]);
            let context = Context::parse(&vector["context"]).expect("a context");
            let data = hex(&vector["bytes"]);
            let whole = run(&vector, &context, &[&data]);
            check(&name, &whole, &vector);
            for pieces in cuts_of(&data) {
                assert_eq!(run(&vector, &context, &pieces), whole, "{name}: in pieces");
            }
            let last = whole.last().unwrap_or(&Json::Null);
            if last["fatal"] == true {
                let trailing = [&data[..], &[0xff; 100]].concat();
                assert_eq!(run(&vector, &context, &[&trailing]), whole, "{name}: with trailing bytes");
            } else if last["result"] == "frame" && last["kind"] != "WELCOME" {
                let mut ping = Vec::new();
                let salt = vector["context"]["salt"].as_str().map_or(0, |salt| u64::from_str_radix(salt, 16).unwrap());
                let timestamp = big(&vector["context"]["now"]);
                let (kind, counter) = (Kind::Ping, u64::MAX);
                encode_frame(
                    &mut ping,
                    &Frame { kind, stream: 0, timestamp, salt, counter, token: &[0; 32], body: &[] },
                );
                let more = run(&vector, &context, &[&data, &ping]);
                assert_eq!(more[..whole.len()], whole, "{name}: with another frame");
            }
            count += 1;
        }
    }
    assert!(count > 600, "{count}");
}

#[test]
fn slow_frames_are_judged_by_the_clock_at_their_headers() {
    for vector in vectors("arrival") {
        let context = Context::parse(&vector["context"]).expect("a context");
        let pieces: Vec<_> = vector["pieces"].as_array().expect("pieces").iter().collect();
        let pieces: Vec<_> =
            pieces.iter().map(|piece| (hex(&piece["bytes"]), i64::try_from(big(&piece["now"])).ok())).collect();
        check(vector["name"].as_str().unwrap(), &outcomes_of(receiver(&vector), &context, &pieces), &vector);
    }
}

#[test]
fn generic_faults_of_bodies_are_found_by_the_scan() {
    let mut refused = [0, 0]; // of bodies to the server, and to the client
    for vector in vectors("bodies-invalid") {
        let data = hex(&vector["bytes"]);
        let depth = vector["context"]["max_depth"].as_u64().unwrap().try_into().unwrap();
        let is_client = receiver(&vector) == Side::Client;
        refused[usize::from(is_client)] += usize::from(codec::scan(&data[HEADER_SIZE..], depth).is_err());
    }
    assert_eq!(refused, [82, 10]);
    for vector in vectors("bodies") {
        let data = hex(&vector["bytes"]);
        let depth = vector["context"]["max_depth"].as_u64().unwrap().try_into().unwrap();
        assert_eq!(codec::scan(&data[HEADER_SIZE..], depth), Ok(()), "{}", vector["name"]);
    }
}

/// Return the outcomes of all vectors that are accepted frames.
fn accepted_frames() -> impl Iterator<Item = (Json, Json)> {
    let all = FRAME_FILES.into_iter().flat_map(vectors);
    all.flat_map(|vector| {
        let outcomes = vector["expect"].as_array().unwrap().clone();
        outcomes.into_iter().map(move |outcome| (vector.clone(), outcome))
    })
    .filter(|(_, outcome)| outcome["result"] == "frame")
}

#[test]
fn accepted_frames_are_encoded_identically() {
    let mut count = 0;
    for (vector, outcome) in accepted_frames() {
        let kind = *Kind::ALL.iter().find(|kind| outcome["kind"] == kind.name()).unwrap();
        let token: [u8; 32] = hex(&outcome["token"]).try_into().unwrap();
        let body = hex(&outcome["body"]);
        let mut bytes = Vec::new();
        let frame = Frame {
            kind,
            stream: outcome["stream"].as_u64().unwrap().try_into().unwrap(),
            timestamp: big(&outcome["timestamp"]),
            salt: u64::from_str_radix(outcome["salt"].as_str().unwrap(), 16).unwrap(),
            counter: big(&outcome["counter"]),
            token: &token,
            body: &body,
        };
        encode_frame(&mut bytes, &frame);
        assert!(vector["bytes"].as_str().unwrap().contains(&to_hex(&bytes)), "{}", vector["name"]);
        count += 1;
    }
    assert!(count > 100, "{count}");
}

#[test]
fn decoded_values_are_encoded_and_decoded_identically() {
    let mut count = 0;
    for (vector, outcome) in accepted_frames().filter(|(_, outcome)| !outcome["message"]["value"].is_null()) {
        let value = untyped(&outcome["message"]["value"]).unwrap();
        for body in [codec::encode(&value).unwrap(), codec::to_vec(&value).unwrap()] {
            let again: [Value; 2] = [codec::decode(&body).unwrap(), codec::from_slice(&body).unwrap()];
            for again in again {
                let mut found = typed(&again);
                let mut wanted = outcome["message"]["value"].clone();
                normalize(&mut found);
                normalize(&mut wanted);
                assert_eq!(found, wanted, "{}", vector["name"]);
            }
        }
        count += 1;
    }
    assert!(count > 50, "{count}");
}

#[test]
fn requests_are_encoded_as_the_vectors_mean_them() {
    let mut count = 0;
    for (vector, outcome) in accepted_frames() {
        let message = &outcome["message"];
        let (Some(method), true) = (message["method"].as_str(), outcome["kind"] == "REQUEST") else { continue };
        let params = untyped(&message["params"]).unwrap();
        let meta = &message["meta"];
        let Ok(deadline_ms) = meta["deadline_ms"].as_i64().map(u64::try_from).transpose() else { continue };
        let meta = Meta {
            deadline_ms,
            idempotency_key: meta["idempotency_key"].as_str(),
            traceparent: meta["traceparent"].as_str(),
        };
        let mut body = Vec::new();
        encode_request(&mut body, method, &codec::encode(&params).unwrap(), &meta, None).unwrap();
        let sent = codec::decode(&body).unwrap();
        assert_eq!(sent.as_array().unwrap()[..2], [method.into(), params], "{}", vector["name"]);
        count += 1;
    }
    assert!(count > 20, "{count}");
}

#[test]
fn text_is_canonical() {
    for vector in vectors("text") {
        let text = vector["text"].as_str().unwrap();
        let is_valid = vector["expect"]["valid"] == true;
        if vector["type"] == "traceparent" {
            assert_eq!(zcproto::message::is_traceparent(text), is_valid, "{}", vector["name"]);
            continue;
        }
        let token = Token::from_text(text);
        assert_eq!(token.is_some(), is_valid, "{}", vector["name"]);
        if let Some(token) = token {
            assert_eq!(token.as_bytes()[..], hex(&vector["expect"]["bytes"]));
            assert_eq!(token.to_text().as_str(), text);
        }
    }
}

#[test]
fn devices_sign_the_messages_of_the_vectors() {
    for vector in vectors("signatures") {
        let salt = u64::from_str_radix(vector["salt"].as_str().unwrap(), 16).unwrap();
        let channel = Channel { salt, leaf: hex(&vector["leaf"]).try_into().unwrap() };
        let message = match vector["device"].as_str() {
            Some(device) => channel.open_message(device),
            None => channel.attach_message(&Token::new(hex(&vector["token"]).try_into().unwrap())),
        };
        assert_eq!(message, hex(&vector["message"]), "{}", vector["name"]);
        let device = Device::from_seed(&hex(&vector["private_key"]).try_into().unwrap());
        assert_eq!(device.public_key(), hex(&vector["public_key"]));
        let is_valid = vector["expect"]["valid"] == true;
        assert_eq!(device.sign(&message) == hex(&vector["signature"]), is_valid, "{}", vector["name"]);
    }
}

#[test]
fn tables_match_the_constants() {
    let (base, streaming) = (file("tables"), file("streaming/tables"));
    let mut kinds = base["kinds"].as_object().unwrap().clone();
    kinds.extend(streaming["kinds"].as_object().unwrap().clone());
    assert_eq!(kinds.remove("ACCEPTED"), Some(json!(0x14)), "reserved");
    let own = Kind::ALL.iter().map(|kind| (kind.name().to_owned(), json!(*kind as u8))).collect();
    assert_eq!(kinds, own);
    let own = Code::ALL.iter().map(|code| (code.name().to_owned(), json!(code.number()))).collect();
    assert_eq!(*base["codes"].as_object().unwrap(), own);
}

/// A frame of a conversation: the bytes, and what they mean.
struct Step {
    bytes: Vec<u8>,
    kind: String,
    is_sent: bool,
    token: Token,
    /// The body as the codec of this crate decodes it.
    body: Value,
    now: i64,
    timestamp: i64,
    stream: u32,
}

fn steps(name: &str) -> Vec<Step> {
    vectors(name)
        .iter()
        .map(|vector| {
            let bytes = hex(&vector["bytes"]);
            let has_body = vector["body"] != json!({"empty": true});
            let body = if has_body { codec::decode(&bytes[HEADER_SIZE..]).unwrap() } else { Value::Nil };
            assert!(!has_body || typed(&body) == vector["body"], "the body");
            Step {
                kind: vector["kind"].as_str().unwrap().into(),
                is_sent: vector["from"] == "client",
                token: Token::new(bytes[36..68].try_into().unwrap()),
                body,
                now: big(&vector["now"]).try_into().unwrap(),
                timestamp: i64::from_be_bytes(bytes[12..20].try_into().unwrap()),
                stream: u32::from_be_bytes(bytes[8..12].try_into().unwrap()),
                bytes,
            }
        })
        .collect()
}

fn deadline(meta: Option<&Value>) -> Meta<'static> {
    let deadline_ms = meta.and_then(|meta| meta.get("deadline_ms")).and_then(Value::as_int);
    Meta { deadline_ms: deadline_ms.map(|value| value.try_into().unwrap()), ..Meta::default() }
}

#[test]
fn the_conversation_is_reproduced_byte_for_byte() {
    let mut conversation = Conversation::new(Settings::default());
    let mut events = Vec::new();
    for step in steps("conversation") {
        if !step.is_sent {
            conversation.receive(&step.bytes, step.now, std::time::Duration::ZERO, &mut events);
            continue;
        }
        let wall = step.timestamp - i64::try_from(conversation.clock_offset()).unwrap();
        match step.kind.as_str() {
            "REQUEST" => {
                let parts = step.body.as_array().unwrap();
                let params = codec::encode(&parts[1]).unwrap();
                let method = parts[0].as_str().unwrap();
                let stream = conversation.request(method, &params, &step.token, &deadline(parts.get(2)), wall).unwrap();
                assert_eq!(stream, step.stream);
            }
            "CANCEL" => conversation.cancel(step.stream, wall),
            _ => conversation.ping(wall),
        }
        assert_eq!(to_hex(&conversation.take_output()), to_hex(&step.bytes), "{}", step.kind);
    }
    assert!(!events.iter().any(|event| matches!(event, Event::Ended { .. })));
    assert_eq!(conversation.in_flight(), 0);
}

#[test]
fn the_conversation_with_streams_is_reproduced_apart_from_its_window() {
    let mut conversation = Conversation::new(Settings::default());
    let mut items = Vec::new();
    for step in steps("streaming/conversation") {
        if !step.is_sent {
            let mut events = Vec::new();
            conversation.receive(&step.bytes, step.now, std::time::Duration::ZERO, &mut events);
            match (step.kind.as_str(), events.remove(0)) {
                ("ITEM", Event::Item { body, .. }) => items.push(body),
                ("WELCOME", Event::Welcomed) | ("RESPONSE", Event::Response { .. }) | ("CALL", Event::Call(_)) => {}
                (kind, event) => panic!("{kind} is {event:?}"),
            }
            continue;
        }
        let wall = step.timestamp - i64::try_from(conversation.clock_offset()).unwrap();
        let parts = step.body.as_array().unwrap_or_default();
        match step.kind.as_str() {
            "REQUEST" => {
                let names = parts[1].get("methods").and_then(Value::as_array).unwrap();
                let names: Vec<&str> = names.iter().map(|name| name.as_str().unwrap()).collect();
                let max = parts[1].get("max").and_then(Value::as_int).unwrap().try_into().unwrap();
                conversation.handle(&step.token, &names, max, wall).unwrap();
            }
            "OPEN" => {
                let params = codec::encode(&parts[1]).unwrap();
                let credit = parts[2].get("credit").and_then(Value::as_array).unwrap();
                let window = [0, 1].map(|index: usize| credit[index].as_int().unwrap().try_into().unwrap());
                let method = parts[0].as_str().unwrap();
                conversation.open(method, &params, &step.token, &Meta::default(), window, wall).unwrap();
            }
            "CREDIT" => {
                // This client grants with each half of its window; in the vector it grants once.
                conversation.item_taken(step.stream, items.remove(0).len(), wall);
            }
            _ => assert!(conversation.answer(step.stream, Ok(&codec::encode(&step.body).unwrap()), wall)),
        }
        let size = if step.kind == "CREDIT" { HEADER_SIZE } else { step.bytes.len() };
        let sent = conversation.take_output();
        assert_eq!(to_hex(&sent[..size.min(sent.len())]), to_hex(&step.bytes[..size]), "{}", step.kind);
    }
    assert_eq!(conversation.in_flight(), 0);
}

#[test]
fn every_file_is_tested() {
    let others = ["schema", "retry"]; // src/client/retry.rs
    let known: Vec<_> = FRAME_FILES.into_iter().chain(OTHER_FILES).chain(others).map(str::to_owned).collect();
    for (prefix, folder) in [("", folder()), ("streaming/", folder().join("streaming"))] {
        for entry in fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if let Some(stem) = name.strip_suffix(".json") {
                assert!(known.contains(&format!("{prefix}{stem}")), "{prefix}{name} is not tested");
            }
        }
    }
}
