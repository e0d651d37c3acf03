//! TLS 1.3 with the two suites of the protocol, and which servers are trusted:
//!
//! - CAs, those of the system by default: rustls verifies chain, validity period and name; pins are checked in addition;
//! - pins only: a pin replaces the chain, and validity period and name are verified here;
//! - `verify(false)`: nothing is verified.

use super::certificate::Certificate;
use super::pins::{CERTIFICATE_PREFIX, Pins};
use super::private_file;
use crate::error::{Error, Result, TlsError, TlsFailure};
use crate::text;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, WantsClientCert, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, CipherSuite, ClientConfig, ClientConnection, ConfigBuilder,
    DigitallySignedStruct, KeyLog, OtherError, ProtocolVersion, RootCertStore, SignatureScheme,
};
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use zeroize::Zeroizing;

const ALPN: &[u8] = b"zcp/1";
const SUITES: [CipherSuite; 2] = [CipherSuite::TLS13_AES_256_GCM_SHA384, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256];

/// Files with the CAs of the system, by distribution. The first that exists is read.
const SYSTEM_CA_FILES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/usr/local/share/certs/ca-root-nss.crt",
];

/// What the application has chosen.
#[derive(Clone, Debug)]
pub(crate) struct TlsOptions {
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) ca_pem: Option<Arc<[u8]>>,
    pub(crate) roots: Option<Arc<RootCertStore>>,
    pub(crate) system_store: bool,
    pub(crate) pins: Vec<String>,
    pub(crate) verify: bool,
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) key_file: Option<PathBuf>,
    pub(crate) key_log: Option<PathBuf>,
}

impl TlsOptions {
    /// Return how many sources of CAs the application has given.
    fn count_cas(&self) -> usize {
        [self.ca_file.is_some(), self.ca_pem.is_some(), self.roots.is_some(), self.system_store]
            .into_iter()
            .filter(|&is_given| is_given)
            .count()
    }
}

/// The servers that a client trusts, and the certificate that it shows.
pub(crate) struct Trust {
    options: TlsOptions,
    pins: Pins,
    provider: Arc<CryptoProvider>,
    /// The certificate of the last connection, with its key.
    shown: Mutex<Option<Arc<dyn ResolvesClientCert>>>,
    warn: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Trust {
    pub(crate) fn new(options: TlsOptions, warn: Arc<dyn Fn(&str) + Send + Sync>) -> Result<Self> {
        let pins = Pins::parse(&options.pins)?;
        let fault = if !options.verify && (options.count_cas() > 0 || !pins.is_empty()) {
            Some("verify(false) contradicts CAs and pins; leave out one or the other")
        } else if options.count_cas() > 1 {
            Some("ca_file, ca_pem, roots and system_store exclude each other; give one of them")
        } else if options.certificate.is_none() && options.key_file.is_some() {
            Some("key_file requires a certificate; give it, too")
        } else {
            None
        };
        if let Some(fault) = fault {
            return Err(Error::Config(fault.to_owned()));
        }
        if let Some(pin) = pins.only() {
            let what = if pin.starts_with(CERTIFICATE_PREFIX) { "certificate" } else { "key" };
            warn(&format!(
                "{pin} is the only pin: after the server's {what} has changed, this client cannot connect; add the pin of \
                 the server's next key as a backup"
            ));
        }
        let cipher_suites =
            vec![ring::cipher_suite::TLS13_AES_256_GCM_SHA384, ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
        let provider = Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() });
        Ok(Self { options, pins, provider, shown: Mutex::default(), warn })
    }

    pub(crate) fn verifies(&self) -> bool {
        self.options.verify
    }

    pub(crate) fn has_certificate(&self) -> bool {
        self.options.certificate.is_some()
    }

    /// Return the path of the CA file, if there is no file.
    pub(crate) fn missing_ca(&self) -> Option<&Path> {
        self.options.ca_file.as_deref().filter(|path| !path.exists())
    }

    /// Return the configuration for one connection. Reads the files each time, so that the next connection uses a renewed
    /// certificate. While certificate and key cannot be used, as during their replacement, the previous ones are.
    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>> {
        let unusable = |error: &dyn std::fmt::Display| Error::Certificate(format!("cannot configure TLS: {error}"));
        let builder = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.verifier()?));
        let mut config = match &self.options.certificate {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
                match (self.with_certificate(builder.clone(), path), &*shown) {
                    (Ok(config), _) => {
                        *shown = Some(Arc::clone(&config.client_auth_cert_resolver));
                        config
                    }
                    (Err(error), Some(previous)) => {
                        (self.warn)(&format!("{error}; still presenting the previous client certificate"));
                        builder.with_client_cert_resolver(Arc::clone(previous))
                    }
                    (Err(error), None) => return Err(error),
                }
            }
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled(); // the server gives no tickets
        config.enable_sni = true;
        if let Some(path) = &self.options.key_log {
            config.key_log = Arc::new(KeyLogFile::open(path)?);
        }
        Ok(Arc::new(config))
    }

    fn with_certificate(
        &self,
        builder: ConfigBuilder<ClientConfig, WantsClientCert>,
        path: &Path,
    ) -> Result<ClientConfig> {
        let chain = read_certificates(path)?;
        let key = read_key(self.options.key_file.as_deref().unwrap_or(path))?;
        builder.with_client_auth_cert(chain, key).map_err(|error| {
            Error::Certificate(format!("{}: cannot use certificate and key: {error}", text::path(path)))
        })
    }

    fn verifier(&self) -> Result<Verifier> {
        let chain = if self.options.verify && (self.options.count_cas() > 0 || self.pins.is_empty()) {
            let provider = Arc::clone(&self.provider);
            let verifier = WebPkiServerVerifier::builder_with_provider(self.roots()?, provider).build();
            Some(verifier.map_err(|error| Error::Certificate(format!("no CA can be used: {error}")))?)
        } else {
            None
        };
        Ok(Verifier {
            chain,
            pins: self.pins.clone(),
            verify: self.options.verify,
            provider: Arc::clone(&self.provider),
        })
    }

    fn roots(&self) -> Result<Arc<RootCertStore>> {
        if let Some(roots) = &self.options.roots {
            return Ok(Arc::clone(roots));
        }
        let mut roots = RootCertStore::empty();
        if let Some(pem) = &self.options.ca_pem {
            let unusable = |what: &str| Error::Certificate(format!("ca_pem: {what}"));
            for certificate in parse_certificates(pem).map_err(unusable)? {
                roots.add(certificate).map_err(|_| unusable(INVALID_CERTIFICATE))?;
            }
        } else if let Some(path) = &self.options.ca_file {
            if !path.exists() {
                return Err(private_file::unusable(
                    path,
                    "does not exist; copy the CA of the server to this path (zcproto cert export-ca writes it), or check \
                     the path",
                ));
            }
            for certificate in read_certificates(path)? {
                roots.add(certificate).map_err(|_| private_file::unusable(path, INVALID_CERTIFICATE))?;
            }
        } else {
            let configured = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
            let known = SYSTEM_CA_FILES.iter().map(PathBuf::from);
            let path = configured.into_iter().chain(known).find(|path| path.exists()).ok_or_else(|| {
                Error::Certificate(
                    "the system has no file of CAs at a known path; give ca_file, pins or roots".to_owned(),
                )
            })?;
            roots.add_parsable_certificates(read_certificates(&path)?);
        }
        Ok(Arc::new(roots))
    }
}

/// Check the parameters of a completed handshake (zcp1.md, section 4.1), and return the SHA-256 of the server's certificate.
pub(crate) fn check_handshake(tls: &ClientConnection) -> Result<[u8; 32], TlsError> {
    let suite = tls.negotiated_cipher_suite().map(|suite| suite.suite());
    if tls.protocol_version() != Some(ProtocolVersion::TLSv1_3) || !suite.is_some_and(|suite| SUITES.contains(&suite)) {
        return Err(explained(TlsFailure::WrongParameters));
    }
    if tls.alpn_protocol() != Some(ALPN) {
        return Err(explained(TlsFailure::NoApplicationProtocol));
    }
    let Some(certificate) = tls.peer_certificates().and_then(|chain| chain.first()) else {
        return Err(TlsError::new(TlsFailure::CertificateUntrusted, "the server sent no certificate"));
    };
    let digest = ::ring::digest::digest(&::ring::digest::SHA256, certificate);
    <[u8; 32]>::try_from(digest.as_ref()).map_err(|_| explained(TlsFailure::WrongParameters))
}

const INVALID_CERTIFICATE: &str = "has an invalid certificate; replace it";

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = std::fs::read(path)
        .map_err(|error| private_file::unusable(path, &format!("cannot be read: {}; check the path", error.kind())))?;
    parse_certificates(&pem).map_err(|what| private_file::unusable(path, what))
}

/// Return the certificates of a text in PEM, or what is wrong with it.
fn parse_certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Err(_) => Err(INVALID_CERTIFICATE),
        Ok(certificates) if certificates.is_empty() => Err("has no certificate in PEM; check it"),
        Ok(certificates) => Ok(certificates),
    }
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let pem = private_file::read(path)?;
    if pem.windows(9).any(|text| text == b"ENCRYPTED") {
        let cure = "is encrypted, which this client cannot read; decrypt it with openssl pkey";
        return Err(private_file::unusable(path, cure));
    }
    PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| private_file::unusable(path, "has no private key in PEM; check the path"))
}

/// Verifies a server by CA, by pins, or by both.
#[derive(Debug)]
struct Verifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    pins: Pins,
    verify: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let certificate =
            Certificate::parse(end_entity).ok_or(rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if let Err(error) = self.pins.check(end_entity, certificate.spki) {
            return Err(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error)))));
        }
        if self.chain.is_none() {
            let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
            if now < certificate.not_before {
                return Err(CertificateError::NotValidYet.into());
            }
            if now > certificate.not_after {
                return Err(CertificateError::Expired.into());
            }
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        }
        Ok(())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(chain) = &self.chain {
            chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        }
        if self.verify {
            self.check(end_entity, server_name, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Appends the secrets of connections to a file, in the format of SSLKEYLOGFILE. The environment is never read.
#[derive(Debug)]
struct KeyLogFile(Mutex<File>);

impl KeyLogFile {
    fn open(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        private_file::private(&mut options);
        let file = options.open(path).map_err(|error| {
            Error::Config(format!(
                "{}: the key log cannot be written: {}; check the path",
                text::path(path),
                error.kind()
            ))
        })?;
        Ok(Self(Mutex::new(file)))
    }
}

impl KeyLog for KeyLogFile {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        let mut line = Zeroizing::new(String::with_capacity(256));
        line.push_str(label);
        for bytes in [client_random, secret] {
            line.push(' ');
            for byte in bytes {
                let _ = write!(line, "{byte:02x}");
            }
        }
        line.push('\n');
        if let Ok(mut file) = self.0.lock() {
            let _ = file.write_all(line.as_bytes()); // a full disk must not end connections
        }
    }
}

/// Return the error for a failure that has one fixed message.
pub(crate) fn explained(failure: TlsFailure) -> TlsError {
    TlsError::new(
        failure,
        match failure {
            TlsFailure::Disconnected => {
                "the server closed the connection during the TLS handshake; it may be full or shutting down"
            }
            TlsFailure::NotTls => "the server at this address does not use TLS; check host and port",
            TlsFailure::UnsupportedVersion => "the server does not support TLS 1.3",
            TlsFailure::NoSharedParameters => {
                "the server supports no cipher suite, key-exchange group or signature algorithm of this client; its log has the \
                 cause"
            }
            TlsFailure::NoApplicationProtocol => "the server uses TLS but does not support zcp/1; check host and port",
            TlsFailure::WrongParameters => "the server selected a TLS version or cipher suite that is not allowed",
            TlsFailure::PeerRejectedCertificate => {
                "the server refused the certificate of this client; see the log of the server"
            }
            TlsFailure::CertificateRequired => {
                "the server requires a client certificate; get one from its operator and give it as `certificate` with its \
                 `key_file`"
            }
            TlsFailure::Truncated => "the connection ended without close_notify; it may have been cut",
            TlsFailure::ConnectionReset => "the connection was reset",
            TlsFailure::BadRecord => "a TLS record was damaged",
            _ => "the TLS connection failed",
        },
    )
}

/// Classify an error of rustls.
pub(crate) fn failure_of(error: &rustls::Error, is_handshaking: bool) -> TlsError {
    use rustls::Error as E;
    let failure = match error {
        E::InvalidCertificate(fault) => return certificate_failure(fault),
        E::AlertReceived(alert) => match alert {
            AlertDescription::ProtocolVersion => TlsFailure::UnsupportedVersion,
            AlertDescription::HandshakeFailure => TlsFailure::NoSharedParameters,
            AlertDescription::NoApplicationProtocol => TlsFailure::NoApplicationProtocol,
            AlertDescription::CertificateRequired => TlsFailure::CertificateRequired,
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::AccessDenied => TlsFailure::PeerRejectedCertificate,
            alert => return TlsError::new(TlsFailure::PeerAlert, format!("the server ended TLS with alert {alert:?}")),
        },
        E::NoApplicationProtocol => TlsFailure::NoApplicationProtocol,
        E::PeerIncompatible(_) if is_handshaking => TlsFailure::UnsupportedVersion,
        E::PeerMisbehaved(_) if is_handshaking => TlsFailure::WrongParameters,
        E::InvalidMessage(_) if is_handshaking => TlsFailure::NotTls,
        E::InvalidMessage(_) | E::DecryptError | E::InappropriateMessage { .. } | E::PeerSentOversizedRecord => {
            TlsFailure::BadRecord
        }
        other => return TlsError::new(TlsFailure::Other, format!("TLS failed: {other}")),
    };
    explained(failure)
}

fn certificate_failure(fault: &CertificateError) -> TlsError {
    use CertificateError as C;
    let failure = match fault {
        C::Other(OtherError(error)) => {
            if let Some(error) = error.downcast_ref::<TlsError>() {
                return error.clone();
            }
            TlsFailure::CertificateUntrusted
        }
        C::Expired | C::NotValidYet | C::ExpiredContext { .. } | C::NotValidYetContext { .. } => {
            TlsFailure::CertificateExpired
        }
        C::Revoked => TlsFailure::CertificateRevoked,
        C::NotValidForName | C::NotValidForNameContext { .. } => TlsFailure::CertificateNameMismatch,
        _ => TlsFailure::CertificateUntrusted,
    };
    TlsError::new(failure, format!("the server's certificate is not trusted: {fault}"))
}
