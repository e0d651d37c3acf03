//! Clients, calls and events.

use crate::error::{guard, Error, Failure, ZCP_ARGUMENT, ZCP_OK};
use crate::gate::Gate;
use crate::options::Options;
use crate::pointer::{free, give, object, optional_text, text, Data};
use crate::runtime::Shared;
use crate::value::Value;
use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::future::Future;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use zcproto_client::codec;

/// A connection to a server, with a session. It reconnects, and any number of threads can use it at the same time. One of them can
/// close it while others wait: their functions return ZCP_CLOSED, and zcp_event ZCP_END. A function must have begun to wait
/// before another thread closes the client; one that begins afterwards uses freed memory.
#[derive(Clone)]
pub struct Client {
    pub(crate) runtime: Arc<Shared>,
    pub(crate) inner: zcproto_client::Client,
    /// Whether it uses the connection of another client.
    is_session: bool,
    /// For the callbacks of the options.
    gate: Gate,
    /// For the handlers of methods.
    handlers: Arc<Mutex<HashMap<String, Gate>>>,
}

impl Client {
    fn new(runtime: Arc<Shared>, inner: zcproto_client::Client, is_session: bool, gate: Gate) -> Self {
        Self { runtime, inner, is_session, gate, handlers: Arc::default() }
    }

    /// Use another gate for the handler of a method, or none. Return the previous one.
    pub(crate) fn replace_handler(&self, method: &str, gate: Option<Gate>) -> Option<Gate> {
        let mut handlers = self.handlers.lock().unwrap_or_else(PoisonError::into_inner);
        match gate {
            Some(gate) => handlers.insert(method.to_owned(), gate),
            None => handlers.remove(method),
        }
    }

    /// Run no more callbacks.
    fn close_gates(&self) {
        let handlers = std::mem::take(&mut *self.handlers.lock().unwrap_or_else(PoisonError::into_inner));
        for gate in handlers.into_values().chain([self.gate.clone()]) {
            gate.close();
        }
    }
}

/// Return a client for a function that waits: another thread can close it meanwhile.
///
/// # Safety
///
/// `client` is NULL or a client.
pub(crate) unsafe fn waiting(client: *const Client) -> Result<Client, Failure> {
    // SAFETY: by the contract of this function.
    unsafe { object(client, "client") }.cloned()
}

/// Options of one call. All zero is the default.
#[repr(C)]
pub struct CallOptions {
    /// The time for the call, retries included, in milliseconds; 0 for the default of the client.
    pub timeout_ms: u64,
    /// NULL, or 1 to 64 characters: the server runs calls with the same key once, so the call is repeated if its answer is lost.
    pub idempotency_key: *const c_char,
    /// NULL, or W3C Trace Context.
    pub traceparent: *const c_char,
}

/// The callback at the end of a call that was started. It runs once, in a thread of this library. Either `error` is NULL, or
/// `result` is. The callback frees both.
pub type Done = Option<extern "C" fn(data: *mut c_void, result: *mut Value, error: *mut Error)>;

/// A call that was started, with which it can be cancelled.
pub struct Pending {
    cancelled: Arc<Notify>,
}

/// Connect to a server, and open a session if the options have credentials. Waits for that.
#[no_mangle]
pub unsafe extern "C" fn zcp_connect(options: *const Options, client: *mut *mut Client, error: *mut *mut Error) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes options that no other thread uses.
        let options = unsafe { object(options, "options") }?;
        let gate = Gate::default();
        let runtime = Shared::get()?;
        let connected = runtime.wait(zcproto_client::Client::connect(options.connect(&gate)?));
        let inner = connected.and_then(|client| client.map_err(Failure::from)).inspect_err(|_| gate.close())?;
        // SAFETY: the caller passes a place for a client.
        unsafe { give(client, Client::new(runtime, inner, false, gate)) }
    })
}

/// Open a session of another user on the connection of a client, with the credentials of the options; their other settings are
/// not used. The session is a client of its own. Waits for that.
#[no_mangle]
pub unsafe extern "C" fn zcp_session_for(
    client: *const Client,
    options: *const Options,
    session: *mut *mut Client,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client, and options that no other thread uses.
        let (client, options) = unsafe { (waiting(client)?, object(options, "options")?) };
        let gate = Gate::default();
        let credentials = options.credentials(&gate)?;
        let credentials = credentials.ok_or_else(|| Failure::argument("the options have no credentials"))?;
        let opened = client.runtime.wait(client.inner.session_for(credentials));
        let inner = opened.and_then(|session| session.map_err(Failure::from)).inspect_err(|_| gate.close())?;
        // SAFETY: the caller passes a place for a client.
        unsafe { give(session, Client::new(Arc::clone(&client.runtime), inner, true, gate)) }
    })
}

/// Make the future of a call.
unsafe fn call_future(
    client: &Client,
    method: *const c_char,
    params: *const Value,
    options: *const CallOptions,
) -> Result<impl Future<Output = zcproto_client::Result<codec::Value>> + Send + use<>, Failure> {
    // SAFETY: the caller passes texts, and NULL or objects that live during this function.
    let (method, params, options) = unsafe { (text(method, "method")?.to_owned(), params.as_ref(), options.as_ref()) };
    let params = params.map_or(codec::Value::Nil, |params| params.inner().clone());
    let (timeout, key, trace) = match options {
        // SAFETY: the fields of options are NULL or texts.
        Some(options) => unsafe {
            (
                options.timeout_ms,
                optional_text(options.idempotency_key, "idempotency_key")?.map(str::to_owned),
                optional_text(options.traceparent, "traceparent")?.map(str::to_owned),
            )
        },
        None => (0, None, None),
    };
    let client = client.inner.clone();
    Ok(async move {
        let mut request = client.request(&method).params(&params);
        if timeout > 0 {
            request = request.timeout(Duration::from_millis(timeout));
        }
        if let Some(key) = &key {
            request = request.idempotency_key(key);
        }
        if let Some(trace) = &trace {
            request = request.traceparent(trace);
        }
        request.send().await
    })
}

/// Call a method and wait for its result. `params` is a map, or NULL for none; `options` is NULL or options.
#[no_mangle]
pub unsafe extern "C" fn zcp_call(
    client: *const Client,
    method: *const c_char,
    params: *const Value,
    options: *const CallOptions,
    result: *mut *mut Value,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client, and the rest as `call_future` needs it.
        let (client, future) = unsafe {
            let client = waiting(client)?;
            let future = call_future(&client, method, params, options)?;
            (client, future)
        };
        let value = client.runtime.wait(future)??;
        // SAFETY: the caller passes a place for a value.
        unsafe { give(result, Value::new(value)) }
    })
}

/// Start to call a method; `done` is called with `data` and the result or an error. If this function fails, it is not called.
/// `pending` is NULL, or gets an object that can cancel the call; free it before or after the call has ended.
#[no_mangle]
pub unsafe extern "C" fn zcp_call_start(
    client: *const Client,
    method: *const c_char,
    params: *const Value,
    options: *const CallOptions,
    done: Done,
    data: *mut c_void,
    pending: *mut *mut Pending,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client, and the rest as `call_future` needs it.
        let (client, future) = unsafe {
            let client = object(client, "client")?;
            (client, call_future(client, method, params, options)?)
        };
        let done = done.ok_or_else(|| Failure::argument("done is NULL"))?;
        let cancelled = Arc::new(Notify::new());
        if !pending.is_null() {
            // SAFETY: the caller passes a place for an object.
            unsafe { give(pending, Pending { cancelled: Arc::clone(&cancelled) }) }?;
        }
        let data = Data::new(data);
        let runtime = Arc::clone(&client.runtime); // until the callback has returned
        client.runtime.spawn(async move {
            let result = tokio::select! {
                result = future => result.map_err(Failure::from),
                () = cancelled.notified() => Err(Failure::cancelled()),
            };
            match result {
                Ok(value) => done(data.get(), Box::into_raw(Box::new(Value::new(value))), ptr::null_mut()),
                Err(failure) => done(data.get(), ptr::null_mut(), failure.into_object()),
            }
            drop(runtime);
        });
        Ok(())
    })
}

/// Cancel a call that was started: its callback gets ZCP_CANCELLED, unless the call has ended already.
#[no_mangle]
pub unsafe extern "C" fn zcp_pending_cancel(pending: *const Pending) {
    // SAFETY: the caller passes NULL or an object.
    if let Some(pending) = unsafe { pending.as_ref() } {
        pending.cancelled.notify_one();
    }
}

/// Free the object of a call that was started. The call goes on.
#[no_mangle]
pub unsafe extern "C" fn zcp_pending_free(pending: *mut Pending) {
    // SAFETY: the caller passes an object for the last time.
    unsafe { free(pending) }
}

/// Return the session as a map with `id`, `user` and `expires_at` (milliseconds since 1970), or nil without one.
#[no_mangle]
pub unsafe extern "C" fn zcp_session(client: *const Client, session: *mut *mut Value, error: *mut *mut Error) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client.
        let client = unsafe { object(client, "client") }?;
        let value = client.inner.session().map(|info| {
            codec::Value::from([
                ("id", codec::Value::from(info.id)),
                ("user", info.user.into()),
                ("expires_at", info.expires_at.into()),
            ])
        });
        // SAFETY: the caller passes a place for a value.
        unsafe { give(session, Value::new(value.unwrap_or_default())) }
    })
}

/// Return where the client is connected, such as `a.example:7443 (192.0.2.1)`, or nil without a connection.
#[no_mangle]
pub unsafe extern "C" fn zcp_endpoint(client: *const Client, endpoint: *mut *mut Value, error: *mut *mut Error) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client.
        let client = unsafe { object(client, "client") }?;
        let found = client.inner.endpoint().map(|endpoint| endpoint.to_string());
        // SAFETY: the caller passes a place for a value.
        unsafe { give(endpoint, Value::new(found.into())) }
    })
}

/// Open a new session, as after ZCP_TOKEN_REVOKED or ZCP_SESSION_REPLACED. Waits for it.
#[no_mangle]
pub unsafe extern "C" fn zcp_open_session(client: *const Client, error: *mut *mut Error) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client.
        let client = unsafe { waiting(client) }?;
        client.runtime.wait(client.inner.open_session())??;
        Ok(())
    })
}

/// Cut the connections of a client like a network failure, for tests. The client reconnects.
#[no_mangle]
pub unsafe extern "C" fn zcp_cut(client: *const Client) {
    // SAFETY: the caller passes NULL or a client.
    if let Some(client) = unsafe { client.as_ref() } {
        guard(ptr::null_mut(), || {
            client.inner.cut();
            Ok(())
        });
    }
}

/// Wait for the next event of the server, as an array of name and data; at most `timeout_ms`, then ZCP_END.
#[no_mangle]
pub unsafe extern "C" fn zcp_event(
    client: *const Client,
    timeout_ms: u64,
    event: *mut *mut Value,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client.
        let client = unsafe { waiting(client) }?;
        let next = async { tokio::time::timeout(Duration::from_millis(timeout_ms), client.inner.next_event()).await };
        let found = client.runtime.wait(next)?.map_err(|_| Failure::end("no event has come in time"))?;
        let found = found.ok_or_else(|| Failure::end("the client is closed"))?;
        // SAFETY: the caller passes a place for a value.
        unsafe { give(event, Value::new(codec::Value::Array(vec![found.name.into(), found.data]))) }
    })
}

/// Close a client and its connection, or a session of `zcp_session_for` alone, and free it. Calls that were started end with
/// ZCP_CLOSED. Then no handler of it runs any more, and no callback of its options. In a callback it does not wait for that. NULL
/// is accepted.
#[no_mangle]
pub unsafe extern "C" fn zcp_close(client: *mut Client) -> i32 {
    // SAFETY: the caller passes a client for the last time.
    unsafe { zcp_close_all(ptr::from_ref(&client), 1) }
}

/// Close `count` clients and sessions and free them, as by `zcp_close`, with one wait for all of them: thousands of sessions on one
/// connection end together. NULL is accepted for `clients` and for each of them.
#[no_mangle]
pub unsafe extern "C" fn zcp_close_all(clients: *const *mut Client, count: usize) -> i32 {
    if clients.is_null() {
        return ZCP_OK;
    }
    // SAFETY: the caller passes `count` clients.
    let clients = unsafe { std::slice::from_raw_parts(clients, count) };
    let code = guard(ptr::null_mut(), || {
        // SAFETY: the caller passes each for the last time.
        let all: Vec<&Client> = clients.iter().filter_map(|client| unsafe { client.as_ref() }).collect();
        let Some(first) = all.first() else { return Ok(()) };
        let inner: Vec<_> = all.iter().map(|client| (client.is_session, client.inner.clone())).collect();
        let closed = first.runtime.wait(async move {
            // Sessions first: their connection may belong to a client among these.
            for is_session in [true, false] {
                let mut closing = JoinSet::new();
                for (_, client) in inner.iter().filter(|(each, _)| *each == is_session) {
                    let client = client.clone();
                    closing.spawn(async move { client.close().await });
                }
                while closing.join_next().await.is_some() {}
            }
        });
        for client in all {
            client.close_gates();
        }
        closed
    });
    for &client in clients {
        // SAFETY: the caller passes each for the last time.
        unsafe { free(client) };
    }
    if code == ZCP_ARGUMENT {
        ZCP_OK // in a callback
    } else {
        code
    }
}
