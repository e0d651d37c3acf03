//! Steps with a client.

use crate::typed::{from_hex, typed, untyped};
use crate::vector_steps;
use serde_json::{Value as Json, json};
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use zcproto::codec::Value;
use zcproto::{Call, CallError, Client, Code, ConnectOptions, Credentials, Device, Error, Stream, TlsFailure};

const KIT: u32 = 1;

/// An answer without its id.
type Answer = Result<Json, Failure>;

/// Why a step failed.
enum Failure {
    Error(Error),
    /// The step is unknown or malformed.
    Step(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

fn malformed(what: &str) -> Failure {
    Failure::Step(format!("unknown or malformed: {what}"))
}

/// The result of a call, once it has ended.
type Outcome = Option<Result<Json, Error>>;

/// A call that has begun.
struct Started {
    outcome: watch::Receiver<Outcome>,
    cancel: Mutex<Option<oneshot::Sender<()>>>,
}

/// Calls of the server to one client, held until a step answers them.
#[derive(Default)]
struct Held {
    answers: Vec<Option<oneshot::Sender<Result<Value, CallError>>>>, // by the number of the call
    seen: Option<mpsc::UnboundedSender<Json>>,
}

/// One session: with a connection of its own, or on that of another client.
#[derive(Clone)]
struct Session {
    client: Client,
    held: Arc<Mutex<Held>>,
    called: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Json>>>,
}

/// The clients, calls and streams of the program by their names.
#[derive(Default)]
pub struct Conform {
    sessions: Mutex<HashMap<String, Session>>,
    calls: Mutex<HashMap<String, Arc<Started>>>,
    streams: Mutex<HashMap<String, Arc<Stream>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text<'a>(step: &'a Json, name: &str) -> Result<&'a str, Failure> {
    step[name].as_str().ok_or_else(|| malformed(name))
}

fn value(step: &Json, name: &str) -> Result<Value, Failure> {
    untyped(&step[name]).ok_or_else(|| malformed(name))
}

fn millis(step: &Json, name: &str) -> Option<Duration> {
    step[name].as_u64().map(Duration::from_millis)
}

impl Conform {
    /// Run a step and return its answer without the id.
    pub async fn run(&self, step: &Json) -> Json {
        match self.answer(step).await {
            Ok(ok) => json!({"ok": ok}),
            Err(Failure::Error(error)) => json!({"error": describe(&error)}),
            Err(Failure::Step(reason)) => json!({"unsupported": reason}),
        }
    }

    /// Close all clients.
    pub async fn close(&self) {
        let sessions: Vec<Session> = lock(&self.sessions).drain().map(|(_, session)| session).collect();
        for session in sessions {
            session.client.close().await;
        }
    }

    async fn answer(&self, step: &Json) -> Answer {
        match text(step, "step")? {
            "hello" => Ok(json!({"kit": KIT, "client": concat!("zcproto-rust/", env!("CARGO_PKG_VERSION"))})),
            "connect" => self.connect(step).await,
            "session_for" => self.session_for(step).await,
            "call" => self.call(step),
            "expect" => self.expect(step).await,
            "cancel" => self.cancel(step),
            "open" => self.open(step),
            "next" => self.next(step).await,
            "send" => {
                self.stream(step)?.send(&value(step, "value")?).await?;
                Ok(Json::Null)
            }
            "finish" => {
                self.stream(step)?.finish().await;
                Ok(Json::Null)
            }
            "leave" => {
                self.stream(step)?.cancel();
                Ok(Json::Null)
            }
            "handle" => self.handle(step).await,
            "called" => {
                let called = self.session(step)?.called;
                let seen = called.lock().await.recv().await;
                seen.ok_or_else(|| malformed("called"))
            }
            "answer" => self.answer_call(step),
            "event" => self.event(step).await,
            "session" => Ok(self.session(step)?.client.session().map_or(
                Json::Null,
                |session| json!({"id": session.id, "user": session.user, "expires_at": session.expires_at}),
            )),
            "open_session" => {
                let session = self.session(step)?.client.open_session().await?;
                Ok(json!({"session": session.id}))
            }
            "cut" => {
                self.session(step)?.client.cut();
                Ok(Json::Null)
            }
            "close" => {
                let session = lock(&self.sessions).remove(text(step, "client")?); // none if its connect step failed
                if let Some(session) = session {
                    session.client.close().await;
                }
                Ok(Json::Null)
            }
            name => vector_steps::run(step).ok_or_else(|| malformed(name)),
        }
    }

    fn session(&self, step: &Json) -> Result<Session, Failure> {
        lock(&self.sessions).get(text(step, "client")?).cloned().ok_or_else(|| malformed("client"))
    }

    fn stream(&self, step: &Json) -> Result<Arc<Stream>, Failure> {
        lock(&self.streams).get(text(step, "stream")?).cloned().ok_or_else(|| malformed("stream"))
    }

    fn started(&self, step: &Json) -> Result<Arc<Started>, Failure> {
        lock(&self.calls).get(text(step, "call")?).cloned().ok_or_else(|| malformed("call"))
    }

    fn add(&self, step: &Json, client: Client) -> Answer {
        let id = client.session().map(|session| session.id);
        let (seen, called) = mpsc::unbounded_channel();
        let held = Arc::new(Mutex::new(Held { seen: Some(seen), ..Held::default() }));
        let session = Session { client, held, called: Arc::new(tokio::sync::Mutex::new(called)) };
        lock(&self.sessions).insert(text(step, "client")?.into(), session);
        Ok(json!({"session": id}))
    }

    async fn connect(&self, step: &Json) -> Answer {
        let mut options = ConnectOptions::new(step["address"].as_str().unwrap_or_default());
        if let (Some(user), Some(key)) = (step["user"].as_str(), step["key"].as_str()) {
            options = options.api_key(user, key);
        }
        if let Some(seed) = step["device_key"].as_str() {
            let seed: Option<[u8; 32]> = from_hex(seed).and_then(|seed| seed.try_into().ok());
            let device = Device::from_seed(&seed.ok_or_else(|| malformed("device_key"))?);
            options = options.device(device, text(step, "device")?);
        }
        if let Some(logins) = step["login"].as_array() {
            options = options.credentials(login(logins)?);
        }
        if let Some(file) = step["ca_file"].as_str() {
            options = options.ca_file(file);
        }
        if let Some(pins) = step["pins"].as_array() {
            options = options.pins(pins.iter().filter_map(Json::as_str));
        }
        if let Some(verify) = step["verify"].as_bool() {
            options = options.verify(verify);
        }
        if let Some(name) = step["server_name"].as_str() {
            options = options.server_hostname(name);
        }
        if let Some(name) = step["client_name"].as_str() {
            options = options.client(name);
        }
        if let Some(home) = step["home"].as_str() {
            options = options.home(home);
        }
        if let Some(max) = step["max_calls"].as_u64() {
            options = options.max_calls(u32::try_from(max).map_err(|_| malformed("max_calls"))?);
        }
        if let Some(max) = step["max_connections"].as_u64() {
            options = options.max_connections(usize::try_from(max).map_err(|_| malformed("max_connections"))?);
        }
        if let Some(timeout) = millis(step, "timeout_ms") {
            options = options.timeout(timeout);
        }
        if let Some(timeout) = millis(step, "connect_timeout_ms") {
            options = options.connect_timeout(timeout);
        }
        let client = Client::connect(options).await?;
        self.add(step, client)
    }

    async fn session_for(&self, step: &Json) -> Answer {
        let of = lock(&self.sessions).get(text(step, "of")?).map(|session| session.client.clone());
        let credentials = Credentials::api_key(text(step, "user")?, text(step, "key")?);
        self.add(step, of.ok_or_else(|| malformed("of"))?.session_for(credentials).await?)
    }

    fn call(&self, step: &Json) -> Answer {
        let client = self.session(step)?.client;
        let (method, params) = (text(step, "method")?.to_owned(), value(step, "params")?);
        let timeout = millis(step, "timeout_ms");
        let key = step["idempotency_key"].as_str().map(str::to_owned);
        let trace = step["traceparent"].as_str().map(str::to_owned);
        let (cancel, cancelled) = oneshot::channel::<()>();
        let (ended, outcome) = watch::channel(None);
        tokio::spawn(async move {
            let mut request = client.request(&method).params(&params);
            if let Some(timeout) = timeout {
                request = request.timeout(timeout);
            }
            if let Some(key) = &key {
                request = request.idempotency_key(key);
            }
            if let Some(trace) = &trace {
                request = request.traceparent(trace);
            }
            let result = tokio::select! {
                result = request.send::<Value>() => result.map(|value| typed(&value)),
                Ok(()) = cancelled => Err(CallError::new(Code::Cancelled, "").into()),
            };
            ended.send_replace(Some(result));
        });
        let started = Started { outcome, cancel: Mutex::new(Some(cancel)) };
        lock(&self.calls).insert(text(step, "call")?.into(), Arc::new(started));
        Ok(Json::Null)
    }

    async fn expect(&self, step: &Json) -> Answer {
        let mut outcome = self.started(step)?.outcome.clone();
        let ended = outcome.wait_for(Option::is_some).await.map_err(|_| malformed("call"))?;
        Ok(ended.clone().unwrap_or(Ok(Json::Null))?)
    }

    fn cancel(&self, step: &Json) -> Answer {
        if let Some(cancel) = lock(&self.started(step)?.cancel).take() {
            cancel.send(()).ok(); // it may have ended
        }
        Ok(Json::Null)
    }

    fn open(&self, step: &Json) -> Answer {
        let params = value(step, "params")?;
        let session = self.session(step)?;
        let mut builder = session.client.stream(text(step, "method")?, &params);
        if let (Some(items), Some(bytes)) = (step["credit"][0].as_u64(), step["credit"][1].as_u64()) {
            builder = builder.window(items, bytes);
        }
        if let Some(timeout) = millis(step, "timeout_ms") {
            builder = builder.timeout(timeout);
        }
        let stream = Arc::new(builder.open());
        lock(&self.streams).insert(text(step, "stream")?.into(), stream);
        Ok(Json::Null)
    }

    async fn next(&self, step: &Json) -> Answer {
        let stream = self.stream(step)?;
        Ok(match stream.next::<Value>().await? {
            Some(item) => json!({"item": typed(&item)}),
            None => json!({"end": typed(&stream.result::<Value>().await?)}),
        })
    }

    async fn handle(&self, step: &Json) -> Answer {
        let session = self.session(step)?;
        let held = Arc::clone(&session.held);
        session.client.handle(text(step, "method")?, move |call: Call| hold(&held, &call)).await?;
        Ok(Json::Null)
    }

    fn answer_call(&self, step: &Json) -> Answer {
        let session = self.session(step)?;
        let number = step["call"].as_u64().and_then(|number| usize::try_from(number).ok());
        let mut held = lock(&session.held);
        let answer = number.and_then(|number| held.answers.get_mut(number)?.take());
        if let Some(answer) = answer {
            let result = match step["code"].as_i64() {
                Some(code) => {
                    Err(CallError::new(Code::from_wire(code.into()).unwrap_or(Code::Unknown), "failed by the scenario"))
                }
                None => Ok(value(step, "value")?),
            };
            drop(answer.send(result)); // without effect on a call that was withdrawn
        }
        Ok(Json::Null)
    }

    async fn event(&self, step: &Json) -> Answer {
        let event = self.session(step)?.client.next_event().await;
        let event = event.ok_or_else(|| Failure::Step("the client is closed".into()))?;
        Ok(json!({"name": event.name, "data": typed(&event.data)}))
    }
}

/// Hold a call until a step answers it.
fn hold(held: &Mutex<Held>, call: &Call) -> impl Future<Output = Result<Value, CallError>> + Send + use<> {
    let (answer, answered) = oneshot::channel();
    let mut held = lock(held);
    let seen = json!({
        "call": held.answers.len(), "method": call.method, "user": call.user, "params": typed(&call.raw_params),
    });
    held.answers.push(Some(answer));
    if let Some(sender) = &held.seen {
        drop(sender.send(seen));
    }
    async { answered.await.unwrap_or_else(|_| Err(CallError::new(Code::Cancelled, "the client is closed"))) }
}

/// Return credentials that give the next login each time.
fn login(logins: &[Json]) -> Result<Credentials, Failure> {
    let logins: Option<Vec<Value>> = logins.iter().map(untyped).collect();
    let logins = Mutex::new(logins.ok_or_else(|| malformed("login"))?.into_iter());
    Ok(Credentials::login(move || {
        let next = lock(&logins).next();
        async move { next.ok_or_else(|| "there are no further logins".into()) }
    }))
}

/// Return an error in the form of the kit.
fn describe(error: &Error) -> Json {
    let message = error.to_string();
    match error {
        Error::Call(CallError { code, message, details, .. }) => {
            let (number, name) = (code.number(), code.name());
            json!({"kind": "call", "code": number, "name": name, "message": message, "details": typed(details)})
        }
        Error::Closed(closed) => {
            json!({"kind": "closed", "clean": closed.clean, "code": closed.code.map(Code::number), "message": message})
        }
        Error::Protocol(fault) => {
            json!({"kind": "closed", "clean": false, "code": fault.code.number(), "message": message})
        }
        Error::CannotConnect { .. } => json!({"kind": "connect", "message": message}),
        Error::Tls(tls) => json!({"kind": "tls", "cause": cause(tls.failure), "message": message}),
        _ => json!({"kind": "argument", "message": message}),
    }
}

fn cause(failure: TlsFailure) -> &'static str {
    match failure {
        TlsFailure::CertificateUntrusted
        | TlsFailure::CertificateExpired
        | TlsFailure::CertificateNameMismatch
        | TlsFailure::CertificateRevoked => "certificate",
        TlsFailure::PinMismatch => "pin",
        TlsFailure::NoApplicationProtocol
        | TlsFailure::UnsupportedVersion
        | TlsFailure::NoSharedParameters
        | TlsFailure::WrongParameters
        | TlsFailure::NotTls => "protocol",
        TlsFailure::StsPolicy => "policy",
        _ => "other",
    }
}
