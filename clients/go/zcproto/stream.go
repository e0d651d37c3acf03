package zcproto

import (
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// How much the server may send ahead of the application, unless Window says otherwise.
const (
	DefaultWindowItems = 64
	DefaultWindowBytes = 262_144
)

// StreamOption is an option of Session.Stream.
type StreamOption func(*Stream)

// Window sets how many items and bytes the server may send before the application takes an item: 64 and 262,144 by default.
// The method waits when it is used up, so memory is bounded on both sides.
func Window(items, bytes uint64) StreamOption {
	return func(s *Stream) { s.window = wire.Grant{Items: items, Bytes: bytes} }
}

// ItemTimeout limits the wait for each item. By default only the context limits a stream.
func ItemTimeout(timeout time.Duration) StreamOption {
	return func(s *Stream) { s.itemTimeout = timeout }
}

// Reopen opens the stream again if its connection has interrupted it. The function gets the last item and returns the params to
// replace, such as {"after": last.ID}. Without it, a stream that may have begun is never opened again. Such a stream cannot send.
func Reopen(params func(last Raw) map[string]any) StreamOption {
	return func(s *Stream) { s.reopen = params }
}

// Stream is a call whose method sends or takes items before its result, made by Session.Stream.
//
// One goroutine may receive while another sends. Recv must be called until it returns an error, or Close: the server waits
// otherwise.
type Stream struct {
	session     *Session
	ctx         context.Context
	cancel      context.CancelCauseFunc
	window      wire.Grant
	itemTimeout time.Duration
	reopen      func(last Raw) map[string]any
	params      map[string]any // of the application, with reopen
	request     request

	// The mutex of the client guards these.
	pending       *pendingCall // of the latest attempt
	last          Raw          // with reopen
	hasProgressed bool         // since the latest attempt
	hasEndedItems bool
	ended         chan struct{} // closed once there is the result or the error
	result        Raw
	err           error
	progress      chan struct{} // gets a value when an item was taken
	leftBy        error         // why the application wants no more items

	// They get a value when an item or credit has come, or another attempt was made.
	receivable, sendable chan struct{}

	sending sync.Mutex // held by Send and CloseSend: items keep their order
}

// Stream opens a stream of a method of the server: receive its items, and then its result.
//
//	stream := client.Stream(ctx, "words", map[string]any{"text": "to be or not"})
//	for word, err := range zcproto.Items[string](stream) { ... }
//	err := stream.Result(&count)
//
// It returns at once; errors of opening are those of Call, and are returned by Recv, Items and Result. The context limits the
// whole stream, and Options.Timeout does not.
func (s *Session) Stream(ctx context.Context, method string, params any, options ...StreamOption) *Stream {
	stream := &Stream{
		session: s, window: wire.Grant{Items: DefaultWindowItems, Bytes: DefaultWindowBytes},
		ended: make(chan struct{}), progress: make(chan struct{}, 1),
		receivable: make(chan struct{}, 1), sendable: make(chan struct{}, 1),
	}
	stream.ctx, stream.cancel = context.WithCancelCause(ctx)
	for _, option := range options {
		option(stream)
	}
	body, err := encode(params)
	if err == nil && stream.reopen != nil && !msgpack.IsNil(body) {
		err = decode(body, &stream.params)
	}
	if err != nil {
		stream.finish(nil, err)
		return stream
	}
	stream.request = request{ctx: stream.ctx, method: method, params: body, deadline: forever, stream: stream}
	if at, has := ctx.Deadline(); has {
		stream.request.deadline = addTime(s.clock.now(), time.Until(at))
	}
	go stream.run()
	return stream
}

func (s *Stream) run() {
	mu := s.session.mu
	mu.Lock()
	defer mu.Unlock()
	call, err := s.session.run(&s.request)
	var result Raw
	if err == nil {
		result = call.body
	}
	s.finish(result, err)
}

func (s *Stream) finish(result Raw, err error) {
	s.result, s.err = result, err
	close(s.ended)
	s.cancel(nil)
}

// change wakes the receiver and the sender.
func (s *Stream) change() {
	for _, wake := range []chan struct{}{s.receivable, s.sendable} {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
}

// leave cancels the stream. Only the first reason counts.
func (s *Stream) leave(reason error) {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	if s.leftBy == nil {
		s.leftBy = reason
		s.cancel(reason)
	}
}

// opened notes an attempt, with the mutex.
func (s *Stream) opened(call *pendingCall) {
	s.pending = call
	s.hasProgressed = false
	if s.hasEndedItems {
		call.stream.End(call.conn.instant())
	}
	s.change()
}

func (s *Stream) wasLost() bool { return s.pending != nil && s.pending.stream.WasLost }

// hasBegun returns whether the method has certainly begun: then the stream must not be opened again.
func (s *Stream) hasBegun() bool { return s.pending != nil && s.pending.stream.HasBegun }

// resume waits until the application has taken all items. It returns whether the stream can be opened again, and whether an item
// was taken since the latest attempt. It releases the mutex meanwhile.
func (s *Stream) resume(mu *sync.Mutex) (resumed, hasProgressed bool) {
	if s.reopen == nil {
		return false, false
	}
	for s.pending != nil && s.pending.stream.HasItem() {
		mu.Unlock()
		select {
		case <-s.progress:
			mu.Lock()
		case <-s.ctx.Done():
			mu.Lock()
			return false, false
		}
	}
	return true, s.hasProgressed
}

// nextParams sets the params of the next attempt.
func (s *Stream) nextParams(r *request) error {
	if s.last == nil {
		return nil
	}
	params := maps.Clone(s.params)
	if params == nil {
		params = map[string]any{}
	}
	last := s.last
	s.session.mu.Unlock()
	maps.Copy(params, s.reopen(last))
	body, err := encode(params)
	s.session.mu.Lock()
	r.params = body
	return err
}

// --- items of the server ----------------------------------------------------------------------------------------------------

// Recv waits for the next item and stores it in what target points to, like the result of Session.Call. After the last item it
// returns io.EOF, or the error of the stream: items that have arrived come first. An error ends the stream.
func (s *Stream) Recv(target any) error {
	body, err := s.take()
	if err == nil {
		err = decode(body, target)
	}
	if err != nil && err != io.EOF {
		s.leave(err)
	}
	return err
}

func (s *Stream) take() (Raw, error) {
	session := s.session
	var late <-chan struct{}
	if s.itemTimeout > 0 {
		expired := make(chan struct{})
		timer := session.clock.afterFunc(s.itemTimeout, func() { close(expired) })
		defer timer.Stop()
		late = expired
	}
	session.mu.Lock()
	defer session.mu.Unlock()
	for {
		if s.leftBy != nil {
			return nil, s.leftBy
		}
		if call := s.pending; call != nil && call.stream.HasItem() {
			return s.takeFrom(call)
		}
		select {
		case <-s.ended:
			if s.err != nil {
				return nil, s.err
			}
			return nil, io.EOF
		default:
		}
		if err := s.await(s.receivable, late); err != nil {
			return nil, err
		}
	}
}

// await waits for a change of the stream. It releases the mutex meanwhile.
func (s *Stream) await(changed, late <-chan struct{}) error {
	s.session.mu.Unlock()
	defer s.session.mu.Lock()
	select {
	case <-changed:
	case <-s.ended: // soon after the context is done, too
	case <-late:
		return &Error{Code: DeadlineExceeded, Message: "no item within ItemTimeout"}
	}
	return nil
}

func (s *Stream) takeFrom(call *pendingCall) (Raw, error) {
	c := call.conn
	s.session.sessions.touch(s.session.clock.now())
	body, err := call.stream.Take(c.instant())
	if err != nil {
		err = c.refusal(err)
		c.abandon(call, err)
		c.flush()
		return nil, err
	}
	if s.reopen != nil {
		s.last, s.hasProgressed = body, true
		select {
		case s.progress <- struct{}{}:
		default:
		}
	}
	c.flush()
	return body, nil
}

// Items iterates over the items of a stream, as values of a type. After an error there is no further item. Leaving the loop early
// cancels the stream.
func Items[T any](s *Stream) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for {
			var item T
			err := s.Recv(&item)
			if err == io.EOF {
				return
			}
			if !yield(item, err) || err != nil {
				s.Close()
				return
			}
		}
	}
}

// Result waits for the end of the stream and stores its result in what target points to; nil drops it. It takes no items: receive
// those first.
func (s *Stream) Result(target any) error {
	if <-s.ended; s.err != nil {
		return s.err
	}
	return decode(s.result, target)
}

// Draining returns whether the server is going away: the stream continues for a while, but open the next one on another
// connection.
func (s *Stream) Draining() bool {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	return s.pending != nil && s.pending.conn.draining
}

// Close cancels the stream unless it has ended. It always returns nil, and is idempotent.
func (s *Stream) Close() error {
	s.leave(&Error{Code: Cancelled, Message: "the stream was closed"})
	return nil
}

// String returns the method.
func (s *Stream) String() string { return "Stream(" + s.request.method + ")" }

// Format writes String for every verb.
func (s *Stream) Format(state fmt.State, _ rune) { _, _ = io.WriteString(state, s.String()) }

// --- items of the application -------------------------------------------------------------------------------------------------

// Send sends an item, once the method asks for it. It returns an *Error with InvalidArgument for a value that cannot be sent, and
// io.EOF if the stream has ended: Result has its error.
func (s *Stream) Send(item any) error {
	body, err := encode(item)
	if err != nil {
		return err
	}
	s.sending.Lock()
	defer s.sending.Unlock()
	if s.reopen != nil || s.hasEndedItems {
		return &Error{Code: FailedPrecondition, Message: "no more items can be sent on this stream"}
	}
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	for {
		select {
		case <-s.ended:
			return io.EOF
		default:
		}
		if call := s.pending; call != nil && !call.isDone {
			if call.stream.MaySend() && call.conn.canGather() {
				err := call.stream.Send(body, call.conn.instant())
				if err != nil {
					return call.conn.refusal(err)
				}
				call.conn.flush()
				return nil
			}
		}
		_ = s.await(s.sendable, nil)
	}
}

// CloseSend sends no more items. Those of the server and the result can still be received. It always returns nil.
func (s *Stream) CloseSend() error {
	s.sending.Lock()
	defer s.sending.Unlock()
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	s.hasEndedItems = true
	if call := s.pending; call != nil && !call.isDone {
		call.stream.End(call.conn.instant())
		call.conn.flush()
	}
	return nil
}
