//! A client with rustls: welcome PORT NAME [CA file]. It writes the first bytes that the server sends.
//! Exits with 3 if the handshake fails.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, Stream};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut roots = RootCertStore::empty();
    if let Some(file) = arguments.get(2) {
        roots.add(CertificateDer::from_pem_file(file).expect("PEM")).expect("CA file");
    }
    let mut config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"zcp/1".to_vec()];
    let name = ServerName::try_from(arguments[1].clone()).expect("server name");
    let mut tls = ClientConnection::new(Arc::new(config), name).expect("configuration");
    let mut raw = TcpStream::connect(("127.0.0.1", arguments[0].parse().expect("port"))).expect("connect");
    while tls.is_handshaking() {
        if let Err(error) = tls.complete_io(&mut raw) {
            eprintln!("{error}");
            std::process::exit(3);
        }
    }
    let mut start = [0; 8];
    Stream::new(&mut tls, &mut raw).read_exact(&mut start).expect("first bytes");
    std::io::stdout().write_all(&start).expect("write");
}
