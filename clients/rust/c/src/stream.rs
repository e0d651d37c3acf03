//! Streams of items.

use crate::client::Client;
use crate::error::{guard, Error, Failure};
use crate::pointer::{free, give, object, optional_text, text};
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

/// Options of one stream. All zero is the default.
#[repr(C)]
pub struct StreamOptions {
    /// The time for the whole stream in milliseconds; 0 for no limit.
    pub timeout_ms: u64,
    /// The time to wait for one item in milliseconds; 0 for no limit.
    pub item_timeout_ms: u64,
    /// How many items the server may send before the application takes one; 0 for 64.
    pub window_items: u64,
    /// How many bytes the server may send before the application takes an item; 0 for 262,144.
    pub window_bytes: u64,
    /// NULL, or W3C Trace Context.
    pub traceparent: *const c_char,
}

/// Open a stream of a method. `params` is a map, or NULL for none; `options` is NULL or options. Does not wait: an error of the
/// server comes with the first item.
#[no_mangle]
pub unsafe extern "C" fn zcp_stream_open(
    client: *const Client,
    method: *const c_char,
    params: *const Value,
    options: *const StreamOptions,
    stream: *mut *mut Stream,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a client, a text, and NULL or objects that live during this function.
        let (client, method, params, options) =
            unsafe { (object(client, "client")?, text(method, "method")?, params.as_ref(), options.as_ref()) };
        let params = params.map_or(codec::Value::Nil, |params| params.inner().clone());
        let mut builder = client.inner.stream(method, &params);
        if let Some(options) = options {
            if options.timeout_ms > 0 {
                builder = builder.timeout(Duration::from_millis(options.timeout_ms));
            }
            if options.item_timeout_ms > 0 {
                builder = builder.item_timeout(Duration::from_millis(options.item_timeout_ms));
            }
            let or_default = |value, default| if value == 0 { default } else { value };
            let [items, bytes] = zcproto_client::DEFAULT_WINDOW;
            builder = builder.window(or_default(options.window_items, items), or_default(options.window_bytes, bytes));
            // SAFETY: the field of options is NULL or a text.
            if let Some(trace) = unsafe { optional_text(options.traceparent, "traceparent") }? {
                builder = builder.traceparent(trace);
            }
        }
        let runtime = Arc::clone(&client.runtime);
        // SAFETY: the caller passes a place for a stream.
        unsafe { give(stream, Stream { runtime, inner: builder.open() }) }
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
