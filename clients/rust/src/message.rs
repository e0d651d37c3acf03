//! The bodies of each kind (zcp1.md, sections 6, 18 and 19).

use crate::codec::{self, CodecError, Value};
use crate::error::{CallError, Code, ProtocolError};
use crate::frame::{MIN_LENGTH, VERSION};

/// How many items and bytes a peer is allowed to send: totals since OPEN.
pub type Credit = [u64; 2];

/// The metadata of a request. Absent keys are not sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta<'a> {
    /// How long the caller waits, in milliseconds from the arrival of the request.
    pub deadline_ms: Option<u64>,
    /// 1 to 64 characters: the server runs requests with the same key once.
    pub idempotency_key: Option<&'a str>,
    /// W3C Trace Context, 55 characters.
    pub traceparent: Option<&'a str>,
}

const MAX_METHOD: usize = 128;
const MAX_IDEMPOTENCY_KEY: usize = 64;
const NIL: u8 = 0xc0;
/// The largest total that CREDIT can have.
const MAX_TOTAL: u64 = (1 << 53) - 1;

/// Append the body of a REQUEST or OPEN. `params` is an encoded map or nil.
///
/// # Errors
///
/// If the method's name, params or the idempotency key are invalid. Nothing is appended then.
pub fn encode_request(
    out: &mut Vec<u8>,
    method: &str,
    params: &[u8],
    meta: &Meta<'_>,
    credit: Option<Credit>,
) -> Result<(), CodecError> {
    if !is_method(method) {
        return Err(CodecError::new("a method name must have 1 to 128 characters of a-z 0-9 _ ."));
    }
    if !params.first().is_some_and(|&first| first == NIL || matches!(first, 0x80..=0x8f | 0xde | 0xdf)) {
        return Err(CodecError::new("params must be a map or nil"));
    }
    if let Some(key) = meta.idempotency_key {
        if key.is_empty() || key.chars().count() > MAX_IDEMPOTENCY_KEY {
            return Err(CodecError::new("an idempotency key must have 1 to 64 characters"));
        }
    }
    let keys =
        [credit.is_some(), meta.deadline_ms.is_some(), meta.idempotency_key.is_some(), meta.traceparent.is_some()];
    let count = keys.into_iter().filter(|&has| has).count();
    codec::write_array(out, if count == 0 { 2 } else { 3 });
    codec::write_str(out, method);
    out.extend_from_slice(params);
    if count == 0 {
        return Ok(());
    }
    codec::write_map(out, count);
    if let Some(credit) = credit {
        codec::write_str(out, "credit");
        encode_credit(out, credit);
    }
    if let Some(deadline) = meta.deadline_ms {
        codec::write_str(out, "deadline_ms");
        codec::write_int(out, i128::from(deadline));
    }
    for (name, text) in [("idempotency_key", meta.idempotency_key), ("traceparent", meta.traceparent)] {
        if let Some(text) = text {
            codec::write_str(out, name);
            codec::write_str(out, text);
        }
    }
    Ok(())
}

fn is_method(method: &str) -> bool {
    matches!(method.len(), 1..=MAX_METHOD)
        && method.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.'))
}

/// The body of a CALL.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestMessage {
    /// The name of the method.
    pub method: String,
    /// A map.
    pub params: Value,
    /// How long the caller waits, in milliseconds.
    pub deadline_ms: Option<i128>,
    /// W3C Trace Context, if it is well-formed.
    pub traceparent: Option<String>,
}

/// Decode `[method, params]` or `[method, params, meta]`.
///
/// # Errors
///
/// If the body is invalid or has another form.
pub fn decode_request(body: &[u8], max_depth: usize) -> Result<RequestMessage, CodecError> {
    let value = codec::decode_within(body, max_depth)?;
    let (method, params, meta) = match array(value) {
        Some(mut parts) if parts.len() == 2 || parts.len() == 3 => {
            let meta = if parts.len() == 3 { parts.pop() } else { Some(Value::Map(Vec::new())) };
            (parts.swap_remove(0), parts.pop().unwrap_or(Value::Nil), meta.unwrap_or(Value::Nil))
        }
        _ => return Err(CodecError::new("request must be [method, params] or [method, params, meta]")),
    };
    let Value::Str(method) = method else {
        return Err(CodecError::new("request has an invalid method name"));
    };
    if !is_method(&method) {
        return Err(CodecError::new("request has an invalid method name"));
    }
    let params = match params {
        Value::Nil => Value::Map(Vec::new()),
        params @ Value::Map(_) => params,
        _ => return Err(CodecError::new("params must be a map")),
    };
    if !matches!(meta, Value::Map(_)) {
        return Err(CodecError::new("meta must be a map"));
    }
    let deadline_ms = match meta.get("deadline_ms") {
        None | Some(Value::Nil) => None,
        Some(Value::Int(deadline)) => Some(*deadline),
        Some(_) => return Err(CodecError::new("deadline_ms must be an int")),
    };
    let traceparent = meta.get("traceparent").and_then(Value::as_str).filter(|text| is_traceparent(text));
    Ok(RequestMessage { traceparent: traceparent.map(str::to_owned), method, params, deadline_ms })
}

fn array(value: Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(parts) => Some(parts),
        _ => None,
    }
}

/// Return whether a text is a valid `traceparent` of W3C Trace Context.
#[must_use]
pub fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let lengths = [2, 32, 16, 2];
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    parts.len() == 4
        && parts.iter().zip(lengths).all(|(part, length)| part.len() == length && is_hex(part))
        && parts[0] != "ff"
        && parts[1..3].iter().all(|part| part.bytes().any(|byte| byte != b'0'))
}

/// Append `[items, bytes]`.
pub fn encode_credit(out: &mut Vec<u8>, [items, bytes]: Credit) {
    codec::write_array(out, 2);
    codec::write_int(out, i128::from(items));
    codec::write_int(out, i128::from(bytes));
}

/// Decode `[items, bytes]`.
///
/// # Errors
///
/// If the body is invalid or has another form.
pub fn decode_credit(body: &[u8]) -> Result<Credit, CodecError> {
    let total = |value: &Value| u64::try_from(value.as_int()?).ok().filter(|&total| total <= MAX_TOTAL);
    let parts = array(codec::decode(body)?);
    match parts.as_deref() {
        Some([items, bytes]) => total(items).zip(total(bytes)).map(|(items, bytes)| [items, bytes]),
        _ => None,
    }
    .ok_or(CodecError::new("credit must be [items, bytes]"))
}

/// The body of an ERROR or FAILURE.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorMessage {
    /// The code, which this client may not know.
    pub code: i128,
    /// A sentence for people.
    pub message: String,
    /// A map.
    pub details: Value,
}

impl ErrorMessage {
    /// Make the error of a call. For an unknown code it is UNKNOWN, and the message has the number.
    #[must_use]
    pub fn into_error(self) -> CallError {
        let Self { code, message, details } = self;
        match Code::from_wire(code) {
            Some(code) => CallError { code, message, details },
            None => CallError { code: Code::Unknown, message: format!("{message} (code {code})"), details },
        }
    }
}

/// Decode `[code, message]` or `[code, message, details]`.
///
/// # Errors
///
/// If the body is invalid or has another form.
pub fn decode_error(body: &[u8], max_depth: usize) -> Result<ErrorMessage, CodecError> {
    let parts = match array(codec::decode_within(body, max_depth)?) {
        Some(parts) if parts.len() == 2 || parts.len() == 3 => parts,
        _ => return Err(CodecError::new("error must be [code, message] or [code, message, details]")),
    };
    let mut parts = parts.into_iter();
    let (Some(Value::Int(code)), Some(Value::Str(message))) = (parts.next(), parts.next()) else {
        return Err(CodecError::new("error must carry an int code and a str message"));
    };
    let details = match parts.next() {
        None | Some(Value::Nil) => Value::Map(Vec::new()),
        Some(details @ Value::Map(_)) => details,
        Some(_) => return Err(CodecError::new("error details must be a map")),
    };
    Ok(ErrorMessage { code, message, details })
}

/// Encode a FAILURE of at most `limit` bytes. Message and details that cannot be sent are left out.
#[must_use]
pub fn encode_failure(error: &CallError, limit: usize) -> Vec<u8> {
    let code = match error.code {
        code @ Code::StaleTimestamp => code,
        code if code.number() <= Code::Unauthenticated.number() => code,
        _ => Code::Unknown,
    };
    let start = |length: usize| {
        let mut body = Vec::new();
        codec::write_array(&mut body, length);
        codec::write_int(&mut body, i128::from(code.number()));
        body
    };
    let mut body = start(3);
    codec::write_str(&mut body, &error.message);
    if codec::write_value(&mut body, &error.details).is_ok()
        && MIN_LENGTH as usize + body.len() <= limit
        && matches!(error.details, Value::Map(_))
        && codec::scan(&body, codec::MAX_DEPTH).is_ok()
    {
        return body;
    }
    body = start(2);
    codec::write_str(&mut body, "the error cannot be sent");
    body
}

/// Decode `[name, data]`.
///
/// # Errors
///
/// If the body is invalid or has another form.
pub fn decode_event(body: &[u8], max_depth: usize) -> Result<(String, Value), CodecError> {
    let parts = array(codec::decode_within(body, max_depth)?).filter(|parts| parts.len() == 2);
    let mut parts = parts.into_iter().flatten();
    match (parts.next(), parts.next()) {
        (Some(Value::Str(name)), Some(data)) => Ok((name, data)),
        _ => Err(CodecError::new("event must be [name, data]")),
    }
}

/// The policy of RFC 6797 for native clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StsPolicy {
    /// How long it holds after a verified connection, in seconds; 0 ends it.
    pub max_age: u64,
    /// Whether it holds for subdomains, too.
    pub include_subdomains: bool,
}

/// The limits of streams of items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamLimits {
    /// How many can be in flight on the connection.
    pub max_open: u32,
    /// The largest `length` of an ITEM, in bytes.
    pub max_item: u32,
}

/// The settings of the server, from WELCOME.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// The product's name.
    pub server: String,
    /// The largest `length` that the server accepts on a connection with a session, in bytes.
    pub max_frame: u32,
    /// How many requests can be in flight on the connection.
    pub max_streams: u32,
    /// The silence after which the server closes the connection, in milliseconds; 0 for never.
    pub idle_timeout_ms: u64,
    /// How far off a timestamp can be, in milliseconds.
    pub tolerance_ms: u64,
    /// Whether clients must verify this host from now on.
    pub sts: StsPolicy,
    /// The limits of streams of items, if the server has them.
    pub streams: Option<StreamLimits>,
    /// How many calls from the server can be in flight, if the server calls clients.
    pub max_calls: Option<u32>,
    /// The whole map, with the keys that this client does not know.
    pub more: Value,
}

/// The faults of the keys of WELCOME.
const NOT_A_MAP: ProtocolError = ProtocolError::new("WELCOME is not a valid map");

/// Decode WELCOME (zcp1.md, sections 6.2 and 18.3).
///
/// # Errors
///
/// If a key is missing, too small or of the wrong type, or if the server does not speak version 1.
pub fn decode_welcome(body: &[u8], max_depth: usize) -> Result<Welcome, ProtocolError> {
    let fields = codec::decode_within(body, max_depth).map_err(|_| NOT_A_MAP)?;
    if !matches!(fields, Value::Map(_)) {
        return Err(NOT_A_MAP);
    }
    let server = fields.get("server").and_then(Value::as_str).ok_or(wrong("server"))?.to_owned();
    let versions = fields.get("versions").and_then(Value::as_array).ok_or(wrong("versions"))?;
    if !versions.contains(&Value::Int(i128::from(VERSION))) {
        return Err(ProtocolError::new("WELCOME: the server does not support version 1"));
    }
    let sts = fields.get("sts").ok_or(wrong("sts"))?;
    let streams = match fields.get("streams") {
        None => None,
        Some(map) => {
            Some(StreamLimits { max_open: limit(map, "max_open", 0)?, max_item: limit(map, "max_item", MIN_LENGTH)? })
        }
    };
    Ok(Welcome {
        server,
        max_frame: limit(&fields, "max_frame", MIN_LENGTH)?,
        max_streams: limit(&fields, "max_streams", 1)?,
        idle_timeout_ms: number(&fields, "idle_timeout_ms", 0)?,
        tolerance_ms: number(&fields, "tolerance_ms", 0)?,
        sts: StsPolicy {
            max_age: number(sts, "max_age", 0)?,
            include_subdomains: sts.get("include_subdomains").and_then(Value::as_bool).ok_or(wrong("sts"))?,
        },
        streams,
        max_calls: fields.get("calls").map(|map| limit(map, "max", 0)).transpose()?,
        more: fields,
    })
}

fn wrong(key: &str) -> ProtocolError {
    ProtocolError::new(match key {
        "server" => "WELCOME: server is missing or of the wrong type",
        "versions" => "WELCOME: versions is missing or of the wrong type",
        "sts" | "max_age" => "WELCOME: sts is missing, too small or of the wrong type",
        "max_frame" => "WELCOME: max_frame is missing, too small or of the wrong type",
        "max_streams" => "WELCOME: max_streams is missing, too small or of the wrong type",
        "idle_timeout_ms" => "WELCOME: idle_timeout_ms is missing, too small or of the wrong type",
        "tolerance_ms" => "WELCOME: tolerance_ms is missing, too small or of the wrong type",
        "max" => "WELCOME: calls is missing, too small or of the wrong type",
        _ => "WELCOME: streams is missing, too small or of the wrong type",
    })
}

fn number(map: &Value, key: &str, least: u64) -> Result<u64, ProtocolError> {
    let value = map.get(key).and_then(Value::as_int).filter(|&value| value >= i128::from(least)).ok_or(wrong(key))?;
    Ok(u64::try_from(value).unwrap_or(u64::MAX))
}

/// Limits beyond 32 bits are never reached.
fn limit(map: &Value, key: &str, least: u32) -> Result<u32, ProtocolError> {
    number(map, key, u64::from(least)).map(|value| u32::try_from(value).unwrap_or(u32::MAX))
}

/// Decode GOAWAY (zcp1.md, section 6.7): the reason and `retry_after_ms`.
///
/// # Errors
///
/// If the body is invalid or has another form.
pub fn decode_goaway(body: &[u8], max_depth: usize) -> Result<(String, u64), ProtocolError> {
    let fields = codec::decode_within(body, max_depth).unwrap_or(Value::Nil);
    let reason = fields.get("reason").and_then(Value::as_str);
    let retry_after_ms = fields.get("retry_after_ms").and_then(Value::as_int).filter(|&value| value >= 0);
    match (reason, retry_after_ms) {
        (Some(reason), Some(delay)) => Ok((reason.to_owned(), u64::try_from(delay).unwrap_or(u64::MAX))),
        _ => Err(ProtocolError::new("GOAWAY must have a reason and retry_after_ms")),
    }
}
