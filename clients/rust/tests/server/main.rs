//! The client with a real `zcproto serve`, and with a server that is scripted.
//!
//! A busy machine only makes these tests slower: they wait for what they expect, and no timeout of theirs decides between
//! success and failure.
#![cfg(unix)]

mod calls;
mod extra;
#[path = "../support/fake.rs"]
mod fake;
mod handlers;
mod scripted;
mod sessions;
mod several;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod trust;

use std::time::Duration;
use support::Server;
use zcproto::{Client, Closed, Code, ConnectOptions, Error, TlsFailure, Value};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_its_own_methods() {
    let mut server = Server::new("[sessions]\nper_user = 1000\n");
    let (key, key_of_eve) = (server.add_user("ada"), server.add_user("eve"));
    server.start(None);
    let client = server.connect("ada", &key).await.unwrap();

    calls::values_of_all_types_come_back(&client).await;
    calls::more_calls_than_streams_succeed(&client).await;
    calls::extra_connections_serve_calls(&server, &key).await;
    calls::errors_are_reported_and_abandoned_calls_disturb_no_other(&client).await;
    calls::repeated_calls_with_an_idempotency_key_run_once(&client).await;
    calls::a_large_first_call_succeeds(&server, &key).await;
    calls::a_cut_connection_is_replaced(&server, &key).await;
    calls::the_application_is_notified_of_each_connection(&server, &key).await;
    sessions::sessions_are_revoked_and_opened_again(&server, &key).await;
    sessions::wrong_credentials_are_refused(&server, &key).await;
    sessions::public_methods_need_no_session(&server).await;
    sessions::several_users_share_one_connection(&client, &key_of_eve).await;
    sessions::closing_a_client_closes_the_sessions_of_all_its_users(&server, &key, &key_of_eve).await;
    sessions::devices_open_bound_sessions(&server).await;
    trust::truncation_is_not_a_clean_end(&server, &key).await;
    trust::pins_and_names_are_checked(&server, &key).await;
    trust::verification_cannot_be_disabled_for_known_hosts(&server, &key).await;
    trust::secrets_of_tls_are_logged_by_option_alone(&server, &key).await;

    let token = client.session().unwrap().token().to_text().to_string();
    assert!(!format!("{client:?} {:?}", client.session()).contains(&token));
    client.close().await;
    assert!(matches!(client.call::<Value>("echo", &()).await, Err(Error::Closed(Closed { clean: true, .. }))));
    assert!(!server.log().contains(&key) && !server.log().contains(&token));
}

const APP: &str = r#"
import asyncio
from collections.abc import AsyncIterator

import zcproto
from zcproto import App, Context, Ended, Items

app = App()
running = 0


@app.method("count")
async def count(n: int, size: int = 0) -> AsyncIterator[list | Ended[dict]]:
    for number in range(n):
        yield [number, bytes(size)]
    yield Ended({"sent": n})


@app.method("numbers")
async def numbers(to: int, after: int = 0) -> AsyncIterator[int]:
    for number in range(after + 1, to + 1):
        yield number
        await asyncio.sleep(0.001)


@app.method("forever")
async def forever() -> AsyncIterator[int]:
    global running
    running += 1
    try:
        while True:
            yield 1
            await asyncio.sleep(0.001)
    finally:
        running -= 1


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


@app.method("running")
def running_count() -> int:
    return running


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

    streams::items_arrive_in_order_and_then_the_result(&client).await;
    streams::items_that_have_arrived_come_before_the_error(&client).await;
    streams::items_are_a_stream_of_futures_which_ends_after_an_error(&client).await;
    streams::a_dropped_stream_is_cancelled(&client).await;
    streams::items_are_sent_when_the_server_wants_them(&client).await;
    streams::a_stream_that_cannot_be_opened_reports_why(&client).await;
    streams::an_interrupted_stream_continues_behind_its_last_item(&client).await;
    handlers::handlers_answer_calls_from_the_server(&client).await;
    handlers::a_removed_handler_is_not_called(&client).await;
    handlers::withdrawn_calls_drop_their_handlers(&client).await;
    handlers::handlers_are_registered_again_after_a_cut(&client).await;
    client.close().await;
}

#[tokio::test]
async fn a_server_that_does_not_exist_is_reported_after_the_start_timeout() {
    let (_socket, address) = scripted::refusing();
    let options = ConnectOptions::new(address).verify(false).home(std::env::temp_dir());
    let refused = Client::connect(options.start_timeout(Duration::ZERO)).await;
    assert!(matches!(refused, Err(Error::CannotConnect { refused: true, .. })), "{refused:?}");
}
