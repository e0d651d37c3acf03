//! The calls from the server on one connection at the client (zcp1.md, section 19).
//!
//! Decides which calls are refused at once, and which are in flight. It knows no handlers, and not how many may run.

use super::events::ServerCall;
use crate::error::{CallError, Code};
use crate::frame::Frame;
use crate::message::{RequestMessage, decode_request};
use crate::secret::Token;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// How many FAILUREs of calls that were not run may wait for a server that does not read.
pub(crate) const MAX_BLOCKED_REFUSALS: u32 = 1_000;

#[derive(Debug)]
struct Registration {
    methods: Arc<HashSet<String>>,
    /// The token before the last refresh: calls with it may be under way.
    previous: Option<Token>,
}

#[derive(Debug, Default)]
pub(crate) struct ServerCalls {
    registrations: HashMap<Token, Registration>, // by the token of their session
    in_flight: HashMap<u32, Token>,
    pub(crate) blocked_refusals: u32,
}

impl ServerCalls {
    pub(crate) fn len(&self) -> usize {
        self.in_flight.len()
    }

    /// Register the methods of a session, in place of earlier ones.
    pub(crate) fn register(&mut self, token: &Token, methods: &[&str]) {
        let methods = Arc::new(methods.iter().map(|&method| method.to_owned()).collect());
        self.registrations.insert(token.clone(), Registration { methods, previous: None });
    }

    /// Accept calls with a newer token of the session.
    pub(crate) fn token_renewed(&mut self, old: &Token, token: &Token) {
        let Some(registration) = self.registrations.get(old) else {
            return;
        };
        let methods = Arc::clone(&registration.methods);
        if let Some(previous) = registration.previous.clone() {
            self.registrations.remove(&previous);
        }
        self.registrations.insert(token.clone(), Registration { methods, previous: Some(old.clone()) });
    }

    pub(crate) fn session_ended(&mut self, token: &Token) {
        if let Some(Registration { previous: Some(previous), .. }) = self.registrations.remove(token) {
            self.registrations.remove(&previous);
        }
    }

    /// Add a call. Return false if its number is in flight.
    pub(crate) fn add(&mut self, number: u32, token: Token) -> bool {
        self.in_flight.insert(number, token).is_none()
    }

    pub(crate) fn token_of(&self, number: u32) -> Option<&Token> {
        self.in_flight.get(&number)
    }

    /// Remove a call that is answered, and return its token.
    pub(crate) fn remove(&mut self, number: u32) -> Option<Token> {
        self.in_flight.remove(&number)
    }

    /// Return the call of a frame, or the error to refuse it with.
    pub(crate) fn parse(&self, frame: &Frame<'_>, max_depth: usize) -> Result<ServerCall, CallError> {
        let token = Token::new(*frame.token);
        let Some(Registration { methods, .. }) = self.registrations.get(&token) else {
            return Err(CallError::new(Code::Unauthenticated, "no session of this client has this token"));
        };
        let invalid = |what: &str| CallError::new(Code::InvalidArgument, format!("the call is invalid: {what}"));
        let RequestMessage { method, params, deadline_ms, traceparent } =
            decode_request(frame.body, max_depth).map_err(|error| invalid(error.phrase()))?;
        let deadline_ms = deadline_ms.ok_or_else(|| invalid("deadline_ms is missing"))?;
        if deadline_ms <= 0 {
            return Err(CallError::new(Code::DeadlineExceeded, "the deadline of the call has passed"));
        }
        if !methods.contains(&method) {
            return Err(CallError::new(Code::Unimplemented, "this client does not handle this method"));
        }
        let deadline_ms = u64::try_from(deadline_ms).unwrap_or(u64::MAX);
        Ok(ServerCall { number: frame.stream, token, method, params, deadline_ms, traceparent })
    }
}
