package zcproto

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// Session is one user of a client: the client's own, or one of Client.SessionFor. Its methods can be called concurrently.
//
// It decides whether a call or a stream is sent again after an error, by the table of zcp1.md, section 11.1 (retry.go).
type Session struct {
	mu       *sync.Mutex // of the client
	clock    clock
	shared   *shared
	sessions *sessions
	handlers *handlers
	events   *eventQueue
	closing  *task // nil until Close
}

// newSession returns a session that is not open, with the mutex.
func newSession(shared *shared, credentials Credentials, onEvent func(Event)) *Session {
	s := &Session{
		mu: &shared.mu, clock: shared.clock, shared: shared,
		sessions: newSessions(&shared.mu, shared.clock, shared.random, credentials, shared.options.ClientName),
		handlers: newHandlers(shared.options.MaxCalls, shared.options.warn),
		events:   newEventQueue(),
	}
	s.sessions.connections = shared.connections
	s.sessions.handlers = s.handlers
	shared.add(s)
	if onEvent != nil {
		go s.events.deliver(onEvent)
	}
	return s
}

// Open opens a session unless there is a valid one, for example after TOKEN_REVOKED, SESSION_REPLACED or UNAUTHENTICATED.
//
// It returns an *Error with Unauthenticated without credentials, otherwise the errors of Call.
func (s *Session) Open(ctx context.Context) (SessionInfo, error) {
	s.mu.Lock()
	err := s.sessions.require()
	s.mu.Unlock()
	if err == nil {
		err = s.waitOpen(ctx)
	}
	if err != nil {
		return SessionInfo{}, err
	}
	info, _ := s.Info()
	return info, nil
}

func (s *Session) waitOpen(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	deadline := s.deadlineOf(ctx)
	c, err := s.waitReady(ctx, deadline, false)
	if err == nil {
		s.shared.connections.hasRoom(c) // this one sends nothing
	}
	return err
}

// Info returns the open session; false without one.
func (s *Session) Info() (SessionInfo, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions.session == nil {
		return SessionInfo{}, false
	}
	return s.sessions.session.info, true
}

// Token returns the token of the session as base64url, 43 characters, for HTTP's "Authorization: Bearer"; "" without a session.
// It gives access to everything that the user may do: keep it as carefully as a password.
func (s *Session) Token() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions.session == nil {
		return ""
	}
	return s.sessions.token.Text()
}

// String returns the user.
func (s *Session) String() string {
	info, _ := s.Info()
	return "Session(" + info.User + ")"
}

// Format writes String for every verb, so that none prints a token.
func (s *Session) Format(state fmt.State, _ rune) { _, _ = io.WriteString(state, s.String()) }

// Close closes the session on the server; the connection stays open. Pending calls go on, later ones get a *ClosedError. It always
// returns nil, and is idempotent.
func (s *Session) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing != nil {
		_ = s.closing.await(context.Background(), s.mu)
		return nil
	}
	s.closing = &task{done: make(chan struct{})}
	s.sessions.close(s.shared.connections.current)
	s.handlers.cancelAll(&ClosedError{Reason: "this session is closed", Clean: true})
	if current := s.shared.connections.current; current != nil {
		current.settle()
	}
	s.shared.remove(s)
	s.events.close()
	close(s.closing.done)
	return nil
}

// NextEvent waits for the next event of the session. At most 1,000 of together 4 MiB are queued; beyond that the oldest are
// dropped. With Options.OnEvent there is nothing to wait for. After Close it returns the queued ones, and then a *ClosedError.
func (s *Session) NextEvent(ctx context.Context) (Event, error) { return s.events.next(ctx) }

// Handle lets the server call a method of this client in this session, now and on each later connection. It returns once the
// server can call it: an *Error with Unimplemented if the server does not call clients, otherwise the errors of Call.
//
//	err := client.Handle(ctx, "approve", func(ctx context.Context, call *zcproto.ServerCall) (any, error) { ... })
func (s *Session) Handle(ctx context.Context, method string, handler Handler) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handlers.byName[method] = handler
	request := &request{ctx: ctx, deadline: s.deadlineOf(ctx), isIdempotent: true, register: true}
	call, err := s.run(request)
	if call != nil {
		s.sessions.registerBeside(call.conn)
		call.recycle()
	}
	return err
}

// --- calls ----------------------------------------------------------------------------------------------------------------

// CallOption is an option of Call.
type CallOption func(*request)

// IdempotencyKey makes a call safe to send again even if its response was lost: the server runs it once. The key has at most 64
// characters.
func IdempotencyKey(key string) CallOption {
	return func(r *request) {
		r.idempotencyKey = key
		r.isIdempotent = true
	}
}

type traceparentKey struct{}

// WithTraceparent returns a context whose calls and streams carry a traceparent of W3C Trace Context.
func WithTraceparent(ctx context.Context, traceparent string) context.Context {
	if traceparent == "" {
		return ctx
	}
	return context.WithValue(ctx, traceparentKey{}, traceparent)
}

// TraceparentOf returns the traceparent of a context, such as that of a Handler; "" without.
func TraceparentOf(ctx context.Context) string {
	traceparent, _ := ctx.Value(traceparentKey{}).(string)
	return traceparent
}

// Call calls a method of the server. Params are a map with string keys, a struct (tags `msgpack:"name,omitempty"`) or nil. The
// result is stored in what result points to: a struct, a map, a slice, any, ...; nil drops it.
//
//	var answer struct{ Word string `msgpack:"word"` }
//	err := client.Call(ctx, "echo", map[string]any{"word": "hello"}, &answer)
//
// The context's deadline, or else Options.Timeout, limits everything: waiting for a connection and a session, and sending again
// what certainly was not run. It is sent as the deadline of the call. Cancelling the context cancels the call on the server.
//
// It returns an *Error for an error of the server, for the deadline (DeadlineExceeded) and the cancelled context (Cancelled); a
// *ClosedError if the connection was lost and the call may have run; a *ConnectError or *TLSError if connecting fails; a
// *LoginError or *CertificateError if the session cannot be opened for that reason.
func (s *Session) Call(ctx context.Context, method string, params, result any, options ...CallOption) error {
	request := request{ctx: ctx, method: method}
	for _, option := range options {
		option(&request)
	}
	if raw, isRaw := params.(Raw); isRaw {
		request.params = raw
	} else {
		body, err := encode(params)
		if err != nil {
			return err
		}
		request.params = body
	}
	s.mu.Lock()
	request.deadline = s.deadlineOf(ctx)
	call, err := s.run(&request)
	s.mu.Unlock()
	if err == nil {
		err = decode(call.body, result)
	}
	if call != nil {
		call.recycle()
	}
	return err
}

// request is a call or a stream that is sent again after some errors.
type request struct {
	ctx            context.Context
	method         string
	params         Raw
	idempotencyKey string
	deadline       time.Duration
	isIdempotent   bool // it can be sent again even if it may have run
	register       bool // it registers the handlers instead
	stream         *Stream
	attempts       *attempts // nil before the first error
}

func (s *Session) deadlineOf(ctx context.Context) time.Duration {
	now := s.clock.now()
	timeout := s.shared.options.Timeout
	if at, has := ctx.Deadline(); has {
		timeout = time.Until(at)
	}
	return addTime(now, timeout)
}

// run sends a request until it has a result or a definite error. It releases the mutex meanwhile.
func (s *Session) run(r *request) (*pendingCall, error) {
	for {
		c := s.readyConnection()
		if c == nil {
			var err error
			if c, err = s.waitReady(r.ctx, r.deadline, r.register); err != nil {
				return nil, err
			}
		}
		now := s.clock.now()
		if r.ctx.Err() != nil || now >= r.deadline {
			s.shared.connections.hasRoom(c) // this one sends nothing
			if r.ctx.Err() != nil {
				return nil, contextError(r.ctx)
			}
			return nil, errDeadline()
		}
		token := s.sessions.token
		s.sessions.touch(now)
		call, err := s.send(r, c, token, now)
		if err == nil {
			c.flush()
			s.mu.Unlock()
			err = call.wait(r.ctx)
			s.mu.Lock()
			if err == nil {
				return call, nil
			}
			if call.stream == nil {
				call.recycle()
			}
		}
		if r.attempts == nil {
			r.attempts = &attempts{backoff: newBackoff(s.shared.random)}
		}
		if err = s.afterFailure(err, r, c, token); err != nil {
			return nil, err
		}
	}
}

func (s *Session) send(r *request, c *connection, token wire.Token, now time.Duration) (*pendingCall, error) {
	if r.register {
		return s.sessions.sendRegistration(c, token, r.deadline)
	}
	meta := wire.Meta{IdempotencyKey: r.idempotencyKey, Traceparent: TraceparentOf(r.ctx)}
	if r.deadline != forever {
		meta.HasDeadline, meta.DeadlineMs = true, sentDeadline(r.deadline-now)
	}
	if r.stream == nil {
		return c.request(r.method, r.params, token, meta, r.deadline)
	}
	call, err := c.openStream(r.method, r.params, token, meta, r.stream.window, r.stream.change, r.deadline)
	if err == nil {
		r.stream.opened(call)
	}
	return call, err
}

// readyConnection returns the connection if a call can be sent at once.
func (s *Session) readyConnection() *connection {
	c := s.shared.connections.current
	if c != nil && c.ready() && len(s.shared.connections.extra.waiters) == 0 && s.clock.now() < s.sessions.usableUntil &&
		s.sessions.preparing(c) == nil && s.closing == nil {
		return c
	}
	return nil
}

// waitReady returns a connection that is ready for a request, the main one if onMain, with a session if one is required. It releases the mutex
// meanwhile.
func (s *Session) waitReady(ctx context.Context, deadline time.Duration, onMain bool) (*connection, error) {
	ctx, cancel := s.limited(ctx, deadline, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.slowError()
	})
	defer cancel()
	for {
		if s.closing != nil {
			return nil, errClientClosed()
		}
		if err := s.sessions.waitUntilUsable(ctx); err != nil {
			return nil, err
		}
		c, err := s.shared.connections.get(ctx)
		if err != nil {
			return nil, err
		}
		if onMain {
			err = s.shared.connections.waitReady(ctx, c)
		} else {
			c, err = s.shared.connections.waitAnyReady(ctx, c)
		}
		if err != nil {
			return nil, err
		}
		if preparing := s.sessions.preparing(c); preparing != nil {
			s.shared.connections.hasRoom(c) // for another session
			if err := preparing.await(ctx, s.mu); err != nil {
				return nil, err
			}
			continue
		}
		if c.ready() && s.clock.now() < s.sessions.usableUntil && s.closing == nil {
			return c, nil
		}
	}
}

// slowError says for what a call has waited.
func (s *Session) slowError() error {
	connections := s.shared.connections
	if connections.current == nil && connections.lastError != nil {
		return &Error{Code: DeadlineExceeded, Cause: connections.lastError, Message: fmt.Sprintf(
			"no connection (%v) within the call's timeout", connections.lastError)}
	}
	if problem := s.sessions.problem(); problem != "" {
		return &Error{Code: DeadlineExceeded, Message: "no session (" + problem + ") within the call's timeout"}
	}
	return errDeadline()
}

// --- what a client does after an error --------------------------------------------------------------------------------------

// afterFailure waits until a request can be sent again. It returns the error if it must not be.
func (s *Session) afterFailure(err error, r *request, c *connection, token wire.Token) error {
	if r.ctx.Err() != nil {
		return err
	}
	var refused *Error
	isRefused := errors.As(err, &refused)
	if r.stream != nil {
		if s.closing == nil && isInterruption(err, r.stream.wasLost()) {
			if resumed, hasProgressed := r.stream.resume(s.mu); resumed {
				if hasProgressed {
					r.attempts.reset()
					r.attempts.done = [attach + 1]bool{}
				}
				asked := time.Duration(0)
				if isRefused {
					asked = retryAfter(refused.Details)
				}
				if waited := s.pause(r.attempts.next(asked), err, r); waited != nil {
					return waited
				}
				return r.stream.nextParams(r)
			}
		}
		if r.stream.hasBegun() {
			return err
		}
	}
	switch {
	case isRefused:
		return s.afterError(refused, r, c, token)
	case isClosed(err) && s.closing == nil && afterLoss(c.unansweredDidNotRun, r.isIdempotent) == later:
		return s.pause(r.attempts.next(0), err, r) // the call itself may be what crashes the server
	}
	return err
}

func (s *Session) afterError(err *Error, r *request, c *connection, token wire.Token) error {
	refused := s.sessions.refusal(err, token, r.attempts.done)
	step := refused.next()
	switch {
	case step == later && c.draining:
		return s.pause(r.attempts.next(0), err, r) // the delay that the server asks for concerns that server
	case step == later:
		return s.pause(r.attempts.next(retryAfter(err.Details)), err, r)
	case step == report && refused.token != noToken:
		if err.Code == InvalidArgument && err.Details["size"] != nil && !c.conv.HasSession() && !r.attempts.done[atOnce] {
			r.attempts.done[atOnce] = true
			return s.showFirst(r, c)
		}
		s.sessions.refused(token, err)
		return err
	case step == report:
		return err
	}
	r.attempts.done[step] = true
	switch step {
	case attach:
		return s.attach(r, c, token)
	case reopen:
		s.sessions.reopen(token, err)
	case renew:
		s.sessions.expired(token)
	}
	return nil
}

// attach proves the session's key on the connection.
func (s *Session) attach(r *request, c *connection, token wire.Token) error {
	ctx, cancel := s.limited(r.ctx, r.deadline, func() error { return errDeadline() })
	defer cancel()
	err := s.sessions.attachFor(ctx, c, token)
	var refused *Error
	if errors.As(err, &refused) && refused.Code != DeadlineExceeded && ctx.Err() == nil {
		if whatNext(refused) == later {
			r.attempts.done[attach] = false // the session was not attached
		}
		return s.afterError(refused, r, c, token)
	}
	return err
}

// showFirst shows the token in a small request, because the server accepts no large one on a connection without a session.
func (s *Session) showFirst(r *request, c *connection) error {
	if c.failure != nil || c.draining {
		return nil
	}
	call, err := s.run(&request{ctx: r.ctx, method: "session.info", deadline: r.deadline})
	if call != nil {
		call.recycle()
	}
	return err
}

// limited returns a context with a deadline, and the error that is its cause then.
func (s *Session) limited(ctx context.Context, deadline time.Duration, late func() error) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if deadline == forever {
		return ctx, func() { cancel(nil) }
	}
	timer := s.clock.afterFunc(deadline-s.clock.now(), func() { cancel(late()) })
	return ctx, func() {
		timer.Stop()
		cancel(nil)
	}
}

// pause waits before a request is sent again. It returns err at once if the deadline would pass.
func (s *Session) pause(delay time.Duration, err error, r *request) error {
	if addTime(s.clock.now(), delay) >= r.deadline {
		return err
	}
	return pause(r.ctx, s.mu, s.clock, delay)
}
