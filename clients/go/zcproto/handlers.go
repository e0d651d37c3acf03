package zcproto

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
)

// Handler handles calls of the server to one method. Its result is the answer: any value that params of Session.Call can have.
//
// An *Error is answered with its code, message and details, a Code with the code, any other error with INTERNAL and a warning
// in the log. So is a panic, with its stack in the log. The context ends when the server withdraws the call, at its deadline, and when the session or the connection
// ends; it has the traceparent of the call (TraceparentOf).
type Handler func(ctx context.Context, call *ServerCall) (any, error)

// ServerCall is a call of the server.
type ServerCall struct {
	// Method is the name that was called.
	Method string
	// User is the user of the called session.
	User   string
	params Raw
}

// Decode stores the params of the call in what target points to: a struct, or a map with string keys.
func (c *ServerCall) Decode(target any) error {
	if err := decode(c.params, target); err != nil {
		return &Error{Code: InvalidArgument, Message: "the params of the call do not suit the handler", Cause: err}
	}
	return nil
}

// handlers are the application's handlers of one session.
//
// They decide which handler runs, how many run at once, when one is cancelled, and how its outcome becomes an answer. A handler
// that was cancelled counts until it has returned, and so does one whose answer waits for a server that does not read. They do
// not know when methods are registered. The mutex of the client guards them.
type handlers struct {
	most    int
	warn    func(string)
	byName  map[string]Handler
	running map[*runningCall]struct{}
}

func newHandlers(most int, warn func(string)) *handlers {
	return &handlers{most: most, warn: warn, byName: map[string]Handler{}, running: map[*runningCall]struct{}{}}
}

func (h *handlers) any() bool { return len(h.byName) > 0 }

func (h *handlers) methods() []string { return slices.Sorted(maps.Keys(h.byName)) }

// call runs the handler of a call. It does not release the mutex.
func (h *handlers) call(c *connection, event *conversation.Event, user string) {
	number := event.Stream
	handler := h.byName[event.Name]
	if handler == nil {
		c.failCall(number, &Error{Code: Unimplemented, Message: "this client does not handle this method"})
		return
	}
	count := 0
	for running := range h.running {
		if running.conn == c {
			count++
		}
	}
	if count >= h.most {
		c.failCall(number, &Error{Code: ResourceExhausted, Message: "this client handles too many calls"})
		return
	}
	ctx, stop := context.WithCancelCause(WithTraceparent(context.Background(), event.Traceparent))
	running := &runningCall{conn: c, number: number, stop: stop}
	h.running[running] = struct{}{}
	c.handled[number] = running
	call := &ServerCall{Method: event.Name, User: user, params: bytes.Clone(event.Body)}
	go h.run(ctx, running, handler, call, event.Delay)
}

func (h *handlers) run(ctx context.Context, running *runningCall, handler Handler, call *ServerCall, delay time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, delay)
	defer cancel()
	value, err := h.protected(ctx, handler, call)
	var body Raw
	if err == nil {
		body, err = encode(value)
	}
	failure := h.failureOf(err, running)
	c := running.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waitWritable()
	delete(h.running, running)
	if c.handled[running.number] == running {
		delete(c.handled, running.number)
	}
	switch {
	case running.cancelled: // it was answered, and its number may be in use again
	case failure != nil:
		c.failCall(running.number, failure)
	default:
		c.answerCall(running.number, body)
	}
	c.settle()
}

// protected runs a handler. A panic there, in a goroutine of this package, would end the application: it is an error like others.
func (h *handlers) protected(ctx context.Context, handler Handler, call *ServerCall) (value any, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			value, err = nil, fmt.Errorf("panic in the handler of %q: %v\n%s", call.Method, cause, debug.Stack())
		}
	}()
	return handler(ctx, call)
}

func (h *handlers) failureOf(err error, running *runningCall) *Error {
	if err == nil {
		return nil
	}
	var failure *Error
	if errors.As(err, &failure) {
		return failure
	}
	var code Code
	if errors.As(err, &code) {
		return &Error{Code: code, Message: err.Error()}
	}
	running.conn.mu.Lock()
	cancelled := running.cancelled
	running.conn.mu.Unlock()
	if !cancelled {
		h.warn("a handler of calls failed: " + err.Error())
	}
	return &Error{Code: Internal, Message: "the handler failed"}
}

// cancelAll cancels all handlers of the session.
func (h *handlers) cancelAll(cause error) {
	for running := range h.running {
		running.cancel(cause)
	}
}
