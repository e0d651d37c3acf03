//! The client with a real `zcproto serve`.
#![cfg(unix)]

mod support;

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use support::{Server, set_mode};
use tokio::net::{TcpListener, TcpStream};
use zcproto::{CallError, Client, Closed, Code, ConnectOptions, Credentials, Device, Error, TlsFailure, Value, enroll};

const MS: Duration = Duration::from_millis(1);

/// Return a map of one entry.
fn map(key: &str, value: impl Into<Value>) -> Value {
    Value::Map(vec![(key.to_owned(), value.into())])
}

/// Return the code of the error that a result must be.
fn code<T: std::fmt::Debug>(result: zcproto::Result<T>) -> Code {
    result.unwrap_err().code().unwrap()
}

fn tls<T: std::fmt::Debug>(result: zcproto::Result<T>) -> TlsFailure {
    match result.unwrap_err() {
        Error::Tls(error) => error.failure,
        other => panic!("{other:?}"),
    }
}

async fn next_event(client: &Client, name: &str) -> Value {
    loop {
        let event = client.next_event().await.unwrap();
        if event.name == name {
            return event.data;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_its_own_methods() {
    let mut server = Server::new("[sessions]\nper_user = 1000\n");
    let key = server.add_user("ada");
    server.start(None);
    let client = server.connect("ada", &key).await.unwrap();

    values_of_all_types_come_back(&client).await;
    more_calls_than_streams_succeed(&client).await;
    errors_are_reported_and_abandoned_calls_disturb_no_other(&client).await;
    repeated_calls_with_an_idempotency_key_run_once(&client).await;
    a_large_first_call_succeeds(&server, &key).await;
    sessions_are_revoked_and_opened_again(&server, &key).await;
    wrong_credentials_are_refused(&server, &key).await;
    public_methods_need_no_session(&server).await;
    several_users_share_one_connection(&server, &client).await;
    devices_open_bound_sessions(&server).await;
    a_cut_connection_is_replaced(&server, &key).await;
    truncation_is_not_a_clean_end(&server, &key).await;
    pins_and_names_are_checked(&server, &key).await;
    verification_cannot_be_disabled_for_known_hosts(&server, &key).await;
    secrets_of_tls_are_logged_by_option_alone(&server, &key).await;

    let token = client.session().unwrap().token().to_text().to_string();
    assert!(!format!("{client:?} {:?}", client.session()).contains(&token));
    client.close().await;
    assert!(matches!(client.call::<Value>("echo", &()).await, Err(Error::Closed(Closed { clean: true, .. }))));
    assert!(!server.log().contains(&key) && !server.log().contains(&token));
}

async fn values_of_all_types_come_back(client: &Client) {
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

async fn more_calls_than_streams_succeed(client: &Client) {
    let calls = (0..500i64).map(|n| {
        let client = client.clone();
        tokio::spawn(async move { client.call::<Value>("echo", &map("n", n)).await.unwrap() })
    });
    for (n, call) in (0i64..).zip(calls.collect::<Vec<_>>()) {
        assert_eq!(call.await.unwrap(), map("n", n));
    }
}

async fn errors_are_reported_and_abandoned_calls_disturb_no_other(client: &Client) {
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

async fn repeated_calls_with_an_idempotency_key_run_once(client: &Client) {
    let first: i64 = client.request("time").idempotency_key("once").send().await.unwrap();
    tokio::time::sleep(5 * MS).await; // the server's time has changed
    assert_eq!(client.request("time").idempotency_key("once").send::<i64>().await.unwrap(), first);
}

async fn a_large_first_call_succeeds(server: &Server, key: &str) {
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

async fn sessions_are_revoked_and_opened_again(server: &Server, key: &str) {
    let options = server.options().api_key("ada", key).client("first/1");
    let (first, second) = (Client::connect(options).await.unwrap(), server.connect("ada", key).await.unwrap());
    let id = first.session().unwrap().id;
    let list: Vec<Value> = second.call("session.list", &()).await.unwrap();
    let found = list.iter().find(|each| each.get("id").and_then(Value::as_str) == Some(&id)).unwrap();
    assert_eq!(found.get("client").unwrap().as_str(), Some("first/1"));
    second.call::<Value>("session.revoke", &map("id", id.as_str())).await.unwrap();
    next_event(&first, "session.revoked").await;
    assert_eq!(code(first.call::<Value>("echo", &()).await), Code::TokenRevoked);
    assert!(first.session().is_none());
    assert_ne!(first.open_session().await.unwrap().id, id);
    first.call::<Value>("echo", &()).await.unwrap();
    first.close().await;
    second.close().await;
}

async fn wrong_credentials_are_refused(server: &Server, key: &str) {
    assert_eq!(code(server.connect("ada", "wrong").await), Code::Unauthenticated);
    assert_eq!(code(server.connect("no.such.user", key).await), Code::Unauthenticated);
    let login = Credentials::login(|| async { Ok(map("scheme", "no.such.scheme")) });
    let refused = Client::connect(server.options().credentials(login)).await;
    assert_eq!(code(refused), Code::InvalidArgument);
    let failing = Credentials::login(|| async { Err("no ticket".into()) });
    let failed = Client::connect(server.options().credentials(failing)).await;
    assert!(matches!(failed, Err(Error::Login(_))));
}

async fn public_methods_need_no_session(server: &Server) {
    let client = Client::connect(server.options()).await.unwrap();
    let info: Value = client.call("server.info", &()).await.unwrap();
    assert_eq!(info.get("versions").unwrap(), &Value::Array(vec![Value::Int(1)]));
    assert_eq!(code(client.call::<Value>("echo", &()).await), Code::Unauthenticated);
    assert_eq!(code(client.open_session().await), Code::Unauthenticated);
    client.close().await;
}

async fn several_users_share_one_connection(server: &Server, client: &Client) {
    let key = server.add_user("eve");
    let eve = loop {
        // The server reads its users again within a second.
        match client.session_for(Credentials::api_key("eve", key.as_str())).await {
            Ok(eve) => break eve,
            Err(error) => assert_eq!(error.code(), Some(Code::Unauthenticated)),
        }
        tokio::time::sleep(200 * MS).await;
    };
    assert_eq!(eve.session().unwrap().user, "eve");
    let user = |info: Value| info.get("user").unwrap().as_str().unwrap().to_owned();
    assert_eq!(user(eve.call("session.info", &()).await.unwrap()), "eve");
    assert_eq!(user(client.call("session.info", &()).await.unwrap()), "ada");
    eve.close().await;
    assert!(eve.call::<Value>("echo", &()).await.is_err());
    client.call::<Value>("echo", &()).await.unwrap();
}

async fn devices_open_bound_sessions(server: &Server) {
    let file = server.home.join("laptop.key");
    let device = Device::create(&file).unwrap();
    assert!(matches!(Device::create(&file), Err(Error::Certificate(_))));
    let pair = server.run(&["pair", "--user", "ada"]);
    assert_eq!(enroll(server.options(), &pair, &device, "laptop").await.unwrap(), "ada");
    assert_eq!(code(enroll(server.options(), &pair, &device, "laptop").await), Code::Unauthenticated);
    let again = server.run(&["pair", "--user", "ada"]);
    assert_eq!(code(enroll(server.options(), &again, &device, "laptop").await), Code::AlreadyExists);
    let loaded = Device::load(&file).unwrap();
    assert_eq!(loaded.public_key(), device.public_key());
    let client = Client::connect(server.options().device(loaded, "laptop")).await.unwrap();
    let session = client.session().unwrap();
    assert!(session.bound);
    client.cut();
    client.request("echo").idempotency_key("after the cut").send::<Value>().await.unwrap();
    assert_eq!(client.session().unwrap().id, session.id);
    client.close().await;
    set_mode(&file, 0o644);
    assert!(matches!(Device::load(&file), Err(Error::Certificate(_))));
}

async fn a_cut_connection_is_replaced(server: &Server, key: &str) {
    let client = server.connect("ada", key).await.unwrap();
    let id = client.session().unwrap().id;
    let sleep = map("ms", 300);
    let lost = tokio::spawn({
        let (client, sleep) = (client.clone(), sleep.clone());
        async move { client.call::<Value>("sleep", &sleep).await }
    });
    let retried = tokio::spawn({
        let client = client.clone();
        async move { client.request("sleep").params(&sleep).idempotency_key("retried").send::<Value>().await }
    });
    tokio::time::sleep(50 * MS).await;
    client.cut();
    assert!(matches!(lost.await.unwrap(), Err(Error::Closed(Closed { clean: false, .. }))));
    assert_eq!(retried.await.unwrap().unwrap(), Value::Map(Vec::new()));
    assert_eq!(client.session().unwrap().id, id);
    client.close().await;
}

/// Copy bytes between two connections until `cut` is notified, then end both by a bare FIN.
async fn proxy(listener: TcpListener, port: u16, cut: Arc<tokio::sync::Notify>) {
    let (near, _) = listener.accept().await.unwrap();
    let far = TcpStream::connect(("localhost", port)).await.unwrap();
    let copy = |from: &TcpStream, to: &TcpStream| {
        let mut buffer = [0; 4096];
        if let Ok(size) = from.try_read(&mut buffer) {
            assert_eq!(to.try_write(&buffer[..size]).unwrap(), size);
        }
    };
    loop {
        tokio::select! {
            _ = near.readable() => copy(&near, &far),
            _ = far.readable() => copy(&far, &near),
            () = cut.notified() => return,
        }
    }
}

async fn truncation_is_not_a_clean_end(server: &Server, key: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
    let cut = Arc::new(tokio::sync::Notify::new());
    tokio::spawn(proxy(listener, server.port(), Arc::clone(&cut)));
    let options = ConnectOptions::new(address).ca_file(server.ca_file()).home(server.home.join("client"));
    let client = Client::connect(options.server_hostname("localhost").api_key("ada", key)).await.unwrap();
    let long = map("ms", 60_000);
    let (result, ()) = tokio::join!(client.call::<Value>("sleep", &long), async {
        client.call::<Value>("echo", &()).await.unwrap();
        cut.notify_one();
    });
    let Err(Error::Closed(closed)) = result else { panic!("{result:?}") };
    assert!(!closed.clean);
    assert_eq!(closed.tls.unwrap().failure, TlsFailure::Truncated);
}

async fn pins_and_names_are_checked(server: &Server, key: &str) {
    let pins: Vec<String> = server.run(&["cert", "pins", "--plain"]).lines().map(str::to_owned).collect();
    let backup = format!("sha256/{}=", "A".repeat(43));
    let with_backup = [pins.clone(), vec![backup.clone()]].concat();
    let options = || server.untrusted().api_key("ada", key);
    for good in [
        options().pins(pins.clone()),
        options().pins(with_backup),
        options().pins(pins.clone()).ca_file(server.ca_file()),
    ] {
        let client = Client::connect(good).await.unwrap();
        client.call::<Value>("echo", &()).await.unwrap();
        client.close().await;
    }
    for bad in [options().pins([&backup]), options().pins([&backup]).ca_file(server.ca_file())] {
        assert_eq!(tls(Client::connect(bad).await), TlsFailure::PinMismatch);
    }
    for trusted in [options().pins(pins.clone()), options().ca_file(server.ca_file())] {
        let other = Client::connect(trusted.server_hostname("other.example")).await;
        assert_eq!(tls(other), TlsFailure::CertificateNameMismatch);
    }
    assert_eq!(tls(Client::connect(options().pins(["sha256/no"])).await), TlsFailure::PinMalformed);
    let other_ca = support::root().join("clients/typescript/test/support/certificate.pem");
    assert_eq!(tls(Client::connect(options().ca_file(other_ca)).await), TlsFailure::CertificateUntrusted);
    let contradiction = options().verify(false).pins(pins);
    assert!(matches!(Client::connect(contradiction).await, Err(Error::Config(_))));
}

async fn verification_cannot_be_disabled_for_known_hosts(server: &Server, key: &str) {
    let home = server.home.join("another");
    let unverified = || server.untrusted().home(&home).verify(false).api_key("ada", key);
    let client = Client::connect(unverified()).await.unwrap();
    client.call::<Value>("echo", &()).await.unwrap();
    client.close().await;
    Client::connect(server.options().home(&home).api_key("ada", key)).await.unwrap().close().await;
    assert_eq!(tls(Client::connect(unverified()).await), TlsFailure::StsPolicy);
    let renamed = unverified().server_hostname("other.example");
    assert_eq!(tls(Client::connect(renamed).await), TlsFailure::StsPolicy);
}

async fn secrets_of_tls_are_logged_by_option_alone(server: &Server, key: &str) {
    let path = server.home.join("keys.log");
    let client = Client::connect(server.options().api_key("ada", key).key_log(&path)).await.unwrap();
    client.close().await;
    let log = std::fs::read_to_string(path).unwrap();
    assert!(log.lines().any(|line| line.starts_with("CLIENT_TRAFFIC_SECRET_0 ")), "{log}");
}

const APP: &str = r#"
import asyncio
from collections.abc import AsyncIterator

import zcproto
from zcproto import App, Context, Items

app = App()
closed = 0


@app.method("count")
async def count(context: Context, n: int, size: int = 0) -> AsyncIterator[list]:
    for number in range(n):
        yield [number, bytes(size)]
    context.result = {"sent": n}


@app.method("numbers")
async def numbers(to: int, after: int = 0) -> AsyncIterator[int]:
    for number in range(after + 1, to + 1):
        yield number
        await asyncio.sleep(0.001)


@app.method("forever")
async def forever() -> AsyncIterator[int]:
    global closed
    try:
        while True:
            yield 1
            await asyncio.sleep(0.001)
    finally:
        closed += 1


@app.method("fail")
async def fail() -> AsyncIterator[int]:
    for number in range(3):
        yield number
    raise zcproto.NotFound("no such thing")


@app.method("total")
async def total(numbers: Items[int]) -> int:
    result = 0
    async for number in numbers:
        result += number
    return result


@app.method("chat")
async def chat(said: Items[str]) -> AsyncIterator[str]:
    async for text in said:
        yield text.upper()


@app.method("closed")
def closed_count() -> int:
    return closed


@app.method("ask")
async def ask(context: Context, method: str, params: dict, timeout: float = 30.0) -> list:
    try:
        return ["answer", await context.client.call(method, params, timeout=timeout)]
    except zcproto.CallError as error:
        return ["error", error.code.name]
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_an_application() {
    let mut server = Server::new("[sessions]\nper_user = 1000\n");
    server.write("methods.py", APP);
    let key = server.add_user("ada");
    server.start(Some("methods:app"));
    let client = server.connect("ada", &key).await.unwrap();

    items_arrive_in_order_and_then_the_result(&client).await;
    items_that_have_arrived_come_before_the_error(&client).await;
    a_dropped_stream_is_cancelled(&client).await;
    items_are_sent_when_the_server_wants_them(&client).await;
    a_stream_that_cannot_be_opened_reports_why(&client).await;
    an_interrupted_stream_continues_behind_its_last_item(&client).await;
    handlers_answer_calls_from_the_server(&client).await;
    withdrawn_calls_drop_their_handlers(&client).await;
    handlers_are_registered_again_after_a_cut(&client).await;
    client.close().await;
}

#[derive(Serialize)]
struct Count {
    n: u32,
    size: u32,
}

async fn items_arrive_in_order_and_then_the_result(client: &Client) {
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

async fn items_that_have_arrived_come_before_the_error(client: &Client) {
    let stream = client.stream("fail", &()).open();
    assert_eq!(code(stream.result::<Value>().await), Code::NotFound);
    for number in 0..3 {
        assert_eq!(stream.next::<i32>().await.unwrap(), Some(number));
    }
    assert_eq!(code(stream.next::<i32>().await), Code::NotFound);
}

async fn closed(client: &Client, wanted: i64) {
    while client.call::<i64>("closed", &()).await.unwrap() < wanted {
        tokio::time::sleep(5 * MS).await;
    }
}

async fn a_dropped_stream_is_cancelled(client: &Client) {
    let stream = client.stream("forever", &()).open();
    assert_eq!(stream.next::<i32>().await.unwrap(), Some(1));
    drop(stream);
    closed(client, 1).await;
    let stream = client.stream("forever", &()).window(2, 1_000).open();
    stream.next::<i32>().await.unwrap();
    stream.cancel();
    assert_eq!(code(stream.next::<i32>().await), Code::Cancelled);
    closed(client, 2).await;
    let short = client.stream("forever", &()).timeout(50 * MS).open();
    assert_eq!(code(short.result::<Value>().await), Code::DeadlineExceeded);
    closed(client, 3).await;
}

async fn items_are_sent_when_the_server_wants_them(client: &Client) {
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

async fn a_stream_that_cannot_be_opened_reports_why(client: &Client) {
    assert_eq!(code(client.stream("no.such.method", &()).open().next::<Value>().await), Code::Unimplemented);
    assert_eq!(code(client.call::<Value>("count", &map("n", 1)).await), Code::FailedPrecondition);
}

async fn an_interrupted_stream_continues_behind_its_last_item(client: &Client) {
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

#[derive(Serialize)]
struct Ask {
    method: &'static str,
    params: HashMap<&'static str, i64>,
    timeout: f64,
}

async fn ask(client: &Client, method: &'static str, timeout: f64) -> (String, Value) {
    client.call("ask", &Ask { method, params: [("a", 1), ("b", 2)].into(), timeout }).await.unwrap()
}

async fn handlers_answer_calls_from_the_server(client: &Client) {
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
    assert_eq!(ask(client, "add", 30.0).await, ("answer".to_owned(), sum));
    assert_eq!(ask(client, "refuse", 30.0).await.1, "PERMISSION_DENIED".into());
    assert_eq!(ask(client, "break", 30.0).await.1, "INTERNAL".into());
    assert_eq!(ask(client, "no.handler", 30.0).await.1, "UNAVAILABLE".into());
}

async fn withdrawn_calls_drop_their_handlers(client: &Client) {
    struct Dropped(Arc<AtomicU32>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Release);
        }
    }
    let dropped = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&dropped);
    let wait = move |_| {
        let guard = Dropped(Arc::clone(&count));
        async move {
            std::future::pending::<()>().await;
            drop(guard);
            Ok(())
        }
    };
    client.handle("wait", wait).await.unwrap();
    assert_eq!(ask(client, "wait", 0.05).await.1, "DEADLINE_EXCEEDED".into());
    while dropped.load(Ordering::Acquire) == 0 {
        tokio::time::sleep(5 * MS).await;
    }
}

async fn handlers_are_registered_again_after_a_cut(client: &Client) {
    client.cut();
    loop {
        let method = Ask { method: "add", params: [("a", 1), ("b", 2)].into(), timeout: 5.0 };
        match client.call::<(String, Value)>("ask", &method).await {
            Ok((kind, _)) if kind == "answer" => return,
            Ok((_, code)) => assert_eq!(code, "UNAVAILABLE".into()), // not yet registered
            Err(error) => assert!(matches!(error, Error::Closed(_)), "{error:?}"),
        }
        tokio::time::sleep(20 * MS).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_certificates_open_sessions() {
    let mut server = Server::new("[tls]\nclient_auth = \"optional\"\n");
    server.add_user("eve");
    server.start(None);
    let folder = server.home.join("handout");
    server.run(&["cert", "issue-client", "eve", "--out", folder.to_str().unwrap()]);
    let (certificate, key) = (folder.join("eve.crt"), folder.join("eve.key"));
    let options = || server.options().certificate(&certificate).key_file(&key);
    let client = Client::connect(options()).await.unwrap();
    let session = client.session().unwrap();
    assert_eq!((session.user.as_str(), session.bound), ("eve", true));
    client.cut();
    client.request("echo").idempotency_key("after the cut").send::<Value>().await.unwrap();
    client.close().await;
    let other = Credentials::Certificate { user: Some("ada".to_owned()) };
    assert_eq!(code(Client::connect(options().credentials(other)).await), Code::Unauthenticated);
    set_mode(&key, 0o644);
    assert!(matches!(Client::connect(options()).await, Err(Error::Certificate(_))));
    assert!(matches!(Client::connect(server.options().key_file(&key)).await, Err(Error::Config(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_survive_a_restart_and_respect_the_limit_of_sessions() {
    let mut server = Server::new("[sessions]\nper_user = 1\n");
    let key = server.add_user("eve");
    server.start(None);
    let client = Client::connect(server.options().api_key("eve", key.as_str()).timeout(120_000 * MS)).await.unwrap();
    let refused = server.connect("eve", &key).await.unwrap_err();
    assert_eq!(refused.as_call().unwrap().details.get("limit").unwrap(), &Value::Int(1));

    let id = client.session().unwrap().id;
    let sleeping = tokio::spawn({
        let client = client.clone();
        async move { client.call::<Value>("sleep", &map("ms", 500)).await }
    });
    tokio::time::sleep(100 * MS).await;
    let exit = server.stop();
    assert!(sleeping.await.unwrap().is_ok(), "a call in flight is answered during the drain");
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.call::<Value>("echo", &map("after", "restart")).await }
    });
    tokio::task::spawn_blocking(exit).await.unwrap();
    server.start(None);
    assert_eq!(waiting.await.unwrap().unwrap(), map("after", "restart"));
    assert_eq!(client.session().unwrap().id, id);
    client.close().await;
    server.connect("eve", &key).await.unwrap().close().await; // the session was closed, too
}

#[tokio::test]
async fn a_server_that_does_not_exist_is_reported_after_the_start_timeout() {
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let options = ConnectOptions::new(format!("127.0.0.1:{port}")).verify(false).home(std::env::temp_dir());
    let refused = Client::connect(options.start_timeout(Duration::ZERO)).await;
    assert!(matches!(refused, Err(Error::CannotConnect { refused: true, .. })), "{refused:?}");
}
