package zcproto

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

var callPool = sync.Pool{New: func() any { return &pendingCall{done: make(chan struct{}, 1)} }}

// request sends a request. Call it only while ready, then flush. It returns an *Error for a request that cannot be sent.
func (c *connection) request(
	method string, params any, token wire.Token, meta wire.Meta, deadline time.Duration,
) (*pendingCall, error) {
	number, err := c.conv.Request(method, params, token, meta, c.instant())
	if err != nil {
		return nil, c.refusal(err)
	}
	call := callPool.Get().(*pendingCall)
	c.sentRequest(call, number, deadline)
	return call, nil
}

// openStream opens a stream of items like a request.
func (c *connection) openStream(
	method string, params any, token wire.Token, meta wire.Meta, window wire.Grant, onChange func(), deadline time.Duration,
) (*pendingCall, error) {
	stream, err := c.conv.Open(method, params, token, meta, window, c.instant())
	if err != nil {
		return nil, c.refusal(err)
	}
	call := &pendingCall{done: make(chan struct{}, 1), stream: stream, onChange: onChange}
	c.sentRequest(call, stream.Number, deadline)
	return call, nil
}

// register lets the server call methods in the session of a token.
func (c *connection) register(token wire.Token, methods []string, most int, deadline time.Duration) (*pendingCall, error) {
	number, err := c.conv.Handle(token, methods, most, c.instant())
	if err != nil {
		return nil, c.refusal(err)
	}
	call := callPool.Get().(*pendingCall)
	c.sentRequest(call, number, deadline)
	return call, nil
}

// showRenewed shows the token of a session that was refreshed on another connection; then flush. The answer does not matter.
func (c *connection) showRenewed(old, renewed wire.Token, deadline time.Duration) {
	if number, isShown := c.conv.ShowRenewed(old, renewed, c.instant()); isShown {
		c.sentRequest(&pendingCall{done: make(chan struct{}, 1)}, number, deadline)
	}
}

func (c *connection) sentRequest(call *pendingCall, number uint32, deadline time.Duration) {
	call.conn, call.number, call.deadline = c, number, deadline
	call.isDone, call.err, call.onResponse = false, nil, nil
	c.pending[number] = call
	if c.silenceAt == forever {
		c.watch()
	}
	if deadline < c.deadlineAt {
		c.setDeadlineTimer(deadline)
	}
}

func (c *connection) refusal(err error) error {
	var refused *conversation.Error
	if errors.As(err, &refused) {
		return errorOf(refused)
	}
	if c.failure != nil {
		return c.failure
	}
	return &ClosedError{Reason: err.Error()}
}

func (c *connection) remove(number uint32) *pendingCall {
	call := c.pending[number]
	delete(c.pending, number)
	return call
}

func (call *pendingCall) finish(err error) {
	call.isDone = true
	call.err = err
	call.done <- struct{}{}
	call.change()
}

// change wakes the reader or the sender of a stream.
func (call *pendingCall) change() {
	if call.onChange != nil {
		call.onChange()
	}
}

// wait waits for the answer, without the mutex. If ctx is done first, it cancels the call on the server.
func (call *pendingCall) wait(ctx context.Context) error {
	if ctx.Done() == nil {
		<-call.done
		return call.err
	}
	select {
	case <-call.done:
	case <-ctx.Done():
		call.conn.mu.Lock()
		call.conn.abandon(call, contextError(ctx))
		call.conn.flush()
		call.conn.mu.Unlock()
		<-call.done
	}
	return call.err
}

// recycle returns a call whose result is decoded to the pool.
func (call *pendingCall) recycle() {
	if call.onResponse != nil {
		clear(call.body) // it has tokens
	}
	if cap(call.body) > maxGathered {
		call.body = nil
	}
	call.conn, call.err, call.onResponse = nil, nil, nil
	callPool.Put(call)
}

// abandon cancels a call on the server and fails it; then flush. It does nothing after the answer.
func (c *connection) abandon(call *pendingCall, err error) {
	if call.isDone || c.pending[call.number] != call {
		return
	}
	delete(c.pending, call.number)
	c.conv.Cancel(call.number, c.instant())
	call.finish(err)
}

// await waits for the answer of a call, and decodes the result. It releases the mutex meanwhile.
func (c *connection) await(ctx context.Context, call *pendingCall, result any) error {
	c.flush()
	c.mu.Unlock()
	err := call.wait(ctx)
	if err == nil {
		err = decode(call.body, result)
	}
	call.recycle()
	c.mu.Lock()
	return err
}

// --- calls of the server ------------------------------------------------------------------------------------------------

// answerCall answers a call of the server; then settle. It does nothing if the call was answered before.
func (c *connection) answerCall(number uint32, value any) {
	if c.failure == nil {
		c.conv.Answer(number, value, c.instant())
	}
}

// failCall answers a call of the server with an error; then settle. It does nothing if the call was answered before.
func (c *connection) failCall(number uint32, err *Error) {
	if c.failure == nil {
		c.conv.Fail(number, toCore(err), c.instant())
	}
}

// runningCall is a call of the server whose handler runs.
type runningCall struct {
	conn      *connection
	number    uint32
	cancelled bool
	stop      context.CancelCauseFunc
}

// withdraw cancels the handler of a call that the server has withdrawn, and which the conversation has answered.
func (r *runningCall) withdraw() {
	r.cancelled = true
	r.stop(&Error{Code: Cancelled, Message: "the server has withdrawn the call"})
}

// cancel answers a call with CANCELLED, and cancels its handler.
func (r *runningCall) cancel(cause error) {
	if !r.cancelled {
		r.cancelled = true
		r.conn.failCall(r.number, &Error{Code: Cancelled, Message: "the session or the connection has ended"})
		r.stop(cause)
	}
}

// settle sends what is queued, and closes a drained connection.
func (c *connection) settle() {
	c.flush()
	c.closeIfDrained()
}

func encode(value any) (msgpack.Raw, error) {
	body, err := msgpack.Append(nil, value)
	if err != nil {
		return nil, &Error{Code: InvalidArgument, Message: err.Error()}
	}
	return body, nil
}

// decode reads a value that the conversation has scanned. A target of nil drops it, and so does a body without a value. A value that
// does not suit the target fails the call as INTERNAL.
func decode(body []byte, target any) error {
	if target == nil || len(body) == 0 {
		return nil
	}
	if err := msgpack.UnmarshalScanned(body, target); err != nil {
		return &Error{Code: Internal, Message: "the result cannot be read: " + err.Error(), Cause: err}
	}
	return nil
}
