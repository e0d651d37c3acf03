package conversation

import (
	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// maxBlockedFailures is how many FAILUREs may wait for a server that calls and reads nothing.
const maxBlockedFailures = 1_000

// serverCalls are the calls of the server without an answer, and the methods that sessions have registered (zcp1.md, section 19).
// Which handlers there are, and how many may run, is not their business.
type serverCalls struct {
	registrations   map[wire.Token]registration
	inFlight        map[uint32]wire.Token
	blockedFailures int // sent while the transport cannot send
}

type registration struct {
	methods  map[string]struct{}
	previous wire.Token // before the last refresh: calls with it may be under way
}

func newServerCalls() serverCalls {
	return serverCalls{registrations: map[wire.Token]registration{}, inFlight: map[uint32]wire.Token{}}
}

// register sets the methods of a session, in place of earlier ones.
func (s *serverCalls) register(token wire.Token, methods []string) {
	names := make(map[string]struct{}, len(methods))
	for _, method := range methods {
		names[method] = struct{}{}
	}
	s.registrations[token] = registration{methods: names}
}

// tokenRenewed accepts calls with a newer token of a session, too.
func (s *serverCalls) tokenRenewed(old, renewed wire.Token) {
	if found, has := s.registrations[old]; has {
		delete(s.registrations, found.previous)
		s.registrations[renewed] = registration{methods: found.methods, previous: old}
	}
}

func (s *serverCalls) sessionEnded(token wire.Token) {
	delete(s.registrations, s.registrations[token].previous)
	delete(s.registrations, token)
}

// CallsInFlight returns the number of calls of the server without an answer.
func (c *Conversation) CallsInFlight() int { return len(c.calls.inFlight) }

func (c *Conversation) receiveCall(frame *wire.Frame, isStale bool, now Instant) *wire.Fault {
	if _, isInFlight := c.calls.inFlight[frame.Stream]; isInFlight {
		return broken("the number of this CALL is in flight")
	}
	if c.calls.blockedFailures > maxBlockedFailures {
		return broken("the server calls, but reads no answers")
	}
	c.calls.inFlight[frame.Stream] = frame.Token
	if isStale {
		c.Fail(frame.Stream, &Error{Code: wire.StaleTimestamp, Message: "the call was delayed for too long"}, now)
		return nil
	}
	call, err := c.parseCall(frame)
	if err != nil {
		c.Fail(frame.Stream, err, now)
		return nil
	}
	c.emit(Event{
		Type:        Call,
		Stream:      frame.Stream,
		Name:        call.Method,
		Body:        call.Params,
		Token:       frame.Token,
		Delay:       wire.Milliseconds(call.Meta.DeadlineMs),
		Traceparent: call.Meta.Traceparent,
	})
	return nil
}

func (c *Conversation) parseCall(frame *wire.Frame) (wire.Message, *Error) {
	found, isKnown := c.calls.registrations[frame.Token]
	if !isKnown {
		return wire.Message{}, &Error{Code: wire.Unauthenticated, Message: "no session of this client has this token"}
	}
	call, err := wire.ParseRequest(wire.Call, frame.Body, c.settings.MaxDepth)
	if err != nil {
		return call, &Error{Code: wire.InvalidArgument, Message: "the call is invalid: " + err.Error()}
	}
	_, isHandled := found.methods[call.Method]
	switch {
	case !call.Meta.HasDeadline:
		return call, &Error{Code: wire.InvalidArgument, Message: "the call is invalid: deadline_ms is missing"}
	case call.Meta.DeadlineMs == 0:
		return call, &Error{Code: wire.DeadlineExceeded, Message: "the deadline of the call has passed"}
	case !isHandled:
		return call, &Error{Code: wire.Unimplemented, Message: "this client does not handle this method"}
	}
	return call, nil
}

func (c *Conversation) receiveWithdraw(frame *wire.Frame, now Instant) *wire.Fault {
	if len(frame.Body) > 0 {
		return broken("this kind of frame must not have a body")
	}
	token, isInFlight := c.calls.inFlight[frame.Stream]
	if !isInFlight || token != frame.Token {
		c.DroppedUnknown++
		return nil
	}
	c.emit(Event{Type: Withdrawn, Stream: frame.Stream})
	c.Fail(frame.Stream, &Error{Code: wire.Cancelled, Message: "the server has withdrawn the call"}, now)
	return nil
}

// Answer answers a call with its result, or with Internal if that cannot be sent. Without effect after an answer.
func (c *Conversation) Answer(number uint32, value any, now Instant) {
	body, err := msgpack.Append(nil, value)
	switch {
	case err != nil:
		c.Fail(number, &Error{Code: wire.Internal, Message: "the result cannot be sent: " + err.Error()}, now)
	case tooLarge("result", body, c.welcome.MaxFrame) != nil:
		c.Fail(number, &Error{Code: wire.Internal, Message: "the result is too large"}, now)
	default:
		c.answer(wire.Result, number, body, now)
	}
}

// Fail answers a call with an error. Without effect after an answer.
func (c *Conversation) Fail(number uint32, err *Error, now Instant) {
	if c.isBlocked {
		c.calls.blockedFailures++
	}
	c.answer(wire.Failure, number, failureBody(err, c.welcome.MaxFrame), now)
}

func (c *Conversation) answer(kind wire.Kind, number uint32, body []byte, now Instant) {
	if token, isInFlight := c.calls.inFlight[number]; isInFlight {
		delete(c.calls.inFlight, number)
		c.send(kind, number, token, body, now)
	}
}

// failureBody encodes a FAILURE. Message and details that cannot be sent are left out.
func failureBody(err *Error, limit uint32) []byte {
	code := err.Code
	if (code < wire.Cancelled || code > wire.Unauthenticated) && code != wire.StaleTimestamp {
		code = wire.Unknown
	}
	body, fault := wire.AppendError(nil, code, err.Message, err.Details)
	if fault != nil || tooLarge("failure", body, limit) != nil {
		body, _ = wire.AppendError(nil, code, "the error cannot be sent", nil)
	}
	return body
}
