package zcproto

import (
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// SessionInfo describes an open session. It contains no secret.
type SessionInfo struct {
	// ID names the session in lists and logs; it opens nothing.
	ID string
	// User is whose session it is.
	User string
	// ExpiresAt is when it is over, by the server's clock.
	ExpiresAt time.Time
	// IdleTimeout is how long it may be unused; 0 for ever.
	IdleTimeout time.Duration
	// RefreshExpiresAt is when it can no longer be refreshed; the zero time if there is no limit, or it cannot be refreshed.
	RefreshExpiresAt time.Time
	// Bound is whether its token is bound to the key of a device or of a certificate.
	Bound bool
}

// When a session is refreshed: after this part of its life, and jitter of at most a quarter of the rest.
const refreshAt = 0.8

// openSession is the session of a client. Times are monotonic.
type openSession struct {
	info          SessionInfo
	token         wire.Token
	refreshToken  []byte // nil if it cannot be refreshed, or is spent
	endsAt        time.Duration
	idle          time.Duration
	usableUntil   time.Duration
	refreshEndsAt time.Duration
	refreshAt     time.Duration
}

// parseSession reads the result of session.open or session.refresh. serverWall is the server's time, jitter is from 0 to 1.
func parseSession(body []byte, serverWall int64, now time.Duration, jitter float64) (*openSession, error) {
	invalid := &Error{Code: ProtocolError, Message: "the server's response to session.open is invalid"}
	var result struct {
		Token            []byte  `msgpack:"token"`
		ID               *string `msgpack:"id"`
		User             *string `msgpack:"user"`
		ExpiresAt        any     `msgpack:"expires_at"`
		IdleTimeout      any     `msgpack:"idle_timeout_ms"`
		RefreshToken     []byte  `msgpack:"refresh_token"`
		RefreshExpiresAt any     `msgpack:"refresh_expires_at"`
		Bound            *bool   `msgpack:"bound"`
	}
	if err := msgpack.Unmarshal(body, &result, msgpack.MaxDepth); err != nil {
		return nil, invalid
	}
	expiresAt, hasExpiry := milliseconds(result.ExpiresAt)
	idle, hasIdle := milliseconds(result.IdleTimeout)
	refreshExpiresAt, hasRefreshExpiry := milliseconds(result.RefreshExpiresAt)
	if len(result.Token) != wire.TokenSize || wire.Token(result.Token) == (wire.Token{}) ||
		result.ID == nil || result.User == nil || result.Bound == nil || !hasExpiry || !hasIdle ||
		result.RefreshToken != nil && len(result.RefreshToken) != wire.TokenSize ||
		result.RefreshExpiresAt != nil && !hasRefreshExpiry {
		return nil, invalid
	}
	life := wire.Milliseconds(uint64(max(0, expiresAt-serverWall)))
	session := &openSession{
		info: SessionInfo{
			ID: *result.ID, User: *result.User, ExpiresAt: time.UnixMilli(expiresAt),
			IdleTimeout: wire.Milliseconds(uint64(max(0, idle))), Bound: *result.Bound,
		},
		token:         wire.Token(result.Token),
		refreshToken:  result.RefreshToken,
		endsAt:        addTime(now, life),
		idle:          forever,
		refreshEndsAt: forever,
		refreshAt:     addTime(now, time.Duration(float64(life)*(refreshAt+(1-refreshAt)/4*jitter))),
	}
	if idle > 0 {
		session.idle = session.info.IdleTimeout
	}
	if hasRefreshExpiry {
		session.info.RefreshExpiresAt = time.UnixMilli(refreshExpiresAt)
		session.refreshEndsAt = addTime(now, wire.Milliseconds(uint64(max(0, refreshExpiresAt-serverWall))))
	}
	session.touch(now)
	return session, nil
}

// milliseconds returns a time or a delay of the server, of which some may be very large.
func milliseconds(value any) (int64, bool) {
	const most = 1 << 61 // so that differences cannot overflow
	switch value := value.(type) {
	case int64:
		return max(-most, min(value, most)), true
	case uint64:
		return most, true
	}
	return 0, false
}

// addTime returns a time that is d later, or forever.
func addTime(at, d time.Duration) time.Duration {
	if d > forever-max(at, 0) {
		return forever
	}
	return at + d
}

// touch records that the token was used, which restarts the idle timeout.
func (s *openSession) touch(now time.Duration) { s.usableUntil = min(s.endsAt, addTime(now, s.idle)) }

// expire marks the token as expired.
func (s *openSession) expire() { s.endsAt, s.usableUntil = never, never }

func (s *openSession) canRefresh(now time.Duration) bool {
	return s.refreshToken != nil && now < s.refreshEndsAt
}

// refreshLost limits further uses of the refresh token to the grace, because the answer to one that was sent then was lost.
func (s *openSession) refreshLost(sentAt time.Duration) {
	s.refreshEndsAt = min(s.refreshEndsAt, addTime(sentAt, refreshGrace))
}

// dropRefreshToken forgets a refresh token that may be spent: a second use would end the session.
func (s *openSession) dropRefreshToken() {
	clear(s.refreshToken)
	s.refreshToken = nil
}

// never is a time that has passed.
const never = time.Duration(-1 << 62)
