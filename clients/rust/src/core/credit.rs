//! Counts the items of one direction of a stream against its credit (zcp1.md, section 18.5).
//!
//! - Credit is absolute: items and bytes since OPEN. An item may exceed the bytes that are left, and is then the last.
//! - The receiver grants for what the application has taken, never for what it has only stored.
//! - A receiver that holds nothing has granted at least one item and one byte more than it has received.

use crate::error::ProtocolError;
use crate::message::{Credit, decode_credit};

/// What the peer allows to send, and what was sent.
#[derive(Clone, Debug, Default)]
pub struct SendCredit {
    allowed: Credit,
    sent: Credit,
}

impl SendCredit {
    /// Begin with the credit of the peer.
    #[must_use]
    pub fn new(allowed: Credit) -> Self {
        Self { allowed, sent: [0, 0] }
    }

    /// Return whether an item can be sent.
    #[must_use]
    pub fn may_send(&self) -> bool {
        self.sent[0] < self.allowed[0] && self.sent[1] < self.allowed[1]
    }

    /// Count an item that is sent, by the `length` of its frame.
    pub fn count(&mut self, length: u64) {
        self.sent[0] += 1;
        self.sent[1] += length;
    }

    /// Apply the body of a CREDIT.
    ///
    /// # Errors
    ///
    /// If it is invalid, or lower than before.
    pub fn read(&mut self, body: &[u8]) -> Result<(), ProtocolError> {
        let credit = decode_credit(body).map_err(|_| ProtocolError::new("CREDIT is invalid"))?;
        if credit[0] < self.allowed[0] || credit[1] < self.allowed[1] {
            return Err(ProtocolError::new("credit is lower than before"));
        }
        self.allowed = credit;
        Ok(())
    }
}

/// The items that a peer has sent, and those that the application has taken.
#[derive(Clone, Debug)]
pub struct ReceiveCredit {
    window: Credit,
    granted: Credit,
    received: Credit,
    taken: Credit,
}

impl ReceiveCredit {
    /// Begin with a window, which is what to grant beyond what was taken. The peer can send `granted` at first; of that,
    /// `received` was received and taken before.
    #[must_use]
    pub fn new(window: Credit, granted: Credit, received: Credit) -> Self {
        Self { window, granted, received, taken: received }
    }

    /// Count an item by the `length` of its frame.
    ///
    /// # Errors
    ///
    /// If the credit did not allow it.
    pub fn receive(&mut self, length: u64) -> Result<(), ProtocolError> {
        if self.received[0] >= self.granted[0] || self.received[1] >= self.granted[1] {
            return Err(ProtocolError::new("ITEM beyond the credit"));
        }
        self.received[0] += 1;
        self.received[1] += length;
        Ok(())
    }

    /// Record that the application has taken an item. Return the credit to send, if half of the window is used.
    ///
    /// A peer without credit whose items were all taken has used all of it, so there is no deadlock.
    pub fn take(&mut self, length: u64) -> Option<Credit> {
        self.taken[0] += 1;
        self.taken[1] += length;
        let more =
            |index: usize| self.taken[index].saturating_add(self.window[index]).saturating_sub(self.granted[index]);
        let [items, bytes] = [more(0), more(1)];
        let is_due = items.saturating_mul(2) >= self.window[0] || bytes.saturating_mul(2) >= self.window[1];
        if (items == 0 && bytes == 0) || !is_due {
            return None;
        }
        self.granted = [self.granted[0] + items, self.granted[1] + bytes];
        Some(self.granted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_may_exceed_the_bytes_that_are_left_and_is_the_last() {
        let mut credit = SendCredit::new([10, 1]);
        assert!(credit.may_send());
        credit.count(5_000);
        assert!(!credit.may_send());
        let mut received = ReceiveCredit::new([10, 1], [10, 1], [0, 0]);
        assert!(received.receive(5_000).is_ok());
        assert!(received.receive(64).is_err());
    }

    #[test]
    fn credit_must_not_become_lower() {
        let mut credit = SendCredit::default();
        assert!(credit.read(&[0x92, 5, 100]).is_ok());
        assert!(credit.read(&[0x92, 5, 100]).is_ok());
        assert!(credit.read(&[0x92, 6, 99]).is_err());
        assert!(credit.read(&[0x93, 6, 100, 0]).is_err());
    }

    #[test]
    fn grants_when_half_of_the_window_was_taken_and_not_when_it_was_stored() {
        let mut credit = ReceiveCredit::new([4, 1_000], [4, 1_000], [0, 0]);
        for _ in 0..4 {
            credit.receive(65).unwrap();
        }
        assert!(credit.receive(65).is_err());
        assert_eq!(credit.take(65), None);
        assert_eq!(credit.take(65), Some([6, 1_130]));
        assert!(credit.receive(65).is_ok());
    }

    #[test]
    fn a_window_of_one_item_never_deadlocks() {
        let mut credit = ReceiveCredit::new([1, 1], [1, 1], [0, 0]);
        for count in 1..100 {
            credit.receive(1_000).unwrap();
            assert_eq!(credit.take(1_000).map(|granted| granted[0]), Some(count + 1));
        }
    }
}
