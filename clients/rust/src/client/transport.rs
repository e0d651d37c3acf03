//! TLS over TCP for one connection, without a task of its own.
//!
//! Rustls is driven directly: so the end by close_notify and a truncation are distinct, and all frames of one turn go into
//! one write.

use crate::error::{Error, TlsError, TlsFailure};
use crate::trust::tls::{check_handshake, explained, failure_of};
use rustls::ClientConnection;
use std::future::poll_fn;
use std::io::{self, ErrorKind, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use zeroize::Zeroizing;

/// The size of one read, in bytes: the largest TLS record.
const READ_SIZE: usize = 16_640;
/// How long to wait for the peer's end, and how much to discard until then (zcp1.md, section 4.3).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_DISCARDED: usize = 4 << 20;

/// How the server has ended its direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By close_notify.
    Clean,
    /// Without it, or by an error.
    Broken(TlsError),
}

pub(crate) struct Transport {
    tcp: TcpStream,
    tls: ClientConnection,
    input: Box<[u8]>,
    /// What was decrypted and not yet processed.
    pub(crate) plaintext: Zeroizing<Vec<u8>>,
}

impl Transport {
    pub(crate) fn new(tcp: TcpStream, mut tls: ClientConnection) -> Self {
        tls.set_buffer_limit(None); // the conversation limits what waits
        Self { tcp, tls, input: vec![0; READ_SIZE].into(), plaintext: Zeroizing::new(Vec::new()) }
    }

    /// Complete the handshake, and return the SHA-256 of the server's certificate.
    pub(crate) async fn handshake(&mut self) -> Result<[u8; 32], Error> {
        while self.tls.is_handshaking() || self.tls.wants_write() {
            self.flush().await.map_err(|_| explained(TlsFailure::Disconnected))?;
            if !self.tls.is_handshaking() {
                break;
            }
            match poll_fn(|cx| self.poll_read(cx)).await {
                Ok(0) | Err(_) => return Err(explained(TlsFailure::Disconnected).into()),
                Ok(size) => {
                    if let Some(End::Broken(error)) = self.decrypt(size) {
                        let _ = self.flush().await; // the alert
                        return Err(error.into());
                    }
                }
            }
        }
        Ok(check_handshake(&self.tls)?)
    }

    /// Read encrypted bytes. Return how many; `decrypt` them next.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(&mut self.input);
        ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }

    pub(crate) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp.poll_write_ready(cx)
    }

    /// Decrypt what was read, and append it to `plaintext`. 0 bytes are the end of TCP.
    pub(crate) fn decrypt(&mut self, size: usize) -> Option<End> {
        if size == 0 {
            return Some(End::Broken(explained(TlsFailure::Truncated)));
        }
        let mut input = &self.input[..size];
        while !input.is_empty() {
            let is_handshaking = self.tls.is_handshaking();
            if self.tls.read_tls(&mut input).is_err() {
                return Some(End::Broken(explained(TlsFailure::BadRecord)));
            }
            let state = match self.tls.process_new_packets() {
                Ok(state) => state,
                Err(error) => return Some(End::Broken(failure_of(&error, is_handshaking))),
            };
            let start = self.plaintext.len();
            self.plaintext.resize(start + state.plaintext_bytes_to_read(), 0);
            if self.tls.reader().read_exact(&mut self.plaintext[start..]).is_err() {
                return Some(End::Broken(explained(TlsFailure::BadRecord)));
            }
            if state.peer_has_closed() {
                return Some(End::Clean);
            }
        }
        None
    }

    /// Encrypt bytes. `try_flush` writes them.
    pub(crate) fn encrypt(&mut self, data: &[u8]) {
        let _ = self.tls.writer().write_all(data); // into memory without a limit
    }

    /// Write what is encrypted. Return false if TCP takes no more now.
    pub(crate) fn try_flush(&mut self) -> io::Result<bool> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut TcpWriter(&self.tcp)) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    async fn flush(&mut self) -> io::Result<()> {
        while !self.try_flush()? {
            poll_fn(|cx| self.poll_writable(cx)).await?;
        }
        Ok(())
    }

    /// Send close_notify, shut down the sending half, and read until the peer ends too.
    pub(crate) async fn close(mut self) {
        self.tls.send_close_notify();
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, async {
            self.flush().await?;
            poll_fn(|cx| Pin::new(&mut self.tcp).poll_shutdown(cx)).await?;
            let mut discarded = 0;
            while discarded < MAX_DISCARDED {
                match poll_fn(|cx| self.poll_read(cx)).await? {
                    0 => break,
                    size => discarded += size,
                }
            }
            Ok::<(), io::Error>(())
        })
        .await;
    }
}

/// Writes to TCP without waiting.
struct TcpWriter<'a>(&'a TcpStream);

impl Write for TcpWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.try_write(data)
    }

    fn write_vectored(&mut self, data: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match data {
            [one] => self.0.try_write(one), // one record, as a rule: send costs the kernel less than writev
            several => self.0.try_write_vectored(several),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Return the error for a failure of TCP after the handshake.
pub(crate) fn reset(error: &io::Error) -> TlsError {
    TlsError::new(TlsFailure::ConnectionReset, format!("the connection was reset: {}", error.kind()))
}
