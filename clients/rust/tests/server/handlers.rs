//! Calls from the server.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::Notify;
use zcproto::{CallError, Client, Code, Error, Value};

#[derive(Serialize)]
struct Ask {
    method: &'static str,
    params: HashMap<&'static str, i64>,
    timeout: f64,
}

async fn ask(client: &Client, method: &'static str, timeout: f64) -> (String, Value) {
    client.call("ask", &Ask { method, params: [("a", 1), ("b", 2)].into(), timeout }).await.unwrap()
}

pub async fn handlers_answer_calls_from_the_server(client: &Client) {
    #[derive(Deserialize)]
    struct Add {
        a: i64,
        b: i64,
    }
    let add = |call: zcproto::Call| async move {
        let Add { a, b } = call.params()?;
        Ok((call.user, a + b))
    };
    client.handle("add", add).await.unwrap();
    client.handle("refuse", |_| async { Err::<(), _>(CallError::new(Code::PermissionDenied, "no")) }).await.unwrap();
    client
        .handle("break", |call| async move {
            assert!(call.method.is_empty(), "a fault of the handler");
            Ok(())
        })
        .await
        .unwrap();
    let sum = Value::Array(vec!["ada".into(), Value::Int(3)]);
    assert_eq!(ask(client, "add", 600.0).await, ("answer".to_owned(), sum));
    assert_eq!(ask(client, "refuse", 600.0).await.1, "PERMISSION_DENIED".into());
    assert_eq!(ask(client, "break", 600.0).await.1, "INTERNAL".into());
    assert_eq!(ask(client, "no.handler", 600.0).await.1, "UNAVAILABLE".into());
}

pub async fn a_removed_handler_is_not_called(client: &Client) {
    client.handle("temporary", |_| async { Ok(1) }).await.unwrap();
    assert_eq!(ask(client, "temporary", 600.0).await, ("answer".to_owned(), Value::Int(1)));
    client.remove_handler("temporary").await.unwrap();
    assert_eq!(ask(client, "temporary", 600.0).await.1, "UNAVAILABLE".into());
    client.remove_handler("temporary").await.unwrap(); // again
}

pub async fn withdrawn_calls_drop_their_handlers(client: &Client) {
    struct Dropped(Arc<Notify>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.notify_one();
        }
    }
    let (begun, dropped) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begins, drops) = (Arc::clone(&begun), Arc::clone(&dropped));
    let wait = move |_| {
        let guard = Dropped(Arc::clone(&drops));
        begins.notify_one();
        async move {
            std::future::pending::<()>().await;
            drop(guard);
            Ok(())
        }
    };
    client.handle("wait", wait).await.unwrap();
    tokio::select! {
        answer = ask(client, "wait", 600.0) => panic!("{answer:?}"),
        () = begun.notified() => {} // `ask` is cancelled, and withdraws its call
    }
    dropped.notified().await;
    assert_eq!(ask(client, "wait", 0.05).await.1, "DEADLINE_EXCEEDED".into());
}

pub async fn handlers_are_registered_again_after_a_cut(client: &Client) {
    client.cut();
    loop {
        let method = Ask { method: "add", params: [("a", 1), ("b", 2)].into(), timeout: 600.0 };
        match client.call::<(String, Value)>("ask", &method).await {
            Ok((kind, _)) if kind == "answer" => return,
            Ok((_, code)) => assert_eq!(code, "UNAVAILABLE".into()), // not yet registered
            Err(error) => assert!(matches!(error, Error::Closed(_)), "{error:?}"),
        }
    }
}
