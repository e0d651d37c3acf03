//! Extra connections to a server, for calls that it allows no more of in flight on one.

use crate::fake::{self, Fake, Peer, goaway, options_at, welcome_of};
use crate::scripted::{advance, refusing};
use std::sync::mpsc;
use std::time::Duration;
use tokio::task::JoinHandle;
use zcproto::frame::Kind;
use zcproto::{Client, Error};

type Answer = JoinHandle<zcproto::Result<String>>;

/// A server that allows one request in flight on each connection, and its client. Its methods block.
struct Crowded {
    server: Fake,
    client: Client,
    first: Peer,
}

impl Crowded {
    /// Connect, and leave a call without an answer.
    async fn new(max_connections: usize) -> (Self, u32, Answer) {
        let server = Fake::new();
        let options = server.options().max_connections(max_connections);
        let accepting = tokio::task::spawn_blocking(move || {
            let mut first = accept(&server);
            let number = first.expect("first");
            (server, first, number)
        });
        let client = Client::connect(options).await.unwrap();
        let call = call(&client, "first");
        let (server, first, number) = accepting.await.unwrap();
        (Self { server, client, first }, number, call)
    }

    /// Answer the first call, whose number this is, and then the second one on the same connection.
    async fn answer_both(&mut self, number: u32, first: Answer, second: Answer) {
        self.first.send(&[fake::text(number, "1")]);
        assert_eq!(first.await.unwrap().unwrap(), "1");
        self.first.reply("second", "2");
        assert_eq!(second.await.unwrap().unwrap(), "2");
    }

    async fn close(self) {
        let first = tokio::task::spawn_blocking(move || self.first.close());
        self.client.close().await;
        first.await.unwrap();
    }
}

fn accept(server: &Fake) -> Peer {
    let mut peer = server.accept();
    peer.send(&[welcome_of(1)]);
    peer
}

fn call(client: &Client, method: &'static str) -> Answer {
    let client = client.clone();
    tokio::spawn(async move { client.call::<String>(method, &()).await })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extra_connection_takes_calls_that_the_server_allows_no_more_of() {
    let (mut crowded, number, first) = Crowded::new(2).await;
    let second = call(&crowded.client, "second");
    let mut other = accept(&crowded.server);
    let in_flight = other.expect("second");
    let third = call(&crowded.client, "third");
    other.send(&[fake::text(in_flight, "2")]);
    other.reply("third", "3"); // whichever has room first
    assert_eq!(second.await.unwrap().unwrap(), "2");
    assert_eq!(third.await.unwrap().unwrap(), "3");
    crowded.first.send(&[fake::text(number, "1")]);
    assert_eq!(first.await.unwrap().unwrap(), "1");
    let fourth = call(&crowded.client, "fourth");
    crowded.first.reply("fourth", "4");
    assert_eq!(fourth.await.unwrap().unwrap(), "4");
    assert!(!crowded.server.has_waiting(), "there are more connections than allowed");
    let closing = tokio::task::spawn_blocking(move || other.close());
    crowded.close().await;
    closing.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extra_connections_are_off_by_default() {
    let (mut crowded, number, first) = Crowded::new(1).await;
    let second = call(&crowded.client, "second");
    crowded.answer_both(number, first, second).await;
    assert!(!crowded.server.has_waiting());
    crowded.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_failure_of_an_extra_connection_fails_no_call() {
    let (mut crowded, number, first) = Crowded::new(2).await;
    let second = call(&crowded.client, "second");
    drop(crowded.server.accept());
    crowded.answer_both(number, first, second).await;
    crowded.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loss_of_an_extra_connection_loses_its_calls_alone() {
    let (mut crowded, number, first) = Crowded::new(2).await;
    let second = call(&crowded.client, "second");
    let mut other = accept(&crowded.server);
    other.expect("second");
    drop(other);
    assert!(matches!(second.await.unwrap(), Err(Error::Closed(_))), "it may have run");
    crowded.first.send(&[fake::text(number, "1")]);
    assert_eq!(first.await.unwrap().unwrap(), "1");
    assert!(crowded.client.endpoint().is_some());
    crowded.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_a_leaving_extra_connection_did_not_run_is_sent_elsewhere() {
    let (mut crowded, number, first) = Crowded::new(2).await;
    let second = call(&crowded.client, "second");
    let mut other = accept(&crowded.server);
    other.expect("second");
    other.send(&[goaway("draining", 0)]);
    tokio::task::spawn_blocking(move || other.close()).await.unwrap();
    crowded.answer_both(number, first, second).await;
    crowded.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_the_client_closes_extra_connections() {
    let (crowded, _, first) = Crowded::new(2).await;
    let second = call(&crowded.client, "second");
    let mut other = accept(&crowded.server);
    other.expect("second");
    let closing = tokio::task::spawn_blocking(move || assert!(other.receive().is_none()));
    crowded.close().await;
    closing.await.unwrap();
    for lost in [first, second] {
        assert!(matches!(lost.await.unwrap(), Err(Error::Closed(_))));
    }
}

#[tokio::test]
async fn an_idle_extra_connection_is_closed() {
    let server = Fake::new();
    let options = server.options().max_connections(2);
    let script = std::thread::spawn(move || {
        let mut first = accept(&server);
        let one = first.expect("first");
        let mut other = accept(&server);
        other.reply("second", "2");
        first.send(&[fake::text(one, "1")]);
        assert!(other.receive().is_none());
        first
    });
    let client = Client::connect(options).await.unwrap();
    let (first, second) = (call(&client, "first"), call(&client, "second"));
    assert_eq!(first.await.unwrap().unwrap(), "1");
    assert_eq!(second.await.unwrap().unwrap(), "2");
    advance(31).await;
    let first = tokio::task::spawn_blocking(|| script.join().unwrap()).await.unwrap();
    assert!(client.endpoint().is_some());
    let closing = tokio::task::spawn_blocking(move || first.close());
    client.close().await;
    closing.await.unwrap();
}

#[tokio::test]
async fn an_extra_connection_that_hangs_is_lost_alone_if_the_main_one_answers() {
    let (server, (_socket, refusing)) = (Fake::new(), refusing());
    let options = options_at(&[&server.address(), &refusing]).verify(false).max_connections(2);
    let (sender, received) = mpsc::channel();
    let script = std::thread::spawn(move || {
        let mut first = accept(&server);
        let one = first.expect("first");
        let mut other = accept(&server);
        other.expect("second");
        first.send(&[fake::text(one, "1")]);
        sender.send(()).unwrap();
        assert_eq!(other.receive().unwrap().0, Kind::Ping);
        sender.send(()).unwrap();
        assert_eq!(first.receive().unwrap().0, Kind::Ping); // does it hang, too?
        first.send(&[(Kind::Pong, 0, Vec::new())]);
        sender.send(()).unwrap();
        first.reply("third", "3");
        assert!(other.receive().is_none());
        first
    });
    let client = Client::connect(options).await.unwrap();
    let (first, second) = (call(&client, "first"), call(&client, "second"));
    assert_eq!(first.await.unwrap().unwrap(), "1");
    let mut received = Some(received);
    let mut next = async || {
        let waiting = received.take().unwrap();
        received = tokio::task::spawn_blocking(move || waiting.recv().map(|()| waiting).ok()).await.unwrap();
    };
    next().await;
    advance(5).await;
    next().await;
    advance(2).await;
    next().await;
    assert_eq!(call(&client, "third").await.unwrap().unwrap(), "3"); // after the PONG
    advance(2).await;
    assert!(matches!(second.await.unwrap(), Err(Error::Closed(_))), "it may have run");
    assert!(client.endpoint().is_some());
    let first = tokio::task::spawn_blocking(|| script.join().unwrap()).await.unwrap();
    let closing = tokio::task::spawn_blocking(move || first.close());
    client.close().await;
    closing.await.unwrap();
}

#[tokio::test]
async fn the_number_of_connections_is_limited() {
    for max in [0, 65] {
        let options = Fake::new().options().max_connections(max).timeout(Duration::from_secs(1));
        assert!(matches!(Client::connect(options).await, Err(Error::Config(_))), "{max}");
    }
}
