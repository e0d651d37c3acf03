//! Makes the frames that a client sends, and queues their bytes.

use crate::frame::{Frame, Kind, encode_frame};
use crate::secret::Token;
use zeroize::Zeroize;

#[derive(Debug, Default)]
pub(crate) struct Output {
    /// Set by WELCOME.
    pub(crate) salt: u64,
    /// The offset of the server's clock from this one, in milliseconds.
    pub(crate) clock_offset: i128,
    pub(crate) buffer: Vec<u8>,
    /// The bytes of all frames.
    pub(crate) sent: u64,
    counter: u64, // of the last frame
}

impl Output {
    /// Queue a frame. `wall` is this machine's time, which may have been set to any: the field has 64 bits.
    pub(crate) fn send(&mut self, kind: Kind, stream: u32, token: &Token, body: &[u8], wall: i64) {
        self.counter += 1;
        let time = (i128::from(wall) + self.clock_offset).clamp(0, i128::from(u64::MAX));
        let timestamp = u64::try_from(time).unwrap_or(0);
        let (salt, counter, token) = (self.salt, self.counter, token.as_bytes());
        let before = self.buffer.len();
        encode_frame(&mut self.buffer, &Frame { kind, stream, timestamp, salt, counter, token, body });
        self.sent += (self.buffer.len() - before) as u64;
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.buffer.zeroize(); // every frame has the token
    }
}
