//! The spans of the client. A process of their own: another thread that meets a span first, without a subscriber, turns it
//! off for all threads.
#![cfg(unix)]

#[path = "support/fake.rs"]
#[allow(dead_code, reason = "the tests with a server use all of it")]
mod fake;
#[path = "support/mod.rs"]
mod support;

use fake::{Fake, session, welcome};
use std::fmt::Write;
use std::sync::{Arc, Mutex};
use zcproto::Client;

/// Collects the spans that are created, with their fields.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<String>>>);

struct Fields<'a>(&'a mut String);

impl tracing::field::Visit for Fields<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }
}

impl tracing::Subscriber for Spans {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("zcproto")
    }

    fn new_span(&self, span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        let mut text = span.metadata().name().to_owned();
        span.record(&mut Fields(&mut text));
        let mut spans = self.0.lock().unwrap();
        spans.push(text);
        tracing::span::Id::from_u64(spans.len() as u64)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test]
async fn spans_name_connections_sessions_and_calls() {
    let server = Fake::new();
    let (address, options) = (server.address(), server.options().api_key("ada", "key"));
    let script = std::thread::spawn(move || {
        let mut peer = server.accept();
        peer.send(&[welcome()]);
        let number = peer.expect("session.open");
        peer.send(&[session(number, 1)]);
        peer.answer(1, "first");
        peer.close();
    });
    let spans = Spans::default();
    let guard = tracing::subscriber::set_default(spans.clone());
    let client = Client::connect(options).await.unwrap();
    client.call::<String>("who", &()).await.unwrap();
    drop(client);
    drop(guard);
    let expected = [format!("connect endpoint={address}"), "renew_session".into(), "call method=\"who\"".into()];
    assert_eq!(*spans.0.lock().unwrap(), expected);
    tokio::task::spawn_blocking(|| script.join().unwrap()).await.unwrap();
}
