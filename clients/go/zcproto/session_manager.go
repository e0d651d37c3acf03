package zcproto

import (
	"context"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const (
	// Timeout of requests of session.*.
	requestTimeout = 10 * time.Second
	// Timeout of session.close.
	closeTimeout = 2 * time.Second
	// How long after its first use a refresh token can be sent again: half of the server's default grace.
	refreshGrace = 5 * time.Second
	// Lost answers to session.open in a row. Each may have left a session that counts against the limit.
	maxLost = 3
	// Minimum interval between early refreshes, and from a session that is usable for less than that to the next one.
	minRefreshInterval = time.Second
	// Maximum interval between two attempts to renew a session that only waits for calls of the server.
	maxKeepInterval = 30 * time.Second
)

// sessions manages the session of one user.
//
// It decides when to open, refresh and attach a session, and when it has ended. After TOKEN_REVOKED, SESSION_REPLACED or a
// refused session.open, every call gets that error until the application asks for a session again. It does not know the calls
// that use the token.
//
// All waiting calls share one attempt. No call is sent during a refresh, because the server revokes the old token with its
// answer. A refresh token works once; if the answer was lost, it can be sent again for a few seconds after the first attempt and
// never later: repetitions do not extend the server's grace. The server cannot cause a storm of requests: early refreshes have a
// minimum interval, a session that has already expired is renewed with growing delays, and one session.revoked for each token
// and connection is checked.
type sessions struct {
	mu          *sync.Mutex // of the client
	clock       clock
	random      func() float64
	connections *connections
	credentials Credentials // nil without
	clientName  string
	handlers    *handlers

	session     *openSession // nil without
	token       wire.Token
	usableUntil time.Duration // calls can be sent until then; after that, waitUntilUsable

	isRequired        bool
	refusedToken      wire.Token // was refused with UNAUTHENTICATED
	endedBy           *Error
	renewing          *task
	previousToken     wire.Token // before the last refresh
	presences         map[*connection]*presence
	attaching         *attachment
	timer             timer // of the next refresh
	refreshedEarlyAt  time.Duration
	notBefore         time.Duration // of the next renewal
	delayedBecause    string
	backoff           *backoff // of sessions that expire at once
	reopenings        *backoff // of sessions that replace unknown ones
	openedAt          time.Duration
	checkedRevocation revocation
	keepTimer         timer // of a session with handlers
	keepInterval      time.Duration
	closing           context.Context
	cancel            context.CancelCauseFunc
}

// presence is what a connection has of the session that was opened last.
type presence struct {
	isAttached   bool  // with the key of its device
	isRegistered bool  // the handlers are
	preparing    *task // they are being registered, and other requests wait for it; nil if they need not
}

type attachment struct {
	task
	token wire.Token
	to    *connection
}

type revocation struct {
	salt  uint64
	token wire.Token
}

func newSessions(mu *sync.Mutex, clock clock, random func() float64, credentials Credentials, clientName string) *sessions {
	s := &sessions{
		mu: mu, clock: clock, random: random, credentials: credentials, clientName: clientName,
		usableUntil: forever, refreshedEarlyAt: never, notBefore: never, backoff: newBackoff(random),
		reopenings: newBackoff(random), openedAt: never, presences: map[*connection]*presence{},
		keepInterval: minRefreshInterval,
	}
	s.closing, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// hasEnded returns whether the session was revoked, replaced or refused: it needs no connection.
func (s *sessions) hasEnded() bool { return s.endedBy != nil }

// ownsToken returns whether this is the token of the session, or was its last one.
func (s *sessions) ownsToken(token wire.Token) bool {
	return token != wire.Token{} && (token == s.token || token == s.previousToken)
}

// require makes calls wait for a session, and forgets one that has ended or was refused.
func (s *sessions) require() error {
	if s.credentials == nil {
		return &Error{Code: Unauthenticated, Message: "this client has no credentials; give Credentials or a Certificate to Dial"}
	}
	s.isRequired = true
	s.endedBy = nil
	if s.session != nil && s.token == s.refusedToken {
		s.session = nil
		s.token = wire.Token{}
	}
	s.updateUsableUntil()
	return nil
}

// waitUntilUsable waits until calls can be sent: with a valid session, or without one if none is required. It returns the
// error that ended the session or prevented it. It releases the mutex meanwhile.
func (s *sessions) waitUntilUsable(ctx context.Context) error {
	for {
		if s.endedBy != nil {
			return s.endedBy
		}
		if s.renewing == nil {
			if s.clock.now() < s.usableUntil {
				return nil
			}
			s.start(true)
		}
		if err := s.renewing.await(ctx, s.mu); err != nil {
			return err
		}
	}
}

// problem returns why the renewal takes its time, or "".
func (s *sessions) problem() string {
	if s.clock.now() < s.notBefore {
		return s.delayedBecause
	}
	if login, ok := s.credentials.(*schemeLogin); ok && login.isFetching {
		return "the function of LoginWith has not returned"
	}
	return ""
}

func (s *sessions) delayRenewal(until time.Duration, reason string) {
	if until > s.notBefore {
		s.notBefore, s.delayedBecause = until, reason
	}
}

// touch records that a call uses the token now.
func (s *sessions) touch(now time.Duration) {
	if s.session != nil && s.session.idle != forever && s.renewing == nil && s.endedBy == nil {
		s.session.touch(now)
		s.usableUntil = s.session.usableUntil
	}
}

// expired handles TOKEN_EXPIRED for a token.
func (s *sessions) expired(token wire.Token) {
	if token == s.token && s.session != nil {
		s.session.expire()
		s.updateUsableUntil()
	}
}

// reopen handles a token that belongs to another certificate, or that the server does not know: the refresh token is of no use
// then. A store that has lost its sessions gets the logins of all clients, so these wait for a random time.
func (s *sessions) reopen(token wire.Token, err *Error) {
	if token != s.token || s.session == nil {
		return
	}
	if isUnknownToken(err) && s.session.endsAt != never { // otherwise another call has delayed it
		s.delayReopening()
	}
	s.session.dropRefreshToken()
	s.expired(token)
}

func (s *sessions) delayReopening() {
	now := s.clock.now()
	if now-s.openedAt >= stableAfter {
		s.reopenings.reset()
	}
	s.delayRenewal(now+s.reopenings.next(0), "the server has lost its sessions; report it to its operator")
}

// revoked handles TOKEN_REVOKED or SESSION_REPLACED for a token.
func (s *sessions) revoked(token wire.Token, err *Error) {
	if token == s.token {
		s.endSession(err)
	}
}

func (s *sessions) endSession(err *Error) {
	s.endedBy = err
	s.session = nil
	s.previousToken = s.token
	s.token = wire.Token{}
	s.handlers.cancelAll(err)
	s.stopTimers()
	s.updateUsableUntil()
}

func (s *sessions) stopTimers() {
	for _, timer := range []timer{s.timer, s.keepTimer} {
		if timer != nil {
			timer.Stop()
		}
	}
}

func (s *sessions) updateUsableUntil() {
	switch {
	case s.endedBy != nil || s.renewing != nil:
		s.usableUntil = never
	case s.session != nil:
		s.usableUntil = s.session.usableUntil
	case s.isRequired:
		s.usableUntil = never
	default:
		s.usableUntil = forever
	}
}

// --- the end -------------------------------------------------------------------------------------------------------------

// close closes the session on the server if it is connected, because the sessions of a user are limited. It releases the mutex
// meanwhile.
func (s *sessions) close(c *connection) {
	s.cancel(errClientClosed())
	if s.renewing != nil {
		_ = s.renewing.await(context.Background(), s.mu) // its waiters get the error
	}
	s.stopTimers()
	if s.session == nil || c == nil || !c.ready() {
		return
	}
	token := s.token
	s.session = nil
	s.previousToken = token
	call, err := c.request("session.close", nil, token, wire.Meta{}, s.clock.now()+closeTimeout)
	if err == nil {
		_ = c.await(context.Background(), call, nil) // otherwise the session expires on the server
	}
	c.conv.SessionEnded(token)
}
