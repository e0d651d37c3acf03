//! Steps that need no connection.

use crate::outcomes::{Context, outcomes_of};
use crate::typed::{from_hex, to_hex, untyped};
use serde_json::{Map, Value as Json, json};
use zcproto::codec::{self, Value};
use zcproto::frame::{Frame, Kind, Side, encode_frame};
use zcproto::message::{Meta, decode_credit, encode_request, is_traceparent};
use zcproto::{Channel, Code, Device, Token};

/// Run a step and return its answer. `None` if it is malformed, or is not one of these.
pub fn run(step: &Json) -> Option<Json> {
    match step["step"].as_str()? {
        "tables" => Some(tables()),
        "decode" => decode(step),
        "encode" => encode(step),
        "encode_request" => request(step),
        "text" => text(step),
        "sign" => sign(step),
        _ => None,
    }
}

fn tables() -> Json {
    let kinds: Map<String, Json> = Kind::ALL.iter().map(|kind| (kind.name().into(), json!(*kind as u8))).collect();
    let codes: Map<String, Json> = Code::ALL.iter().map(|code| (code.name().into(), json!(code.number()))).collect();
    json!({"kinds": kinds, "codes": codes})
}

fn hex(json: &Json) -> Option<Vec<u8>> {
    from_hex(json.as_str()?)
}

fn big(json: &Json) -> Option<u64> {
    json.as_str()?.parse().ok()
}

fn salt(step: &Json) -> Option<u64> {
    u64::from_str_radix(step["salt"].as_str()?, 16).ok()
}

fn decode(step: &Json) -> Option<Json> {
    let context = Context::parse(&step["context"])?;
    let receiver = if step["receiver"] == "client" { Side::Client } else { Side::Server };
    let pieces = step["pieces"].as_array()?.iter().enumerate();
    let pieces: Option<Vec<_>> = pieces
        .map(|(index, piece)| {
            let time = step["times"].get(index).and_then(big).and_then(|time| i64::try_from(time).ok());
            Some((hex(piece)?, time))
        })
        .collect();
    Some(outcomes_of(receiver, &context, &pieces?).into())
}

fn encode(step: &Json) -> Option<Json> {
    let token: [u8; 32] = hex(&step["token"])?.try_into().ok()?;
    let body = hex(&step["body"])?;
    let mut bytes = Vec::new();
    let frame = Frame {
        kind: *Kind::ALL.iter().find(|kind| step["kind"] == kind.name())?,
        stream: step["stream"].as_u64()?.try_into().ok()?,
        timestamp: big(&step["timestamp"])?,
        salt: salt(step)?,
        counter: big(&step["counter"])?,
        token: &token,
        body: &body,
    };
    encode_frame(&mut bytes, &frame);
    Some(json!({"bytes": to_hex(&bytes)}))
}

fn request(step: &Json) -> Option<Json> {
    let given = untyped(&step["meta"])?; // nil without meta
    let number = |value: &Value| u64::try_from(value.as_int()?).ok();
    let meta = Meta {
        deadline_ms: given.get("deadline_ms").and_then(number),
        idempotency_key: given.get("idempotency_key").and_then(Value::as_str),
        traceparent: given.get("traceparent").and_then(Value::as_str),
    };
    let credit = given.get("credit").and_then(|credit| decode_credit(&codec::encode(credit).ok()?).ok());
    let params = codec::encode(&untyped(&step["params"])?).ok()?;
    let mut body = Vec::new();
    encode_request(&mut body, step["method"].as_str()?, &params, &meta, credit).ok()?;
    Some(json!({"body": to_hex(&body)}))
}

fn text(step: &Json) -> Option<Json> {
    let text = step["text"].as_str()?;
    if step["type"] == "traceparent" {
        return Some(json!({"valid": is_traceparent(text)}));
    }
    Some(match Token::from_text(text) {
        Some(token) => json!({"valid": true, "bytes": to_hex(token.as_bytes())}),
        None => json!({"valid": false}),
    })
}

fn sign(step: &Json) -> Option<Json> {
    let channel = Channel { salt: salt(step)?, leaf: hex(&step["leaf"])?.try_into().ok()? };
    let message = if step["scheme"] == "attach" {
        channel.attach_message(&Token::new(hex(&step["token"])?.try_into().ok()?))
    } else {
        channel.open_message(step["device"].as_str()?)
    };
    let seed: [u8; 32] = hex(&step["private_key"])?.try_into().ok()?;
    let signature = Device::from_seed(&seed).sign(&message);
    Some(json!({"message": to_hex(&message), "signature": to_hex(&signature)}))
}
