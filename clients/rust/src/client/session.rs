//! Sessions as seen by their client.

use crate::codec::{self, Value};
use crate::error::{ProtocolError, Result};
use crate::secret::Token;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// The fraction of a session's life after which it is refreshed, plus jitter of at most a quarter of the rest.
const REFRESH_AT: f64 = 0.8;
/// How long after its first use a refresh token can be sent again: half of the server's default grace period.
const REFRESH_GRACE: Duration = Duration::from_secs(5);
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// An open session. Its tokens are hidden from `Debug`.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionInfo {
    /// Names the session in lists and logs; opens nothing.
    pub id: String,
    /// The user whose session it is.
    pub user: String,
    /// The time after which it is over, in milliseconds since the Unix epoch by the server's clock.
    pub expires_at: i64,
    /// It is over earlier if it is not used for this long, in milliseconds; 0 for never.
    pub idle_timeout_ms: u64,
    /// The time after which it cannot be refreshed any more.
    pub refresh_expires_at: Option<i64>,
    /// Whether it is bound to the key of a device or a certificate.
    pub bound: bool,
    token: Token,
}

impl SessionInfo {
    /// Return the token, for example for HTTP: `Authorization: Bearer` and its text.
    #[must_use]
    pub fn token(&self) -> &Token {
        &self.token
    }
}

impl fmt::Debug for SessionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionInfo")
            .field("id", &self.id)
            .field("user", &self.user)
            .field("expires_at", &self.expires_at)
            .field("bound", &self.bound)
            .finish_non_exhaustive()
    }
}

/// A session, with the times of this machine's monotonic clock.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) info: SessionInfo,
    refresh_token: Option<Token>,
    ends_at: Instant,
    pub(crate) usable_until: Instant,
    refresh_ends_at: Instant,
    /// When to refresh it.
    pub(crate) refresh_at: Instant,
}

impl Session {
    /// Make a session from the result of `session.open` or `session.refresh`. `server_wall` is the server's time, `jitter` is
    /// from 0 to 1.
    pub(crate) fn parse(body: &[u8], server_wall: i64, now: Instant, jitter: f64) -> Result<Self> {
        let parsed = codec::decode(body).ok().and_then(|result| {
            let text = |key: &str| result.get(key).and_then(Value::as_str).map(str::to_owned);
            let token = |key: &str| match result.get(key) {
                None | Some(Value::Nil) => Some(None),
                Some(value) => Some(Some(Token::new(<[u8; 32]>::try_from(value.as_bin()?).ok()?))),
            };
            let time = |key: &str| match result.get(key) {
                None | Some(Value::Nil) => Some(None),
                Some(value) => Some(Some(bounded(value.as_int()?))),
            };
            let info = SessionInfo {
                id: text("id")?,
                user: text("user")?,
                expires_at: time("expires_at")??,
                idle_timeout_ms: u64::try_from(time("idle_timeout_ms")??).unwrap_or(0),
                refresh_expires_at: time("refresh_expires_at")?,
                bound: result.get("bound")?.as_bool()?,
                token: token("token")?.filter(|token| !token.is_none())?,
            };
            Some((info, token("refresh_token")?))
        });
        let (info, refresh_token) =
            parsed.ok_or(ProtocolError::new("the server's answer to session.open is invalid"))?;
        let until = |time: i64| {
            let left = u64::try_from(time.saturating_sub(server_wall)).unwrap_or(0);
            Duration::from_millis(left).min(FOREVER)
        };
        let life = until(info.expires_at);
        let ends_at = now + life;
        let mut session = Self {
            ends_at,
            usable_until: ends_at,
            refresh_ends_at: now + info.refresh_expires_at.map_or(FOREVER, until),
            refresh_at: now + life.mul_f64(REFRESH_AT + (1.0 - REFRESH_AT) / 4.0 * jitter),
            refresh_token,
            info,
        };
        session.touch(now);
        Ok(session)
    }

    pub(crate) fn token(&self) -> &Token {
        &self.info.token
    }

    /// Record that the token was used, which restarts the idle timeout.
    pub(crate) fn touch(&mut self, now: Instant) {
        let idle = match self.info.idle_timeout_ms {
            0 => FOREVER,
            timeout => Duration::from_millis(timeout).min(FOREVER),
        };
        self.usable_until = self.ends_at.min(now + idle);
    }

    /// Record that the token has expired.
    pub(crate) fn expire(&mut self, now: Instant) {
        self.ends_at = now;
        self.usable_until = now;
    }

    /// Return the refresh token, if the session can be refreshed.
    pub(crate) fn refresh_token(&self, now: Instant) -> Option<&Token> {
        self.refresh_token.as_ref().filter(|_| now < self.refresh_ends_at)
    }

    /// Limit further uses of the refresh token to the grace, since the answer to one sent then was lost.
    pub(crate) fn refresh_lost(&mut self, sent_at: Instant) {
        self.refresh_ends_at = self.refresh_ends_at.min(sent_at + REFRESH_GRACE);
    }

    /// Forget a refresh token that may have been used: the server ends a session when one is used twice.
    pub(crate) fn drop_refresh_token(&mut self) {
        self.refresh_token = None;
    }
}

fn bounded(time: i128) -> i64 {
    i64::try_from(time).unwrap_or(if time < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALL: i64 = 1_767_225_600_000;

    fn result(changes: &[(&str, Value)]) -> Vec<u8> {
        let mut entries = vec![
            ("token", Value::Bin(vec![1; 32])),
            ("id", "s-1".into()),
            ("user", "ada".into()),
            ("expires_at", Value::Int(i128::from(WALL) + 100_000)),
            ("idle_timeout_ms", 10_000.into()),
            ("refresh_token", Value::Bin(vec![2; 32])),
            ("refresh_expires_at", Value::Int(i128::from(WALL) + 200_000)),
            ("bound", false.into()),
        ];
        for (key, value) in changes {
            entries.retain(|(name, _)| name != key);
            entries.push((key, value.clone()));
        }
        codec::encode(&Value::Map(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())).unwrap()
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_session_is_usable_until_its_idle_timeout_or_its_end() {
        let now = Instant::now();
        let mut session = Session::parse(&result(&[]), WALL, now, 0.0).unwrap();
        assert_eq!(session.usable_until, now + seconds(10));
        assert_eq!(session.refresh_at, now + seconds(80));
        session.touch(now + seconds(95));
        assert_eq!(session.usable_until, now + seconds(100));
        assert!(session.refresh_token(now + seconds(199)).is_some());
        assert!(session.refresh_token(now + seconds(200)).is_none());
        session.expire(now);
        session.touch(now + seconds(1));
        assert_eq!(session.usable_until, now);
    }

    #[test]
    fn repeated_loss_of_a_refresh_does_not_extend_the_grace() {
        let now = Instant::now();
        let mut session = Session::parse(&result(&[]), WALL, now, 0.0).unwrap();
        session.refresh_lost(now + seconds(80));
        session.refresh_lost(now + seconds(84));
        assert!(session.refresh_token(now + seconds(84)).is_some());
        assert!(session.refresh_token(now + seconds(85)).is_none());
    }

    #[test]
    fn jitter_spreads_refreshes_over_five_percent() {
        let now = Instant::now();
        let session = Session::parse(&result(&[]), WALL, now, 1.0).unwrap();
        assert_eq!(session.refresh_at, now + seconds(85));
    }

    #[test]
    fn an_invalid_result_is_a_protocol_error() {
        for (key, value) in [
            ("token", Value::Bin(vec![0; 32])),
            ("token", Value::Bin(vec![1; 31])),
            ("token", Value::Nil),
            ("id", 1.into()),
            ("expires_at", Value::Float(1.0)),
            ("bound", 1.into()),
            ("refresh_token", "text".into()),
            ("refresh_expires_at", "text".into()),
        ] {
            assert!(Session::parse(&result(&[(key, value)]), WALL, Instant::now(), 0.0).is_err(), "{key}");
        }
        let endless = result(&[("expires_at", Value::Int(1 << 63)), ("refresh_token", Value::Nil)]);
        assert!(Session::parse(&endless, WALL, Instant::now(), 0.0).is_ok());
    }

    #[test]
    fn debug_output_has_no_token() {
        let session = Session::parse(&result(&[]), WALL, Instant::now(), 0.0).unwrap();
        let shown = format!("{session:?}");
        assert!(shown.contains("s-1") && !shown.contains("1, 1") && !shown.contains("2, 2"), "{shown}");
    }
}
