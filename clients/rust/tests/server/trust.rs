//! Which servers are trusted, and how a truncation is noticed.

use super::{map, tls};
use crate::support::{self, Server};
use std::io::Read;
use std::net::Shutdown;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use zcproto::{Client, Error, TlsFailure, Value};

/// Copy bytes between two connections until `cut` is notified, then end that of the client by a bare FIN.
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
            () = cut.notified() => break,
        }
    }
    let mut near = near.into_std().unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    // Unread bytes would turn the FIN into a reset.
    near.set_nonblocking(false).unwrap();
    tokio::task::spawn_blocking(move || near.read_to_end(&mut Vec::new())).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_encrypted_client_key_is_refused_with_the_cure() {
    let server = Server::new(""); // which is not started
    let content = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAA==\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let key = server.write("client.key", content);
    let certificate = support::root().join("clients/typescript/test/support/certificate.pem");
    let options = server.options_at("localhost:1").verify(false).certificate(certificate).key_file(key);
    let Error::Certificate(reason) = Client::connect(options).await.unwrap_err() else { panic!("another error") };
    assert!(reason.contains("is encrypted") && reason.contains("openssl pkey"), "{reason}");
}

pub async fn truncation_is_not_a_clean_end(server: &Server, key: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
    let cut = Arc::new(tokio::sync::Notify::new());
    tokio::spawn(proxy(listener, server.port(), Arc::clone(&cut)));
    let options = server.options_at(address).ca_file(server.ca_file()).server_hostname("localhost");
    let client = Client::connect(options.api_key("ada", key)).await.unwrap();
    let long = map("ms", 60_000);
    let (result, ()) = tokio::join!(client.call::<Value>("sleep", &long), async {
        client.call::<Value>("echo", &()).await.unwrap();
        cut.notify_one();
    });
    let Err(Error::Closed(closed)) = result else { panic!("{result:?}") };
    assert!(!closed.clean);
    assert_eq!(closed.tls.unwrap().failure, TlsFailure::Truncated);
}

pub async fn pins_and_names_are_checked(server: &Server, key: &str) {
    let pins: Vec<String> = server.run(&["cert", "pins", "--plain"]).lines().map(str::to_owned).collect();
    let backup = format!("sha256/{}=", "A".repeat(43));
    let with_backup = [pins.clone(), vec![backup.clone()]].concat();
    let options = || server.untrusted().api_key("ada", key);
    for good in [
        options().pins(pins.clone()),
        options().pins(with_backup),
        options().pins(pins.clone()).ca_file(server.ca_file()),
        options().ca_pem(std::fs::read(server.ca_file()).unwrap()),
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
    // The system trusts another CA, or has no file of CAs.
    let system = Client::connect(options().pins(pins.clone()).system_store()).await;
    assert!(matches!(system, Err(Error::Tls(_) | Error::Certificate(_))), "{system:?}");
    assert!(matches!(Client::connect(options().ca_pem("no PEM")).await, Err(Error::Certificate(_))));
    for contradiction in [options().verify(false).pins(pins), options().ca_pem("").ca_file(server.ca_file())] {
        assert!(matches!(Client::connect(contradiction).await, Err(Error::Config(_))));
    }
}

pub async fn verification_cannot_be_disabled_for_known_hosts(server: &Server, key: &str) {
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

pub async fn secrets_of_tls_are_logged_by_option_alone(server: &Server, key: &str) {
    let path = server.home.join("keys.log");
    let client = Client::connect(server.options().api_key("ada", key).key_log(&path)).await.unwrap();
    client.close().await;
    let log = std::fs::read_to_string(path).unwrap();
    assert!(log.lines().any(|line| line.starts_with("CLIENT_TRAFFIC_SECRET_0 ")), "{log}");
}
