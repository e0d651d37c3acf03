//! The examples of the specification, from the client's side.

use super::{BEHIND, NOW, encoded, token};
use std::path::Path;
use zcproto::core::{Conversation, Event, Settings};
use zcproto::{Meta, Token, Value, codec};

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
