package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/zcproto"
)

// step has the fields of all steps with a client. Milliseconds are 0 if they are absent.
type step struct {
	Step   string          `json:"step"`
	Client string          `json:"client"`
	Of     string          `json:"of"`
	Call   json.RawMessage `json:"call"` // a name, or the number of a call of the server
	Stream string          `json:"stream"`
	Method string          `json:"method"`
	Params value           `json:"params"`
	Value  value           `json:"value"`
	Code   int             `json:"code"`

	Address    string   `json:"address"`
	ServerName string   `json:"server_name"`
	CAFile     string   `json:"ca_file"`
	Pins       []string `json:"pins"`
	Verify     *bool    `json:"verify"`
	User       string   `json:"user"`
	Key        string   `json:"key"`
	Device     string   `json:"device"`
	DeviceKey  hexBytes `json:"device_key"`
	Login      []value  `json:"login"`
	ClientName string   `json:"client_name"`
	MaxCalls   int      `json:"max_calls"`
	MaxConns   int      `json:"max_connections"`
	Home       string   `json:"home"`

	TimeoutMs        int64      `json:"timeout_ms"`
	ConnectTimeoutMs int64      `json:"connect_timeout_ms"`
	IdempotencyKey   string     `json:"idempotency_key"`
	Traceparent      string     `json:"traceparent"`
	Credit           *[2]uint64 `json:"credit"`
}

// answer waits for the result of a step.
type answer func() (any, error)

// done is the answer of a step without a result.
func done() (any, error) { return nil, nil }

func after(wait func() error) answer {
	return func() (any, error) { return nil, wait() }
}

// clients are the clients that the kit drives, with their calls, streams and calls of the server, all by their names.
type clients struct {
	mu       sync.Mutex
	owners   map[string]*zcproto.Client // those with a connection of their own
	sessions map[string]*zcproto.Session
	calls    map[string]*call
	streams  map[string]*stream
	held     map[string]*heldCalls
}

type call struct {
	cancel func()
	done   chan struct{}
	result any
	err    error
}

// stream runs the steps that send in turn.
type stream struct {
	*zcproto.Stream
	last chan struct{} // closed when the step before has ended
}

func newClients() *clients {
	return &clients{
		owners:   map[string]*zcproto.Client{},
		sessions: map[string]*zcproto.Session{},
		calls:    map[string]*call{},
		streams:  map[string]*stream{},
		held:     map[string]*heldCalls{},
	}
}

// begin starts a step and returns what waits for its answer.
func (c *clients) begin(name string, line []byte) func() map[string]any {
	wait := c.start(name, line)
	return func() map[string]any {
		result, err := wait()
		switch {
		case errors.Is(err, errUnknownStep):
			return map[string]any{"unsupported": "unknown step " + name}
		case err != nil:
			return map[string]any{"error": describeError(err)}
		default:
			return map[string]any{"ok": result}
		}
	}
}

func (c *clients) start(name string, line []byte) answer {
	begin, isWithClient := map[string]func(*step) (answer, error){
		"hello":        c.hello,
		"connect":      c.connect,
		"session_for":  c.sessionFor,
		"call":         c.call,
		"expect":       c.expect,
		"cancel":       c.cancel,
		"open":         c.open,
		"next":         c.next,
		"send":         c.send,
		"finish":       c.finish,
		"leave":        c.leave,
		"handle":       c.handle,
		"called":       c.called,
		"answer":       c.answer,
		"event":        c.event,
		"session":      c.session,
		"open_session": c.openSession,
		"cut":          c.cut,
		"close":        c.closeOne,
	}[name]
	if !isWithClient {
		return func() (any, error) { return runVectorStep(name, line) }
	}
	var fields step
	err := json.Unmarshal(line, &fields)
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		var wait answer
		if wait, err = begin(&fields); err == nil {
			return wait
		}
	}
	return func() (any, error) { return nil, err }
}

// found returns what has a name in one of the maps.
func found[T any](in map[string]T, name string) (T, error) {
	value, has := in[name]
	if !has {
		return value, fmt.Errorf("unknown name %q", name)
	}
	return value, nil
}

func (c *clients) hello(*step) (answer, error) {
	return func() (any, error) { return map[string]any{"kit": 1, "client": "zcproto-go/" + zcproto.Version}, nil }, nil
}

func milliseconds(count int64) time.Duration { return time.Duration(count) * time.Millisecond }

func (c *clients) connect(step *step) (answer, error) {
	credentials, err := credentialsOf(step)
	if err != nil {
		return nil, err
	}
	options := zcproto.Options{
		Credentials:        credentials,
		CAFile:             step.CAFile,
		Pins:               step.Pins,
		ServerName:         step.ServerName,
		InsecureSkipVerify: step.Verify != nil && !*step.Verify,
		ClientName:         step.ClientName,
		Timeout:            milliseconds(step.TimeoutMs),
		ConnectTimeout:     milliseconds(step.ConnectTimeoutMs),
		MaxCalls:           step.MaxCalls,
		MaxConnections:     step.MaxConns,
		Home:               step.Home,
	}
	return func() (any, error) {
		client, err := zcproto.Dial(context.Background(), step.Address, options)
		if err != nil {
			return nil, err
		}
		c.mu.Lock()
		c.owners[step.Client] = client
		c.mu.Unlock()
		return c.add(step.Client, client.Session), nil
	}, nil
}

func credentialsOf(step *step) (zcproto.Credentials, error) {
	switch {
	case step.DeviceKey != nil:
		device, err := zcproto.DeviceFromSeed(step.DeviceKey)
		return zcproto.DeviceKey(device, step.Device), err
	case step.Login != nil:
		return zcproto.LoginWith(nextOf(step.Login)), nil
	case step.User != "" || step.Key != "":
		return zcproto.APIKey(step.User, step.Key), nil
	default:
		return nil, nil
	}
}

// nextOf returns a function that returns the next login each time.
func nextOf(logins []value) func(context.Context) (zcproto.Login, error) {
	return func(context.Context) (zcproto.Login, error) {
		if len(logins) == 0 {
			return zcproto.Login{}, errors.New("no more logins")
		}
		fields, _ := logins[0].of.(map[string]any)
		logins = logins[1:]
		scheme, _ := fields["scheme"].(string)
		delete(fields, "scheme")
		return zcproto.Login{Scheme: scheme, Fields: fields}, nil
	}
}

// add registers a session and returns the result of the step that opened it.
func (c *clients) add(name string, session *zcproto.Session) any {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sessions[name] = session
	if info, isOpen := session.Info(); isOpen {
		return map[string]any{"session": info.ID}
	}
	return map[string]any{"session": nil}
}

func (c *clients) sessionFor(step *step) (answer, error) {
	owner, err := found(c.owners, step.Of)
	return func() (any, error) {
		session, err := owner.SessionFor(context.Background(), zcproto.APIKey(step.User, step.Key))
		if err != nil {
			return nil, err
		}
		return c.add(step.Client, session), nil
	}, err
}

// --- calls -------------------------------------------------------------------------------------------

// contextOf returns the context of a call or stream.
func contextOf(step *step) (context.Context, context.CancelFunc) {
	ctx := zcproto.WithTraceparent(context.Background(), step.Traceparent)
	if step.TimeoutMs > 0 {
		return context.WithTimeout(ctx, milliseconds(step.TimeoutMs))
	}
	return context.WithCancel(ctx)
}

func (c *clients) call(step *step) (answer, error) {
	session, err := found(c.sessions, step.Client)
	if err != nil {
		return nil, err
	}
	ctx, cancel := contextOf(step)
	made := &call{cancel: cancel, done: make(chan struct{})}
	var options []zcproto.CallOption
	if step.IdempotencyKey != "" {
		options = append(options, zcproto.IdempotencyKey(step.IdempotencyKey))
	}
	go func() {
		defer cancel()
		defer close(made.done)
		made.err = session.Call(ctx, step.Method, step.Params.of, &made.result, options...)
	}()
	c.calls[text(step.Call)] = made
	return done, nil
}

// text returns a JSON string.
func text(of json.RawMessage) (name string) {
	_ = json.Unmarshal(of, &name)
	return name
}

func (c *clients) expect(step *step) (answer, error) {
	made, err := found(c.calls, text(step.Call))
	return func() (any, error) {
		<-made.done
		return typed(made.result), made.err
	}, err
}

func (c *clients) cancel(step *step) (answer, error) {
	made, err := found(c.calls, text(step.Call))
	if err == nil {
		made.cancel()
	}
	return done, err
}

// --- streams -----------------------------------------------------------------------------------------

func (c *clients) open(step *step) (answer, error) {
	session, err := found(c.sessions, step.Client)
	if err != nil {
		return nil, err
	}
	ctx, cancel := contextOf(step)
	var options []zcproto.StreamOption
	if step.Credit != nil {
		options = append(options, zcproto.Window(step.Credit[0], step.Credit[1]))
	}
	last := make(chan struct{})
	close(last)
	made := &stream{session.Stream(ctx, step.Method, step.Params.of, options...), last}
	c.streams[step.Stream] = made
	go func() {
		defer cancel()
		_ = made.Result(nil) // opens it; `next` reports the error
	}()
	return done, nil
}

func (c *clients) next(step *step) (answer, error) {
	stream, err := found(c.streams, step.Stream)
	return func() (any, error) {
		var item any
		err := stream.Recv(&item)
		if err == nil {
			return map[string]any{"item": typed(item)}, nil
		}
		if !errors.Is(err, io.EOF) {
			return nil, err
		}
		err = stream.Result(&item)
		return map[string]any{"end": typed(item)}, err
	}, err
}

// inTurn runs a step after those of the stream that came before.
func (s *stream) inTurn(run func() error) answer {
	before, own := s.last, make(chan struct{})
	s.last = own
	return after(func() error {
		defer close(own)
		<-before
		return run()
	})
}

func (c *clients) send(step *step) (answer, error) {
	stream, err := found(c.streams, step.Stream)
	if err != nil {
		return nil, err
	}
	return stream.inTurn(func() error {
		err := stream.Send(step.Value.of)
		if errors.Is(err, io.EOF) {
			if err = stream.Result(nil); err == nil {
				err = &zcproto.Error{Code: zcproto.Cancelled, Message: "the server has ended the stream"}
			}
		}
		return err
	}), nil
}

func (c *clients) finish(step *step) (answer, error) {
	stream, err := found(c.streams, step.Stream)
	if err != nil {
		return nil, err
	}
	return stream.inTurn(stream.CloseSend), nil
}

func (c *clients) leave(step *step) (answer, error) {
	stream, err := found(c.streams, step.Stream)
	if err != nil {
		return nil, err
	}
	return after(stream.Close), nil
}

// --- calls of the server -----------------------------------------------------------------------------

// heldCalls are the calls of the server to one client, each held until a step answers it.
type heldCalls struct {
	mu      sync.Mutex
	answers []chan *step // by the number of the call
	seen    chan any
}

func (c *clients) heldOf(name string) *heldCalls {
	held := c.held[name]
	if held == nil {
		held = &heldCalls{seen: make(chan any, 1_000)}
		c.held[name] = held
	}
	return held
}

func (h *heldCalls) hold(ctx context.Context, call *zcproto.ServerCall) (any, error) {
	params := map[string]any{}
	if err := call.Decode(&params); err != nil {
		return nil, err
	}
	answered := make(chan *step, 1)
	h.mu.Lock()
	number := len(h.answers)
	h.answers = append(h.answers, answered)
	h.seen <- map[string]any{"call": number, "method": call.Method, "user": call.User, "params": typed(params)}
	h.mu.Unlock()
	select {
	case step := <-answered:
		if step.Code != 0 {
			return nil, &zcproto.Error{Code: zcproto.Code(step.Code), Message: "failed by the scenario"}
		}
		return step.Value.of, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (c *clients) handle(step *step) (answer, error) {
	session, err := found(c.sessions, step.Client)
	held := c.heldOf(step.Client)
	return after(func() error { return session.Handle(context.Background(), step.Method, held.hold) }), err
}

func (c *clients) called(step *step) (answer, error) {
	held := c.heldOf(step.Client)
	return func() (any, error) { return <-held.seen, nil }, nil
}

func (c *clients) answer(step *step) (answer, error) {
	held := c.heldOf(step.Client)
	var number int
	if err := json.Unmarshal(step.Call, &number); err != nil {
		return nil, err
	}
	held.mu.Lock()
	defer held.mu.Unlock()
	if number < len(held.answers) {
		held.answers[number] <- step
	}
	return done, nil
}

// --- sessions ----------------------------------------------------------------------------------------

func (c *clients) event(step *step) (answer, error) {
	session, err := found(c.sessions, step.Client)
	return func() (any, error) {
		event, err := session.NextEvent(context.Background())
		if err != nil {
			return nil, err
		}
		var data any
		err = event.Decode(&data)
		return map[string]any{"name": event.Name, "data": typed(data)}, err
	}, err
}

func (c *clients) session(step *step) (answer, error) {
	session, err := found(c.sessions, step.Client)
	return func() (any, error) {
		info, isOpen := session.Info()
		if !isOpen {
			return nil, nil
		}
		return map[string]any{"id": info.ID, "user": info.User, "expires_at": info.ExpiresAt.UnixMilli()}, nil
	}, err
}

func (c *clients) openSession(step *step) (answer, error) {
	session, err := found(c.sessions, step.Client)
	return func() (any, error) {
		info, err := session.Open(context.Background())
		return map[string]any{"session": info.ID}, err
	}, err
}

func (c *clients) cut(step *step) (answer, error) {
	owner, err := found(c.owners, step.Client)
	if err == nil {
		owner.Cut()
	}
	return done, err
}

func (c *clients) closeOne(step *step) (answer, error) {
	owner, session := c.owners[step.Client], c.sessions[step.Client]
	delete(c.owners, step.Client)
	delete(c.sessions, step.Client)
	switch {
	case owner != nil:
		return after(owner.Close), nil
	case session != nil:
		return after(session.Close), nil
	default:
		return done, nil // its connect step has failed
	}
}

// close closes all clients.
func (c *clients) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, owner := range c.owners {
		_ = owner.Close()
	}
}

// --- errors ------------------------------------------------------------------------------------------

var tlsCauses = map[zcproto.TLSFailure]string{
	zcproto.TLSCertificateUntrusted:    "certificate",
	zcproto.TLSCertificateExpired:      "certificate",
	zcproto.TLSCertificateNameMismatch: "certificate",
	zcproto.TLSCertificateRevoked:      "certificate",
	zcproto.TLSPinMismatch:             "pin",
	zcproto.TLSNoApplicationProtocol:   "protocol",
	zcproto.TLSUnsupportedVersion:      "protocol",
	zcproto.TLSNoSharedParameters:      "protocol",
	zcproto.TLSWrongParameters:         "protocol",
	zcproto.TLSNotTLS:                  "protocol",
	zcproto.TLSStsPolicy:               "policy",
}

// describeError returns an error in the form of the kit.
func describeError(err error) map[string]any {
	switch err := err.(type) {
	case *zcproto.Error:
		if err.Code == zcproto.ProtocolError { // a session.open whose answer has another form
			return map[string]any{"kind": "closed", "clean": false, "code": int(err.Code), "message": err.Message}
		}
		details := map[string]any{}
		if err.Details != nil {
			details = err.Details
		}
		return map[string]any{
			"kind": "call", "code": int(err.Code), "name": err.Code.String(), "message": err.Message, "details": typed(details),
		}
	case *zcproto.ConnectError:
		return map[string]any{"kind": "connect", "message": err.Error()}
	case *zcproto.ClosedError:
		var code any
		if err.Code != 0 {
			code = int(err.Code)
		}
		return map[string]any{"kind": "closed", "clean": err.Clean, "code": code, "message": err.Error()}
	case *zcproto.TLSError:
		cause := tlsCauses[err.Failure]
		if cause == "" {
			cause = "other"
		}
		return map[string]any{"kind": "tls", "cause": cause, "message": err.Error()}
	default:
		return map[string]any{"kind": "argument", "message": err.Error()}
	}
}
