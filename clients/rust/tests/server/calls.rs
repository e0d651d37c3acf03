//! Calls: values, errors, cancelling, retries.

use super::{MS, code, map};
use crate::support::Server;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use tokio::sync::mpsc;
use zcproto::{Client, Closed, Code, Error, Value};

pub async fn values_of_all_types_come_back(client: &Client) {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Everything {
        text: String,
        bytes: zcproto::codec::Bytes,
        numbers: (i64, u64, i8),
        float: f64,
        nothing: Option<bool>,
        nested: HashMap<String, Vec<bool>>,
    }
    let params = Everything {
        text: "漢字 😀".to_owned(),
        bytes: zcproto::codec::Bytes(vec![0, 255]),
        numbers: (i64::MIN, u64::MAX, -1),
        float: 1.5,
        nothing: None,
        nested: [("yes".to_owned(), vec![true, false])].into(),
    };
    assert_eq!(client.call::<Everything>("echo", &params).await.unwrap(), params);
    assert!(client.call::<i64>("time", &()).await.unwrap() > 1_700_000_000_000);
    assert!(matches!(client.call::<String>("time", &()).await, Err(Error::Type(_))));
    assert_eq!(client.welcome().unwrap().max_frame, 1_048_576);
}

pub async fn more_calls_than_streams_succeed(client: &Client) {
    let calls = (0..500i64).map(|n| {
        let client = client.clone();
        tokio::spawn(async move { client.call::<Value>("echo", &map("n", n)).await.unwrap() })
    });
    for (n, call) in (0i64..).zip(calls.collect::<Vec<_>>()) {
        assert_eq!(call.await.unwrap(), map("n", n));
    }
}

pub async fn extra_connections_serve_calls(server: &Server, key: &str) {
    let client = Client::connect(server.options().api_key("ada", key).max_connections(3)).await.unwrap();
    more_calls_than_streams_succeed(&client).await;
    client.close().await;
}

pub async fn errors_are_reported_and_abandoned_calls_disturb_no_other(client: &Client) {
    assert_eq!(code(client.call::<Value>("no.such.method", &()).await), Code::Unimplemented);
    assert_eq!(code(client.call::<Value>("sleep", &map("minutes", 1)).await), Code::InvalidArgument);
    assert_eq!(code(client.call::<Value>("Not a method", &()).await), Code::InvalidArgument);
    assert_eq!(code(client.call::<Value>("echo", &[1]).await), Code::InvalidArgument);
    let late = client.request("sleep").params(&map("ms", 60_000)).timeout(50 * MS);
    assert_eq!(code(late.send::<Value>().await), Code::DeadlineExceeded);
    let long = map("ms", 60_000);
    let dropped = tokio::time::timeout(50 * MS, client.call::<Value>("sleep", &long)).await;
    assert!(dropped.is_err());
    assert_eq!(client.call::<Value>("sleep", &map("ms", 1)).await.unwrap(), Value::Map(Vec::new()));
}

pub async fn repeated_calls_with_an_idempotency_key_run_once(client: &Client) {
    let first: i64 = client.request("time").idempotency_key("once").send().await.unwrap();
    while client.call::<i64>("time", &()).await.unwrap() == first {} // the server's time has not changed yet
    assert_eq!(client.request("time").idempotency_key("once").send::<i64>().await.unwrap(), first);
}

pub async fn a_large_first_call_succeeds(server: &Server, key: &str) {
    let client = server.connect("ada", key).await.unwrap();
    let text = map("text", "x".repeat(500_000));
    assert_eq!(client.call::<Value>("echo", &text).await.unwrap(), text);
    client.cut();
    assert_eq!(client.request("echo").params(&text).idempotency_key("large").send::<Value>().await.unwrap(), text);
    let too_large = map("text", "x".repeat(2 << 20));
    let error = client.call::<Value>("echo", &too_large).await.unwrap_err();
    assert_eq!(error.as_call().unwrap().details.get("limit").unwrap(), &Value::Int(1_048_576));
    client.close().await;
}

pub async fn the_application_is_notified_of_each_connection(server: &Server, key: &str) {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let options = server.options().api_key("ada", key).on_connected(move |endpoint| {
        sender.send(endpoint.clone()).unwrap();
    });
    let client = Client::connect(options).await.unwrap();
    let first = receiver.recv().await.unwrap();
    assert_eq!((first.host.as_str(), first.port), ("localhost", server.port()));
    assert!(first.ip.is_loopback());
    assert_eq!(client.endpoint(), Some(first));
    client.cut();
    receiver.recv().await.unwrap();
    client.call::<Value>("echo", &()).await.unwrap();
    client.close().await;
    assert_eq!(client.endpoint(), None);
    drop(client);
    assert_eq!(receiver.recv().await, None, "called once for each connection");
}

pub async fn a_cut_connection_is_replaced(server: &Server, key: &str) {
    let client = server.connect("ada", key).await.unwrap();
    let id = client.session().unwrap().id;
    let (long, short) = (map("ms", 60_000), map("ms", 300));
    let retried = client.request("sleep").params(&short).idempotency_key("retried");
    let (lost, retried, ()) = tokio::join!(client.call::<Value>("sleep", &long), retried.send::<Value>(), async {
        client.call::<Value>("echo", &()).await.unwrap(); // sent behind the other two
        client.cut();
    });
    assert!(matches!(lost, Err(Error::Closed(Closed { clean: false, .. }))), "{lost:?}");
    assert_eq!(retried.unwrap(), Value::Map(Vec::new()));
    assert_eq!(client.session().unwrap().id, id);
    client.close().await;
}
