//! Frames: their layout, the checks of their header, and the decoder that finds them in a stream of bytes (zcp1.md,
//! sections 5, 6.1 and 18.2).
//!
//! Any input gives the next frame, a request for more bytes, or a [`ProtocolError`]. A header is checked as soon as it is
//! complete, so the body of an invalid frame is never buffered. The result does not depend on how the bytes are split, the
//! work is linear, and memory grows with the bytes received, not with the announced length.

use crate::error::{Code, ProtocolError};
use std::fmt;

/// The version of the protocol.
pub const VERSION: u8 = 1;
/// The size of the field `length`, in bytes.
pub const LENGTH_SIZE: usize = 4;
/// The size of a header with its field `length`, in bytes.
pub const HEADER_SIZE: usize = 68;
/// The `length` of a frame without a body.
pub const MIN_LENGTH: u32 = 64;
/// The size of a token, in bytes.
pub const TOKEN_SIZE: usize = 32;

/// The largest buffer that is kept while nothing is in it, in bytes.
const MAX_KEPT: usize = 65_536;

/// The side that receives a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The side that opened the connection.
    Client,
    /// The side that accepted it.
    Server,
}

/// Which stream a kind has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Connection, // stream 0
    Stream,     // any other
    Either,
}

/// What a server has to announce for a kind.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Base,
    Streams,
    Calls,
}

macro_rules! kinds {
    ($($variant:ident = $number:literal, $name:literal, $on:ident, $part:ident, to client: $client:literal, to server: $server:literal;)*) => {
        /// The kinds of frames (zcp1.md, sections 6.1 and 18.2), with their numbers on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind {
            $(#[doc = concat!("`", $name, "`")] $variant = $number,)*
        }

        impl Kind {
            /// All kinds.
            pub const ALL: &'static [Kind] = &[$(Kind::$variant,)*];

            /// Return the name of the protocol, such as `REQUEST`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Kind::$variant => $name,)*
                }
            }

            fn from_wire(number: u8) -> Option<Kind> {
                match number {
                    $($number => Some(Kind::$variant),)*
                    _ => None,
                }
            }

            fn rule(self) -> (On, Part, bool, bool) {
                match self {
                    $(Kind::$variant => (On::$on, Part::$part, $client, $server),)*
                }
            }
        }
    };
}

kinds! {
    Welcome = 0x01, "WELCOME", Connection, Base, to client: true, to server: false;
    Request = 0x02, "REQUEST", Stream, Base, to client: false, to server: true;
    Response = 0x03, "RESPONSE", Stream, Base, to client: true, to server: false;
    Error = 0x04, "ERROR", Either, Base, to client: true, to server: false;
    Cancel = 0x05, "CANCEL", Stream, Base, to client: false, to server: true;
    Ping = 0x06, "PING", Connection, Base, to client: true, to server: true;
    Pong = 0x07, "PONG", Connection, Base, to client: true, to server: true;
    GoAway = 0x08, "GOAWAY", Connection, Base, to client: true, to server: false;
    Event = 0x09, "EVENT", Connection, Base, to client: true, to server: false;
    Open = 0x10, "OPEN", Stream, Streams, to client: false, to server: true;
    Item = 0x11, "ITEM", Stream, Streams, to client: true, to server: true;
    End = 0x12, "END", Stream, Streams, to client: false, to server: true;
    Credit = 0x13, "CREDIT", Stream, Streams, to client: true, to server: true;
    Call = 0x18, "CALL", Stream, Calls, to client: true, to server: false;
    Result = 0x19, "RESULT", Stream, Calls, to client: false, to server: true;
    Failure = 0x1a, "FAILURE", Stream, Calls, to client: false, to server: true;
    Withdraw = 0x1b, "WITHDRAW", Stream, Calls, to client: true, to server: false;
}

impl Kind {
    /// Return whether frames of this kind have a body.
    #[must_use]
    pub fn has_body(self) -> bool {
        !matches!(self, Kind::Cancel | Kind::Ping | Kind::Pong | Kind::End | Kind::Withdraw)
    }
}

/// What a receiver accepts now. A change applies from the next header on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The side that receives.
    pub receiver: Side,
    /// The largest `length`, in bytes.
    pub max_length: u32,
    /// The largest `length` of an ITEM, in bytes.
    pub max_item: u32,
    /// Whether the kinds of streams of items are accepted.
    pub streams: bool,
    /// Whether the kinds of calls from the server are accepted.
    pub calls: bool,
}

impl Accepted {
    fn check_length(&self, length: u32) -> Result<(), ProtocolError> {
        if length < MIN_LENGTH {
            return Err(ProtocolError::new("length is below 64"));
        }
        if length > self.max_length {
            return Err(too_large("frame is larger than allowed here"));
        }
        Ok(())
    }

    /// Check a header whose length was accepted, in the order of zcp1.md, section 5.4, and then the length of an ITEM.
    fn check_header(&self, header: &Header) -> Result<Kind, ProtocolError> {
        if header.u8(4) != VERSION {
            return Err(ProtocolError::new("version is not 1"));
        }
        let kind = Kind::from_wire(header.u8(5)).filter(|kind| self.has(*kind));
        let kind = kind.ok_or(ProtocolError::new("this kind of frame is not allowed here"))?;
        if [header.u8(6), header.u8(7)] != [0, 0] {
            return Err(ProtocolError::new("flags are set"));
        }
        let is_connection = header.u32(8) == 0;
        if match kind.rule().0 {
            On::Connection => !is_connection,
            On::Stream => is_connection,
            On::Either => false,
        } {
            return Err(ProtocolError::new("stream does not match the kind"));
        }
        if kind == Kind::Item && header.u32(0) > self.max_item {
            return Err(too_large("item is larger than allowed here"));
        }
        Ok(kind)
    }

    fn has(&self, kind: Kind) -> bool {
        let (_, part, to_client, to_server) = kind.rule();
        let is_sent_here = match self.receiver {
            Side::Client => to_client,
            Side::Server => to_server,
        };
        let is_announced = match part {
            Part::Base => true,
            Part::Streams => self.streams,
            Part::Calls => self.calls,
        };
        is_sent_here && is_announced
    }
}

fn too_large(reason: &'static str) -> ProtocolError {
    ProtocolError { code: Code::FrameTooLarge, reason }
}

/// A frame with a valid header. `Debug` hides the token and the body.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the frame says.
    pub kind: Kind,
    /// The number of the request; 0 for frames about the connection.
    pub stream: u32,
    /// When it was made, in milliseconds since 1970 by the server's clock.
    pub timestamp: u64,
    /// What WELCOME gave to the connection.
    pub salt: u64,
    /// Greater in each frame of a direction.
    pub counter: u64,
    /// The token of a session, or zeros.
    pub token: &'a [u8; TOKEN_SIZE],
    /// One msgpack value, or nothing where the kind has no body.
    pub body: &'a [u8],
}

impl fmt::Debug for Frame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame")
            .field("kind", &self.kind)
            .field("stream", &self.stream)
            .field("timestamp", &self.timestamp)
            .field("counter", &self.counter)
            .field("size", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// The bytes of a header.
struct Header<'a>(&'a [u8; HEADER_SIZE]);

impl<'a> Header<'a> {
    fn u8(&self, at: usize) -> u8 {
        self.0[at]
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|index| self.0[at + index])
    }

    fn token(&self) -> Option<&'a [u8; TOKEN_SIZE]> {
        self.0.last_chunk()
    }
}

/// What was found out about the next frame.
#[derive(Clone, Copy, Debug, Default)]
enum Checked {
    #[default]
    Nothing,
    Length(usize),
    Header(usize, Kind),
}

/// Splits a stream of bytes into frames: feed it bytes, then take frames until `next` returns `None`.
#[derive(Default)]
pub struct FrameDecoder {
    data: Vec<u8>,
    at: usize, // where the next frame begins
    checked: Checked,
}

impl FrameDecoder {
    /// Make a decoder for a new connection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Add bytes. All frames of previous bytes should have been taken.
    pub fn feed(&mut self, data: &[u8]) {
        if self.at == self.data.len() {
            self.data.clear();
            if self.data.capacity() > MAX_KEPT {
                self.data = Vec::new();
            }
        } else {
            self.data.drain(..self.at);
        }
        self.at = 0;
        self.data.extend_from_slice(data);
    }

    /// Return the number of bytes that belong to no frame yet.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.data.len() - self.at
    }

    /// Return the next frame, or `None` if more bytes are needed.
    ///
    /// # Errors
    ///
    /// The first fault of the header. The start of the frame after it is unknown, so each further call fails as well.
    pub fn next(&mut self, accepted: &Accepted) -> Result<Option<Frame<'_>>, ProtocolError> {
        let rest = &self.data[self.at..];
        if let Checked::Nothing = self.checked {
            let Some(length) = rest.first_chunk() else { return Ok(None) };
            let length = u32::from_be_bytes(*length);
            accepted.check_length(length)?;
            self.checked = Checked::Length(length as usize);
        }
        let Some((header, rest)) = rest.split_first_chunk() else { return Ok(None) };
        let header = Header(header);
        if let Checked::Length(length) = self.checked {
            self.checked = Checked::Header(length, accepted.check_header(&header)?);
        }
        let Checked::Header(length, kind) = self.checked else { return Ok(None) };
        let (Some(body), Some(token)) = (rest.get(..length - MIN_LENGTH as usize), header.token()) else {
            return Ok(None);
        };
        self.at += LENGTH_SIZE + length;
        self.checked = Checked::Nothing;
        Ok(Some(Frame {
            kind,
            stream: header.u32(8),
            timestamp: header.u64(12),
            salt: header.u64(20),
            counter: header.u64(28),
            token,
            body,
        }))
    }
}

impl fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameDecoder").field("buffered", &self.buffered()).finish_non_exhaustive()
    }
}

/// Append a frame. Its body must have at most 2^32 - 65 bytes.
pub fn encode_frame(out: &mut Vec<u8>, frame: &Frame<'_>) {
    let length = u32::try_from(frame.body.len()).unwrap_or(u32::MAX).saturating_add(MIN_LENGTH);
    out.reserve(HEADER_SIZE + frame.body.len());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&[VERSION, frame.kind as u8, 0, 0]);
    out.extend_from_slice(&frame.stream.to_be_bytes());
    out.extend_from_slice(&frame.timestamp.to_be_bytes());
    out.extend_from_slice(&frame.salt.to_be_bytes());
    out.extend_from_slice(&frame.counter.to_be_bytes());
    out.extend_from_slice(frame.token);
    out.extend_from_slice(frame.body);
}
