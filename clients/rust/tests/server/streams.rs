//! Streams of items.

use super::{MS, code, map};
use futures_core::Stream as _;
use serde::Serialize;
use std::future::poll_fn;
use std::pin::Pin;
use zcproto::{Client, Code, Error, Value};

#[derive(Serialize)]
struct Count {
    n: u32,
    size: u32,
}

pub async fn items_arrive_in_order_and_then_the_result(client: &Client) {
    for (n, size, window) in [(1_000, 0, [64, 262_144]), (50, 60_000, [64, 262_144]), (20, 1_000, [1, 1])] {
        let stream = client.stream("count", &Count { n, size }).window(window[0], window[1]).open();
        for number in 0..n {
            let (got, bytes): (u32, zcproto::codec::Bytes) = stream.next().await.unwrap().unwrap();
            assert_eq!((got, bytes.0.len()), (number, size as usize));
        }
        assert_eq!(stream.next::<Value>().await.unwrap(), None);
        assert_eq!(stream.result::<Value>().await.unwrap(), map("sent", n));
    }
}

pub async fn items_that_have_arrived_come_before_the_error(client: &Client) {
    let stream = client.stream("fail", &()).open();
    assert_eq!(code(stream.result::<Value>().await), Code::NotFound);
    for number in 0..3 {
        assert_eq!(stream.next::<i32>().await.unwrap(), Some(number));
    }
    assert_eq!(code(stream.next::<i32>().await), Code::NotFound);
}

pub async fn items_are_a_stream_of_futures_which_ends_after_an_error(client: &Client) {
    let stream = client.stream("fail", &()).open();
    let mut items = stream.items::<i32>();
    let mut next = async || poll_fn(|cx| Pin::new(&mut items).poll_next(cx)).await;
    for number in 0..3 {
        assert_eq!(next().await.unwrap().unwrap(), number);
    }
    assert_eq!(code(next().await.unwrap()), Code::NotFound);
    assert!(next().await.is_none());
    let stream = client.stream("count", &Count { n: 1, size: 0 }).open();
    let mut items = stream.items::<i32>();
    let mut next = async || poll_fn(|cx| Pin::new(&mut items).poll_next(cx)).await;
    assert!(matches!(next().await, Some(Err(Error::Type(_)))));
    assert!(next().await.is_none());
}

/// Wait until the server runs no `forever`.
async fn all_cancelled(client: &Client) {
    while client.call::<i64>("running", &()).await.unwrap() > 0 {}
}

pub async fn a_dropped_stream_is_cancelled(client: &Client) {
    let stream = client.stream("forever", &()).open();
    assert_eq!(stream.next::<i32>().await.unwrap(), Some(1));
    drop(stream);
    all_cancelled(client).await;
    let stream = client.stream("forever", &()).window(2, 1_000).open();
    stream.next::<i32>().await.unwrap();
    stream.cancel();
    assert_eq!(code(stream.next::<i32>().await), Code::Cancelled);
    all_cancelled(client).await;
    let short = client.stream("forever", &()).timeout(50 * MS).open();
    assert_eq!(code(short.result::<Value>().await), Code::DeadlineExceeded);
    all_cancelled(client).await;
}

pub async fn items_are_sent_when_the_server_wants_them(client: &Client) {
    let upload = client.stream("total", &()).open();
    for number in 0..1_000i64 {
        upload.send(&number).await.unwrap();
    }
    upload.finish().await;
    assert_eq!(upload.result::<i64>().await.unwrap(), 499_500);
    let chat = client.stream("chat", &()).open();
    for text in ["a", "b"] {
        chat.send(text).await.unwrap();
        assert_eq!(chat.next::<String>().await.unwrap().unwrap(), text.to_uppercase());
    }
    assert_eq!(code(chat.send(&"x".repeat(70_000)).await), Code::InvalidArgument);
    chat.finish().await;
    assert!(matches!(chat.send("c").await, Err(Error::Config(_) | Error::Call(_))));
    assert_eq!(chat.next::<String>().await.unwrap(), None);
}

pub async fn a_stream_that_cannot_be_opened_reports_why(client: &Client) {
    assert_eq!(code(client.stream("no.such.method", &()).open().next::<Value>().await), Code::Unimplemented);
    assert_eq!(code(client.call::<Value>("count", &map("n", 1)).await), Code::FailedPrecondition);
}

pub async fn an_interrupted_stream_continues_behind_its_last_item(client: &Client) {
    #[derive(Serialize)]
    struct Numbers {
        to: u32,
        after: u32,
    }
    let builder = client.stream("numbers", &Numbers { to: 50, after: 0 }).window(4, 10_000);
    let stream = builder.reopen(|last: u32| Numbers { to: 50, after: last }).open();
    for number in 1..=50 {
        if number % 20 == 0 {
            client.cut();
        }
        assert_eq!(stream.next::<u32>().await.unwrap(), Some(number));
    }
    assert_eq!(stream.next::<u32>().await.unwrap(), None);
    assert!(matches!(stream.send(&1).await, Err(Error::Config(_) | Error::Call(_))));
    let plain = client.stream("numbers", &Numbers { to: 50, after: 0 }).window(4, 10_000).open();
    plain.next::<u32>().await.unwrap();
    client.cut();
    let lost = loop {
        match plain.next::<u32>().await {
            Ok(item) => assert!(item.is_some()),
            Err(error) => break error,
        }
    };
    assert!(matches!(lost, Error::Closed(_)), "{lost:?}");
}
