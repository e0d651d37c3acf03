package zcproto

import (
	"context"
	"errors"
	"maps"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// How a session is shown on connections, so that the server sends its events and calls there.

// on returns what a connection has of the session.
func (s *sessions) on(c *connection) *presence {
	found := s.presences[c]
	if found == nil {
		maps.DeleteFunc(s.presences, func(c *connection, _ *presence) bool { return c.failure != nil })
		found = &presence{}
		s.presences[c] = found
	}
	return found
}

// preparing returns what other requests of the session wait for on a connection; nil if they need not.
func (s *sessions) preparing(c *connection) *task {
	if found := s.presences[c]; found != nil {
		return found.preparing
	}
	return nil
}

// present shows the token on a connection, so that events and calls of the session arrive there: at once if it is ready, otherwise
// when it is. A session that is bound to a device is attached. Handlers are registered before other requests of the session are
// sent there: methods call back where they were called. The request is small: a large one is refused on a connection without a
// session. It does not release the mutex; the function that it returns waits for the answers and does.
func (s *sessions) present(c *connection) (await func()) {
	if s.session == nil || !c.isOpen() {
		return func() {}
	}
	prepared := func() {}
	if !c.ready() || s.needsAttach(c) {
		prepared = s.prepare(c)
	}
	var answered func()
	if c.ready() {
		answered = s.show(c)
	}
	return func() {
		if answered == nil && s.connections.waitReady(s.closing, c) == nil && s.session != nil && s.renewing == nil && c.ready() {
			answered = s.show(c)
		}
		if answered != nil {
			answered()
		}
		prepared()
	}
}

// prepare holds other requests of the session back on a connection that lacks the handlers, until the function that it returns.
func (s *sessions) prepare(c *connection) (prepared func()) {
	on := s.on(c)
	if !s.lacksHandlers(c) || on.preparing != nil {
		return func() {}
	}
	preparing := &task{done: make(chan struct{})}
	on.preparing = preparing
	return func() {
		on.preparing = nil
		close(preparing.done)
	}
}

func (s *sessions) show(c *connection) (answered func()) {
	token := s.token
	refused := func(err error) {
		var refused *Error
		if errors.As(err, &refused) {
			s.shownRefused(token, refused)
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

// presentAfterRenewal shows the token in the background, once no renewal runs.
func (s *sessions) presentAfterRenewal(c *connection) {
	prepared := s.prepare(c)
	inBackground(s.mu, func() {
		if s.renewing != nil {
			_ = s.renewing.await(s.closing, s.mu)
		}
		s.present(c)()
		prepared()
	})
}

func (s *sessions) needsAttach(c *connection) bool {
	return s.session != nil && s.session.info.Bound && s.device() != nil && !s.on(c).isAttached
}

func (s *sessions) device() *deviceKey {
	device, _ := s.credentials.(*deviceKey)
	return device
}

// beginRegister lets the server call the application's handlers in the session, on a connection that is ready.
func (s *sessions) beginRegister(c *connection) (*pendingCall, error) {
	now := s.clock.now()
	s.touch(now)
	return s.sendRegistration(c, s.token, now+requestTimeout)
}

func (s *sessions) sendRegistration(c *connection, token wire.Token, deadline time.Duration) (*pendingCall, error) {
	s.keep()
	call, err := c.register(token, s.handlers.methods(), s.handlers.most, deadline)
	if err == nil {
		on := s.on(c)
		call.onResponse = func([]byte) error {
			on.isRegistered = true
			return nil
		}
	}
	return call, err
}

// registerBeside registers the handlers on all connections but one.
func (s *sessions) registerBeside(c *connection) {
	for _, other := range s.connections.all {
		if other != c && other.isOpen() {
			inBackground(s.mu, func() { _ = s.registerIfAny(other) })
		}
	}
}

// refreshedBeside shows the token that was refreshed on one connection on all others, too, also on those that drain: streams of the
// session may go on there. It does not release the mutex.
func (s *sessions) refreshedBeside(c *connection, old wire.Token) {
	for _, other := range s.connections.all {
		if other != c && other.failure == nil {
			other.showRenewed(old, s.token, s.clock.now()+requestTimeout)
			inBackground(s.mu, other.flush)
		}
	}
}

// openedBeside shows a session that was opened on one connection on all others, too.
func (s *sessions) openedBeside(c *connection) {
	for _, other := range s.connections.all {
		if other != c && other.isOpen() {
			s.presentAfterRenewal(other)
		}
	}
}

func (s *sessions) registerIfAny(c *connection) error {
	if !s.canRegister(c) {
		return nil
	}
	if err := s.connections.waitReady(s.closing, c); err != nil || !c.ready() || !s.canRegister(c) {
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

func (s *sessions) lacksHandlers(c *connection) bool {
	return s.canRegister(c) && !s.on(c).isRegistered
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
	on := s.on(c)
	s.attaching, on.isAttached = attaching, false
	inBackground(s.mu, func() {
		attaching.err = c.await(s.closing, call, nil)
		on.isAttached = attaching.err == nil
		if s.attaching == attaching {
			s.attaching = nil
		}
		close(attaching.done)
	})
	return attaching, nil
}

// attachFor attaches the session of a device for a call that was refused, if token and connection are still in use.
func (s *sessions) attachFor(ctx context.Context, c *connection, token wire.Token) error {
	if token != s.token || !c.ready() {
		return nil
	}
	attaching, err := s.beginAttach(c, token)
	if err == nil {
		err = attaching.await(ctx, s.mu)
	}
	if isClosed(err) {
		return nil
	}
	return err
}

// refusal returns what the next step depends on after a request with a token was refused.
func (s *sessions) refusal(err *Error, token wire.Token, done [attach + 1]bool) refusal {
	age := presentToken
	switch {
	case token == wire.Token{}:
		age = noToken
	case token != s.token && !s.hasEnded():
		age = earlierToken
	}
	return refusal{
		err: err, token: age, done: done, canReopen: s.credentials != nil, hasDevice: s.device() != nil,
		isCertificate: s.credentials != nil && s.credentials.canReopen(),
	}
}

// shownRefused handles the error of a request that only shows the token.
func (s *sessions) shownRefused(token wire.Token, err *Error) {
	switch s.refusal(err, token, [attach + 1]bool{}).next() {
	case reopen:
		s.reopen(token, err)
		s.keep()
	case renew:
		s.expired(token)
	default:
		s.refused(token, err)
	}
}

// refused handles an error that is reported to the application.
func (s *sessions) refused(token wire.Token, err *Error) {
	switch {
	case err.Code == Unauthenticated:
		s.refusedToken = token // it stays in use until the application asks for a session
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
			s.presentAfterRenewal(c) // the answer has the code: revoked or replaced
		}
	case "session.expiring":
		s.refreshEarly()
	}
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
		inBackground(s.mu, func() {
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
		if c, err := s.connections.get(s.closing); err == nil {
			s.touch(s.clock.now())
			s.present(c)()
		}
		s.keep()
	default:
		s.keep() // it was used meanwhile
	}
}
