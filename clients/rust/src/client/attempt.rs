//! One attempt whose outcome several tasks await.

use crate::error::{Closed, Result};
use std::future::Future;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// A task in the background. Dropping it does not end the task.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    outcome: watch::Receiver<Option<Result<()>>>,
    task: AbortHandle,
}

impl Attempt {
    pub(crate) fn start(work: impl Future<Output = Result<()>> + Send + 'static) -> Self {
        let (sender, outcome) = watch::channel(None);
        let task = tokio::spawn(async move {
            let result = work.await;
            sender.send_replace(Some(result));
        });
        Self { outcome, task: task.abort_handle() }
    }

    /// Wait for the outcome.
    pub(crate) async fn wait(mut self) -> Result<()> {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Ok(())),
            Err(_) => Err(Closed::clean("this client is closed").into()),
        }
    }

    pub(crate) fn abort(&self) {
        self.task.abort();
    }
}
