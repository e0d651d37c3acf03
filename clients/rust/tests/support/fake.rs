//! A server that tests script: it speaks TLS, and sends what a test says. Its methods block.

use crate::support;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use zcproto::codec;
use zcproto::frame::{self, Accepted, Frame, FrameDecoder, Kind, Side};
use zcproto::{AddressOrder, ConnectOptions, Value};

pub struct Fake {
    listener: TcpListener,
    config: Arc<ServerConfig>,
}

/// A connection of a client.
pub struct Peer {
    stream: StreamOwned<ServerConnection, TcpStream>,
    decoder: FrameDecoder,
    counter: u64,
    /// The token of the frame that was received last.
    pub token: [u8; 32],
}

/// A frame: kind, number and body.
pub type Sent = (Kind, u32, Vec<u8>);

impl Fake {
    pub fn new() -> Self {
        let folder = support::root().join("clients/typescript/test/support");
        let certificate = CertificateDer::from_pem_file(folder.join("certificate.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]);
        let mut config = versions.unwrap().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
        config.alpn_protocols = vec![b"zcp/1".to_vec()];
        config.send_tls13_tickets = 0;
        Self { listener: TcpListener::bind("127.0.0.1:0").unwrap(), config: Arc::new(config) }
    }

    pub fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    /// Return whether a client waits for `accept`.
    pub fn has_waiting(&self) -> bool {
        self.listener.set_nonblocking(true).unwrap();
        let has_waiting = self.listener.accept().is_ok();
        self.listener.set_nonblocking(false).unwrap();
        has_waiting
    }

    /// Return options for a client that trusts any server.
    pub fn options(&self) -> ConnectOptions {
        options_at(&[&self.address()]).verify(false)
    }

    /// Wait for a client.
    pub fn accept(&self) -> Peer {
        let (tcp, _) = self.listener.accept().unwrap();
        let tls = ServerConnection::new(Arc::clone(&self.config)).unwrap();
        Peer { stream: StreamOwned::new(tls, tcp), decoder: FrameDecoder::new(), counter: 0, token: [0; 32] }
    }
}

/// Return options with several addresses, in this order.
pub fn options_at(addresses: &[&str]) -> ConnectOptions {
    let home = std::env::temp_dir().join("zcproto-rust-no-home");
    let options = ConnectOptions::new(addresses.join(",")).address_order(AddressOrder::Listed).home(home);
    options.timeout(support::TIMEOUT).connect_timeout(support::TIMEOUT).start_timeout(support::TIMEOUT)
}

impl Peer {
    /// Send frames in one TLS record.
    pub fn send(&mut self, frames: &[Sent]) {
        self.send_with([0; 32], frames);
    }

    /// Send frames with a token.
    pub fn send_with(&mut self, token: [u8; 32], frames: &[Sent]) {
        let timestamp = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
        let mut bytes = Vec::new();
        for (kind, stream, body) in frames {
            let (salt, counter, token) = (7, self.counter, &token);
            frame::encode_frame(
                &mut bytes,
                &Frame { kind: *kind, stream: *stream, timestamp, salt, counter, token, body },
            );
            self.counter += 1;
        }
        self.stream.write_all(&bytes).unwrap();
        self.stream.flush().unwrap();
    }

    /// Wait for the next frame of the client. Return `None` after the end.
    pub fn receive(&mut self) -> Option<Sent> {
        let accepted =
            Accepted { receiver: Side::Server, max_length: 1 << 20, max_item: 1 << 20, streams: true, calls: true };
        loop {
            if let Some(frame) = self.decoder.next(&accepted).unwrap() {
                self.token = *frame.token;
                return Some((frame.kind, frame.stream, frame.body.to_vec()));
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes).unwrap_or(0) {
                0 => return None,
                size => self.decoder.feed(&bytes[..size]),
            }
        }
    }

    /// Wait for a REQUEST of a method, and return its number.
    pub fn expect(&mut self, method: &str) -> u32 {
        let (kind, number, body) = self.receive().expect("a request");
        assert_eq!((kind, method_of(&body).as_str()), (Kind::Request, method));
        number
    }

    /// Wait for a REQUEST of a method, and answer it with a text.
    pub fn reply(&mut self, method: &str, answer: &str) {
        let number = self.expect(method);
        self.send(&[text(number, answer)]);
    }

    /// Answer a number of requests with a text. Return false if the client has ended before.
    pub fn answer(&mut self, count: usize, text: &str) -> bool {
        let mut answered = 0;
        while answered < count {
            let Some((kind, stream, _)) = self.receive() else { return false };
            if kind == Kind::Request {
                self.send(&[(Kind::Response, stream, codec::encode(&text.into()).unwrap())]);
                answered += 1;
            }
        }
        true
    }

    /// Send close_notify, and wait for the end of the client.
    pub fn close(mut self) {
        self.stream.conn.send_close_notify();
        self.stream.flush().unwrap();
        while self.receive().is_some() {}
    }
}

/// WELCOME of a server without streams.
pub fn welcome() -> Sent {
    welcome_of(4)
}

/// WELCOME of a server that allows so many requests in flight.
pub fn welcome_of(max_streams: i64) -> Sent {
    let sts = Value::from([("max_age", Value::from(0)), ("include_subdomains", false.into())]);
    let body = Value::from([
        ("server", Value::from("fake")),
        ("versions", vec![1].into()),
        ("max_frame", 1_048_576.into()),
        ("max_streams", max_streams.into()),
        ("idle_timeout_ms", 0.into()),
        ("tolerance_ms", 30_000.into()),
        ("sts", sts),
    ]);
    (Kind::Welcome, 0, codec::encode(&body).unwrap())
}

/// WELCOME of a server that calls clients, too.
pub fn welcome_with_calls(max_streams: i64) -> Sent {
    let (kind, stream, body) = welcome_of(max_streams);
    let Value::Map(mut body) = codec::decode(&body).unwrap() else { panic!("no map") };
    let streams = Value::from([("max_open", Value::from(16)), ("max_item", 65_536.into())]);
    body.extend([("streams".to_owned(), streams), ("calls".to_owned(), Value::from([("max", Value::from(32))]))]);
    (kind, stream, codec::encode(&Value::Map(body)).unwrap())
}

/// A RESPONSE with a text.
pub fn text(stream: u32, text: &str) -> Sent {
    (Kind::Response, stream, codec::encode(&text.into()).unwrap())
}

/// An ERROR with details.
pub fn error(stream: u32, code: u8, details: Value) -> Sent {
    let body = Value::Array(vec![i64::from(code).into(), "refused".into(), details]);
    (Kind::Error, stream, codec::encode(&body).unwrap())
}

/// An EVENT of a session.
pub fn event(name: &str) -> Sent {
    let body = Value::Array(vec![name.into(), Value::from([("expires_at", Value::from(0))])]);
    (Kind::Event, 0, codec::encode(&body).unwrap())
}

/// A CALL without params.
pub fn call(stream: u32, method: &str) -> Sent {
    let meta = Value::from([("deadline_ms", Value::from(3_600_000))]);
    let body = Value::Array(vec![method.into(), Value::Map(Vec::new()), meta]);
    (Kind::Call, stream, codec::encode(&body).unwrap())
}

pub fn goaway(reason: &str, retry_after_ms: i64) -> Sent {
    let body = Value::from([("reason", Value::from(reason)), ("retry_after_ms", retry_after_ms.into())]);
    (Kind::GoAway, 0, codec::encode(&body).unwrap())
}

/// Return the method of a REQUEST.
pub fn method_of(body: &[u8]) -> String {
    match codec::decode(body) {
        Ok(Value::Array(parts)) => parts[0].as_str().unwrap().to_owned(),
        other => panic!("{other:?}"),
    }
}

/// Return the result of `session.open` and `session.refresh`: a session that lasts an hour, with a token of this byte.
pub fn session(stream: u32, token: u8) -> Sent {
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
    let body = Value::from([
        ("token", Value::Bin(vec![token; 32])),
        ("id", format!("s-{token}").into()),
        ("user", "ada".into()),
        ("expires_at", (now + 3_600_000).into()),
        ("idle_timeout_ms", 0.into()),
        ("refresh_token", Value::Bin(vec![token | 0x80; 32])),
        ("refresh_expires_at", (now + 7_200_000).into()),
        ("bound", false.into()),
    ]);
    (Kind::Response, stream, codec::encode(&body).unwrap())
}
