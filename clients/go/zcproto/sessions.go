package zcproto

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const (
	// Timeout of requests of session.*.
	requestTimeout = 10 * time.Second
	// Timeout of session.close.
	closeTimeout = 2 * time.Second
	// How long a refresh token can be sent again after a lost answer: half of the server's default grace.
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
// answer. A refresh token works once; if the answer was lost, it can be sent again for a few seconds and never after that. The
// server cannot cause a storm of requests: early refreshes have a minimum interval, a session that has already expired is
// renewed with growing delays, and one session.revoked for each token and connection is checked.
type sessions struct {
	mu            *sync.Mutex // of the client
	clock         clock
	random        func() float64
	getConnection func(ctx context.Context) (*connection, error)
	credentials   Credentials // nil without
	clientName    string
	handlers      *handlers

	session     *openSession // nil without
	token       wire.Token
	usableUntil time.Duration // calls can be sent until then; after that, waitUntilUsable

	isRequired        bool
	unknownToken      wire.Token // was refused with UNAUTHENTICATED
	endedBy           *Error
	renewing          *task
	previousToken     wire.Token  // before the last refresh
	attachedTo        *connection // where the session of a device was attached last
	attaching         *attachment
	timer             timer // of the next refresh
	refreshedEarlyAt  time.Duration
	notBefore         time.Duration // of the next renewal
	backoff           *backoff      // of sessions that expire at once
	checkedRevocation revocation
	keepTimer         timer // of a session with handlers
	keepInterval      time.Duration
	closing           context.Context
	cancel            context.CancelCauseFunc
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
	if s.session != nil && s.token == s.unknownToken {
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
		return "the server opens only expired sessions; report it to its operator"
	}
	if login, ok := s.credentials.(*schemeLogin); ok && login.isFetching {
		return "the function of LoginWith has not returned"
	}
	return ""
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

// reopen handles a token that belongs to another certificate. It returns false for credentials without one.
func (s *sessions) reopen(token wire.Token) bool {
	if s.credentials == nil || !s.credentials.canReopen() {
		return false
	}
	if token == s.token && s.session != nil {
		s.session.dropRefreshToken()
		s.expired(token)
	}
	return true
}

// unknown handles UNAUTHENTICATED for a token. It stays in use until the application asks for a session.
func (s *sessions) unknown(token wire.Token) { s.unknownToken = token }

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

// --- new connections and events ------------------------------------------------------------------------------------------

// present shows the token on a new connection that is ready, so that events and calls of the session arrive there, and attaches a
// session that is bound to a device. The request is small: a large one is refused on a connection without a session. It does not
// release the mutex; the function that it returns waits for the answer and does; then flush.
func (s *sessions) present(c *connection) (await func()) {
	if s.session == nil || !c.ready() {
		return func() {}
	}
	token := s.token
	refused := func(err error) {
		var refused *Error
		if errors.As(err, &refused) {
			s.refused(token, refused)
		} // otherwise the connection has ended, and the next one gets the token
	}
	if s.needsAttach(c) {
		attaching, err := s.beginAttach(c, token)
		return func() {
			if err == nil {
				err = attaching.await(s.closing, s.mu)
			}
			if err == nil {
				err = s.registerIfAny(c)
			}
			refused(err)
		}
	}
	var call *pendingCall
	var err error
	if s.canRegister(c) {
		call, err = s.beginRegister(c)
	} else {
		call, err = c.request("session.info", nil, token, wire.Meta{}, s.clock.now()+requestTimeout)
	}
	return func() {
		if err == nil {
			err = c.await(s.closing, call, nil)
		}
		refused(err)
	}
}

// presentWhenReady waits for a free request, and for the answer. It releases the mutex meanwhile.
func (s *sessions) presentWhenReady(c *connection) {
	if s.renewing == nil && c.waitReady(s.closing) == nil {
		await := s.present(c)
		c.flush()
		await()
	}
}

func (s *sessions) needsAttach(c *connection) bool {
	return s.session != nil && s.session.info.Bound && s.device() != nil && s.attachedTo != c
}

func (s *sessions) device() *deviceKey {
	device, _ := s.credentials.(*deviceKey)
	return device
}

// beginRegister lets the server call the application's handlers in the session, on a connection that is ready.
func (s *sessions) beginRegister(c *connection) (*pendingCall, error) {
	now := s.clock.now()
	s.touch(now)
	s.keep()
	return c.register(s.token, s.handlers.methods(), s.handlers.most, now+requestTimeout)
}

func (s *sessions) registerIfAny(c *connection) error {
	if !s.canRegister(c) {
		return nil
	}
	if err := c.waitReady(s.closing); err != nil || !c.ready() || !s.canRegister(c) {
		return err
	}
	call, err := s.beginRegister(c)
	if err == nil {
		err = c.await(s.closing, call, nil)
	}
	return err
}

func (s *sessions) canRegister(c *connection) bool {
	return s.session != nil && s.handlers.any() && c.conv.Welcome().Calls != nil
}

// beginAttach proves the key of a session on a connection that is ready. Concurrent callers share one request. It does not
// release the mutex.
func (s *sessions) beginAttach(c *connection, token wire.Token) (*attachment, error) {
	if current := s.attaching; current != nil && current.token == token && current.to == c {
		return current, nil
	}
	params, err := s.device().attachParams(c.channel(), token)
	if err != nil {
		return nil, err
	}
	call, err := c.request("session.attach", params, token, wire.Meta{}, s.clock.now()+requestTimeout)
	if err != nil {
		return nil, err
	}
	attaching := &attachment{task: task{done: make(chan struct{})}, token: token, to: c}
	s.attaching, s.attachedTo = attaching, nil
	s.inBackground(func() {
		if attaching.err = c.await(s.closing, call, nil); attaching.err == nil {
			s.attachedTo = c
		}
		if s.attaching == attaching {
			s.attaching = nil
		}
		close(attaching.done)
	})
	return attaching, nil
}

// attachFor attaches the session for a call that was refused, if token and connection are still in use. It returns false
// without a device.
func (s *sessions) attachFor(ctx context.Context, c *connection, token wire.Token) (bool, error) {
	if s.device() == nil {
		return false, nil
	}
	if token != s.token || !c.ready() {
		return true, nil
	}
	attaching, err := s.beginAttach(c, token)
	if err == nil {
		err = attaching.await(ctx, s.mu)
	}
	if isClosed(err) {
		return true, nil
	}
	return true, err
}

// refused handles the error of a request that only shows the token.
func (s *sessions) refused(token wire.Token, err *Error) {
	switch {
	case whatNext(err) == reopen:
		s.reopen(token)
	case err.Code == Unauthenticated:
		s.unknown(token)
	case err.Code == TokenExpired:
		s.expired(token)
	case endsSession(err.Code):
		s.revoked(token, err)
	}
}

// eventReceived handles an event of the session. It does not release the mutex.
func (s *sessions) eventReceived(name string, token wire.Token, c *connection) {
	if token != s.token || s.session == nil {
		return
	}
	switch name {
	case "session.revoked":
		s.handlers.cancelAll(&Error{Code: Cancelled, Message: "the session has ended"})
		if c != nil && s.checkedRevocation != (revocation{c.conv.Salt(), token}) {
			s.checkedRevocation = revocation{c.conv.Salt(), token}
			s.inBackground(func() {
				if s.renewing != nil {
					_ = s.renewing.await(s.closing, s.mu)
				}
				if s.token == token {
					s.presentWhenReady(c) // the answer has the code: revoked or replaced
				}
			})
		}
	case "session.expiring":
		s.refreshEarly()
	}
}

// inBackground runs a step in a goroutine, with the mutex.
func (s *sessions) inBackground(step func()) {
	go func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		step()
	}()
}

// --- keeping a session that only waits for calls of the server ------------------------------------------------------------

// keep shows the session again before its idle timeout, and renews it after it has expired, while there are handlers.
func (s *sessions) keep() {
	if s.keepTimer != nil {
		s.keepTimer.Stop()
	}
	if s.session == nil || !s.handlers.any() || s.closing.Err() != nil {
		return
	}
	kept := s.session
	left := kept.usableUntil - s.clock.now()
	if left > 0 {
		s.keepInterval = minRefreshInterval
	}
	s.keepTimer = s.clock.afterFunc(max(left/2, s.keepInterval), func() {
		s.inBackground(func() {
			if s.session == kept && s.closing.Err() == nil {
				s.keepNow(kept)
			}
		})
	})
}

func (s *sessions) keepNow(kept *openSession) {
	left := kept.usableUntil - s.clock.now()
	switch {
	case left <= 0:
		s.keepInterval = min(s.keepInterval*2, maxKeepInterval)
		if s.renewing == nil {
			s.start(true)
		}
	case kept.idle != forever && left < kept.idle/2:
		if c, err := s.getConnection(s.closing); err == nil {
			s.touch(s.clock.now())
			s.presentWhenReady(c)
		}
		s.keep()
	default:
		s.keep() // it was used meanwhile
	}
}

// --- opening and refreshing ----------------------------------------------------------------------------------------------

func (s *sessions) refreshEarly() {
	now := s.clock.now()
	if s.session == nil || s.renewing != nil || !s.session.canRefresh(now) || s.closing.Err() != nil {
		return
	}
	if allowedAt := s.refreshedEarlyAt + minRefreshInterval; now < allowedAt {
		s.setTimer(allowedAt)
		return
	}
	s.refreshedEarlyAt = now
	s.start(false)
}

func (s *sessions) start(must bool) {
	renewing := &task{done: make(chan struct{})}
	s.renewing = renewing
	s.updateUsableUntil()
	s.inBackground(func() {
		renewing.err = s.renew(must)
		s.renewing = nil
		s.updateUsableUntil()
		s.keep()
		close(renewing.done)
	})
}

// renewal is one attempt to get a token. Unless it must succeed, because the old token still works, it gives up at the first
// error.
type renewal struct {
	must    bool
	backoff *backoff
	done    [attach + 1]bool
	lost    int
}

func (s *sessions) renew(must bool) error {
	if delay := s.notBefore - s.clock.now(); s.notBefore != never && delay > 0 {
		if err := s.pause(delay); err != nil {
			return err
		}
	}
	renewal := &renewal{must: must, backoff: newBackoff(s.random)}
	for {
		c, err := s.getConnection(s.closing)
		if err != nil {
			return err
		}
		if login := s.loginToFetch(); login != nil {
			if err := login.fetch(s.closing, s.mu, s.clock); err != nil {
				return err
			}
			continue // with the connection that is current now
		}
		if err := c.waitReady(s.closing); err != nil {
			return err
		}
		if !c.ready() || s.loginToFetch() != nil {
			continue
		}
		method, params, err := s.nextRequest(c)
		if err != nil {
			return err
		}
		sentAt := s.clock.now()
		call, err := c.request(method, params, s.token, wire.Meta{}, sentAt+requestTimeout)
		if err == nil {
			// The token is replaced at once: what the server has sent behind its answer belongs to the new one.
			call.onResponse = func(body []byte) error { return s.adopt(body, c, method) }
			err = c.await(s.closing, call, nil)
		}
		var refused *Error
		switch {
		case err == nil:
			if s.needsAttach(c) && method == "session.refresh" {
				s.inBackground(func() {
					if s.renewing != nil {
						_ = s.renewing.await(s.closing, s.mu)
					}
					s.presentWhenReady(c)
				})
			} else if method == "session.open" && s.canRegister(c) {
				s.inBackground(func() { _ = s.registerIfAny(c) }) // the next connection registers them, if this one fails
			}
			return nil
		case s.closing.Err() != nil:
			return err
		case isClosed(err):
			if renewal.lost++; renewal.lost > maxLost {
				return err
			}
			renewal.must = renewal.must || method == "session.refresh" // the old token may be dead
			if s.session != nil && s.clock.now()-sentAt > refreshGrace {
				s.session.dropRefreshToken()
			}
		case errors.As(err, &refused) && refused.Code != ProtocolError:
			again, err := s.afterRefusal(refused, method, c, renewal)
			if !again {
				return err
			}
		default:
			return err
		}
	}
}

// afterRefusal returns whether to try again. Without an error, the old token still works.
func (s *sessions) afterRefusal(err *Error, method string, c *connection, renewal *renewal) (bool, error) {
	step := whatNext(err)
	isFirst := !renewal.done[step]
	renewal.done[step] = true
	switch {
	case step == later && renewal.must:
		if err := s.pause(renewal.backoff.next(retryAfter(err.Details))); err != nil {
			return false, err
		}
		return true, nil
	case step == atOnce && isFirst:
		return true, nil
	case step == attach && isFirst:
		_, _ = s.attachFor(s.closing, c, s.token) // the next answer reports its error, too
		return true, nil
	case method == "session.refresh" && s.opensInstead(err):
		renewal.must = true
		return true, nil
	case !renewal.must && !endsSession(err.Code):
		s.setTimer(s.nextRefreshAttempt())
		return false, nil
	}
	if refusesRenewal(err.Code) {
		s.endSession(err)
	}
	return false, err
}

// pause waits without the mutex.
func (s *sessions) pause(delay time.Duration) error {
	s.mu.Unlock()
	defer s.mu.Lock()
	if sleep(s.closing, s.clock, delay) != nil {
		return contextError(s.closing)
	}
	return nil
}

// loginToFetch returns the login that must be fetched before the next request; nil if it needs none.
func (s *sessions) loginToFetch() *schemeLogin {
	login, ok := s.credentials.(*schemeLogin)
	now := s.clock.now()
	if !ok || login.isFetched(now) || s.session != nil && s.session.canRefresh(now) {
		return nil
	}
	return login
}

func (s *sessions) nextRequest(c *connection) (string, map[string]any, error) {
	if s.session != nil && s.session.canRefresh(s.clock.now()) {
		return "session.refresh", map[string]any{"refresh_token": s.session.refreshToken, "client": s.clientName}, nil
	}
	params, err := s.credentials.params(c.channel())
	if err != nil {
		return "", nil, err
	}
	params["client"] = s.clientName
	return "session.open", params, nil
}

// opensInstead returns whether to open a session, because the refresh token has expired, may be spent, or belongs to the
// previous certificate.
func (s *sessions) opensInstead(err *Error) bool {
	isOtherCertificate := whatNext(err) == reopen && s.credentials.canReopen()
	if err.Code != TokenExpired && !mayHaveRun(err.Code) && !isOtherCertificate {
		return false
	}
	if s.session != nil {
		s.session.dropRefreshToken()
	}
	return true
}

// nextRefreshAttempt returns when to retry an early refresh: after a quarter to a half of the remaining time.
func (s *sessions) nextRefreshAttempt() time.Duration {
	now := s.clock.now()
	left := 0.0
	if s.session != nil {
		left = float64(max(0, s.session.usableUntil-now))
	}
	return addTime(now, max(time.Duration(left*(0.25+s.random()/4)), minRefreshInterval))
}

// adopt uses the result of session.open or session.refresh. It does not release the mutex.
func (s *sessions) adopt(body []byte, c *connection, method string) error {
	now := s.clock.now()
	session, err := parseSession(body, s.clock.wall()+c.conv.ClockOffset(), now, s.random())
	if err != nil {
		return err
	}
	old := s.token
	if s.session != nil {
		s.session.dropRefreshToken() // spent
	}
	s.session, s.token = session, session.token
	if method == "session.refresh" {
		s.previousToken = old
	} else {
		c.conv.SessionEnded(old)
		s.attachedTo = c
	}
	if session.canRefresh(now) {
		s.setTimer(session.refreshAt)
	} else if s.timer != nil {
		s.timer.Stop()
	}
	if session.usableUntil-now < minRefreshInterval {
		s.notBefore = now + minRefreshInterval + s.backoff.next(0)
	} else {
		s.backoff.reset()
	}
	return nil
}

func (s *sessions) setTimer(at time.Duration) {
	if s.timer != nil {
		s.timer.Stop()
	}
	if at != forever && s.closing.Err() == nil {
		s.timer = s.clock.afterFunc(at-s.clock.now(), func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.refreshEarly()
		})
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
