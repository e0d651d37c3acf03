//! The threads of this library: they exist while a client does.

use crate::error::Failure;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};

const THREADS: usize = 2;
/// How long the last client waits for the threads to end.
const PATIENCE: Duration = Duration::from_secs(1);

static SHARED: Mutex<Weak<Shared>> = Mutex::new(Weak::new());

/// The runtime that all clients share.
pub(crate) struct Shared(Option<Runtime>);

impl Shared {
    /// Return the runtime; start it for the first client.
    pub(crate) fn get() -> Result<Arc<Self>, Failure> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = shared.upgrade() {
            return Ok(running);
        }
        let runtime = Builder::new_multi_thread().worker_threads(THREADS).thread_name("zcproto").enable_all().build();
        let runtime = runtime.map_err(|error| Failure::internal(&format!("cannot start threads: {error}")))?;
        let started = Arc::new(Self(Some(runtime)));
        *shared = Arc::downgrade(&started);
        Ok(started)
    }

    fn handle(&self) -> &Handle {
        self.0.as_ref().expect("the runtime lives as long as this").handle()
    }

    /// Wait for a future, unless this is a callback.
    pub(crate) fn wait<F: Future>(&self, future: F) -> Result<F::Output, Failure> {
        if Handle::try_current().is_ok() {
            return Err(Failure::argument("a function that waits was called in a callback"));
        }
        Ok(self.handle().block_on(future))
    }

    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.handle().spawn(future);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let Some(runtime) = self.0.take() else { return };
        if Handle::try_current().is_ok() {
            runtime.shutdown_background(); // in one of its own threads
        } else {
            runtime.shutdown_timeout(PATIENCE);
        }
    }
}
