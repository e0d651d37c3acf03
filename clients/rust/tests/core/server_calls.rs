//! Calls from the server.

use super::{NIL, Pair, Sent, WALL, encoded, ended, map, token};
use zcproto::core::Event;
use zcproto::frame::Kind;
use zcproto::{CallError, Code, Meta, Token, Value, codec};

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
