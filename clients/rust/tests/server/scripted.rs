//! Servers that go away, and others that take their place.

use crate::fake::{Fake, goaway, options_at, session, text, welcome};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::net::TcpSocket;
use tokio::runtime::Runtime;
use zcproto::frame::Kind;
use zcproto::{Client, Code, Error, TlsFailure, Value};

/// Return a socket whose port refuses connections while it is open.
pub fn refusing() -> (TcpSocket, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    (socket, address)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn goaway_on_the_first_connection_is_retried_within_the_start_timeout() {
    let server = Fake::new();
    let options = server.options();
    let script = std::thread::spawn(move || {
        for closes in [true, false] {
            let mut leaving = server.accept();
            leaving.send(&[welcome(), goaway("draining", 1)]);
            if closes {
                leaving.close();
            }
        }
        let mut peer = server.accept();
        peer.send(&[welcome()]);
        peer.answer(1, "third");
        peer.close();
    });
    let client = Client::connect(options).await.unwrap();
    assert_eq!(client.call::<String>("who", &()).await.unwrap(), "third");
    client.close().await;
    script.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn goaway_on_the_first_connection_is_an_error_if_its_delay_exceeds_the_start_timeout() {
    let server = Fake::new();
    let options = server.options().start_timeout(Duration::from_secs(60));
    let script = std::thread::spawn(move || {
        let mut leaving = server.accept();
        leaving.send(&[welcome(), goaway("draining", 3_600_000)]);
        leaving.close();
    });
    let refused = Client::connect(options).await.unwrap_err();
    let Error::CannotConnect { reason, refused: false } = refused else { panic!("{refused:?}") };
    assert!(reason.contains("going away"), "{reason}");
    script.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_refuses_is_passed_over_at_once() {
    let ((_socket, refusing), server) = (refusing(), Fake::new());
    let address = server.address();
    let script = std::thread::spawn(move || {
        let mut peer = server.accept();
        peer.send(&[welcome()]);
        peer.close();
    });
    let options = options_at(&[&refusing, &address]).verify(false).start_timeout(Duration::ZERO);
    let client = Client::connect(options).await.unwrap();
    assert_eq!(client.addresses(), [refusing, address.clone()]);
    client.close().await;
    script.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_goes_elsewhere_at_once_and_repeats_no_call_that_may_have_run() {
    let (first, second) = (Fake::new(), Fake::new());
    let options = options_at(&[&first.address(), &second.address()]).verify(false);
    let script_of_first = std::thread::spawn(move || {
        let mut peer = first.accept();
        peer.send(&[welcome()]);
        peer.answer(1, "first");
        peer.send(&[goaway("draining", 3_600_000)]); // it rests for longer than this test takes
        peer.close();
    });
    let script_of_second = std::thread::spawn(move || {
        for answers in [1, 0] {
            let mut peer = second.accept();
            peer.send(&[welcome()]);
            peer.answer(answers, "second");
            while peer.receive().is_some_and(|(_, stream, _)| stream == 0) {}
            drop(peer); // it has received a request, and ends without an answer
        }
        let mut peer = second.accept();
        peer.send(&[welcome()]);
        peer.answer(2, "second");
        peer.close();
    });
    let client = Client::connect(options).await.unwrap();
    let who = || client.call::<String>("who", &());
    assert_eq!(who().await.unwrap(), "first");
    assert_eq!(who().await.unwrap(), "second");
    assert!(matches!(who().await, Err(Error::Closed(_))), "it may have run");
    let repeated = client.request("who").idempotency_key("once").send::<String>();
    assert_eq!(repeated.await.unwrap(), "second");
    assert_eq!(who().await.unwrap(), "second");
    client.close().await;
    script_of_first.join().unwrap();
    script_of_second.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_error_of_a_server_that_is_not_trusted_precedes_others() {
    let ((_socket, refusing), server) = (refusing(), Fake::new());
    let options = options_at(&[&refusing, &server.address()]).pins([format!("sha256/{}=", "A".repeat(43))]);
    let script = std::thread::spawn(move || assert_eq!(server.accept().receive(), None));
    let error = Client::connect(options).await.unwrap_err();
    let Error::Tls(error) = error else { panic!("{error:?}") };
    assert_eq!(error.failure, TlsFailure::PinMismatch);
    assert!(error.detail.starts_with("none of 2 addresses can be reached: "), "{}", error.detail);
    script.join().unwrap();
}

#[test]
fn a_client_outside_of_its_runtime_reports_errors_and_does_not_panic() {
    let server = Fake::new();
    let options = server.options();
    let connecting = pin!(Client::connect(options.clone())).poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(connecting, Poll::Ready(Err(Error::Config(_)))), "{connecting:?}");
    let script = std::thread::spawn(move || {
        let mut peer = server.accept();
        peer.send(&[welcome()]);
        assert_eq!(peer.receive(), None);
    });
    let (own, other) = (Runtime::new().unwrap(), Runtime::new().unwrap());
    let client = own.block_on(Client::connect(options)).unwrap();
    let stream = client.stream("items", &()).open();
    let refused = other.block_on(stream.result::<Value>()).unwrap_err();
    assert_eq!(refused.code(), Some(Code::Unimplemented), "{refused:?}");
    own.shutdown_background();
    let stream = client.stream("items", &()).open();
    let ended = other.block_on(stream.result::<Value>());
    assert!(matches!(ended, Err(Error::Closed(_))), "{ended:?}");
    script.join().unwrap();
}

/// Let time pass for a client.
pub async fn advance(seconds: u64) {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(seconds)).await;
    tokio::time::resume();
}

#[tokio::test]
async fn a_client_moves_from_a_server_that_hangs_and_repeats_idempotent_calls_there() {
    let (first, second) = (Fake::new(), Fake::new());
    let options = options_at(&[&first.address(), &second.address()]).verify(false).api_key("ada", "key");
    let (sender, received) = std::sync::mpsc::channel();
    let script = std::thread::spawn(move || {
        let mut hanging = first.accept();
        hanging.send(&[welcome()]);
        let number = hanging.expect("session.open");
        hanging.send(&[session(number, 1)]);
        hanging.expect("who");
        hanging.expect("who");
        sender.send(()).unwrap();
        assert_eq!(hanging.receive().unwrap().0, Kind::Ping);
        sender.send(()).unwrap();
        let mut next = second.accept();
        next.send(&[welcome()]);
        next.reply("session.info", "");
        assert_eq!(next.token, [1; 32]);
        next.reply("session.info", ""); // the client has moved
        assert_eq!(hanging.receive(), None);
        next.reply("who", "second");
        next.reply("session.close", "");
    });
    let client = Client::connect(options).await.unwrap();
    let start = |key| {
        let client = client.clone();
        tokio::spawn(async move {
            let request = client.request("who").timeout(None);
            if key { request.idempotency_key("once").send::<String>().await } else { request.send().await }
        })
    };
    let (repeated, lost) = (start(true), start(false));
    let received = tokio::task::spawn_blocking(move || received.recv().map(|()| received).unwrap()).await.unwrap();
    advance(5).await;
    let received = tokio::task::spawn_blocking(move || received.recv().map(|()| received).unwrap()).await.unwrap();
    advance(2).await;
    assert_eq!(repeated.await.unwrap().unwrap(), "second");
    let lost = lost.await.unwrap();
    assert!(matches!(lost, Err(Error::Closed(_))), "it may have run: {lost:?}");
    client.close().await;
    script.join().unwrap();
    drop(received);
}

#[tokio::test]
async fn a_byte_of_the_server_ends_the_move_to_another_one() {
    let (first, second) = (Fake::new(), Fake::new());
    let options = options_at(&[&first.address(), &second.address()]).verify(false).api_key("ada", "key");
    let (sender, received) = std::sync::mpsc::channel();
    let script = std::thread::spawn(move || {
        let mut hanging = first.accept();
        hanging.send(&[welcome()]);
        let number = hanging.expect("session.open");
        hanging.send(&[session(number, 1)]);
        let who = hanging.expect("who");
        sender.send(()).unwrap();
        assert_eq!(hanging.receive().unwrap().0, Kind::Ping);
        sender.send(()).unwrap();
        let mut next = second.accept();
        next.send(&[welcome()]);
        next.expect("session.info");
        hanging.send(&[(Kind::Pong, 0, Vec::new())]);
        assert_eq!(next.receive(), None);
        hanging.send(&[text(who, "first")]);
        hanging.reply("session.close", "");
    });
    let client = Client::connect(options).await.unwrap();
    let call = client.clone();
    let call = tokio::spawn(async move { call.request("who").timeout(None).send::<String>().await });
    let received = tokio::task::spawn_blocking(move || received.recv().map(|()| received).unwrap()).await.unwrap();
    advance(5).await;
    let received = tokio::task::spawn_blocking(move || received.recv().map(|()| received).unwrap()).await.unwrap();
    advance(2).await;
    assert_eq!(call.await.unwrap().unwrap(), "first");
    client.close().await;
    script.join().unwrap();
    drop(received);
}
