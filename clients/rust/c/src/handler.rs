//! Calls from the server.

use crate::client::{waiting, Client};
use crate::error::{guard, Error, Failure};
use crate::gate::Gate;
use crate::pointer::{optional_text, text, Data};
use crate::value::Value;
use std::ffi::{c_char, c_void, CString};
use std::ptr;
use tokio::sync::oneshot;
use zcproto_client::{codec, CallError, Code};

type Answer = Result<codec::Value, CallError>;

/// A call from the server. Answer it once, from any thread, by `zcp_server_call_reply` or `zcp_server_call_fail`; both free
/// it. An answer to a call that the server has withdrawn has no effect.
pub struct ServerCall {
    method: CString,
    user: CString,
    params: Value,
    answer: oneshot::Sender<Answer>,
}

/// The function that handles calls from the server. It runs in a thread of this library and must return soon; the call can be
/// answered later, by another thread.
pub type Handler = Option<extern "C" fn(data: *mut c_void, call: *mut ServerCall)>;

/// Let the server call a method of this client. `handler` gets each call with `data`, until it is replaced or removed, or the client
/// is closed. Waits until the server can call it. After a reconnect the client registers its methods again.
#[no_mangle]
pub unsafe extern "C" fn zcp_handle(
    client: *const Client,
    method: *const c_char,
    handler: Handler,
    data: *mut c_void,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client and a text.
        let (client, method) = unsafe { (waiting(client)?, text(method, "method")?) };
        let handler = handler.ok_or_else(|| Failure::argument("handler is NULL"))?;
        let data = Data::new(data);
        let gate = Gate::default();
        let own_gate = gate.clone();
        let handle = client.inner.handle(method, move |call: zcproto_client::Call| {
            let gate = gate.clone();
            async move {
                let (answer, answered) = oneshot::channel();
                let call = ServerCall {
                    method: CString::new(call.method).unwrap_or_default(),
                    user: CString::new(call.user).unwrap_or_default(),
                    params: Value::new(call.raw_params),
                    answer,
                };
                gate.run(|| handler(data.get(), Box::into_raw(Box::new(call))));
                answered.await.unwrap_or_else(|_| Err(CallError::new(Code::Internal, "the handler gave no answer")))
            }
        });
        let registered = client.runtime.wait(handle)?;
        if let Some(previous) = client.replace_handler(method, Some(own_gate)) {
            previous.close();
        }
        registered.map_err(Failure::from)
    })
}

/// Handle a method no longer. Afterwards the handler does not run, also if this function fails because the server could not be
/// notified; calls that it has not answered can still be answered. Waits for that.
#[no_mangle]
pub unsafe extern "C" fn zcp_remove_handler(
    client: *const Client,
    method: *const c_char,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client and a text.
        let (client, method) = unsafe { (waiting(client)?, text(method, "method")?) };
        let removed = client.runtime.wait(client.inner.remove_handler(method))?;
        if let Some(gate) = client.replace_handler(method, None) {
            gate.close();
        }
        removed.map_err(Failure::from)
    })
}

/// Return the name of the method that is called. Return NULL for NULL.
#[no_mangle]
pub unsafe extern "C" fn zcp_server_call_method(call: *const ServerCall) -> *const c_char {
    // SAFETY: the caller passes NULL or a call.
    unsafe { call.as_ref() }.map_or(ptr::null(), |call| call.method.as_ptr())
}

/// Return the user whose session is called. Return NULL for NULL.
#[no_mangle]
pub unsafe extern "C" fn zcp_server_call_user(call: *const ServerCall) -> *const c_char {
    // SAFETY: the caller passes NULL or a call.
    unsafe { call.as_ref() }.map_or(ptr::null(), |call| call.user.as_ptr())
}

/// Return the params, a map. They belong to the call. Return NULL for NULL.
#[no_mangle]
pub unsafe extern "C" fn zcp_server_call_params(call: *const ServerCall) -> *const Value {
    // SAFETY: the caller passes NULL or a call.
    unsafe { call.as_ref() }.map_or(ptr::null(), |call| ptr::from_ref(&call.params))
}

/// Answer a call from the server, and free it. `result` is a value, or NULL for nil; it still belongs to the caller.
#[no_mangle]
pub unsafe extern "C" fn zcp_server_call_reply(call: *mut ServerCall, result: *const Value) {
    guard(ptr::null_mut(), || {
        // SAFETY: the caller passes NULL or a value.
        let result = unsafe { result.as_ref() }.map_or(codec::Value::Nil, |result| result.inner().clone());
        // SAFETY: the caller passes a call for the last time.
        unsafe { answer(call, Ok(result)) }
    });
}

/// Fail a call from the server, and free it. `code` is one of 1 to 16, others become ZCP_UNKNOWN; `message` is a text or NULL.
#[no_mangle]
pub unsafe extern "C" fn zcp_server_call_fail(call: *mut ServerCall, code: i32, message: *const c_char) {
    guard(ptr::null_mut(), || {
        let code = Code::from_wire(code.into()).unwrap_or(Code::Unknown);
        // SAFETY: the caller passes NULL or a text.
        let message = unsafe { optional_text(message, "message") }.ok().flatten().unwrap_or_default();
        // SAFETY: the caller passes a call for the last time.
        unsafe { answer(call, Err(CallError::new(code, message))) }
    });
}

/// Answer a call and free it.
unsafe fn answer(call: *mut ServerCall, answer: Answer) -> Result<(), Failure> {
    if call.is_null() {
        return Err(Failure::argument("call is NULL"));
    }
    // SAFETY: the caller passes a call for the last time.
    let call = unsafe { Box::from_raw(call) };
    drop(call.answer.send(answer)); // the server may have withdrawn the call
    Ok(())
}
