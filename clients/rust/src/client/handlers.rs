//! The application's handlers for calls from the server in one session.
//!
//! Decides: which handler runs, how many run at once, when a handler is aborted, and how its outcome becomes an answer. An
//! answer takes the place of another call until the server reads, so that a server that reads nothing cannot fill the memory.
//! Must not know: when methods are registered, and when connections are made.

use super::connection::Connection;
use crate::codec::{self, Value};
use crate::core::ServerCall;
use crate::error::{CallError, Code, Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::AbortHandle;
use tracing::{Instrument, debug_span};

/// A call from the server.
///
/// The handler's future is dropped when the server withdraws the call, and when the session or the connection ends.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Call {
    /// The name of the method.
    pub method: String,
    /// The user of the called session.
    pub user: String,
    /// A map. [`params`](Self::params) converts it.
    pub raw_params: Value,
    /// How long the server waits for the answer, from the arrival of the call.
    pub deadline: Duration,
    /// W3C Trace Context.
    pub traceparent: Option<String>,
}

impl Call {
    /// Return the params as a type of the application.
    ///
    /// # Errors
    ///
    /// INVALID_ARGUMENT if they have another type: return it from the handler by `?`.
    pub fn params<T: DeserializeOwned>(&self) -> Result<T, CallError> {
        codec::encode(&self.raw_params)
            .and_then(|body| codec::from_slice(&body))
            .map_err(|fault| CallError::new(Code::InvalidArgument, format!("the params have another type: {fault}")))
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<Vec<u8>, CallError>> + Send>>;
type Handler = Arc<dyn Fn(Call) -> Answer + Send + Sync>;

/// A connection and the number of a call there.
type Key = (u64, u32);

struct Running {
    connection: Arc<Connection>,
    task: AbortHandle,
}

#[derive(Default)]
struct State {
    handlers: HashMap<String, Handler>,
    /// Counts the changes of their names.
    version: u64,
    running: HashMap<Key, Running>,
}

pub(crate) struct Handlers {
    /// How many calls may run at once.
    pub(crate) max: u32,
    state: Arc<Mutex<State>>,
}

impl Handlers {
    pub(crate) fn new(max: u32) -> Self {
        Self { max, state: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Return the names of the methods, and their version.
    pub(crate) fn methods(&self) -> (Vec<String>, u64) {
        let state = self.lock();
        (state.handlers.keys().cloned().collect(), state.version)
    }

    /// Return the version of the methods; `None` without any.
    pub(crate) fn version(&self) -> Option<u64> {
        let state = self.lock();
        (!state.handlers.is_empty()).then_some(state.version)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().handlers.is_empty()
    }

    pub(crate) fn add<F, R, T>(&self, method: &str, handler: F)
    where
        F: Fn(Call) -> R + Send + Sync + 'static,
        R: Future<Output = Result<T, CallError>> + Send + 'static,
        T: Serialize,
    {
        let boxed = move |call: Call| -> Answer {
            let answer = handler(call);
            Box::pin(async move {
                let value = answer.await?;
                codec::to_vec(&value).map_err(|fault| {
                    CallError::new(Code::Internal, format!("the result cannot be sent: {}", fault.phrase()))
                })
            })
        };
        let mut state = self.lock();
        state.version += u64::from(state.handlers.insert(method.to_owned(), Arc::new(boxed)).is_none());
    }

    /// Remove the handler of a method. Return false without one.
    pub(crate) fn remove(&self, method: &str) -> bool {
        let mut state = self.lock();
        let is_removed = state.handlers.remove(method).is_some();
        state.version += u64::from(is_removed);
        is_removed
    }

    /// Run the handler of a call and answer it.
    pub(crate) fn call(&self, connection: &Arc<Connection>, call: ServerCall, user: String) {
        let key = (connection.id, call.number);
        let mut state = self.lock();
        let refusal = match state.handlers.get(&call.method) {
            None => CallError::new(Code::Unimplemented, "this client does not handle this method"),
            Some(_) if state.running.len() >= self.max as usize => {
                CallError::new(Code::ResourceExhausted, format!("this client handles {} calls at once", self.max))
            }
            Some(handler) => {
                let call = Call {
                    method: call.method,
                    user,
                    raw_params: call.params,
                    deadline: Duration::from_millis(call.deadline_ms),
                    traceparent: call.traceparent,
                };
                let handler = Arc::clone(handler);
                let span = debug_span!("handle", method = call.method);
                let task = tokio::spawn(async move { handler(call).await }.instrument(span));
                let abort = task.abort_handle();
                let done = Arc::clone(&self.state);
                state.running.insert(key, Running { connection: Arc::clone(connection), task: abort });
                let connection = Arc::clone(connection);
                tokio::spawn(async move {
                    let outcome = task.await;
                    connection.writable().await;
                    let is_running = done.lock().unwrap_or_else(PoisonError::into_inner).running.remove(&key).is_some();
                    if !is_running {
                        return; // it was answered, and its number may be in use again
                    }
                    match outcome {
                        Ok(answer) => connection.answer(key.1, answer.as_deref()),
                        Err(_) => {
                            connection.answer(key.1, Err(&CallError::new(Code::Internal, "the handler failed")));
                        }
                    }
                });
                return;
            }
        };
        drop(state);
        connection.answer(call.number, Err(&refusal));
    }

    /// Abort the handler of a call that the server has withdrawn, which was answered.
    pub(crate) fn withdraw(&self, connection: &Connection, number: u32) {
        if let Some(running) = self.lock().running.remove(&(connection.id, number)) {
            running.task.abort();
        }
    }

    /// Abort all handlers, or those of one connection, which has ended.
    pub(crate) fn abort(&self, reason: &str, connection: Option<&Connection>) {
        let mut aborted = Vec::new();
        self.lock().running.retain(|&(id, number), running| {
            let is_kept = connection.is_some_and(|connection| connection.id != id);
            if !is_kept {
                running.task.abort();
                aborted.push((Arc::clone(&running.connection), number));
            }
            is_kept
        });
        let error = CallError::new(Code::Cancelled, reason);
        for (connection, number) in aborted {
            connection.answer(number, Err(&error));
        }
    }
}

/// Return the error of a failed call, for a handler that makes calls itself.
impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        match error {
            Error::Call(error) => error,
            _ => CallError::new(Code::Internal, "the handler failed"),
        }
    }
}
