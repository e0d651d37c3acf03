package zcproto

import (
	"errors"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// How a session is opened and refreshed.

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
	inBackground(s.mu, func() {
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
	if err := s.pauseUntilAllowed(); err != nil {
		return err
	}
	renewal := &renewal{must: must, backoff: newBackoff(s.random)}
	for {
		c, err := s.connections.get(s.closing)
		if err != nil {
			return err
		}
		if login := s.loginToFetch(s.clock.now()); login != nil {
			if err := login.fetch(s.closing, s.mu, s.clock); err != nil {
				return err
			}
			continue // with the connection that is current now
		}
		if c, err = s.connections.waitAnyReady(s.closing, c); err != nil {
			return err
		}
		sentAt := s.clock.now()
		if !c.ready() || s.loginToFetch(sentAt) != nil {
			continue
		}
		method, params, err := s.nextRequest(c, sentAt)
		if err != nil {
			return err
		}
		call, err := c.request(method, params, s.token, wire.Meta{}, sentAt+requestTimeout)
		if err == nil {
			// The token is replaced at once: what the server has sent behind its answer belongs to the new one.
			call.onResponse = func(body []byte) error { return s.adopt(body, c, method) }
			err = c.await(s.closing, call, nil)
		}
		var refused *Error
		switch {
		case err == nil:
			if method == "session.open" {
				s.openedBeside(c)
			}
			if s.needsAttach(c) || s.lacksHandlers(c) {
				s.presentAfterRenewal(c)
			}
			return nil
		case s.closing.Err() != nil:
			return err
		case isClosed(err):
			if method == "session.refresh" && !c.unansweredDidNotRun {
				renewal.must = true // the old token may be dead
				if s.session != nil {
					s.session.refreshLost(sentAt)
				}
			}
			if renewal.lost++; renewal.lost > maxLost {
				return err
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
		if err := pause(s.closing, s.mu, s.clock, renewal.backoff.next(retryAfter(err.Details))); err != nil {
			return false, err
		}
		return true, nil
	case step == atOnce && isFirst:
		return true, nil
	case step == attach && isFirst && s.device() != nil:
		_ = s.attachFor(s.closing, c, s.token) // the next answer reports its error, too
		return true, nil
	case method == "session.refresh" && s.opensInstead(err, renewal.must):
		renewal.must = true
		return true, s.pauseUntilAllowed()
	case !renewal.must && !endsSession(err.Code):
		s.setTimer(s.nextRefreshAttempt())
		return false, nil
	}
	if refusesRenewal(err.Code) {
		s.endSession(err)
	}
	return false, err
}

// pauseUntilAllowed waits until a session may be opened. It releases the mutex meanwhile.
func (s *sessions) pauseUntilAllowed() error {
	delay := s.notBefore - s.clock.now()
	if s.notBefore == never || delay <= 0 {
		return nil
	}
	return pause(s.closing, s.mu, s.clock, delay)
}

// loginToFetch returns the login that must be fetched before the next request; nil if it needs none.
func (s *sessions) loginToFetch(now time.Duration) *schemeLogin {
	login, ok := s.credentials.(*schemeLogin)
	if !ok || login.isFetched(now) || s.session != nil && s.session.canRefresh(now) {
		return nil
	}
	return login
}

func (s *sessions) nextRequest(c *connection, now time.Duration) (string, map[string]any, error) {
	if s.session != nil && s.session.canRefresh(now) {
		return "session.refresh", map[string]any{"refresh_token": s.session.refreshToken, "client": s.clientName}, nil
	}
	params, err := s.credentials.params(c.channel())
	if err != nil {
		return "", nil, err
	}
	params["client"] = s.clientName
	return "session.open", params, nil
}

// opensInstead returns whether to open a session, because the refresh token has expired, may be spent, belongs to the previous
// certificate, or is unknown when the token is no longer valid.
func (s *sessions) opensInstead(err *Error, must bool) bool {
	step := s.refusal(err, s.token, [attach + 1]bool{}).next()
	switch {
	case err.Code == Unauthenticated && (step == report || isUnknownToken(err)):
		if !must || s.credentials == nil {
			return false
		}
		s.delayReopening()
	case step != reopen && err.Code != TokenExpired && !mayHaveRun(err.Code):
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
		s.refreshedBeside(c, old)
	} else {
		c.conv.SessionEnded(old)
		s.presences = map[*connection]*presence{c: {isAttached: true}}
		s.openedAt = now
	}
	if session.canRefresh(now) {
		s.setTimer(session.refreshAt)
	} else if s.timer != nil {
		s.timer.Stop()
	}
	if session.usableUntil-now < minRefreshInterval {
		s.delayRenewal(now+minRefreshInterval+s.backoff.next(0), "the server opens only expired sessions; report it to its operator")
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
