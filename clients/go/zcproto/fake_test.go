package zcproto

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const (
	// patience limits what a test waits for, also on a busy machine; nothing waits for it to pass.
	patience = 2 * time.Minute
	// soon is how long a timer may take that advanceUntil waits for: delays of retries, but not timeouts of requests.
	soon     = time.Second
	testKey  = "c3RhbmRzIGZvciBhIGtleSBvZiAzMiBieXRlcy4uLi4"
	testWall = 1_767_225_600_000 // 2026-01-01T00:00:00Z
)

func welcomeBody() map[string]any {
	return map[string]any{
		"server": "fake", "versions": []any{1}, "max_frame": 1 << 20, "max_streams": 128, "idle_timeout_ms": 0,
		"tolerance_ms": 30_000, "sts": map[string]any{"max_age": 0, "include_subdomains": false},
		"streams": map[string]any{"max_open": 64, "max_item": 65_536}, "calls": map[string]any{"max": 32},
	}
}

// fakeServer is a server in memory that a test scripts, or several of them at different endpoints.
type fakeServer struct {
	t     *testing.T
	clock *manualClock
	// welcome is what it announces.
	welcome map[string]any

	mu       sync.Mutex
	ips      map[string][]string      // of names; others have one
	gates    map[string]chan struct{} // names that are resolved once these are closed
	states   map[string]endpointFault // by IP address
	tried    chan string              // IP addresses of attempts to connect
	failures []error                  // of the next attempts to connect
	goAways  []time.Duration          // delays of GOAWAYs, with the WELCOMEs of the next connections
	dials    int
	accepted chan *fakeConnection
	extra    chan *fakeConnection
	salt     uint64
}

func newFakeServer(t *testing.T) *fakeServer {
	return &fakeServer{
		t: t, clock: newManualClock(), welcome: welcomeBody(), accepted: make(chan *fakeConnection, 100),
		extra: make(chan *fakeConnection, 100), salt: 100,
		ips: map[string][]string{}, gates: map[string]chan struct{}{}, states: map[string]endpointFault{},
		tried: make(chan string, 1_000),
	}
}

// endpointFault is how an attempt to connect fails.
type endpointFault int

const (
	_         endpointFault = iota
	refused                 // nothing listens
	silent                  // no TCP connection is made
	frozen                  // there is no WELCOME
	untrusted               // the key has changed
)

// set sets what is wrong with an endpoint.
func (s *fakeServer) set(ip string, fault endpointFault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states[ip] = fault
}

func (s *fakeServer) resolve(ctx context.Context, address address) ([]netip.Addr, error) {
	s.mu.Lock()
	gate, texts := s.gates[address.host], s.ips[address.host]
	s.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if texts == nil {
		texts = []string{"192.0.2.1"}
	}
	var ips []netip.Addr
	for _, text := range texts {
		ips = append(ips, netip.MustParseAddr(text))
	}
	if len(ips) == 0 {
		return nil, &ConnectError{Reason: address.String() + ": no such host"}
	}
	return ips, nil
}

// failNext makes the next attempts to connect fail.
func (s *fakeServer) failNext(failures ...error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures = append(s.failures, failures...)
}

func (s *fakeServer) dialed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dials
}

func (s *fakeServer) dial(
	ctx context.Context, owner *connections, endpoint Endpoint, onTCP func(),
) (*connection, error) {
	s.mu.Lock()
	s.dials++
	fault := s.states[endpoint.IP.String()]
	s.mu.Unlock()
	s.tried <- endpoint.IP.String()
	switch fault {
	case refused:
		return nil, &ConnectError{Reason: "refused", Refused: true}
	case untrusted:
		return nil, newTLSError(TLSPinMismatch, nil)
	case frozen:
		onTCP()
		fallthrough
	case silent:
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	onTCP()
	s.mu.Lock()
	if len(s.failures) > 0 {
		failure := s.failures[0]
		s.failures = s.failures[1:]
		s.mu.Unlock()
		return nil, failure
	}
	s.salt++
	peer := &fakeConnection{t: s.t, server: s, salt: s.salt, frames: make(chan wire.Frame, 10_000), counter: math.MaxUint64}
	var goAways []time.Duration
	if len(s.goAways) > 0 {
		goAways, s.goAways = s.goAways[:1], s.goAways[1:]
	}
	s.mu.Unlock()
	peer.cond.L = &peer.mu
	peer.decoder = wire.Decoder{Receiver: wire.Server, Limit: math.MaxInt32, Extensions: wire.Streams | wire.Calls}
	connection := newConnection(owner, owner.mu, s.clock, conversation.New(conversation.Settings{}), peer, endpoint)
	peer.connection = connection
	owner.mu.Lock()
	owner.opened(connection)
	owner.mu.Unlock()
	go connection.read()
	peer.together(func() {
		peer.send(wire.Welcome, 0, s.welcome)
		for _, delay := range goAways {
			peer.goAway("draining", delay)
		}
	})
	select {
	case <-connection.welcomed:
	case <-connection.ended: // the client was closed
	}
	return connection, nil
}

// accept waits until the client uses its next connection.
func (s *fakeServer) accept() *fakeConnection {
	s.t.Helper()
	select {
	case peer := <-s.accepted:
		return peer
	case <-time.After(patience):
		s.t.Fatal("no connection was made")
		return nil
	}
}

// client returns a client of this server, which is closed at the end of the test.
func (s *fakeServer) client(options Options) *Client {
	s.t.Helper()
	return s.clientOf("fake", options)
}

// clientOf returns a client of several addresses.
func (s *fakeServer) clientOf(text string, options Options) *Client {
	s.t.Helper()
	addresses, err := parseAddresses(text)
	if err != nil {
		s.t.Fatal(err)
	}
	options, err = options.withDefaults()
	if err != nil {
		s.t.Fatal(err)
	}
	client, err := newClient(addresses, options, s.clock, func() float64 { return 0.5 })
	if err != nil {
		s.t.Fatal(err)
	}
	owner := client.shared.connections
	owner.resolve = s.resolve
	owner.dial = func(ctx context.Context, endpoint Endpoint, onTCP func()) (*connection, error) {
		return s.dial(ctx, owner, endpoint, onTCP)
	}
	opened := owner.extra.onOpened
	owner.extra.onOpened = func(connection *connection) func() bool {
		s.extra <- connection.link.(*fakeConnection)
		return opened(connection)
	}
	adopted := owner.onConnected
	owner.onConnected = func(connection *connection) {
		adopted(connection)
		s.accepted <- connection.link.(*fakeConnection)
	}
	s.t.Cleanup(func() {
		owner.mu.Lock()
		owner.abort()
		owner.mu.Unlock()
		_ = client.Close()
	})
	return client
}

// opened returns a client with an open session, whose token consists of ones.
func (s *fakeServer) opened(options Options) (*Client, *fakeConnection) {
	s.t.Helper()
	return s.openedAt("fake", options, sessionResult(1, nil))
}

// openedAt returns a client of an address, or several, whose session.open had this result.
func (s *fakeServer) openedAt(text string, options Options, result map[string]any) (*Client, *fakeConnection) {
	s.t.Helper()
	if options.Credentials == nil {
		options.Credentials = APIKey("ada", testKey)
	}
	client := s.clientOf(text, options)
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	peer := s.accept()
	request := peer.request("session.open")
	peer.respond(request, result)
	if err := <-done; err != nil {
		s.t.Fatal(err)
	}
	return client, peer
}

func tokenOf(number byte) wire.Token { return wire.Token(bytes.Repeat([]byte{number}, wire.TokenSize)) }

// sessionResult returns a result of session.open whose token consists of one byte.
func sessionResult(number byte, more map[string]any) map[string]any {
	token := tokenOf(number)
	result := map[string]any{
		"token": token[:], "id": "s-1", "user": "ada", "expires_at": testWall + 3_600_000 + 3_600_000, "idle_timeout_ms": 0,
		"refresh_token": nil, "refresh_expires_at": nil, "bound": false,
	}
	for name, value := range more {
		result[name] = value
	}
	return result
}

// fakeConnection is the server's end of a connection, and the client's byteStream.
type fakeConnection struct {
	t          *testing.T
	server     *fakeServer
	connection *connection
	salt       uint64
	frames     chan wire.Frame

	mu       sync.Mutex
	cond     sync.Cond
	incoming bytes.Buffer // to the client
	end      error
	decoder  wire.Decoder
	counter  uint64
	waits    int // unsent
	sent     func()
	isShut   bool
	isReset  bool
	gathered []byte
	gathers  bool
}

func (p *fakeConnection) read(data []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.incoming.Len() == 0 && p.end == nil {
		p.cond.Wait()
	}
	if p.incoming.Len() > 0 {
		return p.incoming.Read(data)
	}
	return 0, p.end
}

func (p *fakeConnection) write(data []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.decoder.Feed(bytes.Clone(data))
	for {
		frame, found, fault := p.decoder.Next()
		if fault != nil {
			p.t.Errorf("the client sent an invalid frame: %s", fault.Reason)
		}
		if !found {
			return
		}
		if frame.Salt != p.salt {
			p.t.Error("the client sent a wrong salt")
		}
		p.frames <- frame
	}
}

func (p *fakeConnection) unsent() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waits
}

func (p *fakeConnection) onSent(then func()) { p.sent = then }

func (p *fakeConnection) leafHash() [32]byte { return [32]byte(bytes.Repeat([]byte{7}, 32)) }

func (p *fakeConnection) shut() {
	p.mu.Lock()
	p.isShut = true
	p.mu.Unlock()
	p.finish(io.EOF)
}

func (p *fakeConnection) reset() {
	p.mu.Lock()
	p.isReset = true
	p.mu.Unlock()
	p.finish(newTLSError(TLSConnectionReset, nil))
}

func (p *fakeConnection) release() {}

// finish ends the byteStream: io.EOF is close_notify.
func (p *fakeConnection) finish(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.end == nil {
		p.end = err
	}
	p.cond.Broadcast()
}

// block makes bytes of the client wait for the network, or sends them.
func (p *fakeConnection) block(size int) {
	p.mu.Lock()
	p.waits = size
	p.mu.Unlock()
	if size == 0 {
		p.sent()
	}
}

func (p *fakeConnection) send(kind wire.Kind, stream uint32, value any) {
	p.sendWith(kind, stream, value, wire.Token{}, 0)
}

func (p *fakeConnection) sendWith(kind wire.Kind, stream uint32, value any, token wire.Token, off time.Duration) {
	var body []byte
	if kind.HasBody() {
		var err error
		if body, err = msgpack.Append(nil, value); err != nil {
			p.t.Fatal(err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counter++
	frame := wire.Frame{
		Kind: kind, Stream: stream, Timestamp: uint64(p.server.clock.wall() + off.Milliseconds()), Salt: p.salt,
		Counter: p.counter, Token: token, Body: body,
	}
	if p.gathers {
		p.gathered = frame.Append(p.gathered)
		return
	}
	p.incoming.Write(frame.Append(nil))
	p.cond.Broadcast()
}

// together sends all frames of a step in one read.
func (p *fakeConnection) together(step func()) {
	p.mu.Lock()
	p.gathers = true
	p.mu.Unlock()
	step()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gathers = false
	p.incoming.Write(p.gathered)
	p.gathered = nil
	p.cond.Broadcast()
}

// next waits for the next frame of the client.
func (p *fakeConnection) next(kind wire.Kind) wire.Frame {
	p.t.Helper()
	select {
	case frame := <-p.frames:
		p.isOf(frame, kind)
		return frame
	case <-time.After(patience):
		p.t.Fatalf("the client sent no %s", kind)
		return wire.Frame{}
	}
}

// fakeRequest is a REQUEST or an OPEN of the client.
type fakeRequest struct {
	wire.Message
	stream uint32
	token  wire.Token
}

func (r fakeRequest) param(name string) any {
	values, _ := msgpack.Decode(r.Params, msgpack.MaxDepth)
	params, _ := values.(map[string]any)
	return params[name]
}

// request waits for the next REQUEST, which must be of this method.
func (p *fakeConnection) request(method string) fakeRequest {
	p.t.Helper()
	return p.requestOf(wire.Request, method)
}

func (p *fakeConnection) requestOf(kind wire.Kind, method string) fakeRequest {
	p.t.Helper()
	return p.parse(p.next(kind), kind, method)
}

// soon advances the clock until the client sends a REQUEST or an OPEN, which must be of this method.
func (p *fakeConnection) soon(kind wire.Kind, method string) fakeRequest {
	p.t.Helper()
	return p.parse(advanceUntil(p.server, p.frames), kind, method)
}

func (p *fakeConnection) parse(frame wire.Frame, kind wire.Kind, method string) fakeRequest {
	p.t.Helper()
	p.isOf(frame, kind)
	message, err := wire.ParseRequest(kind, frame.Body, msgpack.MaxDepth)
	if err != nil {
		p.t.Fatal(err)
	}
	if message.Method != method {
		p.t.Fatalf("the client called %s instead of %s", message.Method, method)
	}
	return fakeRequest{Message: message, stream: frame.Stream, token: frame.Token}
}

func (p *fakeConnection) isOf(frame wire.Frame, kind wire.Kind) {
	p.t.Helper()
	if frame.Kind != kind {
		p.t.Fatalf("the client sent %s instead of %s", frame.Kind, kind)
	}
}

// advanceUntil runs the timers that are due soon, until a value comes. It never passes a timer that limits how long the client
// may take, however slow the machine is.
func advanceUntil[T any](s *fakeServer, values <-chan T) T {
	s.t.Helper()
	limit := time.After(patience)
	for {
		advanced, added := s.clock.advanceToFirst(soon)
		if advanced {
			select {
			case value := <-values:
				return value
			default:
				continue
			}
		}
		select {
		case value := <-values:
			return value
		case <-added:
		case <-limit:
			s.t.Fatal("nothing has happened")
		}
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, holds func() bool) {
	t.Helper()
	for limit := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("the condition does not hold")
		}
	}
}

// reconnected waits for the next connection, and runs the timers until then.
func (s *fakeServer) reconnected() *fakeConnection {
	s.t.Helper()
	return advanceUntil(s, s.accepted)
}

// none checks that the client has sent nothing.
func (p *fakeConnection) none() {
	p.t.Helper()
	select {
	case frame := <-p.frames:
		p.t.Fatalf("the client sent %s", frame.Kind)
	default:
	}
}

func (p *fakeConnection) respond(request fakeRequest, value any) {
	p.sendWith(wire.Response, request.stream, value, request.token, 0)
}

func (p *fakeConnection) fail(request fakeRequest, code Code, details map[string]any) {
	p.sendWith(wire.Error, request.stream, []any{int(code), "because", details}, request.token, 0)
}

func (p *fakeConnection) goAway(reason string, retryAfter time.Duration) {
	p.send(wire.GoAway, 0, map[string]any{"reason": reason, "retry_after_ms": retryAfter.Milliseconds()})
}

// call is a call of a client in a goroutine.
type call struct {
	t      *testing.T
	cancel context.CancelFunc
	done   chan struct{}
	result any
	err    error
}

func begin(t *testing.T, session *Session, method string, params any, options ...CallOption) *call {
	ctx, cancel := context.WithCancel(context.Background())
	made := &call{t: t, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(made.done)
		made.err = session.Call(ctx, method, params, &made.result, options...)
	}()
	return made
}

func (c *call) wait() {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(patience):
		c.t.Fatal("the call has not ended")
	}
}

func (c *call) succeeds(want any) {
	c.t.Helper()
	c.wait()
	if c.err != nil || c.result != want {
		c.t.Fatalf("got %v, %v", c.result, c.err)
	}
}

func (c *call) fails(target error) {
	c.t.Helper()
	c.wait()
	if !errors.Is(c.err, target) {
		c.t.Fatalf("got %v, %v instead of %v", c.result, c.err, target)
	}
}

func (c *call) isClosed(isClean bool) {
	c.t.Helper()
	c.wait()
	var closed *ClosedError
	if !errors.As(c.err, &closed) || closed.Clean != isClean {
		c.t.Fatalf("got %v, %v", c.result, c.err)
	}
}
