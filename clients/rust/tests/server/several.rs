//! One session on several connections: each shows its newest token, and has its handlers.

use crate::fake::{Fake, Peer, Sent, call, error, event, goaway, session, text, welcome_with_calls};
use std::future::Future;
use std::sync::mpsc;
use std::time::Duration;
use tokio::task::JoinHandle;
use zcproto::frame::Kind;
use zcproto::{Call, CallError, Client, Code, ConnectOptions, Device, Error, Value, codec};

/// Run a script in a thread.
fn play<T: Send + 'static>(script: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T> {
    let playing = tokio::task::spawn_blocking(script);
    async { playing.await.unwrap() }
}

/// Accept a connection whose client opens a session, with a token of this byte.
fn accept(server: &Fake, max_streams: i64, token: u8) -> Peer {
    let mut peer = server.accept();
    peer.send(&[welcome_with_calls(max_streams)]);
    let number = peer.expect("session.open");
    peer.send(&[session(number, token)]);
    peer
}

/// Wait for the refresh of a session, and grant a token of this byte.
fn refresh(peer: &mut Peer, token: u8) {
    let number = peer.expect("session.refresh");
    peer.send(&[session(number, token)]);
}

fn options(server: &Fake) -> ConnectOptions {
    server.options().api_key("ada", "key")
}

fn start(client: &Client, method: &'static str) -> JoinHandle<zcproto::Result<String>> {
    let client = client.clone();
    tokio::spawn(async move { client.call::<String>(method, &()).await })
}

async fn approve(_: Call) -> Result<bool, CallError> {
    Ok(true)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refresh_shows_the_new_token_on_each_connection_at_once() {
    let server = Fake::new();
    let options = options(&server).max_connections(2);
    let (started, first_is_sent) = mpsc::channel();
    let script = play(move || {
        let mut first = accept(&server, 1, 1);
        let one = first.expect("first");
        started.send(()).unwrap();
        let mut extra = server.accept();
        extra.send(&[welcome_with_calls(1)]);
        extra.reply("session.info", "");
        let two = extra.expect("second"); // it has no more room
        first.send_with([1; 32], &[event("session.expiring")]);
        first.send(&[text(one, "1")]);
        refresh(&mut first, 2);
        let number = extra.expect("session.info");
        assert_eq!(extra.token, [2; 32]);
        extra.send(&[error(number, 8, Value::Map(Vec::new()))]); // too many in flight, and shown all the same
        // A connection that drains has streams, too.
        extra.send(&[goaway("draining", 0)]);
        first.send_with([2; 32], &[event("session.expiring")]);
        refresh(&mut first, 3);
        extra.expect("session.info");
        assert_eq!(extra.token, [3; 32]);
        extra.send(&[text(two, "2")]);
        first.reply("session.close", "");
    });
    let client = Client::connect(options).await.unwrap();
    let first = start(&client, "first");
    play(move || first_is_sent.recv().unwrap()).await;
    let second = start(&client, "second");
    assert_eq!(first.await.unwrap().unwrap(), "1");
    assert_eq!(second.await.unwrap().unwrap(), "2");
    client.close().await;
    script.await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_refreshed_where_there_is_room() {
    let server = Fake::new();
    let options = options(&server).max_connections(2);
    let (started, first_is_sent) = mpsc::channel();
    let script = play(move || {
        let mut first = accept(&server, 1, 1);
        let one = first.expect("first");
        started.send(()).unwrap();
        let mut extra = server.accept();
        extra.send(&[welcome_with_calls(4)]);
        extra.reply("session.info", "");
        let two = extra.expect("second");
        first.send_with([1; 32], &[event("session.expiring")]);
        refresh(&mut extra, 2);
        first.expect("session.info");
        assert_eq!(first.token, [2; 32]);
        extra.send(&[text(two, "2")]);
        first.send(&[text(one, "1")]);
        first.close();
    });
    let client = Client::connect(options).await.unwrap();
    let first = start(&client, "first");
    play(move || first_is_sent.recv().unwrap()).await;
    assert_eq!(start(&client, "second").await.unwrap().unwrap(), "2");
    assert_eq!(first.await.unwrap().unwrap(), "1");
    drop(client);
    script.await;
}

/// Return a result of `session.open` whose session is bound to the key of a device.
fn bound((kind, stream, body): Sent) -> Sent {
    let Value::Map(mut body) = codec::decode(&body).unwrap() else { panic!("no map") };
    body.push(("bound".to_owned(), true.into()));
    (kind, stream, codec::encode(&Value::Map(body)).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_registers_its_handlers_before_other_requests_on_a_new_connection() {
    let server = Fake::new();
    let options = server.options().device(Device::from_seed(&[5; 32]), "laptop");
    let (attaching, is_attaching) = mpsc::channel();
    let script = play(move || {
        let mut peer = server.accept();
        peer.send(&[welcome_with_calls(8)]);
        let number = peer.expect("session.open");
        peer.send(&[bound(session(number, 1))]);
        peer.reply("session.handle", "");
        drop(peer);
        let mut peer = server.accept();
        peer.send(&[welcome_with_calls(8)]);
        let number = peer.expect("session.attach");
        attaching.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(50)); // for the call, which waits
        peer.send(&[text(number, "")]);
        for method in ["session.handle", "who"] {
            peer.reply(method, "ada");
        }
        peer.close();
    });
    let client = Client::connect(options).await.unwrap();
    client.handle("approve", approve).await.unwrap();
    play(move || is_attaching.recv().unwrap()).await;
    assert_eq!(start(&client, "who").await.unwrap().unwrap(), "ada");
    drop(client);
    script.await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_are_registered_on_each_connection_before_its_first_call() {
    let server = Fake::new();
    let options = options(&server).max_connections(2);
    let (started, first_is_sent) = mpsc::channel();
    let script = play(move || {
        let mut first = accept(&server, 1, 1);
        first.reply("session.handle", "");
        let one = first.expect("first");
        started.send(()).unwrap();
        let mut extra = server.accept();
        extra.send(&[welcome_with_calls(1)]);
        extra.reply("session.handle", "");
        let two = extra.expect("second");
        extra.send_with([1; 32], &[call(1, "approve")]);
        assert_eq!(extra.receive().unwrap(), (Kind::Result, 1, vec![0xc3]));
        // After a refresh elsewhere the registration holds, by the new token.
        first.send_with([1; 32], &[event("session.expiring")]);
        first.send(&[text(one, "1")]);
        refresh(&mut first, 2);
        extra.reply("session.info", "");
        extra.send_with([2; 32], &[call(2, "approve")]);
        assert_eq!(extra.receive().unwrap(), (Kind::Result, 2, vec![0xc3]));
        assert_eq!(extra.token, [2; 32]);
        extra.send(&[text(two, "2")]);
        // Another handler is registered on both.
        for peer in [&mut first, &mut extra] {
            peer.reply("session.handle", "");
        }
        first.reply("session.close", "");
    });
    let client = Client::connect(options).await.unwrap();
    client.handle("approve", approve).await.unwrap();
    let first = start(&client, "first");
    play(move || first_is_sent.recv().unwrap()).await;
    assert_eq!(start(&client, "second").await.unwrap().unwrap(), "2");
    assert_eq!(first.await.unwrap().unwrap(), "1");
    client.handle("refuse", approve).await.unwrap();
    client.close().await;
    script.await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_the_server_has_lost_is_opened_again_once_for_all_calls() {
    let server = Fake::new();
    let options = options(&server);
    let unknown = || Value::from([("reason", Value::from("unknown_token"))]);
    let script = play(move || {
        let mut peer = accept(&server, 8, 1);
        peer.reply("session.handle", "");
        let first = peer.receive().unwrap().1;
        let second = peer.receive().unwrap().1;
        peer.send(&[error(first, 16, unknown()), error(second, 16, unknown())]);
        let number = peer.expect("session.open"); // not session.refresh: the store has lost that, too
        peer.send(&[session(number, 2)]);
        peer.reply("session.handle", ""); // before the calls that wait
        for _ in 0..2 {
            peer.reply("who", "ada");
            assert_eq!(peer.token, [2; 32]);
        }
        let number = peer.expect("who");
        peer.send(&[error(number, 16, unknown())]);
        let number = peer.expect("session.open");
        peer.send(&[session(number, 3)]);
        peer.reply("session.handle", "");
        let number = peer.expect("who");
        peer.send(&[error(number, 16, unknown())]); // once
        let number = peer.expect("who");
        peer.send(&[error(number, 69, unknown())]); // this is final
        peer.close();
    });
    let client = Client::connect(options).await.unwrap();
    client.handle("approve", approve).await.unwrap();
    let (first, second) = (start(&client, "who"), start(&client, "who"));
    assert_eq!(first.await.unwrap().unwrap(), "ada");
    assert_eq!(second.await.unwrap().unwrap(), "ada");
    let refused = client.call::<String>("who", &()).await;
    assert_eq!(refused.unwrap_err().code(), Some(Code::Unauthenticated));
    for _ in 0..2 {
        let ended = client.call::<String>("who", &()).await;
        assert!(matches!(ended, Err(Error::Call(CallError { code: Code::TokenRevoked, .. }))), "{ended:?}");
    }
    client.close().await;
    script.await;
}
