//! What the conformance kit, which runs the vectors, cannot see: the scan of bodies, values that are encoded again, and whole
//! conversations.

use serde_json::{Value as Json, json};
use std::fs;
use std::path::{Path, PathBuf};
use zcproto::Token;
use zcproto::codec::{self, Value};
use zcproto::core::{Conversation, Event, Settings};
use zcproto::frame::HEADER_SIZE;
use zcproto::message::Meta;
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

#[test]
fn generic_faults_of_bodies_are_found_by_the_scan() {
    let mut refused = [0, 0]; // of bodies to the server, and to the client
    for vector in vectors("bodies-invalid") {
        let data = hex(&vector["bytes"]);
        let depth = vector["context"]["max_depth"].as_u64().unwrap().try_into().unwrap();
        let is_client = vector["receiver"] == "client";
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
