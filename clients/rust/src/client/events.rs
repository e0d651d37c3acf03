//! Events of the server, queued for the application.

use crate::codec::Value;
use crate::message::decode_event;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use tokio::sync::Notify;

const MAX_EVENTS: usize = 1_000;
const MAX_EVENT_BYTES: usize = 4_194_304;

/// An event of the server, such as `session.expiring` or `pins.next`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ServerEvent {
    /// The name.
    pub name: String,
    /// What belongs to it.
    pub data: Value,
}

/// Events in order. At most 1,000 of together 4 MiB are queued; beyond that the oldest are dropped and counted. They are
/// decoded when they are read: values can take many times the memory.
#[derive(Debug, Default)]
pub(crate) struct EventQueue {
    state: Mutex<Queue>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    bodies: VecDeque<Vec<u8>>,
    size: usize,
    dropped: u64,
    is_closed: bool,
}

impl EventQueue {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Add the body of an EVENT.
    pub(crate) fn put(&self, body: Vec<u8>) {
        let mut queue = self.lock();
        queue.size += body.len();
        while queue.bodies.len() >= MAX_EVENTS || (queue.size > MAX_EVENT_BYTES && !queue.bodies.is_empty()) {
            queue.size -= queue.bodies.pop_front().map_or(0, |body| body.len());
            queue.dropped += 1;
        }
        queue.bodies.push_back(body);
        drop(queue);
        self.changed.notify_one();
    }

    /// End the queue. What waits can still be read.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_waiters();
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Wait for the next event. Return `None` after the end.
    pub(crate) async fn next(&self) -> Option<ServerEvent> {
        loop {
            let changed = self.changed.notified();
            {
                let mut queue = self.lock();
                if let Some(body) = queue.bodies.pop_front() {
                    queue.size -= body.len();
                    if !queue.bodies.is_empty() {
                        self.changed.notify_one(); // for another reader
                    }
                    drop(queue);
                    match decode_event(&body, crate::codec::MAX_DEPTH) {
                        Ok((name, data)) => return Some(ServerEvent { name, data }),
                        Err(_) => continue, // the conversation has refused these
                    }
                }
                if queue.is_closed {
                    return None;
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, size: usize) -> Vec<u8> {
        let mut body = Vec::new();
        crate::codec::write_array(&mut body, 2);
        crate::codec::write_str(&mut body, name);
        crate::codec::write_bin(&mut body, &vec![0; size]);
        body
    }

    #[tokio::test]
    async fn the_oldest_events_are_dropped_by_number_and_by_size() {
        let queue = EventQueue::default();
        for index in 0..1_005 {
            queue.put(event(&format!("e{index}"), 0));
        }
        assert_eq!(queue.dropped(), 5);
        assert_eq!(queue.next().await.unwrap().name, "e5");
        queue.put(event("large", 5 << 20)); // alone it is kept
        assert_eq!(queue.next().await.unwrap().name, "large");
    }

    #[tokio::test]
    async fn queued_events_can_be_read_after_the_end() {
        let queue = EventQueue::default();
        queue.put(event("last", 0));
        queue.close();
        assert_eq!(queue.next().await.unwrap().name, "last");
        assert_eq!(queue.next().await, None);
    }
}
