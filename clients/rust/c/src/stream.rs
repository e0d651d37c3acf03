//! Streams of items.

use crate::client::Client;
use crate::error::{guard, Error, Failure};
use crate::pointer::{free, give, object, text};
use crate::runtime::Shared;
use crate::value::Value;
use std::ffi::c_char;
use std::sync::Arc;
use std::time::Duration;
use zcproto_client::codec;

/// A stream of items. One thread at a time can take items while another one sends items.
pub struct Stream {
    runtime: Arc<Shared>,
    inner: zcproto_client::Stream,
}

/// Open a stream of a method. `params` is a map, or NULL for none. `timeout_ms` limits the whole stream; 0 for no limit.
/// Does not wait: an error of the server comes with the first item.
#[no_mangle]
pub unsafe extern "C" fn zcp_stream_open(
    client: *const Client,
    method: *const c_char,
    params: *const Value,
    timeout_ms: u64,
    stream: *mut *mut Stream,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client, a text, and NULL or a value.
        let (client, method, params) = unsafe { (object(client, "client")?, text(method, "method")?, params.as_ref()) };
        let params = params.map_or(codec::Value::Nil, |params| params.inner().clone());
        let mut builder = client.inner.stream(method, &params);
        if timeout_ms > 0 {
            builder = builder.timeout(Duration::from_millis(timeout_ms));
        }
        let inner = client.runtime.wait(async { builder.open() })?;
        // SAFETY: the caller passes a place for a stream.
        unsafe { give(stream, Stream { runtime: Arc::clone(&client.runtime), inner }) }
    })
}

/// Wait for the next item. ZCP_END after the last one: `zcp_stream_result` has the result then.
#[no_mangle]
pub unsafe extern "C" fn zcp_stream_next(stream: *const Stream, item: *mut *mut Value, error: *mut *mut Error) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a stream.
        let stream = unsafe { object(stream, "stream") }?;
        let next = stream.runtime.wait(stream.inner.next())?.map_err(Failure::from)?;
        let next = next.ok_or_else(|| Failure::end("the stream has no further item"))?;
        // SAFETY: the caller passes a place for a value.
        unsafe { give(item, Value::new(next)) }
    })
}

/// Send an item. Waits until the method asks for it.
#[no_mangle]
pub unsafe extern "C" fn zcp_stream_send(stream: *const Stream, item: *const Value, error: *mut *mut Error) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a stream and a value.
        let (stream, item) = unsafe { (object(stream, "stream")?, object(item, "item")?) };
        stream.runtime.wait(stream.inner.send(item.inner()))??;
        Ok(())
    })
}

/// Send no more items. Waits until those before were sent.
#[no_mangle]
pub unsafe extern "C" fn zcp_stream_finish(stream: *const Stream, error: *mut *mut Error) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a stream.
        let stream = unsafe { object(stream, "stream") }?;
        stream.runtime.wait(stream.inner.finish())
    })
}

/// Wait for the result of the method. Take all items first.
#[no_mangle]
pub unsafe extern "C" fn zcp_stream_result(
    stream: *const Stream,
    result: *mut *mut Value,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a stream.
        let stream = unsafe { object(stream, "stream") }?;
        let value = stream.runtime.wait(stream.inner.result())??;
        // SAFETY: the caller passes a place for a value.
        unsafe { give(result, Value::new(value)) }
    })
}

/// Cancel a stream unless it has ended: functions that wait for it return ZCP_CANCELLED. Can be called while other threads wait.
#[no_mangle]
pub unsafe extern "C" fn zcp_stream_cancel(stream: *const Stream) {
    // SAFETY: the caller passes NULL or a stream.
    if let Some(stream) = unsafe { stream.as_ref() } {
        guard(std::ptr::null_mut(), || {
            stream.inner.cancel();
            Ok(())
        });
    }
}

/// Free a stream. The method is cancelled if it has not ended.
#[no_mangle]
pub unsafe extern "C" fn zcp_stream_free(stream: *mut Stream) {
    // SAFETY: the caller passes a stream for the last time.
    unsafe { free(stream) }
}
