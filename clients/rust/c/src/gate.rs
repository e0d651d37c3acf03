//! Callbacks of the application: they have ended when the library says so, because their data may be freed then.

use crate::pointer::Data;
use std::ffi::{c_char, CString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use tokio::runtime::Handle;

/// Receives a text, which is valid during the call.
pub type Notice = Option<extern "C" fn(data: *mut std::ffi::c_void, text: *const c_char)>;

/// Lets callbacks run until it is closed.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<State>);

#[derive(Default)]
struct State {
    is_closed: AtomicBool,
    /// Held for reading while a callback runs.
    running: RwLock<()>,
}

impl Gate {
    /// Run a callback. Return `None` without running it after the end.
    pub(crate) fn run<T>(&self, callback: impl FnOnce() -> T) -> Option<T> {
        let _running = self.0.running.read().unwrap_or_else(PoisonError::into_inner);
        (!self.0.is_closed.load(Ordering::Acquire)).then(callback)
    }

    /// Run no more callbacks, and wait for those that run, except in a callback.
    pub(crate) fn close(&self) {
        self.0.is_closed.store(true, Ordering::Release);
        if Handle::try_current().is_err() {
            drop(self.0.running.write().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Return a function that passes a text to a callback.
    pub(crate) fn notice(&self, notice: Notice, data: Data) -> impl Fn(&str) + Send + Sync + 'static {
        let gate = self.clone();
        move |text| {
            let text = CString::new(text.replace('\0', "\\0")).unwrap_or_default();
            gate.run(|| notice.map(|notice| notice(data.get(), text.as_ptr())));
        }
    }
}
