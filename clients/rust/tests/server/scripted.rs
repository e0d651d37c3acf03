//! Servers that go away.

use crate::fake::{Fake, goaway, welcome};
use std::time::Duration;
use zcproto::{Client, Error, Value};

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
        peer.serve(Clone::clone);
    });
    let client = Client::connect(options).await.unwrap();
    client.call::<Value>("echo", &()).await.unwrap();
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
