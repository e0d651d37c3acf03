//! Frames: any split of the bytes gives the same result, and headers are judged as soon as they have arrived.

use std::time::Duration;
use zcproto::codec::{Value, encode};
use zcproto::core::{Conversation, Event, FRAME_TIMEOUT, Settings};
use zcproto::frame::{Accepted, Frame, FrameDecoder, HEADER_SIZE, Kind, MIN_LENGTH, Side, encode_frame};
use zcproto::{Code, ProtocolError};

const AT_CLIENT: Accepted =
    Accepted { receiver: Side::Client, max_length: 16_384, max_item: 1_024, streams: false, calls: false };

fn frame(kind: Kind, stream: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_frame(&mut out, &Frame { kind, stream, timestamp: 1, salt: u64::MAX, counter: 3, token: &[7; 32], body });
    out
}

/// Decode pieces; return the encoded frames, what is left, and the error.
fn decoded(pieces: &[&[u8]], accepted: &Accepted) -> (Vec<Vec<u8>>, usize, Option<ProtocolError>) {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next(accepted) {
                Ok(Some(frame)) => {
                    let mut bytes = Vec::new();
                    encode_frame(&mut bytes, &frame);
                    frames.push(bytes);
                }
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.next(accepted), Err(error), "the error repeats");
                    return (frames, 0, Some(error));
                }
            }
        }
    }
    (frames, decoder.buffered(), None)
}

#[test]
fn a_ping_has_the_bytes_of_the_specification() {
    let mut ping = Vec::new();
    encode_frame(
        &mut ping,
        &Frame {
            kind: Kind::Ping,
            stream: 0,
            timestamp: 1_767_225_600_000,
            salt: 0xa1b2_c3d4_e5f6_0718,
            counter: 1,
            token: &[0; 32],
            body: &[],
        },
    );
    let mut expected = b"\0\0\0\x40\x01\x06\0\0\0\0\0\0\0\0\x01\x9b\x76\xda\xa8\0".to_vec();
    expected.extend(b"\xa1\xb2\xc3\xd4\xe5\xf6\x07\x18\0\0\0\0\0\0\0\x01");
    expected.extend([0; 32]);
    assert_eq!(ping, expected);
}

#[test]
fn every_split_of_the_bytes_gives_the_same_frames() {
    let frames = [frame(Kind::Event, 0, &[0x90]), frame(Kind::Ping, 0, &[]), frame(Kind::Response, 9, &[1; 300])];
    let mut bytes = frames.concat();
    bytes.extend(&frame(Kind::Pong, 0, &[])[..70 - 4]);
    let expected = (frames.to_vec(), 66, None);
    assert_eq!(decoded(&[&bytes], &AT_CLIENT), expected);
    let each: Vec<&[u8]> = bytes.chunks(1).collect();
    assert_eq!(decoded(&each, &AT_CLIENT), expected);
    for first in 0..=bytes.len() {
        for second in [first, (first + 1).min(bytes.len()), (first + 67).min(bytes.len()), bytes.len()] {
            let pieces = [&bytes[..first], &bytes[first..second], &bytes[second..]];
            assert_eq!(decoded(&pieces, &AT_CLIENT), expected, "cut at {first} and {second}");
        }
    }
}

#[test]
fn a_header_is_refused_before_its_body_has_arrived() {
    let protocol = |reason| ProtocolError { code: Code::ProtocolError, reason };
    let too_large = |reason| ProtocolError { code: Code::FrameTooLarge, reason };
    let header = |change: fn(&mut Vec<u8>)| {
        let mut bytes = frame(Kind::Response, 1, &[0; 100]);
        change(&mut bytes);
        bytes.truncate(HEADER_SIZE);
        bytes
    };
    for (bytes, error) in [
        (header(|bytes| bytes[3] = 63), protocol("length is below 64")),
        (
            header(|bytes| bytes[..4].copy_from_slice(&16_385_u32.to_be_bytes())),
            too_large("frame is larger than allowed here"),
        ),
        (header(|bytes| bytes[4] = 2), protocol("version is not 1")),
        (header(|bytes| bytes[5] = 0), protocol("this kind of frame is not allowed here")),
        (header(|bytes| bytes[5] = 2), protocol("this kind of frame is not allowed here")),
        (header(|bytes| bytes[5] = 0x11), protocol("this kind of frame is not allowed here")),
        (header(|bytes| bytes[5] = 0x18), protocol("this kind of frame is not allowed here")),
        (header(|bytes| bytes[7] = 1), protocol("flags are set")),
        (header(|bytes| bytes[11] = 0), protocol("stream does not match the kind")),
        (header(|bytes| bytes[5] = 6), protocol("stream does not match the kind")),
    ] {
        assert_eq!(decoded(&[&bytes], &AT_CLIENT), (vec![], 0, Some(error)));
    }
    // A length is judged as soon as its four bytes are there.
    let huge = u32::MAX.to_be_bytes();
    assert_eq!(decoded(&[&huge[..3]], &AT_CLIENT).2, None);
    assert_eq!(decoded(&[&huge], &AT_CLIENT).2, Some(too_large("frame is larger than allowed here")));
}

#[test]
fn kinds_of_streams_and_calls_need_their_announcement() {
    let with = Accepted { streams: true, calls: true, ..AT_CLIENT };
    for kind in [Kind::Item, Kind::Credit, Kind::Call, Kind::Withdraw] {
        assert!(decoded(&[&frame(kind, 1, &[])], &with).2.is_none());
        assert!(decoded(&[&frame(kind, 1, &[])], &AT_CLIENT).2.is_some());
        assert!(decoded(&[&frame(kind, 0, &[])], &with).2.is_some());
    }
    for kind in [Kind::Open, Kind::End, Kind::Result, Kind::Failure, Kind::Request, Kind::Cancel] {
        assert!(decoded(&[&frame(kind, 1, &[])], &with).2.is_some());
        assert!(decoded(&[&frame(kind, 1, &[])], &Accepted { receiver: Side::Server, ..with }).2.is_none());
    }
    let largest = frame(Kind::Item, 1, &[0; 1_024 - 64]);
    assert!(decoded(&[&largest], &with).2.is_none());
    let larger = frame(Kind::Item, 1, &[0; 1_025 - 64]);
    let error = ProtocolError { code: Code::FrameTooLarge, reason: "item is larger than allowed here" };
    assert_eq!(decoded(&[&larger[..HEADER_SIZE]], &with).2, Some(error));
    assert!(decoded(&[&frame(Kind::Error, 0, &[])], &AT_CLIENT).2.is_none());
    assert!(decoded(&[&frame(Kind::Error, 1, &[])], &AT_CLIENT).2.is_none());
}

#[test]
fn a_length_that_was_accepted_stays_accepted() {
    let bytes = frame(Kind::Response, 1, &[0; 1_000]);
    let smaller = Accepted { max_length: 100, ..AT_CLIENT };
    let mut decoder = FrameDecoder::new();
    decoder.feed(&bytes[..4]);
    assert_eq!(decoder.next(&AT_CLIENT), Ok(None));
    decoder.feed(&bytes[4..]);
    assert_eq!(decoder.next(&smaller).unwrap().unwrap().body.len(), 1_000);
    decoder.feed(&bytes);
    assert!(decoder.next(&smaller).is_err());
}

#[test]
fn a_frame_that_takes_too_long_ends_the_connection_however_it_is_split() {
    let welcome = Value::from([
        ("server", Value::from("x")),
        ("versions", vec![1].into()),
        ("max_frame", 65_536.into()),
        ("max_streams", 8.into()),
        ("idle_timeout_ms", 0.into()),
        ("tolerance_ms", 30_000.into()),
        ("sts", [("max_age", Value::from(0)), ("include_subdomains", false.into())].into()),
    ]);
    let body = encode(&welcome).unwrap();
    let mut bytes = Vec::new();
    let (kind, counter) = (Kind::Welcome, 0);
    encode_frame(&mut bytes, &Frame { kind, stream: 0, timestamp: 1, salt: 2, counter, token: &[0; 32], body: &body });
    let (start, rest) = bytes.split_at(HEADER_SIZE);
    for (late, is_late) in
        [(FRAME_TIMEOUT.checked_sub(Duration::from_millis(1)).unwrap(), false), (FRAME_TIMEOUT, true)]
    {
        for pieces in [vec![rest], rest.chunks(1).collect()] {
            let mut conversation = Conversation::new(Settings::default());
            let mut events = Vec::new();
            conversation.receive(start, 1, Duration::ZERO, &mut events);
            for piece in pieces {
                conversation.receive(piece, 1, late, &mut events);
            }
            assert_eq!(events.len(), 1);
            assert_eq!(matches!(events[0], Event::Ended { code: None, .. }), is_late, "{events:?}");
            assert_eq!(matches!(events[0], Event::Welcomed), !is_late, "{events:?}");
        }
    }
}

#[test]
fn debug_hides_token_and_body() {
    let bytes = frame(Kind::Response, 1, b"secret");
    let mut decoder = FrameDecoder::new();
    decoder.feed(&bytes);
    assert!(format!("{decoder:?}").contains("74"));
    let text = format!("{:?}", decoder.next(&AT_CLIENT).unwrap().unwrap());
    assert!(text.contains("Response") && !text.contains('7'), "{text}");
    assert_eq!(MIN_LENGTH, 64);
}
