//! Sessions by API keys, devices and certificates: opened, revoked, bound, several at once, and over a restart.

use super::{code, map};
use crate::calls::more_calls_than_streams_succeed;
use crate::support::{Server, set_mode};
use tokio::sync::mpsc;
use zcproto::{Client, Code, Credentials, Device, Error, Value, enroll};

pub async fn sessions_are_revoked_and_opened_again(server: &Server, key: &str) {
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

pub async fn wrong_credentials_are_refused(server: &Server, key: &str) {
    assert_eq!(code(server.connect("ada", "wrong").await), Code::Unauthenticated);
    assert_eq!(code(server.connect("no.such.user", key).await), Code::Unauthenticated);
    let login = Credentials::login(|| async { Ok(map("scheme", "no.such.scheme")) });
    let refused = Client::connect(server.options().credentials(login)).await;
    assert_eq!(code(refused), Code::InvalidArgument);
    let failing = Credentials::login(|| async { Err("no ticket".into()) });
    let failed = Client::connect(server.options().credentials(failing)).await;
    assert!(matches!(failed, Err(Error::Login(_))));
}

pub async fn public_methods_need_no_session(server: &Server) {
    let client = Client::connect(server.options()).await.unwrap();
    let info: Value = client.call("server.info", &()).await.unwrap();
    assert_eq!(info.get("versions").unwrap(), &Value::Array(vec![Value::Int(1)]));
    assert_eq!(code(client.call::<Value>("echo", &()).await), Code::Unauthenticated);
    assert_eq!(code(client.open_session().await), Code::Unauthenticated);
    client.close().await;
}

pub async fn several_users_share_one_connection(client: &Client, key_of_eve: &str) {
    let eve = client.session_for(Credentials::api_key("eve", key_of_eve)).await.unwrap();
    assert_eq!(eve.session().unwrap().user, "eve");
    let user = |info: Value| info.get("user").unwrap().as_str().unwrap().to_owned();
    assert_eq!(user(eve.call("session.info", &()).await.unwrap()), "eve");
    assert_eq!(user(client.call("session.info", &()).await.unwrap()), "ada");
    eve.close().await;
    assert!(eve.call::<Value>("echo", &()).await.is_err());
    client.call::<Value>("echo", &()).await.unwrap();
}

pub async fn closing_a_client_closes_the_sessions_of_all_its_users(server: &Server, key: &str, key_of_eve: &str) {
    let client = server.connect("ada", key).await.unwrap();
    let mut users = Vec::new();
    for _ in 0..3 {
        users.push(client.session_for(Credentials::api_key("eve", key_of_eve)).await.unwrap());
    }
    let eve = server.connect("eve", key_of_eve).await.unwrap();
    assert_eq!(eve.call::<Vec<Value>>("session.list", &()).await.unwrap().len(), 4);
    client.close().await;
    while eve.call::<Vec<Value>>("session.list", &()).await.unwrap().len() > 1 {} // the server has not read it yet
    eve.close().await;
}

pub async fn devices_open_bound_sessions(server: &Server) {
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
    let client = Client::connect(server.options().device(loaded, "laptop").max_connections(3)).await.unwrap();
    let session = client.session().unwrap();
    assert!(session.bound);
    more_calls_than_streams_succeed(&client).await; // it is attached to each connection
    client.cut();
    client.request("echo").idempotency_key("after the cut").send::<Value>().await.unwrap();
    assert_eq!(client.session().unwrap().id, session.id);
    client.close().await;
    set_mode(&file, 0o644);
    assert!(matches!(Device::load(&file), Err(Error::Certificate(_))));
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
async fn client_certificates_open_sessions() {
    let mut server = Server::new("[tls]\nclient_auth = \"optional\"\n");
    server.add_user("eve");
    server.start(None);
    let folder = server.home.join("handout");
    server.run(&["cert", "issue-client", "eve", "--out", folder.to_str().unwrap()]);
    let (certificate, key) = (folder.join("eve.crt"), folder.join("eve.key"));
    let options = || server.options().certificate(&certificate).key_file(&key);
    let (warn, mut warnings) = mpsc::unbounded_channel();
    let warned = options().on_warning(move |warning| warn.send(warning.to_owned()).unwrap());
    let client = Client::connect(warned).await.unwrap();
    let session = client.session().unwrap();
    assert_eq!((session.user.as_str(), session.bound), ("eve", true));
    // While the files are replaced, the previous certificate stays in use.
    let valid = std::fs::read(&certificate).unwrap();
    std::fs::write(&certificate, "").unwrap();
    client.cut();
    client.request("echo").idempotency_key("after the cut").send::<Value>().await.unwrap();
    assert_eq!(client.session().unwrap().id, session.id);
    let warning = warnings.recv().await.unwrap();
    assert!(warning.contains("still presenting the previous client certificate"), "{warning}");
    std::fs::write(&certificate, valid).unwrap();
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
    let client = server.connect("eve", &key).await.unwrap();
    let refused = server.connect("eve", &key).await.unwrap_err();
    assert_eq!(refused.as_call().unwrap().details.get("limit").unwrap(), &Value::Int(1));

    let id = client.session().unwrap().id;
    let sleep = map("ms", 500);
    let (answered, exit) = tokio::join!(client.call::<Value>("sleep", &sleep), async {
        client.call::<Value>("echo", &()).await.unwrap(); // sent behind the other call
        server.stop()
    });
    answered.expect("a call in flight is answered during the drain");
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.call::<Value>("echo", &map("after", "restart")).await }
    });
    tokio::task::spawn_blocking(exit).await.unwrap();
    server.start(None);
    assert_eq!(waiting.await.unwrap().unwrap(), map("after", "restart"));
    assert_eq!(client.session().unwrap().id, id);
    client.close().await;
    // The session was closed, too. The server may read that after what follows, which is on another connection.
    let mut attempts = 0;
    while let Err(error) = server.connect("eve", &key).await {
        assert_eq!(error.code(), Some(Code::ResourceExhausted));
        attempts += 1;
        assert!(attempts < 1_000, "the session was not closed");
    }
}
