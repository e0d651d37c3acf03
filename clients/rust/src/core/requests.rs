//! The requests of one connection without an answer, and the tokens that the server has accepted there.
//!
//! A request is a REQUEST or an OPEN: their numbers are one space.

use crate::codec;
use crate::error::Code;
use crate::secret::Token;
use std::collections::{BTreeMap, HashSet};

/// The largest `length` on a connection without a session, in both directions, whatever WELCOME allows.
pub const MAX_FRAME_BEFORE_SESSION: u32 = 16_384;

static NO_TOKEN: Token = Token::NONE;

/// Which token the answer of a request brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Issues {
    Nothing,
    First,
    Next, // in place of the token of the request
}

#[derive(Debug)]
struct InFlight {
    token: Token,
    issues: Issues,
}

#[derive(Debug)]
pub(crate) struct Requests {
    /// Limits of the server.
    pub(crate) max_streams: u32,
    pub(crate) max_frame: u32,
    next: u32,
    in_flight: BTreeMap<u32, InFlight>,
    tokens: HashSet<Token>,
}

impl Requests {
    pub(crate) fn new() -> Self {
        Self { max_streams: 0, max_frame: 0, next: 1, in_flight: BTreeMap::new(), tokens: HashSet::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.in_flight.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.in_flight.len() >= self.max_streams as usize
    }

    pub(crate) fn has_session(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// Return the largest `length` that can be sent now.
    pub(crate) fn send_limit(&self) -> u32 {
        if self.has_session() { self.max_frame } else { self.max_frame.min(MAX_FRAME_BEFORE_SESSION) }
    }

    pub(crate) fn has(&self, number: u32) -> bool {
        self.in_flight.contains_key(&number)
    }

    pub(crate) fn set_next(&mut self, number: u32) {
        self.next = number.max(1);
    }

    /// Add a request and return its number.
    pub(crate) fn add(&mut self, method: &str, token: &Token) -> u32 {
        let mut number = self.next;
        let following = |number: u32| if number == u32::MAX { 1 } else { number + 1 };
        while self.has(number) {
            number = following(number);
        }
        self.next = following(number);
        let issues = match method {
            "session.open" => Issues::First,
            "session.refresh" => Issues::Next,
            _ => Issues::Nothing,
        };
        self.in_flight.insert(number, InFlight { token: token.clone(), issues });
        number
    }

    /// Return the token that a request was sent with, if it is in flight.
    pub(crate) fn sent_token(&self, number: u32) -> Option<&Token> {
        let request = self.in_flight.get(&number)?;
        Some(if request.issues == Issues::Nothing { &request.token } else { &NO_TOKEN })
    }

    /// Remove a request that has ended. Return false if it is not in flight.
    pub(crate) fn remove(&mut self, number: u32) -> bool {
        self.in_flight.remove(&number).is_some()
    }

    /// Remove a request after its RESPONSE, which shows that the server accepts its token. For `session.refresh`, return
    /// the old and the new token of the session.
    pub(crate) fn succeeded(&mut self, number: u32, body: &[u8]) -> Option<(Token, Token)> {
        let InFlight { token, issues } = self.in_flight.remove(&number)?;
        if issues == Issues::Nothing {
            if !token.is_none() && !self.tokens.contains(&token) {
                self.tokens.insert(token);
            }
            return None;
        }
        let issued = issued_token(body)?;
        self.tokens.insert(issued.clone());
        if issues == Issues::First {
            return None;
        }
        self.tokens.remove(&token);
        Some((token, issued))
    }

    /// Remove a request that failed with an error of the server.
    pub(crate) fn failed(&mut self, number: u32, code: Code) {
        let request = self.in_flight.remove(&number);
        let is_refused =
            matches!(code, Code::Unauthenticated | Code::TokenExpired | Code::TokenRevoked | Code::SessionReplaced);
        if let Some(InFlight { token, .. }) = request.filter(|_| is_refused) {
            self.tokens.remove(&token);
        }
    }

    /// Forget the token of a session that has ended.
    pub(crate) fn session_ended(&mut self, token: &Token) {
        self.tokens.remove(token);
    }
}

/// Return the token in the result of `session.open` or `session.refresh`.
pub(crate) fn issued_token(body: &[u8]) -> Option<Token> {
    let result = codec::decode(body).ok()?;
    let bytes = <[u8; 32]>::try_from(result.get("token")?.as_bin()?).ok()?;
    Some(Token::new(bytes)).filter(|token| !token.is_none())
}
